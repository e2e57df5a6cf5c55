"""A run -> safetensors, config.json and tokenizer, on a CPU and without DeepSpeed."""

import argparse
from pathlib import Path

from megatext.config import ConfigError, from_dict
from megatext.recipes import build_recipe, config_class
from megatext.training import checkpoint
from megatext.training.run_state import check_built_on


def export(run: Path, output: Path, *, ema: bool = False, step: int | None = None) -> Path:
    """Write the model of a run's newest whole checkpoint (or that of `step`) to the directory `output`.

    `ema` exports the averaged weights. Returns the checkpoint that was read. Raises ConfigError.
    """
    path = _choose(run, step)
    reader = checkpoint.Reader(path)
    if ema and not reader.has("ema"):
        raise ConfigError(f"{path} has no averaged weights (training.ema_decay was null); export without --ema")
    where = str(path / "meta.json")
    config = from_dict(config_class(reader.meta["config_class"]), reader.meta["config"], where)
    recipe = build_recipe(config)
    check_built_on(path, reader.meta.get("built_on", {}), recipe.built_on)
    output.mkdir(parents=True, exist_ok=True)
    recipe.export(reader.state_dict("ema" if ema else "master"), output)
    return path


def _choose(run: Path, step: int | None) -> Path:
    found = checkpoint.list_checkpoints(run)
    if step is not None:
        found = [path for path in found if path == checkpoint.checkpoint_path(run, step)]
    for path in reversed(found):
        try:
            checkpoint.verify(path)
            return path
        except checkpoint.DamagedCheckpoint as error:
            print(f"warning: {error}")
    wanted = f"checkpoint of step {step}" if step is not None else "whole checkpoint"
    raise ConfigError(f"{run / 'checkpoints'}: no {wanted} found; is this the run_dir of a run that has saved?")


def main(argv: list[str]) -> None:
    """The command line of launch/export.py."""
    parser = argparse.ArgumentParser(
        prog="launch/export.py", description="A run -> a model directory.", allow_abbrev=False
    )
    parser.add_argument("--run", type=Path, required=True, help="the run_dir")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--ema", action="store_true", help="export the averaged weights")
    parser.add_argument("--step", type=int, help="the checkpoint of this step instead of the newest")
    arguments = parser.parse_args(argv)
    path = export(arguments.run, arguments.output, ema=arguments.ema, step=arguments.step)
    print(f"exported {path} to {arguments.output}" + (" (averaged weights)" if arguments.ema else ""))
