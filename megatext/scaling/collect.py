"""What the planned runs measured: a point for every validation, from metrics.jsonl or from Weights & Biases."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.files import atomic_write
from megatext.config import ConfigError
from megatext.recipes.pretrained import weights_hash
from megatext.scaling.plan import PlannedRun
from megatext.training.cost import read_cost
from megatext.training.metrics import read_records

POINTS = "points.json"
METRICS = {
    "gap": "judge gap G",
    "entropy": "unigram entropy, nats",
    "mauve": "MAUVE",
    "bits_per_character": "bits a character",
}
"""Of the evaluation's results, with their names in plots."""
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
    ancestor_flops: float | None = None
    """Of the models that it stands on; of finished runs that were exported, where all of them tell theirs."""
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    """Way of sampling -> metrics of the evaluation; of final points."""


def from_folder(run: PlannedRun) -> list[dict[str, Any]]:
    """The records of a run that was run here; none if it has not begun."""
    return read_records(Path(run.run_dir)) if (Path(run.run_dir) / "metrics.jsonl").is_file() else []


def from_wandb(project: str, group: str) -> Callable[[PlannedRun], list[dict[str, Any]]]:
    """A reader of the records that runs mirrored to ENTITY/PROJECT. Raises ConfigError."""
    try:
        import wandb

        runs = wandb.Api().runs(project, filters={"group": group})
        found = {run.name: [_told(row) for row in run.scan_history()] for run in runs}
    except Exception as error:  # whatever it is, it is not about the plan
        raise ConfigError(f"wandb does not tell the runs of {project}, group {group}: {error}") from None
    return lambda run: found.get(run.name, [])


def _told(row: dict[str, Any]) -> dict[str, Any]:
    """A row of wandb as a record: every row has every key there, and what was not finite is a number or a word."""
    finite = {k: v for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)}
    return {"step": row["_step"], **finite}


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
        records = list(records_of(run))
        points = _points(run, records)
        if not points and any(record["step"] == run.steps for record in records):
            known = sorted({key for record in records for key in record if "/" in key})
            raise ConfigError(f"{run.name}: no record has {run.loss}, its system's loss; there are {', '.join(known)}")
        if points and points[-1].final:
            ancestors = None if models is None else _ancestor_flops(models / run.name)
            points[-1] = replace(points[-1], ancestor_flops=ancestors, metrics=metrics.get(run.name, {}))
        found += points
    return found


def _points(run: PlannedRun, records: list[dict[str, Any]]) -> list[Measured]:
    logged: dict[int, dict[str, Any]] = {0: {"tokens": 0, "elapsed_seconds": 0.0}}
    for record in records:
        logged.setdefault(record["step"], {}).update(record)
    steps = [step for step, merged in sorted(logged.items()) if "tokens" in merged]
    tokens = [logged[step]["tokens"] for step in steps]
    seconds = _whole_time([logged[step].get("elapsed_seconds", 0.0) for step in steps])
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


def _whole_time(elapsed: list[float]) -> list[float]:
    """Seconds over all processes that a run took: each counts its own from 0."""
    before, previous, whole = 0.0, 0.0, []
    for seconds in elapsed:
        if seconds < previous:
            before += previous
        whole.append(before + seconds)
        previous = seconds
    return whole


def _ancestor_flops(model: Path) -> float | None:
    cost = read_cost(model)
    if cost is None or cost["unknown"]:
        return None
    own = weights_hash(model)
    return float(sum(flops for name, flops in cost["flops"].items() if name != own))


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
    atomic_write(path, "[\n" + ",\n".join(json.dumps(asdict(point)) for point in points) + "\n]\n")
    return path


def read_points(work_dir: Path) -> list[Measured]:
    """What `write_points` wrote. Raises ConfigError."""
    path = work_dir / POINTS
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; `launch/scaling_law.py collect` makes it")
    return [Measured(**point) for point in json.loads(path.read_text())]
