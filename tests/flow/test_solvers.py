import pytest
import torch
from torch import Tensor

from megatext.flow import guidance
from megatext.flow.paths import Linear, Path, TanD, match
from megatext.flow.solvers import Denoise, euler_step, extrapolate, heun_step, sample, sde_step

PATHS = [Linear(), TanD(1.0), TanD(5.0)]
MEAN, STD = 0.7, 0.4


def gaussian_denoiser(path: Path) -> Denoise:
    """E[x0 | z] for x0 ~ N(MEAN, STD^2)."""

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = match(path.alpha(t), z), match(path.sigma(t), z)
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return MEAN + gain * (z - alpha * MEAN)

    return denoise


def noise() -> Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def grid(steps: int) -> Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def error(path: Path, steps: int, method: str) -> float:
    # The flow of a Gaussian keeps the standardised variable: noise z at t = 1 ends at MEAN + STD z.
    z = noise()
    end = sample(gaussian_denoiser(path), path, z, grid(steps), method)  # type: ignore[arg-type]
    return (end - (MEAN + STD * z)).abs().max().item()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["euler", "heun", "dpmpp_2m"])
def test_a_known_x0_is_reached_exactly_in_any_number_of_steps(path: Path, method: str) -> None:
    x0 = noise().flip(0)
    for steps in [1, 2, 7]:
        end = sample(lambda z, t: x0, path, noise(), grid(steps), method)  # type: ignore[arg-type]
        torch.testing.assert_close(end, x0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_order_of_convergence_on_gaussian_data(path: Path) -> None:
    euler = [error(path, steps, "euler") for steps in (200, 400)]
    heun = [error(path, steps, "heun") for steps in (200, 400)]
    multistep = [error(path, steps, "dpmpp_2m") for steps in (400, 800)]
    assert euler[0] / euler[1] == pytest.approx(2, rel=0.1)
    assert heun[0] / heun[1] == pytest.approx(4, rel=0.15)
    assert heun[1] < 0.1 * euler[1]
    assert multistep[0] / multistep[1] > 2.6  # of second order but for its first and last step
    assert multistep[0] < 0.2 * euler[1]


def test_on_the_linear_path_steps_are_the_textbook_ones() -> None:
    path, denoise, z = Linear(), gaussian_denoiser(Linear()), noise()
    t, t_next = torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    x0_hat = denoise(z, t)
    velocity = path.velocity_from_x0(z, x0_hat, t)
    euler = z + (t_next - t) * velocity
    torch.testing.assert_close(euler_step(path, z, x0_hat, t, t_next), euler)
    velocity_next = path.velocity_from_x0(euler, denoise(euler, t_next), t_next)
    heun = z + (t_next - t) * (velocity + velocity_next) / 2
    torch.testing.assert_close(heun_step(path, denoise, z, x0_hat, t, t_next), heun)


@pytest.mark.parametrize("path", PATHS)
def test_clean_context_tokens_stay_as_they_are(path: Path) -> None:
    z, denoise = noise(), gaussian_denoiser(path)
    noisy = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    t, t_next = 0.9 * noisy, 0.6 * noisy
    x0_hat = denoise(z, t)
    scalar = (torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64))
    for step, whole in [
        (euler_step(path, z, x0_hat, t, t_next), euler_step(path, z, denoise(z, scalar[0]), *scalar)),
        (
            heun_step(path, denoise, z, x0_hat, t, t_next),
            heun_step(path, denoise, z, denoise(z, scalar[0]), *scalar),
        ),
    ]:
        assert torch.equal(step[noisy == 0], z[noisy == 0])
        torch.testing.assert_close(step[noisy == 1], whole[noisy == 1])


def test_guidance() -> None:
    conditional, unconditional = noise(), noise().flip(0)
    torch.testing.assert_close(guidance.combine(conditional, unconditional, 1.0), conditional)
    assert torch.equal(guidance.combine(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(guidance.combine(conditional, unconditional, 3.0), 3 * conditional - 2 * unconditional)
    assert guidance.active(0.5, 2.0, (0.0, 1.0))
    assert guidance.active(0.9, 2.0, (0.9, 1.0))
    assert not guidance.active(0.5, 2.0, (0.9, 1.0))
    assert not guidance.active(0.5, 1.0, (0.0, 1.0))


@pytest.mark.parametrize("path", PATHS)
def test_dpm_solver_steps_are_those_of_the_paper(path: Path) -> None:
    """arXiv 2211.01095, Algorithm 2, and Eq. 18 for the SDE, in their own letters."""
    m0, m1, z, eps = noise(), noise().flip(0), noise().flip(1), noise().flip(2)
    t1, t0, t = (torch.tensor(value, dtype=torch.float64) for value in (0.9, 0.7, 0.4))
    lam = {float(at): torch.log(path.alpha(at) / path.sigma(at)) for at in (t1, t0, t)}
    h, r = lam[0.4] - lam[0.7], (lam[0.7] - lam[0.9]) / (lam[0.4] - lam[0.7])
    d = (1 + 1 / (2 * r)) * m0 - 1 / (2 * r) * m1
    ode = path.sigma(t) / path.sigma(t0) * z - path.alpha(t) * (torch.exp(-h) - 1) * d
    goal = extrapolate(path, m0, (m1, t1), t0, t)
    torch.testing.assert_close(goal, d)
    torch.testing.assert_close(euler_step(path, z, goal, t0, t), ode)
    spread = path.sigma(t) * torch.sqrt(1 - torch.exp(-2 * h))
    sde = (
        path.sigma(t) / path.sigma(t0) * torch.exp(-h) * z + path.alpha(t) * (1 - torch.exp(-2 * h)) * d + spread * eps
    )
    torch.testing.assert_close(sde_step(path, z, goal, t0, t, eps), sde)


@pytest.mark.parametrize("path", PATHS)
def test_the_sde_keeps_the_distribution(path: Path) -> None:
    random = torch.Generator().manual_seed(0)

    def fresh() -> Tensor:
        return torch.randn(40_000, 1, 1, generator=random, dtype=torch.float64)

    end = sample(gaussian_denoiser(path), path, fresh(), grid(400), "dpmpp_2m_sde", fresh)
    assert float(end.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(end.std()) == pytest.approx(STD, rel=0.02)


def test_a_sampler_that_is_finished_returns_what_it_saw_last() -> None:
    seen: list[float] = []

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t))
        return torch.full_like(z, float(t))

    end = sample(denoise, Linear(), noise(), grid(10), finished=lambda: len(seen) == 4)
    assert len(seen) == 4 and float(end[0, 0, 0]) == seen[-1] == pytest.approx(0.7)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_ancestral_sampling_is_right_in_any_number_of_steps(steps: int) -> None:
    """Two points with weights 0.3 and 0.7, posterior known: the samples keep the weights."""
    path, points, weights = Linear(), torch.tensor([-1.0, 1.0]), torch.tensor([0.3, 0.7])
    random = torch.Generator().manual_seed(steps)
    z = torch.randn(20_000, 1, 1, generator=random)
    last = z

    def denoise(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        nonlocal last
        distance = (z - (1 - t) * points).square()  # [rows, 1, 2]
        posterior = (weights.log() - distance / (2 * t * t)).softmax(-1)
        chosen = torch.rand(z.shape, generator=random) < posterior[..., 1:]
        last = torch.where(chosen, 1.0, -1.0)
        return last

    grid = torch.linspace(1, 0, steps + 1)
    out = sample(denoise, path, z, grid, "ancestral", lambda: torch.randn(z.shape, generator=random))
    assert torch.equal(out, last)  # at t = 0 the sample itself
    assert float((out > 0).float().mean()) == pytest.approx(0.7, abs=0.015)
