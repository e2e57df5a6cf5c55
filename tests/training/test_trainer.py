"""The trainer as its users meet it: whole runs on one and two processes, killed, resumed, damaged, exported."""

import fcntl
import json
import resource
import shutil
import signal
import threading
import types
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
from megatext.training.cost import total_flops
from megatext.training.run_state import check_built_on
from megatext.training.trainer import train
from megatext.training.validation import read_held_out
from tests.processes import run_all
from tests.training import toy
from tests.training.comparison import assert_same_run, weights

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


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2, 4])
def test_averages_equal_unsharded_ones(folder: Path, reference: Path, world: int) -> None:
    """Two decays at once, computed here from the weights of every step."""
    run = reference
    if world > 1:
        run = folder / f"ema{world}"
        command = toy.command(folder, run.name, save_every_steps=1, training__keep_last=20)
        assert run_all(
            world, [[*command, f"--deepspeed_config={FILES / ('zero3.json' if world == 2 else 'zero1.json')}"]]
        ) == [0]
    config, _ = load_config(toy.ToyConfig, ["--config", str(folder / "toy.yaml")])
    start = {name: p.detach().double() for name, p in toy.ToyRecipe(config).module.named_parameters()}
    steps = {step: weights(run, step=step) for step in range(1, 11)}
    for longest in (0.9, 0.5):
        average = start
        for step, now in steps.items():
            decay = min(longest, step / (9 + step))
            average = {name: decay * value + (1 - decay) * now[name].double() for name, value in average.items()}
        kept = weights(run, f"ema_{longest}")
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


def test_figures_of_a_shorter_run_are_not_those_of_its_continuation(folder: Path) -> None:
    """A run that was continued and stopped by a signal in its very last step still has to be finished."""
    run = run_here(folder, "extended", max_steps=4)
    with pytest.raises(SystemExit):
        run_here(folder, "extended", max_steps=6, signal_at_step=6, signal_number=int(signal.SIGUSR1))
    assert json.loads((run / "finished.json").read_text())["step"] == 4
    run_here(folder, "extended", max_steps=6)
    assert json.loads((run / "finished.json").read_text())["step"] == 6


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "no marker", "broken marker", "foreign marker"])
def test_damaged_checkpoints_fall_back(
    folder: Path, reference: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / f"damaged {damage}"
    shutil.copytree(reference, run)
    for step in (8, 9, 10):
        path = checkpoint.checkpoint_path(run, step)
        content = bytearray((path / "rank-00000.pt").read_bytes())
        if damage == "flipped":
            content[len(content) // 2] ^= 1
            (path / "rank-00000.pt").write_bytes(content)
        elif damage == "truncated":
            (path / "rank-00000.pt").write_bytes(content[:-100])
        elif damage == "missing":
            (path / "rank-00000.pt").unlink()
        elif damage == "no marker":
            (path / "COMPLETE").unlink()
        elif damage == "broken marker":
            (path / "COMPLETE").write_text('{"files": {"rank-0')
        else:
            shutil.copy(checkpoint.checkpoint_path(run, 1) / "COMPLETE", path)
    run_here(folder, run.name)
    shown = capsys.readouterr().out
    assert shown.count("; trying the checkpoint before it") == 3
    assert f"warning: {checkpoint.checkpoint_path(run, 10)}" in shown and "at step 7" in shown
    assert_same_run(run, reference, 0.0)


def test_a_marker_that_names_too_little_is_no_marker(folder: Path, reference: Path) -> None:
    path = folder / "few" / "step-00000010"
    shutil.copytree(checkpoint.checkpoint_path(reference, 10), path)
    listed = json.loads((path / "COMPLETE").read_text())["files"]
    del listed["rank-00000.pt"]
    (path / "COMPLETE").write_text(json.dumps({"files": listed}))
    with pytest.raises(checkpoint.DamagedCheckpoint, match="rank-00000.pt is in one of them only"):
        checkpoint.verify(path)


def test_what_is_kept(folder: Path) -> None:
    run = run_here(folder, "kept", save_every_steps=1, training__keep_last=2, training__keep_every_steps=4)
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(run)] == [4, 8, 9, 10]


def test_a_run_that_went_back_keeps_what_it_writes(folder: Path, reference: Path) -> None:
    """Behind damaged checkpoints 8 to 10 it saves 8 again, and does not take the damaged ones for newer."""
    run = folder / "went back"
    shutil.copytree(reference, run)
    for step in (8, 9, 10):
        (checkpoint.checkpoint_path(run, step) / "rank-00000.pt").unlink()
    run_here(folder, run.name, max_steps=9, save_every_steps=8, training__keep_last=1)
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(run)] == [9]
    checkpoint.verify(checkpoint.checkpoint_path(run, 9))


def test_an_average_may_begin_later(folder: Path, reference: Path) -> None:
    """Resumed with other decays: those that were kept go on, a new one starts from the weights of then."""
    run = folder / "later"
    shutil.copytree(reference, run)
    for step in range(5, 11):
        shutil.rmtree(checkpoint.checkpoint_path(run, step))
    run_here(folder, run.name, training__ema_decays=[0.9, 0.7])
    keys = checkpoint.Reader(checkpoint.checkpoint_path(run, 10)).keys
    assert {"ema_0.7", "ema_0.9"} <= {*keys} and "ema_0.5" not in keys
    kept, expected = weights(run, "ema_0.9"), weights(reference, "ema_0.9")
    assert all(torch.equal(kept[name], expected[name]) for name in kept)
    average = {name: value.double() for name, value in weights(reference, step=4).items()}
    for step in range(5, 11):
        decay = min(0.7, step / (9 + step))
        now = weights(reference, step=step)
        average = {name: decay * value + (1 - decay) * now[name].double() for name, value in average.items()}
    begun = weights(run, "ema_0.7")
    for name in average.keys() - {"latent_mean"}:  # a buffer
        torch.testing.assert_close(begun[name].double(), average[name], rtol=0, atol=1e-6)


def test_training_goes_on_while_a_checkpoint_is_written(
    folder: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write of step 3 waits for step 5, and is of step 3 all the same."""
    write, in_step_5 = checkpoint.write, threading.Event()
    taken = []

    def slow(path: Path, *rest: Any) -> None:
        if path.name == "step-00000003":
            taken.append(in_step_5.wait(timeout=60))
        write(path, *rest)

    def prepare(self: toy.ToyRecipe, *args: Any, step: int, **options: Any) -> Any:
        if step == 4:
            in_step_5.set()
        return original(self, *args, step=step, **options)

    original = toy.ToyRecipe.prepare
    monkeypatch.setattr(checkpoint, "write", slow)
    monkeypatch.setattr(toy.ToyRecipe, "prepare", prepare)
    run = run_here(folder, "beside", training__keep_last=20)
    assert taken == [True]
    for key in ("master", "ema_0.9", "momentum"):
        theirs = checkpoint.Reader(checkpoint.checkpoint_path(reference, 3)).ranks[0]["flat"][key]
        mine = checkpoint.Reader(checkpoint.checkpoint_path(run, 3)).ranks[0]["flat"][key]
        assert all(a is b or torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("factor", [1.001, 0.5, float("nan")])
def test_probe_loss_refuses_foreign_weights(folder: Path, reference: Path, factor: float) -> None:
    run = folder / f"foreign{factor}"
    shutil.copytree(reference, run)
    path = checkpoint.checkpoint_path(run, 10)
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {"probe_loss": factor * meta["probe_loss"]}))
    listed = json.loads((path / "COMPLETE").read_text())
    listed["files"]["meta.json"] = checkpoint._fingerprint(path / "meta.json")
    (path / "COMPLETE").write_text(json.dumps(listed))
    with pytest.raises(ConfigError, match="probe batch"):
        run_here(folder, run.name, max_steps=11)


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


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_nothing_half_written(
    folder: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first failure, beside the training, is a warning: the disk may have room again; the second is the end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(DataError, match=r"step-00000006 could not be written: rank 0: .*start the same"):
            run_here(folder, "full")
        with pytest.raises(DataError, match=r"step-00000003 could not be written: rank 0: .*start the same"):
            run_here(folder, "full", training__async_save=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "warning: the checkpoint" in capsys.readouterr().out
    assert not list((folder / "full" / "checkpoints").iterdir())
    assert_same_run(run_here(folder, "full"), reference, 0.0)


def test_space_is_looked_for_before_it_is_written_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    monkeypatch.setattr(checkpoint.torch, "save", lambda *args: written.append(args))
    with pytest.raises(DataError, match=r"it takes 0.00 GiB and 0.00 GiB are free"):
        run_here(folder, "no space", training__async_save=False)
    assert not written


def test_other_models_than_those_trained_on_are_refused() -> None:
    check_built_on(Path("here"), {"dit.vae": "a"}, {"dit.vae": "a", "dit.warm_start": "b"})
    with pytest.raises(ConfigError, match=r"here: was trained on another dit\.vae"):
        check_built_on(Path("here"), {"dit.vae": "a"}, {"dit.vae": "b"})


def test_bf16_keeps_statistics_exact_and_exports(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(recipes._MODULES, "ToyConfig", "tests.training.toy")
    run = run_here(folder, "bf16", training__precision="bf16", max_steps=4)
    choices: dict[str, dict[str, Any]] = {"master": {"raw": True}, "ema_0.9": {}, "ema_0.5": {"ema": 0.5}}
    for key, choice in choices.items():
        export(run, tmp_path / key, **choice)
        exported = torch.load(tmp_path / key / "weights.pt")
        expected = weights(run, key, step=4)
        assert exported.keys() == expected.keys() >= {"head.weight", "latent_mean"}
        assert all(torch.equal(exported[name], expected[name]) for name in expected)
        assert torch.equal(exported["latent_mean"], torch.full((3,), 0.1))
        # 4 steps of 8 rows of 32 tokens: forward and twice as much backward
        assert total_flops(tmp_path / key) == 3 * 2 * (2 * 2 * 24 * 72 + 24 * 61) * 32 * 8 * 4
    assert not torch.equal(exported["embed.weight"], exported["embed.weight"].bfloat16().float())  # fp32 masters


def test_export_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no whole checkpoint found"):
        export(tmp_path, tmp_path / "out")


def test_one_run_at_a_time_in_a_directory(folder: Path) -> None:
    (folder / "busy").mkdir()
    with open(folder / "busy" / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="busy: another run is at work there"):
            run_here(folder, "busy", max_steps=1)
    run_here(folder, "busy", max_steps=1)
    run_here(folder, "busy", max_steps=2)  # it has let go


def test_validation_rows_are_the_same_for_every_batch(folder: Path) -> None:
    batches = []
    for rows in (4, 8):
        own = {"rows_per_step": rows, "micro_batch_rows": 4, "validation_rows": 4}
        options = [f"--training.{key}={value}" for key, value in own.items()]
        config, _ = load_config(toy.ToyConfig, ["--config", str(folder / "toy.yaml"), *options])
        batches.append(read_held_out(config, config.data, world=1)[0])
    assert len(batches[0]) == len(batches[1])
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.row_index, other.row_index)
    with pytest.raises(ConfigError, match="training.validation_rows 4 is not a multiple of 3 process"):
        read_held_out(config, config.data, world=3)


def test_bad_configurations(folder: Path) -> None:
    with pytest.raises(ConfigError, match="micro_batch_rows could be one of"):
        run_here(folder, "bad", training__micro_batch_rows=3)
    file = folder / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        run_here(folder, "file/run")
