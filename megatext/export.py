"""A run -> safetensors, config.json and tokenizer, on a CPU and without DeepSpeed."""

import argparse
from pathlib import Path

from megatext.config import ConfigError, from_dict
from megatext.recipes import build_recipe, config_class
from megatext.training import checkpoint
from megatext.training.run_state import check_built_on


def export(run: Path, output: Path, *, raw: bool = False, step: int | None = None) -> Path:
    """Write the model of a run's newest whole checkpoint (or that of `step`) to the directory `output`.

    The averaged weights where the run has them, the raw ones with `raw`. Returns the checkpoint that was read. Raises
    ConfigError.
    """
    path = _choose(run, step)
    reader = checkpoint.Reader(path)
    where = str(path / "meta.json")
    config = from_dict(config_class(reader.meta["config_class"]), reader.meta["config"], where)
    recipe = build_recipe(config)
    check_built_on(path, reader.meta.get("built_on", {}), recipe.built_on)
    output.mkdir(parents=True, exist_ok=True)
    recipe.export(reader.state_dict("ema" if reader.has("ema") and not raw else "master"), output)
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
    parser.add_argument("--raw", action="store_true", help="the last weights, not their average")
    parser.add_argument("--step", type=int, help="the checkpoint of this step instead of the newest")
    arguments = parser.parse_args(argv)
    path = export(arguments.run, arguments.output, raw=arguments.raw, step=arguments.step)
    print(f"exported {path} to {arguments.output}")
