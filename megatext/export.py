"""A run -> safetensors, config.json and tokenizer, on a CPU and without DeepSpeed."""

import argparse
import json
import tempfile
from pathlib import Path

from megatext.config import ConfigError, from_dict
from megatext.generation.lengths import write_lengths
from megatext.recipes import build_recipe, config_class
from megatext.training import checkpoint
from megatext.training.cost import write_cost
from megatext.training.ema import ema_key
from megatext.training.run_state import check_built_on


def export(
    run: Path, output: Path, *, raw: bool = False, ema: float | None = None, step: int | None = None
) -> tuple[Path, str]:
    """Write the model of a run's newest whole checkpoint (or that of `step`) to the directory `output`.

    The average of decay `ema`, by default the run's first one; the raw weights with `raw`, or where the run keeps no
    average. Returns the checkpoint that was read, and which weights were. Raises ConfigError.
    """
    path = _choose(run, step)
    reader = checkpoint.Reader(path)
    where = str(path / "meta.json")
    config = from_dict(config_class(reader.meta["config_class"]), reader.meta["config"], where)
    recipe = build_recipe(config)
    check_built_on(path, reader.meta["built_on"], recipe.built_on)
    decays = config.training.ema_decays
    if ema is not None and ema not in decays:
        raise ConfigError(f"{run} has no average of decay {ema}; it has {', '.join(map(str, decays)) or 'none'}")
    key = "master" if raw or not decays else ema_key(ema if ema is not None else decays[0])
    output.mkdir(parents=True, exist_ok=True)
    recipe.export(reader.state_dict(key), output)
    write_lengths(config.data, output)
    write_cost(config, recipe, reader.meta["step"], output)
    return path, "raw weights" if key == "master" else f"averaged weights (decay {key.removeprefix('ema_')})"


def export_cola(model: Path, output: Path) -> None:
    """Write an exported model in Cola DLM's format. Raises ConfigError, naming the fields, where it is another."""
    from megatext.generation import TextGenerator
    from megatext.nn.text_vae import TextVAE
    from megatext.recipes import cola_format

    if (kind := json.loads((model / "config.json").read_text()).get("kind")) != "text_dit":
        what = kind or "language model"
        raise ConfigError(f"--format cola-dlm is for runs of pretrain_cola.py and pretrain_dit.py; this is a {what}'s")
    generator = TextGenerator.from_pretrained(model)
    if not isinstance(generator.vae, TextVAE):
        raise ConfigError("--format cola-dlm has no words for LDLM's autoencoder")
    cola_format.check(generator.vae, generator.module.network, generator.flow)
    try:
        generator.tokenizer.save_json(output)
    except ValueError as error:
        raise ConfigError(f"Cola DLM's format needs a tokenizer.json: {error}") from None
    cola_format.write(generator.vae, generator.module.network, generator.flow, output)


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
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--ema", type=float, metavar="DECAY", nargs="?", help="the average of this decay; by default the run's first"
    )
    weights.add_argument("--raw", action="store_true", help="the last weights, not their average")
    parser.add_argument("--step", type=int, help="the checkpoint of this step instead of the newest")
    parser.add_argument(
        "--format",
        choices=("megatext", "cola-dlm"),
        default="megatext",
        help="cola-dlm: cola_dit/, cola_vae/ and tokenizer.json, as ByteDance-Seed/Cola-DLM reads them",
    )
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="megatext-export-") as folder:
        ours = arguments.output if arguments.format == "megatext" else Path(folder)
        path, which = export(arguments.run, ours, raw=arguments.raw, ema=arguments.ema, step=arguments.step)
        if arguments.format == "cola-dlm":
            export_cola(ours, arguments.output)
    print(f"exported the {which} of {path} to {arguments.output}")
