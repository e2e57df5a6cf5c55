"""AdamW, and Muon for the matrices of the blocks, on DeepSpeed's flat partitions.

DeepSpeed has a Muon of its own, but it clips the orthogonalised update instead of the gradient in ZeRO 1 to 3, so
its learning rate depends on the clipping norm and on the number of matrices. Here clipping stays what it says, and
all stages and numbers of ranks take the same step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatext.config import ConfigError
from megatext.training.partitions import Partition, Partitions


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How the weights are stepped."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the 2-D weights inside "blocks." or "layers.", AdamW for all else."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of Muon, in units of the update's spectral norm."""
    muon_momentum: float = 0.95
    """Momentum of Muon (Nesterov)."""
    learning_rate_scales: dict[str, float] = field(default_factory=dict)
    """Factors on both learning rates for the parameters whose names begin so, as {vae: 0.1} for a part that is trained
    on."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's first and second moments."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = 0.0
    """Decoupled, times the learning rate; on tensors of two or more dimensions only."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises linearly from 0 to its peak."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """The shape after the warm-up."""
    decay_steps: int | None = None
    """Steps of the decay, at the end of the run; null: all steps after the warm-up."""
    min_learning_rate_ratio: float = 0.0
    """What the decay ends at, as a share of the peak."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm; 0 never clips."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_learning_rate_ratio <= 1.0:
            raise ConfigError("optimizer.min_learning_rate_ratio must lie between 0 and 1")
        if self.learning_rate < 0 or self.muon_learning_rate < 0 or self.clip_norm < 0 or self.weight_decay < 0:
            raise ConfigError("optimizer: learning rates, weight_decay and clip_norm must not be negative")
        if any(scale < 0 for scale in self.learning_rate_scales.values()):
            raise ConfigError("optimizer.learning_rate_scales must not be negative")
        if self.warmup_steps < 0 or (self.decay_steps is not None and self.decay_steps < 0):
            raise ConfigError("optimizer: warmup_steps and decay_steps must not be negative")


def is_muon_parameter(name: str, parameter: nn.Parameter) -> bool:
    """Matrices inside blocks; embeddings, heads, norms and biases are AdamW's, and adaLN's modulations too: they start
    at zero, and orthogonalising them would cost a third of Muon's time."""
    dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
    return dimensions == 2 and ("blocks." in name or "layers." in name) and "modulation" not in name


def build_optimizer(module: nn.Module, config: OptimizerConfig, *, muon_dtype: torch.dtype) -> "MuonAdamW":
    """The optimizer over a module's trained parameters, with learning rate 0 until the trainer sets it.

    `muon_dtype`: what the Newton-Schulz iteration computes in.
    """
    kinds, scales = ("muon", "decayed", "plain"), [*config.learning_rate_scales.items(), ("", 1.0)]
    # those without a factor last: the last group's learning rate is the one that is logged
    groups: dict[tuple[str, str], list[nn.Parameter]] = {(kind, part): [] for part, _ in scales for kind in kinds}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            kind = "decayed" if dimensions >= 2 and config.weight_decay else "plain"
            if config.name == "muon" and is_muon_parameter(name, parameter):
                kind = "muon"
            groups[kind, next(part for part, _ in scales if name.startswith(part))].append(parameter)
    for part in config.learning_rate_scales:
        if not any(groups[kind, part] for kind in kinds):
            names = sorted({name.split(".")[0] for name, _ in module.named_parameters()})
            raise ConfigError(
                f"optimizer.learning_rate_scales: nothing that is trained begins with {part}; there are "
                f"{', '.join(names)}; leave the entry out"
            )
    return MuonAdamW(
        [
            {
                "params": params,
                "muon": kind == "muon",
                "weight_decay": 0.0 if kind == "plain" else config.weight_decay,
                "peak_learning_rate": (config.muon_learning_rate if kind == "muon" else config.learning_rate)
                * config.learning_rate_scales.get(part, 1.0),
                "momentum": config.muon_momentum,
                "muon_dtype": muon_dtype,
            }
            for (kind, part), params in groups.items()
            if params
        ],
        clip_norm=config.clip_norm,
        lr=0.0,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


class MuonAdamW(torch.optim.AdamW):
    """torch's fused AdamW; groups with `muon` true take Muon's step instead.

    After DeepSpeed has replaced the parameters by flat partitions, `bind` must tell how they are laid out.
    State of a Muon tensor: `momentum`, laid out like the tensor, so it is saved and moved like any master weight.
    """

    _layouts: dict[Tensor, Partition]
    _shapes: dict[str, torch.Size]
    overflow = False
    """Whether the last step was skipped; DeepSpeed reads it where it does not wrap this optimizer (ZeRO 0)."""
    _global_grad_norm: float | None = None
    """Before clipping; read by DeepSpeed like `overflow`."""

    def __init__(self, groups: list[dict[str, Any]], *, clip_norm: float, **options: Any) -> None:
        super().__init__(groups, **options)
        self.clip_norm = clip_norm

    def bind(self, partitions: Partitions) -> None:
        """Learn the layout of the flat tensors that `step` will see."""
        self._layouts = {part.stepped: part for part in partitions.parts}
        self._shapes = partitions.shapes
        self._rank = partitions.rank
        self._aliased = partitions.aliased

    def set_learning_rate(self, share: float) -> float:
        """Set every group to `share` of its peak; returns the last group's rate, AdamW's if there is one."""
        for group in self.param_groups:
            group["lr"] = share * group["peak_learning_rate"]
        return float(self.param_groups[-1]["lr"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on the gradients in `.grad`. With several ranks and Muon a collective."""
        if self._aliased and not self._clip():
            return
        groups = self.param_groups
        adam = [group for group in groups if not group["muon"] and group["params"]]
        if adam:
            self.param_groups = adam
            try:
                super().step()
            finally:
                self.param_groups = groups
        for group in groups:
            if group["muon"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._muon_step(parameter, group)

    def _clip(self) -> bool:
        """Under ZeRO 0 DeepSpeed neither tells the gradient's norm nor skips a step that is not finite: both are done
        here. False: skip."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._global_grad_norm = float(norm)
        self.overflow = not math.isfinite(self._global_grad_norm)
        if self.clip_norm and not self.overflow:
            torch._foreach_mul_(gradients, (self.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        return not self.overflow

    def _muon_step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(momentum, group["momentum"]).to(group["muon_dtype"])
        if self._aliased:
            update = orthogonalize(direction[None])[0]
        else:
            update = self._orthogonalize_flat(direction, self._layouts[parameter])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.to(parameter.dtype), alpha=-group["lr"])

    def _orthogonalize_flat(self, direction: Tensor, layout: Partition) -> Tensor:
        """Orthogonalise whole matrices of which each rank holds pieces; returns this rank's pieces of the result.

        Two collectives of the size of the weights, in `direction`'s dtype; each matrix is computed by one rank.
        """
        world = len(layout.fragments)
        everything = direction[None]
        if world > 1:
            everything = direction.new_empty(world, direction.numel())
            dist.all_gather_into_tensor(everything.view(-1), direction)
        pieces: dict[str, list[tuple[int, int, int, int]]] = {}
        for rank, fragments in enumerate(layout.fragments):
            for f in fragments:
                pieces.setdefault(f.name, []).append((rank, f.start, f.length, f.offset))
        by_shape: dict[torch.Size, list[str]] = {}
        for index, name in enumerate(pieces):
            if index % world == self._rank:
                by_shape.setdefault(self._shapes[name], []).append(name)
        result = torch.zeros_like(everything)
        for shape, names in by_shape.items():
            stack = everything.new_empty(len(names), shape.numel())
            for row, name in zip(stack, names, strict=True):
                for rank, start, length, offset in pieces[name]:
                    row[start : start + length] = everything[rank, offset : offset + length]
            updates = orthogonalize(stack.view(len(names), *shape)).reshape(len(names), -1)
            for row, name in zip(updates, names, strict=True):
                for rank, start, length, offset in pieces[name]:
                    result[rank, offset : offset + length] = row[start : start + length]
        if world > 1:
            dist.all_reduce(result)  # every element is written by exactly one rank
        return result[self._rank] if world > 1 else result[0]


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """`[n, rows, columns]` -> nearly orthogonal matrices of the same row and column spaces (Newton-Schulz, quintic).

    Scaled by sqrt(max(1, rows / columns)), so that one learning rate serves all shapes.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    rows, columns = matrices.shape[-2:]
    x = matrices.mT if rows > columns else matrices
    x = x / (torch.linalg.matrix_norm(x.float(), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if rows > columns else x) * math.sqrt(max(1.0, rows / columns))
