"""When a step's loss or gradient is not finite: say which one, where it came from, and stop when it goes on."""

import math
import re
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatext.config import RunError
from megatext.data.packing import TokenBatch
from megatext.recipes.base import Output
from megatext.training.run_state import RunState


class NonFiniteError(RunError):
    """A step, or several in a row, had non-finite losses or gradients."""


class StepGuard:
    """Counts steps that DeepSpeed did not apply because a gradient was not finite."""

    def __init__(
        self, policy: Literal["skip", "stop"], limit: int, say: Callable[[str], None], state: RunState
    ) -> None:
        self.policy, self.limit, self.say, self.state = policy, limit, say, state
        self.in_a_row = 0

    def check(
        self,
        engine: Any,
        step: int,
        losses: list[Tensor],
        inputs: list[dict[str, Any]],
        batches: list[TokenBatch],
        objective: Callable[[Output], Tensor],
    ) -> bool:
        """Whether the step was applied. If not, every rank looks where in its micro-batches it went wrong, and raises
        NonFiniteError where the policy says stop or `limit` steps in a row were not finite. `objective` makes the loss
        of a micro-batch. Collective only when a step was skipped, which all ranks know alike."""
        if engine.was_step_applied():
            self.in_a_row = 0
            return True
        self.state.skipped_steps += 1
        self.in_a_row += 1
        places = [first_bad_tensor(engine, item, objective) for item in inputs]  # all: the ranks must run alike
        finding = None
        for index, (place, loss, batch) in enumerate(zip(places, losses, batches, strict=True)):
            value = float(loss)
            if finding is None and (place or not math.isfinite(value)):
                documents = sorted({key for row in batch.documents for key in row})
                finding = (
                    f"loss {value:.4g} in micro-batch {index}, first not finite: {place or 'the loss itself'}; "
                    f"documents {_some(documents)}"
                )
        findings: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(findings, finding)
        lines = [f"rank {rank}: {text}" for rank, text in enumerate(findings) if text]
        report = f"step {step + 1} skipped (skipped so far: {self.state.skipped_steps}): " + (
            "; ".join(lines) or "the sum of the gradients is not finite, though each of them is when computed again"
        )
        if self.policy == "stop":
            raise NonFiniteError(f"{report}; training.on_non_finite is stop")
        if self.in_a_row >= self.limit:
            raise NonFiniteError(f"{self.in_a_row} steps in a row were not finite; {report}")
        self.say(report)
        return False


def first_bad_tensor(engine: Any, inputs: dict[str, Any], objective: Callable[[Output], Tensor]) -> str | None:
    """What is not finite first when a micro-batch is computed again, forward and then backward: the output of a module,
    the gradient that arrives at one, or a parameter's gradient. A collective under ZeRO-3; no gradient is kept."""
    bad: list[str] = []
    outputs: dict[str, Tensor] = {}
    names = {module: name for name, module in engine.module.named_modules()}
    # one tensor a block is kept for the backward pass: more would not fit where activations are recomputed
    inside = [name for name in names.values() if re.search(r"\.\d+\.", name)]

    def look(module: nn.Module, args: Any, output: Any) -> None:
        found = [t for t in _tensors(output) if t.is_floating_point()]
        if not bad and any(not bool(torch.isfinite(t).all()) for t in found):
            bad.append(f"the output of {names[module] or 'the module'} ({type(module).__name__})")
        if names[module] and names[module] not in inside and found and found[0].requires_grad:
            outputs[names[module]] = found[0]

    hooks = [module.register_forward_hook(look) for module in names]
    try:
        loss = objective(engine.module(**inputs))
    finally:
        for hook in hooks:
            hook.remove()
    # not those of parameters under ZeRO-3, which are in pieces again when the backward pass is over
    whole = {n: p for n, p in engine.module.named_parameters() if p.requires_grad and not hasattr(p, "ds_id")}
    gradients = torch.autograd.grad(loss, [*outputs.values(), *whole.values()], allow_unused=True)
    if bad:
        return bad[0]
    wrong = [gradient is not None and not bool(torch.isfinite(gradient).all()) for gradient in gradients]
    late = [name for name, is_bad in zip(outputs, wrong, strict=False) if is_bad]
    if late:
        return f"the gradient that arrives at {late[-1]}"
    own = [name for name, is_bad in zip(whole, wrong[len(outputs) :], strict=True) if is_bad]
    return f"the gradient of {own[0]}" if own else None


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
