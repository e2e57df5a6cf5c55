"""The stages from plan to plot on runs of a second, and SLURM under stand-ins."""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatext.config import ConfigError
from megatext.scaling.plan import PLAN, Plan, config_file, read_plan
from megatext.scaling.runs import is_finished, run_here, submit
from tests.command_lines import ROOT
from tests.processes import run_ranks
from tests.scaling.test_plan import write_plan


@pytest.fixture
def scaling_law(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Calls launch/scaling_law.py with some words; what it printed, its errors too."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec = importlib.util.spec_from_file_location("scaling_law", ROOT / "launch" / "scaling_law.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["scaling_law.py", *words])
        status = 0
        try:
            module.main()
        except SystemExit as end:
            status = int(end.code or 0)
        return f"{''.join(capfd.readouterr())}\nstatus {status}"

    return call


def test_from_plan_to_plot(tmp_path: Path, shards: Path, scaling_law: Callable[..., str]) -> None:
    path = write_plan(tmp_path, shards, budgets=[{"flops": 4e8}])
    config = ("--config", str(path))
    assert "2 runs, " in scaling_law("plan", *config)
    _, (lost, other) = read_plan(path)
    settings = config_file(lost)
    whole = settings.read_text()
    settings.write_text(whole.replace("rows_per_step: 4", "rows_per_step: 3"))
    told = scaling_law("launch", *config)
    assert "0 of 2 runs are finished" in told and f"{lost.name} failed with exit status" in told
    assert "1 of 2 runs are finished and exported" in told and "status 1" in told
    assert not is_finished(lost) and is_finished(other)  # one that fails does not stop the others
    settings.write_text(whole)
    # a checkpoint that the runner knows nothing of, as a SLURM job leaves it, is continued
    halfway = [str(ROOT / "launch" / "pretrain_lm.py"), "--config", str(settings), "--save_every_steps", "3"]
    halfway += ["--max_steps", "3", "--optimizer.warmup_steps", str(round(0.1 * lost.steps))]
    assert run_ranks(1, [sys.executable, *halfway]).returncode == 0
    (Path(lost.run_dir) / "finished.json").unlink()
    assert other.name not in scaling_law("launch", *config, "--list")
    done = (Path(other.run_dir) / "finished.json").stat().st_mtime_ns
    told = scaling_law("launch", *config)
    assert "1 of 2 runs are finished" in told and "2 of 2 runs are finished and exported" in told, told
    assert "at step 3 (probe loss" in told
    assert (Path(other.run_dir) / "finished.json").stat().st_mtime_ns == done
    assert scaling_law("launch", *config, "--list").strip() == "status 0"
    rows = json.loads((tmp_path / "ladder" / "systems.yaml").read_text())
    assert [row["system"] for row in rows] == [f"hf:{tmp_path}/ladder/models/{run.name}" for run in (lost, other)]

    assert "2 of 2 runs are finished" in scaling_law("collect", *config)
    points = json.loads((tmp_path / "ladder" / "points.json").read_text())
    for run in (lost, other):
        of_run = [point for point in points if point["run"] == run.name]
        finished = json.loads((Path(run.run_dir) / "finished.json").read_text())
        assert of_run[-1]["final"] and of_run[-1]["loss"] == finished["validation_ema/loss"]
        assert of_run[-1]["flops"] == pytest.approx(run.flops)
        assert of_run[-1]["tokens"] == pytest.approx(run.tokens, rel=0.3)  # a step has about as many as the first
        assert of_run[-1]["ancestor_flops"] == 0  # stands on nothing
    told = scaling_law("fit", *config)
    assert "AR: 2 runs" in told and "no law: a law of five constants needs six runs" in told, told
    assert "report.html" in scaling_law("plot", *config)
    assert {file.name for file in (tmp_path / "ladder" / "plots").iterdir()} == {"loss.png", "iso_flop.png"}


def fake_slurm(folder: Path, queued: str = "") -> Path:
    """A folder with sbatch, which writes down what it is asked for, and squeue, which tells what is queued."""
    folder.mkdir()
    (folder / "sbatch").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/asked\necho Submitted batch job 7\n')
    (folder / "squeue").write_text(f"#!/bin/sh\nprintf '{queued}'\n")
    for file in folder.iterdir():
        file.chmod(0o755)
    return folder


def test_an_array_of_what_is_not_finished(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_plan(tmp_path, shards, device={"deepspeed_config": "ds_configs/zero2.json"})
    Plan(path).write()
    config, runs = read_plan(path)
    run_dir = Path(runs[1].run_dir)
    run_dir.mkdir(parents=True)
    (run_dir / "finished.json").write_text(json.dumps({"step": runs[1].steps}))
    slurm = fake_slurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{slurm}:{os.environ['PATH']}")
    assert submit(runs, config, ["--time", "1:00"]) == "Submitted batch job 7"
    asked = (slurm / "asked").read_text().split("\n")
    commands = tmp_path / "ladder" / "commands.txt"
    assert asked[:-1] == [
        "--job-name", "megatext-ladder", "--array", "0,2,3", "--nodes", "1", "--ntasks-per-node", "1",
        "--gpus-per-node", "1", "--time", "1:00", "launch/slurm/pretrain.sbatch", str(commands),
    ]  # fmt: skip
    wanted = f"launch/pretrain_lm.py --config {config_file(runs[2])} --deepspeed_config ds_configs/zero2.json"
    assert commands.read_text().splitlines()[2] == wanted
    wide = replace(config, device=replace(config.device, processes=32))
    assert submit(runs, wide, []) == "Submitted batch job 7"
    asked = (slurm / "asked").read_text().split("\n")
    assert asked[4:10] == ["--nodes", "4", "--ntasks-per-node", "8", "--gpus-per-node", "8"]
    with pytest.raises(ConfigError, match="device.processes 12 do not fill nodes of device.processes_per_node 8"):
        submit(runs, replace(config, device=replace(config.device, processes=12)), [])
    (slurm / "squeue").write_text("#!/bin/sh\necho 7_0\necho 7_2\n")
    with pytest.raises(ConfigError, match="queued or running .7_0, 7_2.; wait for them, or scancel --name megatext-"):
        submit(runs, config, [])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="cannot start squeue: .*; is this a SLURM machine"):
        submit(runs, config, [])


def test_jobs_that_would_meet_are_refused(tmp_path: Path, shards: Path) -> None:
    path = write_plan(tmp_path, shards)
    Plan(path).write()
    config, runs = read_plan(path)
    with pytest.raises(ConfigError, match="--jobs is for runs of one process on CPUs"):
        run_here(runs, replace(config, device=replace(config.device, processes=2)), jobs=2)


def test_a_run_that_was_to_be_longer_is_not_finished(tmp_path: Path, shards: Path) -> None:
    plan = Plan(write_plan(tmp_path, shards))
    run = plan.runs[0]
    assert not is_finished(run)
    Path(run.run_dir).mkdir(parents=True)
    done = Path(run.run_dir) / "finished.json"
    done.write_text(json.dumps({"step": run.steps - 1}))
    assert not is_finished(run)
    done.write_text("{")
    assert not is_finished(run)
    done.write_text(json.dumps({"step": run.steps}))
    assert is_finished(run)
    assert not (plan.work_dir / PLAN).exists()
