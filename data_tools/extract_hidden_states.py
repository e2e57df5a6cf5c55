"""Teacher states for REPA and LDLM: `python -m data_tools.extract_hidden_states --shards DIR --model M --output DIR`.

Runs a causal language model or an encoder over the windows that the stream cuts and stores one layer's hidden states.
Under `deepspeed --module` (or several times with RANK and WORLD_SIZE set) every rank writes pieces of its own; the same
command continues an interrupted run, with any number of ranks; whoever finishes last writes the manifest.
"""

import argparse
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_tools.pieces import (
    Extraction,
    PlannedPiece,
    begin,
    check_same,
    finish,
    is_complete,
    plan,
    record_of,
    write_piece,
)
from megatext.config import cli_errors
from megatext.data import DataError
from megatext.data.hidden_states import HiddenStates, Storage, read_states_manifest
from megatext.data.remote import local_folder
from megatext.data.shards import read_manifest, split_fingerprint
from megatext.data.teacher import Teacher, fingerprint, forward_flops, load_teacher
from megatext.data.windows import cut
from megatext.training.cost import read_cost
from megatext.training.metrics import PEAK_BF16_TFLOPS

UTILISATION = 0.4
"""Share of a card's peak that `--estimate` reckons with."""
LOWEST_COSINE = 0.99
"""`--verify` fails below it: int8 with a scale a token keeps more than 0.999."""


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


def extract(options: Extraction, splits: list[str], verify: int = 0) -> None:
    """Write this rank's share of the states, and the manifest if nothing is left to others."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    tokens_manifest = read_manifest(local_folder(options.shards))
    plans = {split: plan(options, split) for split in splits}
    of = {split: split_fingerprint(tokens_manifest, split) for split in splits}
    tokenizer_fingerprint = tokens_manifest["tokenizer"]["fingerprint"]
    description = {
        "teacher": Path(options.model).name,
        "teacher_fingerprint": fingerprint(options.model),
        "layer": options.layer,
        "max_tokens": options.max_tokens,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "storage": options.storage,
    }
    check_same(options, description)
    left = [split for split in splits if not is_complete(options, split, of[split])]
    if not left and not verify:
        print(f"{options.output}: already complete")
        return
    some = next((piece for pieces in plans.values() for piece in pieces), None)
    if some is None:
        raise DataError(f"{options.shards}: no documents in {', '.join(splits)}")
    teacher = load_teacher(
        options.model,
        options.layer,
        _device(options),
        tokenizer_fingerprint=tokenizer_fingerprint,
        max_tokens=options.max_tokens,
    )
    causal = teacher.is_causal(max(islice(some.windows(options.max_tokens), 64), key=len))
    more = {"width": teacher.width, "causal": causal, "teacher_training": read_cost(options.model)}
    begin(options, {**description, **more})
    for split in left:
        pieces = plans[split]
        mine = [p for p in pieces[rank::world] if record_of(Path(options.output), p, of[split]) is None]
        name = f"extract {split}" + (f" (rank 0 of {world})" if world > 1 else "")
        total = sum(piece.tokens for piece in mine)
        with tqdm(total=total, desc=name, unit="tok", unit_scale=True, dynamic_ncols=True, disable=rank > 0) as bar:
            for piece in mine:
                write_piece(teacher, piece, options, of[split], bar)
        finish(options, split, of[split], pieces, teacher.width)
    missing = [split for split in splits if not is_complete(options, split, of[split])]
    if missing:
        print(f"rank {rank}: its share is written; what is left of {' and '.join(missing)} is other ranks'", flush=True)
    elif verify and (left or rank == 0):  # the last rank to finish sees everything complete
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
