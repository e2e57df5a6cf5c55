"""Every recipe, killed and resumed, is the run it would have been."""

from pathlib import Path
from typing import Any

import pytest

from megatext.export import export
from megatext.training import checkpoint
from tests.processes import run_all
from tests.recipes.systems import SYSTEMS, command, pretrain, write_cola_vae
from tests.training.comparison import assert_same_run, losses
from tests.training.toy import records


@pytest.fixture(scope="module")
def base(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("vae")
    base = {"data": {"shards": str(shards), "row_tokens": 32, "max_tokens": 32}, "vae": str(directory / "model")}
    pretrain(["lm", "vae"], 1, directory, base)
    export(directory / "lm", directory / "model_lm")
    export(directory / "vae", directory / "model")
    write_cola_vae(directory / "model_cola", shards)
    return base


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("precision", "world", "steps", "kind"), [("fp32", 1, 40, "step"), ("bf16", 2, 20, "save")])
def test_killed_and_resumed_equals_uninterrupted(
    precision: str, world: int, steps: int, kind: str, base: dict[str, Any], tmp_path: Path
) -> None:
    """40 steps in one go are 24, a kill -9 in a step or in a save, and 16 more, over many epochs: bit for bit. (Half
    of it, and the systems that train several networks, where a step is slow: bf16 on a CPU, two ranks; the toy's tests
    take 100.)"""
    names = list(SYSTEMS) if world == 1 else ["blocks", "cola", "ldlm"]
    every = steps // 5
    options = [f"--training.precision={precision}", f"--max_steps={steps}", f"--save_every_steps={every}"]
    options += ["--training.validation_batches=" + ("1" if world == 1 else "0")]
    accident = f"--accident={kind}:{4 * every - (kind == 'step')}"  # the checkpoint at 3/5 is the last whole one
    commands = []
    for name in names:
        commands.append(command(name, tmp_path / "whole", base, *options))
        killed = command(name, tmp_path / "killed", base, *options)
        commands += [[*killed, accident], killed]
    assert run_all(world, commands) == [0, -9, 0] * len(names)
    for name in names:
        run, reference = tmp_path / "killed" / name, tmp_path / "whole" / name
        assert len(losses(reference)) == steps
        assert_same_run(run, reference, 0.0, step=steps)
        assert max(line.get("epoch", 0) for line in records(run)) > 2
        if name == "ldlm":  # its sampler has seen losses, or equal states would say nothing of it
            found = checkpoint.Reader(checkpoint.checkpoint_path(run, steps)).buffers["denoiser.timesteps.loss_count"]
            assert float(found.sum()) > 1
