"""What goes wrong in the middle of a run: steps that are not finite, ranks that hang, ranks that differ."""

import re
import signal
import sys
from pathlib import Path

import pytest
import torch

from megatext.training.guards import NonFiniteError
from megatext.training.watchdog import HANG_EXIT_CODE
from tests.processes import run_ranks
from tests.training import toy
from tests.training.comparison import losses, weights
from tests.training.test_trainer import FILES, folder, one_thread, run_here, zero0

__all__ = ["folder", "one_thread", "zero0"]


@pytest.mark.parametrize("stage", [0, 1])
def test_non_finite_step_is_skipped_named_and_counted(
    folder: Path, zero0: str, stage: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_here(folder, f"nan{stage}", None if stage else zero0, nan_at_steps=[4], max_steps=6)
    shown = capsys.readouterr().out
    assert (
        "step 4 skipped (skipped so far: 1): rank 0: loss nan in micro-batch 0, first not finite: the output" in shown
    )
    assert "blocks.0" in shown and "documents train-" in shown
    lines = [line for line in toy.records(run) if "skipped_steps" in line]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 1, 1, 1]
    before, after = weights(run, step=3), weights(run, step=6)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert not torch.equal(before["embed.weight"], after["embed.weight"])


def test_schedule_and_average_wait_for_applied_steps(folder: Path) -> None:
    """A skipped step leaves no trace but its number: the next uses its learning rate."""
    skipped, whole = (
        run_here(folder, name, nan_gradient_at_steps=steps, save_every_steps=1, training__keep_last=20)
        for name, steps in (("skipped", [1, 4]), ("unskipped", []))
    )
    rates = [[line["learning_rate"] for line in toy.records(run) if "loss" in line] for run in (skipped, whole)]
    assert rates[0] == [rates[1][i] for i in (0, 0, 1, 2, 2, 3, 4, 5, 6, 7)]
    for key in ("master", "ema_0.9", "ema_0.5"):
        before, after = weights(skipped, key, step=3), weights(skipped, key, step=4)
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("stage", ["zero1.json", "zero3.json"])
def test_a_gradient_that_is_not_finite_is_named(folder: Path, stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_here(folder, f"gradient-{stage}", stage, nan_gradient_at_steps=[2], max_steps=4)
    shown = capsys.readouterr().out
    place = "first not finite: the gradient that arrives at blocks.0; documents train-"
    assert re.search(rf"step 2 skipped .*: rank 0: loss \d\.\d+ in micro-batch 0, {place}", shown), shown


@pytest.mark.dist
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_the_rank_is_named(folder: Path, stage: str) -> None:
    """Two ranks, of which one has the bad sample: both skip, and go on as if it had not been there."""
    options = {"nan_gradient_at_steps": [3], "accident_rank": 1, "max_steps": 5}
    command = [*toy.command(folder, f"named-{stage}", **options), f"--deepspeed_config={FILES / stage}.json"]
    result = run_ranks(2, [sys.executable, *command])
    assert result.returncode == 0, result.stdout
    assert "step 3 skipped (skipped so far: 1): rank 1: loss " in result.stdout
    assert "first not finite: the gradient that arrives at blocks.0" in result.stdout
    assert len(losses(folder / f"named-{stage}")) == 5


def test_non_finite_steps_in_a_row_stop_the_run(folder: Path) -> None:
    with pytest.raises(NonFiniteError, match="2 steps in a row"):
        run_here(folder, "nans", nan_at_steps=[2, 3], training__skipped_steps_limit=2)


def test_the_policy_may_be_to_stop(folder: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step 2 skipped .* training.on_non_finite is stop"):
        run_here(folder, "stop", nan_at_steps=[2], training__on_non_finite="stop")


@pytest.mark.dist
def test_a_rank_that_hangs_ends_the_run_with_the_stacks_of_all(folder: Path) -> None:
    options = {"sleep_at_step": 3, "accident_rank": 1, "training__hang_timeout_seconds": 6}
    result = toy.start(2, folder, "hang", **options)
    assert result.returncode == HANG_EXIT_CODE, result.stdout
    stacks = [(folder / "hang" / "stacks" / f"rank-0000{rank}.txt").read_text() for rank in (0, 1)]
    for rank, stack in enumerate(stacks):
        told = f"rank {rank} (pid "
        assert stack.startswith(told) and "has finished nothing for 6 s, since step 2" in stack
        assert told in result.stdout and f"rank-0000{rank}.txt" in result.stdout
    assert "in prepare" in stacks[1] and "all_reduce" not in stacks[1]
    assert "all_reduce" in stacks[0]


@pytest.mark.dist
def test_ranks_that_run_different_things_are_refused(folder: Path) -> None:
    command = " ".join(["exec", sys.executable, *toy.command(folder, "differ")])
    result = run_ranks(2, ["bash", "-c", command + " --optimizer.learning_rate=0.0${RANK}1"])
    assert result.returncode == 1
    assert "rank 1 has another configuration than rank 0: optimizer.learning_rate 0.011 and 0.001" in result.stdout


@pytest.mark.dist
@pytest.mark.parametrize(("world", "number"), [(1, signal.SIGUSR1), (2, signal.SIGTERM)])
def test_a_signal_to_one_rank_saves_and_asks_to_be_requeued(folder: Path, world: int, number: int) -> None:
    from megatext.training import checkpoint
    from megatext.training.signals import REQUEUE_EXIT_CODE

    options = {"signal_at_step": 4, "signal_number": int(number), "accident_rank": world - 1}
    result = toy.start(world, folder, f"signalled{world}", **options)
    assert result.returncode == REQUEUE_EXIT_CODE, result.stdout
    assert checkpoint.list_checkpoints(folder / f"signalled{world}")[-1].name == "step-00000004"
