"""Random draws of a batch's rows."""

import numpy as np
import torch
from torch import Tensor

from megatext import rng


class RowDraws:
    """Random draws of the rows of a batch: functions of (seed, purpose, row index) only."""

    def __init__(self, seed: int, purpose: str, row_index: Tensor) -> None:
        self.seed, self.purpose, self.rows = seed, purpose, row_index.numpy()

    def uniform(self, name: str) -> np.ndarray:
        """float64 `[rows]` in [0, 1)."""
        return rng.uniform(self.seed, f"{self.purpose}/{name}", self.rows)

    def per_group(self, name: str, groups: int, group: Tensor) -> Tensor:
        """float32 `[rows, columns]`: one uniform draw for each group (segment, block) of a row, gathered to its
        columns; `group` int64 `[rows, columns]` < `groups`, negative (padding) reads group 0."""
        counters = self.rows[:, None] * groups + np.arange(groups)
        u = rng.uniform(self.seed, f"{self.purpose}/{name}", counters)
        return rng.on_device(u.astype(np.float32), group.device).gather(1, group.clamp(min=0))

    def normal(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        return rng.normal(self.seed, f"{self.purpose}/{name}", self.rows, shape, device)
