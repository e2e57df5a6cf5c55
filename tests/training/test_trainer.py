"""The trainer as its users meet it: whole runs on one and two processes, killed, resumed, damaged, exported."""

import json
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatext import recipes
from megatext.config import ConfigError, load_config
from megatext.data import DataError
from megatext.export import export
from megatext.training import checkpoint
from megatext.training.guards import NonFiniteError
from megatext.training.run_state import check_built_on
from megatext.training.trainer import REQUEUE_EXIT_CODE, train
from tests.training import toy

FILES = Path(__file__).resolve().parents[2] / "ds_configs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy")
    toy.write_toy_config(path)
    return path


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the child processes have it: sums in another order differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_here(folder: Path, name: str, ds_file: str | None = None, **overrides: object) -> Path:
    """A run on this process; returns its directory."""
    options = [f"--{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    argv = ["--config", str(folder / "toy.yaml"), f"--run_dir={folder / name}", *options]
    config, _ = load_config(toy.ToyConfig, argv)
    train(config, toy.ToyRecipe(config), FILES / ds_file if ds_file else None)
    return folder / name


@pytest.fixture(scope="module")
def reference(folder: Path) -> Path:
    """10 steps on one process, 4 micro-batches a step, every step saved."""
    return run_here(folder, "reference", save_every_steps=1, training__keep_last=20)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in toy.records(run) if "loss" in line]


def weights(run: Path, key: str = "master", step: int = 10) -> dict[str, torch.Tensor]:
    return checkpoint.Reader(checkpoint.checkpoint_path(run, step)).state_dict(key)


def assert_same_run(run: Path, reference: Path, tolerance: float) -> None:
    assert losses(run) == pytest.approx(losses(reference), rel=tolerance, abs=0)
    for key in ("master", "ema_0.9", "ema_0.5"):
        mine, theirs = weights(run, key), weights(reference, key)
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=tolerance, atol=tolerance)


def test_records_and_files(reference: Path) -> None:
    lines = toy.records(reference)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 11))
    steps = [line for line in lines if "loss" in line]
    assert steps[-1]["loss"] < steps[0]["loss"]
    first = steps[0]
    assert first["loss"] == pytest.approx(first["loss/ce"])  # the second term's weight is 0 at step 0
    assert {"learning_rate", "grad_norm", "tokens_per_second", "data_wait", "eta_seconds", "accuracy"} <= first.keys()
    validated = [line for line in lines if "validation/loss" in line]
    assert len(validated) == 1 and {"validation_ema/loss", "validation_ema_0.5/loss"} <= validated[0].keys()
    assert {"step": 10, "measured": 1.5} in lines
    assert all(line["save_stall_seconds"] >= 0 for line in lines if "save_stall_seconds" in line)
    assert (reference / "samples" / "step-00000010.txt").read_text() == "a sample\n"
    assert (reference / "config.yaml").is_file()


def test_ema_equals_an_unsharded_average(folder: Path, reference: Path) -> None:
    config, _ = load_config(toy.ToyConfig, ["--config", str(folder / "toy.yaml")])
    start = {name: p.detach().double() for name, p in toy.ToyRecipe(config).module.named_parameters()}
    for longest in (0.9, 0.5):
        average = start
        for step in range(1, 11):
            decay = min(longest, step / (9 + step))
            now = weights(reference, step=step)
            average = {name: decay * value + (1 - decay) * now[name].double() for name, value in average.items()}
        kept = weights(reference, f"ema_{longest}")
        for name, value in average.items():
            torch.testing.assert_close(kept[name].double(), value, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def zero0(folder: Path) -> str:
    """The stage that needs no file of ours, for fp32."""
    (folder / "zero0.json").write_text('{"zero_optimization": {"stage": 0}}')
    return str(folder / "zero0.json")


@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3", "zero3_offload"])
def test_every_stage_takes_the_same_steps(folder: Path, reference: Path, zero0: str, stage: str) -> None:
    run = run_here(folder, f"one-{stage}", zero0 if stage == "zero0" else f"{stage}.json")
    assert_same_run(run, reference, 1e-5)
    norms = [[line["grad_norm"] for line in toy.records(r) if "grad_norm" in line] for r in (run, reference)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.dist
def test_two_ranks_of_zero3_equal_one_process(folder: Path, reference: Path) -> None:
    """2 ranks x 2 micro-batches = 1 rank x 4 micro-batches, with Muon, clipping, two loss terms and EMA."""
    result = toy.start(2, folder, "two")
    assert result.returncode == 0, result.stdout
    assert "ZeRO stage 3" in result.stdout
    assert_same_run(folder / "two", reference, 1e-5)


@pytest.mark.dist
def test_resume_on_another_number_of_ranks(folder: Path, reference: Path) -> None:
    """6 steps on two ranks of ZeRO-3, killed, 4 more on one process of ZeRO-1."""
    result = toy.start(2, folder, "elastic", kill_at_step=8)
    assert result.returncode == -9, result.stdout
    run_here(folder, "elastic")
    assert_same_run(folder / "elastic", reference, 1e-5)


@pytest.mark.dist
def test_killed_and_resumed_equals_uninterrupted(folder: Path, reference: Path) -> None:
    """10 steps == 6 saved, killed in the 8th, resumed: bit for bit."""
    result = toy.start(1, folder, "killed", kill_at_step=8)
    assert result.returncode == -9, result.stdout
    assert checkpoint.list_checkpoints(folder / "killed")[-1].name == "step-00000006"
    run_here(folder, "killed")
    assert losses(folder / "killed") == losses(reference)
    assert_same_run(folder / "killed", reference, 0.0)


@pytest.mark.dist
@pytest.mark.parametrize(("world", "number"), [(1, signal.SIGUSR1), (2, signal.SIGTERM)])
def test_a_signal_saves_and_asks_to_be_requeued(folder: Path, world: int, number: int) -> None:
    result = toy.start(world, folder, f"signalled{world}", signal_at_step=4, signal_number=int(number))
    assert result.returncode == REQUEUE_EXIT_CODE, result.stdout
    assert checkpoint.list_checkpoints(folder / f"signalled{world}")[-1].name == "step-00000004"


def test_figures_of_a_shorter_run_are_not_those_of_its_continuation(folder: Path) -> None:
    """A run that was continued and stopped by a signal in its very last step still has to be finished."""
    run = run_here(folder, "extended", max_steps=4)
    with pytest.raises(SystemExit):
        run_here(folder, "extended", max_steps=6, signal_at_step=6, signal_number=int(signal.SIGUSR1))
    assert json.loads((run / "finished.json").read_text())["step"] == 4
    run_here(folder, "extended", max_steps=6)
    assert json.loads((run / "finished.json").read_text())["step"] == 6


def test_damaged_checkpoint_falls_back(folder: Path, reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder / "damaged"
    shutil.copytree(reference, run)
    for step in (8, 9, 10):
        path = checkpoint.checkpoint_path(run, step) / "rank-00000.pt"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    run_here(folder, "damaged")
    shown = capsys.readouterr().out
    assert "step-00000010/rank-00000.pt is missing or was changed" in shown and "at step 7" in shown
    assert_same_run(run, reference, 0.0)


def test_probe_loss_refuses_foreign_weights(folder: Path, reference: Path) -> None:
    run = folder / "foreign"
    shutil.copytree(reference, run)
    path = checkpoint.checkpoint_path(run, 10)
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {"probe_loss": meta["probe_loss"] + 1}))
    listed = json.loads((path / "COMPLETE").read_text())
    listed["files"]["meta.json"] = checkpoint._fingerprint(path / "meta.json")
    (path / "COMPLETE").write_text(json.dumps(listed))
    with pytest.raises(ConfigError, match="probe batch"):
        run_here(folder, "foreign", max_steps=11)


def test_resume_never_and_another_model_are_refused(folder: Path, reference: Path) -> None:
    with pytest.raises(ConfigError, match="holds a run already"):
        run_here(folder, "reference", resume="never")
    own = (folder / "reference" / "config.yaml").read_text()
    with pytest.raises(ConfigError, match="choose another run_dir"):
        run_here(folder, "reference", width=32)
    assert (folder / "reference" / "config.yaml").read_text() == own
    with pytest.raises(ConfigError, match="optimizer.name 'muon', now it is 'adamw'"):
        run_here(folder, "reference", optimizer__name="adamw")
    with pytest.raises(DataError, match=r"trained on other shards, weights or windows \(data.max_tokens\)"):
        run_here(folder, "reference", data__max_tokens=16)


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_nothing_half_written(folder: Path, reference: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(DataError, match=r"step-00000006 could not be written: rank 0: .*start the same"):
            run_here(folder, "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((folder / "full" / "checkpoints").iterdir())
    assert_same_run(run_here(folder, "full"), reference, 0.0)


def test_other_models_than_those_trained_on_are_refused() -> None:
    check_built_on(Path("here"), {"dit.vae": "a"}, {"dit.vae": "a", "dit.warm_start": "b"})
    with pytest.raises(ConfigError, match=r"here: was trained on another dit\.vae"):
        check_built_on(Path("here"), {"dit.vae": "a"}, {"dit.vae": "b"})


@pytest.mark.parametrize("stage", [0, 1])
def test_non_finite_step_is_skipped_named_and_counted(
    folder: Path, zero0: str, stage: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_here(folder, f"nan{stage}", None if stage else zero0, nan_at_steps=[4], max_steps=6)
    shown = capsys.readouterr().out
    assert "step 4 skipped (skipped so far: 1): rank 0: loss nan in micro-batch 0" in shown
    assert "blocks.0" in shown and "documents train-" in shown
    assert [line["skipped_steps"] for line in toy.records(run) if "skipped_steps" in line] == [0, 0, 0, 1, 1, 1]
    before, after = weights(run, step=3), weights(run, step=6)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert not torch.equal(before["embed.weight"], after["embed.weight"])


def test_non_finite_steps_in_a_row_stop_the_run(folder: Path) -> None:
    with pytest.raises(NonFiniteError, match="2 steps in a row"):
        run_here(folder, "nans", nan_at_steps=[2, 3], training__skipped_steps_limit=2)


def test_bf16_keeps_statistics_exact_and_exports(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(recipes._MODULES, "ToyConfig", "tests.training.toy")
    monkeypatch.setattr(toy, "build", toy.ToyRecipe, raising=False)
    run = run_here(folder, "bf16", training__precision="bf16", max_steps=4)
    choices: dict[str, dict[str, Any]] = {"master": {"raw": True}, "ema_0.9": {}, "ema_0.5": {"ema": 0.5}}
    for key, choice in choices.items():
        export(run, tmp_path / key, **choice)
        exported = torch.load(tmp_path / key / "weights.pt")
        expected = weights(run, key, step=4)
        assert exported.keys() == expected.keys() >= {"head.weight", "latent_mean"}
        assert all(torch.equal(exported[name], expected[name]) for name in expected)
        assert torch.equal(exported["latent_mean"], torch.full((3,), 0.1))
    assert not torch.equal(exported["embed.weight"], exported["embed.weight"].bfloat16().float())  # fp32 masters


def test_export_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no whole checkpoint found"):
        export(tmp_path, tmp_path / "out")


def test_bad_configurations(folder: Path) -> None:
    with pytest.raises(ConfigError, match="micro_batch_rows could be one of"):
        run_here(folder, "bad", training__micro_batch_rows=3)
    file = folder / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        run_here(folder, "file/run")
