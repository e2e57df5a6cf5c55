"""What the trainer knows of a system: the recipe interface, and nothing else."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from megatext.data.packing import TokenBatch


@dataclass
class Prepared:
    """One micro-batch, ready for the trained module. Built without gradients.

    `inputs` is passed to `module(**inputs)`. `counts` holds, for each loss term, the number of elements its
    sum runs over (float64 scalar tensors); the trainer adds them over micro-batches and ranks before any
    backward pass, so a loss is normalised once by its global count.
    """

    inputs: dict[str, Any]
    counts: dict[str, Tensor]


@dataclass
class Output:
    """What `module(**inputs)` returns: loss sums with gradient, and detached (sum, count) pairs to log."""

    loss_sums: dict[str, Tensor]
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass
class Pass:
    """A computation of every step, on one row of the meta device: for counting its FLOPs."""

    run: Callable[[], Any]
    """Gives the Output to differentiate where it is trained."""
    share: float = 1.0
    """How many of the steps have it."""
    trained: bool = True
    """Forward and backward; else the forward pass of a frozen network."""


class Recipe(ABC):
    """A system: what is trained, what goes in, what the loss is, how it is validated, shown and exported.

    `module` is the only thing handed to DeepSpeed. Frozen networks (VAE, teacher) are attributes of the
    recipe, not of the module: a frozen parameter inside a ZeRO-3 engine breaks activation checkpointing.
    """

    module: nn.Module
    tokenizer_fingerprint: str | None = None
    reads_states: bool = False
    """Whether batches must carry teacher states; where not, none are opened or fetched."""
    built_on: Mapping[str, str] = MappingProxyType({})
    """weights_hash of the exported models this one is trained on, by the key that names them in the configuration; a
    checkpoint refuses to go on with others."""

    @abstractmethod
    def prepare(self, batch: TokenBatch, *, step: int, purpose: str = "train") -> Prepared:
        """Inputs of one micro-batch. All randomness is keyed by (seed, purpose, batch.row_index), so it does
        not depend on ranks or micro-batch size. purpose "validation" must give fixed noise and a fixed
        timestep grid, independent of `step`."""

    @abstractmethod
    def loss_weights(self, step: int) -> dict[str, float]:
        """Weight of every loss term at a step (KL warm-up lives here). Total = sum_k weight_k * sum_k / count_k."""

    def end_of_step(self, step: int, applied: bool) -> None:
        """Called on every rank after step number `step`, from 0: for what follows the loss. Not `applied`: something in
        it was not finite, and the weights are as they were."""

    def warnings(self, figures: Mapping[str, float]) -> list[str]:
        """What a person should be told of the figures of a log line."""
        return []

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move frozen networks to the device and their weights to `dtype`, in which `module` computes, which the engine
        moves."""

    def finish(self, batches: list[TokenBatch]) -> dict[str, float]:
        """Called by every rank once after the last step with held-out batches: measure what the exported model
        must carry (the VAE's latent statistics, written into buffers of `module`), return figures to report."""
        return {}

    def preview(self, seed: int) -> list[str]:
        """A few short sample texts for `samples/`, from the module's present weights; [] where it makes no sense.

        Called on every rank (a ZeRO-3 forward is a collective)."""
        return []

    @abstractmethod
    def export(self, state_dict: dict[str, Tensor], output: Path) -> None:
        """Write a self-contained model directory (config.json, model.safetensors, tokenizer) from fp32 weights
        of `module`. CPU only, no DeepSpeed."""


def move_frozen(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move a frozen network; its weights take `dtype`, its buffers (statistics, rotary tables) would not survive it and
    keep theirs."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(device, dtype)
    network.to(device)
