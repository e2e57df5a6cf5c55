"""The compute multiplier: how many times the FLOPs of a baseline a system needs to write as well, at the same variety.

"As well" is the judge gap G, "the same variety" is read twice: the entropy itself, and any within a tolerance, the best
for the baseline. A baseline of several budgets, sampled in several ways (temperatures, guidance), gives its G at any
budget and entropy between those measured: at a budget it is the lower convex hull of its samplings (a share of the
texts by one, the rest by another), between budgets linear in the logarithm of FLOPs. Beyond them nothing is guessed: a
bound is given.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from evaluation.seeds import Point, points
from megatext.data import DataError

Array = np.ndarray[Any, np.dtype[np.float64]]

DRAWS = 1000
"""Of the normal errors of all G and entropies, for an interval."""


@dataclass(frozen=True)
class Multiplier:
    """Of one system with one way to sample it."""

    name: str
    group: str
    sampling: dict[str, Any]
    """As its rows say it."""
    flops: float
    """Of its training and all that it stands on."""
    gap: float
    entropy: float
    same: "Ratio"
    """Beside the baseline at this entropy."""
    near: "Ratio"
    """Beside the baseline where it is best within the tolerance of this entropy."""


@dataclass(frozen=True)
class Ratio:
    """A system's FLOPs over the baseline's."""

    value: float | None
    """None where the baseline was not measured at this entropy."""
    relation: str
    """`=`, or `>` where the baseline writes better even at its least budget, `<` where worse even at its largest."""
    interval: tuple[float, float] | None
    """95 % by the errors of G and entropy, of the system's and the baseline's alike: inf or 0 where an end is beyond
    the budgets; None where an error is not told, or without a value. Of one seed the error is that of its texts
    alone."""


@dataclass(frozen=True)
class _Budget:
    """A baseline's runs of one budget: entropies of its samplings, their G, and the standard errors of both."""

    flops: float
    entropies: Array
    gaps: Array
    entropy_errors: Array
    gap_errors: Array

    def drawn(self, shifts: Array) -> tuple[Array, Array]:
        """(entropies, gaps) `[draws, samplings]`, `shifts` `[draws, 2]` standard errors away: one of each for all its
        samplings, which are of the same models."""
        entropy_errors, gap_errors = np.nan_to_num(self.entropy_errors), np.nan_to_num(self.gap_errors)
        return self.entropies + shifts[:, :1] * entropy_errors, self.gaps + shifts[:, 1:] * gap_errors


def _hull(entropies: Array, gaps: Array, entropy: Array) -> Array:
    """The lower convex hull of each draw's samplings `[draws, samplings]` at an entropy `[draws]`; nan beyond them."""
    found = np.full(len(entropy), np.inf)
    for i in range(entropies.shape[1]):
        for j in range(entropies.shape[1]):
            (x0, y0), (x1, y1) = (entropies[:, i], gaps[:, i]), (entropies[:, j], gaps[:, j])
            share = np.where(x1 > x0, (entropy - x0) / np.where(x1 > x0, x1 - x0, 1), 0)
            chord = np.where((x0 <= entropy) & (entropy <= x1), y0 + share * (y1 - y0), np.inf)
            found = np.minimum(found, chord)
    return np.where(np.isinf(found), np.nan, found)


def _same(entropies: Array, gaps: Array, entropy: Array, tolerance: float) -> Array:
    """The baseline's G at an entropy, of the nearest sampling within `tolerance` where none is above or below."""
    nearest = np.abs(entropies - entropy[:, None]).argmin(axis=1)[:, None]
    close = np.abs(np.take_along_axis(entropies, nearest, 1)[:, 0] - entropy) <= tolerance
    beyond = np.where(close, np.take_along_axis(gaps, nearest, 1)[:, 0], np.nan)
    found = _hull(entropies, gaps, entropy)
    return np.where(np.isnan(found), beyond, found)


def _near(entropies: Array, gaps: Array, entropy: Array, tolerance: float) -> Array:
    """The baseline's lowest G within `tolerance` of an entropy: a hull is lowest at a sampling or an end."""
    ends = [_hull(entropies, gaps, entropy + side * tolerance) for side in (-1, 0, 1)]
    inside = np.where(np.abs(entropies - entropy[:, None]) <= tolerance, gaps, np.nan)
    lowest = np.fmin.reduce([*ends, *inside.T])
    return np.asarray(lowest)


def multipliers(results: dict[str, Any], baseline: Sequence[str], tolerance: float = 0.1) -> list[Multiplier]:
    """Of every group and sampling in a results.json but the `baseline`'s groups, of one budget each (groups of equal
    FLOPs are one budget); means over seeds. Rows that do not tell their FLOPs are left out. `tolerance` in nats.

    Raises DataError where a baseline, its FLOPs or gaps are missing."""
    every = points(results["systems"])
    budgets = _budgets([_group(name, every) for name in baseline])
    found = []
    for point in every:
        if point.group in baseline or any(point.value(key) is None for key in ("training_pflops", "gap", "entropy")):
            continue
        flops, gap, entropy = (_mean(point, key) for key in ("training_pflops", "gap", "entropy"))
        same, near = (_ratio(budgets, point, reading, tolerance) for reading in (_same, _near))
        found.append(Multiplier(point.name, point.group, point.rows[0]["sampling"], flops, gap, entropy, same, near))
    return found


def _group(name: str, every: Sequence[Point]) -> list[Point]:
    rows = [point for point in every if point.group == name]
    if not rows:
        raise DataError(f"--baseline {name}: no row has this group")
    if len({_mean(point, "training_pflops") for point in rows}) > 1:
        raise DataError(f"--baseline {name}: its rows differ in FLOPs of training; a budget is a group of its own")
    return rows


def _budgets(groups: Sequence[Sequence[Point]]) -> list[_Budget]:
    """Ascending in FLOPs."""
    together: dict[float, list[Point]] = {}
    for rows in groups:
        together.setdefault(float(f"{_mean(rows[0], 'training_pflops'):.6e}"), []).extend(rows)
    return [
        _Budget(
            flops,
            np.array([_mean(point, "entropy") for point in rows]),
            np.array([_mean(point, "gap") for point in rows]),
            np.array([_error(point, "entropy") for point in rows]),
            np.array([_error(point, "gap") for point in rows]),
        )
        for flops, rows in sorted(together.items())
    ]


def _mean(point: Point, key: str) -> float:
    found = point.value(key)
    if found is None:
        raise DataError(
            f"{point.name}: no {key}; FLOPs are told by models that launch/export.py wrote, G needs a --judge"
        )
    return found[0] * (1e15 if key == "training_pflops" else 1.0)


def _error(point: Point, key: str) -> float:
    """The standard error of a mean, of texts, which are the same for all seeds, or of seeds where that is larger;
    nan where none is told."""
    own = [row["metrics"][key].get("spread") for row in point.rows]
    if None in own:
        return math.nan
    between = statistics.variance(row["metrics"][key]["value"] for row in point.rows) if len(own) > 1 else 0.0
    return math.sqrt(max(statistics.fmean(error**2 for error in own), between / len(own)))


def _ratio(
    budgets: Sequence[_Budget], point: Point, reading: Callable[[Array, Array, Array, float], Array], tolerance: float
) -> Ratio:
    """The first draw is without errors and gives the value, the others the interval. Errors are independent between
    budgets and the system."""
    flops, gap, entropy = (_mean(point, key) for key in ("training_pflops", "gap", "entropy"))
    own = np.array([_error(point, "entropy"), _error(point, "gap")])
    told = not np.isnan([own.sum(), *(b.entropy_errors.sum() + b.gap_errors.sum() for b in budgets)]).any()
    shifts = np.random.default_rng(0).normal(size=(1 + DRAWS if told else 1, 1 + len(budgets), 2))
    shifts[0] = 0
    drawn = np.array([entropy, gap]) + shifts[:, 0] * np.nan_to_num(own)
    reference = []
    for i, budget in enumerate(budgets, 1):
        entropies, gaps = budget.drawn(shifts[:, i])
        reference.append(reading(entropies, gaps, drawn[:, 0], tolerance))
    found = [
        _flops_for([budget.flops for budget in budgets], gaps, own_gap)
        for gaps, own_gap in zip(np.stack(reference, axis=1), drawn[:, 1], strict=True)
    ]
    equal, relation = found[0]
    value = None if equal is None else flops / equal
    # where a draw leaves what was measured there is nothing to compare with
    values = [{">": math.inf, "<": 0.0}.get(sign, flops / equal) for equal, sign in found[1:] if equal is not None]
    interval = None if value is None or not values else np.quantile(values, (0.025, 0.975), method="inverted_cdf")
    return Ratio(value, relation, None if interval is None else (float(interval[0]), float(interval[1])))


def _flops_for(budgets: Sequence[float], gaps: Array, gap: float) -> tuple[float | None, str]:
    """(FLOPs, relation) at which a baseline of ascending `budgets` with these `gaps` (nan: not measured there) has this
    G for the first time."""
    reference = [(flops, own) for flops, own in zip(budgets, gaps.tolist(), strict=True) if not math.isnan(own)]
    if not reference:
        return None, "?"
    if gap >= reference[0][1]:
        return reference[0][0], ">" if gap > reference[0][1] else "="
    for (f0, g0), (f1, g1) in pairwise(reference):
        if g1 <= gap < g0:
            share = (g0 - gap) / (g0 - g1)
            return math.exp(math.log(f0) + share * (math.log(f1) - math.log(f0))), "="
    return reference[-1][0], "<"


def multiplier_table(found: Sequence[Multiplier], tolerance: float = 0.1) -> str:
    """Aligned lines for a terminal."""
    width = max((len(each.name) for each in found), default=6)
    told = [[_told(each.same), _told(each.near)] for each in found]
    first = max((len(same) for same, _ in told), default=0)
    lines = [
        f"{'system':{width}}  {'FLOPs':>9}  {'G':>6}  {'entropy':>7}  {'multiplier':{first}}  within {tolerance:g}"
    ]
    for each, (same, near) in zip(found, told, strict=True):
        lines.append(
            f"{each.name:{width}}  {each.flops:9.2e}  {each.gap:6.3f}  {each.entropy:7.2f}  {same:{first}}  {near}"
        )
    return "\n".join(lines)


def _told(ratio: Ratio) -> str:
    if ratio.value is None:
        return "no baseline at this entropy"
    return f"{ratio.relation} {ratio.value:.2f}" + _interval_told(ratio.interval)


def _interval_told(interval: tuple[float, float] | None) -> str:
    low, high = ("" if end in (0, math.inf) else f"{end:.2f}" for end in interval or (0, 0))
    if low and high:
        return f" (95 %: {low} to {high})"
    return f" (95 %: {low} or more)" if low else f" (95 %: {high} or less)" if high else ""
