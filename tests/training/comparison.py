"""Whether two runs are the same run."""

from pathlib import Path

import pytest
import torch

from megatext.training import checkpoint
from tests.training.toy import records


def losses(run: Path) -> list[float]:
    """Of every logged step."""
    return [line["loss"] for line in records(run) if "loss" in line]


def weights(run: Path, key: str = "master", step: int = 10) -> dict[str, torch.Tensor]:
    """From a checkpoint."""
    return checkpoint.Reader(checkpoint.checkpoint_path(run, step)).state_dict(key)


def assert_same_run(run: Path, reference: Path, tolerance: float, step: int = 10) -> None:
    """Losses of all steps, and all that their checkpoints of `step` hold, to a relative and absolute tolerance; 0: bit
    for bit."""
    assert losses(run) == pytest.approx(losses(reference), rel=tolerance, abs=0)
    mine, theirs = (checkpoint.Reader(checkpoint.checkpoint_path(path, step)) for path in (run, reference))
    assert mine.keys == theirs.keys and "master" in mine.keys
    for name in ("sample", "step", "adam_step", "ema_updates", "skipped_steps", "tokens"):
        assert mine.scalars[name] == theirs.scalars[name], name
    for key in mine.keys:
        if key in ("exp_avg", "exp_avg_sq", "momentum"):  # not of all parameters
            if tolerance == 0:
                pairs = [pair for x, y in zip(mine.ranks, theirs.ranks, strict=True) for pair in _pairs(x, y, key)]
                assert pairs and all(torch.equal(a, b) for a, b in pairs), key
            continue
        a, b = mine.state_dict(key), theirs.state_dict(key)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


def _pairs(mine: dict, theirs: dict, key: str) -> list[tuple[torch.Tensor, torch.Tensor]]:  # type: ignore[type-arg]
    both = zip(mine["flat"][key], theirs["flat"][key], strict=True)
    return [(a, b) for a, b in both if a is not None or b is not None]
