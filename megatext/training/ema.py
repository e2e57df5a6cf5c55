"""Exponential moving averages of the weights, kept where the master weights are.

Each rank averages its own flat partitions in fp32: no communication, 4 bytes a parameter and decay divided by the
ranks, and together the ranks hold what an average of the whole weights would hold, on any number of them and any ZeRO
stage. Several decays at once let one choose after the run: how long an average should be is known only then
(arXiv 2312.02696, section 3).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megatext.training.partitions import Partitions


def ema_key(decay: float) -> str:
    """What an average is called in a checkpoint."""
    return f"ema_{decay}"


class EMA:
    """`averages[decay][i]` follows `partitions.masters[i]`."""

    def __init__(self, partitions: Partitions, decays: Sequence[float]) -> None:
        self.partitions = partitions
        self.updates = 0
        """Steps averaged so far: the decays warm up with it, so that early weights are forgotten."""
        self.averages = {decay: [m.detach().float().clone() for m in partitions.masters] for decay in decays}

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step that was applied."""
        warm = (1 + self.updates) / (10 + self.updates)
        self.updates += 1
        masters = [master.detach() for master in self.partitions.masters]
        for decay, values in self.averages.items():
            torch._foreach_lerp_(values, masters, 1.0 - min(decay, warm))

    @contextmanager
    def swapped(self, decay: float) -> Iterator[None]:
        """Inside, the trained module computes with the average of `decay`. A collective on entry and exit."""
        masters: list[Tensor] = self.partitions.masters
        if self.partitions.aliased:
            masters = [master.clone() for master in masters]
        self.partitions.push(self.averages[decay])
        try:
            yield
        finally:
            self.partitions.push(masters)
