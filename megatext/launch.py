"""The program behind every launch/pretrain_*.py: read the configuration, build its recipe, train; or tell the cost."""

import dataclasses
import os
import sys
import tempfile
from pathlib import Path

from megatext.config import cli_errors, load_config
from megatext.config_help import usage
from megatext.data.remote import local_folder
from megatext.data.shards import TOKENIZER_FOLDER
from megatext.recipes import build_recipe, config_class, needed_by
from megatext.tokenizer import load_tokenizer
from megatext.training.run_config import RunConfig


def launch(config_name: str, argv: list[str]) -> None:
    """Train what `argv` configures, a `config_name` of the registry of recipes. Every process of the run calls it."""
    if {"-h", "--help"} & set(argv):
        if os.environ.get("RANK", "0") == "0":
            print(usage(Path(sys.argv[0]).name, config_class(config_name)))
        return
    with cli_errors():
        config, flags = load_config(config_class(config_name), argv)
        if flags.dry_run:
            dry_run(config, flags.deepspeed_config)
        else:
            from megatext.training.trainer import train

            train(config, build_recipe(config), flags.deepspeed_config)


def dry_run(config: RunConfig, deepspeed_config: Path | None) -> None:
    """Print what the run costs, then train one step on one row a process, of which nothing is kept.

    The cost needs no shards and no memory for the weights: where what the run reads is not there yet, it is told for
    Qwen3's vocabulary, and no step is tried. Every process of the run calls it.
    """
    import torch.distributed as dist

    from megatext.training.deepspeed_json import free_part
    from megatext.training.engine import start_processes
    from megatext.training.estimate import describe
    from megatext.training.trainer import Trainer, with_precision

    processes = start_processes()
    config = with_precision(config, processes)
    tokenizer = local_folder(config.data.shards) / TOKENIZER_FOLDER
    presumed, vocab_size = config.vocabulary
    told = f" ({presumed}, as there are no shards yet)"
    if tokenizer.is_dir():
        vocab_size, told = load_tokenizer(tokenizer).vocab_size, ""
    text = describe(config, vocab_size, deepspeed_config, processes.world)
    absent = [path for path in needed_by(config) if not Path(path).is_dir()]
    if processes.is_main:
        print(f"vocabulary      {vocab_size:,}{told}")
        if models := [path for path in absent if path not in (*config.data.folders(), *config.data.states())]:
            print(f"presumed        {config.presumed_model}, as {' and '.join(models)} is not there yet")
        print(text, flush=True)
    if absent:
        if processes.is_main:
            print(f"dry run: no step was tried, {' and '.join(absent)} being absent", flush=True)
        return
    one_row = dataclasses.replace(
        config.training, rows_per_step=processes.world, micro_batch_rows=1, compile=False, validation_batches=0
    )
    with tempfile.TemporaryDirectory(prefix="megatext-dry-run-") as folder:  # what rank 0 logs
        folders = [folder]
        dist.broadcast_object_list(folders, src=0)
        tiny = dataclasses.replace(
            config,
            run_dir=folders[0],
            max_steps=1,
            training=one_row,
            logging=dataclasses.replace(config.logging, wandb_project=None),
        )
        Trainer(tiny, build_recipe(tiny), free_part(deepspeed_config), processes).loop()
        dist.barrier()
    if processes.is_main:
        print("dry run: one step on one row a process worked", flush=True)
