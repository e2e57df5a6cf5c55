"""Losses of a flow. A loss is a sum and a count over the masked tokens: float32 scalars, normalised by the caller.

Errors per token come first (`squared_error`, `token_losses`), so that the same numbers can be summed, or sorted
into timestep bins by `by_timestep_bin`.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatext.flow.paths import Path


def squared_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over channels: two [rows, tokens, channels] -> float32 [rows, tokens]."""
    return (predicted.float() - target.float()).square().mean(-1)


def converted_error(path: Path, x0: Tensor, latents: Tensor, t: Tensor, space: Literal["velocity", "x0"]) -> Tensor:
    """Squared error, as `squared_error`, of an estimated x0 in x0 or as the velocity that goes with it at the same z.
    t: [rows, tokens] or a scalar."""
    return in_space(path, squared_error(x0, latents), t, space)


def in_space(path: Path, error: Tensor, t: Tensor, space: Literal["velocity", "x0"], min_sigma: float = 0.05) -> Tensor:
    """A squared error of x0 `[rows, tokens]` as one in x0 or of the velocity.

    At a given z velocities differ by (w / sigma)^2 as much as clean latents do, w the Wronskian; sigma is taken for no
    smaller than `min_sigma`, or clean data would count without bounds (as in ELF, arXiv 2605.10938)."""
    if space == "x0":
        return error
    return error * (path.wronskian(t) / path.sigma(t).clamp(min=min_sigma)).square()


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats: logits [rows, tokens, vocab], int64 targets [rows, tokens] -> float32 [rows, tokens]."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


def gaussian_kl(
    mean: Tensor, log_variance: Tensor, other_mean: Tensor | None = None, other_log_variance: Tensor | None = None
) -> Tensor:
    """KL in nats of diagonal Gaussians [..., channels] to others, by default standard normals, summed over channels:
    float32 [...]."""
    if other_mean is None or other_log_variance is None:
        return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=-1)
    ratio = log_variance - other_log_variance
    distance = (mean - other_mean).square() * (-other_log_variance).exp()
    return 0.5 * (distance + ratio.exp() - 1 - ratio).sum(dim=-1)


def gaussian_entropy(log_variance: Tensor) -> Tensor:
    """Differential entropy in nats of diagonal Gaussians [..., channels], summed over channels: float32 [...]."""
    return 0.5 * (1 + math.log(2 * math.pi) + log_variance).sum(dim=-1)


def masked_sum(per_token: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, count) of `per_token` where the boolean `mask` holds. What is masked out may be anything, nan too."""
    return per_token.float().masked_fill(~mask, 0.0).sum(), mask.sum(dtype=torch.float32)


def expected_latent(logits: Tensor, table: Tensor, temperature: float = 1.0) -> Tensor:
    """Score interpolation (CDCD): x0_hat = softmax(logits / temperature) @ table.

    logits [..., vocab], table [vocab, channels], the latent of every token -> [..., channels] in the table's dtype.
    A temperature of 0 takes the likeliest token's latent.
    """
    if temperature == 0:
        return table[logits.argmax(-1)]
    return torch.softmax(logits.float() / temperature, dim=-1).to(table.dtype) @ table


def by_timestep_bin(per_token: Tensor, t: Tensor, mask: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """(sums, counts), float32 [bins], of `per_token` [rows, tokens] by equal intervals of t in [0, 1].

    t: scalar, [rows] or [rows, tokens].
    """
    t = t.reshape(t.shape + (1,) * (per_token.ndim - t.ndim)).expand_as(per_token)
    index = (t * bins).long().clamp(0, bins - 1).flatten()
    weight = mask.float().flatten()
    zeros = torch.zeros(bins, device=per_token.device)
    # fixed shapes: boolean indexing would make the host wait for the device
    values = per_token.float().masked_fill(~mask, 0.0).flatten()
    return zeros.index_add(0, index, values), zeros.index_add(0, index, weight)


def token_log_likelihood(path: Path, z: Tensor, table: Tensor, t: Tensor, min_sigma: float = 0.05) -> Tensor:
    """log N(z; alpha(t) table[v], sigma(t)^2) up to a constant, for every token v: float32 [rows, tokens, vocab].

    z [rows, tokens, channels], table [vocab, channels], t [rows, tokens] or a scalar. What a noisy latent says of its
    own token is known in closed form where every token has one latent; the network is left with what context says.
    """
    t = t.expand(z.shape[:-1])
    alpha, sigma = path.alpha(t).float(), path.sigma(t).float().clamp(min=min_sigma)
    precision = (alpha / sigma.square())[..., None]
    bias = (alpha.square() / (2 * sigma.square()))[..., None]
    # one matrix product: passes over [rows, tokens, vocab] are what this costs
    left = torch.cat((precision * z.float(), -bias), dim=-1)
    right = torch.cat((table, table.square().sum(-1, keepdim=True)), dim=-1)
    return left @ right.t()


def constant_predictor_error(path: Path, t: Tensor, target: Literal["velocity", "x0"], variance: float = 1.0) -> Tensor:
    """Expected error of the best predictor that ignores its input, for latents of this variance a channel.

    Same shape as `t`. The best constant is the target's mean, so its error is the target's variance: `variance` for
    x0, alpha'^2 variance + sigma'^2 for the velocity. Binned over the same timesteps as a model's error
    (`by_timestep_bin`), it is the bar that a model has to stay under in every bin.
    """
    if target == "x0":
        return torch.full_like(t, variance)
    return path.alpha_derivative(t).square() * variance + path.sigma_derivative(t).square()
