"""What the fits say of every system: constants with intervals, the compute-optimal frontier, the held-out budget."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.files import atomic_write
from megatext.config import ConfigError
from megatext.scaling.collect import Measured
from megatext.scaling.fit import (
    STARTS,
    Law,
    Parabola,
    Points,
    PowerLaw,
    bootstrap,
    fit_law,
    fit_parabolas,
    fit_power_law,
    hold_out,
    interval,
)
from megatext.scaling.plan import aligned, short

FITS = "fits.json"
NEXT = 10.0
"""The budget that is predicted, over the largest one."""
LAW = ("e", "a", "b", "alpha", "beta")


def points_of(measured: Sequence[Measured], system: str, parameters: str) -> Points:
    """The final points of a system; `parameters` is `all` or `without_embeddings`."""
    final = [point for point in measured if point.final and point.system == system]
    name = "parameters" if parameters == "all" else "parameters_without_embeddings"
    columns = [name, "tokens", "flops", "loss", "budget_flops"]
    return Points(*(np.array([getattr(point, column) for point in final], dtype=float) for column in columns))


def summarise(measured: Sequence[Measured], parameters: str, draws: int = 200) -> dict[str, Any]:
    """System -> what `fit_system` says of it. Raises ConfigError where no system has a final point."""
    systems = list(dict.fromkeys(point.system for point in measured if point.final))
    if not systems:
        raise ConfigError("no run is finished yet: there is nothing to fit")
    found = {name: fit_system(points_of(measured, name, parameters), draws) for name in systems}
    return {"parameters": parameters, "systems": found}


def fit_system(points: Points, draws: int) -> dict[str, Any]:
    """The law, the parabolas, their frontier and the held-out budget; `missing` says why something could not be had."""
    found: dict[str, Any] = {"runs": len(points), "missing": {}}
    makers: dict[str, Callable[[], Any]] = {
        "law": lambda: _law(points, draws),
        "parabolas": lambda: _frontier(points, draws),
        "held_out": lambda: _held_out(points),
    }
    for name, make in makers.items():
        try:
            found[name] = make()
        except ConfigError as error:
            found["missing"][name] = str(error)
    return found


def _law(points: Points, draws: int) -> dict[str, Any]:
    """Constants, and what the law says of a budget that is `NEXT` times the largest."""
    law, budget = fit_law(points), NEXT * float(points.budget.max())
    # resampled runs start where the whole ended, and at the middle of the grid
    starts = [
        np.array([math.log(law.a), math.log(law.b), math.log(law.e), law.alpha, law.beta]),
        np.array([values[1] for values in STARTS.values()]),
    ]
    laws = bootstrap(points, partial(fit_law, starts=starts), draws)
    best, bests = _best(law, points, budget), [_best(each, points, budget) for each in laws]
    exponents = [each.beta / (each.alpha + each.beta) for each in laws]
    return {
        **{name: _spread(getattr(law, name), [getattr(each, name) for each in laws]) for name in LAW},
        "parameters_exponent": _spread(law.beta / (law.alpha + law.beta), exponents),
        "next": {
            "flops": budget,
            **{name: _spread(best[name], [each[name] for each in bests]) for name in best},
        },
    }


def flops_per_parameter_and_token(points: Points) -> float:
    """C / (N D) of the runs, their median: not just 6."""
    return float(np.median(points.flops / (points.parameters * points.tokens)))


def _best(law: Law, points: Points, budget: float) -> dict[str, float]:
    """The law's best size of a budget, its tokens and its loss."""
    n, d = law.optimum(budget, flops_per_parameter_and_token(points))
    return {"parameters": n, "tokens": d, "loss": float(law.loss(np.array(n), np.array(d)))}


def _frontier(points: Points, draws: int) -> dict[str, Any]:
    """The parabolas' least losses, and how the best size and number of tokens grow with the budget: through the leasts
    that lie between their sizes, as the others are guesses."""
    parabolas = fit_parabolas(points)
    if not parabolas:
        raise ConfigError("no budget has three sizes with a least loss between or near them")
    resampled = [[each for each in drawn if each.inside] for drawn in bootstrap(points, fit_parabolas, draws)]
    names = ("parameters", "tokens", "loss")
    least = []
    for each in parabolas:
        again = [other for drawn in resampled for other in drawn if other.flops == each.flops]
        values = {name: _spread(getattr(each, name), [getattr(other, name) for other in again]) for name in names}
        least.append({"flops": each.flops, "inside": each.inside, **values})
    found: dict[str, Any] = {"least": least}
    inside = [each for each in parabolas if each.inside]
    for name in names if len(inside) > 1 else ():
        laws = [_power_law(each, name) for each in resampled if len(each) > 1]
        law = _power_law(inside, name)
        found[name] = {
            "coefficient": law.coefficient,
            "exponent": _spread(law.exponent, [each.exponent for each in laws]),
        }
    return found


def _power_law(parabolas: Sequence[Parabola], name: str) -> PowerLaw:
    return fit_power_law([each.flops for each in parabolas], [getattr(each, name) for each in parabolas])


def _held_out(points: Points) -> dict[str, Any]:
    held = hold_out(points, float(points.budget.max()))
    return {**asdict(held), "relative_error": held.relative_error}


def _spread(value: float, resampled: Sequence[float]) -> dict[str, Any]:
    """A value and its 95 % interval, null where too few resamples could be fitted."""
    low, high = interval(resampled)
    return {"value": float(value), "ci95": None if math.isnan(low) else [low, high]}


def law_of(found: dict[str, Any]) -> Law | None:
    """The law that a system's part of the summary holds."""
    return Law(**{name: found["law"][name]["value"] for name in LAW}) if "law" in found else None


def table(summary: dict[str, Any]) -> str:
    """For the console, a block a system."""
    blocks = []
    for name, found in summary["systems"].items():
        lines = [f"{name}: {found['runs']} runs, N: {summary['parameters'].replace('_', ' ')}"]
        lines += _law_lines(found["law"]) if "law" in found else []
        lines += _frontier_lines(found["parabolas"]) if "parabolas" in found else []
        if held := found.get("held_out"):
            pairs = ", ".join(f"{p:.4f} for {m:.4f}" for p, m in zip(held["predicted"], held["measured"], strict=True))
            error = f"mean error {100 * held['relative_error']:.2f} %"
            lines.append(f"  {held['flops']:.2e} FLOPs, held out: {pairs}; {error}")
        lines += [f"  no {what.replace('_', ' ')}: {why}" for what, why in found["missing"].items()]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _law_lines(law: dict[str, Any]) -> list[str]:
    rows = [["  L = E + A/N^alpha + B/D^beta", "", "95 % interval"]]
    rows += [[f"  {key}", *_cells(law[key], "{:.4g}".format)] for key in LAW]
    rows.append(["  best N ~ C^", *_cells(law["parameters_exponent"], "{:.3f}".format)])
    budget = law["next"]["flops"]
    for name in ("parameters", "tokens"):
        rows.append([f"  best {name} at {budget:.1e} FLOPs", *_cells(law["next"][name], short)])
    rows.append([f"  loss at {budget:.1e} FLOPs", *_cells(law["next"]["loss"], "{:.4f}".format)])
    return [aligned(rows)]


def _frontier_lines(frontier: dict[str, Any]) -> list[str]:
    rows = [["  iso-FLOP parabola", "best N", "95 % interval", "tokens", "loss", "between its sizes"]]
    for each in frontier["least"]:
        told = [*_cells(each["parameters"], short), short(each["tokens"]["value"]), f"{each['loss']['value']:.4f}"]
        rows.append([f"  {each['flops']:.2e}", *told, "yes" if each["inside"] else "no: a guess"])
    lines = [aligned(rows)]
    for key in ("parameters", "tokens", "loss"):
        if key in frontier:
            value, spread = _cells(frontier[key]["exponent"], "{:.3f}".format)
            lines.append(f"  best {key} ~ C^{value} ({spread})")
    return lines


def _cells(spread: dict[str, Any], write: Callable[[float], str]) -> tuple[str, str]:
    interval = spread["ci95"]
    return write(spread["value"]), "too few fits" if interval is None else " to ".join(map(write, interval))


def write_summary(summary: dict[str, Any], work_dir: Path) -> Path:
    """fits.json"""
    path = work_dir / FITS
    atomic_write(path, json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return path


def read_summary(work_dir: Path) -> dict[str, Any]:
    """What `write_summary` wrote. Raises ConfigError."""
    path = work_dir / FITS
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; `launch/scaling_law.py fit` makes it")
    found: dict[str, Any] = json.loads(path.read_text())
    return found
