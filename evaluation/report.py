"""The report stage: results of one task or several to one HTML file, PNG plots, and the table as Markdown and CSV."""

import base64
import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation import plots
from evaluation.files import atomic_write, read_jsonl
from evaluation.manifest import Manifest, load_manifest
from evaluation.scoring import load_results
from evaluation.seeds import Point, points
from evaluation.table import BY_KEY, COLUMNS, MARKS, cell, footnotes, number
from megatext.data import DataError

_TEMPLATE = Path(__file__).parent / "report.html.j2"
_PUBLISHED = Path(__file__).parent / "published.yaml"
_PAPER = tuple(column.key for column in COLUMNS if column.family == "paper")
# The rest is in the CSV: nll is the logarithm of the perplexity.
_MORE = tuple(c.key for c in COLUMNS if c.family != "paper" and c.key not in ("nll", "distinct3"))
_SEEDS = (
    "gap",
    "generative_perplexity",
    "entropy",
    "distinct2",
    "self_bleu",
    "repetition4",
    "rougeL",
    "mauve",
    "training_pflops",
    "seconds",
)
_NO_TEXT = "(nothing)"


@dataclass(frozen=True)
class TaskResults:
    """One task's part of a report."""

    name: str
    manifest: Manifest
    results: dict[str, Any]
    samples: dict[str, dict[str, dict[str, Any]]]
    """System -> sample id -> text and scores."""


@dataclass(frozen=True)
class Cell:
    """What the template needs of one cell."""

    text: str
    mark: str = ""
    sort: str = ""
    """What to sort by; empty for no value."""
    spread: str = ""
    title: str = ""
    """Hover text."""


@dataclass(frozen=True)
class Row:
    """A system's line of a table."""

    name: str
    role: str
    """model, sanity or published."""
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    """A table of the report; with several tasks, each has a group of columns."""

    title: str
    groups: list[tuple[str, int]]
    """(task, columns)."""
    headings: list[tuple[str, str]]
    """(heading, help) of the columns behind the system's name."""
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


def write_report(output: Path, directories: Sequence[Path], runs: Sequence[Path] = (), *, prompts: int = 12) -> Path:
    """Write report.html, table.md, table.csv and plots/*.png in `output`; returns the path of the report.

    Raises DataError for a directory without results, with those of another manifest, or two of one task."""
    import jinja2

    tasks = [_load(directory) for directory in directories]
    for task in tasks:
        if sum(other.name == task.name for other in tasks) > 1:
            raise DataError(f"two results of the task {task.name}: a report shows one manifest of a task")
    tables = [_paper_table(tasks), *(_more_table(task) for task in tasks), *filter(None, map(_seeds_table, tasks))]
    tables += filter(None, map(_passages_table, tasks))
    drawn = _draw(tasks, runs)
    for name, png in drawn.items():
        atomic_write(output / "plots" / f"{name}.png", png)
    atomic_write(output / "table.md", "\n".join(markdown(table) for table in tables))
    atomic_write(output / "table.csv", _csv(tasks))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATE.parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["pick_steps"] = _pick_steps
    html = environment.get_template(_TEMPLATE.name).render(
        tasks=tasks,
        tables=tables,
        plots={name: base64.b64encode(png).decode() for name, png in drawn.items()},
        chosen={task.name: _first(task, prompts) for task in tasks},
        extremes={task.name: _extremes(task) for task in tasks},
        roles={s["name"]: _role(s) for task in tasks for s in task.results["systems"]},
        published=_published()["source"],
        no_text=_NO_TEXT,
    )
    atomic_write(output / "report.html", html)
    return output / "report.html"


def _load(directory: Path) -> TaskResults:
    manifest, results = load_manifest(directory), load_results(directory)
    samples: dict[str, dict[str, dict[str, Any]]] = {}
    for record in read_jsonl(directory / "samples.jsonl"):
        samples.setdefault(record["system"], {})[record["id"]] = record
    return TaskResults(results["manifest"]["name"], manifest, results, samples)


def _role(system: dict[str, Any]) -> str:
    return "sanity" if plots.is_sanity(system) else "model"


def _paper_table(tasks: Sequence[TaskResults]) -> Table:
    """TextLDM's Table 1: systems down, the five metrics of every task across; published rows below ours."""
    shown = {task.name: _with_values(task, _PAPER) for task in tasks}
    protocol = {task.name for task in tasks if _is_published_protocol(task)}
    systems: dict[str, dict[str, dict[str, Any]]] = {}
    for task in tasks:
        for system in task.results["systems"]:
            systems.setdefault(system["name"], {})[task.name] = system
    rows = []
    for name, by_task in systems.items():
        cells = [
            _cell(by_task[task.name], key, interval=True) if task.name in by_task else Cell("-")
            for task in tasks
            for key in shown[task.name]
        ]
        rows.append(Row(name, _role(next(iter(by_task.values()))), cells))
    rows += _published_rows(shown, protocol)
    notes = list(dict.fromkeys(note for task in tasks for note in _notes(task, _PAPER)))
    if rows[-1].role == "published":
        notes.append(
            f"Published: {_published()['source']}. Other documents, lengths and scoring models than ours: "
            "read them for their size, do not subtract them."
        )
    return Table(
        "Scores",
        [(task.name, len(shown[task.name])) for task in tasks],
        [(BY_KEY[key].heading, BY_KEY[key].help) for task in tasks for key in shown[task.name]],
        rows,
        notes,
    )


def _more_table(task: TaskResults) -> Table:
    keys = _with_values(task, _MORE)
    rows = [Row(s["name"], _role(s), [_cell(s, key) for key in keys]) for s in task.results["systems"]]
    headings = [(BY_KEY[key].heading, BY_KEY[key].help) for key in keys]
    title = f"Fluency, diversity and cost: {task.name}"
    return Table(title, [(task.name, len(keys))], headings, rows, _notes(task, _MORE))


def _seeds_table(task: TaskResults) -> Table | None:
    """A group and its sampling a row, where a systems file names groups."""
    found = points(task.results["systems"])
    keys = [key for key in _SEEDS if any(point.value(key) for point in found)]
    if not keys:
        return None
    rows = [
        Row(p.name, "model", [Cell(str(len(p.rows)), sort=str(len(p.rows))), *(_mean(p, key) for key in keys)])
        for p in found
    ]
    headings = [("seeds", "Rows of this group and sampling."), *((BY_KEY[k].heading, BY_KEY[k].help) for k in keys)]
    notes = ["Mean over the seeds ± their standard deviation."]
    return Table(f"Over seeds: {task.name}", [(task.name, len(headings))], headings, rows, notes)


def _passages_table(task: TaskResults) -> Table | None:
    """Passages without a prefix, a group a row, where a systems file names groups."""
    groups = {system["name"]: system.get("group") for system in task.results["systems"]}
    by_group: dict[str, list[dict[str, Any]]] = {}
    for found in task.results["unconditional"]:
        by_group.setdefault(groups.get(found["name"]) or found["name"], []).append(found["metrics"])
    if not any(groups.values()) or not by_group:
        return None
    keys = ("nll", "entropy", "distinct2")
    rows = [
        Row(name, "model", [Cell(str(len(seeds)), sort=str(len(seeds))), *(_over(seeds, key) for key in keys)])
        for name, seeds in by_group.items()
    ]
    headings = [("seeds", "Rows of this group."), *((BY_KEY[k].heading, BY_KEY[k].help) for k in keys)]
    notes = ["Mean over the seeds ± their standard deviation; human: whole documents."]
    return Table(f"Passages without a prefix: {task.name}", [(task.name, len(headings))], headings, rows, notes)


def _over(seeds: Sequence[dict[str, Any]], key: str) -> Cell:
    values, digits = [seed[key]["value"] for seed in seeds], BY_KEY[key].digits
    if None in values:
        return Cell("-")
    spread = f"±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return Cell(f"{statistics.fmean(values):.{digits}f}", sort=repr(statistics.fmean(values)), spread=spread)


def _mean(point: Point, key: str) -> Cell:
    found, digits = point.value(key), BY_KEY[key].digits
    if found is None:
        return Cell("-")
    mean, deviation = found
    return Cell(f"{mean:.{digits}f}", sort=repr(mean), spread="" if deviation is None else f"±{deviation:.{digits}f}")


def _with_values(task: TaskResults, keys: Iterable[str]) -> list[str]:
    return [key for key in keys if any(number(system, key) is not None for system in task.results["systems"])]


def _notes(task: TaskResults, keys: Iterable[str]) -> list[str]:
    texts = [cell(system, key) for system in task.results["systems"] for key in keys]
    return footnotes(task.results, {mark for text in texts for mark in MARKS if text.endswith(mark)})


def _published() -> dict[str, Any]:
    import yaml

    # Numbers stay the text they are: 1.20 was published with two decimals.
    return yaml.load(_PUBLISHED.read_text(), Loader=yaml.BaseLoader)  # type: ignore[no-any-return]


def _is_published_protocol(task: TaskResults) -> bool:
    """Whether documents were cut and split as in the published table: other lengths give other numbers."""
    rules = task.results["manifest"]
    cut = rules["max_tokens"] == 1024 and rules["split_fraction"] == [0.4, 0.6]
    return cut and rules["reference_fingerprint"] != "words" and task.results["length"]["policy"] == "oracle"


def _published_rows(shown: dict[str, list[str]], protocol: set[str]) -> list[Row]:
    """Rows of other people's tables, for the tasks and columns that are shown here."""
    data = _published()
    rows = []
    for name, by_task in data["rows"].items():
        if not by_task.keys() & protocol:
            continue
        cells = []
        for task, keys in shown.items():
            values = dict(zip(data["metrics"], by_task.get(task, []) if task in protocol else [], strict=False))
            cells += [Cell(values[key], sort=values[key]) if key in values else Cell("-") for key in keys]
        rows.append(Row(name, "published", cells))
    return rows


def _cell(system: dict[str, Any], key: str, *, interval: bool = False) -> Cell:
    """A metric with its standard error, or with its 95 % interval below it; the hover text has both."""
    text, value = cell(system, key), number(system, key)
    if value is None:
        return Cell(text)
    metric, digits = system["metrics"].get(key, {}), BY_KEY[key].digits
    spread, title = "", ""
    if metric.get("spread") is not None:
        spread = f"±{metric['spread']:.{digits}f}"
        title = f"{metric['spread_kind']}, n = {metric['n']}"
        if metric.get("ci95"):
            title += f", ±{metric['spread']:.{digits}f}"
            both = " to ".join(f"{bound:.{digits}f}" for bound in metric["ci95"])
            title += f"; 95 % interval {both}"
            spread = both if interval else spread
    for name, label in (
        ("seed_sd", "SD over k-means seeds"),
        ("seed25", "seed 25"),
        ("star", "MAUVE*"),
        ("truncated_share", "share of pairs cut"),
    ):
        if name in metric:
            title += f"; {label} {metric[name]:.{digits if name != 'truncated_share' else 3}f}"
    bare = text.rstrip(MARKS)
    return Cell(bare, text[len(bare) :], repr(value), spread, title)


def markdown(table: Table) -> str:
    """A pipe table with its title and notes; an interval behind each value is left to the CSV."""
    several = len(table.groups) > 1
    names = [group for group, count in table.groups for _ in range(count)]
    heads = [f"{task} {head}" if several else head for task, (head, _) in zip(names, table.headings, strict=True)]
    lines = [["system", *heads], ["---", *["--:"] * len(heads)]]
    for row in table.rows:
        name = f"{row.name} (published)" if row.role == "published" else row.name
        lines.append([name, *(f"{c.text}{c.mark}{f' ({c.spread})' if c.spread else ''}" for c in row.cells)])
    body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"## {table.title}\n\n{body}" + "".join(f"\n{note}\n" for note in table.notes)


def _csv(tasks: Sequence[TaskResults]) -> str:
    """Every metric of every system in full precision, a line each; published numbers are marked."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        "task manifest system published metric value spread spread_kind ci95_low ci95_high n unit seed_sd".split()
    )
    for task in tasks:
        for system in task.results["systems"]:
            for name, metric in system["metrics"].items():
                fields = [metric["value"], metric["spread"], metric["spread_kind"], *(metric["ci95"] or (None, None))]
                where = [task.name, task.results["manifest"]["hash"], system["name"], "no", name]
                writer.writerow([*where, *fields, metric["n"], metric["unit"], metric.get("seed_sd")])
    data = _published()
    for task in filter(_is_published_protocol, tasks):
        for name, by_task in data["rows"].items():
            for metric, value in zip(data["metrics"], by_task.get(task.name, []), strict=False):
                writer.writerow([task.name, "", name, "yes", metric, value, *[None] * 4, 1000, "percent", None])
    return file.getvalue()


def _draw(tasks: Sequence[TaskResults], runs: Sequence[Path]) -> dict[str, bytes]:
    drawn: dict[str, bytes | None] = {}
    for task in tasks:
        words = {
            name: [record["words"] for record in by_id.values() if "words" in record]
            for name, by_id in task.samples.items()
        }
        drawn[f"{task.name}_metrics"] = plots.metrics_plot(task.results)
        drawn[f"{task.name}_lengths"] = plots.lengths_plot(task.results, {k: v for k, v in words.items() if v})
        drawn[f"{task.name}_quality"] = plots.quality_plot(task.results)
        drawn[f"{task.name}_gaps"] = plots.gaps_plot(task.results)
    drawn["reconstruction"] = plots.reconstruction_plot(runs)
    drawn |= {f"loss_{run.name}": plots.loss_plot(run) for run in runs}
    drawn |= {f"timesteps_{run.name}": plots.timesteps_plot(run) for run in runs}
    return {name: png for name, png in drawn.items() if png is not None}


def _pick_steps(steps: Sequence[str], most: int = 8) -> list[tuple[int, str]]:
    """(number from 1, text) of some steps, evenly spaced, the last among them."""
    count = min(most, len(steps))
    return [(number, steps[number - 1]) for number in (round((i + 1) * len(steps) / count) for i in range(count))]


def _first(task: TaskResults, count: int) -> list[dict[str, Any]]:
    """The first samples with every system's text."""
    return [
        {"prefix": sample.prefix, "written": [by_id[sample.id] for by_id in task.samples.values()]}
        for sample in task.manifest.samples[:count]
    ]


def _extremes(task: TaskResults, count: int = 2) -> list[dict[str, Any]]:
    """The best and the worst texts of every model by ROUGE-L, or, where that was not scored, by nll."""
    prefixes = {sample.id: sample for sample in task.manifest.samples}
    found = []
    for system in task.results["systems"]:
        records = list(task.samples[system["name"]].values())
        key, sign = ("rougeL", -1) if records and "rougeL" in records[0] else ("nll", 1)
        scored = [r for r in records if isinstance(r.get(key), int | float) and math.isfinite(r[key])]
        if _role(system) == "sanity" or len(scored) < 2 * count:
            continue
        order = sorted(scored, key=lambda record: sign * record[key])
        for label, chosen in (("best", order[:count]), ("worst", order[: -count - 1 : -1])):
            for record in chosen:
                sample = prefixes[record["id"]]
                found.append({
                    "system": system["name"], "label": label, "metric": BY_KEY[key].heading, "value": record[key],
                    "prefix": sample.prefix, "target": sample.target, "text": record["text"],
                })  # fmt: skip
    return found
