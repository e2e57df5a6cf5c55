import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.metrics.diversity import (
    common_budget,
    copied,
    cut_to_budget,
    distinct_n,
    repetition,
    self_bleu,
    unigram_entropy,
)

TEXTS = st.lists(st.lists(st.integers(0, 5), max_size=12), max_size=8)


def test_known_values() -> None:
    assert unigram_entropy([[1, 2], [3, 4]]) == pytest.approx(math.log(4))
    assert unigram_entropy([[1, 1], [1]]) == 0
    assert distinct_n([[1, 2, 1, 2], [2, 1]], 2) == 2 / 4  # (1 2) (2 1) (1 2) and (2 1): none across texts
    assert repetition([1, 2, 1, 2, 1], 2) == 1 - 2 / 4
    assert copied([1, 2, 3], [2, 3, 4], 2) == 1 / 2
    assert distinct_n([], 2) == repetition([1], 2) == copied([], [], 2) == unigram_entropy([]) == 0
    assert self_bleu([[1, 2, 3, 4, 5]] * 3) == pytest.approx([100] * 3)
    assert self_bleu([[1, 2, 3, 4], [5, 6, 7, 8]]) == [0, 0] and self_bleu([[1]]) == [0]
    assert common_budget([[[1] * 10], [[1] * 7], [[1] * 4], [[]]], human=0) == 7


@given(TEXTS, st.integers(0, 60))
def test_budget_keeps_the_first_tokens(texts: list[list[int]], budget: int) -> None:
    flat = [token for text in texts for token in text]
    assert [token for text in cut_to_budget(texts, budget) for token in text] == flat[:budget]


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=14), min_size=2, max_size=7))
def test_self_bleu_equals_sacrebleu(texts: list[list[str]]) -> None:
    """Each text against all others, few words, so that counts clip and lengths tie."""
    sacrebleu = pytest.importorskip("sacrebleu", reason="the reference package sacrebleu is not installed")
    metric = sacrebleu.BLEU(tokenize="none", smooth_method="none", effective_order=False)
    lines = [" ".join(text) for text in texts]
    for i, found in enumerate(self_bleu(texts)):
        others = lines[:i] + lines[i + 1 :]
        assert found == pytest.approx(metric.sentence_score(lines[i], others).score, abs=1e-9)
