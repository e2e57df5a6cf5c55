"""Scaling laws from finished runs: the parametric law, iso-FLOP parabolas, the compute-optimal frontier, each with
bootstrap intervals (Chinchilla, arXiv 2203.15556, section 3; the fit as in its replication, arXiv 2404.10102)."""

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from typing import TypeVar

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp

from megatext.config import ConfigError

HUBER_DELTA = 1e-3
"""Residuals of the logarithm beyond this count linearly: runs that went wrong do not decide the fit."""
STARTS = {
    "log_a": (0.0, 7.0, 14.0),
    "log_b": (0.0, 7.0, 14.0),
    "log_e": (-1.0, 0.0, 1.0),
    "alpha": (0.2, 0.5, 1.0),
    "beta": (0.2, 0.5, 1.0),
}
"""The grid that minimisations start from."""
LEAST_EXPONENT = 0.01
"""With a smaller one the loss does not depend on the size, or on the tokens."""
MAX_LOG = 60.0
"""A constant whose logarithm is larger belongs to an exponent that the runs do not determine."""
LEVELS = (2.5, 97.5)
"""Percentiles of an interval."""


@dataclass(frozen=True)
class Points:
    """What runs ended with; float64 arrays of one length."""

    parameters: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray
    budget: np.ndarray
    """FLOPs that were asked for: steps are whole, so runs of one budget differ a little in `flops`."""

    def __post_init__(self) -> None:
        columns = astuple(self)
        if len({len(column) for column in columns}) > 1 or not all((column > 0).all() for column in columns):
            raise ConfigError(
                "scaling points: parameters, tokens, flops, losses and budgets have to be positive, one of each a run"
            )

    def __len__(self) -> int:
        return len(self.loss)

    def of(self, chosen: np.ndarray) -> "Points":
        """Some of them, by number or by mask."""
        return Points(*(column[chosen] for column in astuple(self)))


@dataclass(frozen=True)
class Law:
    """loss = e + a / N^alpha + b / D^beta, N parameters and D tokens."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """At some sizes and numbers of tokens."""
        return self.e + self.a * parameters**-self.alpha + self.b * tokens**-self.beta

    def optimum(self, flops: float, per_parameter_and_token: float = 6.0) -> tuple[float, float]:
        """(N, D) of the least loss where N D `per_parameter_and_token` is `flops` (the paper's Eq. 4)."""
        product = flops / per_parameter_and_token
        g = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        n = g * product ** (self.beta / (self.alpha + self.beta))
        return n, product / n


def fit_law(points: Points, starts: Sequence[np.ndarray] | None = None) -> Law:
    """The law of least Huber loss of log residuals, the best of many starts. Raises ConfigError of too few points."""
    if len(points) < 6:
        raise ConfigError(f"a law of five constants needs six runs at least, not {len(points)}")
    if starts is None:
        starts = [np.array(start) for start in itertools.product(*STARTS.values())]
    log_n, log_d, log_loss = np.log(points.parameters), np.log(points.tokens), np.log(points.loss)

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        """Sum of Huber losses and its gradient."""
        log_a, log_b, log_e, alpha, beta = x
        terms = np.stack([log_a - alpha * log_n, log_b - beta * log_d, np.full_like(log_n, log_e)])
        predicted = logsumexp(terms, axis=0)
        share, residual = np.exp(terms - predicted), predicted - log_loss
        small = np.abs(residual) <= HUBER_DELTA
        value = np.where(small, 0.5 * residual**2, HUBER_DELTA * (np.abs(residual) - 0.5 * HUBER_DELTA)).sum()
        slope = np.clip(residual, -HUBER_DELTA, HUBER_DELTA)
        gradient = np.array([
            (slope * share[0]).sum(), (slope * share[1]).sum(), (slope * share[2]).sum(),
            -(slope * share[0] * log_n).sum(), -(slope * share[1] * log_d).sum(),
        ])  # fmt: skip
        return float(value), gradient

    # most starts are poor: a few steps of each, and the best of them to the end
    rough = [minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 25}) for start in starts]
    rough.sort(key=lambda found: found.fun)
    options = {"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-10}
    done = [minimize(objective, found.x, jac=True, method="L-BFGS-B", options=options) for found in rough[:5]]
    log_a, log_b, log_e, alpha, beta = min(done, key=lambda found: found.fun).x
    if min(alpha, beta) < LEAST_EXPONENT or max(log_a, log_b, log_e) > MAX_LOG:
        raise ConfigError(
            f"the runs do not determine a law: alpha {alpha:.3g}, beta {beta:.3g}; wider sizes and budgets would"
        )
    return Law(math.exp(log_e), math.exp(log_a), math.exp(log_b), float(alpha), float(beta))


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient * C^exponent."""

    coefficient: float
    exponent: float

    def at(self, flops: float) -> float:
        """y of a budget."""
        return self.coefficient * flops**self.exponent


@dataclass(frozen=True)
class Parabola:
    """The losses of one FLOP budget over the logarithm of parameters."""

    flops: float
    parameters: float
    """Where the least loss is."""
    tokens: float
    loss: float
    inside: bool
    """Whether it lies between the smallest and the largest of the budget's sizes; else it is a guess."""


def fit_parabola(points: Points) -> Parabola:
    """Of the runs of one budget, three sizes or more. Raises ConfigError where the losses have no least."""
    log_n = np.log(points.parameters)
    if len(np.unique(log_n)) < 3:
        raise ConfigError(f"a parabola needs three sizes at a budget, not {len(np.unique(log_n))}")
    c2, c1, c0 = np.polyfit(log_n, points.loss, 2)
    if c2 <= 0:
        raise ConfigError(
            f"the losses at {points.flops.mean():.2g} FLOPs have no least: {points.loss.round(4).tolist()}"
        )
    best = -c1 / (2 * c2)
    low, high = log_n.min(), log_n.max()
    if not low - (high - low) <= best <= high + (high - low):
        losses = points.loss.round(4).tolist()
        raise ConfigError(f"the losses at {points.flops.mean():.2g} FLOPs have no least near their sizes: {losses}")
    # at a budget tokens are a power of parameters, close to -1: FLOPs are not just 6 N D
    tokens = math.exp(np.polyval(np.polyfit(log_n, np.log(points.tokens), 1), best))
    least = c0 + c1 * best + c2 * best**2
    inside = bool(low <= best <= high)
    return Parabola(float(points.budget.mean()), math.exp(best), tokens, float(least), inside)


def fit_parabolas(points: Points) -> list[Parabola]:
    """Of every budget. One of fewer than three sizes, or whose losses have no least near them, is left out."""
    found = []
    for budget in np.unique(points.budget):
        with suppress(ConfigError):
            found.append(fit_parabola(points.of(points.budget == budget)))
    return found


def fit_power_law(flops: Sequence[float], values: Sequence[float]) -> PowerLaw:
    """Least squares of the logarithms."""
    exponent, intercept = np.polyfit(np.log(flops), np.log(values), 1)
    return PowerLaw(math.exp(intercept), float(exponent))


T = TypeVar("T")


def bootstrap(points: Points, fit: Callable[[Points], T], draws: int = 200, seed: int = 0) -> list[T]:
    """The fits of resampled runs; those that cannot be fitted are left out."""
    generator, found = np.random.default_rng(seed), []
    for _ in range(draws):
        try:
            found.append(fit(points.of(generator.integers(len(points), size=len(points)))))
        except ConfigError:
            continue
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % percentile interval; nan of fewer than ten values."""
    if len(values) < 10:
        return math.nan, math.nan
    low, high = np.percentile(np.asarray(values), LEVELS)
    return float(low), float(high)


@dataclass(frozen=True)
class HeldOut:
    """How a law that was fitted without the largest budget predicts it."""

    flops: float
    predicted: list[float]
    measured: list[float]

    @property
    def relative_error(self) -> float:
        """Mean of |predicted - measured| / measured."""
        pairs = zip(self.predicted, self.measured, strict=True)
        return float(np.mean([abs(p - m) / m for p, m in pairs]))


def hold_out(points: Points, budget: float) -> HeldOut:
    """Fit without the runs of a budget, predict them."""
    out = points.budget == budget
    law = fit_law(points.of(~out))
    predicted = law.loss(points.parameters[out], points.tokens[out])
    return HeldOut(budget, predicted.tolist(), points.loss[out].tolist())
