"""Train a SentencePiece tokenizer: `python -m data_tools.train_tokenizer --input PATH... --vocab-size N --output DIR`.

Unigram with byte fallback and no normalisation, so that any text survives encoding and decoding unchanged.
"""

import argparse
import io
import os
import time
from pathlib import Path

from tqdm import tqdm

from data_tools import sources
from megatext.config import cli_errors
from megatext.data import DataError
from megatext.tokenizer import SENTENCEPIECE_FILE, SentencePieceTokenizer

_THREADS = 2
"""Part of the result: with another number SentencePiece adds in another order and ends with other pieces."""


def sample_lines(inputs: list[str], *, megabytes: float, workers: int, fraction: float) -> list[str]:
    """Lines of the inputs' documents, evenly sampled where they hold more than `megabytes`, in order."""
    lines: list[str] = []
    stride, seen, held, skipped = 1, 0, 0, 0
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    bar = tqdm(total=1.0, desc="read", bar_format=form, dynamic_ncols=True)
    for chunk in sources.read(inputs, workers=workers, fraction=fraction):
        bar.update(chunk.done - bar.n)
        documents, problems = sources.decode(chunk)
        skipped += len(problems)
        for document in documents:
            for line in document.text.split("\n"):
                if line.strip() and seen % stride == 0:
                    lines.append(line)
                    held += len(line)
                seen += bool(line.strip())
        while held > 2e6 * megabytes:  # thin out to every second line, and take every second from here on
            lines, stride = lines[::2], stride * 2
            held = sum(map(len, lines))
    bar.close()
    if skipped:
        print(f"{skipped:,} items without a document were passed over; data_tools.shard says what is wrong with them")
    surplus = max(1.0, held / (1e6 * megabytes))
    return [lines[int(i * surplus)] for i in range(int(len(lines) / surplus))]


def train(lines: list[str], vocab_size: int) -> SentencePieceTokenizer:
    """A tokenizer of exactly `vocab_size` pieces: <pad> <bos> <eos> <unk>, 256 bytes, the newline, learned pieces. The
    same lines give the same pieces on any machine."""
    from sentencepiece import SentencePieceTrainer

    if not lines:
        raise DataError("no text to train a tokenizer on: the inputs hold no lines")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n"],
            split_digits=True,
            character_coverage=0.9995,
            max_sentence_length=16384,
            num_threads=_THREADS,
            pad_id=0,
            pad_piece="<pad>",
            bos_id=1,
            bos_piece="<bos>",
            eos_id=2,
            eos_piece="<eos>",
            unk_id=3,
            unk_piece="<unk>",
            minloglevel=2,
        )
    except RuntimeError as error:
        text = str(error).strip().splitlines()[-1].rpartition("] ")[2]
        raise DataError(f"cannot make {vocab_size} pieces of this text ({text}); try another --vocab-size") from error
    return SentencePieceTokenizer(model.getvalue())


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.train_tokenizer", description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="files, folders, hf:NAME[:CONFIG]:SPLIT or pydocs:")
    parser.add_argument("--vocab-size", type=int, default=4096, help="number of pieces, special ones included")
    parser.add_argument("--output", required=True, help="folder for tokenizer.model")
    parser.add_argument(
        "--sample-megabytes", type=float, default=4.0, help="train on about this much evenly sampled text"
    )
    parser.add_argument(
        "--pydocs-fraction", type=float, default=0.25, help="share of the source files of pydocs: to look at"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that read pydocs:")
    options = parser.parse_args(argv)
    with cli_errors():
        started = time.monotonic()
        lines = sample_lines(
            options.input, megabytes=options.sample_megabytes, workers=options.workers, fraction=options.pydocs_fraction
        )
        characters = sum(map(len, lines))
        print(f"training {options.vocab_size} pieces on {len(lines):,} lines, {characters / 1e6:.2f} MB", flush=True)
        tokenizer = train(lines, options.vocab_size)
        tokenizer.save(options.output)
        some = lines[:: max(1, len(lines) // 2000)]
        tokens = sum(map(len, tokenizer.encode_batch(some)))
        print(
            f"{Path(options.output) / SENTENCEPIECE_FILE}: {tokenizer.vocab_size} pieces, "
            f"{sum(map(len, some)) / tokens:.2f} characters a token, {time.monotonic() - started:.0f} s"
        )


if __name__ == "__main__":
    main()
