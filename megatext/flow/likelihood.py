"""How likely data is under a denoiser: the variational bound, and the density of the probability-flow ODE.

Both look at z_s, the data x0 with the noise of a small timestep s. With q(z_s | x0) = N(alpha x0, sigma^2) and a
decoder p(text | z_s) either gives a bound on the likelihood of the text that x0 encodes:

    -log p(text) <= E_q[-log p(text | z_s)] + KL(q(z_s | x0) || p(z_s))

where p(z_s) is that of the generative SDE (`diffusion_nats`) or of the ODE (`ode_log_density`). It holds for any
denoiser, any s and any x0 that is a function of the text; an exact denoiser makes it an equality.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatext.flow.paths import Path, match
from megatext.flow.solvers import Denoise


def times_in_strata(path: Path, edges: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """A timestep within each stratum [edges[i], edges[i + 1]], and its weight in `diffusion_nats`.

    edges: float64 `[strata + 1]`, ascending from s > 0 to 1; u: uniform `[strata]`. Drawn uniformly in the
    signal-to-noise ratio, so that the weighted sum is unbiased without any derivative of the path."""
    snr = (path.alpha(edges) / path.sigma(edges)).square()
    width = snr[:-1] - snr[1:]
    return path.time_of_snr(snr[1:] + u * width), 0.5 * width


def diffusion_nats(
    path: Path, denoise: Denoise, x0: Tensor, times: Tensor, weights: Tensor, noise: Callable[[], Tensor]
) -> Tensor:
    """An unbiased estimate of KL(q(z_s | x0) || p(z_s)) by the variational bound in continuous time (VDM, arXiv
    2107.00630, Eq. 17 and 18): the integral over SNR of half the squared error of x0.

    x0 `[rows, tokens, channels]`; `times` and `weights` of `times_in_strata`. Returns float64 `[rows, tokens]`, summed
    over channels. That all of the signal is gone at t = 1, as on every path here, leaves no other term."""
    total = torch.zeros(x0.shape[:-1], dtype=torch.float64, device=x0.device)
    for t, weight in zip(times, weights, strict=True):
        z = path.interpolate(x0, noise(), t.to(x0))
        total += float(weight) * (x0 - denoise(z, t.to(x0))).double().square().sum(dim=-1)
    return total


def ode_log_density(path: Path, denoise: Denoise, z: Tensor, grid: Tensor, probe: Tensor, mask: Tensor) -> Tensor:
    """log p(z) at t = grid[0], float64 `[rows]`, under the probability-flow ODE (arXiv 2011.13456, Eq. 39): followed to
    t = 1 by Heun's steps over the ascending `grid`, its divergence by Hutchinson's estimator with the `probe`
    (entries +1 or -1, z's shape). Only tokens in `mask` bool `[rows, tokens]` are data. Needs a denoiser that can be
    differentiated with respect to z; its error falls with the square of the step and with the number of probes."""
    real = mask[..., None]

    def slope(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            # dz/dt in x0: finite also at t = 1, where the noise is all there is
            drift = _velocity(path, z, denoise(z, t), t) * real
            (turned,) = torch.autograd.grad((drift * probe).sum(), z)
        return drift.detach(), (turned * probe * real).double().flatten(1).sum(dim=1)

    divergence = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        step = float(t_next - t)
        first, first_divergence = slope(z, t)
        second, second_divergence = slope(z + step * first, t_next)
        z = z + step / 2 * (first + second)
        divergence += step / 2 * (first_divergence + second_divergence)
    prior = -0.5 * (z.double().square() + math.log(2 * math.pi)) * real
    return prior.flatten(1).sum(dim=1) + divergence


def _velocity(path: Path, z: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """dz/dt of (z, x0): alpha' x0 + sigma' (z - alpha x0) / sigma."""
    sigma, alpha = match(path.sigma(t), z), match(path.alpha(t), z)
    return match(path.alpha_derivative(t), z) * x0 + match(path.sigma_derivative(t), z) * (z - alpha * x0) / sigma
