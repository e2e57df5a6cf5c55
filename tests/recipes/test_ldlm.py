"""LDLM's four ingredients against independent arithmetic, each alone; what knows what; what is exported."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, BertConfig, GPT2Config, LlamaConfig, Qwen3Config

from megatext import rng
from megatext.config import ConfigError
from megatext.data.hidden_states import FORMAT_VERSION
from megatext.data.teacher import Teacher, fingerprint
from megatext.flow.timesteps import AdaptiveTimestepConfig, TimestepConfig, probabilities_of
from megatext.nn.blocks import TrunkConfig, initialise
from megatext.nn.dit import TextDiTConfig
from megatext.nn.layout import CONTEXT, PADDING, TARGET, Layout
from megatext.nn.perceiver import LatentAutoencoderConfig, Perceiver
from megatext.recipes.base import Output, Prepared
from megatext.recipes.denoiser import found_timesteps
from megatext.recipes.flow_config import FlowConfig
from megatext.recipes.hidden_autoencoder import states_of_rows
from megatext.recipes.ldlm import (
    LDLMRecipe,
    LDLMRecipeConfig,
    check_states,
    encoder_gate,
    latent_rank,
    longest_window,
    make_module,
)
from megatext.recipes.text_vae import TeacherStatistics
from tests.recipes.rows import make_batch

TRUNK = TrunkConfig(layers=2, width=16, heads=2, initial_gate=1.0)
AUTOENCODER = LatentAutoencoderConfig(latent_channels=6, encoder=TRUNK, decoder=TRUNK, token_decoder=TRUNK)
FLOW = FlowConfig(path="tan-3", objective="x0", timesteps=TimestepConfig(distribution="uniform"))
CONFIG = LDLMRecipeConfig(autoencoder=AUTOENCODER, network=TextDiTConfig(trunk=TRUNK), flow=FLOW)


def language_model(kind: str = "gpt2") -> Teacher:
    """A small random language model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 20}
    config: Any = {
        "gpt2": lambda: GPT2Config(vocab_size=60, n_positions=64, n_embd=12, n_layer=3, n_head=2),
        "llama": lambda: LlamaConfig(vocab_size=60, **sizes),
        "qwen3": lambda: Qwen3Config(vocab_size=60, num_key_value_heads=1, head_dim=6, **sizes),
        "bert": lambda: BertConfig(vocab_size=60, max_position_embeddings=64, **sizes),
    }[kind]()
    return Teacher(AutoModel.from_config(config).eval().requires_grad_(False), -2, 12)


def make_recipe(config: LDLMRecipeConfig = CONFIG) -> LDLMRecipe:
    """A recipe with random weights, without files."""
    recipe = object.__new__(LDLMRecipe)
    recipe.config, recipe.flow, recipe.seed, recipe.teacher = config, config.flow, 3, language_model()
    recipe.eos_id = 2
    recipe.statistics = TeacherStatistics(torch.zeros(12), torch.ones(12), causal=True)
    recipe.module = make_module(config, 12, 60)
    initialise(recipe.module, lambda name, p: torch.randn(p.shape, generator=rng.generator(0, name)))
    recipe.module.autoencoder.hidden_mean.copy_(torch.linspace(-0.5, 0.5, 12))
    recipe.module.autoencoder.hidden_std.copy_(torch.linspace(0.5, 2.0, 12))
    with torch.no_grad():  # zero at initialisation, and with them most gradients
        for name, parameter in recipe.module.named_parameters():
            if "modulation" in name or "head" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=rng.generator(2, name)) * 0.3)
    return recipe


def run(recipe: LDLMRecipe, step: int = 0) -> tuple[Prepared, Output]:
    prepared = recipe.prepare(make_batch(), step=step)
    return prepared, recipe.module(**prepared.inputs)


def gradients(recipe: LDLMRecipe, term: str, step: int = 0) -> dict[str, float]:
    """Norm of a loss term's gradient in each part of the module; 0 where it has none."""
    recipe.module.zero_grad()
    run(recipe, step)[1].loss_sums[term].backward()
    parts = {"encoder": recipe.module.autoencoder.encoder, "decoder": recipe.module.autoencoder.decoder}
    parts |= {"tokens": recipe.module.autoencoder.unembedding, "denoiser": recipe.module.denoiser}
    return {
        name: math.sqrt(sum(float(p.grad.square().sum()) for p in part.parameters() if p.grad is not None))
        for name, part in parts.items()
    }


def test_the_gate_is_a_sigmoid_of_the_steps() -> None:
    assert encoder_gate(0, 100) == pytest.approx(1 / (1 + math.exp(8)))
    assert encoder_gate(80, 100) == 0.5
    assert encoder_gate(100, 100) == pytest.approx(1 / (1 + math.exp(-2)))
    assert encoder_gate(10_000, 100) == pytest.approx(1.0)
    assert encoder_gate(0, 0) == 1.0


@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_the_gate_scales_the_encoders_gradient_and_nothing_else(warmup_steps: int) -> None:
    """Against finite differences of L_diff: in the encoder its derivative times the gate, in the denoiser all of it."""
    recipe = make_recipe(replace(CONFIG, encoder_warmup_steps=warmup_steps))
    recipe.module.double()
    step, gate = 7, encoder_gate(7, warmup_steps)
    inputs = recipe.prepare(make_batch(), step=step).inputs
    inputs["states"], inputs["decoder_noise"] = inputs["states"].double(), inputs["decoder_noise"].double()
    inputs["shot"].noise = inputs["shot"].noise.double()
    inputs["shot"].times.table = inputs["shot"].times.table.double()

    def loss() -> Tensor:
        return recipe.module(**inputs).loss_sums["flow"]

    loss().backward()
    checked = {
        recipe.module.autoencoder.encoder.read.weight: gate,
        recipe.module.autoencoder.encoder.write.weight: gate,
        recipe.module.denoiser.network.latent_in.weight: 1.0,
    }
    for parameter, factor in checked.items():
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 3e-3 * direction
            ends.append(loss().item())
            with torch.no_grad():
                parameter -= sign * 3e-3 * direction
        expected = factor * (ends[0] - ends[1]) / 6e-3
        assert parameter.grad is not None
        assert (parameter.grad * direction).sum().item() == pytest.approx(expected, rel=1e-2, abs=3e-3)


def test_the_gate_does_not_change_any_loss() -> None:
    gated, open_ = (make_recipe(replace(CONFIG, encoder_warmup_steps=n)) for n in (1000, 0))
    for (name, one), other in zip(run(gated)[1].loss_sums.items(), run(open_)[1].loss_sums.values(), strict=True):
        assert one.item() == pytest.approx(other.item(), rel=1e-6), name


def test_losses_by_independent_arithmetic() -> None:
    recipe = make_recipe()
    prepared, output = run(recipe)
    ae, inputs = recipe.module.autoencoder, prepared.inputs
    batch, states, shot = make_batch(), prepared.inputs["states"], prepared.inputs["shot"]
    real = batch.segment >= 0
    read = states_of_rows(recipe.teacher, batch.tokens, shot.layout, True)
    assert torch.allclose(states, (read - torch.linspace(-0.5, 0.5, 12)) / torch.linspace(0.5, 2.0, 12), atol=1e-5)
    fresh = make_recipe().module.autoencoder
    latents = fresh.encode_states(states, shot.layout)
    assert torch.allclose(latents.square().mean(-1), torch.ones(latents.shape[:2]), atol=1e-4)
    decoded = fresh.decode_states(latents + 3.0 * inputs["decoder_noise"], shot.layout.separated())
    hidden = ((decoded - states) ** 2).mean(-1)[real].sum()
    assert output.loss_sums["hidden"].item() == pytest.approx(hidden.item(), rel=1e-5)
    logits = ae.token_logits(decoded, shot.layout.separated())
    tokens = F.cross_entropy(logits[real], batch.tokens[real], reduction="sum")
    assert output.loss_sums["tokens"].item() == pytest.approx(tokens.item(), rel=1e-5)
    target = shot.target & real
    assert prepared.counts == {"flow": target.sum(), "hidden": real.sum(), "tokens": real.sum()}
    t = shot.times.table[shot.times.index][..., None]
    turn = torch.atan(3 * torch.tan(math.pi / 2 * t))
    noisy = turn.cos() * latents + turn.sin() * shot.noise
    known = torch.where(shot.target[..., None], noisy, latents.masked_fill(shot.zeroed[..., None], 0))
    predicted = recipe.module.denoiser.network(
        known, shot.times.table, shot.times.index, batch.position, shot.target, shot.mask
    )[0]
    flow = ((predicted - latents) ** 2).mean(-1)[target].sum()
    assert output.loss_sums["flow"].item() == pytest.approx(flow.item(), rel=1e-4)


def test_the_tokens_loss_stops_at_the_hidden_states() -> None:
    found = gradients(make_recipe(), "tokens")
    assert found["encoder"] == found["decoder"] == 0 and found["tokens"] > 0
    hidden = gradients(make_recipe(), "hidden")
    assert hidden["encoder"] > 0 and hidden["decoder"] > 0 and hidden["tokens"] == hidden["denoiser"] == 0


def test_with_cross_entropy_it_goes_all_the_way_and_is_alone() -> None:
    recipe = make_recipe(replace(CONFIG, decoder_loss="cross_entropy"))
    found = gradients(recipe, "tokens")
    assert found["encoder"] > 0 and found["decoder"] > 0
    prepared, output = run(recipe)
    assert set(output.loss_sums) == set(prepared.counts) == set(recipe.loss_weights(0)) == {"flow", "tokens"}


def test_the_decoder_reads_noise_in_training_only() -> None:
    quiet, noisy = make_recipe(replace(CONFIG, decoder_noise=0.0)), make_recipe()
    assert run(quiet)[1].loss_sums["hidden"].item() != pytest.approx(run(noisy)[1].loss_sums["hidden"].item())
    for recipe in (quiet, noisy):
        recipe.module.eval()
    first, second = run(quiet)[1], run(noisy)[1]
    assert torch.equal(first.loss_sums["hidden"], second.loss_sums["hidden"])
    levels = {name: float(total / count) for name, (total, count) in second.metrics.items() if "_at_" in name}
    assert len(levels) == 6 and levels["accuracy_at_0.0"] == pytest.approx(
        float(torch.divide(*second.metrics["accuracy"]))
    )


def test_adaptive_timesteps_follow_the_loss_and_are_exported() -> None:
    adaptive = AdaptiveTimestepConfig(bins=4, decay=0.5, refresh_steps=4, floor=0.2)
    recipe = make_recipe(replace(CONFIG, flow=replace(FLOW, adaptive_timesteps=adaptive)))
    sampler = recipe.module.denoiser.timesteps
    assert sampler is not None
    sums, counts = torch.zeros(4), torch.zeros(4)
    for step in range(4):
        own = make_batch(seed=step + 21)  # rows whose losses rise with t: a random network need not know
        prepared = recipe.prepare(own, step=step)
        recipe.module(**prepared.inputs)
        shot, ae = prepared.inputs["shot"], recipe.module.autoencoder
        with torch.no_grad():
            latents = ae.encode_states(prepared.inputs["states"], shot.layout)
            recipe.module.denoiser.timesteps = None
            t = shot.times.table[shot.times.index]
            noisy = recipe.module.denoiser.path.interpolate(latents, shot.noise, t)
            known = torch.where(shot.target[..., None], noisy, latents.masked_fill(shot.zeroed[..., None], 0))
            predicted = recipe.module.denoiser.network(
                known, shot.times.table, shot.times.index, own.position, shot.target, shot.mask
            )[0]
            recipe.module.denoiser.timesteps = sampler
        error = ((predicted - latents) ** 2).mean(-1)
        counted = shot.target & shot.layout.real
        sums, counts = sums / 2, counts / 2
        for i in range(4):
            here = counted & (t >= i / 4) & (t < (i + 1) / 4)
            sums[i], counts[i] = sums[i] + error[here].sum(), counts[i] + here.sum()
        assert torch.equal(sampler.probabilities, torch.full((4,), 0.25))
        recipe.end_of_step(step, True)
    assert torch.allclose(sampler.loss_sum, sums, rtol=1e-4) and torch.equal(sampler.loss_count, counts)
    assert bool((counts > 0).all())
    assert torch.allclose(sampler.probabilities, probabilities_of(sums, counts, 0.2).float(), rtol=1e-4)
    assert not torch.equal(sampler.probabilities, torch.full((4,), 0.25))
    weights = {f"module.{name}": tensor for name, tensor in recipe.module.state_dict().items()}
    found = found_timesteps(recipe.flow, weights, "module.denoiser.")
    assert found.timesteps.probabilities == pytest.approx(sampler.probabilities.tolist())


def test_a_step_that_was_not_applied_is_forgotten() -> None:
    recipe = make_recipe(replace(CONFIG, flow=replace(FLOW, adaptive_timesteps=AdaptiveTimestepConfig(bins=4))))
    before = {name: tensor.clone() for name, tensor in recipe.module.named_buffers()}
    prepared = recipe.prepare(make_batch(), step=0)
    prepared.inputs["states"][0, 0] = math.nan
    assert not torch.isfinite(recipe.module(**prepared.inputs).loss_sums["flow"])
    recipe.end_of_step(0, False)
    recipe.end_of_step(1, True)  # and nothing of it comes later
    assert all(torch.equal(tensor, before[name]) for name, tensor in recipe.module.named_buffers())


def test_a_validation_looks_at_fixed_timesteps() -> None:
    adaptive = AdaptiveTimestepConfig(bins=4)
    recipe = make_recipe(replace(CONFIG, flow=replace(FLOW, adaptive_timesteps=adaptive)))
    sampler = recipe.module.denoiser.timesteps
    assert sampler is not None
    shots = []
    for favoured in (0, 3):
        sampler.probabilities.fill_(0.01)[favoured] = 0.97
        shots += [recipe.prepare(make_batch(), step=0, purpose=p).inputs["shot"] for p in ("train", "validation")]
    assert torch.equal(shots[1].times.table, shots[3].times.table)
    assert shots[0].times.table[1:].median() < 0.25 and shots[2].times.table[1:].median() > 0.75


@pytest.mark.parametrize("infill", [0.0, 1.0])
def test_a_context_does_not_know_its_target(infill: float) -> None:
    """Neither by the language model nor by the latent encoder, also where it stands behind it; the target's latents
    know the context."""
    flow = replace(FLOW, unconditional_probability=0.0, infill_probability=infill)
    recipe = make_recipe(replace(CONFIG, flow=flow))
    batch = make_batch()
    inputs = recipe.prepare(batch, step=0).inputs
    layout, ae = inputs["shot"].layout, recipe.module.autoencoder.eval()
    context = layout.real & ~inputs["shot"].target
    behind = context & torch.roll(inputs["shot"].target, 1, dims=1) & (batch.position > 0)
    assert bool(behind.any()) == bool(infill)
    other = replace(batch, tokens=torch.where(context, batch.tokens, (batch.tokens - 4 + 9) % 56 + 4))
    before, after = (
        ae.encode_states(recipe.prepare(b, step=0).inputs["states"], layout).detach() for b in (batch, other)
    )
    assert torch.equal(before[context], after[context]) and not torch.allclose(before, after)


def test_segments_are_cut_and_padded_with_ends_of_text() -> None:
    flow = replace(FLOW, segment_lengths="log_uniform", min_segment_tokens=2, eos_padding_tokens=3)
    recipe, batch = make_recipe(replace(CONFIG, flow=flow)), make_batch(rows=40)
    batch.tokens[:, 20] = 2  # where the rows' texts end
    shot = recipe.prepare(batch, step=0).inputs["shot"]
    assert shot.layout.segment.max() > 1  # more of them than windows
    added = (shot.layout.segment >= 0) & (batch.segment < 0)
    tokens = recipe.prepare(batch, step=0).inputs["tokens"]
    assert added.any() and (tokens[added] == 2).all() and shot.target[added].all()
    plain = recipe.prepare(batch, step=0, purpose="validation").inputs["shot"]
    assert plain.layout.segment.max() == 1


def test_latents_begin_varied_and_have_one_scale() -> None:
    """What the untrained encoder says of all tokens is taken away once; then a norm without parameters."""
    recipe, batch = make_recipe(), make_batch()
    layout, ae = Layout.of(batch.segment, batch.position), recipe.module.autoencoder
    states = ae.standardise(states_of_rows(recipe.teacher, batch.tokens, layout, True))
    ae.measure(states, layout)
    outputs = ae.encoder(states, layout).detach()
    centred = (outputs - outputs[layout.real].mean(0)) / outputs[layout.real].std(0)
    expected = F.layer_norm(centred, (6,), eps=1e-6)
    latents = ae.encode_states(states, layout).detach()
    assert torch.allclose(latents, expected, atol=1e-4)
    assert torch.allclose(latents.square().mean(-1), torch.ones(latents.shape[:2]), atol=1e-3)
    assert latents[layout.real].mean(0).abs().max() < 0.3


def test_a_perceiver_reads_every_input_and_only_its_own_segment() -> None:
    torch.manual_seed(0)
    perceiver = Perceiver(TRUNK, 4, 5)
    batch = make_batch(rows=1)
    layout = Layout.of(batch.segment, batch.position).with_role(TARGET)
    x = torch.randn(1, batch.tokens.shape[1], 4, requires_grad=True)
    y = perceiver(x, layout)
    assert y.shape == (1, batch.tokens.shape[1], 5)
    y[0, 1].square().sum().backward()
    assert x.grad is not None
    own = layout.segment[0] == layout.segment[0, 1]
    assert torch.equal(x.grad[0].abs().sum(-1) > 0, own)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"flow": replace(FLOW, block_tokens=4)}, "ldlm.flow.block_tokens must be 0"),
        ({"flow": replace(FLOW, objective="token_cross_entropy")}, "token_cross_entropy needs output: tokens"),
        ({"flow": replace(FLOW, target_encoding="with_context")}, "ldlm.flow.target_encoding"),
        ({"flow": replace(FLOW, token_weight=1.0)}, "token_weight needs a frozen TextVAE"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make_module(replace(CONFIG, **options), 10, 60)


def test_the_rank_of_latents_counts_the_directions_they_vary_in() -> None:
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 16))[0]
    for used in (1, 3, 8):
        signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=used)))  # equal variances, no covariance
        assert rank_of(5.0 + signs @ directions[:used]) == pytest.approx(used, rel=1e-5)
    uneven = torch.tensor([[3.0, 1.0], [3.0, -1.0], [-3.0, 1.0], [-3.0, -1.0]]) @ directions[:2]
    assert rank_of(uneven) == pytest.approx((9 + 1) ** 2 / (81 + 1), rel=1e-5)


def rank_of(latents: Tensor) -> float:
    """Of latents `[tokens, channels]`, beside as many that are not real."""
    real = torch.tensor([[True] * len(latents) + [False] * len(latents)])
    return latent_rank(torch.cat([latents, 100 * torch.randn_like(latents)])[None], real).item()


def test_collapse_is_told() -> None:
    recipe = make_recipe()
    healthy = {"active_units": 6.0, "latent_rank": 3.5, "latent_variance": 0.4}
    assert not recipe.warnings(healthy)
    assert "the latents collapse: 2 of 6 channels" in recipe.warnings(healthy | {"active_units": 2.0})[0]
    assert "in 1.2 directions" in recipe.warnings(healthy | {"latent_rank": 1.2})[0]
    assert "by a variance of 0.12 of 1" in recipe.warnings(healthy | {"latent_variance": 0.12})[0]


def test_a_short_text_is_read_in_a_row_longer_than_the_models_positions() -> None:
    teacher, tokens = language_model(), make_batch(rows=1, row_tokens=100).tokens
    segment = torch.where(torch.arange(100) < 10, 0, PADDING)[None]
    states = states_of_rows(teacher, tokens, Layout.of(segment, torch.arange(100)[None]), causal=True)
    assert torch.allclose(states[0, :10], teacher.states([tokens[0, :10].numpy()])[0], atol=1e-5)


def test_causality_is_asked_of_the_longest_text() -> None:
    batch = make_batch(rows=2)
    batch.segment[0] = torch.arange(24) // 2  # texts of two tokens, which tell nothing
    assert longest_window(batch).tolist() == batch.tokens[1, :12].tolist()
    batch.segment[1] = torch.arange(24) // 2
    with pytest.raises(ConfigError, match="the longest text of the first rows has 2 tokens"):
        longest_window(batch)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"teacher_fingerprint": "another"}, "states of another model"),
        ({"layer": -2}, "states of layer -2, but ldlm.layer is -3"),
        ({"causal": False}, "would tell of the target"),
    ],
)
def test_states_that_do_not_fit_are_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    model, states = tmp_path / "model", tmp_path / "states"
    language_model().model.save_pretrained(model)
    states.mkdir()
    manifest = {"format_version": FORMAT_VERSION, "teacher_fingerprint": fingerprint(str(model)), "layer": -3}
    (states / "manifest.json").write_text(json.dumps(manifest | {"causal": True}))
    config = replace(CONFIG, language_model=str(model))
    check_states(str(states), config)
    with pytest.raises(ConfigError, match="infill_probability with extracted states"):
        check_states(str(states), replace(config, flow=replace(FLOW, infill_probability=0.5)))
    (states / "manifest.json").write_text(json.dumps(manifest | {"causal": True} | changes))
    with pytest.raises(ConfigError, match=told):
        check_states(str(states), config)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "bert"])
def test_states_of_rows_are_those_of_every_text_alone(kind: str) -> None:
    """Against the extractor, which runs whole texts; a context alone where the model looks ahead."""
    teacher, batch = language_model(kind), make_batch()
    role = torch.where(batch.position < 4, CONTEXT, TARGET)
    layout = Layout.of(batch.segment, batch.position, role)
    causal = teacher.is_causal(batch.tokens[0, :12].numpy())
    assert causal == (kind != "bert")
    states = states_of_rows(teacher, batch.tokens, layout, causal)
    for row, of in enumerate(batch.segment):
        for number in (0, 1):
            columns = (of == number).nonzero()[:, 0]
            for part in (columns,) if causal else (columns[:4],):
                expected = teacher.states([batch.tokens[row, part].numpy()])[0]
                assert torch.allclose(states[row, part], expected, atol=1e-5)
