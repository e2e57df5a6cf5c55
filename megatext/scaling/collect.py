"""What the planned runs measured: a point for every validation, from metrics.jsonl or from Weights & Biases."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatext.config import ConfigError
from megatext.scaling.plan import PlannedRun
from megatext.training.cost import total_flops
from megatext.training.metrics import read_records

POINTS = "points.json"
METRICS = ("gap", "entropy", "mauve", "generative_perplexity", "distinct2", "self_bleu", "bits_per_character")
"""Of the evaluation's results."""
Records = Iterable[dict[str, Any]]


@dataclass(frozen=True)
class Measured:
    """A run at one of its validations."""

    run: str
    system: str
    width: int
    layers: int
    parameters: int
    parameters_without_embeddings: int
    budget_flops: float
    step: int
    final: bool
    """At the run's last step, where the learning rate has come down: only these are fitted."""
    tokens: float
    """Read so far, without padding."""
    flops: float
    """So far: forward, backward, recomputation, frozen networks of this run."""
    loss: float
    """On the fixed validation rows."""
    seconds: float
    """Of training so far, on whatever it ran."""
    total_flops: float | None = None
    """With those of the models that it stands on; of finished runs that were exported."""
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    """Way of sampling -> metrics of the evaluation; of final points."""


def from_folder(run: PlannedRun) -> list[dict[str, Any]]:
    """The records of a run that was run here; none if it has not begun."""
    return read_records(Path(run.run_dir)) if (Path(run.run_dir) / "metrics.jsonl").is_file() else []


def from_wandb(project: str, group: str) -> Callable[[PlannedRun], list[dict[str, Any]]]:
    """A reader of the records that runs mirrored to ENTITY/PROJECT. Raises ConfigError."""
    try:
        import wandb

        found = {run.name: run for run in wandb.Api().runs(project, filters={"group": group})}
    except Exception as error:  # whatever it is, it is not about the plan
        raise ConfigError(f"wandb does not tell the runs of {project}, group {group}: {error}") from None

    def records(run: PlannedRun) -> list[dict[str, Any]]:
        mirrored = found.get(run.name)
        rows = [] if mirrored is None else mirrored.scan_history()
        return [{"step": row["_step"], **{k: v for k, v in row.items() if v is not None}} for row in rows]

    return records


def collect(
    runs: Sequence[PlannedRun],
    records_of: Callable[[PlannedRun], Records] = from_folder,
    models: Path | None = None,
    results: Sequence[Path] = (),
) -> list[Measured]:
    """The points of all runs that have begun, `models` being where they are exported, `results` the evaluation's."""
    metrics = _metrics(results)
    found = []
    for run in runs:
        points = _points(run, list(records_of(run)))
        if points and points[-1].final:
            total = total_flops(models / run.name) if models is not None else None
            last = {**asdict(points[-1]), "total_flops": total, "metrics": metrics.get(run.name, {})}
            points[-1] = Measured(**last)
        found += points
    return found


def _points(run: PlannedRun, records: list[dict[str, Any]]) -> list[Measured]:
    logged: dict[int, dict[str, Any]] = {0: {"tokens": 0, "elapsed_seconds": 0.0}}
    for record in records:
        logged.setdefault(record["step"], {}).update(record)
    steps = [step for step, merged in sorted(logged.items()) if "tokens" in merged]
    tokens, seconds = ([logged[step].get(key, 0) for step in steps] for key in ("tokens", "elapsed_seconds"))
    return [
        Measured(
            run=run.name,
            system=run.system,
            width=run.width,
            layers=run.layers,
            parameters=run.parameters,
            parameters_without_embeddings=run.parameters_without_embeddings,
            budget_flops=run.budget_flops,
            step=step,
            final=step == run.steps,
            tokens=float(np.interp(step, steps, tokens)),  # not every validated step is a logged one
            flops=step * run.flops_per_step,
            loss=merged[run.loss],
            seconds=float(np.interp(step, steps, seconds)),
        )
        for step, merged in sorted(logged.items())
        if merged.get(run.loss) is not None
    ]


def _metrics(results: Sequence[Path]) -> dict[str, dict[str, dict[str, float]]]:
    """Run -> way of sampling -> metrics, of rows whose group is the run."""
    from evaluation.scoring import load_results

    found: dict[str, dict[str, dict[str, float]]] = {}
    for directory in results:
        for row in load_results(directory)["systems"]:
            way = row["name"].removeprefix(row.get("group") or "").strip() or "default"
            values = {key: row["metrics"][key]["value"] for key in METRICS if key in row["metrics"]}
            found.setdefault(row.get("group") or row["name"], {})[way] = values
    return found


def write_points(points: Sequence[Measured], work_dir: Path) -> Path:
    """points.json"""
    path = work_dir / POINTS
    path.write_text("[\n" + ",\n".join(json.dumps(asdict(point)) for point in points) + "\n]\n")
    return path


def read_points(work_dir: Path) -> list[Measured]:
    """What `write_points` wrote. Raises ConfigError."""
    path = work_dir / POINTS
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; `launch/scaling_law.py collect` makes it")
    return [Measured(**point) for point in json.loads(path.read_text())]
