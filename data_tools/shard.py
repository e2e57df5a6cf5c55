"""Text to shards of tokens: `python -m data_tools.shard --input PATH... --tokenizer T --output DIR`.

Exact duplicates and documents that are too short are dropped, the splits are decided by a hash of the text. The
result does not depend on the number of workers, nor on interruptions (`--resume`).
"""

import argparse
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from data_tools import sources
from megatext.config import cli_errors
from megatext.data import DataError
from megatext.data.shards import FORMAT_VERSION, MANIFEST, TOKENIZER_FOLDER, ShardWriter, read_manifest, write_json
from megatext.data.tar_index import TarIndex
from megatext.tokenizer import Tokenizer, load_tokenizer

SPLITS = ("train", "validation", "test")
_SETTINGS = "settings.json"
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Encoded:
    """A document on its way from a worker to its shard."""

    key: str
    identity: bytes
    """16 bytes of a hash of the normalised text: equal means duplicate; also decides the split."""
    tokens: np.ndarray | None
    """Ids with eos at the end; None where the document already lies in a finished shard."""
    meta: dict[str, Any]


_worker: tuple[Tokenizer, frozenset[str]]


def _start_worker(tokenizer: str, finished: frozenset[str]) -> None:
    global _worker
    _worker = load_tokenizer(tokenizer), finished


def text_identity(text: str) -> bytes:
    """Equal for texts that differ only in case and white space."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=16).digest()


def encode_chunk(chunk: sources.Chunk) -> tuple[list[Encoded], int, float]:
    """The chunk's documents as tokens, the number of malformed items, and the share of the input that is done."""
    tokenizer, finished = _worker
    documents, malformed = sources.decode(chunk)
    fresh = [d for d in documents if d.key not in finished and d.text.strip()]
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    ids = iter(tokenizer.encode_batch([d.text for d in fresh]))
    encoded = []
    for document in documents:
        if document.key in finished:
            tokens = None
        else:
            body = next(ids) if document.text.strip() else []
            tokens = np.array([*body, tokenizer.eos_id] if body else [], dtype)
        encoded.append(Encoded(document.key, text_identity(document.text), tokens, document.meta))
    return encoded, malformed, chunk.done


def ordered_map(
    pool: ProcessPoolExecutor | None, function: Callable[[_Item], _Result], items: Iterable[_Item], ahead: int
) -> Iterator[_Result]:
    """`map` in order over a pool with at most `ahead` items in flight, so that a corpus is never read into memory."""
    if pool is None:
        yield from map(function, items)
        return
    waiting: deque[Future[_Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class _SplitWriter:
    """The shards of one split: those finished by an interrupted run, then new ones."""

    def __init__(self, output: Path, split: str, shard_tokens: int):
        self.output, self.split, self.shard_tokens = output, split, shard_tokens
        self.entries: list[dict[str, Any]] = []
        self.finished: dict[str, int] = {}
        self._writer: ShardWriter | None = None
        while (path := self._path(len(self.entries))).exists():
            index = TarIndex(path)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            tokens = int(index.lengths.sum())
            self.entries.append(
                {
                    "file": path.name,
                    "samples": len(index),
                    "tokens": tokens,
                    "bytes": path.stat().st_size,
                    "sha256": digest,
                }
            )
            self.finished.update(zip(index.keys, index.lengths.tolist(), strict=True))

    def _path(self, number: int) -> Path:
        return self.output / f"{self.split}-{number:06d}.tar"

    def add(self, document: Encoded) -> int:
        """Write a document (unless a finished shard holds it) and return its number of tokens."""
        if document.key in self.finished:
            return self.finished[document.key]
        assert document.tokens is not None
        if self._writer is None:
            self._writer = ShardWriter(self._path(len(self.entries)))
        count = len(document.tokens)
        record = {**document.meta, "split": self.split, "n_tokens": count}
        self._writer.add(document.key, {"tokens": document.tokens}, record, count)
        if self._writer.tokens >= self.shard_tokens:
            self.close()
        return count

    def close(self) -> None:
        if self._writer is not None:
            self.entries.append(self._writer.close())
            self._writer = None

    def abandon(self) -> None:
        if self._writer is not None:
            self._writer.abandon()


class _Corpus:
    """What has been kept so far, and where it went."""

    def __init__(
        self, output: Path, *, shard_tokens: int, min_tokens: int, validation_fraction: float, test_fraction: float
    ) -> None:
        self.writers = {split: _SplitWriter(output, split, shard_tokens) for split in SPLITS}
        self.min_tokens, self.fractions = max(2, min_tokens), (validation_fraction, test_fraction)
        self.counts = {split: {"documents": 0, "tokens": 0} for split in SPLITS}
        self.dropped = {"duplicate": 0, "too_short": 0, "malformed": 0}
        self.kept = 0
        self._seen: set[bytes] = set()
        self._keys: set[str] = set()

    def add(self, document: Encoded) -> None:
        """Keep a document or drop it. Raises DataError where its key was there before."""
        if document.identity in self._seen:
            self.dropped["duplicate"] += 1
            return
        self._seen.add(document.identity)
        if document.key in self._keys:
            raise DataError(f"key {document.key} occurs twice in the inputs: give each source its own name")
        self._keys.add(document.key)
        if document.tokens is not None and len(document.tokens) < self.min_tokens:
            self.dropped["too_short"] += 1
            return
        split = split_of(document.identity, *self.fractions)
        self.counts[split]["documents"] += 1
        self.counts[split]["tokens"] += self.writers[split].add(document)
        self.kept += 1

    def read(
        self, inputs: list[str], workers: int, limit: int | None, start_arguments: tuple[str, frozenset[str]]
    ) -> None:
        """Encode all inputs and add their documents in order, with a progress bar."""
        pool = None
        if workers > 1:
            pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=start_arguments)
        else:
            _start_worker(*start_arguments)
        form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        bar = tqdm(total=1.0, desc="shard", bar_format=form, dynamic_ncols=True)
        try:
            chunks = sources.read(inputs, workers=workers)
            for documents, malformed, share in ordered_map(pool, encode_chunk, chunks, 4 * workers):
                self.dropped["malformed"] += malformed
                for document in documents:
                    self.add(document)
                    if self.kept == limit:
                        return
                bar.n = share
                bar.set_postfix_str(self._pace(max(bar.format_dict["elapsed"], 1e-3)))
        finally:
            bar.close()
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def _pace(self, seconds: float) -> str:
        tokens = sum(count["tokens"] for count in self.counts.values())
        return f"{self.kept:,} docs, {self.kept / seconds:,.0f} docs/s, {tokens / seconds / 1e3:,.0f} ktokens/s"


def shard(
    inputs: list[str],
    tokenizer_name: str,
    output: str | Path,
    *,
    workers: int = 1,
    shard_tokens: int = 50_000_000,
    limit: int | None = None,
    validation_fraction: float = 0.01,
    test_fraction: float = 0.01,
    min_tokens: int = 2,
    resume: bool = False,
) -> dict[str, Any]:
    """Write the shard directory and return its manifest. Raises DataError for unusable input or output."""
    output = Path(output)
    try:
        tokenizer = load_tokenizer(tokenizer_name)
    except (FileNotFoundError, OSError) as error:
        raise DataError(f"--tokenizer {tokenizer_name}: {error}") from error
    cutting: dict[str, Any] = {
        "shard_tokens": shard_tokens,
        "validation_fraction": validation_fraction,
        "test_fraction": test_fraction,
    }
    settings = {
        "inputs": sources.describe(inputs),
        "tokenizer": tokenizer.fingerprint(),
        "filters": {
            "limit": limit,
            "min_tokens": min_tokens,
            "deduplicate": "exact text, case and white space ignored",
            **cutting,
        },
    }
    try:
        done = _prepare(output, settings, resume)
        if done is not None:
            print(f"{output}: already complete")
            return done
        tokenizer.save(output / TOKENIZER_FOLDER)
        corpus = _Corpus(output, min_tokens=min_tokens, **cutting)
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error.strerror}); choose another --output") from error
    finished = frozenset(key for writer in corpus.writers.values() for key in writer.finished)
    try:
        corpus.read(inputs, workers, limit, (str(output / TOKENIZER_FOLDER), finished))
        for writer in corpus.writers.values():
            writer.close()
    except OSError as error:
        raise DataError(
            f"{output}: writing failed ({error.strerror}); free some space and run again with --resume"
        ) from error
    finally:
        for writer in corpus.writers.values():
            writer.abandon()
    if corpus.kept == 0:
        raise DataError(f"no document was kept of {', '.join(inputs)}: dropped {corpus.dropped}")
    manifest = _manifest(tokenizer, settings, corpus)
    write_json(output / MANIFEST, manifest)
    (output / _SETTINGS).unlink()
    return manifest


def _manifest(tokenizer: Tokenizer, settings: dict[str, Any], corpus: _Corpus) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint(),
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
        },
        "splits": {s: {**corpus.counts[s], "shards": corpus.writers[s].entries} for s in SPLITS},
        "sources": settings["inputs"],
        "filters": settings["filters"],
        "dropped": corpus.dropped,
    }


def split_of(identity: bytes, validation_fraction: float, test_fraction: float) -> str:
    """The split of a text: a function of its content alone, so it never moves when the corpus grows."""
    u = int.from_bytes(identity[:8], "big") / 2**64
    return "test" if u < test_fraction else "validation" if u < test_fraction + validation_fraction else "train"


def _prepare(output: Path, settings: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """Make or check the output folder; the manifest where everything is already there."""
    output.mkdir(parents=True, exist_ok=True)
    if not resume:
        existing = [p.name for p in output.iterdir() if re.match(r".*\.tar$|manifest\.json$", p.name)]
        if existing:
            raise DataError(f"{output}: already holds {existing[0]}; continue with --resume or choose another --output")
    elif (output / MANIFEST).exists():
        manifest = read_manifest(output)
        asked = (settings["tokenizer"], settings["filters"], settings["inputs"])
        if (manifest["tokenizer"]["fingerprint"], manifest["filters"], manifest["sources"]) != asked:
            raise DataError(f"{output}: was written from other inputs or settings; choose another --output")
        return manifest
    elif (output / _SETTINGS).exists():
        if json.loads((output / _SETTINGS).read_text()) != settings:
            raise DataError(f"{output}: was begun with other inputs or settings; choose another --output")
        for partial in output.glob(".*.partial"):
            partial.unlink()
    write_json(output / _SETTINGS, settings)
    return None


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.shard", description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="files, folders, hf:NAME[:CONFIG]:SPLIT or pydocs:")
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer, or a name on the Hugging Face hub")
    parser.add_argument("--output", required=True, help="folder for the shards")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that decode and tokenize")
    parser.add_argument(
        "--shard-tokens", type=int, default=50_000_000, help="a shard is closed when it holds so many tokens"
    )
    parser.add_argument("--limit", type=int, help="stop after so many documents")
    parser.add_argument("--validation-fraction", type=float, default=0.01)
    parser.add_argument("--test-fraction", type=float, default=0.01)
    parser.add_argument("--min-tokens", type=int, default=2, help="drop documents with fewer tokens, eos counted")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run with the same settings")
    options = vars(parser.parse_args(argv))
    with cli_errors():
        manifest = shard(options.pop("input"), options.pop("tokenizer"), options.pop("output"), **options)
        for split, entry in manifest["splits"].items():
            documents, tokens, shards = entry["documents"], entry["tokens"], len(entry["shards"])
            print(f"{split:>10}: {documents:>9,} documents {tokens:>13,} tokens {shards:>5} shards")
        print(f"   dropped: {', '.join(f'{count:,} {reason}' for reason, count in manifest['dropped'].items())}")


if __name__ == "__main__":
    main()
