import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.metrics.diversity import copied, cut_to_budget, distinct_n, repetition, unigram_entropy

TEXTS = st.lists(st.lists(st.integers(0, 5), max_size=12), max_size=8)


def test_known_values() -> None:
    assert unigram_entropy([[1, 2], [3, 4]]) == pytest.approx(math.log(4))
    assert unigram_entropy([[1, 1], [1]]) == 0
    assert distinct_n([[1, 2, 1, 2], [2, 1]], 2) == 2 / 4  # (1 2) (2 1) (1 2) and (2 1): none across texts
    assert repetition([1, 2, 1, 2, 1], 2) == 1 - 2 / 4
    assert copied([1, 2, 3], [2, 3, 4], 2) == 1 / 2
    assert distinct_n([], 2) == repetition([1], 2) == copied([], [], 2) == unigram_entropy([]) == 0


@given(TEXTS, st.integers(0, 60))
def test_budget_keeps_the_first_tokens(texts: list[list[int]], budget: int) -> None:
    flat = [token for text in texts for token in text]
    assert [token for text in cut_to_budget(texts, budget) for token in text] == flat[:budget]
