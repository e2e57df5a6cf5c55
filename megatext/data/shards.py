"""Writing shards: deterministic tars that appear by rename when they are whole, and their manifest."""

import fcntl
import hashlib
import io
import json
import math
import os
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatext.data import DataError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"


def read_manifest(
    directory: str | Path, made_by: str = "data_tools.shard", version: int = FORMAT_VERSION
) -> dict[str, Any]:
    """The manifest of a shard directory; raises DataError, which names the program that makes such directories, where
    there is none or it is of another format."""
    path = Path(directory) / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        again = " (with --resume if it was interrupted)" if made_by == "data_tools.shard" else ""
        raise DataError(f"{path}: no such file: not a finished directory of `python -m {made_by}`{again}") from None
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); write the shards again") from None
    if manifest.get("format_version") != version:
        raise DataError(
            f"{path}: format {manifest.get('format_version')}, this code reads format {version} of what {made_by} "
            "writes; write it again"
        )
    return manifest


def split_fingerprint(manifest: dict[str, Any], split: str) -> str:
    """sha256 (hex) over the checksums of a split's shards: what lies in them, and in which order."""
    checksums = [entry["sha256"] for entry in manifest["splits"][split]["shards"]]
    return hashlib.sha256("\n".join(checksums).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """What `write_json` wrote; raises DataError for a damaged file."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); remove it and run the same command again") from None


def write_json(path: Path, content: Any) -> None:
    """Atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def files_of(directory: Path, folder: str) -> list[dict[str, Any]]:
    """{file, bytes, sha256} of the files in a folder of a shard directory: who copies it needs their names."""
    entries = []
    for path in sorted((directory / folder).iterdir()):
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        entries.append({"file": f"{folder}/{path.name}", "bytes": len(content), "sha256": digest})
    return entries


def sample_bytes(key: str, arrays: dict[str, np.ndarray], record: dict[str, Any] | None) -> bytes:
    """A sample as it lies in a tar: `<key>.<name>.npy` for each array, and `<key>.json`."""
    parts = []
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
        parts.append(_member(f"{key}.{name}.npy", buffer.getvalue()))
    if record is not None:
        parts.append(_member(f"{key}.json", json.dumps(record, ensure_ascii=False).encode()))
    return b"".join(parts)


def _member(name: str, data: bytes) -> bytes:
    return _header(name, len(data)) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


_PLAIN_HEADER = tarfile.TarInfo("").tobuf(tarfile.PAX_FORMAT)


def _header(name: str, size: int) -> bytes:
    """What tarfile writes for a file, without its 50 µs, which are a sixtieth of a document's tokenization."""
    field = name.encode()
    if len(field) > 100 or not name.isascii() or size >= 8**11:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.PAX_FORMAT)
    header = bytearray(_PLAIN_HEADER)
    header[: len(field)] = field
    header[124:135] = b"%011o" % size
    header[148:156] = b" " * 8  # the checksum counts itself as spaces
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header)


def lock_for_writing(file: IO[Any]) -> None:
    """Raise DataError where another process has this file locked. The lock ends with the process, or with the file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise DataError(f"{Path(file.name).parent}: another process is writing here; wait for it, or stop it") from None
    except OSError:  # a file system without locks
        return


class ShardWriter:
    """One tar in the making; `close` renames it into place and returns its manifest entry."""

    def __init__(self, path: Path, snapshot: dict[str, int] | None = None):
        """`snapshot` is what `sync` returned: what was written later is cut off, also if the tar was finished since."""
        self.path = path
        self.samples = 0
        self.tokens = 0
        self.bytes = 0
        self._hash = hashlib.sha256()
        self._partial = path.with_name(f".{path.name}.partial")
        if snapshot is not None:
            if path.exists():
                os.replace(path, self._partial)
            self.samples, self.tokens, self.bytes = (snapshot[key] for key in ("samples", "tokens", "bytes"))
        self._file = open(self._partial, "ab")  # noqa: SIM115 (closed by close or abandon)
        lock_for_writing(self._file)
        if self._file.tell() < self.bytes:
            raise DataError(
                f"{self._partial}: was removed or cut since its run was interrupted; write the shards again"
            )
        self._file.truncate(self.bytes)
        if snapshot is not None:
            with open(self._partial, "rb") as file:
                while block := file.read(1 << 22):
                    self._hash.update(block)

    def add(self, key: str, arrays: dict[str, np.ndarray], record: dict[str, Any] | None, tokens: int) -> None:
        """A sample: `<key>.<name>.npy` for each array, and `<key>.json`."""
        self.add_bytes(sample_bytes(key, arrays, record), tokens)

    def add_bytes(self, sample: bytes, tokens: int) -> None:
        """A sample from `sample_bytes`, of so many tokens."""
        self._write(sample)
        self.samples += 1
        self.tokens += tokens

    def add_array(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> None:
        """One member, an array that comes in parts along its first dimension; samples and tokens are the caller's to
        count."""
        buffer = io.BytesIO()
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(buffer, header)
        size = len(buffer.getvalue()) + math.prod(shape) * dtype.itemsize
        self._write(_header(name, size) + buffer.getvalue())
        end = self.bytes + math.prod(shape) * dtype.itemsize
        for part in parts:
            self._write(np.ascontiguousarray(part, dtype).tobytes())
        if self.bytes != end:
            raise ValueError(f"{self.path}: {name}: {self.bytes - end:+} bytes beside shape {shape}")
        self._write(bytes(-size % tarfile.BLOCKSIZE))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)

    def sync(self) -> dict[str, int]:
        """Everything so far is on the disk; what a writer that goes on from here needs to know."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"samples": self.samples, "tokens": self.tokens, "bytes": self.bytes}

    def close(self) -> dict[str, Any]:
        """{file, samples, tokens, bytes, sha256} of the finished shard."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self.sync()
        self._file.close()
        os.replace(self._partial, self.path)
        return {
            "file": self.path.name,
            "samples": self.samples,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "sha256": self._hash.hexdigest(),
        }

    def abandon(self) -> None:
        """Remove what was written."""
        with suppress(OSError):  # what is in its buffer may not fit on the disk
            self._file.close()
        self._partial.unlink(missing_ok=True)
