"""Text to shards of tokens: `python -m data_tools.shard --input PATH... --tokenizer T --output DIR`.

Exact duplicates and documents that a filter refuses are dropped, the splits are decided by a hash of the text. The
result does not depend on the number of workers, nor on interruptions: every few seconds a snapshot says how far all
files are, and `--resume` cuts them back to it and goes on from there.
"""

import argparse
import hashlib
import os
import re
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from data_tools import sources
from data_tools.hash_set import HashFile, HashSet
from data_tools.ordered_map import ordered_map
from megatext.config import cli_errors
from megatext.data import DataError
from megatext.data.shards import (
    FORMAT_VERSION,
    MANIFEST,
    TOKENIZER_FOLDER,
    ShardWriter,
    files_of,
    lock_for_writing,
    read_json,
    read_manifest,
    sample_bytes,
    write_json,
)
from megatext.tokenizer import Tokenizer, load_tokenizer

SPLITS = ("train", "validation", "test")
SNAPSHOT_SECONDS = 10.0
"""What a kill can cost at most, beside the chunks in flight."""
_PROGRESS = ".progress.json"
_SEEN = ".seen.bin"
_SAME_DOCUMENT = "case and white space ignored"
"""What the manifest says of `text_identity`."""
_DEFAULT_TOKENIZER = "Qwen/Qwen3-1.7B"


@dataclass(frozen=True)
class Filters:
    """Which documents are kept, and where they go. Part of the manifest."""

    min_tokens: int = 2
    """Documents with fewer tokens, eos counted, are dropped."""
    languages: tuple[str, ...] = ()
    """Documents whose metadata names another `lang` are dropped; those that name none are kept. (): no filter."""
    min_words: int | None = None
    """Of the metadata's `word_count`, or of the text where there is none."""
    max_words: int | None = None
    """Likewise."""
    limit: int | None = None
    """Stop after so many kept documents."""
    validation_fraction: float = 0.01
    """Share of documents, by a hash of their text."""
    test_fraction: float = 0.01
    """Likewise."""

    def refuses(self, document: sources.Document) -> str | None:
        """Why a document is dropped before it is tokenized."""
        language = document.meta.get("lang", document.meta.get("language"))
        if self.languages and language is not None and language not in self.languages:
            return "language"
        if self.min_words is not None or self.max_words is not None:
            given = document.meta.get("word_count")
            words = given if isinstance(given, int) else len(document.text.split())
            if words < (self.min_words or 0) or (self.max_words is not None and words > self.max_words):
                return "word_count"
        return None


@dataclass(frozen=True)
class Encoded:
    """A chunk on its way from a worker to the shards."""

    next_place: tuple[int, int]
    """(stream, item) to go on from after this chunk."""
    done: float
    """Share of all inputs that is read."""
    identities: np.ndarray
    """uint64 `[documents, 2]`: hash of each normalised text; equal means duplicate; also decides the split."""
    tokens: list[int]
    """Tokens of each document, eos counted."""
    samples: list[bytes]
    """Each document as it lies in the tar."""
    dropped: dict[str, int]
    """Refused before tokenization, by filter."""
    problems: list[sources.Problem]
    """Items without a document."""


_worker: tuple[Tokenizer, Filters]


def _start_worker(tokenizer: Tokenizer, filters: Filters) -> None:
    global _worker
    _worker = tokenizer, filters


def _start_worker_process(tokenizer: Tokenizer, filters: Filters) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: do not outlive a killed parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's to answer
    # there are as many workers as cores; a thread of its own is a third faster than TOKENIZERS_PARALLELISM=false
    os.environ["RAYON_NUM_THREADS"] = "1"
    _start_worker(tokenizer, filters)


def text_identity(text: str) -> bytes:
    """16 bytes, equal for texts that differ only in case and white space."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=16).digest()


def split_of(identity: bytes, filters: Filters) -> str:
    """The split of a text: a function of its content alone, so it never moves when the corpus grows."""
    u = int.from_bytes(identity[:8], "big") / 2**64
    test, validation = filters.test_fraction, filters.validation_fraction
    return "test" if u < test else "validation" if u < test + validation else "train"


def encode_chunk(chunk: sources.Chunk) -> Encoded:
    """Decode, filter and tokenize a chunk."""
    tokenizer, filters = _worker
    documents, problems = sources.decode(chunk)
    reasons = [filters.refuses(document) for document in documents]
    kept = [document for document, reason in zip(documents, reasons, strict=True) if reason is None]
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    identities, tokens, samples = [], [], []
    for document, body in zip(kept, tokenizer.encode_batch([d.text for d in kept]), strict=True):
        ids = np.array([*body, tokenizer.eos_id], dtype)
        identities.append(text_identity(document.text))
        record = {**document.meta, "split": split_of(identities[-1], filters), "n_tokens": len(ids)}
        samples.append(sample_bytes(document.key, {"tokens": ids}, record))
        tokens.append(len(ids))
    # a stream that broke off is not read again
    place = (chunk.stream + 1, 0) if chunk.problem else (chunk.stream, chunk.first + len(chunk.items))
    joined = np.frombuffer(b"".join(identities), "<u8").reshape(-1, 2)
    return Encoded(place, chunk.done, joined, tokens, samples, dict(Counter(filter(None, reasons))), problems)


class _SplitWriter:
    """The shards of one split: those that are whole, and the one in the making."""

    def __init__(self, output: Path, split: str, shard_tokens: int, snapshot: dict[str, Any] | None) -> None:
        self.output, self.split, self.shard_tokens = output, split, shard_tokens
        self.entries: list[dict[str, Any]] = list(snapshot["entries"]) if snapshot else []
        self._writer: ShardWriter | None = None
        if snapshot and snapshot["open"]:
            self._writer = ShardWriter(self._path(len(self.entries)), snapshot["open"])
        known = {entry["file"] for entry in self.entries}
        for later in output.glob(f"{split}-*.tar"):  # finished after the snapshot: they will be written again
            if later.name not in known:
                later.unlink()

    def _path(self, number: int) -> Path:
        return self.output / f"{self.split}-{number:06d}.tar"

    def add(self, sample: bytes, tokens: int) -> None:
        if self._writer is None:
            self._writer = ShardWriter(self._path(len(self.entries)))
        self._writer.add_bytes(sample, tokens)
        if self._writer.tokens >= self.shard_tokens:
            self.close()

    def snapshot(self) -> dict[str, Any]:
        return {"entries": self.entries, "open": self._writer.sync() if self._writer else None}

    def close(self) -> None:
        if self._writer is not None:
            self.entries.append(self._writer.close())
            self._writer = None


class _Corpus:
    """What has been kept so far, where it went, and the place in the inputs to go on from."""

    def __init__(
        self, output: Path, settings: dict[str, Any], filters: Filters, on_error: str, progress: dict[str, Any] | None
    ) -> None:
        """`progress` is a snapshot to go on from. The files it speaks of are cut back to it."""
        self.output, self.settings, self.filters, self.on_error = output, settings, filters, on_error
        old = progress or {"place": [0, 0], "counts": {}, "dropped": {}, "skipped": {}, "seen": 0, "writers": {}}
        self.place = (old["place"][0], old["place"][1])
        self.counts = {split: {"documents": 0, "tokens": 0} | old["counts"].get(split, {}) for split in SPLITS}
        self.dropped = Counter({"duplicate": 0, "too_short": 0} | old["dropped"])
        self.skipped = Counter(old["skipped"])
        tokens = settings["shard_tokens"]
        self.writers = {split: _SplitWriter(output, split, tokens, old["writers"].get(split)) for split in SPLITS}
        self._identities = HashFile(output / _SEEN, old["seen"])
        self._seen = HashSet()
        for part in np.array_split(self._identities.read(), 1 + old["seen"] // (1 << 20)):
            self._seen.add(part)
        self._last_snapshot = time.monotonic()

    @property
    def kept(self) -> int:
        return sum(count["documents"] for count in self.counts.values())

    def add(self, chunk: Encoded) -> None:
        """Keep or drop the documents of a chunk. Raises DataError for an item without one, if that is to stop us."""
        if chunk.problems and self.on_error == "stop":
            more = f" (and {len(chunk.problems) - 1} more near it)" if len(chunk.problems) > 1 else ""
            raise DataError(f"{chunk.problems[0].message}{more}; --on-error skip passes such items over")
        self.skipped.update(problem.cause for problem in chunk.problems)
        self.dropped.update(chunk.dropped)
        new = self._seen.add(chunk.identities)
        self._identities.append(chunk.identities[new])
        for identity, is_new, tokens, sample in zip(chunk.identities, new, chunk.tokens, chunk.samples, strict=True):
            if not is_new:
                self.dropped["duplicate"] += 1
            elif tokens < max(2, self.filters.min_tokens):
                self.dropped["too_short"] += 1
            else:
                split = split_of(identity.tobytes(), self.filters)
                self.counts[split]["documents"] += 1
                self.counts[split]["tokens"] += tokens
                self.writers[split].add(sample, tokens)
                if self.kept == self.filters.limit:
                    break
        self.place = chunk.next_place
        if time.monotonic() - self._last_snapshot >= SNAPSHOT_SECONDS:
            self.snapshot()

    def snapshot(self) -> None:
        """Everything up to `place` is on the disk, and a file says so."""
        writers = {split: writer.snapshot() for split, writer in self.writers.items()}
        self._identities.sync()
        progress = {
            "settings": self.settings,
            "place": self.place,
            "counts": self.counts,
            "dropped": self.dropped,
            "skipped": self.skipped,
            "seen": self._identities.count,
            "writers": writers,
        }
        write_json(self.output / _PROGRESS, progress)
        self._last_snapshot = time.monotonic()

    def read(self, inputs: list[str], tokenizer: Tokenizer, workers: int, separator: str) -> None:
        """Encode what is left of the inputs and add it in order, with a progress bar."""
        if self.kept == self.filters.limit:  # interrupted between the last document and the manifest
            return
        pool = None
        if workers > 1:  # where processes are forked, they share one tokenizer
            arguments = (tokenizer, self.filters)
            pool = ProcessPoolExecutor(workers, initializer=_start_worker_process, initargs=arguments)
        else:
            _start_worker(tokenizer, self.filters)
        form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        bar = tqdm(total=1.0, desc="shard", bar_format=form, dynamic_ncols=True)
        had, had_tokens = self.kept, self._tokens()
        skip = self.on_error == "skip"
        try:
            chunks = sources.read(inputs, workers=workers, separator=separator, start=self.place, skip_errors=skip)
            for chunk in ordered_map(pool, encode_chunk, chunks, 4 * workers):
                self.add(chunk)
                seconds = max(bar.format_dict["elapsed"], 1e-3)
                pace = (self.kept - had) / seconds, (self._tokens() - had_tokens) / seconds / 1e3
                pace_text = f"{self.kept:,} docs, {pace[0]:,.0f} docs/s, {pace[1]:,.0f} ktokens/s"
                bar.set_postfix_str(pace_text, refresh=False)
                bar.update(chunk.done - bar.n)
                if self.kept == self.filters.limit:
                    return
        finally:
            bar.close()
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def _tokens(self) -> int:
        return sum(count["tokens"] for count in self.counts.values())

    def finish(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Close the shards and write the manifest, which makes them visible to readers."""
        for writer in self.writers.values():
            writer.close()
        self._identities.close()
        manifest = {
            "format_version": FORMAT_VERSION,
            "tokenizer": {
                "fingerprint": tokenizer.fingerprint(),
                "vocab_size": tokenizer.vocab_size,
                "eos_id": tokenizer.eos_id,
                "files": files_of(self.output, TOKENIZER_FOLDER),
            },
            "splits": {s: {**self.counts[s], "shards": self.writers[s].entries} for s in SPLITS},
            "sources": self.settings["inputs"],
            **{key: self.settings[key] for key in ("filters", "separator", "shard_tokens", "on_error")},
            "dropped": dict(self.dropped),
            "skipped": dict(self.skipped),
        }
        write_json(self.output / MANIFEST, manifest)
        _remove_progress(self.output)
        return manifest


def shard(
    inputs: list[str],
    tokenizer_name: str,
    output: str | Path,
    *,
    workers: int = 1,
    shard_tokens: int = 50_000_000,
    separator: str = sources.SEPARATOR,
    on_error: Literal["stop", "skip"] = "stop",
    resume: bool = False,
    **filters: Any,
) -> dict[str, Any]:
    """Write the shard directory and return its manifest; `filters` are the fields of Filters. Raises DataError for
    unusable input or output."""
    output, chosen = Path(output), Filters(**filters)
    try:
        tokenizer = load_tokenizer(tokenizer_name)
    except (OSError, ValueError) as error:
        raise DataError(f"--tokenizer {tokenizer_name}: {error}") from error
    settings = {
        "inputs": sources.describe(inputs),
        "separator": separator,
        "tokenizer": tokenizer.fingerprint(),
        "shard_tokens": shard_tokens,
        "filters": {**asdict(chosen), "languages": list(chosen.languages), "deduplicate": _SAME_DOCUMENT},
        "on_error": on_error,
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = open(output / ".writing", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error.strerror}); choose another --output") from error
    with lock:
        lock_for_writing(lock)
        try:
            done, progress = _prepare(output, settings, resume)
            if done is not None:
                print(f"{output}: already complete")
                return done
            tokenizer.save(output / TOKENIZER_FOLDER)
            corpus = _Corpus(output, settings, chosen, on_error, progress)
            corpus.snapshot()
        except OSError as error:
            raise DataError(f"{output}: cannot be written ({error.strerror}); choose another --output") from error
        try:
            corpus.read(inputs, tokenizer, workers, separator)
            if corpus.kept == 0:
                refused = ", ".join(f"{count} {cause}" for cause, count in (corpus.dropped + corpus.skipped).items())
                raise DataError(f"no document was kept of {', '.join(inputs)} ({refused or 'they hold none'})")
            return corpus.finish(tokenizer)
        except OSError as error:
            raise DataError(
                f"{output}: writing failed ({error.strerror}); free some space and run again with --resume"
            ) from error


def _prepare(
    output: Path, settings: dict[str, Any], resume: bool
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Check the output folder; the manifest where everything is there, the snapshot where something is.

    A run may be resumed with another `on_error`: what was read before is the same either way.
    """
    existing = [p.name for p in output.iterdir() if re.match(rf".*\.tar$|manifest\.json$|{_PROGRESS}$", p.name)]
    if existing and not resume:
        raise DataError(f"{output}: already holds {existing[0]}; continue with --resume or choose another --output")
    if (output / MANIFEST).exists():
        manifest = read_manifest(output)
        written = {**manifest, "tokenizer": manifest["tokenizer"]["fingerprint"], "inputs": manifest["sources"]}
        if any(written.get(key) != value for key, value in settings.items() if key != "on_error"):
            raise DataError(f"{output}: was written from other inputs or settings; choose another --output")
        _remove_progress(output)  # of a run that was killed after its last word
        return manifest, None
    if not (output / _PROGRESS).exists():
        if existing:
            raise DataError(
                f"{output}: holds {existing[0]}, but no record of the run that wrote it; choose another one"
            )
        return None, None
    progress: dict[str, Any] = read_json(output / _PROGRESS)
    differing = [k for k, value in settings.items() if k != "on_error" and progress["settings"].get(k) != value]
    if differing:
        raise DataError(
            f"{output}: was begun with other inputs or settings ({', '.join(differing)}); choose another --output"
        )
    return None, progress


def _remove_progress(output: Path) -> None:
    for name in (_PROGRESS, _SEEN):
        (output / name).unlink(missing_ok=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_tools.shard", description=__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="files, folders, hf:NAME[:CONFIG]:SPLIT or pydocs:")
    add("--tokenizer", default=_DEFAULT_TOKENIZER, help="folder, or a name on the Hugging Face hub (%(default)s)")
    add("--output", required=True, help="folder for the shards")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes that decode and tokenize")
    add("--shard-tokens", type=int, default=50_000_000, help="a shard is closed when it holds so many (%(default)s)")
    add("--separator", default=sources.SEPARATOR, help="ends a document in .txt files; '' for one a file")
    add("--limit", type=int, help="stop after so many documents")
    add("--languages", nargs="+", default=(), metavar="LANG", help="drop documents whose metadata names another lang")
    add("--min-words", type=int, help="drop documents with fewer words, by their metadata or by their text")
    add("--max-words", type=int, help="drop documents with more words")
    add("--min-tokens", type=int, default=2, help="drop documents with fewer tokens, eos counted")
    add("--validation-fraction", type=float, default=0.01, help="share of documents, by a hash of the text")
    add("--test-fraction", type=float, default=0.01, help="share of documents, by a hash of the text")
    add("--on-error", choices=("stop", "skip"), default="stop", help="at items without a document, and broken inputs")
    add("--resume", action="store_true", help="continue an interrupted run with the same settings")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    options = vars(_parser().parse_args(argv))
    options["languages"] = tuple(options["languages"])
    with cli_errors():
        manifest = shard(options.pop("input"), options.pop("tokenizer"), options.pop("output"), **options)
        for split, entry in manifest["splits"].items():
            documents, tokens, shards = entry["documents"], entry["tokens"], len(entry["shards"])
            print(f"{split:>10}: {documents:>9,} documents {tokens:>13,} tokens {shards:>5} shards")
        for kind in ("dropped", "skipped"):
            found = ", ".join(f"{count:,} {cause}" for cause, count in manifest[kind].items())
            print(f"{kind:>10}: {found or 'nothing'}")


if __name__ == "__main__":
    main()
