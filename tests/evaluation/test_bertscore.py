import random
from pathlib import Path

import numpy as np
import pytest

from evaluation.metrics.bertscore import bertscore
from evaluation.metrics.encoder import Encoder
from tests.evaluation.conftest import WORDS, make_texts


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    directory = tmp_path_factory.mktemp("tiny_bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *sorted({word.lower() for word in WORDS})]
    (directory / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(directory / "vocab.txt"), model_max_length=48).save_pretrained(directory)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=48, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(directory)
    return directory


def pairs(count: int, seed: int) -> tuple[list[str], list[str]]:
    draw = random.Random(seed)
    return tuple([make_texts(1, draw.randint(1, 60), draw.random())[0] for _ in range(count)] for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("layer", [2, 3])
def test_equals_bert_score(tiny_bert: Path, layer: int) -> None:
    """Ragged pairs, some longer than the 48 tokens the model reads."""
    bert_score = pytest.importorskip("bert_score", reason="the reference package bert-score is not installed")
    candidates, references = pairs(40, seed=1)
    expected = bert_score.score(candidates, references, model_type=str(tiny_bert), num_layers=layer, device="cpu")
    (found,) = bertscore(Encoder(tiny_bert), [candidates], references, layer=layer)
    for ours, theirs in zip((found.precision, found.recall, found.fmeasure), expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)
    assert found.truncated == sum(
        max(len(c.split()), len(r.split())) + 3 > 48 for c, r in zip(candidates, references, strict=True)
    )


def test_identical_is_one_empty_is_zero_and_systems_do_not_touch(tiny_lm: Path) -> None:
    encoder = Encoder(tiny_lm)
    candidates, references = pairs(5, seed=2)
    candidates[3] = "  "
    same, other = bertscore(encoder, [references, candidates], references)
    np.testing.assert_allclose(same.fmeasure, 1, atol=1e-6)
    assert other.fmeasure[3] == 0
    (alone,) = bertscore(encoder, [candidates], references)
    np.testing.assert_allclose(alone.fmeasure, other.fmeasure, atol=1e-6)


def test_a_cut_model_comes_back_whole(tiny_lm: Path) -> None:
    encoder = Encoder(tiny_lm)
    before = encoder.last_token([[1, 2, 3]])
    list(encoder.states([[1, 2, 3]], 1))
    np.testing.assert_array_equal(encoder.last_token([[1, 2, 3]]), before)
