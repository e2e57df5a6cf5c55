"""What a run would cost, before it costs it: parameters, FLOPs, memory for each ZeRO stage, and one tiny step."""

from pathlib import Path

import torch
from torch import nn

from megatext.training.deepspeed_json import deepspeed_json
from megatext.training.engine import accumulation_steps
from megatext.training.metrics import duration, peak_tflops
from megatext.training.run_config import RunConfig

QWEN3_VOCABULARY = 151_669
"""Entries of Qwen3's tokenizer, which the paper's presets are for."""
_GIB = 2**30


def flops_per_token(module: nn.Module) -> int:
    """Floating-point operations of a training step for each token: 6 for each weight of a matrix product.

    Attention's own products, recomputation under activation checkpointing, and second passes of a token (clean copies,
    noisy copies, self-conditioning) are not counted; embeddings are looked
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
            ema=training.ema_decays,
            muon=config.optimizer.name == "muon",
        )
        mark = "  <- this run" if stage == chosen else ""
        lines.append(f"  ZeRO stage {stage}  {gib:9.3f}{mark}")
    return "\n".join(lines)
