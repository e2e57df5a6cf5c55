"""The set of content hashes against Python's own."""

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_tools.hash_set import HashFile, HashSet

# few different values with few different low bits: collisions of slots, and equal hashes in one batch
batches = st.lists(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3)), max_size=60), max_size=12)


@given(batches)
def test_tells_what_is_new(batches: list[list[tuple[int, int]]]) -> None:
    mine, reference = HashSet(capacity=4), set[tuple[int, int]]()
    for batch in batches:
        expected = []
        for item in batch:
            expected.append(item not in reference)
            reference.add(item)
        assert mine.add(np.array(batch, np.uint64).reshape(-1, 2)).tolist() == expected
    assert len(mine) == len(reference)


def test_grows_and_stays_small() -> None:
    hashes = np.random.default_rng(0).integers(1, 2**63, (300_000, 2)).astype(np.uint64)
    mine = HashSet(capacity=8)
    for part in np.array_split(hashes, 600):
        assert mine.add(part).all()
    assert not any(mine.add(part).any() for part in np.array_split(hashes, 600))
    assert mine._table.nbytes / len(mine) <= 2 * 16 / 0.75


def test_a_file_is_cut_back_to_its_snapshot(tmp_path: Path) -> None:
    hashes = np.arange(1, 21, dtype=np.uint64).reshape(-1, 2)
    file = HashFile(tmp_path / "seen")
    file.append(hashes[:4])
    file.sync()
    file.append(hashes[4:])
    file.close()
    again = HashFile(tmp_path / "seen", 4)
    assert np.array_equal(again.read(), hashes[:4])
    again.append(hashes[7:8])
    again.sync()
    assert np.array_equal(HashFile(tmp_path / "seen", 5).read(), hashes[[0, 1, 2, 3, 7]])
