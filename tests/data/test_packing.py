"""Windows and packing: every token once, no row overfull, rows well filled on lengths like real text's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatext.data.packing import best_fit_decreasing, pack_prefix
from megatext.data.windows import WindowIndex, cut


@given(lengths=st.lists(st.integers(0, 50), max_size=30), max_tokens=st.integers(1, 20))
def test_windows_cover_every_token_once(lengths: list[int], max_tokens: int) -> None:
    windows = cut(np.array(lengths, np.int64), max_tokens)
    covered = [
        (int(d), t)
        for d, start, n in zip(windows.document, windows.start, windows.length, strict=True)
        for t in range(start, start + n)
    ]
    assert covered == [(d, t) for d, n in enumerate(lengths) for t in range(n)]
    assert all(1 <= n <= max_tokens for n in windows.length)


@given(
    shards=st.lists(st.lists(st.integers(0, 50), max_size=9), max_size=4),
    max_tokens=st.integers(1, 20),
    data=st.data(),
)
def test_windows_are_found_by_number(shards: list[list[int]], max_tokens: int, data: st.DataObject) -> None:
    whole = cut(np.array([n for shard in shards for n in shard], np.int64), max_tokens)
    index = WindowIndex([np.array(shard, np.int64) for shard in shards], max_tokens)
    assert len(index) == len(whole)
    if len(whole):
        asked = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1))), np.int64)
        found = index.locate(asked)
        for name in ("document", "start", "length"):
            assert np.array_equal(getattr(found, name), getattr(whole, name)[asked])


@given(lengths=st.lists(st.integers(1, 32), min_size=1, max_size=60), rows=st.integers(1, 8))
def test_packed_rows_hold_what_fits(lengths: list[int], rows: int) -> None:
    count, row = pack_prefix(np.array(lengths), rows, 32)
    assert len(row) == count
    assert count >= min(rows, len(lengths)), "a window a row always fits"
    filled = np.bincount(row, weights=lengths[:count], minlength=rows)
    assert filled.max() <= 32
    first = [int(np.flatnonzero(row == r)[0]) for r in range(row.max() + 1)]
    assert first == sorted(first), "rows are numbered by their first window"
    if count < len(lengths):
        assert best_fit_decreasing(np.array(lengths[: count + 1]), rows, 32) is None


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=40), rows=st.integers(1, 9))
def test_best_fit_is_what_its_words_say(lengths: list[int], rows: int) -> None:
    room: dict[int, int] = dict.fromkeys(range(rows), 12)
    expected: list[int] | None = [-1] * len(lengths)
    for window in sorted(range(len(lengths)), key=lambda w: (-lengths[w], w)):
        fitting = [row for row in room if room[row] >= lengths[window]]
        if not fitting:
            expected = None
            break
        assert expected is not None
        expected[window] = min(fitting, key=lambda row: (room[row], row))
        room[expected[window]] -= lengths[window]
    found = best_fit_decreasing(np.array(lengths), rows, 12)
    assert (None if found is None else found.tolist()) == expected


def test_best_fit_takes_the_fullest_row_with_room() -> None:
    assert best_fit_decreasing(np.array([3, 6, 4, 7]), 2, 10).tolist() == [0, 1, 1, 0]  # type: ignore[union-attr]
    assert best_fit_decreasing(np.array([6, 6, 6]), 2, 10) is None


@pytest.mark.parametrize(("rows", "row_tokens"), [(32, 1024), (64, 1024)])
def test_rows_are_at_least_97_percent_full(rows: int, row_tokens: int) -> None:
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(5, 0.9, 4000).astype(int), 5, row_tokens)
    at = used = steps = 0
    while at < 2000:
        count, _ = pack_prefix(lengths[at : at + rows * 30], rows, row_tokens)
        used, steps, at = used + int(lengths[at : at + count].sum()), steps + 1, at + count
    assert used / (steps * rows * row_tokens) >= 0.97
