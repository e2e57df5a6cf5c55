"""Plots of a family of runs as PNG, and one HTML page of them."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.files import atomic_write
from evaluation.plots import COLORS, new_figure, to_png
from megatext.scaling.collect import METRICS, Measured
from megatext.scaling.plan import aligned, short
from megatext.scaling.summary import flops_per_parameter_and_token, law_of, points_of, table

PANEL = {"width": 5.2, "height": 3.5}
TITLES = {
    "loss": "Loss against compute",
    "iso_flop": "Iso-FLOP curves",
    "residuals": "What the law leaves over",
    "metrics": "Metrics of the evaluation against compute",
}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ margin: 0 auto; max-width: 1240px; padding: 24px 20px; color: #1f2933; font: 15px/1.5 system-ui, sans-serif; }}
h2 {{ font-size: 18px; margin: 32px 0 8px; }} img {{ max-width: 100%; }} pre {{ overflow-x: auto; font-size: 13px; }}
</style></head><body><h1>{title}</h1>
{sections}
</body></html>
"""


def draw(measured: Sequence[Measured], summary: dict[str, Any]) -> dict[str, bytes]:
    """Every plot that there are points for, by name."""
    plots = {"loss": _loss_plot(measured, summary), "iso_flop": _iso_flop_plot(measured, summary)}
    if any(law_of(found) for found in summary["systems"].values()):
        plots["residuals"] = _residuals_plot(measured, summary)
    if keys := [key for key in METRICS if any(_metric(point, key) is not None for point in measured)]:
        plots["metrics"] = _metrics_plot(measured, keys)
    return plots


def write(measured: Sequence[Measured], summary: dict[str, Any], work_dir: Path) -> Path:
    """plots/*.png and report.html; the path of the latter."""
    drawn = draw(measured, summary)
    for name, png in drawn.items():
        atomic_write(work_dir / "plots" / f"{name}.png", png)
    images = {name: f"data:image/png;base64,{base64.b64encode(png).decode()}" for name, png in drawn.items()}
    sections = [f'<h2>{TITLES[name]}</h2><img alt="{TITLES[name]}" src="{image}">' for name, image in images.items()]
    sections += [f"<h2>Fits</h2><pre>{html.escape(table(summary))}</pre>"]
    sections += [f"<h2>Runs</h2><pre>{html.escape(_runs_table(measured))}</pre>"]
    page = PAGE.format(title=html.escape(f"Scaling: {work_dir.name}"), sections="\n".join(sections))
    path = work_dir / "report.html"
    atomic_write(path, page)
    return path


def _panels(names: Sequence[str]) -> tuple[Any, Any, list[tuple[Any, str]]]:
    """A figure and a panel for each name."""
    columns = max(1, min(3, len(names)))
    rows = max(1, -(-len(names) // columns))
    figure, grid = new_figure(rows, columns, width=PANEL["width"] * columns, height=PANEL["height"])
    for ax in list(grid.flat)[len(names) :]:
        ax.set_visible(False)
    return figure, grid, list(zip(grid.flat, names, strict=False))


def _systems(measured: Sequence[Measured]) -> list[str]:
    return list(dict.fromkeys(point.system for point in measured))


def _loss_plot(measured: Sequence[Measured], summary: dict[str, Any]) -> bytes:
    """A panel a system, whose losses are of different kinds: a curve a run, one colour a width, and the frontier of the
    law."""
    figure, _, panels = _panels(_systems(measured))
    widths = sorted({point.width for point in measured})
    for ax, system in panels:
        for color, width in zip(COLORS * 9, widths, strict=False):
            of_width = [point for point in measured if (point.system, point.width) == (system, width)]
            if not of_width:
                continue
            for run in dict.fromkeys(point.run for point in of_width):
                curve = [point for point in of_width if point.run == run]
                ax.plot([p.flops for p in curve], [p.loss for p in curve], color=color, lw=0.8, alpha=0.5)
            ends = [point for point in of_width if point.final]
            label = f"width {width}, {short(of_width[0].parameters)}"
            ax.plot([p.flops for p in ends], [p.loss for p in ends], "o", ms=5, color=color, label=label)
        if law := law_of(summary["systems"].get(system, {})):
            points = points_of(measured, system, summary["parameters"])
            flops = np.geomspace(points.flops.min(), points.flops.max(), 50)
            each = flops_per_parameter_and_token(points)
            least = [law.loss(*map(np.array, law.optimum(budget, each))) for budget in flops]
            ax.plot(flops, least, "--", color="#1f2933", lw=1.2, label="law's best size")
        ax.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="validation loss", title=system)
        _plain_ticks(ax)
        ax.legend(fontsize=7, frameon=False)
    return to_png(figure)


def _plain_ticks(ax: Any) -> None:
    """Where losses span less than a decade: a logarithmic axis would have a tick or none."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    low, high = ax.get_ylim()
    if high > 10 * low:
        return
    ax.yaxis.set_major_locator(MaxNLocator(6))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())


def _iso_flop_plot(measured: Sequence[Measured], summary: dict[str, Any]) -> bytes:
    """A panel a system: the losses of each budget over the size, their parabola, and its least."""
    from matplotlib.ticker import LogLocator, NullLocator

    figure, _, panels = _panels([name for name in _systems(measured) if name in summary["systems"]])
    for ax, system in panels:
        points = points_of(measured, system, summary["parameters"])
        least = {each["flops"]: each for each in summary["systems"][system].get("parabolas", {}).get("least", [])}
        for color, budget in zip(COLORS * 9, np.unique(points.budget), strict=False):
            of_budget = points.of(points.budget == budget)
            order = np.argsort(of_budget.parameters)
            sizes, losses = of_budget.parameters[order], of_budget.loss[order]
            found = least.get(budget)
            ax.plot(sizes, losses, "o" if found else "o-", ms=5, lw=0.8, color=color, label=f"{budget:.1e} FLOPs")
            if found:
                across = np.geomspace(sizes.min(), sizes.max(), 60)
                parabola = np.polyval(np.polyfit(np.log(sizes), losses, 2), np.log(across))
                ax.plot(across, parabola, "--", lw=0.9, color=color)
            if found and found["inside"]:
                ax.plot(found["parameters"]["value"], found["loss"]["value"], "*", ms=11, color=color)
        name = "parameters" if summary["parameters"] == "all" else "parameters without embeddings"
        ax.set(xscale="log", xlabel=f"{name} (star: least of the parabola)", ylabel="validation loss", title=system)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(lambda size, _: short(size))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.legend(fontsize=7, frameon=False)
    return to_png(figure)


def _residuals_plot(measured: Sequence[Measured], summary: dict[str, Any]) -> bytes:
    """How far the law is from every run, and from the budget that was held out of it."""
    figure, grid, _ = _panels(["fitted", "held out"])
    for color, (system, found) in zip(COLORS * 9, summary["systems"].items(), strict=False):
        if law := law_of(found):
            points = points_of(measured, system, summary["parameters"])
            residuals = 100 * (law.loss(points.parameters, points.tokens) / points.loss - 1)
            grid[0, 0].plot(points.flops, residuals, "o", ms=5, color=color, label=system)
        if held := found.get("held_out"):
            errors = 100 * (np.array(held["predicted"]) / np.array(held["measured"]) - 1)
            grid[0, 1].plot(held["measured"], errors, "o", ms=5, color=color, label=system)
    for ax in grid.flat:
        ax.axhline(0, color="#9aa3ad", lw=0.8)
        ax.legend(fontsize=7, frameon=False)
    grid[0, 0].set(xscale="log", xlabel="training FLOPs", ylabel="law over loss, %", title="every run, in the fit")
    grid[0, 1].set(xlabel="loss", ylabel="prediction over loss, %", title="largest budget, not in the fit")
    return to_png(figure)


def _metric(point: Measured, key: str) -> float | None:
    """Of the first way of sampling that has it."""
    return next((values[key] for values in point.metrics.values() if key in values), None)


def _metrics_plot(measured: Sequence[Measured], keys: Sequence[str]) -> bytes:
    """A point a run, and a line through each budget's run of the least loss; FLOPs with those of the models that a run
    stands on, where they are known."""
    figure, _, panels = _panels(keys)
    for ax, key in panels:
        for color, system in zip(COLORS * 9, _systems(measured), strict=False):
            scored = [p for p in measured if p.system == system and _metric(p, key) is not None]
            of_budgets = [[p for p in scored if p.budget_flops == b] for b in sorted({p.budget_flops for p in scored})]
            best = [min(points, key=lambda p: p.loss) for points in of_budgets]
            for points, look in ((scored, "o"), (best, "-")):
                across = [p.flops + (p.ancestor_flops or 0) for p in points]
                label = system if look == "-" else None
                ax.plot(across, [_metric(p, key) for p in points], look, ms=4, lw=1.2, color=color, label=label)
        ax.set(xscale="log", xlabel="training FLOPs, with what it stands on where known", ylabel=METRICS[key])
        ax.legend(fontsize=7, frameon=False)
    return to_png(figure)


def _runs_table(measured: Sequence[Measured]) -> str:
    rows = [["run", "params", "tokens", "FLOPs", "loss", "hours", *METRICS]]
    for point in measured:
        if point.final:
            values = [_metric(point, key) for key in METRICS]
            rows.append([
                point.run, short(point.parameters), short(point.tokens), f"{point.flops:.2e}", f"{point.loss:.4f}",
                f"{point.seconds / 3600:.2f}", *("-" if value is None else f"{value:.3f}" for value in values),
            ])  # fmt: skip
    return aligned(rows)
