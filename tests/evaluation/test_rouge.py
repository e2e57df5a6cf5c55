"""ROUGE against the package rouge-score, bit for bit, and against the values of the Perl ROUGE-1.5.5."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.metrics.rouge import rouge, rouge_n, tokenize

# Few words, so that they repeat; the traps are letters that change class or length when lower-cased.
WORDS = "the cat Cat sat 3rd naïve İstanbul \u212a ſ - \n \x1c 日本".split(" ")
STEMMED = "running relational generously caresses agreed flies dying sky skies hopping controlling".split()
TEXT = st.one_of(
    st.lists(st.sampled_from(WORDS + STEMMED), max_size=25).map(" ".join),
    st.text(max_size=40),
)


@pytest.mark.parametrize("stem", [False, True])
@given(TEXT, TEXT)
def test_equals_rouge_score_bit_for_bit(stem: bool, target: str, prediction: str) -> None:
    scorer = pytest.importorskip(
        "rouge_score.rouge_scorer", reason="the reference package rouge-score is not installed"
    )
    names = ["rouge1", "rouge2", "rouge3", "rougeL"]
    expected = scorer.RougeScorer(names, use_stemmer=stem).score(target, prediction)
    third = rouge_n(tokenize(target, stem), tokenize(prediction, stem), 3)
    found = {**rouge(target, prediction, stem=stem), "rouge3": third}
    assert {name: tuple(found[name]) for name in names} == {name: tuple(expected[name]) for name in names}


def test_published_values_of_the_perl_program(shared_data: Path) -> None:
    """google-research's fixtures: what ROUGE-1.5.5 says of two lines with and without stemmer, and toy pairs."""
    folder = shared_data / "eval_fixtures" / "rouge_google"
    published = json.loads((folder / "expected.json").read_text())
    lines = [(folder / name).read_text().splitlines() for name in ("target.txt", "prediction.txt")]
    checked = 0
    for key, values in published["target.txt/prediction.txt"].items():
        name, _, stemmer = key.partition("_")
        for target, prediction, expected in zip(*lines, values, strict=True):
            assert rouge(target, prediction, stem=bool(stemmer))[name] == pytest.approx(expected, abs=5e-6)
            checked += 1
    for toy in published["toy"]:
        for name in toy.keys() & {"rouge1", "rouge2", "rougeL"}:
            assert rouge(toy["target"], toy["prediction"])[name] == pytest.approx(toy[name], abs=1e-9)
            checked += 1
    assert checked == 17
