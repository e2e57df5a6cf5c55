"""Points from records made here, from metrics.jsonl and from a stand-in for wandb."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatext.config import ConfigError
from megatext.recipes.pretrained import weights_hash
from megatext.scaling.collect import collect, from_folder, from_wandb, read_points, write_points
from megatext.scaling.plan import PlannedRun

RUN = PlannedRun(
    name="ar-32", system="AR", launcher="lm", run_dir="", loss="validation_ema/loss", width=32, layers=1, heads=2,
    learning_rate=0.1, rows_per_step=4, steps=30, parameters=1000, parameters_without_embeddings=600, tokens=3840,
    epochs=0.5, flops_per_step=1e6, budget_flops=3e7, memory_gib=0.1, device_hours=None,
)  # fmt: skip
RECORDS: list[dict[str, Any]] = [
    {"step": 10, "loss": 5.0, "tokens": 900, "elapsed_seconds": 2.0},
    {"step": 15, "validation/loss": 4.4, "validation_ema/loss": 4.5},
    {"step": 20, "loss": 4.0, "tokens": 2000, "elapsed_seconds": 4.0},
    {"step": 20, "save_stall_seconds": 0.1},
    {"step": 30, "loss": 3.0, "tokens": 3000, "elapsed_seconds": 6.0},
    {"step": 30, "validation/loss": 3.1, "validation_ema/loss": 3.2},
]


def run_in(folder: Path) -> PlannedRun:
    return PlannedRun(**{**RUN.__dict__, "run_dir": str(folder / RUN.name)})


def write_records(folder: Path, records: list[dict[str, Any]]) -> None:
    (folder / RUN.name).mkdir(parents=True, exist_ok=True)
    (folder / RUN.name / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_point_a_validation(tmp_path: Path) -> None:
    write_records(tmp_path, RECORDS)
    first, last = collect([run_in(tmp_path)])
    assert (first.step, first.final, first.loss, first.flops) == (15, False, 4.5, 15e6)
    assert (first.tokens, first.seconds) == (1450, 3.0)  # half-way between two logged steps
    assert (last.step, last.final, last.loss, last.tokens, last.seconds) == (30, True, 3.2, 3000, 6.0)
    assert (last.parameters, last.parameters_without_embeddings, last.ancestor_flops) == (1000, 600, None)
    write_points([first, last], tmp_path)
    assert read_points(tmp_path) == [first, last]


def test_seconds_of_a_run_that_was_resumed(tmp_path: Path) -> None:
    """Each process counts its own time."""
    resumed = [dict(record) for record in RECORDS]
    for record in resumed[2:]:
        if "elapsed_seconds" in record:
            record["elapsed_seconds"] -= 3
    write_records(tmp_path, resumed)
    assert [point.seconds for point in collect([run_in(tmp_path)])] == [2.5, 5.0]


def test_a_finished_run_without_its_loss_says_what_there_is(tmp_path: Path) -> None:
    write_records(tmp_path, [{key.replace("_ema", ""): value for key, value in record.items()} for record in RECORDS])
    with pytest.raises(ConfigError, match="ar-32: no record has validation_ema/loss.*there are validation/loss"):
        collect([run_in(tmp_path)])


def test_a_run_that_goes_on_has_no_final_point(tmp_path: Path) -> None:
    assert collect([run_in(tmp_path)]) == []
    write_records(tmp_path, RECORDS[:3])
    (point,) = collect([run_in(tmp_path)])
    assert not point.final
    with pytest.raises(ConfigError, match=r"points.json: no such file; .launch/scaling_law.py collect. makes it"):
        read_points(tmp_path)


def test_metrics_and_costs_of_the_exported_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_records(tmp_path, RECORDS)
    model = tmp_path / "models" / RUN.name
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    cost = {"flops": {weights_hash(model): 4e7, "a": 3e7, "b": 5e6}, "unknown": []}
    (model / "training.json").write_text(json.dumps(cost))
    rows = [
        {
            "name": "ar-32 temperature=0.7",
            "group": "ar-32",
            "metrics": {"gap": {"value": 0.5}, "rouge1": {"value": 20}},
        },
        {"name": "ar-32", "group": "ar-32", "metrics": {"gap": {"value": 0.7}, "mauve": {"value": 60.0}}},
        {"name": "human", "metrics": {"gap": {"value": 0.0}}},
    ]
    monkeypatch.setattr("evaluation.scoring.load_results", lambda directory: {"systems": rows})
    *_, last = collect([run_in(tmp_path)], from_folder, tmp_path / "models", [tmp_path])
    assert last.ancestor_flops == 3.5e7
    assert last.metrics == {"temperature=0.7": {"gap": 0.5}, "default": {"gap": 0.7, "mauve": 60.0}}


def test_wandb_tells_the_same_as_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_records(tmp_path, RECORDS)
    asked = []

    def runs(path: str, filters: dict[str, str]) -> list[Any]:
        asked.append((path, filters))
        keys = {key for record in RECORDS for key in record}
        # as wandb does: every key in every row, one row a step
        rows: dict[int, dict[str, Any]] = {}
        for record in RECORDS:
            row = rows.setdefault(record["step"], {**dict.fromkeys(keys), "_step": record["step"]})
            row.update({key: value for key, value in record.items() if key != "step"})
        rows[20]["validation_ema/loss"] = "NaN"
        for row in rows.values():
            del row["step"]
        return [SimpleNamespace(name=RUN.name, scan_history=lambda: rows.values())]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Api=lambda: SimpleNamespace(runs=runs)))
    run = run_in(tmp_path)
    assert collect([run], from_wandb("team/project", "ladder")) == collect([run])
    assert asked == [("team/project", {"group": "ladder"})]
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    with pytest.raises(ConfigError, match="wandb does not tell the runs of team/project, group ladder"):
        from_wandb("team/project", "ladder")
