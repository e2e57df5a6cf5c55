"""An exponential moving average of the weights, kept where the master weights are.

Each rank averages its own flat partitions in fp32: no communication, 4 bytes a parameter divided by the ranks, and
together the ranks hold what an average of the whole weights would hold, on any number of them and any ZeRO stage.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatext.training.partitions import Partitions


class EMA:
    """`values[i]` follows `partitions.masters[i]`."""

    def __init__(self, partitions: Partitions, decay: float) -> None:
        self.partitions = partitions
        self.decay = decay
        self.updates = 0
        """Steps averaged so far: the decay warms up with it, so that early weights are forgotten."""
        self.values = [master.detach().float().clone() for master in partitions.masters]

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step that was applied."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self.values, [master.detach() for master in self.partitions.masters], 1.0 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the trained module computes with the averaged weights. A collective on entry and exit."""
        masters = self.partitions.masters
        if self.partitions.aliased:
            masters = [master.clone() for master in masters]
        self.partitions.push(self.values)
        try:
            yield
        finally:
            self.partitions.push(masters)
