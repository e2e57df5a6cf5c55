"""What the fits say of every system: constants with intervals, the compute-optimal frontier, the held-out budget."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatext.config import ConfigError
from megatext.scaling.collect import Measured
from megatext.scaling.fit import (
    STARTS,
    Law,
    Points,
    bootstrap,
    fit_law,
    fit_parabolas,
    fit_power_law,
    hold_out,
    interval,
)
from megatext.scaling.plan import aligned, short

FITS = "fits.json"
BUDGET_TOLERANCE = 0.1
"""Runs whose FLOPs are within this share of a budget are of it: steps are whole."""
LAW = ("e", "a", "b", "alpha", "beta")


def points_of(measured: Sequence[Measured], system: str, parameters: str) -> Points:
    """The final points of a system; `parameters` is `all` or `without_embeddings`."""
    final = [point for point in measured if point.final and point.system == system]
    name = "parameters" if parameters == "all" else "parameters_without_embeddings"
    columns = [name, "tokens", "flops", "loss"]
    return Points(*(np.array([getattr(point, column) for point in final], dtype=float) for column in columns))


def summarise(measured: Sequence[Measured], parameters: str, draws: int = 200) -> dict[str, Any]:
    """System -> what `fit_system` says of it. Raises ConfigError where no system has a final point."""
    systems = list(dict.fromkeys(point.system for point in measured if point.final))
    if not systems:
        raise ConfigError("no run is finished yet: there is nothing to fit")
    budgets = sorted({point.budget_flops for point in measured})
    return {
        "parameters": parameters,
        "systems": {name: fit_system(points_of(measured, name, parameters), budgets, draws) for name in systems},
    }


def fit_system(points: Points, budgets: Sequence[float], draws: int) -> dict[str, Any]:
    """The law, the parabolas, their frontier and the held-out budget; `missing` says why something could not be had."""
    found: dict[str, Any] = {"runs": len(points), "missing": {}}

    def add(name: str, make: Callable[[], Any]) -> None:
        try:
            found[name] = make()
        except ConfigError as error:
            found["missing"][name] = str(error)

    add("law", lambda: _law(points, draws))
    add("parabolas", lambda: _frontier(points, budgets, draws))
    largest = max(budget for budget in budgets if (np.abs(points.flops / budget - 1) <= BUDGET_TOLERANCE).any())
    add("held_out", lambda: _held_out(points, largest))
    return found


def _law(points: Points, draws: int) -> dict[str, Any]:
    law = fit_law(points)
    # resampled runs start where the whole ended, and at the middle of the grid
    starts = [
        np.array([math.log(law.a), math.log(law.b), math.log(law.e), law.alpha, law.beta]),
        np.array([values[1] for values in STARTS.values()]),
    ]
    resampled = bootstrap(points, partial(fit_law, starts=starts), draws)
    exponents = [each.beta / (each.alpha + each.beta) for each in resampled]
    return {
        **asdict(law),
        "intervals": {name: interval([getattr(each, name) for each in resampled]) for name in LAW},
        "parameters_exponent": law.beta / (law.alpha + law.beta),
        "parameters_exponent_interval": interval(exponents),
        "residuals": (law.loss(points.parameters, points.tokens) / points.loss - 1).tolist(),
    }


def _frontier(points: Points, budgets: Sequence[float], draws: int) -> dict[str, Any]:
    """The parabolas' least losses, and how the best size and number of tokens grow with the budget."""
    parabolas = fit_parabolas(points, budgets, BUDGET_TOLERANCE)
    if not parabolas:
        raise ConfigError("no budget has three sizes with a least loss between or beside them")
    found: dict[str, Any] = {"least": [asdict(each) for each in parabolas]}
    resampled = bootstrap(points, partial(fit_parabolas, budgets=budgets, tolerance=BUDGET_TOLERANCE), draws)
    for name in ("parameters", "tokens", "loss"):
        if len(parabolas) > 1:
            laws = [_power_law(each, name) for each in resampled if len(each) > 1]
            law = _power_law(parabolas, name)
            found[name] = {**asdict(law), "exponent_interval": interval([each.exponent for each in laws])}
    return found


def _power_law(parabolas: Sequence[Any], name: str) -> Any:
    return fit_power_law([each.flops for each in parabolas], [getattr(each, name) for each in parabolas])


def _held_out(points: Points, budget: float) -> dict[str, Any]:
    held = hold_out(points, budget, BUDGET_TOLERANCE)
    return {**asdict(held), "relative_error": held.relative_error}


def law_of(found: dict[str, Any]) -> Law | None:
    """The law that a system's part of the summary holds."""
    return Law(**{name: found["law"][name] for name in LAW}) if "law" in found else None


def table(summary: dict[str, Any]) -> str:
    """For the console, a block a system."""
    blocks = []
    for name, found in summary["systems"].items():
        lines = [f"{name}: {found['runs']} runs, N: {summary['parameters'].replace('_', ' ')}"]
        if law := found.get("law"):
            rows = [["  L = E + A/N^alpha + B/D^beta", "", "95 % interval"]]
            rows += [[f"  {key}", f"{law[key]:.4g}", _range(law["intervals"][key])] for key in LAW]
            exponent, spread = law["parameters_exponent"], law["parameters_exponent_interval"]
            rows += [["  best N ~ C^", f"{exponent:.3f}", _range(spread)]]
            lines.append(aligned(rows))
        if frontier := found.get("parabolas"):
            rows = [["  iso-FLOP parabola", "best N", "tokens", "loss", "between its sizes"]]
            for each in frontier["least"]:
                inside = "yes" if each["inside"] else "no: a guess"
                rows.append([f"  {each['flops']:.2e}", short(each["parameters"]), short(each["tokens"]),
                             f"{each['loss']:.4f}", inside])  # fmt: skip
            lines.append(aligned(rows))
            for key in ("parameters", "tokens", "loss"):
                if power := frontier.get(key):
                    lines.append(f"  best {key} ~ C^{power['exponent']:.3f} {_range(power['exponent_interval'])}")
        if held := found.get("held_out"):
            pairs = zip(held["predicted"], held["measured"], strict=True)
            told = ", ".join(f"{p:.4f} for {m:.4f}" for p, m in pairs)
            lines.append(
                f"  {held['flops']:.2e} FLOPs held out: {told}; mean error {100 * held['relative_error']:.2f} %"
            )
        lines += [f"  no {what}: {why}" for what, why in found["missing"].items()]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _range(pair: Sequence[float]) -> str:
    return "too few fits" if math.isnan(pair[0]) else f"{pair[0]:.4g} to {pair[1]:.4g}"


def write_summary(summary: dict[str, Any], work_dir: Path) -> Path:
    """fits.json"""
    path = work_dir / FITS
    path.write_text(json.dumps(summary, indent=1) + "\n")
    return path


def read_summary(work_dir: Path) -> dict[str, Any]:
    """What `write_summary` wrote. Raises ConfigError."""
    path = work_dir / FITS
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; `launch/scaling_law.py fit` makes it")
    found: dict[str, Any] = json.loads(path.read_text())
    return found
