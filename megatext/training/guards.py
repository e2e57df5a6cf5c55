"""When a step's loss or gradient is not finite: say which one, where it came from, and stop when it goes on."""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        finding = None
        found = [first_bad_tensor(engine, item, objective) for item in inputs]  # all: the ranks must run alike
        for index, (bad, loss, batch) in enumerate(zip(found, losses, batches, strict=True)):
            if finding is None and (bad is not None or not math.isfinite(float(loss))):
                place, rows = bad or ("the loss", [])
                keys = [batch.documents[row] for row in rows] or batch.documents
                finding = (
                    f"loss {float(loss):.4g} in micro-batch {index}, first not finite: {place}; "
                    f"documents {_some([key for row in keys for key in row])}"
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


def first_bad_tensor(
    engine: Any, inputs: dict[str, Any], objective: Callable[[Output], Tensor]
) -> tuple[str, list[int]] | None:
    """What is not finite first when a micro-batch is computed again, forward and then backward: the output of a module,
    the loss, the gradient that arrives at a module, or a parameter's gradient; and in which rows, where that can be
    told. A collective under ZeRO-3; no gradient is kept."""
    bad: list[tuple[str, list[int]]] = []
    outputs: dict[str, Tensor] = {}
    names = {module: name for name, module in engine.module.named_modules()}
    # one tensor a block is kept for the backward pass: more would not fit where activations are recomputed
    inside = [name for name in names.values() if re.search(r"\.\d+\.", name)]

    def look(module: nn.Module, args: Any, output: Any) -> None:
        found = [t for t in _tensors(output) if t.is_floating_point()]
        if not bad:
            place = f"the output of {names[module] or 'the module'} ({type(module).__name__})"
            bad.extend((place, _bad_rows(t, inputs)) for t in found if not _finite(t))
        if names[module] and names[module] not in inside and found and found[0].requires_grad:
            outputs[names[module]] = found[0]

    # not those of parameters under ZeRO-3, which are in pieces again when the backward pass is over
    whole = {n: p for n, p in engine.module.named_parameters() if p.requires_grad and not hasattr(p, "ds_id")}
    hooks = [module.register_forward_hook(look) for module in names]
    try:
        with uncompiled(engine.module):  # a compiled module does not call new hooks
            loss = objective(engine.module(**inputs))
            for hook in hooks:
                hook.remove()
            if not bad and not _finite(loss):
                bad.append(("the loss", []))
            gradients = torch.autograd.grad(loss, [*outputs.values(), *whole.values()], allow_unused=True)
    except torch.OutOfMemoryError:
        if not whole:
            raise  # the other ranks are waiting for this one's part of the weights
        return "unknown, as there was no memory to look for it", []
    finally:
        for hook in hooks:
            hook.remove()
    if bad:
        return bad[0]
    places = [*(f"the gradient that arrives at {n}" for n in outputs), *(f"the gradient of {n}" for n in whole)]
    wrong = [(n, g) for n, g in zip(places, gradients, strict=True) if g is not None and not _finite(g)]
    late = [(n, g) for n, g in wrong if "arrives" in n][-1:]  # the backward pass comes to the last module first
    return next(((n, _bad_rows(g, inputs) if late else []) for n, g in late or wrong), None)


@contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
    """Inside, the parts of a module that torch.compile was called on run as they were written."""
    compiled = {part: part._compiled_call_impl for part in module.modules() if part._compiled_call_impl is not None}
    for part in compiled:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, call in compiled.items():
            part._compiled_call_impl = call


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _bad_rows(tensor: Tensor, inputs: dict[str, Any]) -> list[int]:
    """Rows of the micro-batch in which a tensor is not finite; none where its first dimension is not the rows."""
    rows = len(inputs["tokens"])
    if tensor.dim() < 2 or len(tensor) != rows:
        return []
    found: list[int] = (~torch.isfinite(tensor)).flatten(1).any(dim=1).nonzero().flatten().tolist()
    return found


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
