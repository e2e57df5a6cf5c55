import math
from collections.abc import Callable
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatext.config import ConfigError
from megatext.flow.timesteps import (
    AdaptiveTimestepConfig,
    AdaptiveTimesteps,
    TimestepConfig,
    probabilities_of,
    quantile_of_bins,
)

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
    for bad in (
        {"distribution": "bins"},
        {"distribution": "bins", "probabilities": (0.5, 0.0)},
        {"probabilities": (1.0,)},
    ):
        with pytest.raises(ConfigError, match="probabilities, all positive"):
            TimestepConfig(**bad)  # type: ignore[arg-type]


def test_quantile_of_bins_by_counting() -> None:
    probabilities = (0.1, 0.4, 0.5)
    config = TimestepConfig("bins", probabilities=probabilities)
    t = config.quantile(torch.linspace(0, 1, 100_001, dtype=torch.float64))
    share = torch.histogram(t, torch.tensor([0, 1 / 3, 2 / 3, 1], dtype=torch.float64)).hist / len(t)
    assert share.tolist() == pytest.approx(probabilities, abs=1e-4)
    assert config.quantile(torch.tensor([0.05, 0.3])).tolist() == pytest.approx([1 / 6, 1 / 2])


@given(st.integers(2, 60), st.sampled_from([lambda t: t**2, lambda t: torch.sin(1.5 * t), lambda t: t.exp()]))
def test_adaptive_sampling_makes_the_loss_linear_in_what_is_drawn(bins: int, curve: Callable[[Tensor], Tensor]) -> None:
    centres = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
    count = torch.arange(1, bins + 1)
    found = probabilities_of(curve(centres) * count, count, floor=0.0)
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    loss = curve(quantile_of_bins(u, found))
    straight = loss[0] + (loss[-1] - loss[0]) * u
    # within a bin the density is flat, so the curve's bend over half a bin is what is left
    assert float((loss - straight).abs().max()) < 1.5 / bins


def test_adaptive_probabilities_of_a_known_curve() -> None:
    """A loss of t^2 rises by the square's difference over a bin; at the ends it goes on as within."""
    mean = torch.tensor([1.0, 9.0, 25.0, 49.0]) / 64  # at 1/8, 3/8, 5/8, 7/8
    ends = [-3 / 64, 5 / 64, 17 / 64, 37 / 64, 61 / 64]
    rise = [b - a for a, b in pairwise(ends)]
    found = probabilities_of(mean * 7, torch.full((4,), 7.0), floor=0.4)
    assert found.tolist() == pytest.approx([0.6 * r / sum(rise) + 0.1 for r in rise])
    falling = probabilities_of(torch.tensor([1.0, 3.0 * 3, 2.0]), torch.tensor([1.0, 3.0, 1.0]), floor=0.3)
    # 3 and 2 are taken for their mean, 3 weighing three times as much: 1, 2.75, 2.75, ends 0.125, 1.875, 2.75, 2.75
    assert falling.tolist() == pytest.approx([0.1 + 0.7 * 1.75 / 2.625, 0.1 + 0.7 * 0.875 / 2.625, 0.1])
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    assert torch.equal(probabilities_of(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, 0.0, 1.0]), 0.1), uniform)
    assert torch.equal(probabilities_of(torch.ones(3), torch.ones(3), 0.1), uniform)


def test_the_moving_average_forgets_at_its_rate() -> None:
    sampler = AdaptiveTimesteps(AdaptiveTimestepConfig(bins=2, decay=0.5, refresh_steps=3, floor=0.1))
    sampler.observe(torch.tensor([[math.nan]]), torch.tensor([[0.1]]), torch.tensor([[True]]))
    sampler.end_of_step(0, applied=False)
    t, mask = torch.tensor([[0.1, 0.9, 0.9]]), torch.tensor([[True, True, False]])
    for step, (low, high) in enumerate([(1.0, 2.0), (1.0, 4.0), (1.0, 9.0)]):
        sampler.observe(torch.tensor([[low, high, 100.0]]), t, mask)
        sampler.observe(torch.tensor([[low, high, 100.0]]), t, mask)  # another micro-batch
        assert sampler.probabilities.tolist() == [0.5, 0.5]
        sampler.end_of_step(step)
    high = (2 / 4 + 4 / 2 + 9) / (1 / 4 + 1 / 2 + 1)
    mean = torch.tensor([1.0, high])
    assert torch.allclose(sampler.loss_sum / sampler.loss_count, mean)
    assert sampler.probabilities.tolist() == pytest.approx([0.5, 0.5])  # two bins rise alike
    assert AdaptiveTimesteps(sampler.config).state_dict().keys() == {"loss_sum", "loss_count", "probabilities"}


def test_the_sampler_settles_where_the_loss_rises_while_the_loss_falls() -> None:
    """In a loop with a noisy loss that falls to a fifth: no comb of bins that are drawn because they were not."""
    config = AdaptiveTimestepConfig(bins=20, decay=0.9, refresh_steps=25, floor=0.1)
    sampler, generator = AdaptiveTimesteps(config), torch.Generator().manual_seed(0)
    mask, later = torch.ones(32, 1, dtype=torch.bool), []
    for step in range(400):
        u = (torch.arange(32) + torch.rand(32, generator=generator)) / 32
        t = sampler.quantile(u)[:, None].float()
        noise = 1 + 0.3 * torch.randn(t.shape, generator=generator)
        sampler.observe((0.2 + 0.8 * math.exp(-step / 100)) * (0.1 + t.square()) * noise, t, mask)
        sampler.end_of_step(step)
        if step >= 100 and (step + 1) % config.refresh_steps == 0:
            later.append(sampler.probabilities.clone())
    centres = (torch.arange(20) + 0.5) / 20
    ideal = 0.9 * centres / centres.sum() + 0.1 / 20  # of t^2, whose increase is 2 t
    assert float((torch.stack(later).mean(0) - ideal).abs().sum()) / 2 < 0.1
    assert float((torch.stack(later) - ideal).abs().sum(1).mean()) / 2 < 0.25


@pytest.mark.parametrize("wrong", [{"bins": 1}, {"floor": 0.0}, {"decay": 0.98, "refresh_steps": 25}, {"decay": 1.0}])
def test_adaptive_options_that_cannot_work_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="adaptive_timesteps"):
        AdaptiveTimestepConfig(**wrong)  # type: ignore[arg-type]
