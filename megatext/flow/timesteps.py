"""Which timesteps are trained on, and which a sampler visits. t = 0 is clean data, t = 1 pure noise."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatext.config import ConfigError


@dataclass(frozen=True)
class TimestepConfig:
    """Distribution of the training timestep, given by its quantile function.

    A caller draws uniforms, stratified over the whole global batch if it likes, and asks for their quantiles, so
    that the distribution and the way it is sampled stay apart.
    """

    distribution: Literal["uniform", "logit_normal"] = "logit_normal"
    """logit_normal: sigmoid of a normal variable."""
    location: float = 0.0
    """Mean of logit(t); positive values favour noise (1.0 to 1.7 at 16 to 64 latent channels)."""
    scale: float = 1.0
    """Standard deviation of logit(t), > 0."""

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ConfigError(f"timesteps.scale must be positive, got {self.scale}")

    def quantile(self, u: Tensor) -> Tensor:
        """t with P(timestep <= t) = u; monotone, 0 and 1 go to exactly 0 and 1. Shape and dtype of `u`."""
        if self.distribution == "uniform":
            return u
        # float64: near the ends float32 uniforms lose the tail that the inference grid is made of
        standard_normal = math.sqrt(2) * torch.special.erfinv(2 * u.double() - 1)
        return torch.sigmoid(self.location + self.scale * standard_normal).to(u.dtype)

    def inference_grid(self, steps: int, kind: Literal["quantile", "uniform"] = "quantile") -> Tensor:
        """float32 [steps + 1], descending from exactly 1 to exactly 0.

        "quantile" puts the steps where training put its samples (equal probability between neighbours);
        "uniform" spaces them evenly.
        """
        if steps < 1:
            raise ConfigError(f"sampling needs at least one step, got {steps}")
        u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return (self.quantile(u) if kind == "quantile" else u).float()
