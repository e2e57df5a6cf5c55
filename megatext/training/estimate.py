"""What a run would cost, before it costs it: parameters, FLOPs, memory for each ZeRO stage, and one tiny step."""

import dataclasses
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from megatext.data.shards import TOKENIZER_FOLDER
from megatext.recipes import build_recipe, inputs_of, meta_module
from megatext.tokenizer import load_tokenizer
from megatext.training.engine import Processes, accumulation_steps, chosen_precision, deepspeed_json, start_processes
from megatext.training.metrics import duration, peak_tflops
from megatext.training.run_config import RunConfig
from megatext.training.trainer import train

QWEN3_VOCABULARY = 151_669
"""Entries of Qwen3's tokenizer, which the paper's presets are for."""
_GIB = 2**30


def flops_per_token(module: nn.Module) -> int:
    """Floating-point operations of a training step for each token: 6 for each weight of a matrix product.

    Attention's own products and recomputation under activation checkpointing are not counted; embeddings are looked
    up, so they count only where they are also the output head.
    """
    weights = 0
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    multiplied = {id(m.weight): m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear)}
    for parameter in module.parameters():
        if parameter.dim() >= 2 and (id(parameter) in multiplied or id(parameter) not in embeddings):
            weights += parameter.numel()
    return 6 * weights


def state_gib(parameters: int, *, stage: int, world: int, precision: str, ema: bool, muon: bool) -> float:
    """GiB a rank holds for weights, gradients, optimizer state and EMA; activations come on top.

    bf16: 2 bytes of weight, 4 of accumulated gradient, 4 of master weight; AdamW 8, Muon 4, EMA 4.
    """
    weight = 2 if precision == "bf16" else 4
    master = 0 if stage == 0 else 4
    state = (4 if muon else 8) + (4 if ema else 0) + master
    gradient = 4
    sharded_weight = weight / (world if stage == 3 else 1)
    sharded_gradient = gradient / (world if stage >= 2 else 1)
    sharded_state = state / (world if stage >= 1 else 1)
    return parameters * (sharded_weight + sharded_gradient + sharded_state) / _GIB


def describe(config: RunConfig, module: nn.Module, deepspeed_config: Path | None, world: int) -> str:
    """The report that --dry_run prints; `module` may be on the meta device. Raises ConfigError where the configuration
    cannot be run."""
    settings = deepspeed_json(config, deepspeed_config, world)
    chosen = settings["zero_optimization"].get("stage", 0)
    training = config.training
    parameters = sum(p.numel() for p in module.parameters())
    tokens = training.rows_per_step * config.data.row_tokens
    per_token = flops_per_token(module)
    total = per_token * tokens * config.max_steps
    lines = [
        f"parameters      {parameters:,} ({parameters / 2**20:.1f} x 2^20)",
        f"FLOPs           {per_token / 1e6:,.1f} M a token, {per_token * tokens / 1e12:,.2f} T a step, "
        f"{total:.2e} the run",
        f"tokens          {tokens:,} a step, {tokens * config.max_steps / 1e6:,.1f} M the run (padding included)",
        f"batch           {training.rows_per_step} rows of {config.data.row_tokens} tokens = {world} process(es) x "
        f"{accumulation_steps(config, world)} micro-batches x {training.micro_batch_rows} rows",
        "memory of the states, GiB a rank (activations come on top):",
    ]
    peak = peak_tflops(torch.device("cuda", 0)) if torch.cuda.is_available() else None
    if peak is not None:
        lines.insert(-1, f"time            {duration(total / (0.4 * peak * 1e12 * world))} at 40 % of this GPU's peak")
    for stage in (0, 1, 2, 3):
        if stage == 0 and training.precision == "bf16":
            continue
        gib = state_gib(
            parameters,
            stage=stage,
            world=world,
            precision=training.precision,
            ema=training.ema_decay is not None,
            muon=config.optimizer.name == "muon",
        )
        mark = "  <- this run" if stage == chosen else ""
        lines.append(f"  ZeRO stage {stage}  {gib:9.3f}{mark}")
    return "\n".join(lines)


def dry_run(config: RunConfig, deepspeed_config: Path | None) -> None:
    """Print what the run costs, then train one step on one row a process in a temporary run directory.

    The cost needs no shards and no memory for the weights: where what the run reads is not there yet, it is told for
    Qwen3's vocabulary, and no step is tried. Every process of the run calls it.
    """
    processes = start_processes()
    precision = chosen_precision(config.training.precision, processes)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, precision=precision))
    tokenizer = Path(config.data.shards) / TOKENIZER_FOLDER
    vocab_size = load_tokenizer(tokenizer).vocab_size if tokenizer.is_dir() else QWEN3_VOCABULARY
    module = meta_module(config, vocab_size)
    absent = [path for path in inputs_of(config) if not Path(path).is_dir()]
    if processes.is_main:
        print(f"vocabulary      {vocab_size:,}{'' if tokenizer.is_dir() else ' (Qwen3, as there are no shards yet)'}")
        print(describe(config, module, deepspeed_config, processes.world), flush=True)
        if absent:
            print(f"dry run: no step was tried, {' and '.join(absent)} being absent", flush=True)
    if not absent:
        _one_step(config, deepspeed_config, processes)


def _one_step(config: RunConfig, deepspeed_config: Path | None, processes: Processes) -> None:
    with tempfile.TemporaryDirectory(prefix="megatext-dry-run-") as own:
        folders = [own]
        dist.broadcast_object_list(folders, src=0)
        tiny = dataclasses.replace(
            config,
            run_dir=folders[0],
            max_steps=1,
            training=dataclasses.replace(
                config.training, rows_per_step=processes.world, micro_batch_rows=1, compile=False, validation_batches=0
            ),
            logging=dataclasses.replace(config.logging, wandb_project=None),
        )
        train(tiny, build_recipe(tiny), deepspeed_config)
    if processes.is_main:
        print("dry run: one step on one row a process worked", flush=True)
