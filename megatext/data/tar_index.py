"""A memory-mapped index of webdataset tar shards: a document's tokens are a view into the file, not a copy.

Reading a record through Python's tarfile or webdataset costs about 50 µs, which caps every reader at some 10 M
tokens/s. The index is built once by walking the tar headers, and kept beside the tar where the folder is writable; that
is also when the tar's checksum is taken, so that opening it again costs nothing.
"""

import errno
import fcntl
import hashlib
import math
import mmap
import os
import re
import resource
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import numpy as np

from megatext.data import DataError

_BLOCK = 512
_INDEX_VERSION = 2


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process of this machine at a time in a folder; the others wait. Ends with the process that holds it. A
    folder that cannot be written is not locked."""
    try:
        file = open(folder / ".lock", "w")  # noqa: SIM115 (closed below)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # also file systems without locks
        yield
        return
    with file:
        yield


def cache_root() -> Path:
    """Where copies of remote shards are kept, and indexes of read-only ones: $MEGATEXT_CACHE, or ~/.cache/megatext. May
    be deleted when no run reads it."""
    return Path(os.environ.get("MEGATEXT_CACHE") or Path.home() / ".cache" / "megatext")


def allow_many_files() -> None:
    """Every shard in use holds two file descriptors, and 1024 are allowed to begin with: allow all that may be."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def walk(view: memoryview | mmap.mmap, where: str) -> Iterator[tuple[str, int, int]]:
    """(name, offset of the data, size in bytes) of every file in a tar: ustar, GNU long names and pax headers."""
    offset, end = 0, len(view)
    long_name: str | None = None
    pax: dict[str, str] = {}
    while True:
        if offset + _BLOCK > end:
            raise DataError(f"{where}: ends at byte {offset} without an end-of-archive mark; copy the file again")
        header = bytes(view[offset : offset + _BLOCK])
        if not header.strip(b"\0"):
            return
        size_field, kind = header[124:136], header[156:157]
        try:
            if size_field[0] & 0x80:
                size = int.from_bytes(size_field[1:], "big")
            else:
                size = int(size_field.strip(b" \0") or b"0", 8)
            checksum = int(header[148:156].strip(b" \0"), 8)
        except ValueError:
            raise DataError(f"{where}: no tar header at byte {offset}; the file is damaged") from None
        if checksum != sum(header) - sum(header[148:156]) + 8 * 32:
            raise DataError(f"{where}: wrong checksum of the tar header at byte {offset}; the file is damaged")
        if "size" in pax:
            size = int(pax["size"])
        start = offset + _BLOCK
        if start + size > end:
            raise DataError(f"{where}: cut off inside the member at byte {offset}; copy the file again")
        if kind == b"L":
            long_name = bytes(view[start : start + size]).rstrip(b"\0").decode()
        elif kind == b"x":
            pax = _pax(bytes(view[start : start + size]))
        elif kind in (b"0", b"\0", b"7"):
            name = header[:100].rstrip(b"\0").decode()
            # GNU tars ("ustar  ") keep other things where POSIX keeps the prefix
            prefix = header[345:500].rstrip(b"\0").decode() if header[257:263] == b"ustar\0" else ""
            yield pax.get("path") or long_name or (f"{prefix}/{name}" if prefix else name), start, size
            long_name, pax = None, {}
        elif kind != b"g":
            long_name, pax = None, {}
        offset = start + (size + _BLOCK - 1) // _BLOCK * _BLOCK


def _pax(data: bytes) -> dict[str, str]:
    fields, at = {}, 0
    while at < len(data):
        length = int(data[at : data.index(b" ", at)])
        key, _, value = data[at : at + length - 1].split(b" ", 1)[1].partition(b"=")
        fields[key.decode()] = value.decode()
        at += length
    return fields


class TarIndex:
    """The members `<key><suffix>` of one tar that hold arrays as .npy, and the `<key>.json` beside them.

    Arrays are one- or two-dimensional, C-ordered and of one dtype and row shape in the whole tar.
    """

    def __init__(self, path: str | Path, suffix: str = ".tokens.npy", *, sha256: str | None = None):
        """Raises DataError for a tar that is missing, damaged or, with `sha256` (hex), not the one it should be."""
        self.path = Path(path)
        allow_many_files()
        try:
            with open(self.path, "rb") as file:
                self._status = os.fstat(file.fileno())
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise DataError(f"{path}: no such shard; was the folder moved or copied in part?") from None
        except ValueError:
            raise DataError(f"{path}: the shard is empty") from None
        fields = self._fields(suffix, sha256)
        self.offsets: np.ndarray = fields["offsets"]
        """int64 `[documents]`: byte offset of each array's data."""
        self.lengths: np.ndarray = fields["lengths"]
        """int64 `[documents]`: first dimension of each array, its number of tokens."""
        self._json: np.ndarray = fields["json"]
        self._keys: np.ndarray = fields["keys"]
        self._key_ends: np.ndarray = fields["key_ends"]
        self.dtype = np.dtype(str(fields["dtype"]))
        self.row_shape: tuple[int, ...] = tuple(int(n) for n in fields["row_shape"])
        self._width = math.prod(self.row_shape)
        self.flat: np.ndarray = np.frombuffer(self._map, self.dtype, len(self._map) // self.dtype.itemsize)
        """The whole file as elements: a document's array begins at element `offset // itemsize`."""

    def __len__(self) -> int:
        return len(self.offsets)

    def array(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of a document's array: a read-only view `[stop - start, *row_shape]` of the file."""
        length = int(self.lengths[document])
        stop = length if stop is None else min(stop, length)
        offset = int(self.offsets[document]) + start * self._width * self.dtype.itemsize
        flat: np.ndarray = np.frombuffer(self._map, self.dtype, max(0, stop - start) * self._width, offset)
        return flat.reshape(-1, *self.row_shape) if self.row_shape else flat

    def key(self, document: int) -> str:
        """The document's key."""
        begin = int(self._key_ends[document - 1]) if document else 0
        return self._keys[begin : int(self._key_ends[document])].tobytes().decode()

    @cached_property
    def keys(self) -> list[str]:
        """All keys, in the tar's order."""
        return [self.key(i) for i in range(len(self))]

    def json(self, document: int) -> bytes:
        """The bytes of `<key>.json`, empty where the sample has none."""
        start, size = (int(n) for n in self._json[document])
        return bytes(self._map[start : start + size])

    def _fields(self, suffix: str, sha256: str | None) -> dict[str, np.ndarray]:
        """The index, from its cache or built; of the ranks of a machine one builds it."""
        cache = self._cache(suffix)
        fields = self._load(cache, sha256)
        if fields is None:
            with locked(cache.parent):
                fields = self._load(cache, sha256)
                if fields is None:
                    fields = self._build(suffix, sha256)
                    self._store(cache, fields)
                    fields = self._load(cache, sha256) or fields  # a view of the file instead of memory of our own
        return fields

    def _cache(self, suffix: str) -> Path:
        name = f"{self.path.name}{suffix}.index.npz"
        if os.access(self.path.parent, os.W_OK):
            return self.path.with_name(name)
        folder = cache_root() / "indexes" / hashlib.sha256(str(self.path.parent.resolve()).encode()).hexdigest()[:16]
        with suppress(OSError):  # then it stays in memory
            folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def _build(self, suffix: str, sha256: str | None) -> dict[str, np.ndarray]:
        if sha256 is not None:
            found = hashlib.sha256(self._map).hexdigest()
            if found != sha256:
                raise DataError(
                    f"{self.path}: its sha256 is {found}, the manifest says {sha256}; the shard was damaged or "
                    "replaced: remove it and copy it (or let it be fetched) again"
                )
        arrays: dict[str, tuple[int, int]] = {}
        records: dict[str, tuple[int, int]] = {}
        for name, start, size in walk(self._map, str(self.path)):
            # webdataset's rule: the key ends at the first dot of the file's name
            folder, _, base = name.rpartition("/")
            stem = base.split(".", 1)[0]
            key = f"{folder}/{stem}" if folder else stem
            if base == stem + suffix:
                if key in arrays:
                    raise DataError(f"{self.path}: sample {key} is there twice")
                arrays[key] = (start, size)
            elif base == stem + ".json":
                records[key] = (start, size)
        offsets, lengths = np.empty(len(arrays), np.int64), np.empty(len(arrays), np.int64)
        headers: dict[bytes, tuple[int, str, tuple[int, ...]]] = {}
        kinds: set[tuple[str, tuple[int, ...]]] = set()
        for i, (key, (start, size)) in enumerate(arrays.items()):
            head = bytes(self._map[start : start + 10])
            skip = 10 + int.from_bytes(head[8:10], "little")
            raw = bytes(self._map[start + 10 : start + skip])
            if raw not in headers:
                headers[raw] = _npy_header(head, raw, f"{self.path}: sample {key}")
            count, dtype, row_shape = headers[raw]
            kinds.add((dtype, row_shape))
            if count * math.prod(row_shape) * np.dtype(dtype).itemsize != size - skip:
                raise DataError(f"{self.path}: sample {key}: array and header disagree; write the shards again")
            offsets[i], lengths[i] = start + skip, count
        if len(kinds) > 1:
            raise DataError(f"{self.path}: arrays of different types or widths in one shard: {sorted(kinds)}")
        dtype, row_shape = kinds.pop() if kinds else ("<u2", ())
        encoded = [key.encode() for key in arrays]
        return {
            "offsets": offsets,
            "lengths": lengths,
            "json": np.array([records.get(key, (0, 0)) for key in arrays], np.int64).reshape(-1, 2),
            "keys": np.frombuffer(b"".join(encoded), np.uint8),
            "key_ends": np.cumsum([len(key) for key in encoded], dtype=np.int64),
            "dtype": np.array(dtype),
            "row_shape": np.array(row_shape, np.int64),
            "sha256": np.array(sha256 or ""),
        }

    def _stamp(self) -> np.ndarray:
        return np.array([_INDEX_VERSION, self._status.st_size, self._status.st_mtime_ns], np.int64)

    def _load(self, cache: Path, sha256: str | None) -> dict[str, np.ndarray] | None:
        try:
            fields = _map_npz(cache)
            known = np.array_equal(fields.pop("stamp"), self._stamp()) and sha256 in (None, str(fields["sha256"]))
            return fields if known else None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            return None
        except Exception:  # a cache that is damaged or of an older version is built anew
            return None

    def _store(self, cache: Path, fields: dict[str, np.ndarray]) -> None:
        temporary = cache.with_name(f".{cache.name}.{os.getpid()}.tmp.npz")
        try:
            np.savez(temporary, allow_pickle=False, stamp=self._stamp(), **fields)
            os.replace(temporary, cache)
        except OSError:  # a read-only folder: the index stays in memory
            temporary.unlink(missing_ok=True)


def _map_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an uncompressed .npz as views of the file: 17 million documents have an index of a gigabyte, and
    all ranks of a machine share one copy of it in the page cache."""
    arrays = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for item in archive.infolist():
            # a zip's local header is 30 bytes, a name and extras, whose lengths are its last two numbers
            name, extras = struct.unpack_from("<2H", view, item.header_offset + 26)
            file.seek(item.header_offset + 30 + name + extras)
            if np.lib.format.read_magic(file) != (1, 0) or item.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{path}: {item.filename} cannot be mapped")
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
            flat: np.ndarray = np.frombuffer(view, dtype, math.prod(shape), file.tell())
            arrays[item.filename.removesuffix(".npy")] = flat.reshape(shape, order="F" if fortran_order else "C")
    return arrays


_NPY_HEADER = re.compile(rb"'descr': '([<|>=][a-z]\d+)', 'fortran_order': (False|True), 'shape': \(([\d, ]*)\)")


def _npy_header(head: bytes, raw: bytes, where: str) -> tuple[int, str, tuple[int, ...]]:
    match = _NPY_HEADER.search(raw)
    if head[:7] != b"\x93NUMPY\x01" or match is None or match.group(2) == b"True":
        raise DataError(f"{where}: is not a C-ordered array in .npy format 1.0")
    shape = [int(n) for n in match.group(3).split(b",") if n.strip()]
    if len(shape) not in (1, 2):
        raise DataError(f"{where}: array of shape {shape}, expected one or two dimensions")
    return shape[0], match.group(1).decode(), tuple(shape[1:])
