import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.metrics.rouge import rouge, rouge_n

# Few words, so that they repeat; the traps are letters that change class or length when lower-cased.
TEXT = st.one_of(
    st.lists(
        st.sampled_from(
            ["the", "cat", "Cat", "sat", "3rd", "naïve", "İstanbul", "\u212a", "ſ", "-", "\n", "\x1c", "日本"]
        ),
        max_size=25,
    ).map(" ".join),
    st.text(max_size=40),
)


@given(TEXT, TEXT)
def test_equals_rouge_score_bit_for_bit(target: str, prediction: str) -> None:
    scorer = pytest.importorskip(
        "rouge_score.rouge_scorer", reason="the reference package rouge-score is not installed"
    )
    expected = scorer.RougeScorer(["rouge1", "rouge2", "rouge3", "rougeL"]).score(target, prediction)
    found = {**rouge(target, prediction), "rouge3": rouge_n(target, prediction, 3)}
    assert {name: tuple(score) for name, score in found.items()} == {
        name: tuple(score) for name, score in expected.items()
    }
