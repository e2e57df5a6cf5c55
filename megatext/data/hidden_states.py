"""Teacher states beside the token shards: `<key>.hidden.npy` for the same windows that the stream cuts.

Stored as the bits of bfloat16 (uint16), or as int8 with one float32 scale a token (`<key>.scale.npy`). A state
belongs to a token of a window of `max_tokens`, so shards for other windows or another tokenizer are refused.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megatext.data import DataError
from megatext.data.shards import FORMAT_VERSION, MANIFEST, ShardWriter, read_manifest, write_json
from megatext.data.tar_index import TarIndex

Storage = Literal["bf16", "int8"]


def to_stored(states: Tensor, storage: Storage) -> dict[str, np.ndarray]:
    """`[tokens, width]` float states as the arrays of a sample: `hidden`, and `scale` for int8."""
    if storage == "bf16":
        return {"hidden": states.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()}
    states = states.float()
    scale = (states.abs().amax(dim=1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    quantised = (states / scale).round().clamp(-127, 127).to(torch.int8)
    return {"hidden": quantised.numpy(), "scale": scale.squeeze(1).numpy()}


def from_stored(hidden: np.ndarray, scale: np.ndarray | None) -> Tensor:
    """The inverse of `to_stored`, bfloat16 `[tokens, width]`."""
    values = torch.from_numpy(np.array(hidden))
    if scale is None:
        return values.view(torch.bfloat16)
    return (values.float() * torch.from_numpy(np.array(scale))[:, None]).to(torch.bfloat16)


class HiddenStatesWriter:
    """Writes one split's teacher states, document by document, and the manifest on `finish`."""

    def __init__(
        self,
        directory: str | Path,
        description: dict[str, Any],
        *,
        split: str,
        storage: Storage,
        shard_tokens: int = 5_000_000,
    ):
        """`description` holds teacher, teacher_fingerprint, layer, width, max_tokens and tokenizer_fingerprint.

        Other splits already in the directory are kept; they must have the same description.
        """
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.split, self.storage, self.shard_tokens = split, storage, shard_tokens
        self._manifest = {"format_version": FORMAT_VERSION, **description, "storage": storage, "splits": {}}
        if (self.directory / MANIFEST).exists():
            present = read_manifest(self.directory)
            for name, value in self._manifest.items():
                if name != "splits" and present.get(name) != value:
                    raise DataError(
                        f"{directory}: holds states with {name} = {present.get(name)!r}, not {value!r}; "
                        "choose another --output"
                    )
            written = present["splits"].pop(split, None)  # one whose files were removed is written anew
            if written is not None and all((self.directory / entry["file"]).exists() for entry in written["shards"]):
                raise DataError(f"{directory}: already holds states of split {split!r}; choose another --output")
            self._manifest["splits"] = present["splits"]
        self._entries: list[dict[str, Any]] = []
        self._writer: ShardWriter | None = None
        self._sums: Tensor | None = None

    def add(self, key: str, states: Tensor) -> None:
        """The states `[tokens, width]` of a document's tokens: of all, or of the first ones."""
        if self._writer is None:
            self._writer = ShardWriter(self.directory / f"{self.split}-{len(self._entries):06d}.tar")
        self._writer.add(key, to_stored(states.cpu(), self.storage), None, len(states))
        double = states.double().cpu()
        moments = torch.stack((double.sum(0), double.square().sum(0)))
        self._sums = moments if self._sums is None else self._sums + moments
        if self._writer.tokens >= self.shard_tokens:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is not None:
            self._entries.append(self._writer.close())
            self._writer = None

    def finish(self) -> None:
        """Close the last shard and write the manifest, which makes the states visible to readers."""
        self._close_shard()
        documents, tokens = (sum(entry[name] for entry in self._entries) for name in ("samples", "tokens"))
        split = {"documents": documents, "tokens": tokens, "shards": self._entries}
        if self._sums is not None:
            mean = self._sums[0] / tokens
            std = (self._sums[1] / tokens - mean.square()).clamp(min=1e-12).sqrt()
            split |= {"mean": mean.tolist(), "std": std.tolist()}  # a channel's: REPA standardises with them
        self._manifest["splits"][self.split] = split
        write_json(self.directory / MANIFEST, self._manifest)

    def abandon(self) -> None:
        """Give up the shard that is not yet whole."""
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None


class HiddenStates:
    """Reads teacher states by document key. Documents, or the ends of documents, may be missing."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.manifest = read_manifest(directory, "data_tools.extract_hidden_states")
        if "width" not in self.manifest:
            raise DataError(f"{directory}: holds no teacher states; write them with data_tools.extract_hidden_states")
        self.width: int = self.manifest["width"]
        self._where: dict[str, tuple[TarIndex, TarIndex | None, int]] = {}
        for entry in (entry for split in self.manifest["splits"].values() for entry in split["shards"]):
            path = self.directory / entry["file"]
            hidden = TarIndex(path, ".hidden.npy")
            if len(hidden) and hidden.row_shape != (self.width,):
                raise DataError(f"{path}: states of shape {hidden.row_shape}, but the manifest says width {self.width}")
            scale = TarIndex(path, ".scale.npy") if self.manifest["storage"] == "int8" else None
            for document, key in enumerate(hidden.keys):
                self._where[key] = (hidden, scale, document)

    def check(self, *, tokenizer_fingerprint: str, max_tokens: int) -> None:
        """Raise DataError unless the states were made for this tokenizer and these windows."""
        if self.manifest["tokenizer_fingerprint"] != tokenizer_fingerprint:
            raise DataError(f"{self.directory}: teacher states of another tokenizer; extract them from these shards")
        if self.manifest["max_tokens"] != max_tokens:
            have = self.manifest["max_tokens"]
            raise DataError(
                f"{self.directory}: teacher states for windows of {have} tokens, but data.max_tokens is {max_tokens}; "
                f"extract them with --max-tokens {max_tokens}"
            )

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """bfloat16 `[n, width]` states of tokens [start, start + n); n < stop - start, or 0, where there are fewer."""
        if key not in self._where:
            return torch.empty(0, self.width, dtype=torch.bfloat16)
        hidden, scale, document = self._where[key]
        scales = None if scale is None else scale.array(document, start, stop)
        return from_stored(hidden.array(document, start, stop), scales)
