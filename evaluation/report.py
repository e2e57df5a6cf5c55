"""The report stage: results.json to one HTML file, PNG plots, and the table as Markdown and CSV."""

import base64
import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from evaluation.files import atomic_write, read_jsonl, read_log
from evaluation.manifest import Manifest
from evaluation.table import COLUMNS, MARKS, table
from megatext.data import DataError

_TEMPLATE = Path(__file__).parent / "report.html.j2"
_COLORS = ("#2f6fab", "#c8553d", "#4d8b57", "#8a5aa8", "#c08a1e", "#3f8f94", "#a04668", "#6b7280")


def load_results(output: Path, manifest: Manifest | None = None) -> dict[str, Any]:
    """Read output/results.json. Raises DataError if it is missing or of another manifest."""
    path = output / "results.json" if output.is_dir() else output
    if not path.is_file():
        raise DataError(f"{path}: no such file; run `python -m evaluation score` first")
    results = json.loads(path.read_text())
    if manifest is not None and results["manifest"]["hash"] != manifest.hash:
        raise DataError(
            f"{path}: scored on manifest {results['manifest']['hash'][:12]}, not on {manifest.hash[:12]}; score again"
        )
    return results


def write_report(output: Path, manifest: Manifest, runs: Sequence[Path] = (), *, prompts: int = 12) -> Path:
    """Write report.html, table.md, table.csv and plots/*.png; returns the path of the report."""
    import jinja2

    results = load_results(output, manifest)
    headings, rows, footnotes = table(results)
    drawn = {"quality": quality_plot(results), "reconstruction": reconstruction_plot(runs)}
    drawn |= {f"loss_{run.name}": loss_plot(run) for run in runs}
    drawn |= {f"timesteps_{run.name}": timesteps_plot(run) for run in runs}
    plots = {name: png for name, png in drawn.items() if png is not None}
    for name, png in plots.items():
        atomic_write(output / "plots" / f"{name}.png", png)
    atomic_write(output / "table.md", markdown(headings, rows, footnotes))
    atomic_write(output / "table.csv", _csv(results))
    texts: dict[str, dict[str, Any]] = {}
    for record in read_jsonl(output / "samples.jsonl"):
        texts.setdefault(record["id"], {})[record["system"]] = record
    shown = [{"prefix": s.prefix, "written": list(texts[s.id].values())} for s in manifest.samples[:prompts]]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATE.parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    html = environment.get_template(_TEMPLATE.name).render(
        results=results,
        headings=headings,
        help=_HELP,
        rows=[[_cell(text, cells[0], key, system) for text, key in zip(cells, ("", *_KEYS, ""), strict=True)]
              for cells, system in zip(rows, results["systems"], strict=True)],
        footnotes=footnotes,
        plots={name: base64.b64encode(png).decode() for name, png in plots.items()},
        prompts=shown,
        roles={s["name"]: _role(s["system"]) for s in results["systems"]},
        sampling={s["name"]: s["sampling"] for s in results["systems"]},
    )  # fmt: skip
    atomic_write(output / "report.html", html)
    return output / "report.html"


_KEYS = tuple(key for key, _, _ in COLUMNS)
_HELP = {
    "G": "Judge gap: 0 is human text, 1 is the same tokens in random order. Lower is better, at human entropy.",
    "nll": "Nats a token the judge needs for the continuation given its prefix.",
    "entropy": "Entropy in nats of the tokens used, at one token budget for all rows. Far below human: few words.",
    "distinct-2": "Distinct over all pairs of neighbouring tokens, at one token budget for all rows.",
    "ROUGE-1": "Words shared with the human continuation, F1 in percent.",
    "ROUGE-2": "Word pairs shared with the human continuation, F1 in percent.",
    "ROUGE-L": "Longest common subsequence of words, F1 in percent.",
    "BERTScore": "Token states matched with the human continuation by cosine, F1 in percent, not rescaled.",
    "MAUVE": "Closeness of the distributions of texts, percent; mean over k-means seeds. Comparable at equal n only.",
    "s/sample": "Seconds of wall time a continuation, within its batch.",
}


def _role(system: str) -> str:
    """sanity or model: the sanity rows are set in grey."""
    return "model" if ":" in system else "sanity"


def _cell(text: str, name: str, key: str, system: dict[str, Any]) -> dict[str, str]:
    """What the template needs of one cell: text, sort key, spread, hover text."""
    metric = system["metrics"].get(key) or {}
    value = metric.get("value") if key else None
    if not key and text != name:
        value = system["seconds_per_sample"]
    title = ""
    spread = ""
    if metric.get("spread") is not None:
        digits = next(digits for k, _, digits in COLUMNS if k == key)
        spread = f"±{metric['spread']:.{digits}f}"
        title = f"{metric['spread_kind']}, n = {metric['n']}"
        if metric.get("ci95"):
            title += f"; 95 % interval {metric['ci95'][0]:.{digits}f} to {metric['ci95'][1]:.{digits}f}"
    bare = text.rstrip(MARKS)
    return {
        "text": bare,
        "mark": text[len(bare) :],
        "sort": "" if value is None else repr(value),
        "spread": spread,
        "title": title,
    }


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]], footnotes: Sequence[str]) -> str:
    """A pipe table with its footnotes."""
    lines = [headings, ["---", *["--:"] * (len(headings) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "".join(f"\n{note}\n" for note in footnotes)


def _csv(results: dict[str, Any]) -> str:
    """Every metric of every system in full precision, a line each."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["manifest", "system", "metric", "value", "spread", "spread_kind", "n", "unit"])
    for system in results["systems"]:
        for name, metric in system["metrics"].items():
            fields = [metric[key] for key in ("value", "spread", "spread_kind", "n", "unit")]
            writer.writerow([results["manifest"]["hash"], system["name"], name, *fields])
    return file.getvalue()


def quality_plot(results: dict[str, Any]) -> bytes | None:
    """G against unigram entropy: a low G counts only near the human entropy."""
    points = [
        (
            s["name"],
            _role(s["system"]),
            s["metrics"]["entropy"]["value"],
            s["metrics"]["gap"]["value"],
            s["metrics"]["gap"]["spread"],
        )
        for s in results["systems"]
        if s["metrics"].get("gap")
        and s["metrics"]["gap"]["value"] is not None
        and s["metrics"]["entropy"]["value"] is not None
    ]
    if not points:
        return None
    figure, ax = _figure()
    human = next(p for p in points if p[0] == next(s["name"] for s in results["systems"] if s["system"] == "human"))
    ax.axhline(0, color="#9aa3ad", lw=0.8, zorder=0)
    ax.axvspan(human[2] - 0.5, human[2] + 0.5, color="#eef3f8", zorder=-1)
    colors, shapes = iter(_COLORS * 9), iter("sDv^P" * 9)
    for name, role, entropy, gap, error in points:
        look = (
            {"color": next(colors), "marker": "o", "ms": 7}
            if role == "model"
            else {"color": "#7b8794", "marker": next(shapes), "ms": 5}
        )
        ax.errorbar(entropy, gap, yerr=error or None, ls="", capsize=2, label=name, **look)
    # Beside the axes: most systems worth showing crowd near G = 0, where names would lie on each other.
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set(xlabel="unigram entropy, nats (band: human ± 0.5)", ylabel="judge gap G", title="Quality against variety")
    ax.set_xlim(
        min(min(p[2] for p in points), human[2] - 0.5) - 0.15, max(max(p[2] for p in points), human[2] + 0.5) + 0.15
    )
    return _png(figure)


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
    figure, ax = _figure()
    for (key, (steps, values)), color in zip(sorted(series.items()), _COLORS * 9, strict=False):
        if len(values) > 40:
            ax.plot(steps, values, color=color, lw=0.8, alpha=0.3)
            ax.plot(steps, _smooth(values), color=color, lw=1.6, label=key)
        else:
            ax.plot(steps, values, color=color, lw=1.2, marker="o", ms=3, label=key)
    ax.set(title=f"Training of {run.name}", xlabel="step", ylabel="loss")
    ax.legend(fontsize=8, frameon=False)
    ax.set_ylim(*_limits([value for _, values in series.values() for value in values]))
    return _png(figure)


def timesteps_plot(run: Path) -> bytes | None:
    """Validation loss by timestep bin beside what the best constant loses, and, where the recipe knows the likelihood
    of the noisy latent, what is lost with that and without context."""
    path = run / "finished.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    bins = sorted(int(key.removeprefix("constant_t")) for key in figures if key.startswith("constant_t"))
    if not bins:
        return None
    figure, ax = _figure()
    centres = [(i + 0.5) / 10 for i in bins]
    weights = "validation_ema" if f"validation_ema/loss_t{bins[0]}" in figures else "validation"
    losses = [figures[f"{weights}/loss_t{i}"] for i in bins]
    ax.plot(centres, [figures[f"constant_t{i}"] for i in bins], color="#9aa3ad", ls="--", label="best constant")
    if f"no_context_t{bins[0]}" in figures:
        without = [figures[f"no_context_t{i}"] for i in bins]
        ax.plot(centres, without, color="#9aa3ad", ls=":", label="own latent, no context")
    ax.plot(centres, losses, color=_COLORS[0], marker="o", ms=4, label=f"{run.name}, {weights}")
    ax.set(xlabel="timestep (1 is noise)", ylabel="loss", title="Loss by timestep", xlim=(0, 1), ylim=(0, None))
    ax.legend(fontsize=8, frameon=False)
    return _png(figure)


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
    figure, ax = _figure()
    for (name, points), color in zip(curves.items(), _COLORS * 9, strict=False):
        ax.plot(list(points), [100 * a for a in points.values()], marker="o", ms=4, color=color, label=name)
    ax.axhline(90, color="#9aa3ad", lw=0.8, ls=":")
    ax.set(
        xlabel="share of noise in the latents", ylabel="tokens reconstructed, %", title="Reconstruction", ylim=(0, 102)
    )
    ax.legend(fontsize=8, frameon=False)
    return _png(figure)


def _figure() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(5.6, 3.6), layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#e6e9ed", lw=0.6)
    ax.set_axisbelow(True)
    return figure, ax


def _png(figure: Any) -> bytes:
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
