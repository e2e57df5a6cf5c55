"""Readers of raw text: every form that `--input` takes becomes streams of items, read in chunks.

A chunk is cheap to read (undecoded lines, rows of a table) and is decoded where it is used, in a worker process.
Order and keys depend on the inputs alone, never on the number of workers, and (stream, item) is a place to go on from.
"""

import gzip
import hashlib
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

from data_tools import pydocs
from data_tools.raw_readers import text_documents, zstd_lines
from megatext.data import DataError

DOCUMENTS_PER_CHUNK = 256
BYTES_PER_CHUNK = 1 << 20
"""A chunk ends at whichever comes first: books would fill the memory of all workers."""
SEPARATOR = "<|endoftext|>"
"""Ends a document in .txt files, as in TinyStories' own; a file without one is one document."""
SUFFIXES = (".jsonl.zst.tar", ".jsonl.zst", ".jsonl.gz", ".jsonl", ".txt", ".parquet")


@dataclass(frozen=True)
class Document:
    """One text with what its source says about it."""

    key: str
    """Unique and stable: derives from the source's name and the place in it. Holds no dot and no slash."""
    text: str
    """Unicode text without lone surrogates; not blank."""
    meta: dict[str, Any] = field(default_factory=dict)
    """What else the source gave: url, title, ..."""


@dataclass(frozen=True)
class Problem:
    """An item that gave no document, or the rest of an input that could not be read."""

    cause: Literal["broken_json", "invalid_utf8", "no_text", "empty", "truncated_input", "unreadable_input"]
    """What the manifest counts it under."""
    message: str
    """File, line and what is wrong, for people."""


Item = bytes | dict[str, Any] | Document


@dataclass(frozen=True)
class Stream:
    """One sequence of documents: a file, a member of a tar, a dataset."""

    name: str
    """What keys begin with; unique among the inputs."""
    where: str
    """What messages call it."""
    unit: Literal["line", "row", "document"]
    """An undecoded JSON line, a record, or plain text."""
    items: Callable[[], Iterator[Item]]
    """Reads it from its beginning."""
    done: Callable[[], float]
    """Share of all inputs read so far, 0 to 1; 0 where it is unknown."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive items of one stream, not yet decoded."""

    stream: int
    """Number of the stream."""
    source: str
    """Its name."""
    where: str
    """What messages call it."""
    unit: str
    """What its items are."""
    first: int
    """Place of the first item in its stream, from 0."""
    items: list[Any]
    done: float
    """Share of all inputs read up to the end of this chunk."""
    problem: Problem | None = None
    """Why the stream ends behind these items, if it could not be read to its end."""


def decode(chunk: Chunk) -> tuple[list[Document], list[Problem]]:
    """The chunk's documents, and what was wrong with the other items. Blank lines are neither."""
    documents, problems = [], [chunk.problem] if chunk.problem else []
    for number, item in enumerate(chunk.items, chunk.first):
        if chunk.unit == "line" and not item.strip():
            continue
        found = item if isinstance(item, Document) else _decode_item(item, chunk, number)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            documents.append(found)
    return documents, problems


def _decode_item(item: bytes | dict[str, Any], chunk: Chunk, number: int) -> Document | Problem:
    place = f"{chunk.where}, {chunk.unit} {number + 1}"
    record: Any = item
    try:
        if isinstance(item, bytes):
            line = item.decode("utf-8")
            record = json.loads(line) if chunk.unit == "line" else {"text": line}
    except UnicodeDecodeError as error:
        line_number = f", its line {error.object[: error.start].count(10) + 1}" if chunk.unit == "document" else ""
        return Problem("invalid_utf8", f"{place}{line_number}: not UTF-8 at byte {error.start} ({error.reason})")
    except (ValueError, RecursionError) as error:
        return Problem("broken_json", f"{place}: not JSON ({error})")
    text = record.get("text") if isinstance(record, dict) else None
    if isinstance(text, list) and all(isinstance(part, str) for part in text):
        text = "\n\n".join(text)
    if not isinstance(text, str):
        keys = f"its keys are {', '.join(map(str, record))}" if isinstance(record, dict) else "it is not an object"
        return Problem("no_text", f"{place}: has no `text` that is a string; {keys}")
    text = text.strip()
    if not text:
        return Problem("empty", f"{place}: the document is empty")
    meta = record.get("meta")
    try:
        plain = _plain(meta) if isinstance(meta, dict) else {}
    except RecursionError:
        return Problem("broken_json", f"{place}: its meta is nested too deeply")
    return Document(f"{chunk.source}-{number:09d}", _plain(text), plain)


def _plain(value: Any) -> Any:
    """What can be written as JSON and UTF-8: dates, decimals and bytes become text, a lone surrogate, as JSON's escapes
    allow, becomes U+FFFD."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float) else _plain(str(value))


def expand(inputs: Sequence[str]) -> list[str]:
    """The inputs with folders replaced by the readable files in them, sorted; DataError for what is not there."""
    expanded: list[str] = []
    for text in inputs:
        path = Path(text)
        if text.startswith(("hf:", "pydocs:")):
            expanded.append(text)
        elif path.is_dir():
            files = sorted(str(p) for p in path.rglob("*") if p.name.endswith(SUFFIXES))
            if not files:
                raise DataError(f"{text}: no readable file in this folder; readable are *{', *'.join(SUFFIXES)}")
            expanded += files
        elif not path.is_file():
            raise DataError(f"{text}: no such input; give files, folders, hf:NAME[:CONFIG]:SPLIT or pydocs:")
        elif not path.name.endswith(SUFFIXES):
            raise DataError(f"{text}: unknown kind of file; readable are *{', *'.join(SUFFIXES)}")
        else:
            expanded.append(text)
    return expanded


def describe(inputs: Sequence[str]) -> list[dict[str, Any]]:
    """What the manifest says of each input: its name and, for a file, its size in bytes and a hash of its first and
    last MiB (all of it would take minutes to read), which a copy does not change as it does a file's time."""
    described = []
    for text in expand(inputs):
        entry: dict[str, Any] = {"input": text}
        if not text.startswith(("hf:", "pydocs:")):
            entry |= {"bytes": os.stat(text).st_size, "sha256_of_ends": _hash_of_ends(Path(text))}
        described.append(entry)
    return described


def _hash_of_ends(path: Path) -> str:
    with open(path, "rb") as file:
        found = hashlib.sha256(file.read(1 << 20))
        file.seek(max(file.tell(), os.stat(path).st_size - (1 << 20)))
        found.update(file.read())
    return found.hexdigest()


def read(
    inputs: Sequence[str],
    *,
    workers: int = 1,
    fraction: float = 1.0,
    separator: str = SEPARATOR,
    start: tuple[int, int] = (0, 0),
    skip_errors: bool = False,
) -> Iterator[Chunk]:
    """All inputs, one after another, in chunks, from item `start[1]` of stream `start[0]` on.

    `fraction` below 1 reads about that share of `pydocs:` (the only source whose reading costs more than its bytes);
    the others are read whole. An input that cannot be read to its end raises DataError, or, with `skip_errors`, ends
    early: its last chunk says why.
    """
    for number, stream in enumerate(_streams(expand(inputs), workers, fraction, separator)):
        if number >= start[0]:
            yield from _chunks(number, stream, start[1] if number == start[0] else 0, skip_errors)


def _chunks(number: int, stream: Stream, first: int, skip_errors: bool) -> Iterator[Chunk]:
    items = islice(stream.items(), first, None)
    problem, ended = None, False
    while not ended:
        collected: list[Item] = []
        held = 0
        try:
            for item in items:
                collected.append(item)
                held += _bytes_of(item)
                if len(collected) == DOCUMENTS_PER_CHUNK or held > BYTES_PER_CHUNK:
                    break
            else:
                ended = True
        except DataError as error:
            if not skip_errors:
                raise
            problem, ended = Problem("unreadable_input", str(error)), True
        except _READ_ERRORS as error:
            problem, ended = _problem_of(stream.where, error), True
            if not skip_errors:
                raise DataError(f"{problem.message}; --on-error skip goes on with the next input") from error
        if collected or problem:
            place = (number, stream.name, stream.where, stream.unit, first)
            yield Chunk(*place, collected, stream.done(), problem)
        first += len(collected)


def _bytes_of(item: Item) -> int:
    if isinstance(item, bytes):
        return len(item)
    text = item.text if isinstance(item, Document) else item.get("text")
    return len(text) if isinstance(text, str) else 0


_READ_ERRORS = (EOFError, tarfile.TarError, OSError, zlib.error)
"""What a file that is damaged or ends too early raises; zstd's own error becomes an EOFError in `zstd_lines`."""


def _problem_of(where: str, error: BaseException) -> Problem:
    if isinstance(error, PermissionError | FileNotFoundError | IsADirectoryError):
        return Problem("unreadable_input", f"{where}: cannot be opened ({error.strerror})")
    return Problem("truncated_input", f"{where}: cannot be read to its end ({error}); is the file whole?")


def _unknown() -> float:
    return 0.0


def _streams(inputs: list[str], workers: int, fraction: float, separator: str) -> Iterator[Stream]:
    """The streams of all inputs. Nothing is read of a stream that nobody asks the items of."""
    sizes = {text: 0 if text.startswith(("hf:", "pydocs:")) else os.stat(text).st_size for text in inputs}
    total = 0 if any(not size for size in sizes.values()) else sum(sizes.values())
    names: set[str] = set()
    before = 0
    for text in inputs:
        if text == "pydocs:":
            reader = _Pydocs(workers, fraction)
            done = reader.done if len(inputs) == 1 else _unknown
            yield Stream(_name("pydocs", names), text, "document", reader.documents, done)
        elif text.startswith("hf:"):
            yield Stream(_name(text, names), text, "row", partial(_hugging_face, text), _unknown)
        else:
            yield from _streams_of_file(text, names, separator, before, total)
            before += sizes[text]


def _streams_of_file(text: str, names: set[str], separator: str, before: int, total: int) -> Iterator[Stream]:
    name = _name(text, names)
    try:
        file = open(text, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        yield _broken(name, text, error)
        return
    with file:

        def done() -> float:
            return (before + file.tell()) / total if total else 0.0

        if not text.endswith(".tar"):
            unit, items = _reader(text, file, separator)
            yield Stream(name, text, unit, items, done)
            return
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.isfile():
                        own, where = _name(f"{name}-{Path(member.name).name}", names), f"{text}: {member.name}"
                        yield Stream(own, where, "line", partial(_member, tar, member), done)
                # tarfile takes a damaged header, and the end of the file, for the end of the archive
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"no header and no end of the archive at byte {tar.offset}")
        except (tarfile.TarError, OSError) as error:
            yield _broken(_name(f"{name}-rest", names), text, error)


def _broken(name: str, where: str, error: Exception) -> Stream:
    """A stream whose reading raises at once, so that all errors are met at one place."""

    def items() -> Iterator[Item]:
        yield from ()
        raise error

    return Stream(name, where, "line", items, _unknown)


def _reader(
    text: str, file: BinaryIO, separator: str
) -> tuple[Literal["line", "row", "document"], Callable[[], Iterator[Item]]]:
    if text.endswith(".zst"):
        return "line", partial(zstd_lines, file)
    if text.endswith(".gz"):
        return "line", partial(iter, gzip.GzipFile(fileobj=file))
    if text.endswith(".jsonl"):
        return "line", partial(iter, file)
    if text.endswith(".txt"):
        return "document", partial(text_documents, file, separator.encode())
    return "row", partial(_parquet, text, file)


def _name(text: str, names: set[str]) -> str:
    """What keys begin with: the file's name without its ending, numbered where it was there before."""
    name = text if text.startswith("hf:") else Path(text).name
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")
    unique, number = name, 1
    while unique in names:
        number += 1
        unique = f"{name}-{number}"
    names.add(unique)
    return unique


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[bytes]:
    stream = tar.extractfile(member)
    assert stream is not None
    yield from zstd_lines(stream)


def _parquet(text: str, file: BinaryIO) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise EOFError(str(error)) from error
    if "text" not in table.schema_arrow.names:
        raise DataError(f"{text}: has no column `text`, only {', '.join(table.schema_arrow.names)}")
    for batch in table.iter_batches(DOCUMENTS_PER_CHUNK):
        yield from map(_record, batch.to_pylist())


def _record(row: dict[str, Any]) -> dict[str, Any]:
    meta = row.get("meta") if isinstance(row.get("meta"), dict) else {}
    return {"text": row.get("text"), "meta": {k: v for k, v in row.items() if k not in ("text", "meta")} | (meta or {})}


def _hugging_face(text: str) -> Iterator[dict[str, Any]]:
    """`hf:NAME[:CONFIG]:SPLIT`; NAME is on the hub, a folder of data files, or what `save_to_disk` wrote."""
    parts = text.split(":")[1:]
    if len(parts) not in (2, 3):
        raise DataError(f"{text}: write hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    import datasets

    name, config, split = parts[0], parts[1] if len(parts) == 3 else None, parts[-1]
    try:
        if Path(name, "dataset_dict.json").is_file():
            rows: Any = datasets.load_from_disk(name)[split]
        elif Path(name, "state.json").is_file():
            rows = datasets.load_from_disk(name)
        else:
            rows = datasets.load_dataset(name, config, split=split, streaming=True)
    except (ValueError, KeyError, ConnectionError, OSError) as error:
        raise DataError(f"{text}: cannot be loaded ({' '.join(str(error).split())})") from error
    yield from map(_record, rows)


class _Pydocs:
    """The docstrings of the installed packages, without paragraphs that were there before."""

    def __init__(self, workers: int, fraction: float) -> None:
        self.workers, self.fraction = workers, fraction
        self._done = 0.0

    def done(self) -> float:
        return self._done

    def documents(self) -> Iterator[Document]:
        files = pydocs.python_files()
        if self.fraction < 1:
            files = [f for f in files if zlib.crc32(f[0].encode()) < self.fraction * 2**32]
        step = max(1, min(100, len(files) // (4 * self.workers) or 1))
        groups = [files[i : i + step] for i in range(0, len(files), step)]
        seen: set[bytes] = set()
        number = 0
        with ProcessPoolExecutor(self.workers) as pool:
            found_groups = pool.map(_prose_of, groups) if self.workers > 1 else map(_prose_of, groups)
            for group, found in enumerate(found_groups, 1):
                self._done = group / len(groups)
                for relative, line, prose in found:
                    fresh = []
                    for paragraph in prose:
                        identity = pydocs.paragraph_identity(paragraph)
                        if identity not in seen:
                            seen.add(identity)
                            fresh.append(paragraph)
                    if sum(len(p.split()) for p in fresh) >= pydocs.MIN_WORDS:
                        key = "pydocs-" + hashlib.blake2b(f"{relative}:{line}".encode(), digest_size=8).hexdigest()
                        number += 1
                        yield Document(key, "\n\n".join(fresh), {"title": relative, "line": line})
        print(f"pydocs: {number:,} documents of prose in {len(files):,} source files", flush=True)
        if number == 0:
            raise DataError("pydocs: found no documentation; is this Python installed without its packages' sources?")


def _prose_of(files: list[tuple[str, Path]]) -> list[tuple[str, int, list[str]]]:
    return [found for relative, path in files for found in pydocs.read_file(relative, path)]
