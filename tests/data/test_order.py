"""The permutation: a bijection for every size, another one for every seed and epoch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatext.data.order import Permutation


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    images = Permutation(size, seed, epoch)(np.arange(size))
    assert np.array_equal(np.sort(images), np.arange(size))


@given(size=st.integers(1, 2**45), indices=st.lists(st.integers(0, 2**45), min_size=1, max_size=20))
def test_is_elementwise_and_within_range(size: int, indices: list[int]) -> None:
    wanted = np.array([i % size for i in indices], np.int64)
    permutation = Permutation(size, 7, 1)
    images = permutation(wanted)
    assert images.min() >= 0
    assert images.max() < size
    assert images.tolist() == [int(permutation(wanted[i : i + 1])[0]) for i in range(len(wanted))]


def test_seeds_and_epochs_are_unrelated() -> None:
    n = 4096
    orders = [Permutation(n, seed, epoch)(np.arange(n)) for seed, epoch in [(0, 0), (0, 1), (1, 0), (2, 3)]]
    orders.append(np.arange(n))
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).sum() < 12, "more common points than two random permutations have"
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.08


def test_neighbours_are_spread() -> None:
    """The mean distance of images of neighbours is that of random pairs, n / 3."""
    n = 10_000
    images = Permutation(n, 3, 0)(np.arange(n))
    assert np.abs(np.diff(images)).mean() == pytest.approx(n / 3, rel=0.05)
