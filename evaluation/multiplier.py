"""The compute multiplier: how many times the FLOPs of a baseline a system needs to write as well, at the same variety.

"As well" is the judge gap G, "the same variety" the entropy within a tolerance. A baseline of several budgets, sampled
in several ways (temperatures), gives its G at any budget and entropy between those measured: along a budget's samplings
G is linear in the entropy, between budgets in the logarithm of FLOPs. Beyond them nothing is guessed: a bound is given.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from evaluation.seeds import Point, points
from megatext.data import DataError

DRAWS = 1000
"""Of the normal errors of all G, for an interval."""


@dataclass(frozen=True)
class Multiplier:
    """Of one system with one way to sample it."""

    name: str
    group: str
    flops: float
    """Of its training and all that it stands on."""
    gap: float
    entropy: float
    value: float | None
    """Its FLOPs over the baseline's; None where even the sign of the comparison is open."""
    relation: str
    """`=`, or `>` where the baseline writes better even at its least budget, `<` where worse even at its largest."""
    interval: tuple[float, float] | None
    """95 % by the errors of G, of the system's and the baseline's alike: inf or 0 where an end is beyond the budgets;
    None where an error is not told, or without a multiplier. Of one seed the error is that of its texts alone."""


@dataclass(frozen=True)
class _Budget:
    """A baseline's runs of one budget: entropies of its samplings, ascending, their G and its standard errors."""

    flops: float
    entropies: list[float]
    gaps: list[float]
    errors: list[float]

    def gap_at(self, entropy: float, tolerance: float, gaps: Sequence[float]) -> float | None:
        """G at an entropy, of the nearest sampling where none is above or below; None where that is too far away."""
        spots = list(zip(self.entropies, gaps, strict=True))
        below = [spot for spot in spots if spot[0] <= entropy]
        above = [spot for spot in spots if spot[0] >= entropy]
        if below and above:
            (x0, y0), (x1, y1) = below[-1], above[0]
            return y0 if x1 == x0 else y0 + (entropy - x0) / (x1 - x0) * (y1 - y0)
        x, y = (below or above[:1])[-1]
        return y if abs(x - entropy) <= tolerance else None


def multipliers(results: dict[str, Any], baseline: Sequence[str], tolerance: float = 0.1) -> list[Multiplier]:
    """Of every group and sampling in a results.json but the `baseline`'s groups, of one budget each; means over seeds.
    Rows that do not tell their FLOPs are left out.

    Raises DataError where a baseline, its FLOPs or gaps are missing."""
    every = points(results["systems"])
    budgets = [_budget(name, [point for point in every if point.group == name]) for name in baseline]
    budgets.sort(key=lambda budget: budget.flops)
    if len({budget.flops for budget in budgets}) < len(budgets):
        raise DataError(f"--baseline {' '.join(baseline)}: two of these groups took the same FLOPs")
    found = []
    for point in every:
        if point.group in baseline or any(point.value(key) is None for key in ("training_pflops", "gap", "entropy")):
            continue
        flops, gap, entropy = (_mean(point, key) for key in ("training_pflops", "gap", "entropy"))
        equal, relation = _flops_for(budgets, [budget.gaps for budget in budgets], gap, entropy, tolerance)
        value = None if equal is None else flops / equal
        interval = None if value is None else _interval(budgets, point, tolerance)
        found.append(Multiplier(point.name, point.group, flops, gap, entropy, value, relation, interval))
    return found


def _budget(name: str, rows: list[Point]) -> _Budget:
    if not rows:
        raise DataError(f"--baseline {name}: no row has this group")
    if len({_mean(point, "training_pflops") for point in rows}) > 1:
        raise DataError(f"--baseline {name}: its rows differ in FLOPs of training; a budget is a group of its own")
    spots = sorted((_mean(point, "entropy"), _mean(point, "gap"), _error(point)) for point in rows)
    entropies, gaps, errors = map(list, zip(*spots, strict=True))
    return _Budget(_mean(rows[0], "training_pflops"), entropies, gaps, errors)


def _mean(point: Point, key: str) -> float:
    found = point.value(key)
    if found is None:
        raise DataError(
            f"{point.name}: no {key}; FLOPs are told by models that launch/export.py wrote, G needs a --judge"
        )
    return found[0] * (1e15 if key == "training_pflops" else 1.0)


def _error(point: Point) -> float:
    """The standard error of the mean G, of texts, which are the same for all seeds, or of seeds where that is larger;
    nan where none is told."""
    own = [row["metrics"]["gap"].get("spread") for row in point.rows]
    if None in own:
        return math.nan
    between = statistics.variance(row["metrics"]["gap"]["value"] for row in point.rows) if len(own) > 1 else 0.0
    return math.sqrt(max(statistics.fmean(error**2 for error in own), between / len(own)))


def _flops_for(
    budgets: Sequence[_Budget], gaps: Sequence[Sequence[float]], gap: float, entropy: float, tolerance: float
) -> tuple[float | None, str]:
    """(FLOPs, relation) at which a baseline, `budgets` ascending in FLOPs with these `gaps`, has this G for the first
    time."""
    reference = [
        (budget.flops, found)
        for budget, own in zip(budgets, gaps, strict=True)
        if (found := budget.gap_at(entropy, tolerance, own)) is not None
    ]
    if not reference:
        return None, "?"
    if gap >= reference[0][1]:
        return reference[0][0], ">" if gap > reference[0][1] else "="
    for (f0, g0), (f1, g1) in pairwise(reference):
        if g1 <= gap < g0:
            share = (g0 - gap) / (g0 - g1)
            return math.exp(math.log(f0) + share * (math.log(f1) - math.log(f0))), "="
    return reference[-1][0], "<"


def _interval(budgets: Sequence[_Budget], point: Point, tolerance: float) -> tuple[float, float] | None:
    """95 % of the multiplier over normal errors of all G: one for a budget, whose samplings are of the same models, and
    independent between budgets and the system."""
    own = _error(point)
    if math.isnan(own + sum(error for budget in budgets for error in budget.errors)):
        return None
    flops, gap, entropy = (_mean(point, key) for key in ("training_pflops", "gap", "entropy"))
    noise, values = np.random.default_rng(0), []
    for _ in range(DRAWS):
        shifts = noise.normal(size=len(budgets))
        drawn = [
            [gap + shift * error for gap, error in zip(budget.gaps, budget.errors, strict=True)]
            for budget, shift in zip(budgets, shifts, strict=True)
        ]
        equal, relation = _flops_for(budgets, drawn, noise.normal(gap, own), entropy, tolerance)
        assert equal is not None
        values.append({">": math.inf, "<": 0.0}.get(relation, flops / equal))
    low, high = np.quantile(values, (0.025, 0.975), method="inverted_cdf")
    return float(low), float(high)


def multiplier_table(found: Sequence[Multiplier]) -> str:
    """Aligned lines for a terminal."""
    width = max((len(each.name) for each in found), default=6)
    lines = [f"{'system':{width}}  {'FLOPs':>9}  {'G':>6}  {'entropy':>7}  multiplier"]
    for each in found:
        value = "no baseline at this entropy" if each.value is None else f"{each.relation} {each.value:.2f}"
        value += _interval_told(each.interval)
        lines.append(f"{each.name:{width}}  {each.flops:9.2e}  {each.gap:6.3f}  {each.entropy:7.2f}  {value}")
    return "\n".join(lines)


def _interval_told(interval: tuple[float, float] | None) -> str:
    low, high = ("" if end in (0, math.inf) else f"{end:.2f}" for end in interval or (0, 0))
    if low and high:
        return f" (95 %: {low} to {high})"
    return f" (95 %: {low} or more)" if low else f" (95 %: {high} or less)" if high else ""
