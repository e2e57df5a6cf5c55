from pathlib import Path

import numpy as np
import pytest

from evaluation.metrics.encoder import Encoder
from evaluation.metrics.mauve import FLOOR, mauve

pytest.importorskip("mauve", reason="mauve-text is not installed")


def test_range() -> None:
    draw = np.random.default_rng(0)
    human, same, far = draw.normal(size=(3, 200, 8))
    far[:, 0] += 100
    assert mauve(human, human, seeds=[25]).mean == pytest.approx(1, abs=1e-6)
    result = mauve(human, same, seeds=[25, 26, 27])
    assert 0.8 < result.mean <= 1 and result.seed_sd > 0 and result.clusters == 20
    assert mauve(human - 100, far, seeds=[25]).mean == pytest.approx(FLOOR, rel=0.05)


def test_equals_mauve_text_and_is_repeatable() -> None:
    from mauve import compute_mauve

    human, system = np.random.default_rng(1).normal(size=(2, 100, 8)).astype(np.float32)
    system += 0.5
    expected = compute_mauve(p_features=human, q_features=system, seed=25).mauve
    assert mauve(human, system, seeds=[25, 26]).seed25 == pytest.approx(expected, abs=1e-9)
    assert mauve(human, system, seeds=[25, 26]) == mauve(human, system, seeds=[25, 26])


def test_features_are_those_of_one_text_at_a_time(tiny_lm: Path) -> None:
    import torch

    encoder = Encoder(tiny_lm)
    ids, cut = encoder.tokenize(["the cat", "", "the dog went to the river because of the cat"])
    assert not any(cut)
    features = encoder.last_token(ids)
    assert not features[1].any()
    with torch.inference_mode():
        alone = [encoder.model(input_ids=torch.tensor([ids[i]])).last_hidden_state[0, -1] for i in (0, 2)]
    torch.testing.assert_close(features[[0, 2]], torch.stack(alone))
