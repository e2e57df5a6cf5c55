"""Scaling laws recovered from data that were made from known constants."""

from functools import partial

import numpy as np
import pytest

from megatext.config import ConfigError
from megatext.scaling.fit import (
    Law,
    Points,
    bootstrap,
    fit_law,
    fit_parabola,
    fit_parabolas,
    fit_power_law,
    hold_out,
    interval,
)

CHINCHILLA = Law(1.69, 406.4, 410.7, 0.34, 0.28)
BUDGETS = (1e19, 1e20, 1e21, 1e22)


def made(law: Law = CHINCHILLA, noise: float = 0.0, seed: int = 0) -> Points:
    """Seven sizes around the optimum of each budget."""
    rows = []
    for budget in BUDGETS:
        best, _ = law.optimum(budget)
        for n in best * np.geomspace(0.2, 5, 7):
            rows.append((n, budget / (6 * n), budget))
    n, d, c = np.array(rows).T
    loss = law.loss(n, d) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))
    return Points(n, d, c, loss, c)


def test_the_optimum_is_the_least_loss_of_a_budget() -> None:
    n, d = CHINCHILLA.optimum(1e21)
    assert 6 * n * d == pytest.approx(1e21)
    sizes = n * np.geomspace(0.5, 2, 401)
    losses = CHINCHILLA.loss(sizes, 1e21 / 6 / sizes)
    assert sizes[losses.argmin()] == pytest.approx(n, rel=0.005)


def test_known_constants_are_recovered() -> None:
    found = fit_law(made())
    assert (found.e, found.alpha, found.beta) == (
        pytest.approx(1.69, rel=1e-3),
        pytest.approx(0.34, rel=1e-3),
        pytest.approx(0.28, rel=1e-3),
    )
    assert (found.a, found.b) == (pytest.approx(406.4, rel=0.02), pytest.approx(410.7, rel=0.02))


def test_a_run_that_went_wrong_does_not_decide() -> None:
    points = made()
    points.loss[5] *= 1.5
    assert fit_law(points).e == pytest.approx(1.69, rel=5e-3)


def test_parabolas_and_their_power_law() -> None:
    """At a budget the optimum grows as C^(beta / (alpha + beta))."""
    parabolas = fit_parabolas(made())
    assert len(parabolas) == 4 and all(each.inside for each in parabolas)
    for each in parabolas:
        best = CHINCHILLA.optimum(each.flops)
        assert each.parameters == pytest.approx(best[0], rel=0.15) and each.tokens == pytest.approx(best[1], rel=0.15)
    law = fit_power_law([each.flops for each in parabolas], [each.parameters for each in parabolas])
    assert law.exponent == pytest.approx(0.28 / 0.62, abs=0.02)
    assert law.at(1e21) == pytest.approx(CHINCHILLA.optimum(1e21)[0], rel=0.15)


def test_the_largest_budget_is_predicted_without_it() -> None:
    held = hold_out(made(noise=0.002), 1e22)
    assert len(held.measured) == 7 and held.relative_error < 0.02
    wrong = made()
    wrong.loss[wrong.flops == 1e22] *= 1.3
    assert hold_out(wrong, 1e22).relative_error == pytest.approx(0.3 / 1.3, rel=0.05)


def test_intervals_hold_the_truth_and_narrow_with_less_noise() -> None:
    widths = []
    for noise in (0.01, 0.002):
        points = made(noise=noise, seed=4)
        whole = fit_law(points)
        start = np.array([*np.log([whole.a, whole.b, whole.e]), whole.alpha, whole.beta])
        exponents = [law.alpha for law in bootstrap(points, partial(fit_law, starts=[start]), draws=60)]
        low, high = interval(exponents)
        assert low < 0.34 < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
    assert np.isnan(interval([1.0, 2.0])).all()


def test_a_least_beside_the_sizes_is_called_a_guess_and_far_ones_are_none() -> None:
    """Tokens follow C = 6 N D there too."""
    n = np.array([1e6, 2e6, 4e6])
    for shift, inside in ((0.7, True), (1.9, False)):
        loss = 3 + (np.log(n) - np.log(1e6 * 4**shift)) ** 2
        found = fit_parabola(Points(n, 1e12 / 6 / n, np.full(3, 1e12), loss, np.full(3, 1e12)))
        assert found.inside == inside and found.parameters == pytest.approx(1e6 * 4**shift)
        assert 6 * found.parameters * found.tokens == pytest.approx(1e12)
    loss = 3 + (np.log(n) - np.log(1e6 * 4**3)) ** 2
    with pytest.raises(ConfigError, match="no least near their sizes"):
        fit_parabola(Points(n, 1e12 / 6 / n, np.full(3, 1e12), loss, np.full(3, 1e12)))


@pytest.mark.parametrize("exponents", [(0.05, 0.02), (0.0, 0.0)])
def test_losses_that_do_not_fall_determine_no_law(exponents: tuple[float, float]) -> None:
    points = made()
    loss = points.parameters ** exponents[0] * points.tokens ** exponents[1]
    with pytest.raises(ConfigError, match="do not determine a law"):
        fit_law(Points(points.parameters, points.tokens, points.flops, loss, points.budget))


@pytest.mark.parametrize(
    ("points", "fit", "message"),
    [
        (made().of(np.arange(5)), fit_law, "six runs at least"),
        (made().of(np.arange(2)), fit_parabola, "three sizes"),
        (
            Points(*np.array([[1, 2, 3, 4], [4, 3, 2, 1], [1, 1, 1, 1], [1, 2, 2, 1.0], [1, 1, 1, 1]], dtype=float)),
            fit_parabola,
            "no least",
        ),
    ],
)
def test_what_cannot_be_fitted_is_told(points: Points, fit: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(points)  # type: ignore[operator]
    with pytest.raises(ConfigError, match="positive"):
        Points(*np.array([[1.0], [1.0], [1.0], [-1.0], [1.0]]))
