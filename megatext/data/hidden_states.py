"""Teacher states beside the token shards: the states of the windows that the stream cuts, document by document.

A piece, `<token shard>-<first document>.tar`, holds `<key>.hidden.npy` of consecutive documents of one token shard, as
the bits of bfloat16 (uint16) or as int8 with one float32 scale a token (`<key>.scale.npy`). A document's place is known
by its number, so no table of keys is kept. States for other shards, windows or tokenizers are refused.
"""

from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megatext.data import DataError
from megatext.data.remote import fetch, local_folder
from megatext.data.shards import ShardWriter, read_manifest
from megatext.data.tar_index import TarIndex

Storage = Literal["bf16", "int8"]
FORMAT_VERSION = 2
MADE_BY = "data_tools.extract_hidden_states"


def to_stored(states: Tensor, storage: Storage) -> dict[str, np.ndarray]:
    """`[tokens, width]` float states as the arrays of a sample: `hidden`, and `scale` for int8."""
    if storage == "bf16":
        return {"hidden": states.to(torch.bfloat16).contiguous().view(torch.uint16).cpu().numpy()}
    states = states.float()
    scale = (states.abs().amax(dim=1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    quantised = (states / scale).round().clamp(-127, 127).to(torch.int8)
    return {"hidden": quantised.cpu().numpy(), "scale": scale.squeeze(1).cpu().numpy()}


def from_stored(hidden: np.ndarray, scale: np.ndarray | None) -> Tensor:
    """The inverse of `to_stored`, bfloat16 `[tokens, width]`."""
    values = torch.from_numpy(np.array(hidden))
    if scale is None:
        return values.view(torch.bfloat16)
    return (values.float() * torch.from_numpy(np.array(scale))[:, None]).to(torch.bfloat16)


def read_states_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a folder of teacher states. Raises DataError where it is none."""
    return read_manifest(directory, MADE_BY, FORMAT_VERSION)


def piece_name(token_shard: str, first_document: int) -> str:
    """The file that holds the states of a token shard's documents from this one on."""
    return f"{token_shard.removesuffix('.tar')}-{first_document:08d}.tar"


def add_document(
    writer: ShardWriter, key: str, tokens: int, width: int, parts: Iterator[dict[str, np.ndarray]], storage: Storage
) -> None:
    """Append a document's states, which come as the arrays of consecutive windows: a book is never held whole."""
    scales: list[np.ndarray] = []

    def hidden() -> Iterator[np.ndarray]:
        for part in parts:
            if "scale" in part:
                scales.append(part["scale"])
            yield part["hidden"]

    dtype = np.uint16 if storage == "bf16" else np.int8
    writer.add_array(f"{key}.hidden.npy", np.dtype(dtype), (tokens, width), hidden())
    if storage == "int8":
        writer.add_array(f"{key}.scale.npy", np.dtype(np.float32), (tokens,), iter(scales))
    writer.samples += 1
    writer.tokens += tokens


class Piece:
    """An opened piece. The tar is mapped when a state is first asked for."""

    def __init__(self, path: Path, entry: dict[str, Any], width: int, storage: Storage) -> None:
        if not path.exists():
            raise DataError(f"{path}: no such file of teacher states; was the folder moved or copied in part?")
        self.path, self.first_document = path, entry["first_document"]
        self._entry, self._width, self._storage = entry, width, storage

    @cached_property
    def _hidden(self) -> TarIndex:
        index = TarIndex(self.path, ".hidden.npy")
        found = (len(index), index.row_shape)
        if found != (self._entry["samples"], (self._width,)):
            raise DataError(
                f"{self.path}: holds {found[0]} documents' states of shape {found[1]}, but the manifest says "
                f"{self._entry['samples']} of width {self._width}; extract them again"
            )
        return index

    @cached_property
    def _scale(self) -> TarIndex | None:
        return TarIndex(self.path, ".scale.npy") if self._storage == "int8" else None

    def read(self, document: int, start: int, stop: int) -> Tensor | None:
        """States of tokens [start, stop) of the token shard's document of this number; None if it is not in here."""
        number = document - self.first_document
        if not 0 <= number < self._entry["samples"]:
            return None
        scales = None if self._scale is None else self._scale.array(number, start, stop)
        return from_stored(self._hidden.array(number, start, stop), scales)


class HiddenStates:
    """Reads the teacher states of one split. Documents may be missing: all from some number on, as `--limit-tokens`
    leaves them, or the whole split."""

    def __init__(self, directory: str, split: str) -> None:
        """`directory` may be remote, as shards may. Raises DataError for what is not a folder of teacher states."""
        self.directory, self.split = directory, split
        folder = local_folder(directory)
        self.manifest = read_states_manifest(folder)
        self.width: int = self.manifest["width"]
        content = self.manifest["splits"].get(split, {"shards": [], "of": None})
        self._of: str | None = content["of"]
        fetch(directory, content["shards"], folder)
        self._pieces: dict[str, list[Piece]] = {}
        for entry in content["shards"]:
            piece = Piece(folder / entry["file"], entry, self.width, self.manifest["storage"])
            self._pieces.setdefault(entry["token_shard"], []).append(piece)

    def check(self, *, tokenizer_fingerprint: str, max_tokens: int, of: str) -> None:
        """Raise DataError unless the states were made for this tokenizer, these windows and these token shards
        (`of` is their split_fingerprint)."""
        if self.manifest["tokenizer_fingerprint"] != tokenizer_fingerprint:
            raise DataError(f"{self.directory}: teacher states of another tokenizer; extract them from these shards")
        if self.manifest["max_tokens"] != max_tokens:
            have = self.manifest["max_tokens"]
            raise DataError(
                f"{self.directory}: teacher states for windows of {have} tokens, but data.max_tokens is {max_tokens}; "
                f"extract them with --max-tokens {max_tokens}"
            )
        if self._of not in (None, of):
            raise DataError(
                f"{self.directory}: its {self.split} states belong to other shards than these; extract them from these"
            )

    def read(self, token_shard: str, document: int, start: int, stop: int) -> Tensor:
        """bfloat16 `[n, width]` states of tokens [start, stop) of a document, by its number in its token shard; n is 0
        where there are none."""
        pieces = self._pieces.get(token_shard, [])
        at = bisect_right(pieces, document, key=lambda piece: piece.first_document) - 1
        found = pieces[at].read(document, start, stop) if at >= 0 else None
        return torch.empty(0, self.width, dtype=torch.bfloat16) if found is None else found
