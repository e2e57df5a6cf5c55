"""Spread and comparison from stored per-sample scores: bootstrap over samples, paired tests, Holm's correction."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


class Bootstrap:
    """Resamples of n samples, drawn once and used for every metric and system, so that differences are paired."""

    def __init__(self, n: int, *, draws: int = 10_000, seed: int = 0) -> None:
        draws = min(draws, max(1000, 20_000_000 // n))  # bounds memory at 80 MB
        self._counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float32)

    def sums(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Sum of `values` [n] in each resample, float64 [draws]; nan for a single sample, which tells no spread."""
        if self._counts.shape[1] < 2:
            return np.full(len(self._counts), np.nan)
        return self._counts @ np.asarray(values, dtype=np.float64)

    def mean(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Mean of `values` [n] in each resample, float64 [draws]."""
        return self.sums(values) / self._counts.shape[1]


def spread(draws: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Standard error and 95 % percentile interval of bootstrap draws; nan draws (nothing to divide by) are left out."""
    draws = draws[np.isfinite(draws)]
    if draws.size < 2:
        return float("nan"), (float("nan"), float("nan"))
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(draws.std(ddof=1)), (float(low), float(high))


def jackknife_error(
    items: Sequence[Sequence[Any]], statistic: Callable[[list[Sequence[Any]]], float], groups: int = 20
) -> float:
    """Standard error of a statistic of pooled tokens by leaving out one of `groups` interleaved groups at a time.

    A bootstrap would repeat texts, and repeated texts lower entropy and distinct n-grams by themselves.
    """
    groups = min(groups, len(items))
    if groups < 2:
        return float("nan")
    values = np.array([statistic([item for i, item in enumerate(items) if i % groups != g]) for g in range(groups)])
    return float(np.sqrt((groups - 1) / groups * ((values - values.mean()) ** 2).sum()))


@dataclass(frozen=True)
class Difference:
    """A paired comparison of two systems on the same samples."""

    mean: float
    """Mean of a - b."""
    ci95: tuple[float, float]
    """95 % percentile interval of the mean, paired bootstrap."""
    p: float
    """Two-sided sign-flip permutation test of a mean of 0."""
    wins: float
    """Share of samples with a > b; ties count half."""


def paired(a: Sequence[float], b: Sequence[float], *, draws: int = 10_000, seed: int = 0) -> Difference:
    """Compare per-sample scores [n] of two systems."""
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    n = len(difference)
    _, ci95 = spread(Bootstrap(n, draws=draws, seed=seed).mean(difference))
    draws = min(draws, max(1000, 20_000_000 // n))
    signs = np.random.default_rng([seed, 1]).integers(0, 2, size=(draws, n), dtype=np.int8) * 2 - 1
    observed = abs(difference.mean())
    extreme = int((np.abs(signs @ difference) / n >= observed - 1e-12).sum())
    wins = float(((difference > 0) + 0.5 * (difference == 0)).mean())
    return Difference(float(difference.mean()), ci95, (extreme + 1) / (draws + 1), wins)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: p values that hold together for the whole table."""
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted
