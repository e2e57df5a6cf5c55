"""Whole or absent files, append-only logs that survive a kill, and fingerprints of what a number depends on."""

import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatext.config import ConfigError
from megatext.data import DataError

_MODEL_SUFFIXES = {".safetensors", ".bin", ".pt", ".json", ".model", ".txt", ".py"}


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write `content` to a temporary file beside `path`, sync it, rename it over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def append_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append one JSON object a line and sync. A line cut short by a kill is ended first, so it spoils nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The whole objects of an append-only log of our own; lines cut short by a kill are passed over."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of somebody's .jsonl or .jsonl.gz. Raises DataError that names file and line for anything else."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not a JSON object: {error}") from None
            if not isinstance(record, dict):
                raise DataError(f"{path}:{number}: not a JSON object")
            yield record


def read_yaml(path: Path) -> Any:
    """A YAML file. Raises ConfigError that names file and place for anything else."""
    import yaml

    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from None


def hash_of(value: Any) -> str:
    """sha256 (hex) of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def hash_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of_model(directory: Path) -> str:
    """sha256 over a model directory's weights, configuration and tokenizer: names and contents, not its own name."""
    if not directory.is_dir():
        raise DataError(f"{directory}: no such model directory")
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.suffix in _MODEL_SUFFIXES)
    if not any(path.suffix in {".safetensors", ".bin", ".pt"} for path in files):
        raise DataError(f"{directory}: holds no weights (*.safetensors); export the model first")
    return hash_of([[str(path.relative_to(directory)), hash_of_file(path)] for path in files])


def hash_of_code(*packages: Path) -> str:
    """sha256 over Python sources: a changed sampler must not be answered from the cache of the old one."""
    files = [
        path for package in packages for path in ([package] if package.is_file() else sorted(package.rglob("*.py")))
    ]
    return hash_of([[path.name, hash_of_file(path)] for path in files])
