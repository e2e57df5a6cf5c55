"""The files that teacher states are extracted into: which documents go into which, and when a split is complete.

A piece is written by the rank it falls to, with a record of it beside it; whoever finds all records there puts them
into the manifest. So ranks need not know of each other, and what an interruption leaves is what is taken up again.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_tools.ordered_map import ordered_map
from megatext.data import DataError
from megatext.data.hidden_states import (
    FORMAT_VERSION,
    Storage,
    add_document,
    from_stored,
    piece_name,
    read_states_manifest,
    to_stored,
)
from megatext.data.remote import fetch, local_folder
from megatext.data.shards import MANIFEST, ShardWriter, read_json, read_manifest, write_json
from megatext.data.tar_index import TarIndex, locked
from megatext.data.teacher import Teacher

_BATCHES_A_GROUP = 8
"""Windows of so many batches are sorted by length together, and held in memory."""


@dataclass(frozen=True)
class Extraction:
    """What is extracted."""

    shards: str
    """Directory of token shards, which may be remote."""
    model: str
    """Directory of a Hugging Face causal language model or encoder, or its name on the hub."""
    output: str
    """Directory for the states."""
    layer: int = -3
    """Index into transformers' `hidden_states`: 0 is the embedding, -1 the last layer after its norm."""
    max_tokens: int = 1024
    """Window length; must equal data.max_tokens of the training run."""
    limit_tokens: int | None = None
    """Stop, in each split, after the document in which so many tokens are reached."""
    storage: Storage = "bf16"
    """bf16: 2 bytes a channel; int8: 1 byte a channel and 4 bytes a token."""
    batch_tokens: int = 8192
    """Tokens in one forward pass, padding included."""
    piece_tokens: int = 5_000_000
    """A file is closed after the document in which so many are reached; what a kill costs at most."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""


@dataclass(frozen=True)
class PlannedPiece:
    """Consecutive documents of one token shard whose states go into one file."""

    index: TarIndex
    """The token shard."""
    first: int
    """Number of the first document in it."""
    stop: int
    """One more than that of the last."""
    tokens: int
    """Tokens of these documents."""

    @property
    def name(self) -> str:
        """The file's name."""
        return piece_name(self.index.path.name, self.first)

    def windows(self, max_tokens: int) -> Iterator[np.ndarray]:
        """The tokens of every window, document by document."""
        for document in range(self.first, self.stop):
            for start in range(0, int(self.index.lengths[document]), max_tokens):
                yield self.index.array(document, start, start + max_tokens)


def plan(options: Extraction, split: str) -> list[PlannedPiece]:
    """The pieces of a split, up to the limit: a function of the shards and the options alone."""
    folder = local_folder(options.shards)
    manifest = read_manifest(folder)
    if split not in manifest["splits"]:
        raise DataError(f"{options.shards}: no split {split!r}, only {', '.join(manifest['splits'])}")
    entries = manifest["splits"][split]["shards"]
    fetch(options.shards, entries, folder)
    pieces: list[PlannedPiece] = []
    left = options.limit_tokens if options.limit_tokens is not None else manifest["splits"][split]["tokens"]
    for entry in entries:
        index = TarIndex(folder / entry["file"], sha256=entry["sha256"])
        ends, first = np.cumsum(index.lengths), 0
        while first < len(index) and left > 0:
            before = int(ends[first - 1]) if first else 0
            stop = int(np.searchsorted(ends, before + min(left, options.piece_tokens))) + 1
            stop = min(stop, len(index))
            tokens = int(ends[stop - 1]) - before
            pieces.append(PlannedPiece(index, first, stop, tokens))
            first, left = stop, left - tokens
    return pieces


def _stored(
    windows: list[np.ndarray], teacher: Teacher, options: Extraction
) -> list[tuple[dict[str, np.ndarray], Any]]:
    """For each window its arrays, and float64 `[2 * width + 2]`: sums and sums of squares of the channels, the sum of
    cosines between stored and true states, and of how many tokens: of every 16th window, as the CPU computes them."""
    results = []
    for number, states in enumerate(teacher.states_in_order(windows, options.batch_tokens)):
        arrays = to_stored(states, options.storage)
        sums = torch.zeros(2 * teacher.width + 2, dtype=torch.float64)
        sums[:-2] = torch.cat((states.double().sum(0), states.double().square().sum(0)))
        if number % 16 == 0:
            kept = from_stored(arrays["hidden"], arrays.get("scale")).float()
            sums[-2] = torch.cosine_similarity(kept, states.float().cpu(), dim=1).sum()
            sums[-1] = len(kept)
        results.append((arrays, sums))
    return results


def _groups(piece: PlannedPiece, options: Extraction) -> Iterator[list[np.ndarray]]:
    group: list[np.ndarray] = []
    held = 0
    for window in piece.windows(options.max_tokens):
        group.append(window)
        held += len(window)
        if held >= _BATCHES_A_GROUP * options.batch_tokens:
            yield group
            group, held = [], 0
    if group:
        yield group


def write_piece(teacher: Teacher, piece: PlannedPiece, options: Extraction, of: str, bar: Any) -> None:
    """The piece's file, and a record of it beside it; both appear whole. Memory is that of a few groups of windows."""
    output = Path(options.output)
    total = torch.zeros(2 * teacher.width + 2, dtype=torch.float64)
    writer = ShardWriter(output / piece.name)
    try:
        with ThreadPoolExecutor(1) as pool:  # the next group is computed while one is written
            compute = partial(_stored, teacher=teacher, options=options)
            found = chain.from_iterable(ordered_map(pool, compute, _groups(piece, options), ahead=2))
            for document in range(piece.first, piece.stop):
                tokens = int(piece.index.lengths[document])

                def parts(windows: int) -> Iterator[dict[str, np.ndarray]]:
                    for arrays, sums in islice(found, windows):
                        total.add_(sums)
                        bar.update(len(arrays["hidden"]))
                        yield arrays

                windows = -(-tokens // options.max_tokens)
                key = piece.index.key(document)
                add_document(writer, key, tokens, teacher.width, parts(windows), options.storage)
        entry = writer.close()
    except BaseException as error:
        writer.abandon()
        if isinstance(error, OSError):
            advice = "free some space and run the same command again"
            raise DataError(f"{output / piece.name}: cannot be written ({error.strerror}); {advice}") from error
        raise
    entry |= {"token_shard": piece.index.path.name, "first_document": piece.first}
    write_json(_record_path(output, piece), {"of": of, "entry": entry, "sums": total.tolist()})


def _record_path(output: Path, piece: PlannedPiece) -> Path:
    return output / f".{piece.name}.json"


def record_of(output: Path, piece: PlannedPiece, of: str) -> dict[str, Any] | None:
    """The record of a piece that is there as planned."""
    path = _record_path(output, piece)
    if not path.exists() or not (output / piece.name).exists():
        return None
    record: dict[str, Any] = read_json(path)
    return record if (record["of"], record["entry"]["samples"]) == (of, piece.stop - piece.first) else None


def begin(options: Extraction, description: dict[str, Any]) -> None:
    """Make the folder with a manifest of no splits yet, unless another rank or an earlier run has."""
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output):
        if not (output / MANIFEST).exists():
            write_json(output / MANIFEST, {"format_version": FORMAT_VERSION, **description, "splits": {}})
    check_same(options, description)


def check_same(options: Extraction, description: dict[str, Any]) -> None:
    """Raise DataError where the folder holds states of another description."""
    if not (Path(options.output) / MANIFEST).exists():
        return
    present = read_states_manifest(options.output)
    for name, value in description.items():
        # a model may have moved; whether it is causal is the first rank's finding, which rounding might make another's
        if name not in ("teacher", "causal", "teacher_training") and present.get(name) != value:
            raise DataError(
                f"{options.output}: holds states with {name} = {present.get(name)!r}, not {value!r}; choose another "
                "--output"
            )


def is_complete(options: Extraction, split: str, of: str) -> bool:
    """Whether the manifest has the split. One whose files were removed is written anew; one that was extracted with
    another limit or from other shards is refused."""
    output = Path(options.output)
    if not (output / MANIFEST).exists():
        return False
    written = read_states_manifest(output)["splits"].get(split)
    if written is None or not all((output / entry["file"]).exists() for entry in written["shards"]):
        return False
    for name, value in (("of", of), ("limit_tokens", options.limit_tokens)):
        if written[name] != value:
            what = "other shards" if name == "of" else f"--limit-tokens {written[name]}"
            raise DataError(f"{output}: already holds states of split {split!r} of {what}; choose another --output")
    return True


def finish(options: Extraction, split: str, of: str, pieces: list[PlannedPiece], width: int) -> None:
    """Put the split into the manifest if all its pieces are there; whichever rank comes last does so. The records stay,
    so that a piece which gets lost is all that is extracted again."""
    output = Path(options.output)
    with locked(output):
        manifest = read_states_manifest(output)
        records = [record_of(output, piece, of) for piece in pieces]
        whole = [record for record in records if record is not None]
        if len(whole) < len(pieces):
            return
        tokens = sum(piece.tokens for piece in pieces)
        content: dict[str, Any] = {
            "documents": sum(piece.stop - piece.first for piece in pieces),
            "tokens": tokens,
            "limit_tokens": options.limit_tokens,
            "of": of,
            "shards": [record["entry"] for record in whole],
        }
        if tokens:
            sums = torch.tensor([record["sums"] for record in whole], dtype=torch.float64).sum(0)
            mean, square = sums[:width] / tokens, sums[width:-2] / tokens
            std = (square - mean.square()).clamp(min=1e-12).sqrt()
            # of every channel: REPA standardises with them
            content |= {"mean": mean.tolist(), "std": std.tolist(), "storage_cosine": float(sums[-2] / sums[-1])}
        manifest["splits"][split] = content
        write_json(output / MANIFEST, manifest)
