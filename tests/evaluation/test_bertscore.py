"""BERTScore against the package bert-score, on a tiny random BERT."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.metrics.bertscore import (
    BASELINES,
    BertScore,
    baseline_of,
    bertscore,
    inverse_document_frequencies,
    rescaled,
)
from evaluation.metrics.encoder import _LAYER_OF_NAME, Encoder
from megatext.config import ConfigError
from tests.evaluation.conftest import make_texts


def pairs(count: int, seed: int) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    first, second = ([make_texts(1, draw.randint(1, 60), draw.random())[0] for _ in range(count)] for _ in range(2))
    return list(zip(first, second, strict=True))


def package() -> Any:
    return pytest.importorskip("bert_score", reason="the reference package bert-score is not installed")


def columns(scores: list[BertScore]) -> list[list[float]]:
    return [[s.precision for s in scores], [s.recall for s in scores], [s.fmeasure for s in scores]]


@pytest.mark.parametrize("idf", [False, True])
@pytest.mark.parametrize("layer", [2, 3])
def test_equals_bert_score(tiny_bert: Path, layer: int, idf: bool) -> None:
    """Ragged pairs, some longer than the 48 tokens the model reads."""
    given = pairs(40, seed=1)
    candidates, references = map(list, zip(*given, strict=True))
    expected = package().score(
        candidates, references, model_type=str(tiny_bert), num_layers=layer, idf=idf, device="cpu"
    )
    encoder = Encoder(tiny_bert)
    weights = inverse_document_frequencies(encoder, references) if idf else None
    found = bertscore(encoder, given, layer=layer, idf=weights)
    for ours, theirs in zip(columns(found), expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)
    assert [s.truncated for s in found] == [max(len(c.split()), len(r.split())) + 3 > 48 for c, r in given]
    assert 0 < sum(s.truncated for s in found) < 40


def test_rescaling_equals_bert_score(tiny_bert: Path, tmp_path: Path) -> None:
    given = pairs(10, seed=3)
    table = tmp_path / "baseline.tsv"
    table.write_text("LAYER,P,R,F\n" + "".join(f"{layer},0.{layer}1,0.{layer}2,0.{layer}3\n" for layer in range(4)))
    scorer = package().BERTScorer(
        model_type=str(tiny_bert), num_layers=2, device="cpu", rescale_with_baseline=True, lang="en",
        baseline_path=str(table),
    )  # fmt: skip
    expected = scorer.score([c for c, _ in given], [r for _, r in given])
    baseline = baseline_of("tiny", 2, table)
    assert baseline == (0.21, 0.22, 0.23)
    found = [rescaled(score, baseline) for score in bertscore(Encoder(tiny_bert), given, layer=2)]
    for ours, theirs in zip(columns(found), expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)
    with pytest.raises(ConfigError, match=r"no row LAYER,P,R,F of layer 9"):
        baseline_of("tiny", 9, table)


def test_built_in_baselines_are_the_published_ones() -> None:
    folder = Path(package().__file__).parent / "rescale_baseline" / "en"
    files = {path.stem: path for path in folder.rglob("*.tsv")}
    layers = package().utils.model2layers
    for (model, layer), values in BASELINES.items():
        assert next(found for name, found in layers.items() if name.rpartition("/")[2] == model) == layer
        assert baseline_of(model, layer, files[model]) == values == baseline_of(f"/models/{model}", layer, None)


def test_identical_is_one_empty_is_zero_and_pairs_do_not_touch(tiny_lm: Path) -> None:
    encoder = Encoder(tiny_lm)
    given = pairs(5, seed=2)
    given[3] = ("  ", given[3][1])
    together = bertscore(encoder, [*given, *((r, r) for _, r in given)])
    np.testing.assert_allclose([s.fmeasure for s in together[5:]], 1, atol=1e-6)
    assert together[3] == BertScore(0.0, 0.0, 0.0, False)
    assert rescaled(together[3], (0.5, 0.5, 0.75)) == BertScore(-1.0, -1.0, -3.0, False)  # worse than unrelated text
    alone = [bertscore(encoder, [pair])[0].fmeasure for pair in given]
    np.testing.assert_allclose(alone, [s.fmeasure for s in together[:5]], atol=1e-6)
    idf = inverse_document_frequencies(encoder, [given[0][1]])
    assert all(np.isfinite(columns(bertscore(encoder, given, idf=idf))).ravel())  # one reference: bert-score gives nan


def test_layers_are_the_published_ones() -> None:
    published = {name.rpartition("/")[2]: layer for name, layer in package().utils.model2layers.items()}
    assert {name: published[name] for name in _LAYER_OF_NAME} == _LAYER_OF_NAME


def test_a_table_of_positions_that_begins_late_is_not_overrun(tmp_path: Path) -> None:
    """RoBERTa and its kin give the first token the place behind the padding index; the tokenizer may say less still."""
    import torch
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizerFast

    pieces = {
        token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b", "Ġ", "Ġa", "Ġb"])
    }
    (tmp_path / "vocab.json").write_text(json.dumps(pieces))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ a\nĠ b\n")
    RobertaTokenizerFast(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(pieces), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=22, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(tmp_path)
    encoder = Encoder(tmp_path)
    assert encoder.max_tokens == 20
    (score,) = bertscore(encoder, [(" ".join("ab" * 30), " ".join("ba" * 5))], layer=1)
    assert score.truncated and 0 < score.fmeasure <= 1.000001


def test_a_cut_model_comes_back_whole(tiny_lm: Path) -> None:
    encoder = Encoder(tiny_lm)
    before = encoder.last_token([[1, 2, 3]])
    list(encoder.states([[1, 2, 3]], 1))
    np.testing.assert_array_equal(encoder.last_token([[1, 2, 3]]), before)
