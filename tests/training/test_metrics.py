"""What a run records and shows: sums over ranks, metrics.jsonl, the console, wandb, plots."""

import json
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from megatext.config import ConfigError
from megatext.training import wandb_mirror
from megatext.training.metrics import Logger, LoggingConfig, Meter, console_line, duration, main
from megatext.training.plots import PANELS, _latest, _running_mean


def test_meter_divides_once() -> None:
    meter = Meter()
    for total, count in ((1.0, 1), (5.0, 3)):
        meter.add("pair", torch.tensor(total), torch.tensor(count))
        meter.add("sum", torch.tensor(total))
    meter.add("empty", torch.tensor(0.0), torch.tensor(0))
    assert meter.read() == {"pair": 1.5, "sum": 6.0}
    assert meter.read() == {}


def test_rewind_forgets_what_will_be_logged_again(tmp_path: Path) -> None:
    logger = Logger(tmp_path, LoggingConfig(), is_main=True, resolved={})
    for step in (1, 2, 3):
        logger.record(step, {"loss": 1.0})
    with logger.path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    logger.rewind(2)
    assert [json.loads(line)["step"] for line in logger.path.read_text().splitlines()] == [1, 2]


def test_console_lines_are_aligned() -> None:
    figures = {
        "loss": 3.21, "learning_rate": 3e-4, "grad_norm": 0.5, "tokens_per_second": 12345.0, "data_wait": 0.01,
        "memory_gib": 1.5, "eta_seconds": 3723.0,
    }  # fmt: skip
    lines = [console_line(step, 1000, figures, ["ce"]) for step in (1, 1000)]
    assert len(set(map(len, lines))) == 1
    assert lines[0].startswith("step    1/1000 | loss  3.2100 | lr 3.00e-04 | grad   0.50 |  12.3k tok/s")
    assert duration(90061) == "1d 1:01:01"


@pytest.fixture
def no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def wandb_logger(run_dir: Path) -> Logger:
    return Logger(run_dir, LoggingConfig(wandb_project="p"), is_main=True, resolved={"seed": 7})


@pytest.mark.usefixtures("no_key")
def test_wandb_offline_mirrors_the_record_under_one_id(tmp_path: Path) -> None:
    """Without a key and a network: what is logged lies in the run directory, to be synchronised later."""
    for step in (3, 5):  # as a run that is resumed
        logger = wandb_logger(tmp_path)
        logger.record(step, {"loss": 1.25})
        logger.finish()
    logs = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(logs) == 2 and len({log.name for log in logs}) == 1
    content = logs[0].read_bytes()
    assert b"loss" in content and b"1.25" in content and b"seed" in content


def fake_wandb(monkeypatch: pytest.MonkeyPatch, log: Any, **replaced: Any) -> dict[str, Any]:
    """A module in wandb's place; what it was asked for."""
    asked: dict[str, Any] = {"steps": []}
    run = types.SimpleNamespace(log=log or (lambda figures, step: asked["steps"].append(step)), finish=lambda: None)
    run.settings, run.dir = types.SimpleNamespace(mode="online"), "somewhere/files"

    def init(**options: Any) -> Any:
        asked.update(options)
        return run

    module = types.SimpleNamespace(**({"init": init, "Settings": dict} | replaced))
    monkeypatch.setitem(__import__("sys").modules, "wandb", module)
    return asked


@pytest.mark.usefixtures("no_key")
@pytest.mark.parametrize("variable", [None, "offline", "online"])
def test_wandb_mode_follows_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None) -> None:
    asked = fake_wandb(monkeypatch, None)
    monkeypatch.setenv("WANDB_API_KEY", "k")
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    logger = wandb_logger(tmp_path)
    for step in range(5):
        logger.record(step, {"loss": 1.0})
    logger.finish()
    assert asked["mode"] == (variable or "online") and asked["resume"] == "allow"
    assert asked["steps"] == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("no_key")
def test_a_wandb_that_hangs_or_breaks_costs_a_line_and_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise OSError("gone")

    monkeypatch.setattr(wandb_mirror, "FINISH_SECONDS", 0.2)
    monkeypatch.setattr(wandb_mirror, "QUEUED_RECORDS", 50)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (lambda figures, step: time.sleep(60), {}, "does not answer"),
        (broken, {}, "wandb failed (gone)"),
        (None, {"init": broken}, "could not be started (gone)"),
    ]
    for number, (log, replaced, told) in enumerate(cases):
        fake_wandb(monkeypatch, log, **replaced)
        run = tmp_path / str(number)
        run.mkdir()
        logger = wandb_logger(run)
        started = time.monotonic()
        for step in range(100):
            logger.record(step, {"loss": 1.0})
        assert time.monotonic() - started < 20  # the sleeping one would take 6000 s
        logger.finish()
        assert len(logger.path.read_text().splitlines()) == 100
        shown = capsys.readouterr().out
        assert told in shown and shown.count("\n") == 1


@pytest.mark.usefixtures("no_key")
def test_missing_wandb_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    logger = wandb_logger(tmp_path)
    logger.record(1, {"loss": 1.0})
    logger.finish()
    shown = capsys.readouterr().out
    assert "pip install wandb" in shown and shown.count("\n") == 1


def test_plots_of_one_and_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from matplotlib.image import imread

    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        records = [
            {"step": s, "loss": 1.0 / s, "tokens_per_second": 5, "latent_variance": None if s == 3 else s}
            for s in range(1, 9)
        ]
        lines = [
            json.dumps(record) for record in [*records, {"step": 8, "accuracy_at_0.0": 1.0, "accuracy_at_0.5": 0.5}]
        ]
        (tmp_path / run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9, "lo']))
    main(["plot", str(tmp_path / "a"), "--smooth", "0.9"])
    main(["plot", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "new" / "c.png")])
    assert "metrics.jsonl:10 is not whole" in capsys.readouterr().err
    one, two = (imread(tmp_path / name) for name in ("a/curves.png", "new/c.png"))
    assert one.shape == two.shape and one.std() > 0 and (one != two).any()
    with pytest.raises(ConfigError, match="is .* the run_dir of a run that has logged"):
        main(["plot", str(tmp_path)])


def test_panels_show_what_recipes_record() -> None:
    """Every key that a panel waits for is written somewhere in the package."""
    source = "".join(path.read_text() for path in Path("megatext").rglob("*.py") if path.name != "plots.py")
    for keys in PANELS.values():
        assert all(key.split("/")[-1] in source for key in keys), keys
    assert _latest([{"step": 1, "loss_t3": 2.0, "loss_t9": 1.0}, {"step": 2}], r"loss_t(\d)$") == [
        (pytest.approx(0.35), 2.0),
        (pytest.approx(0.95), 1.0),
    ]
    assert _running_mean([2.0, 2.0, 2.0], 0.9) == pytest.approx([2.0] * 3)
    assert _running_mean([0.0, 1.0], 0.5) == pytest.approx([0.0, 2 / 3])
