"""Teacher states for REPA and LDLM: `python -m data_tools.extract_hidden_states --shards DIR --model M --output DIR`.

Runs a causal language model or an encoder over the windows that the stream cuts and stores one layer's hidden states.
Under `deepspeed --module` (or several times with RANK and WORLD_SIZE set) every rank writes pieces of its own; the same
command continues an interrupted run, with any number of ranks; whoever finishes last writes the manifest.
"""

import argparse
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_tools.shard import ordered_map
from data_tools.teacher import Teacher, fingerprint, forward_flops, load_teacher
from megatext.config import cli_errors
from megatext.data import DataError
from megatext.data.hidden_states import (
    FORMAT_VERSION,
    HiddenStates,
    Storage,
    add_document,
    from_stored,
    piece_name,
    read_states_manifest,
    to_stored,
)
from megatext.data.remote import fetch, local_folder
from megatext.data.shards import MANIFEST, ShardWriter, read_json, read_manifest, split_fingerprint, write_json
from megatext.data.tar_index import TarIndex, locked
from megatext.data.windows import cut
from megatext.training.metrics import PEAK_BF16_TFLOPS

UTILISATION = 0.4
"""Share of a card's peak that `--estimate` reckons with."""
LOWEST_COSINE = 0.99
"""`--verify` fails below it: int8 with a scale a token keeps more than 0.999."""
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
        index = TarIndex(folder / entry["file"])
        ends, first = np.cumsum(index.lengths), 0
        while first < len(index) and left > 0:
            before = int(ends[first - 1]) if first else 0
            stop = int(np.searchsorted(ends, before + min(left, options.piece_tokens))) + 1
            stop = min(stop, len(index))
            tokens = int(ends[stop - 1]) - before
            pieces.append(PlannedPiece(index, first, stop, tokens))
            first, left = stop, left - tokens
    return pieces


def bytes_per_token(width: int, storage: Storage) -> int:
    """Stored bytes of one token's state."""
    return 2 * width if storage == "bf16" else width + 4


def estimate(options: Extraction, splits: list[str], card: str) -> dict[str, float]:
    """Tokens, bytes, FLOPs and hours on one card, without loading any weights."""

    def lengths() -> Iterator[np.ndarray]:
        for piece in (piece for split in splits for piece in plan(options, split)):
            yield cut(piece.index.lengths[piece.first : piece.stop], options.max_tokens).length

    tokens, flops, width = forward_flops(options.model, lengths())
    return {
        "tokens": tokens,
        "bytes": tokens * bytes_per_token(width, options.storage),
        "flops": flops,
        "gpu_hours": flops / (UTILISATION * PEAK_BF16_TFLOPS[card] * 1e12) / 3600,
    }


def _stored(
    windows: list[np.ndarray], teacher: Teacher, options: Extraction
) -> list[tuple[dict[str, np.ndarray], Any]]:
    """For each window its arrays, and float64 `[2 * width + 1]`: sums and sums of squares of the channels, and the sum
    of cosines between stored and true states."""
    results = []
    for states in teacher.states_in_order(windows, options.batch_tokens):
        arrays = to_stored(states, options.storage)
        kept = from_stored(arrays["hidden"], arrays.get("scale")).double()
        exact = states.double()
        cosine = torch.cosine_similarity(kept, exact.cpu(), dim=1).sum()
        sums = torch.cat((exact.sum(0).cpu(), exact.square().sum(0).cpu(), cosine[None]))
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
    total = torch.zeros(2 * teacher.width + 1, dtype=torch.float64)
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
    except BaseException:
        writer.abandon()
        raise
    entry |= {"token_shard": piece.index.path.name, "first_document": piece.first}
    write_json(_record_path(output, piece), {"of": of, "entry": entry, "sums": total.tolist()})


def _record_path(output: Path, piece: PlannedPiece) -> Path:
    return output / f".{piece.name}.json"


def _record(output: Path, piece: PlannedPiece, of: str) -> dict[str, Any] | None:
    """The record of a piece that is there as planned."""
    path = _record_path(output, piece)
    if not path.exists() or not (output / piece.name).exists():
        return None
    record: dict[str, Any] = read_json(path)
    return record if (record["of"], record["entry"]["samples"]) == (of, piece.stop - piece.first) else None


def _begin(options: Extraction, description: dict[str, Any]) -> None:
    """Make the folder, or check that it holds states of this description."""
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output):
        if not (output / MANIFEST).exists():
            write_json(output / MANIFEST, {"format_version": FORMAT_VERSION, **description, "splits": {}})
        present = read_states_manifest(output)
    for name, value in description.items():
        if present.get(name) != value:
            raise DataError(
                f"{output}: holds states with {name} = {present.get(name)!r}, not {value!r}; choose another --output"
            )


def _is_complete(options: Extraction, split: str, of: str) -> bool:
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


def _finish(options: Extraction, split: str, of: str, pieces: list[PlannedPiece], width: int) -> bool:
    """Put the split into the manifest if all its pieces are there; whoever comes last does so, whichever rank it is."""
    output = Path(options.output)
    with locked(output):
        manifest = read_states_manifest(output)
        records = [_record(output, piece, of) for piece in pieces]
        whole = [record for record in records if record is not None]
        if len(whole) < len(pieces):
            return split in manifest["splits"]  # another rank was faster, and has removed the records
        tokens = sum(piece.tokens for piece in pieces)
        content: dict[str, Any] = {
            "documents": sum(piece.stop - piece.first for piece in pieces),
            "tokens": tokens,
            "limit_tokens": options.limit_tokens,
            "of": of,
            "shards": [record["entry"] for record in whole],
        }
        if tokens:
            sums = torch.tensor([record["sums"] for record in whole], dtype=torch.float64).sum(0) / tokens
            mean, square, cosine = sums[:width], sums[width:-1], float(sums[-1])
            std = (square - mean.square()).clamp(min=1e-12).sqrt()
            # of every channel: REPA standardises with them
            content |= {"mean": mean.tolist(), "std": std.tolist(), "storage_cosine": cosine}
        manifest["splits"][split] = content
        write_json(output / MANIFEST, manifest)
    for piece in pieces:
        _record_path(output, piece).unlink(missing_ok=True)
    return True


def extract(options: Extraction, splits: list[str], verify: int = 0) -> None:
    """Write this rank's share of the states, and the manifest if nothing is left to others."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    tokens_manifest = read_manifest(local_folder(options.shards))
    plans = {split: plan(options, split) for split in splits}
    of = {split: split_fingerprint(tokens_manifest, split) for split in splits}
    left = [split for split in splits if not _is_complete(options, split, of[split])]
    if not left and not verify:
        print(f"{options.output}: already complete")
        return
    teacher = load_teacher(
        options.model,
        options.layer,
        _device(options),
        tokenizer_fingerprint=tokens_manifest["tokenizer"]["fingerprint"],
        max_tokens=options.max_tokens,
    )
    some = next((piece for pieces in plans.values() for piece in pieces), None)
    if some is None:
        raise DataError(f"{options.shards}: no documents in {', '.join(splits)}")
    description = {
        "teacher": Path(options.model).name,
        "teacher_fingerprint": fingerprint(options.model),
        "layer": options.layer,
        "width": teacher.width,
        "causal": teacher.is_causal(next(some.windows(options.max_tokens))),
        "max_tokens": options.max_tokens,
        "tokenizer_fingerprint": tokens_manifest["tokenizer"]["fingerprint"],
        "storage": options.storage,
    }
    _begin(options, description)
    finished = True
    for split in left:
        pieces = plans[split]
        mine = [p for p in pieces[rank::world] if _record(Path(options.output), p, of[split]) is None]
        name = f"extract {split}" + (f" (rank 0 of {world})" if world > 1 else "")
        total = sum(piece.tokens for piece in mine)
        with tqdm(total=total, desc=name, unit="tok", unit_scale=True, dynamic_ncols=True, disable=rank > 0) as bar:
            for piece in mine:
                write_piece(teacher, piece, options, of[split], bar)
        if not _finish(options, split, of[split], pieces, teacher.width):
            finished = False
            print(f"rank {rank}: its share of {split} is written; the rest is other ranks'", flush=True)
    if verify and finished and (left or rank == 0):
        check(teacher, options, plans, verify)


def _device(options: Extraction) -> str:
    if options.device != "auto":
        return options.device
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def check(teacher: Teacher, options: Extraction, plans: dict[str, list[PlannedPiece]], count: int) -> None:
    """Compute the states of `count` documents of each split again, spread over all that are there, and compare. Raises
    DataError where they differ by more than storage explains."""
    for split, pieces in plans.items():
        states = HiddenStates(options.output, split)
        ends = np.cumsum([0] + [piece.stop - piece.first for piece in pieces])
        cosines: list[Tensor] = []
        for number in np.unique(np.linspace(0, ends[-1] - 1, min(count, int(ends[-1]))).astype(int)).tolist():
            at = int(np.searchsorted(ends, number, side="right")) - 1
            index, document = pieces[at].index, pieces[at].first + number - int(ends[at])
            length = int(index.lengths[document])
            stored = states.read(index.path.name, document, 0, length).float()
            if len(stored) != length:
                raise DataError(f"{options.output}: holds no states of document {index.key(document)} ({split})")
            for start in range(0, length, options.max_tokens):
                stop = min(length, start + options.max_tokens)
                true = teacher.states([index.array(document, start, stop)])[0].float().cpu()
                cosines.append(torch.cosine_similarity(stored[start:stop], true, dim=1))
        if not cosines:
            continue
        found = torch.cat(cosines)
        lowest, mean = float(found.min()), float(found.mean())
        documents = min(count, int(ends[-1]))
        print(f"{split}: {documents} documents computed again: cosine {mean:.6f} on average, {lowest:.6f} at least")
        if not lowest >= LOWEST_COSINE:
            raise DataError(f"{options.output}: the {split} states are not those of this model and these shards")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_tools.extract_hidden_states", description=__doc__)
    add = parser.add_argument
    add("--shards", required=True, help="directory of token shards, or where to fetch them from")
    add("--model", required=True, help="Hugging Face causal LM or encoder: directory or name")
    add("--output", required=True, help="directory for the states")
    add("--layer", type=int, default=-3, help="index into hidden_states; -3 is the third-to-last")
    add("--split", nargs="+", default=["train", "validation"], metavar="SPLIT", help="(train validation)")
    add("--max-tokens", type=int, default=1024, help="window length: the data.max_tokens to train with")
    add("--limit-tokens", type=int, help="stop after so many tokens of each split")
    add("--storage", choices=["bf16", "int8"], default="bf16")
    add("--batch-tokens", type=int, default=8192, help="tokens in one forward pass (%(default)s)")
    add("--piece-tokens", type=int, default=5_000_000, help="tokens in one file (%(default)s)")
    add("--device", default="auto")
    add("--verify", type=int, default=0, metavar="N", help="compute N documents of each split again and compare")
    add("--estimate", action="store_true", help="print tokens, bytes and GPU-hours, then stop")
    add("--card", choices=sorted(PEAK_BF16_TFLOPS), default="H100", help="the card that --estimate reckons with")
    add("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    arguments = vars(_parser().parse_args(argv))
    arguments.pop("local_rank")
    only_estimate, card, splits, verify = (arguments.pop(name) for name in ("estimate", "card", "split", "verify"))
    with cli_errors():
        options = Extraction(**arguments)
        if only_estimate:
            figures = estimate(options, splits, card)
            print(
                f"{figures['tokens']:,.0f} tokens, {figures['bytes'] / 1e9:,.3f} GB of states ({options.storage}), "
                f"{figures['flops']:.3g} FLOPs, {figures['gpu_hours']:.3g} hours of one {card} at "
                f"{UTILISATION:.0%} of its {PEAK_BF16_TFLOPS[card]:.0f} TFLOP/s"
            )
            return
        extract(options, splits, verify)
        manifest = read_states_manifest(options.output)
        for split in splits:
            content = manifest["splits"].get(split)
            if content is not None and os.environ.get("RANK", "0") == "0":
                size = sum(entry["bytes"] for entry in content["shards"]) / 1e9
                cosine = content.get("storage_cosine", float("nan"))
                print(
                    f"{split:>10}: {content['documents']:,} documents, {content['tokens']:,} tokens, {size:,.3f} GB, "
                    f"cosine between stored and true states {cosine:.6f}"
                )


if __name__ == "__main__":
    main()
