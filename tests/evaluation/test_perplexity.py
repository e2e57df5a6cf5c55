import random
from pathlib import Path

import pytest
import torch

from evaluation.metrics.perplexity import Judge, gap


def direct(judge: Judge, prefix: list[int], text: list[int]) -> float:
    with torch.inference_mode():
        logits = judge.model(torch.tensor([prefix + text])).logits[0].log_softmax(-1)
    return -sum(float(logits[len(prefix) + i - 1, token]) for i, token in enumerate(text) if len(prefix) + i > 0)


@pytest.mark.parametrize("batch_tokens", [8192, 60])
def test_equals_one_text_at_a_time(tiny_lm: Path, batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.metrics.perplexity._MAX_BATCH_TOKENS", batch_tokens)
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
    (whole,), (cut,) = judge.score([(prefix, text)]), judge.score([(prefix[-108:], text)])
    assert (whole.nats, whole.tokens, whole.cut) == (cut.nats, cut.tokens, True) and not cut.cut
    (long,) = judge.score([([1], list(range(200)))])
    assert long.cut and long.tokens == 127  # 128 are read, of which the first is predicted from the prefix


def test_a_begin_of_text_stands_before_what_is_judged(shared_data: Path) -> None:
    """The loss its makers publish (1.2968) is of whole stories behind `<s>`; without it the first tokens cost more."""
    from evaluation.files import read_jsonl

    judge = Judge(shared_data / "tiny_lm" / "stories260K_hf")
    assert list(judge.tokenizer.start_ids) == [1]
    stories = [
        r["text"]
        for r, _ in zip(read_jsonl(shared_data / "tinystories" / "stories_3000.jsonl.gz"), range(40), strict=False)
    ]
    scores = judge.score([([], judge.tokenizer.encode(text)) for text in stories])
    assert sum(s.nats for s in scores) / sum(s.tokens for s in scores) == pytest.approx(1.2968, abs=0.15)


def test_gap() -> None:
    assert gap(2.0, 2.0, 9.0) == 0 and gap(9.0, 2.0, 9.0) == 1 and gap(1.0, 2.0, 9.0) < 0
