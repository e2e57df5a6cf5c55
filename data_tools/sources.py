"""Readers of raw text: every form that `--input` takes becomes a stream of chunks of documents.

A chunk is cheap to read (undecoded lines, rows of a table) and is decoded where it is used, in a worker process.
Order and keys depend on the inputs alone, never on the number of workers.
"""

import gzip
import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from data_tools import pydocs
from megatext.data import DataError

DOCUMENTS_PER_CHUNK = 512
END_OF_DOCUMENT = "<|endoftext|>"
_SUFFIXES = (".jsonl.zst.tar", ".jsonl.zst", ".jsonl.gz", ".jsonl", ".txt", ".parquet")


@dataclass(frozen=True)
class Document:
    """One text with what its source says about it."""

    key: str
    """Unique and stable: derives from the source's name and the place in it. Holds no dot and no slash."""
    text: str
    """Unicode text without lone surrogates."""
    meta: dict[str, Any] = field(default_factory=dict)
    """What else the source gave: url, title, ..."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents of one source, not yet decoded."""

    source: str
    """The name that keys begin with."""
    first: int
    """Place of the first item in its source: line, row or document number."""
    items: list[Any]
    """JSON lines (bytes), records (dict) or whole documents."""
    done: float
    """Share of all inputs read up to the end of this chunk, 0 to 1; 0 where it is unknown."""


def decode(chunk: Chunk) -> tuple[list[Document], int]:
    """The chunk's documents, and how many items were not a JSON object with a text."""
    documents, malformed = [], 0
    for number, item in enumerate(chunk.items, chunk.first):
        if isinstance(item, Document):
            documents.append(item)
            continue
        if isinstance(item, bytes) and not item.strip():
            continue
        try:
            record = json.loads(item) if isinstance(item, bytes) else item
            text = record["text"]
            text = ("\n\n".join(text) if isinstance(text, list) else text).strip()
            meta = dict(record.get("meta") or {})
        except (ValueError, KeyError, TypeError, AttributeError):
            malformed += 1
            continue
        if not text.isascii():  # a lone surrogate, as JSON escapes allow, is no text
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        documents.append(Document(f"{chunk.source}-{number:09d}", text, meta))
    return documents, malformed


def expand(inputs: Sequence[str]) -> list[str]:
    """The inputs with folders replaced by the readable files in them, sorted; DataError for what is not there."""
    expanded: list[str] = []
    for text in inputs:
        path = Path(text)
        if text.startswith(("hf:", "pydocs:")):
            expanded.append(text)
        elif path.is_dir():
            files = sorted(str(p) for p in path.rglob("*") if p.name.endswith(_SUFFIXES))
            if not files:
                raise DataError(f"{text}: no readable file in this folder; readable are *{', *'.join(_SUFFIXES)}")
            expanded += files
        elif not path.is_file():
            raise DataError(f"{text}: no such input; give files, folders, hf:NAME[:CONFIG]:SPLIT or pydocs:")
        elif not path.name.endswith(_SUFFIXES):
            raise DataError(f"{text}: unknown kind of file; readable are *{', *'.join(_SUFFIXES)}")
        else:
            expanded.append(text)
    return expanded


def describe(inputs: Sequence[str]) -> list[dict[str, Any]]:
    """What the manifest says of each input: its name and, for a file, size in bytes and time of modification."""
    described = []
    for text in expand(inputs):
        entry: dict[str, Any] = {"input": text}
        if not text.startswith(("hf:", "pydocs:")):
            entry |= {"bytes": os.stat(text).st_size, "modified": int(os.stat(text).st_mtime)}
        described.append(entry)
    return described


def read(inputs: Sequence[str], *, workers: int = 1, fraction: float = 1.0) -> Iterator[Chunk]:
    """All inputs, one after another, in chunks. `fraction` below 1 reads about that share of `pydocs:` (the only
    source whose reading costs more than its bytes); the others are read whole."""
    expanded = expand(inputs)
    sizes: list[int] = [0 if text.startswith(("hf:", "pydocs:")) else os.stat(text).st_size for text in expanded]
    known = 0 if "pydocs:" in expanded else sum(sizes)
    names: dict[str, int] = {}
    before = 0
    for text, size in zip(expanded, sizes, strict=True):
        if text == "pydocs:":
            yield from _pydocs(workers, fraction, known=len(expanded) == 1)
            continue
        name = _source_name(text)
        names[name] = names.get(name, 0) + 1
        if names[name] > 1:
            name = f"{name}-{names[name]}"
        try:
            yield from _read_one(text, name, before, known)
        except (EOFError, gzip.BadGzipFile, tarfile.TarError, UnicodeDecodeError, OSError) as error:
            raise DataError(f"{text}: cannot be read to its end ({error}); is the file whole?") from error
        before += size


def _source_name(text: str) -> str:
    name = text if text.startswith("hf:") else Path(text).name
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")


def _read_one(text: str, name: str, before: int, total: int) -> Iterator[Chunk]:
    if text.startswith("hf:"):
        yield from _chunks(name, _hugging_face(text), lambda: 0.0)
        return
    with open(text, "rb") as file:

        def done() -> float:
            return (before + file.tell()) / total if total else 0.0

        if text.endswith(".jsonl.zst.tar"):
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    stream = tar.extractfile(member) if member.isfile() else None
                    if stream is not None:
                        yield from _chunks(f"{name}-{_source_name(member.name)}", _zstd(stream, text), done)
        elif text.endswith(".zst"):
            yield from _chunks(name, _zstd(file, text), done)
        elif text.endswith(".gz"):
            yield from _chunks(name, gzip.GzipFile(fileobj=file), done)
        elif text.endswith(".jsonl"):
            yield from _chunks(name, file, done)
        elif text.endswith(".txt"):
            yield from _chunks(name, _plain_text(file), done)
        else:
            import pyarrow.parquet

            table = pyarrow.parquet.ParquetFile(file)
            if "text" not in table.schema_arrow.names:
                raise DataError(f"{text}: has no column `text`, only {', '.join(table.schema_arrow.names)}")
            rows = (row for batch in table.iter_batches(DOCUMENTS_PER_CHUNK) for row in batch.to_pylist())
            yield from _chunks(name, (_record(row) for row in rows), done)


def _chunks(name: str, items: Any, done: Any) -> Iterator[Chunk]:
    first, collected = 0, []
    for item in items:
        collected.append(item)
        if len(collected) == DOCUMENTS_PER_CHUNK:
            yield Chunk(name, first, collected, done())
            first, collected = first + len(collected), []
    if collected:
        yield Chunk(name, first, collected, done())


def _zstd(stream: Any, text: str) -> Iterator[bytes]:
    import zstandard

    reader = zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(
        stream, read_across_frames=True, closefd=False
    )
    try:
        yield from io.BufferedReader(reader, 1 << 20)
    except zstandard.ZstdError as error:
        raise DataError(f"{text}: cannot be read to its end ({error}); is the file whole?") from error


def _plain_text(file: BinaryIO) -> Iterator[dict[str, Any]]:
    # A line <|endoftext|> ends a document, as in TinyStories' own files; without one the file is one document.
    lines: list[str] = []
    for raw in file:
        line = raw.decode("utf-8")
        if line.strip() == END_OF_DOCUMENT:
            yield {"text": "".join(lines).strip("\n")}
            lines = []
        else:
            lines.append(line)
    if "".join(lines).strip():
        yield {"text": "".join(lines).strip("\n")}


def _record(row: dict[str, Any]) -> dict[str, Any]:
    meta = row.get("meta") if isinstance(row.get("meta"), dict) else {}
    return {"text": row.get("text"), "meta": {k: v for k, v in row.items() if k not in ("text", "meta")} | (meta or {})}


def _hugging_face(text: str) -> Iterator[dict[str, Any]]:
    parts = text.split(":")[1:]
    if len(parts) not in (2, 3):
        raise DataError(f"{text}: write hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    from datasets import load_dataset

    name, config = parts[0], parts[1] if len(parts) == 3 else None
    for row in load_dataset(name, config, split=parts[-1], streaming=True):
        yield _record(row)


def _pydocs_files(files: list[tuple[str, Path]]) -> list[tuple[str, int, list[str]]]:
    return [found for relative, path in files for found in pydocs.read_file(relative, path)]


def _pydocs(workers: int, fraction: float, known: bool) -> Iterator[Chunk]:
    files = pydocs.python_files()
    if fraction < 1:
        files = [f for f in files if zlib.crc32(f[0].encode()) < fraction * 2**32]
    step = max(1, min(100, len(files) // (4 * workers) or 1))
    groups = [files[i : i + step] for i in range(0, len(files), step)]
    seen: set[bytes] = set()
    number = 0
    collected: list[Document] = []
    with ProcessPoolExecutor(workers) as pool:
        found_groups = pool.map(_pydocs_files, groups) if workers > 1 else map(_pydocs_files, groups)
        for group, found in enumerate(found_groups, 1):
            for relative, line, prose in found:
                fresh = []
                for paragraph in prose:
                    identity = pydocs.paragraph_identity(paragraph)
                    if identity not in seen:
                        seen.add(identity)
                        fresh.append(paragraph)
                if sum(len(p.split()) for p in fresh) >= pydocs.MIN_WORDS:
                    key = "pydocs-" + hashlib.blake2b(f"{relative}:{line}".encode(), digest_size=8).hexdigest()
                    collected.append(Document(key, "\n\n".join(fresh), {"title": relative, "line": line}))
            if len(collected) >= DOCUMENTS_PER_CHUNK or group == len(groups):
                if collected:
                    yield Chunk("pydocs", number, collected, group / len(groups) if known else 0.0)
                number, collected = number + len(collected), []
    print(f"pydocs: {number:,} documents of prose in {len(files):,} source files", flush=True)
    if number == 0:
        raise DataError("pydocs: found no documentation; is this Python installed without its packages' sources?")
