"""The compute multiplier: how many times the FLOPs of a baseline a system needs to write as well, at the same variety.

"As well" is the judge gap G, "the same variety" the entropy within a tolerance. A baseline of several budgets, sampled
in several ways (temperatures), gives its G at any budget and entropy between those measured: along a budget's samplings
G is linear in the entropy, between budgets in the logarithm of FLOPs. Beyond them nothing is guessed: a bound is given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from evaluation.seeds import Point, points
from megatext.data import DataError


@dataclass(frozen=True)
class Multiplier:
    """Of one system with one way to sample it."""

    name: str
    flops: float
    """Of its training and all that it stands on."""
    gap: float
    entropy: float
    value: float | None
    """Its FLOPs over the baseline's; None where even the sign of the comparison is open."""
    relation: str
    """`=`, or `>` where the baseline writes better even at its least budget, `<` where worse even at its largest."""


@dataclass(frozen=True)
class _Budget:
    """A baseline's runs of one budget: entropy and G of its samplings, ascending in entropy."""

    flops: float
    spots: list[tuple[float, float]]

    def gap_at(self, entropy: float, tolerance: float) -> float | None:
        """G at an entropy, of the nearest sampling where none is above or below; None where that is too far away."""
        below = [spot for spot in self.spots if spot[0] <= entropy]
        above = [spot for spot in self.spots if spot[0] >= entropy]
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
    found = []
    for point in every:
        if point.group in baseline or any(point.value(key) is None for key in ("training_pflops", "gap", "entropy")):
            continue
        flops, gap, entropy = (_mean(point, key) for key in ("training_pflops", "gap", "entropy"))
        reference = [(b.flops, g) for b in budgets if (g := b.gap_at(entropy, tolerance)) is not None]
        equal, relation = _flops_for(reference, gap)
        found.append(Multiplier(point.name, flops, gap, entropy, None if equal is None else flops / equal, relation))
    return found


def _budget(name: str, rows: list[Point]) -> _Budget:
    if not rows:
        raise DataError(f"--baseline {name}: no row has this group")
    spots = sorted((_mean(point, "entropy"), _mean(point, "gap")) for point in rows)
    return _Budget(_mean(rows[0], "training_pflops"), spots)


def _mean(point: Point, key: str) -> float:
    found = point.value(key)
    if found is None:
        raise DataError(
            f"{point.name}: no {key}; FLOPs are told by models that launch/export.py wrote, G needs a --judge"
        )
    return found[0] * (1e15 if key == "training_pflops" else 1.0)


def _flops_for(reference: list[tuple[float, float]], gap: float) -> tuple[float | None, str]:
    """(FLOPs, relation) at which a baseline of (FLOPs, G), ascending in FLOPs, has this G for the first time."""
    if not reference:
        return None, "?"
    if gap >= reference[0][1]:
        return reference[0][0], ">" if gap > reference[0][1] else "="
    for (f0, g0), (f1, g1) in pairwise(reference):
        if g1 <= gap < g0:
            share = (g0 - gap) / (g0 - g1)
            return math.exp(math.log(f0) + share * (math.log(f1) - math.log(f0))), "="
    return reference[-1][0], "<"


def multiplier_table(found: Sequence[Multiplier]) -> str:
    """Aligned lines for a terminal."""
    width = max((len(each.name) for each in found), default=6)
    lines = [f"{'system':{width}}  {'FLOPs':>9}  {'G':>6}  {'entropy':>7}  multiplier"]
    for each in found:
        value = "no baseline at this entropy" if each.value is None else f"{each.relation} {each.value:.2f}"
        lines.append(f"{each.name:{width}}  {each.flops:9.2e}  {each.gap:6.3f}  {each.entropy:7.2f}  {value}")
    return "\n".join(lines)
