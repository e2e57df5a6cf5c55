"""When a step's loss or gradient is not finite: say which one, where it came from, and stop when it goes on."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatext.data.packing import TokenBatch
from megatext.training.run_state import RunState


class NonFiniteError(RuntimeError):
    """Several steps in a row had non-finite losses or gradients."""


class StepGuard:
    """Counts steps that DeepSpeed did not apply because a gradient was not finite."""

    def __init__(self, limit: int, say: Callable[[str], None], state: RunState) -> None:
        self.limit, self.say, self.state = limit, say, state
        self.in_a_row = 0

    def check(
        self, engine: Any, step: int, losses: list[Tensor], inputs: list[dict[str, Any]], batches: list[TokenBatch]
    ) -> bool:
        """Whether the step was applied. If not, every rank reports its findings, and `limit` in a row raise
        NonFiniteError. Collective only when a step was skipped, which all ranks know alike."""
        if engine.was_step_applied():
            self.in_a_row = 0
            return True
        self.state.skipped_steps += 1
        self.in_a_row += 1
        values = [float(loss) for loss in losses]
        suspect = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
        place = first_bad_module(engine, inputs[suspect or 0])
        finding = None
        if suspect is not None:
            documents = sorted({key for row in batches[suspect].documents for key in row})
            finding = (
                f"loss {values[suspect]} in micro-batch {suspect}, first bad output: {place or 'none'}; "
                f"documents {_some(documents)}"
            )
        findings: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(findings, finding)
        lines = [f"rank {rank}: {text}" for rank, text in enumerate(findings) if text]
        report = f"step {step + 1} skipped (skipped so far: {self.state.skipped_steps}): " + (
            "; ".join(lines) or "losses are finite, a gradient is not"
        )
        self.say(report)
        if self.in_a_row >= self.limit:
            raise NonFiniteError(f"{self.in_a_row} steps in a row were not finite; {report}")
        return False


@torch.no_grad()
def first_bad_module(engine: Any, inputs: dict[str, Any]) -> str | None:
    """The first module whose output is not finite in a forward pass on `inputs`. A collective under ZeRO-3."""
    bad: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            if not bad and any(not bool(torch.isfinite(t).all()) for t in _tensors(output) if t.is_floating_point()):
                bad.append(f"{name or 'the module'} ({type(module).__name__})")

        return look

    hooks = [module.register_forward_hook(hook(name)) for name, module in engine.module.named_modules()]
    try:
        engine.module(**inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return bad[0] if bad else None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in _tensors(item)]
    if isinstance(value, list | tuple):
        return [t for item in value for t in _tensors(item)]
    return []


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
