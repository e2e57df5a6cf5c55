"""What a run would cost, before it costs it: parameters, FLOPs, memory for each ZeRO stage."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from megatext.recipes import meta_module, passes_of
from megatext.training.deepspeed_json import deepspeed_json
from megatext.training.engine import accumulation_steps
from megatext.training.memory import group_sizes, persistent_parameters, state_bytes
from megatext.training.metrics import duration, peak_tflops
from megatext.training.optimizer import build_optimizer
from megatext.training.run_config import RunConfig

PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.baddbmm.default,
}
"""What all matrix products become; their operands come last."""
SAVING_NOTHING = {
    torch.ops.aten.add.Tensor,
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.t.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.detach.default,
}
"""What may follow the last product of a block without needing its result in the backward pass."""


@dataclass(frozen=True)
class RowFlops:
    """Floating-point operations of a training step for each row of `data.row_tokens` tokens.

    Matrix products, attention over the whole row included (FlexAttention, which skips what the mask rules out, does
    less); not the optimizer, whose share falls with the batch.
    """

    model: float
    """Forward and backward passes of what is trained: what MFU is measured by."""
    recomputed: float
    """Once more in the backward pass, by activation checkpointing."""
    frozen: float
    """Forward passes of frozen networks."""

    @property
    def total(self) -> float:
        return self.model + self.recomputed + self.frozen


def row_flops(config: RunConfig, module: nn.Module, vocab_size: int) -> RowFlops:
    """Counted in one forward pass of `module`, a meta_module: no memory, no arithmetic, a second or two."""
    module.train()
    trained = frozen = recomputed = 0.0
    for one in passes_of(config, module, vocab_size):
        with torch.device("meta"), torch.set_grad_enabled(one.trained), _plain_linear(), _Counter() as counter:
            one.run()
        recomputed += one.share * counter.recomputed
        if one.trained:
            trained += one.share * counter.total
        else:
            frozen += one.share * counter.total
    return RowFlops(trained, recomputed, frozen)


@contextmanager
def _plain_linear() -> Iterator[None]:
    """torch's own linear: under ZeRO-3 DeepSpeed puts a function in its place that runs without gradients on, so that
    its backward pass would not be counted."""
    replaced = functional.linear
    functional.linear = torch._C._nn.linear
    try:
        yield
    finally:
        functional.linear = replaced


class _Counter(TorchDispatchMode):
    """Counts a forward pass, and with it the backward pass that it will need: the gradient of each operand of a matrix
    product is another product of the same size. (Running the backward pass too takes three times as long.)"""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.recomputed = self._latest = 0
        self._block: Any = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            a, b = args[-2:]
            forward = 2 * out.numel() * a.shape[-1]
            self.total += forward * (1 + (torch.is_grad_enabled() and a.requires_grad + b.requires_grad))
            self._recompute(forward)
        elif func not in SAVING_NOTHING:
            self._recompute(0)
        return out

    def _recompute(self, forward: int) -> None:
        """Inside a checkpointed block, which has hooks on the tensors it saves, a product is computed again if
        something is saved after it: torch stops when it has the last saved tensor."""
        block = torch._C._autograd._top_saved_tensors_default_hooks(True)
        self.recomputed += self._latest if block is not None and block == self._block else 0
        self._latest, self._block = forward, block


def describe(config: RunConfig, vocab_size: int, deepspeed_config: Path | None, world: int) -> str:
    """The report that --dry_run prints. Raises ConfigError where the configuration cannot be run."""
    settings = deepspeed_json(config, deepspeed_config, world)
    chosen, training = settings["zero_optimization"].get("stage", 0), config.training
    module = meta_module(config, vocab_size)
    parameters = sum(p.numel() for p in module.parameters())
    flops, rows, row_tokens = row_flops(config, module, vocab_size), training.rows_per_step, config.data.row_tokens
    run = flops.total * rows * config.max_steps
    parts = [f"model {flops.model / row_tokens / 1e6:,.1f}"]
    parts += [f"recomputation {flops.recomputed / row_tokens / 1e6:,.1f}"] if flops.recomputed else []
    parts += [f"frozen networks {flops.frozen / row_tokens / 1e6:,.1f}"] if flops.frozen else []
    lines = [
        f"parameters      {parameters:,} ({parameters / 2**20:.1f} x 2^20)",
        f"FLOPs           {flops.total / row_tokens / 1e6:,.1f} M a token ({', '.join(parts)}), "
        f"{flops.total * rows / 1e12:,.2f} T a step, {run:.2e} the run",
        f"tokens          {rows * row_tokens:,} a step, {rows * row_tokens * config.max_steps / 1e6:,.1f} M the run "
        "(padding included)",
        f"batch           {rows} rows of {row_tokens} tokens = {world} process(es) x "
        f"{accumulation_steps(config, world)} micro-batches x {training.micro_batch_rows} rows",
    ]
    peak = peak_tflops(torch.device("cuda", 0)) if torch.cuda.is_available() else None
    if peak is not None:
        lines.append(f"time            {duration(run / (0.4 * peak * 1e12 * world))} at 40 % of this GPU's peak")
    lines.append(
        "memory of weights, gradients, optimizer and averages, GiB a rank (on top come activations, ZeRO's buckets and "
        "Muon's temporary matrices):"
    )
    worlds = sorted({world, 8, 64})
    lines.append("  processes   " + "".join(f"{n:>10}" for n in worlds))
    for stage in (1, 2, 3) if training.precision == "bf16" else (0, 1, 2, 3):
        sizes = [rank_bytes(config, module, settings, n, stage) for n in worlds]
        mark = "  <- this run" if stage == chosen else ""
        lines.append(f"  ZeRO stage {stage}" + "".join(f"{size / 2**30:10.3f}" for size in sizes) + mark)
    return "\n".join(lines)


def rank_bytes(
    config: RunConfig, module: nn.Module, settings: dict[str, Any], world: int, stage: int | None = None
) -> float:
    """What weights, gradients, optimizer and averages take on a rank, at a ZeRO stage or at that of `settings`, which
    deepspeed_json makes; `module` is a meta_module."""
    return state_bytes(
        group_sizes(build_optimizer(module, config.optimizer, muon_dtype=torch.bfloat16)),
        stage=settings["zero_optimization"].get("stage", 0) if stage is None else stage,
        world=world,
        precision=config.training.precision,
        averages=len(config.training.ema_decays),
        persistent=persistent_parameters(module, settings),
    )
