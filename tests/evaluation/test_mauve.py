from pathlib import Path

import numpy as np
import pytest

from evaluation.metrics.encoder import Encoder
from evaluation.metrics.mauve import FLOOR, MauveDifference, area, difference, mauve, quantise

pytest.importorskip("mauve", reason="mauve-text is not installed")


def test_range() -> None:
    draw = np.random.default_rng(0)
    human, same, far = draw.normal(size=(3, 200, 8))
    far[:, 0] += 100
    assert mauve(human, human, seeds=[25]).mean == pytest.approx(1, abs=1e-6)
    result = mauve(human, same, seeds=[25, 26, 27])
    assert 0.8 < result.mean <= 1 and result.seed_sd > 0 and result.clusters == 20
    assert result.error == pytest.approx(np.hypot(result.seed_sd / 3**0.5, result.sampling_sd))
    assert mauve(human - 100, far, seeds=[25]).mean == pytest.approx(FLOOR, rel=0.05)


@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0])
def test_equals_mauve_text_and_is_repeatable(shift: float) -> None:
    """Also the clusters and the area that the standard error and the difference are made of."""
    from mauve import compute_mauve

    human, system = np.random.default_rng(1).normal(size=(2, 120, 8)).astype(np.float32)
    system += shift
    expected = [compute_mauve(p_features=human, q_features=system, seed=seed) for seed in (25, 26)]
    found = mauve(human, system, seeds=[25, 26])
    assert found.seed25 == pytest.approx(expected[0].mauve, abs=1e-9)
    assert found.mean == pytest.approx(np.mean([run.mauve for run in expected]), abs=1e-9)
    assert found.star_mean == pytest.approx(np.mean([run.mauve_star for run in expected]), abs=1e-9)
    p, q = (np.bincount(labels, minlength=12) / 120 for labels in quantise([human, system], 25))
    np.testing.assert_allclose([p, q], [expected[0].p_hist, expected[0].q_hist], atol=1e-12)
    assert area(p, q) == pytest.approx(expected[0].mauve, abs=1e-9)
    assert mauve(human, system, seeds=[25, 26]) == found


def test_sampling_error_is_about_the_spread_of_independent_samples() -> None:
    """Drawn anew from the same two distributions 24 times, MAUVE varies as one bootstrap in fixed clusters says."""
    draw = np.random.default_rng(2)
    runs = [mauve(draw.normal(size=(150, 4)), draw.normal(0.6, 1, size=(150, 4)), seeds=[25, 26]) for _ in range(24)]
    spread = float(np.std([run.mean for run in runs], ddof=1))
    told = float(np.mean([run.error for run in runs]))
    assert 0.75 * spread < told < 1.6 * spread


def test_difference_sees_a_worse_system_and_none_between_equal_ones() -> None:
    draw = np.random.default_rng(3)
    human = draw.normal(size=(200, 6))
    near, far = draw.normal(size=(200, 6)), draw.normal(0.7, 1, size=(200, 6))
    assert difference(human, near, near, seeds=[25, 26]) == MauveDifference(0.0, 0.0)
    assert MauveDifference(0.0, 0.0).p == 1
    found = difference(human, near, far, seeds=[25, 26])
    assert found.mean > 0.2 and found.p < 0.01
    reverse = difference(human, far, near, seeds=[25, 26])
    assert reverse.mean == pytest.approx(-found.mean, abs=3 * found.error)  # other order, other clusters
    false_alarms = sum(difference(*draw.normal(size=(3, 120, 6)), seeds=[25, 26]).p < 0.05 for _ in range(20))
    assert false_alarms <= 3


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
