"""Integration from noise (t = 1) to data (t = 0), of the probability-flow ODE or an SDE, in predictions of x0.

Any path becomes the linear one after a rescaling: with y = z / (alpha + sigma) and tau = sigma / (alpha + sigma),
y = (1 - tau) x0 + tau noise. Steps are taken there, in tau. On the linear path (y = z, tau = t) they are the
ordinary Euler and Heun steps; on any other, Euler is DDIM, whose last step lands on x0_hat exactly.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from megatext.flow.paths import Path, match

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(z [rows, tokens, channels], t) -> x0_hat of z's shape."""

Solver = Literal["euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "ancestral"]


def euler_step(path: Path, z: Tensor, x0_hat: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """z at `t_next`, on the straight line from z through x0_hat.

    t and t_next: scalars, or one value a row or token; where both are 0 (clean context) z comes back as it is.
    """
    sigma, sigma_next = match(path.sigma(t), z), match(path.sigma(t_next), z)
    kept = torch.where(sigma > 0, sigma_next / sigma, 1.0)
    return kept * z + (match(path.alpha(t_next), z) - kept * match(path.alpha(t), z)) * x0_hat


def heun_step(path: Path, denoise: Denoise, z: Tensor, x0_hat: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """As `euler_step`, with the direction averaged over both ends: second order, one more call of `denoise`.

    Where t_next is 0 the step is Euler's: the direction at clean data is not defined.
    """
    euler = euler_step(path, z, x0_hat, t, t_next)
    if not bool((t_next > 0).any()):
        return euler
    scale, scale_next = path.alpha(t) + path.sigma(t), path.alpha(t_next) + path.sigma(t_next)
    tau, tau_next = path.sigma(t) / scale, path.sigma(t_next) / scale_next
    y = z / match(scale, z)
    x0_next = denoise(euler, t_next)
    slope = (y - x0_hat) / match(tau, z)
    slope_next = (euler / match(scale_next, z) - x0_next) / match(tau_next, z)
    heun = (y + match(tau_next - tau, z) * 0.5 * (slope + slope_next)) * match(scale_next, z)
    return torch.where(match(t_next, z) > 0, heun, euler)


def half_log_snr(path: Path, t: Tensor) -> float:
    """lambda = log(alpha / sigma) at a scalar t: infinite at 0, minus infinite at 1."""
    alpha, sigma = float(path.alpha(t.double())), float(path.sigma(t.double()))
    if alpha == 0 or sigma == 0:
        return math.inf if sigma == 0 else -math.inf
    return math.log(alpha / sigma)


def extrapolate(path: Path, x0_hat: Tensor, before: tuple[Tensor, Tensor] | None, t: Tensor, t_next: Tensor) -> Tensor:
    """What DPM-Solver++(2M) takes for x0 on the way from t to `t_next` (arXiv 2211.01095, Algorithm 2): the line in
    lambda through x0_hat and that of the step `before`, (x0_hat, its t), in the middle of the step. Of first order
    where a step begins in pure noise or ends in clean data, which are infinitely far away in lambda."""
    if before is None:
        return x0_hat
    step = half_log_snr(path, t_next) - half_log_snr(path, t)
    last = half_log_snr(path, t) - half_log_snr(path, before[1])
    if not (math.isfinite(step) and math.isfinite(last)):
        return x0_hat
    return x0_hat + step / (2 * last) * (x0_hat - before[0])


def sde_step(path: Path, z: Tensor, x0_hat: Tensor, t: Tensor, t_next: Tensor, noise: Tensor) -> Tensor:
    """z at `t_next` by the reverse SDE of the same marginals, exact for an x0_hat that stays (SDE-DPM-Solver++, arXiv
    2211.01095, Eq. 18): more of z is forgotten than on the ODE, and `noise` of z's shape comes instead."""
    h = half_log_snr(path, t_next) - half_log_snr(path, t)
    alpha, sigma = path.alpha(t_next), path.sigma(t_next)
    kept = float(sigma / path.sigma(t)) * math.exp(-h)
    fresh = -math.expm1(-2 * h)
    return kept * z + float(alpha) * fresh * x0_hat + float(sigma) * math.sqrt(fresh) * noise


def sample(
    denoise: Denoise,
    path: Path,
    z: Tensor,
    grid: Tensor,
    method: Solver = "euler",
    fresh_noise: Callable[[], Tensor] | None = None,
    finished: Callable[[], bool] = lambda: False,
) -> Tensor:
    """Carry z from grid[0] to grid[-1]. Calls `denoise` with the scalar t of each step.

    z: [rows, tokens, channels]; from pure noise grid[0] is 1. grid: [steps + 1], strictly descending. The ancestral
    method and dpmpp_2m_sde need `fresh_noise` of z's shape, the first also a `denoise` that returns samples of x0.
    Where `finished` says so after a call of `denoise`, what that call returned is the result.
    """
    before: tuple[Tensor, Tensor] | None = None
    for t, t_next in zip(grid[:-1].to(z.device), grid[1:].to(z.device), strict=True):
        x0_hat = denoise(z, t)
        if finished():
            return x0_hat
        if method == "heun":
            z = heun_step(path, denoise, z, x0_hat, t, t_next)
        elif method == "ancestral":
            assert fresh_noise is not None
            # DDIM (arXiv 2010.02502) at its most stochastic: with x0 drawn from p(x0 | z), z at t_next has the right
            # marginal whatever the size of the step; with an x0 that is a mean it would not
            z = path.interpolate(x0_hat, fresh_noise(), t_next)
        elif method == "dpmpp_2m_sde":
            assert fresh_noise is not None
            z = sde_step(path, z, extrapolate(path, x0_hat, before, t, t_next), t, t_next, fresh_noise())
        else:
            goal = x0_hat if method == "euler" else extrapolate(path, x0_hat, before, t, t_next)
            z = euler_step(path, z, goal, t, t_next)
        before = (x0_hat, t)
    return z
