"""Several sources in fixed proportions: which source global sample i comes from, and where in it, from i alone.

Samples come in blocks of BLOCK. Every block holds the same whole number of samples of each source, shuffled by a keyed
permutation; source s therefore has given exactly b * counts[s] samples when b blocks are read, whatever the ranks.
"""

import numpy as np

from megatext.data.order import Permutation
from megatext.rng import derive_seed

BLOCK = 4096
"""Samples a block: proportions are kept to half of 1/4096."""


def counts_of(shares: np.ndarray, block: int = BLOCK) -> list[int]:
    """Whole numbers in proportion to `shares` that add up to `block`, by largest remainders; earlier ones win ties."""
    exact = shares / shares.sum() * block
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: block - int(counts.sum())]] += 1
    return [int(count) for count in counts]


class Mixture:
    """The order in which sources take turns; a pure function of (seed, counts)."""

    def __init__(self, counts: list[int], seed: int):
        """`counts`: samples of each source in a block."""
        self.counts = np.array(counts, np.int64)
        self._seed = derive_seed(seed, "mixture")
        self._ends = np.cumsum(self.counts)
        self._turns: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, position in its own order), int64 like the global sample indices `samples`. Later samples of
        a source have later positions."""
        if len(self.counts) == 1:
            return np.zeros_like(samples), samples
        size = int(self._ends[-1])
        blocks, source, before = samples // size, np.empty_like(samples), np.empty_like(samples)
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            of_block, before_in_block = self._turns_of(block)
            source[chosen] = of_block[samples[chosen] % size]
            before[chosen] = before_in_block[samples[chosen] % size]
        return source, blocks * self.counts[source] + before

    def _turns_of(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sample of a block, and how many of the block's earlier samples come from it."""
        if block not in self._turns:
            if len(self._turns) > 8:
                self._turns.clear()
            size = int(self._ends[-1])
            source = np.searchsorted(self._ends, Permutation(size, self._seed, block)(np.arange(size)), side="right")
            before = np.empty(size, np.int64)
            for number, count in enumerate(self.counts.tolist()):
                before[source == number] = np.arange(count)
            self._turns[block] = source, before
        return self._turns[block]
