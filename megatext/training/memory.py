"""Bytes that a rank holds for weights, gradients, optimizer state and averages: what is expected, and what is there.

ZeRO (arXiv 1910.02054, section 5) divides optimizer state (stage 1), gradients (2) and weights (3) by the number of
ranks. DeepSpeed holds somewhat more: for the optimizer's step it copies the gradients of one parameter group, and stage
1 keeps bf16 gradients beside the fp32 ones that accumulate.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def group_sizes(optimizer: torch.optim.Optimizer) -> list[tuple[int, int]]:
    """Of each parameter group its parameters, and the bytes of optimizer state for each of them. Before DeepSpeed
    replaces the parameters by flat partitions."""
    groups = optimizer.param_groups
    return [(sum(p.numel() for p in group["params"]), 4 if group["muon"] else 8) for group in groups]


def persistent_parameters(module: nn.Module, settings: dict[str, Any]) -> int:
    """Elements of the small parameters that ZeRO-3 keeps whole on every rank. Before DeepSpeed takes the module."""
    threshold = settings["zero_optimization"].get("stage3_param_persistence_threshold", 100_000)
    return sum(p.numel() for p in module.parameters() if p.numel() <= threshold)


def state_bytes(
    groups: list[tuple[int, int]],
    *,
    stage: int,
    world: int,
    precision: str,
    averages: int,
    persistent: int = 0,
    promised: bool = False,
) -> float:
    """Bytes a rank holds when the optimizer steps; `promised`: what ZeRO promises, without DeepSpeed's copies.

    `groups` from group_sizes; `persistent` parameters are kept whole under stage 3. Weights 2 or 4 bytes, accumulated
    gradients 4, masters 4 (stage 0: the weights themselves), AdamW 8, Muon 4, each average 4. On top come activations,
    communication buffers (reduce_bucket_size) and Muon's temporary matrices, which are not sharded.
    """
    sizes = [n for n, _ in groups]
    moments = sum(n * each for n, each in groups)
    parameters = sum(sizes)
    weights, gradients = (2 if precision == "bf16" else 4) * parameters, 4 * parameters
    kept = moments + 4 * averages * parameters + (4 * parameters if stage else 0)
    copy = 0 if promised else 4 * max(sizes)
    if stage == 0:
        return weights + gradients + kept
    if stage == 1 and (promised or precision == "bf16"):
        # DeepSpeed's stage 1 for fp32 weights is its stage 2
        return weights + (0 if promised else weights) + gradients + kept / world
    if stage == 3:
        bits = 2 if precision == "bf16" else 4
        whole = 0 if promised else bits * persistent * (1 - 1 / world)
        return (weights + gradients + copy + kept) / world + whole
    if precision == "bf16":
        copy = 0  # takes the place of the gradients
    return weights + (gradients + copy + kept) / world


class StateMeter:
    """Measures what this rank's tensors hold whenever the optimizer steps, which is when they hold most."""

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, averages: Iterable[list[Tensor]]) -> None:
        self.engine, self.optimizer, self.averages = engine, optimizer, list(averages)
        self.peak_bytes = 0
        self._hook = optimizer.register_step_pre_hook(self._measure)

    def stop(self) -> int:
        """Measure no more; the peak so far, in bytes."""
        self._hook.remove()
        return self.peak_bytes

    def _measure(self, *_: Any) -> None:
        found: dict[int, int] = {}
        _add(list(self.engine.module.parameters()), found)
        _add(list(self.optimizer.state.values()), found)
        _add([p for group in self.optimizer.param_groups for p in group["params"]], found)
        _add(self.averages, found)
        if self.engine.optimizer is not self.optimizer:
            for name, value in vars(self.engine.optimizer).items():
                if "buffer" not in name or "grad_partitions" in name:  # the rest are for communication
                    _add(value, found)
        self.peak_bytes = max(self.peak_bytes, sum(found.values()))


def _add(value: Any, found: dict[int, int]) -> None:
    """Note the storages of all tensors in a nest of dicts and lists, each once."""
    if isinstance(value, Tensor):
        for tensor in (value, value.grad if value.is_leaf else None, getattr(value, "ds_tensor", None)):
            if tensor is not None:
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.size()
    elif isinstance(value, dict):
        for item in value.values():
            _add(item, found)
    elif isinstance(value, list | tuple):
        for item in value:
            _add(item, found)
