"""100 steps in one go are 60, a kill -9, and 40 more: bit for bit, whatever the run is."""

import math
from pathlib import Path

import pytest

from megatext.training import checkpoint
from tests.processes import run_all
from tests.training import toy
from tests.training.comparison import assert_same_run, losses

STEPS, SAVED = 100, 20
ACCIDENTS = ("step:73", "save:80")  # both leave the checkpoint of step 60
KINDS = [
    ("fp32", "[]", "adamw"),
    ("fp32", "[0.9, 0.5]", "muon"),
    ("bf16", "[0.9, 0.5]", "adamw"),
    ("bf16", "[]", "muon"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume")
    toy.write_toy_config(path)
    return path


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("world", "kinds"), [(1, KINDS), (2, [KINDS[0], KINDS[2]])])
def test_killed_and_resumed_equals_uninterrupted(folder: Path, world: int, kinds: list[tuple[str, str, str]]) -> None:
    """4 or 2 micro-batches a step, in fp32 and in bf16, with averages and without, AdamW and Muon, killed in the middle
    of a step and in the middle of a save."""
    commands, runs = [], []
    for number, (precision, decays, optimizer) in enumerate(kinds):
        options = {
            "max_steps": STEPS,
            "save_every_steps": SAVED,
            "training__precision": precision,
            "training__ema_decays": decays,
            "optimizer__name": optimizer,
            "training__keep_last": 1,
        }
        reference, killed = f"{world}-{number}-whole", f"{world}-{number}-killed"
        accident = ACCIDENTS[(number + world) % 2]
        commands.append(toy.command(folder, reference, **options))
        commands.append([*toy.command(folder, killed, **options), f"--accident={accident}"])
        commands.append(toy.command(folder, killed, **options))
        runs.append((folder / killed, folder / reference))
    statuses = run_all(world, commands)
    assert statuses == [0, -9, 0] * len(kinds)
    for killed_run, reference_run in runs:
        assert len(losses(reference_run)) == STEPS and losses(reference_run)[-1] < losses(reference_run)[0]
        assert_same_run(killed_run, reference_run, 0.0, step=STEPS)
        assert not list((killed_run / "checkpoints").glob(".unfinished-*"))


@pytest.mark.dist
def test_resumed_in_the_step_that_an_epoch_ends_in(folder: Path) -> None:
    assert run_all(1, [toy.command(folder, "epochs", max_steps=60)]) == [0]
    epochs = [line["epoch"] for line in toy.records(folder / "epochs") if "loss" in line]
    last = next(step for step, epoch in enumerate(epochs, 1) if math.floor(epoch) < math.floor(epochs[step]))
    assert 5 < last < 55 and epochs[last - 1] % 1 > 0.9  # the next step reads the end of one epoch and another's start
    options = {"max_steps": 60, "save_every_steps": last}
    commands = [toy.command(folder, "boundary", **options)] * 2
    commands[0] = [*commands[0], f"--accident=step:{last + 1}"]
    assert run_all(1, commands) == [-9, 0]
    assert_same_run(folder / "boundary", folder / "epochs", 0.0, step=60)


@pytest.mark.dist
@pytest.mark.parametrize(("first", "second"), [(2, 1), (2, 4)])
def test_resumed_on_another_number_of_ranks(folder: Path, first: int, second: int) -> None:
    """The same samples in the same order: 6 steps on some ranks, killed in the 8th, 4 more on others."""
    name, reference = f"elastic-{first}-{second}", "elastic-reference"
    if not (folder / reference).exists():
        assert run_all(1, [toy.command(folder, reference)]) == [0]
    assert run_all(first, [[*toy.command(folder, name), "--accident=step:8"]]) == [-9]
    assert checkpoint.list_checkpoints(folder / name)[-1].name == "step-00000006"
    assert run_all(second, [toy.command(folder, name)]) == [0]
    assert_same_run(folder / name, folder / reference, 1e-5)
