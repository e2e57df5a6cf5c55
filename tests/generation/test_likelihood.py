"""Likelihoods of text: the truth where a model is exact; functions of text and prompt alone, in blocks and one shot."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatext.config import ConfigError
from megatext.flow.paths import Linear
from megatext.generation import LikelihoodConfig, TextGenerator
from megatext.generation.likelihood import log_likelihood
from megatext.nn.text_vae import TextVAE
from megatext.recipes.flow_config import FlowConfig
from tests.generation.test_text_generator import PROMPTS, SYSTEMS, export

TOKENS = (5, 9, 17)
"""The vocabulary of the exact model."""


class Exact(nn.Module):
    """A network that knows the distribution of texts of two tokens, and Bayes' rule."""

    def __init__(self, network: nn.Module, table: Tensor, joint: Tensor, ends_in_tokens: bool) -> None:
        super().__init__()
        self.config, self.latent_in = network.config, network.latent_in
        self.table, self.joint, self.ends_in_tokens = table, joint, ends_in_tokens
        self.modulations = network.modulations

    def forward(self, z: Tensor, times: Any, index: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, list[Any]]:
        z, t = z[:, -2:].double(), times[index[0, -1]].double()
        texts = list(itertools.product(range(3), repeat=2))
        clean = torch.stack([self.table[[TOKENS[i], TOKENS[j]]] for i, j in texts]).double()
        weights = self.joint.flatten().double().log() - (z[:, None] - (1 - t) * clean).square().flatten(2).sum(-1) / (
            2 * t * t
        )
        posterior = weights.softmax(-1)
        if not self.ends_in_tokens:
            out = torch.einsum("rk,ktc->rtc", posterior, clean)
        else:
            out = torch.full((len(z), 2, len(self.table)), -1e9, dtype=torch.float64)
            for place in range(2):
                for token in range(3):
                    share = posterior[:, [text[place] == token for text in texts]].sum(-1)
                    out[:, place, TOKENS[token]] = share.clamp(min=1e-300).log()
        return out.float(), []


@pytest.fixture
def exact(tmp_path: Path, tokenizer_directory: Path) -> TextGenerator:
    """One shot on token-local latents, with the exact posterior for a network and no prior likelihood of its own."""
    SYSTEMS["tokens_one_shot"] = (FlowConfig(objective="token_cross_entropy"), 0)
    generator = TextGenerator.from_pretrained(export(tmp_path, tokenizer_directory, "tokens_one_shot"))
    del SYSTEMS["tokens_one_shot"]
    return generator


JOINT = torch.tensor([[0.30, 0.05, 0.10], [0.02, 0.25, 0.03], [0.05, 0.05, 0.15]])


def test_an_exact_models_bound_is_the_likelihood_of_independent_tokens(exact: TextGenerator) -> None:
    """A decoder reads its tokens one by one, so that with independent ones nothing is lost."""
    shares = torch.tensor([0.6, 0.3, 0.1])
    assert exact.module.table is not None
    exact.module.network = Exact(exact.module.network, exact.module.table, torch.outer(shares, shares), True)  # type: ignore[assignment]
    pairs = [([], [TOKENS[i], TOKENS[j]]) for i, j in ((0, 0), (0, 2), (1, 2))]
    found = log_likelihood(exact, pairs, LikelihoodConfig(seeds=48, steps=24, smallest_timestep=0.3))
    for likelihood, (i, j) in zip(found, ((0, 0), (0, 2), (1, 2)), strict=True):
        truth = -math.log(shares[i] * shares[j])
        assert likelihood.error < 0.25 and likelihood.nats == pytest.approx(truth, abs=4 * likelihood.error)
        assert likelihood.tokens == 2 and likelihood.estimator == "variational bound"


def test_tokens_that_hang_together_cost_a_parallel_decoder_something(exact: TextGenerator) -> None:
    """At little noise every token is known by itself, and nothing is lost; at much it is known by its share alone."""
    assert exact.module.table is not None
    exact.module.network = Exact(exact.module.network, exact.module.table, JOINT, True)  # type: ignore[assignment]
    pairs: list[tuple[list[int], list[int]]] = [([], [TOKENS[i], TOKENS[j]]) for i in range(3) for j in range(3)]
    entropy, *apart = (-float((p * p.log()).sum()) for p in (JOINT, JOINT.sum(0), JOINT.sum(1)))
    means, errors = [], []
    for s, seeds in ((0.1, 48), (0.9, 12)):
        found = log_likelihood(exact, pairs, LikelihoodConfig(seeds=seeds, steps=24, smallest_timestep=s))
        estimates = JOINT.flatten().double() @ torch.tensor([each.estimates for each in found], dtype=torch.float64)
        means.append(float(estimates.mean()))
        errors.append(float(estimates.std()) / math.sqrt(seeds))
        assert entropy - 4 * errors[-1] < means[-1] < sum(apart) + 4 * errors[-1]
    assert means[0] == pytest.approx(entropy, abs=0.15)
    assert means[1] > entropy + 20 * errors[1] and means[1] > means[0] + 3 * math.hypot(*errors)


def test_the_ode_agrees_with_the_variational_bound(exact: TextGenerator) -> None:
    assert exact.module.table is not None
    exact.module.network = Exact(exact.module.network, exact.module.table, JOINT, True)  # type: ignore[assignment]
    pairs = [([], [TOKENS[0], TOKENS[0]]), ([], [TOKENS[1], TOKENS[2]])]
    config = LikelihoodConfig(estimator="ode", seeds=24, steps=40, smallest_timestep=0.2)
    for likelihood, truth in zip(log_likelihood(exact, pairs, config), (0.30, 0.03), strict=True):
        assert likelihood.nats == pytest.approx(-math.log(truth), abs=4 * likelihood.error + 0.1)
        assert likelihood.estimator == "bound by the probability-flow ODE"


def test_an_exact_model_of_latents_with_a_decoder_that_knows_them(
    tmp_path: Path, tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At little noise the expected latents are those of the text, and the decoder's nats are nearly none."""
    monkeypatch.setitem(SYSTEMS, "latents_one_shot", (FlowConfig(objective="x0"), 0))
    generator = TextGenerator.from_pretrained(export(tmp_path, tokenizer_directory, "latents_one_shot"))
    assert isinstance(generator.vae, TextVAE) and generator.module.table is None
    vae, table = generator.vae, generator.vae.token_table()
    generator.module.network = Exact(generator.module.network, table, JOINT, False)  # type: ignore[assignment]
    monkeypatch.setattr(
        vae, "decode", lambda latents, layout: -1e3 * torch.cdist(vae.standardise(latents), table[None]).square()
    )
    places = ((0, 0), (0, 1), (1, 2), (2, 2))
    config = LikelihoodConfig(seeds=48, steps=24, smallest_timestep=0.1)
    found = log_likelihood(generator, [([], [TOKENS[i], TOKENS[j]]) for i, j in places], config)
    for likelihood, (i, j) in zip(found, places, strict=True):
        assert likelihood.error < 0.3
        assert likelihood.nats == pytest.approx(-math.log(JOINT[i, j]), abs=4 * likelihood.error + 0.05)
        assert likelihood.decoder_nats < 0.05


class ExactBlocks(nn.Module):
    """The same for texts of two blocks of two tokens, of two that there are: a block given the clean ones before it,
    and its own tokens that are given, by enumeration."""

    def __init__(self, network: nn.Module, table: Tensor, joint: Tensor) -> None:
        super().__init__()
        self.config, self.latent_in = network.config, network.latent_in
        self.table, self.joint = table, joint

    def forward(self, z: Tensor, times: Tensor, index: Tensor, position: Tensor, *rest: Any, **more: Any) -> Any:
        if more.get("history"):
            return z, [more["tokens"]]
        (tokens,), texts = more["past"], list(itertools.product(range(2), repeat=4))
        out = torch.full((*z.shape[:2], len(self.table)), -1e9, dtype=torch.float64)
        for row in range(len(z)):
            for block in (0, 1):
                weights = self.joint.flatten().double().log()
                for place in range(2 * block + 2):
                    t = times[index[row, place]].double()
                    clean = torch.stack([self.table[TOKENS[text[place]]] for text in texts]).double()
                    if place < 2 * block or t == 0:  # known
                        known = torch.tensor([TOKENS[text[place]] == int(tokens[row, place]) for text in texts])
                        weights = weights.masked_fill(~known, -math.inf)
                    else:
                        weights = weights - (z[row, place].double() - (1 - t) * clean).square().sum(-1) / (2 * t * t)
                posterior = weights.softmax(-1)
                for place in (2 * block, 2 * block + 1):
                    for token in range(2):
                        share = posterior[torch.tensor([text[place] == token for text in texts])].sum()
                        out[row, place, TOKENS[token]] = share.clamp(min=1e-300).log()
        return out.float(), []


@pytest.mark.parametrize("prompt_tokens", [0, 1, 2])
def test_blocks_are_scored_after_each_other(prompt_tokens: int, exact: TextGenerator) -> None:
    """The chain rule over blocks, and a prompt that ends inside one, against the joint distribution."""
    joint = torch.rand(2, 2, 2, 2, generator=torch.Generator().manual_seed(5)) + 0.1
    joint = joint / joint.sum()
    assert exact.module.table is not None
    exact.flow = exact.module.flow = replace(exact.flow, block_tokens=2)
    exact.module.network = ExactBlocks(exact.module.network, exact.module.table, joint)  # type: ignore[assignment]
    texts = [(0, 1, 1, 0), (1, 1, 0, 0)]
    ids = [[TOKENS[i] for i in text] for text in texts]
    pairs = [(text[:prompt_tokens], text[prompt_tokens:]) for text in ids]
    found = log_likelihood(exact, pairs, LikelihoodConfig(seeds=24, steps=16, smallest_timestep=0.2))
    for likelihood, text in zip(found, texts, strict=True):
        given = joint[text[:prompt_tokens]].sum() if prompt_tokens else 1.0
        truth = -math.log(float(joint[text] / given))
        assert likelihood.error < 0.4 and likelihood.nats == pytest.approx(truth, abs=4 * likelihood.error)


KINDS = ["blocks", "cola", "one_shot", "one_shot_zeros"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("estimator", ["variational", "ode"])
def test_a_texts_bound_does_not_depend_on_its_neighbours(
    name: str, estimator: str, tmp_path: Path, tokenizer_directory: Path
) -> None:
    generator = TextGenerator.from_pretrained(export(tmp_path, tokenizer_directory, name))
    config = LikelihoodConfig(estimator=estimator, seeds=2, steps=3)  # type: ignore[arg-type]
    texts = ["the cat ran", "a dog", "it was very big and red", "on"]
    together = generator.log_likelihood(PROMPTS, texts, config)
    for i in range(4):
        (alone,) = generator.log_likelihood([PROMPTS[i]], [texts[i]], config)
        assert alone.nats == pytest.approx(together[i].nats, rel=1e-3) and alone.tokens == together[i].tokens
    assert len({round(each.nats, 3) for each in together}) == 4
    other = generator.log_likelihood(PROMPTS, texts, replace(config, first_seed=7))
    assert other[0].nats != together[0].nats


def test_an_estimate_asks_the_network_where_its_configuration_says(tmp_path: Path, tokenizer_directory: Path) -> None:
    """What the decoder reads at the smallest timestep; then once in every stratum of log t, or at both its ends."""
    generator = TextGenerator.from_pretrained(export(tmp_path, tokenizer_directory, "one_shot"))
    asked: list[float] = []
    generator.module.network.register_forward_hook(lambda module, args, output: asked.append(float(args[1][1])))
    nats = []
    for s, steps in ((0.1, 3), (0.4, 5)):
        strata = list(itertools.pairwise(s ** (1 - i / steps) for i in range(steps + 1)))
        for config in (LikelihoodConfig("variational"), LikelihoodConfig("ode")):
            asked.clear()
            config = replace(config, seeds=2, steps=steps, smallest_timestep=s)
            (found,) = generator.log_likelihood(["the cat"], ["sat on"], config)
            for first, *others in (asked[: len(asked) // 2], asked[len(asked) // 2 :]):
                assert first == pytest.approx(s)
                if config.estimator == "ode":
                    assert others == pytest.approx([t for stratum in strata for t in stratum])
                else:
                    assert all(low < t < high for t, (low, high) in zip(others, strata, strict=True))
            nats.append(found.nats)
    assert all(abs(a - b) > 0.1 for a, b in itertools.combinations(nats, 2))


@pytest.mark.parametrize("name", ["blocks", "one_shot"])
def test_the_prompt_counts(name: str, tmp_path: Path, tokenizer_directory: Path) -> None:
    generator = TextGenerator.from_pretrained(export(tmp_path, tokenizer_directory, name))
    config = LikelihoodConfig(seeds=2, steps=3)
    first, second = generator.log_likelihood([PROMPTS[0], PROMPTS[3]], ["the tree", "the tree"], config)
    assert first.nats != pytest.approx(second.nats, rel=1e-4) and first.tokens == second.tokens


def test_what_has_no_bound_is_refused(tmp_path: Path, tokenizer_directory: Path) -> None:
    generator = TextGenerator.from_pretrained(export(tmp_path / "a", tokenizer_directory, "blocks_velocity"))
    with pytest.raises(ConfigError, match="does not look ahead"):
        generator.log_likelihood(["the"], ["cat"])
    generator = TextGenerator.from_pretrained(export(tmp_path / "b", tokenizer_directory, "one_shot"))
    generator.flow = replace(generator.flow, unconditional_probability=1.0)
    with pytest.raises(ConfigError, match="from nothing only"):
        generator.log_likelihood(["the"], ["cat"])
    generator.flow = replace(generator.flow, unconditional_probability=0.1)
    with pytest.raises(ConfigError, match="no tokens"):
        generator.log_likelihood(["the"], [""])
    with pytest.raises(ConfigError, match="smallest_timestep"):
        generator.log_likelihood(["the"], ["cat"], LikelihoodConfig(smallest_timestep=0.0))
    assert isinstance(generator.module.path, Linear)
