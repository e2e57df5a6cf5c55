"""A set of content hashes that only grows: 16 bytes an entry in one array, kept on disk as a plain list of them."""

import os
from pathlib import Path

import numpy as np

_FULL = 0.75
"""Share of the table that is used before it doubles: 21 to 43 bytes an entry."""


class HashSet:
    """128-bit hashes, open addressing with linear probing. A Python set of them takes 83 bytes an entry (by
    tracemalloc, a million of them), 1.4 GB for OpenWebText2's 17 million documents."""

    def __init__(self, capacity: int = 1 << 16) -> None:
        """`capacity` is a power of two."""
        self._table = np.zeros((capacity, 2), np.uint64)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Add uint64 `[n, 2]`; bool `[n]`: which of them are new, the first of equal ones only. None is all zero."""
        new = np.zeros(len(hashes), bool)
        if len(hashes):
            while self._size + len(hashes) > _FULL * len(self._table):
                self._grow()
            _, first = np.unique(hashes, axis=0, return_index=True)
            new[first[self._insert(hashes[first])]] = True
            self._size += int(new.sum())
        return new

    def _insert(self, hashes: np.ndarray) -> np.ndarray:
        """Insert different hashes; bool: which were not there."""
        mask = np.uint64(len(self._table) - 1)
        new = np.zeros(len(hashes), bool)
        waiting = np.arange(len(hashes))
        slots = (hashes[:, 0] & mask).astype(np.int64)
        while len(waiting):
            found = self._table[slots]
            free = ~found.any(axis=1)
            self._table[slots[free]] = hashes[waiting[free]]  # of those that want one slot the last one gets it
            placed = (self._table[slots] == hashes[waiting]).all(axis=1)
            new[waiting[placed & free]] = True
            waiting, slots = waiting[~placed], (slots[~placed] + 1) & int(mask)
        return new

    def _grow(self) -> None:
        old = self._table
        self._table = np.zeros((2 * len(old), 2), np.uint64)
        for start in range(0, len(old), 1 << 20):
            part = old[start : start + (1 << 20)]
            self._insert(part[part.any(axis=1)])


class HashFile:
    """Hashes in the order they came, appended to a file; a run that goes on reads those it had."""

    def __init__(self, path: Path, count: int = 0) -> None:
        """Keep the first `count` hashes of the file, which may hold more from after the last snapshot."""
        self.path, self.count = path, count
        self._file = open(path, "r+b" if count else "wb")  # noqa: SIM115 (closed by close)
        self._file.truncate(16 * count)
        self._file.seek(16 * count)

    def read(self) -> np.ndarray:
        """uint64 `[count, 2]`."""
        return np.fromfile(self.path, "<u8", 2 * self.count).reshape(-1, 2)

    def append(self, hashes: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(hashes, "<u8").tobytes())
        self.count += len(hashes)

    def sync(self) -> None:
        """Everything so far is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
