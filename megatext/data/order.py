"""A global permutation of any size, evaluated per index and never materialised."""

import numpy as np

from megatext.rng import derive_seed

_ROUNDS = 6


class Permutation:
    """The keyed permutation of range(size) that belongs to (seed, epoch): a Feistel network over the next power of
    two, with cycle walking back into the range (fewer than two evaluations an index on average)."""

    def __init__(self, size: int, seed: int, epoch: int):
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, got {size}")
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self._right_bits = np.uint64(bits // 2)
        # The halves trade places in every round, and with them their widths; an even number of rounds restores them.
        self._masks = np.uint64((1 << bits - bits // 2) - 1), np.uint64((1 << bits // 2) - 1)
        self._keys = [np.uint64(derive_seed(seed, "order", epoch, r)) for r in range(_ROUNDS)]

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """int64 images of int64 indices in [0, size), elementwise."""
        result = self._encrypt(np.asarray(indices).astype(np.uint64))
        while len(outside := np.flatnonzero(result >= self.size)):
            result[outside] = self._encrypt(result[outside])
        return result.astype(np.int64)

    def _encrypt(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._right_bits, x & self._masks[1]
        for number, key in enumerate(self._keys):
            left, right = right, left ^ (_mix(right + key) & self._masks[number % 2])
        return (left << self._right_bits) | right


def _mix(z: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser; uint64 arrays wrap around."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
