from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.cache import Cache, key_of, packed


def test_each_key_is_computed_once_and_found_again(tmp_path: Path) -> None:
    calls: list[list[int]] = []
    heard: list[int] = []

    def compute(places: list[int]) -> list[str]:
        calls.append(places)
        return [f"value {place}" for place in places]

    keys = ["a", "b", "a", "c", "d"]
    values = Cache(tmp_path, "kind", ["what", 1]).complete(keys, compute, lot=2, done=heard.append)
    assert calls == [[0, 1], [3, 4]] and sum(heard) == 5
    assert values == ["value 0", "value 1", "value 0", "value 3", "value 4"]
    again = Cache(tmp_path, "kind", ["what", 1])
    assert again.missing(["d", "e", "e"]) == ["e"]
    assert again.complete(keys, compute, lot=2) == values and len(calls) == 2
    assert Cache(tmp_path, "kind", ["what", 2]).missing(keys) == ["a", "b", "c", "d"]


def test_what_was_found_before_a_failure_is_kept(tmp_path: Path) -> None:
    def fail_at_four(places: list[int]) -> list[int]:
        if 4 in places:
            raise RuntimeError("killed")
        return places

    keys = list("abcdef")
    with pytest.raises(RuntimeError):
        Cache(tmp_path, "kind", 0).complete(keys, fail_at_four, lot=2)
    (file,) = (tmp_path / "kind").iterdir()
    with open(file, "a") as half:
        half.write('{"key": "e", "va')  # what a kill inside a write leaves
    assert Cache(tmp_path, "kind", 0).missing(keys) == ["e", "f"]
    assert Cache(tmp_path, "kind", 0).complete(keys, lambda places: places, lot=2) == [0, 1, 2, 3, 4, 5]
    assert Cache(tmp_path, "kind", 0).missing(keys) == []


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=8))
def test_vectors_are_exact(values: list[float]) -> None:
    import tempfile

    vector = np.array(values, dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(Path(folder), "features", 0)
        cache.complete(["x"], lambda _: [{"feature": packed(vector)}], lot=1)
        np.testing.assert_array_equal(cache.stacked(["x", "x"]), np.stack([vector, vector]))


def test_keys_tell_where_a_text_ends() -> None:
    assert key_of("ab", "c") != key_of("a", "bc") != key_of("abc") and key_of("a", "b") == key_of("a", "b")
