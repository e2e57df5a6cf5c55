"""Likelihoods against the truth, on texts of two tokens whose every probability is known."""

import math

import pytest
import torch
from torch import Tensor

from megatext.flow.likelihood import diffusion_nats, ode_log_density, times_in_strata
from megatext.flow.paths import Linear, Path, TanD

PATHS = [Linear(), TanD(3.0)]
LATENTS = torch.tensor([[1.2, -0.4], [-0.7, 0.9], [0.1, -1.3]], dtype=torch.float64)
"""Of three tokens, two channels each."""
JOINT = torch.tensor([[0.30, 0.05, 0.10], [0.02, 0.25, 0.03], [0.05, 0.05, 0.15]], dtype=torch.float64)
"""Probability of every text of two tokens; they depend on each other."""
TEXTS = torch.tensor([[i, j] for i in range(3) for j in range(3)])
X0 = LATENTS[TEXTS]


def posterior(path: Path, z: Tensor, t: Tensor) -> Tensor:
    """p(text | z_t) `[rows, 9]`, by enumeration."""
    t = torch.as_tensor(t, dtype=torch.float64)
    squares = (z[:, None] - path.alpha(t) * X0).square().flatten(2).sum(-1)
    return (JOINT.flatten().log() - squares / (2 * path.sigma(t) ** 2)).softmax(-1)


def exact(path: Path) -> "callable":  # type: ignore[valid-type]
    return lambda z, t: torch.einsum("rk,ktc->rtc", posterior(path, z, t), X0)


def edges(s: float, strata: int) -> Tensor:
    return torch.linspace(s, 1, strata + 1, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS)
def test_time_of_snr_inverts_the_path(path: Path) -> None:
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(path.time_of_snr((path.alpha(t) / path.sigma(t)).square()), t)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("s", [0.1, 0.5])
def test_the_variational_bound_of_an_exact_denoiser_is_the_truth(path: Path, s: float) -> None:
    """... for every text, whatever s."""
    random = torch.Generator().manual_seed(1)
    at = torch.tensor(s, dtype=torch.float64)
    for text in (0, 1, 5):
        x0 = X0[text].expand(300, 2, 2)

        def noise(like: Tensor = x0) -> Tensor:
            return torch.randn(like.shape, generator=random, dtype=torch.float64)

        seeds = []
        for _ in range(24):  # the times are shared by all copies of one
            times, weights = times_in_strata(path, edges(s, 30), torch.rand(30, generator=random, dtype=torch.float64))
            nats = diffusion_nats(path, exact(path), x0, times, weights, noise).sum(dim=1)
            seeds.append((nats - posterior(path, path.interpolate(x0, noise(), at), at)[:, text].log()).mean())
        found = torch.stack(seeds)
        error = float(found.std()) / math.sqrt(len(found))
        assert error < 0.06
        assert float(found.mean()) == pytest.approx(-math.log(JOINT.flatten()[text]), abs=4 * error)


def test_a_worse_denoiser_has_a_looser_bound() -> None:
    path, random = Linear(), torch.Generator().manual_seed(2)
    x0 = X0[4].expand(4000, 2, 2)
    times, weights = times_in_strata(path, edges(0.3, 30), torch.full((30,), 0.5, dtype=torch.float64))
    found = []
    for denoise in (exact(path), lambda z, t: 0.8 * exact(path)(z, t), lambda z, t: torch.zeros_like(z)):
        found.append(
            float(
                diffusion_nats(
                    path,
                    denoise,
                    x0,
                    times,
                    weights,
                    lambda: torch.randn(x0.shape, generator=random, dtype=torch.float64),
                )
                .sum(1)
                .mean()
            )
        )
    assert found == sorted(found) and found[2] > found[0] + 0.5


@pytest.mark.parametrize("path", PATHS)
def test_the_odes_density_is_the_mixtures(path: Path) -> None:
    """z_s of an exact denoiser is a mixture of nine Gaussians; with all probes the divergence is exact."""
    s = torch.tensor(0.35, dtype=torch.float64)
    random = torch.Generator().manual_seed(3)
    which = torch.tensor([0, 3, 8])
    z = path.interpolate(X0[which], torch.randn(3, 2, 2, generator=random, dtype=torch.float64), s)
    squares = (z[:, None] - path.alpha(s) * X0).square().flatten(2).sum(-1)
    normals = -squares / (2 * path.sigma(s) ** 2) - 2 * torch.log(2 * math.pi * path.sigma(s) ** 2)
    truth = (JOINT.flatten().log() + normals).logsumexp(-1)
    signs = torch.tensor([[a, b, c, d] for a in (1, -1) for b in (1, -1) for c in (1, -1) for d in (1, -1)])
    mask = torch.ones(3, 2, dtype=torch.bool)
    found = [
        ode_log_density(path, exact(path), z, edges(0.35, 60), sign.view(2, 2).double().expand(3, 2, 2), mask)
        for sign in signs
    ]
    torch.testing.assert_close(torch.stack(found).mean(0), truth, rtol=0, atol=0.01)
    coarse = ode_log_density(path, exact(path), z, edges(0.35, 60), torch.ones(3, 2, 2, dtype=torch.float64), mask)
    assert (coarse - truth).abs().max() > 1e-4  # one probe alone is an estimate
    # and with it the bound of each text is an equality, sample by sample
    q = -(z - path.alpha(s) * X0[which]).square().flatten(1).sum(1) / (2 * path.sigma(s) ** 2) - 2 * torch.log(
        2 * math.pi * path.sigma(s) ** 2
    )
    decoded = posterior(path, z, s)[torch.arange(3), which].log()
    torch.testing.assert_close(
        decoded + torch.stack(found).mean(0) - q, JOINT.flatten()[which].log(), rtol=0, atol=0.01
    )
