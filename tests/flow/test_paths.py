import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatext.config import ConfigError
from megatext.flow.paths import Linear, Path, TanD, path_from_name

paths = st.one_of(st.just(Linear()), st.floats(0.2, 12).map(TanD))
inner_times = st.floats(0.01, 0.99)


def tensors(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(2, 3, 4, generator=generator, dtype=torch.float64),
        torch.randn(2, 3, 4, generator=generator, dtype=torch.float64),
    )


@given(paths, inner_times, st.integers(0, 1000))
def test_every_conversion_recovers_what_made_z(path: Path, time: float, seed: int) -> None:
    x0, noise = tensors(seed)
    t = torch.tensor(time, dtype=torch.float64)
    z, v = path.interpolate(x0, noise, t), path.velocity(x0, noise, t)
    for got, expected in [
        (path.x0_from_velocity(z, v, t), x0),
        (path.noise_from_velocity(z, v, t), noise),
        (path.noise_from_x0(z, x0, t), noise),
        (path.velocity_from_x0(z, x0, t), v),
        (path.x0_from_noise(z, noise, t), x0),
        (path.velocity_from_noise(z, noise, t), v),
    ]:
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)


@given(paths, inner_times)
def test_derivatives_agree_with_autograd(path: Path, time: float) -> None:
    t = torch.tensor(time, dtype=torch.float64, requires_grad=True)
    for function, derivative in [(path.alpha, path.alpha_derivative), (path.sigma, path.sigma_derivative)]:
        (gradient,) = torch.autograd.grad(function(t), t)
        torch.testing.assert_close(derivative(t.detach()), gradient)


@given(paths)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_are_exact_and_velocity_conversion_holds_there(dtype: torch.dtype, path: Path) -> None:
    t = torch.tensor([0.0, 1.0], dtype=dtype)
    assert path.alpha(t).tolist() == [1.0, 0.0]
    assert path.sigma(t).tolist() == [0.0, 1.0]
    x0, noise = (x.to(dtype) for x in tensors(0))
    for time in t:
        z, v = path.interpolate(x0, noise, time), path.velocity(x0, noise, time)
        torch.testing.assert_close(path.x0_from_velocity(z, v, time), x0, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(path.noise_from_velocity(z, v, time), noise, rtol=1e-5, atol=1e-5)


@given(st.floats(0.2, 12), inner_times)
def test_tan_d_is_the_published_formula(d: float, time: float) -> None:
    t = torch.tensor(time, dtype=torch.float64)
    alpha = 1 / math.sqrt(1 + d**2 * math.tan(math.pi * time / 2) ** 2)
    assert TanD(d).alpha(t).item() == pytest.approx(alpha, rel=1e-9)
    assert TanD(d).sigma(t).item() == pytest.approx(math.sqrt(1 - alpha**2), rel=1e-6)


@pytest.mark.parametrize("path", [Linear(), TanD(3.0)])
def test_times_per_token_and_per_row_broadcast(path: Path) -> None:
    x0, noise = tensors(1)
    t = torch.rand(2, 3, dtype=torch.float64)
    z = path.interpolate(x0, noise, t)
    for row in range(2):
        for token in range(3):
            one = path.interpolate(x0[row, token], noise[row, token], t[row, token])
            assert torch.equal(z[row, token], one)
    assert torch.equal(path.interpolate(x0, noise, t[:, 0])[1], path.interpolate(x0[1], noise[1], t[1, 0]))


def test_names() -> None:
    assert path_from_name("linear") == Linear()
    assert path_from_name("tan-3") == TanD(3.0)
    for bad in ["Linear", "tan", "tan-", "tan-x", "tan-0", "tan--1", "tan-inf", "tan-nan"]:
        with pytest.raises(ConfigError, match="path"):
            path_from_name(bad)
