import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatext.config import ConfigError
from megatext.flow.timesteps import TimestepConfig

configs = st.one_of(
    st.just(TimestepConfig("uniform")),
    st.builds(TimestepConfig, st.just("logit_normal"), st.floats(-2, 3), st.floats(0.3, 2)),
)


@given(st.floats(1e-9, 1 - 1e-9), st.floats(-2, 3), st.floats(0.3, 2))
def test_quantile_agrees_with_the_standard_library(u: float, location: float, scale: float) -> None:
    expected = 1 / (1 + math.exp(-(location + scale * NormalDist().inv_cdf(u))))
    got = TimestepConfig("logit_normal", location, scale).quantile(torch.tensor(u, dtype=torch.float64))
    assert got.item() == pytest.approx(expected, rel=1e-6)


@given(configs, st.integers(1, 128), st.sampled_from(["quantile", "uniform"]))
def test_grid_descends_strictly_from_one_to_zero(config: TimestepConfig, steps: int, kind: str) -> None:
    grid = config.inference_grid(steps, kind)  # type: ignore[arg-type]
    assert grid.shape == (steps + 1,) and grid.dtype == torch.float32
    assert grid[0] == 1 and grid[-1] == 0
    assert (grid.diff() < 0).all()


def test_quantile_grid_has_equal_training_mass_between_neighbours() -> None:
    config = TimestepConfig("logit_normal", 1.5, 1.0)
    grid = config.inference_grid(8)
    samples = config.quantile(torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    share = torch.histogram(samples, grid.flip(0)).hist / len(samples)
    torch.testing.assert_close(share, torch.full((8,), 1 / 8), atol=5e-3, rtol=0)
    assert torch.equal(config.inference_grid(4, "uniform"), torch.tensor([1, 0.75, 0.5, 0.25, 0]))


def test_quantile_keeps_shape_and_dtype_and_exact_ends() -> None:
    config = TimestepConfig("logit_normal", 1.0, 1.0)
    u = torch.tensor([[0.0, 0.5], [0.25, 1.0]])
    t = config.quantile(u)
    assert t.shape == u.shape and t.dtype == u.dtype
    assert t[0, 0] == 0 and t[1, 1] == 1
    assert t[0, 1].item() == pytest.approx(1 / (1 + math.exp(-1)))


def test_bad_values() -> None:
    with pytest.raises(ConfigError, match="scale"):
        TimestepConfig("logit_normal", 0.0, 0.0)
    with pytest.raises(ConfigError, match="at least one step"):
        TimestepConfig().inference_grid(0)
