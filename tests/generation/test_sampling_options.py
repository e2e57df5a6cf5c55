"""What solver, temperature and exit margin make of predictions that are known, against arithmetic."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatext.flow.solvers import Solver, sample
from megatext.generation import SamplingConfig, TextGenerator
from megatext.generation.noise import Noise, Request
from megatext.generation.oneshot import Writer
from megatext.generation.text_generator import Predictor
from megatext.recipes.flow_config import FlowConfig
from tests.generation.test_text_generator import SYSTEMS, export

TOKENS = 40
CHANNELS = 6
REQUEST = Request([7, 9, 11, 5], TOKENS, 3)
CALLS: dict[Solver, int] = {"euler": 5, "heun": 9, "dpmpp_2m": 5, "dpmpp_2m_sde": 5}
"""Of the network, in 5 steps."""


def draws() -> Noise:
    return Noise([REQUEST], [0], [(0, TOKENS)], torch.device("cpu"))


def denoise(
    generator: TextGenerator, sampling: SamplingConfig, predict: Predictor, decode: Tensor | None = None
) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
    """What is written of REQUEST, every token decoded as `decode` says, and the (z, self-condition) of every call."""
    calls: list[tuple[Tensor, Tensor | None]] = []

    def noted(z: Tensor, t: Tensor, previous: Tensor | None, guided: bool) -> tuple[Tensor, Tensor | None]:
        calls.append((z, previous))
        return predict(z, t, previous, guided)

    def logits(latents: Tensor) -> Tensor:
        assert decode is not None
        return decode

    counted = torch.ones(1, TOKENS, dtype=torch.bool)
    return generator.denoise(draws(), sampling, noted, logits, counted, lambda tokens: None), calls


def model(directory: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, *, ends_in_tokens: bool) -> TextGenerator:
    flow = FlowConfig(objective="token_cross_entropy" if ends_in_tokens else "x0")
    monkeypatch.setitem(SYSTEMS, "known", (flow, 0))
    return TextGenerator.from_pretrained(export(directory, tokenizer, "known"))


@torch.no_grad()
def test_a_sample_is_what_its_solver_makes_of_the_networks_predictions(
    tmp_path: Path, tokenizer_directory: Path
) -> None:
    """Each fed back what was predicted last, also between the two calls of a step."""
    generator = TextGenerator.from_pretrained(export(tmp_path, tokenizer_directory, "one_shot"))
    writer = Writer(generator, [REQUEST])

    def by_hand(solver: Solver) -> Tensor:
        noise, last = draws(), None

        def x0(z: Tensor, t: Tensor) -> Tensor:
            nonlocal last
            last = z - t * writer.predict(z, t, last, False)[0]
            return last

        def fresh() -> Tensor:
            return noise.normal(CHANNELS)

        return sample(x0, generator.module.path, fresh(), torch.linspace(1, 0, 6), solver, fresh)

    written: list[Tensor] = []
    for solver, count in CALLS.items():
        final, calls = denoise(generator, SamplingConfig(steps=5, solver=solver, grid="uniform"), writer.predict)
        assert len(calls) == count and torch.equal(calls[0][0], draws().normal(CHANNELS))
        torch.testing.assert_close(final, by_hand(solver), rtol=1e-4, atol=1e-4)
        assert all(float((final - other).abs().max()) > 0.02 for other in written)
        written.append(final)


@pytest.mark.parametrize("solver", ["euler", "ancestral"])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_temperature_is_of_the_tokens_that_a_step_expects_or_draws(
    temperature: float,
    solver: Solver,
    tmp_path: Path,
    tokenizer_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = model(tmp_path, tokenizer_directory, monkeypatch, ends_in_tokens=True)
    table = generator.module.table
    assert table is not None
    logits = 2 * torch.randn(1, TOKENS, len(table), generator=torch.Generator().manual_seed(0))
    likeliest = logits.argmax(dim=-1)
    shares = (logits / temperature).softmax(-1) if temperature else torch.eye(len(table))[likeliest]
    sampling = SamplingConfig(steps=2, solver=solver, grid="uniform", temperature=temperature, length="eos")
    final, (first, second) = denoise(generator, sampling, lambda *asked: (logits, None))

    noise = draws()
    z, expected = noise.normal(CHANNELS), shares @ table
    drawn = []
    for _ in range(2 if solver == "ancestral" else 0):
        drawn.append((shares.double().cumsum(-1) <= noise.uniform()[..., None]).sum(-1))
        z = (table[drawn[-1]] + noise.normal(CHANNELS)) / 2 if len(drawn) == 1 else z
    assert first[1] is None and second[1] is not None
    torch.testing.assert_close(second[1], expected)
    torch.testing.assert_close(second[0], z if drawn else (z + expected) / 2)
    assert torch.equal(final, drawn[-1] if drawn else likeliest)
    assert torch.equal(final, likeliest) == (solver == "euler" or temperature == 0)


@pytest.mark.parametrize("ends_in_tokens", [True, False])
@pytest.mark.parametrize(("margin", "steps"), [(0.1, 1), (0.2, 3)])
def test_an_exit_needs_a_lead_over_the_next_likeliest_token(
    margin: float,
    steps: int,
    ends_in_tokens: bool,
    tmp_path: Path,
    tokenizer_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = model(tmp_path, tokenizer_directory, monkeypatch, ends_in_tokens=ends_in_tokens)
    shares = torch.full((1, TOKENS, generator.vae.vocab_size), 0.01 / (generator.vae.vocab_size - 2))
    shares[..., 9], shares[..., 17] = 0.55, 0.44
    sampling, said = SamplingConfig(steps=3, exit_margin=margin), shares.log()
    _, calls = denoise(generator, sampling, lambda z, *asked: (said if ends_in_tokens else z, None), said)
    assert len(calls) == steps
