import numpy as np
import pytest

from evaluation.statistics import Bootstrap, holm, jackknife_error, paired, spread


def test_bootstrap_error_is_that_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=400)
    error, (low, high) = spread(Bootstrap(400, seed=1).mean(values))
    assert error == pytest.approx(values.std() / 20, rel=0.05)
    assert low < values.mean() < high
    assert spread(Bootstrap(400, seed=1).mean(values))[0] == error


def test_one_sample_has_no_spread() -> None:
    error, interval = spread(Bootstrap(1).mean([3.0]))
    assert np.isnan(error) and np.isnan(interval).all()


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    texts = [[int(x)] for x in np.random.default_rng(0).integers(0, 100, size=60)]
    error = jackknife_error(texts, lambda kept: float(np.mean(kept)), groups=60)
    assert error == pytest.approx(np.std(texts, ddof=1) / 60**0.5)


def test_paired_sees_a_small_steady_difference() -> None:
    draw = np.random.default_rng(0)
    a = draw.normal(size=200)
    better = paired(a + 0.1 + draw.normal(scale=0.1, size=200), a)
    assert better.p < 0.001 and better.ci95[0] > 0 and better.wins > 0.7
    assert paired(a, draw.permutation(a)).p > 0.05
    assert paired(a, a).p == 1 and paired(a, a).wins == 0.5


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
