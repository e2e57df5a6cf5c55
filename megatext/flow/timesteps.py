"""Which timesteps are trained on, and which a sampler visits. t = 0 is clean data, t = 1 pure noise."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from megatext.config import ConfigError
from megatext.flow import objectives


@dataclass(frozen=True)
class TimestepConfig:
    """Distribution of the training timestep, given by its quantile function.

    A caller draws uniforms, stratified over the whole global batch if it likes, and asks for their quantiles, so
    that the distribution and the way it is sampled stay apart.
    """

    distribution: Literal["uniform", "logit_normal", "bins"] = "logit_normal"
    """logit_normal: sigmoid of a normal variable. bins: uniform within equal bins of t."""
    location: float = 0.0
    """Mean of logit(t); positive values favour noise (1.0 to 1.7 at 16 to 64 latent channels)."""
    scale: float = 1.0
    """Standard deviation of logit(t), > 0."""
    probabilities: tuple[float, ...] = ()
    """Of the bins, in the order of t; what an adaptive sampler has found."""

    def __post_init__(self) -> None:
        if (self.distribution == "bins") != bool(self.probabilities) or any(not p > 0 for p in self.probabilities):
            raise ConfigError("timesteps.probabilities, all positive, belong to distribution: bins, and to it alone")
        if not self.scale > 0:
            raise ConfigError(f"timesteps.scale must be positive, got {self.scale}")

    def quantile(self, u: Tensor) -> Tensor:
        """t with P(timestep <= t) = u; monotone, 0 and 1 go to exactly 0 and 1. Shape and dtype of `u`."""
        if self.distribution == "uniform":
            return u
        if self.distribution == "bins":
            return quantile_of_bins(u, torch.tensor(self.probabilities, device=u.device))
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


def quantile_of_bins(u: Tensor, probabilities: Tensor) -> Tensor:
    """t with P(timestep <= t) = u where t is uniform within equal bins of these positive `probabilities [bins]`; they
    need not sum to 1. Shape and dtype of `u`; on any device, without a wait for it."""
    share = probabilities.double() / probabilities.double().sum()
    below = torch.cat((share.new_zeros(1), share.cumsum(0)))
    below[-1] = 1.0
    index = (torch.searchsorted(below, u.double().contiguous(), right=True) - 1).clamp(0, len(share) - 1)
    inside = (u.double() - below[index]) / (below[index + 1] - below[index])
    return ((index + inside) / len(share)).clamp(0.0, 1.0).to(u.dtype)


@dataclass(frozen=True)
class AdaptiveTimestepConfig:
    """Adaptive timestep sampling (LDLM section 5.3; time warping, CDCD arXiv 2211.15089): t is drawn where the loss
    changes, so that it is linear in the drawn variable."""

    bins: int = 0
    """Equal bins of t (LDLM: 100); 0: off, whatever the other keys say."""
    decay: float = 0.999
    """Of the moving average of every bin's loss, a step."""
    refresh_steps: int = 5_000
    """The distribution follows the average every so many steps."""
    floor: float = 0.01
    """Least density, as a share of the uniform one: no timestep is ever given up."""

    def __post_init__(self) -> None:
        if self.bins == 1 or self.bins < 0 or not 0 < self.floor <= 1:
            raise ConfigError("adaptive_timesteps: bins must be 0 or at least 2, floor above 0 and at most 1")
        if not 0 <= self.decay < 1 or self.refresh_steps * (1 - self.decay) < 1:
            raise ConfigError(
                "adaptive_timesteps: a refresh that sees losses from before the last one takes their fall for a peak; "
                f"at decay {self.decay} refresh_steps must be at least 1 / (1 - decay), not {self.refresh_steps}"
            )


class AdaptiveTimesteps(nn.Module):
    """The sampler's state, in buffers, so that checkpoints hold it. All ranks have the same."""

    loss_sum: Tensor
    loss_count: Tensor
    probabilities: Tensor

    def __init__(self, config: AdaptiveTimestepConfig) -> None:
        super().__init__()
        self.config = config
        # sums and counts decay alike: a bin that is drawn rarely keeps its mean, though an older one
        self.register_buffer("loss_sum", torch.zeros(config.bins))
        self.register_buffer("loss_count", torch.zeros(config.bins))
        self.register_buffer("probabilities", torch.full((config.bins,), 1.0 / config.bins))
        self.pending: Tensor | None = None

    def quantile(self, u: Tensor) -> Tensor:
        """As `TimestepConfig.quantile`."""
        return quantile_of_bins(u, self.probabilities)

    def observe(self, per_token: Tensor, t: Tensor, mask: Tensor) -> None:
        """Note losses `[rows, tokens]` of a micro-batch at their timesteps."""
        found = torch.stack(objectives.by_timestep_bin(per_token.detach(), t, mask, self.config.bins))
        self.pending = found if self.pending is None else self.pending + found

    def end_of_step(self, step: int, applied: bool = True) -> None:
        """Merge what all ranks noted in step number `step`, from 0, or forget it where it was not applied, as its
        losses need not be finite. A collective."""
        found, self.pending = self.pending, None
        if found is None or not applied:
            return
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(found)
        self.loss_sum.mul_(self.config.decay).add_(found[0])
        self.loss_count.mul_(self.config.decay).add_(found[1])
        if (step + 1) % self.config.refresh_steps == 0:
            self.probabilities.copy_(probabilities_of(self.loss_sum, self.loss_count, self.config.floor))


def probabilities_of(loss_sum: Tensor, loss_count: Tensor, floor: float) -> Tensor:
    """Probabilities `[bins]` in proportion to the increase of the mean loss over each bin, at least `floor` times the
    uniform ones; uniform while a bin was never drawn (LDLM Eq. 5).

    More noise never makes x0 easier to tell, so the means are first made to rise with t (isotonic regression, weighted
    by the counts): otherwise the sampler chases their noise. The loss at a bin's ends is the mean of it and its
    neighbour's; beyond the outer bins it goes on as within. On a GPU the host waits for the counts."""
    from sklearn.isotonic import isotonic_regression

    uniform = torch.full((len(loss_sum),), 1 / len(loss_sum), dtype=torch.float64)
    sums, counts = loss_sum.double().cpu(), loss_count.double().cpu()
    mean = sums / counts
    if not bool(mean.isfinite().all()):
        return uniform.to(loss_sum.device)
    mean = torch.from_numpy(isotonic_regression(mean.numpy(), sample_weight=counts.numpy()))
    inner = (mean[1:] + mean[:-1]) / 2
    first, last = 2 * mean[:1] - inner[:1], 2 * mean[-1:] - inner[-1:]
    rise = torch.cat((first, inner, last)).diff()
    share = (1 - floor) * rise / rise.sum() + floor * uniform
    return (share if float(rise.sum()) > 0 else uniform).to(loss_sum.device)
