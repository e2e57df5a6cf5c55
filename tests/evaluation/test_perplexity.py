import random
from pathlib import Path

import pytest
import torch

from evaluation.metrics.perplexity import Judge, gap


def direct(judge: Judge, prefix: list[int], text: list[int]) -> float:
    with torch.inference_mode():
        logits = judge.model(torch.tensor([prefix + text])).logits[0].log_softmax(-1)
    return -sum(float(logits[len(prefix) + i - 1, token]) for i, token in enumerate(text) if len(prefix) + i > 0)


def test_equals_one_text_at_a_time(tiny_lm: Path) -> None:
    judge = Judge(tiny_lm)
    draw = random.Random(0)
    pairs = [
        (
            [draw.randrange(300) for _ in range(draw.randint(1, 20))],
            [draw.randrange(300) for _ in range(draw.randint(0, 20))],
        )
        for _ in range(40)
    ]
    pairs += [([], [5, 6, 7]), ([], [5]), pairs[0]]
    scores = judge.score(pairs)
    for (prefix, text), score in zip(pairs, scores, strict=True):
        assert score.tokens == (len(text) if prefix else max(0, len(text) - 1))
        assert score.nats == pytest.approx(direct(judge, prefix, text), rel=1e-4, abs=1e-4)


def test_long_prefix_is_cut_at_its_start(tiny_lm: Path) -> None:
    judge = Judge(tiny_lm)
    prefix, text = list(range(200)), list(range(20))
    assert judge.score([(prefix, text)]) == judge.score([(prefix[-108:], text)])


def test_gap() -> None:
    assert gap(2.0, 2.0, 9.0) == 0 and gap(9.0, 2.0, 9.0) == 1 and gap(1.0, 2.0, 9.0) < 0
