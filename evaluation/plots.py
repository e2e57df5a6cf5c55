"""Plots of a report as PNG: metrics with their intervals, lengths, quality against variety, and training runs."""

import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.files import read_log
from evaluation.multiplier import Multiplier, Ratio
from evaluation.seeds import Point, points
from evaluation.table import BY_KEY, number

COLORS = ("#2f6fab", "#c8553d", "#4d8b57", "#8a5aa8", "#c08a1e", "#3f8f94", "#a04668", "#6b7280")
LOOKS = [{"color": color, "marker": marker} for marker in "oX*hpDPH" for color in COLORS]
"""Of the curves of a plot: another marker where the colors begin again."""
_GREY = "#7b8794"
_BARS = (
    "rouge1", "rouge2", "rougeL", "bertscore", "mauve", "generative_perplexity", "entropy", "repetition4", "self_bleu",
)  # fmt: skip


def is_sanity(system: dict[str, Any]) -> bool:
    """Whether a row is one of the sanity rows, which are set in grey."""
    return ":" not in system["system"]


def metrics_plot(results: dict[str, Any]) -> bytes | None:
    """A panel a metric: a bar a system, with its 95 % interval or, where there is none, twice its error."""
    systems = results["systems"]
    keys = [key for key in _BARS if any(number(system, key) is not None for system in systems)]
    if not keys:
        return None
    columns = min(3, len(keys))
    figure, grid = new_figure(-(-len(keys) // columns), columns, width=11, height=0.24 * len(systems) + 0.9)
    for ax, key in zip(grid.flat, keys, strict=False):
        _bars(ax, systems, key)
    for ax in grid.flat[len(keys) :]:
        ax.set_visible(False)
    for ax in grid[:, 1:].flat:
        ax.set_yticklabels([])
    return to_png(figure)


def _bars(ax: Any, systems: Sequence[dict[str, Any]], key: str) -> None:
    places = np.arange(len(systems))[::-1]
    shown = [(place, system, number(system, key)) for place, system in zip(places, systems, strict=True)]
    logarithmic = key == "generative_perplexity"
    # Beside the human's own 100 all others would lie flat.
    values = [value for _, s, value in shown if value is not None and (s["system"] != "human" or logarithmic)]
    limit = 1.12 * max(values or [value for _, _, value in shown if value is not None]) or 1.0
    for place, system, value in shown:
        if value is None:
            continue
        found = system["metrics"].get(key, {})
        ax.barh(place, min(value, limit), color="#b8c2cc" if is_sanity(system) else COLORS[0], height=0.7)
        interval = found.get("ci95") or (
            (value - 2 * found["spread"], value + 2 * found["spread"]) if found.get("spread") else None
        )
        if interval and value < limit:
            ax.plot(interval, (place, place), color="#1f2933", lw=1.2)
        elif value >= limit:
            ax.text(limit * 0.98, place, f"{value:.4g} ▸", ha="right", va="center", fontsize=7)
    ax.set_yticks(places, [system["name"] for system in systems], fontsize=8)
    ax.tick_params(axis="x", labelsize=7)
    if logarithmic:
        ax.set_xscale("log")
    ax.set_xlim(1 if logarithmic else 0, 1.5 * limit if logarithmic else limit)
    ax.set_title(BY_KEY[key].heading, fontsize=9)
    ax.grid(axis="y", visible=False)


def lengths_plot(results: dict[str, Any], words: dict[str, list[int]]) -> bytes | None:
    """Histograms of words a continuation, each over the human one; `words` by system."""
    human = next(system["name"] for system in results["systems"] if system["system"] == "human")
    names = [system["name"] for system in results["systems"] if system["name"] in words and system["name"] != human]
    if not names or human not in words:
        return None
    columns = min(4, len(names))
    figure, grid = new_figure(-(-len(names) // columns), columns, width=11, height=1.7)
    most = max(1, float(np.percentile([length for row in words.values() for length in row], 99.5)))
    bins = np.linspace(0, most, min(30, int(most) + 2))
    for ax, name in zip(grid.flat, names, strict=False):
        ax.hist(np.minimum(words[human], most), bins, color="#dfe4ea", label=human)
        ax.hist(np.minimum(words[name], most), bins, histtype="step", color=COLORS[0], lw=1.3, label=name)
        ax.set_title(name, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.set_yticks([])
    for ax in grid.flat[len(names) :]:
        ax.set_visible(False)
    figure.supxlabel(f"words a continuation (filled: {human})", fontsize=8)
    return to_png(figure)


def gaps_plot(results: dict[str, Any]) -> bytes | None:
    """Of rows that name their group: G and, beside it, entropy, a line a group and sampling, the lowest G on top; means
    over seeds with their deviations, of one seed G with its own error. The dashed line is human text."""
    found = [
        (spot, point) for point in points(results["systems"]) if (spot := _spot(point, ("entropy", "gap", "", "")))
    ]
    if not found:
        return None
    found.sort(key=lambda pair: -pair[0][1][0])
    human = next((s for s in results["systems"] if s["system"] == "human"), None)
    figure, (axes,) = new_figure(1, 2, width=11, height=0.19 * len(found) + 1.1)
    places = range(len(found))
    for ax, axis, heading, key in (
        (axes[0], 1, "judge gap G", "gap"),
        (axes[1], 0, "unigram entropy, nats", "entropy"),
    ):
        values, errors = ([spot[axis][i] for spot, _ in found] for i in (0, 1))
        colors = [COLORS[0] if len(point.rows) > 1 else _GREY for _, point in found]
        for place, value, error, color in zip(places, values, errors, colors, strict=True):
            ax.errorbar(value, place, xerr=error, fmt="o", ms=4, color=color, elinewidth=1)
        if human is not None and (at := number(human, key)) is not None:
            ax.axvline(at, color=_GREY, lw=0.8, ls="--")
        ax.set_ylim(-0.7, len(found) - 0.3)
        ax.set(xlabel=heading)
    axes[0].set_yticks(places, [point.name for _, point in found], fontsize=8)
    axes[1].set_yticks(places, [""] * len(found))
    axes[0].plot([], [], "o", ms=4, color=COLORS[0], label="several seeds")
    axes[0].plot([], [], "o", ms=4, color=_GREY, label="one seed")
    axes[0].legend(fontsize=8, loc="lower left", frameon=False)
    return to_png(figure)


_PLANES = (
    ("entropy", "gap", "unigram entropy, nats (band: human ± 0.5)", "judge gap G"),
    ("distinct2", "mauve", "distinct-2", "MAUVE"),
)
"""Variety across, quality upwards or downwards."""


def quality_plot(results: dict[str, Any]) -> bytes | None:
    """G against entropy, a low G counts only near the human entropy, and MAUVE against distinct-2: a point a row, or,
    where rows name their group, a curve a group through the means over seeds, with their deviations."""
    planes = [plane for plane in _PLANES if any(_spot(Point("", "", [s]), plane) for s in results["systems"])]
    if not planes:
        return None
    alone = [Point("", s["name"], [s]) for s in results["systems"] if not s.get("group")]
    curves = {p.name: [p] for p in alone}
    for point in points(results["systems"]):
        curves.setdefault(point.group, []).append(point)
    looks = dict(zip((n for n, c in curves.items() if not is_sanity(c[0].rows[0])), LOOKS, strict=False))
    height = max(3.6, 0.23 * len(curves))  # of the legend
    figure, axes = new_figure(1, len(planes), width=5.6 * len(planes), height=height)
    for ax, plane in zip(axes.flat, planes, strict=True):
        _quality(ax, curves, looks, plane)
    # Beside the axes: most systems worth showing crowd near G = 0, where names would lie on each other.
    named = dict(pair for ax in axes.flat for pair in zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    axes[0, -1].legend(named.values(), named, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle("Quality against variety", fontsize=10)
    return to_png(figure)


def _quality(
    ax: Any, curves: dict[str, list[Point]], looks: dict[str, dict[str, str]], plane: tuple[str, str, str, str]
) -> None:
    """One panel: every curve in its look, sanity rows in grey; in G's, where human text lies."""
    shapes = iter("sDv^P" * 9)
    for name, curve in curves.items():
        look = looks[name] if name in looks else {"color": _GREY, "marker": next(shapes)}
        if spots := sorted(spot for point in curve if (spot := _spot(point, plane))):
            x, y, dx, dy = ([spot[axis][i] for spot in spots] for i in (0, 1) for axis in (0, 1))
            ax.errorbar(x, y, xerr=dx, yerr=dy, ms=5, lw=1.2, elinewidth=0.7, capsize=2, label=name, **look)
        if plane[1] == "gap" and curve[0].rows[0]["system"] == "human" and spots:
            ax.axhline(0, color="#9aa3ad", lw=0.8, zorder=0)
            ax.axvspan(x[0] - 0.5, x[0] + 0.5, color="#eef3f8", zorder=-1)
    ax.set(xlabel=plane[2], ylabel=plane[3])


def _spot(point: Point, plane: tuple[str, str, str, str]) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """((x, its deviation), (y, its deviation)) over seeds; of a row that is alone, y with the metric's own error."""
    x, y = point.value(plane[0]), point.value(plane[1])
    if x is None or y is None:
        return None
    own = point.rows[0]["metrics"][plane[1]].get("spread") if len(point.rows) == 1 else y[1]
    return (x[0], x[1] or 0.0), (y[0], own or 0.0)


def multiplier_plot(results: dict[str, Any], baseline: Sequence[str], found: Sequence[Multiplier]) -> bytes:
    """G against FLOPs of training, the baseline in grey, a line a sampling, and the multipliers of `found`: bounds as
    arrows, intervals as bars as far as they are known, hollow beside the baseline's best within the tolerance. A
    sampling of groups that are named alike but for a last number is one line."""
    figure, (axes,) = new_figure(1, 2, width=12, height=4.4)
    for spots in _by_sampling([point for point in points(results["systems"]) if point.group in baseline]):
        axes[0].plot(*zip(*spots, strict=True), color=_GREY, marker=".", lw=0.8, alpha=0.7)
    axes[0].plot([], [], color=_GREY, marker=".", lw=0.8, label=f"{_without_number(baseline[0])}, every sampling")
    lines: dict[tuple[str, str], list[Multiplier]] = {}
    for each in sorted(found, key=lambda each: each.flops):
        system, sampling = _without_number(each.group), json.dumps(each.sampling, sort_keys=True)
        lines.setdefault((system, sampling), []).append(each)
    looks = [look for look in LOOKS if look["color"] != COLORS[-1]]  # grey is the baseline's
    for ((system, _), rows), look in zip(lines.items(), looks, strict=False):
        label = system + max((each.name.removeprefix(each.group) for each in rows), key=len)
        axes[0].plot([each.flops for each in rows], [each.gap for each in rows], lw=1.2, ms=5, label=label, **look)
        _ratios(axes[1], [(each.flops, each.near) for each in rows], look, dashes=":", fill="none", intervals=False)
        _ratios(
            axes[1], [(each.flops, each.same) for each in rows], look, dashes="-", fill=look["color"], intervals=True
        )
    axes[0].set(xscale="log", xlabel="FLOPs of training, all that a model stands on", ylabel="judge gap G")
    axes[1].set(xscale="log", yscale="log", xlabel=axes[0].get_xlabel(), ylabel="compute multiplier")
    axes[1].set_xlim(axes[0].get_xlim())
    axes[1].axhline(1, color=_GREY, lw=0.8, ls="--")
    for fill, label in (("black", "at equal entropy"), ("none", "beside the baseline's best near it")):
        axes[0].plot([], [], "o", color="black", markerfacecolor=fill, label=label)
    axes[0].plot([], [], "^", color="black", label="at least (▼ at most)")
    curves = axes[0].get_legend_handles_labels()
    axes[1].legend(*curves, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return to_png(figure)


def _ratios(
    ax: Any, rows: Sequence[tuple[float, Ratio]], look: dict[str, str], *, dashes: str, fill: str, intervals: bool
) -> None:
    """(FLOPs, ratio) of one line: those that are known are joined, bounds stand alone."""
    known = [(x, ratio.value) for x, ratio in rows if ratio.value is not None and ratio.relation == "="]
    ax.plot([x for x, _ in known], [y for _, y in known], dashes, color=look["color"], lw=1)
    for x, ratio in rows:
        if ratio.value is None:
            continue
        marker = {"=": look["marker"], ">": "^", "<": "v"}[ratio.relation]
        ax.plot(x, ratio.value, marker, ms=6, color=look["color"], markerfacecolor=fill)
        for end in ratio.interval or ():
            if intervals and 0 < end < math.inf:
                ax.plot((x, x), (ratio.value, end), color=look["color"], lw=1)


def _by_sampling(rows: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """(FLOPs, G) of the points of each sampling, ascending."""
    found: dict[str, list[tuple[float, float]]] = {}
    for point in rows:
        flops, gap = point.value("training_pflops"), point.value("gap")
        if flops and gap:
            spots = found.setdefault(json.dumps(point.rows[0]["sampling"], sort_keys=True), [])
            spots.append((flops[0] * 1e15, gap[0]))
    return [sorted(spots) for spots in found.values()]


def _without_number(group: str) -> str:
    return re.sub(r"\s+\d+$", "", group)


def loss_plot(run: Path) -> bytes | None:
    """The total loss in training and validation, from a run's metrics.jsonl; smoothed where it is dense."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for record in read_log(run / "metrics.jsonl"):
        for key, value in record.items():
            plain = isinstance(value, int | float) and not isinstance(value, bool)
            if plain and "step" in record and key.split("/")[-1] == "loss":
                steps, values = series.setdefault(key, ([], []))
                steps.append(record["step"])
                values.append(float(value))
    if not series:
        return None
    figure, ax = _axes()
    for (key, (steps, values)), color in zip(sorted(series.items()), COLORS * 9, strict=False):
        if len(values) > 40:
            ax.plot(steps, values, color=color, lw=0.8, alpha=0.3)
            ax.plot(steps, _smooth(values), color=color, lw=1.6, label=key)
        else:
            ax.plot(steps, values, color=color, lw=1.2, marker="o", ms=3, label=key)
    ax.set(title=f"Training of {run.name}", xlabel="step", ylabel="loss")
    ax.legend(fontsize=8, frameon=False)
    ax.set_ylim(*_limits([value for _, values in series.values() for value in values]))
    return to_png(figure)


def timesteps_plot(run: Path) -> bytes | None:
    """Validation loss by timestep bin beside what the best constant loses, and, where the recipe knows the likelihood
    of the noisy latent, what is lost with that and without context."""
    path = run / "finished.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    bins = sorted(int(key.removeprefix("constant_t")) for key in figures if key.startswith("constant_t"))
    if not bins:
        return None
    figure, ax = _axes()
    centres = [(i + 0.5) / 10 for i in bins]
    weights = "validation_ema" if f"validation_ema/loss_t{bins[0]}" in figures else "validation"
    losses = [figures[f"{weights}/loss_t{i}"] for i in bins]
    ax.plot(centres, [figures[f"constant_t{i}"] for i in bins], color="#9aa3ad", ls="--", label="best constant")
    if f"no_context_t{bins[0]}" in figures:
        without = [figures[f"no_context_t{i}"] for i in bins]
        ax.plot(centres, without, color="#9aa3ad", ls=":", label="own latent, no context")
    ax.plot(centres, losses, color=COLORS[0], marker="o", ms=4, label=f"{run.name}, {weights}")
    ax.set(xlabel="timestep (1 is noise)", ylabel="loss", title="Loss by timestep", xlim=(0, 1), ylim=(0, None))
    ax.legend(fontsize=8, frameon=False)
    return to_png(figure)


def reconstruction_plot(runs: Sequence[Path]) -> bytes | None:
    """Token accuracy of autoencoders against noise: `accuracy_at_S` in each run's finished.json."""
    curves = {}
    for run in runs:
        path = run / "finished.json"
        figures = json.loads(path.read_text()) if path.exists() else {}
        points = {float(k.removeprefix("accuracy_at_")): v for k, v in figures.items() if k.startswith("accuracy_at_")}
        if points:
            curves[run.name] = points
    if not curves:
        return None
    figure, ax = _axes()
    for (name, points), color in zip(curves.items(), COLORS * 9, strict=False):
        ax.plot(list(points), [100 * a for a in points.values()], marker="o", ms=4, color=color, label=name)
    ax.axhline(90, color="#9aa3ad", lw=0.8, ls=":")
    ax.set(
        xlabel="noise in the latents: its share, LDLM: its deviation",
        ylabel="tokens reconstructed, %",
        title="Reconstruction",
        ylim=(0, 102),
    )
    ax.legend(fontsize=8, frameon=False)
    return to_png(figure)


def _axes() -> tuple[Any, Any]:
    figure, grid = new_figure(1, 1, width=5.6, height=3.6)
    return figure, grid[0, 0]


def new_figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Any, Any]:
    """A figure `width` inches wide and its axes [rows, columns], each `height` inches high."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(rows, columns, figsize=(width, rows * height), layout="constrained", squeeze=False)
    for ax in grid.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e6e9ed", lw=0.6)
        ax.set_axisbelow(True)
    return figure, grid


def to_png(figure: Any) -> bytes:
    """The figure as a file; it is closed."""
    from matplotlib import pyplot

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=144)
    pyplot.close(figure)
    return file.getvalue()


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential average over about a hundredth of the run, without a bias to the start."""
    keep = 1 - 1 / max(2.0, len(values) / 100)
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + 1 - keep
        smoothed.append(average / weight)
    return smoothed


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Axis limits that leave out the spike of the first steps."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[int(0.98 * (len(ordered) - 1))]
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin
