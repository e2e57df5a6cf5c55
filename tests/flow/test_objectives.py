import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatext.flow import objectives
from megatext.flow.paths import Linear, Path, TanD

ROWS, TOKENS, CHANNELS, VOCAB = 3, 7, 5, 11


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_losses_are_dense_loops_over_the_mask(generator: torch.Generator) -> None:
    x0, noise, predicted = (torch.randn(ROWS, TOKENS, CHANNELS, generator=generator) for _ in range(3))
    logits = torch.randn(ROWS, TOKENS, VOCAB, generator=generator)
    targets = torch.randint(VOCAB, (ROWS, TOKENS), generator=generator)
    t = torch.rand(ROWS, TOKENS, generator=generator)
    mask = torch.rand(ROWS, TOKENS, generator=generator) < 0.6
    predicted[~mask] = torch.nan  # padding must never reach a sum
    expected = {"velocity": 0.0, "x0": 0.0, "tokens": 0.0}
    for row, token in mask.nonzero().tolist():
        velocity = noise[row, token] - x0[row, token]
        expected["velocity"] += (predicted[row, token] - velocity).square().mean().item()
        expected["x0"] += (predicted[row, token] - x0[row, token]).square().mean().item()
        expected["tokens"] -= logits[row, token].log_softmax(-1)[targets[row, token]].item()
    for name, per_token in {
        "velocity": objectives.squared_error(predicted, Linear().velocity(x0, noise, t)),
        "x0": objectives.squared_error(predicted, x0),
        "tokens": objectives.token_losses(logits, targets),
    }.items():
        total, count = objectives.masked_sum(per_token, mask)
        assert total.dtype == count.dtype == torch.float32
        assert total.item() == pytest.approx(expected[name], rel=1e-5)
        assert count.item() == mask.sum()


def test_an_empty_mask_is_a_zero_with_zero_gradient(generator: torch.Generator) -> None:
    predicted = torch.randn(1, 2, CHANNELS, generator=generator, requires_grad=True)
    per_token = objectives.squared_error(predicted, torch.zeros(1, 2, CHANNELS))
    total, count = objectives.masked_sum(per_token, torch.zeros(1, 2, dtype=torch.bool))
    total.backward()
    assert total == 0 and count == 0 and predicted.grad is not None and (predicted.grad == 0).all()


@given(st.integers(1, 12), st.integers(0, 100))
def test_bins_partition_the_loss(bins: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    losses, t = torch.rand(ROWS, TOKENS, generator=generator), torch.rand(ROWS, TOKENS, generator=generator)
    t[0, 0], t[0, 1] = 1.0, 0.0
    mask = torch.rand(ROWS, TOKENS, generator=generator) < 0.7
    sums, counts = objectives.by_timestep_bin(losses, t, mask, bins)
    for index in range(bins):
        inside = mask & (t >= index / bins) & ((t < (index + 1) / bins) | (torch.tensor(index == bins - 1)))
        assert counts[index] == inside.sum()
        torch.testing.assert_close(sums[index], losses[inside].sum())
    by_row, _ = objectives.by_timestep_bin(losses, t[:, 0], mask, bins)
    torch.testing.assert_close(by_row, objectives.by_timestep_bin(losses, t[:, :1].expand(-1, TOKENS), mask, bins)[0])


@pytest.mark.parametrize("path", [Linear(), TanD(3.0)])
def test_constant_predictor_error_is_the_measured_one(path: Path, generator: torch.Generator) -> None:
    x0, noise = torch.randn(400, 5, 64, generator=generator), torch.randn(400, 5, 64, generator=generator)
    t = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0])
    per_token = objectives.squared_error(torch.zeros_like(x0), path.velocity(x0, noise, t.expand(400, 5)))
    torch.testing.assert_close(
        per_token.mean(0), objectives.constant_predictor_error(path, t, "velocity"), rtol=0.03, atol=0
    )
    assert objectives.constant_predictor_error(path, t, "x0").tolist() == [1.0] * 5


def test_expected_latent(generator: torch.Generator) -> None:
    table = torch.randn(VOCAB, CHANNELS, generator=generator)
    logits = torch.randn(ROWS, TOKENS, VOCAB, generator=generator)
    torch.testing.assert_close(objectives.expected_latent(logits, table), logits.softmax(-1) @ table)
    likeliest = table[logits.argmax(-1)]
    assert torch.equal(objectives.expected_latent(logits, table, 0), likeliest)
    torch.testing.assert_close(objectives.expected_latent(logits, table, 1e-4), likeliest)
    torch.testing.assert_close(
        objectives.expected_latent(logits, table, 1e6), table.mean(0).expand(ROWS, TOKENS, -1), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("path", [Linear(), TanD(3.0)])
def test_token_log_likelihood_is_the_normal_density(path: Path, generator: torch.Generator) -> None:
    table = torch.randn(VOCAB, CHANNELS, generator=generator)
    z = torch.randn(ROWS, TOKENS, CHANNELS, generator=generator)
    t = 0.2 + 0.8 * torch.rand(ROWS, TOKENS, generator=generator)
    alpha, sigma = path.alpha(t)[..., None, None], path.sigma(t)[..., None, None]
    exact = torch.distributions.Normal(alpha * table, sigma).log_prob(z.unsqueeze(-2)).sum(-1)
    got = objectives.token_log_likelihood(path, z, table, t)
    torch.testing.assert_close(got.log_softmax(-1), exact.log_softmax(-1), rtol=1e-4, atol=1e-4)
    clean = objectives.token_log_likelihood(path, table[[3, 7]], table, torch.tensor(0.0))
    assert clean.isfinite().all() and clean.argmax(-1).tolist() == [3, 7]
