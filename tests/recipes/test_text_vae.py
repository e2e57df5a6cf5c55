"""TextVAE's losses against independent arithmetic, its statistics, its export."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatext import rng
from megatext.config import ConfigError, from_dict
from megatext.nn.blocks import TrunkConfig, initialise
from megatext.nn.layout import Layout
from megatext.nn.text_vae import TextVAE, TextVAEConfig
from megatext.recipes.pretrained import load_text_vae, read_description, write_model
from megatext.recipes.text_vae import (
    PretrainVAEConfig,
    TeacherStatistics,
    TextVAERecipe,
    TextVAERecipeConfig,
    TextVAETraining,
    teacher_of,
)
from megatext.tokenizer import load_tokenizer
from tests.recipes.rows import make_batch

TRUNK = TrunkConfig(layers=1, width=16, heads=2)
NETWORK = TextVAEConfig(latent_channels=6, encoder=TRUNK, decoder=TRUNK)


def make_recipe(config: TextVAERecipeConfig, teacher: TeacherStatistics | None = None) -> TextVAERecipe:
    """A recipe with random weights, without files."""
    recipe = object.__new__(TextVAERecipe)
    recipe.config, recipe.seed, recipe.teacher = config, 5, teacher
    width = teacher.mean.numel() if teacher else 0
    recipe.module = TextVAETraining(TextVAE(config.network, 60), config, width)
    initialise(recipe.module, lambda name, p: torch.randn(p.shape, generator=rng.generator(0, name)))
    return recipe


def test_losses_are_sums_over_real_tokens() -> None:
    recipe, batch = (
        make_recipe(TextVAERecipeConfig(network=replace(NETWORK, latent_norm="none"), decoder_noise=0.5)),
        make_batch(),
    )
    prepared = recipe.prepare(batch, step=0)
    output = recipe.module(**prepared.inputs)
    inputs, network = prepared.inputs, recipe.module.network
    mean, log_variance, _ = network.encode(batch.tokens, inputs["layout"])
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(-1)
    real = batch.segment >= 0
    torch.testing.assert_close(output.loss_sums["kl"], kl[real].sum(), rtol=1e-4, atol=1e-3)
    latents = posterior.mean + posterior.stddev * inputs["posterior_noise"]
    s = inputs["noise_level"][..., None]
    logits = network.decode((1 - s) * latents + s * inputs["decoder_noise"], inputs["layout"])
    expected = torch.nn.functional.cross_entropy(logits[real], batch.tokens[real], reduction="sum")
    torch.testing.assert_close(output.loss_sums["reconstruction"], expected, rtol=1e-4, atol=1e-3)
    assert float(prepared.counts["kl"]) == float(real.sum())
    assert s.min() >= 0 and s.max() <= 0.5 and s.flatten(1).unique().numel() > 4


def test_kl_weight_is_warmed_up() -> None:
    recipe = make_recipe(TextVAERecipeConfig(network=NETWORK, kl_weight=0.2, kl_warmup_steps=10))
    weights = [recipe.loss_weights(step)["kl"] for step in (0, 4, 9, 100)]
    assert weights == pytest.approx([0.02, 0.1, 0.2, 0.2])


def test_truncation_shortens_segments_from_the_right_in_training_only() -> None:
    recipe, batch = make_recipe(TextVAERecipeConfig(network=NETWORK, truncation=1.0)), make_batch(rows=16)
    layout = recipe.prepare(batch, step=0).inputs["layout"]
    kept = (layout.segment >= 0).sum() / (batch.segment >= 0).sum()
    assert 0.3 < float(kept) < 0.75
    for row in range(16):
        for segment in (0, 1):
            seen = layout.segment[row][batch.segment[row] == segment] == segment
            assert seen[0] and (seen.long().diff() <= 0).all()
    whole = recipe.prepare(batch, step=0, purpose="validation").inputs["layout"]
    assert torch.equal(whole.segment, batch.segment)


def test_truncation_cuts_its_share_of_the_segments_at_uniform_lengths() -> None:
    recipe = make_recipe(TextVAERecipeConfig(network=NETWORK, truncation=0.3))
    batch = make_batch(rows=400, row_tokens=64)
    seen = recipe.prepare(batch, step=0).inputs["layout"].segment
    kept = torch.cat([(seen == segment).sum(1) / (batch.segment == segment).sum(1) for segment in (0, 1)])
    shortened = kept[kept < 1]  # a cut may keep all of the 32 or 29 tokens
    assert len(shortened) / len(kept) == pytest.approx(0.3 * (1 - 1 / 30), abs=0.05)
    assert float(shortened.mean()) == pytest.approx(0.5, abs=0.06)
    assert float(shortened.min()) < 0.1 and float(shortened.max()) > 0.9


def test_the_decoders_noise_has_one_level_a_segment_uniform_up_to_the_maximum() -> None:
    recipe, batch = make_recipe(TextVAERecipeConfig(network=NETWORK, decoder_noise=0.8)), make_batch(rows=1000)
    level = recipe.prepare(batch, step=0).inputs["noise_level"]
    first, second = level[:, 0], level[:, 12]
    assert torch.equal(level.where(batch.segment == 0, first[:, None]), first[:, None].expand_as(level))
    assert torch.equal(level.where(batch.segment == 1, second[:, None]), second[:, None].expand_as(level))
    levels = torch.cat((first, second)).sort().values
    assert int((levels.diff() > 0).sum()) > 1990
    torch.testing.assert_close(levels, 0.8 * (torch.arange(2000) + 0.5) / 2000, rtol=0, atol=0.8 * 0.04)


def test_the_masking_loss_is_the_cross_entropy_of_tokens_the_encoder_did_not_see() -> None:
    network_config = replace(NETWORK, mask_token=True, latent_norm="none")
    config = TextVAERecipeConfig(network=network_config, mask_weight=0.7, mask_probability=0.4)
    recipe, batch = make_recipe(config), make_batch()
    prepared = recipe.prepare(batch, step=0)
    output = recipe.module(**prepared.inputs)
    hidden, network = prepared.inputs["hidden"], recipe.module.network
    assert recipe.loss_weights(0)["mask"] == 0.7
    at = torch.zeros_like(batch.tokens, dtype=torch.bool)
    for row in range(len(at)):
        at[row, hidden.at[row][hidden.counted[row]]] = True
    assert at.sum(1).tolist() == [round(0.4 * 21)] * 4 and not (at & (batch.segment < 0)).any()
    assert float(prepared.counts["mask"]) == float(at.sum())
    mean, log_variance, _ = network.encode(batch.tokens.masked_fill(at, 60), prepared.inputs["layout"])
    latents = mean + (0.5 * log_variance).exp() * prepared.inputs["posterior_noise"]
    logits = network.decode(latents, prepared.inputs["layout"])
    expected = torch.nn.functional.cross_entropy(logits[at], batch.tokens[at], reduction="sum")
    torch.testing.assert_close(output.loss_sums["mask"], expected, rtol=1e-4, atol=1e-3)
    own = hidden.loss_sum(network, batch.tokens, prepared.inputs["layout"], prepared.inputs["posterior_noise"])
    assert torch.equal(output.loss_sums["mask"], own)
    without = make_recipe(replace(config, mask_weight=0.0))
    prepared = without.prepare(batch, step=0)
    losses = without.module(**prepared.inputs).loss_sums
    assert "hidden" not in prepared.inputs
    assert set(losses) == set(prepared.counts) == set(without.loss_weights(0)) == {"reconstruction", "kl"}
    assert torch.equal(losses["reconstruction"], output.loss_sums["reconstruction"])
    with pytest.raises(ConfigError, match="mask_token"):
        make_recipe(replace(config, network=NETWORK))


@pytest.mark.parametrize(("repa_projector", "layers"), [("linear", 1), ("mlp", 2)])
def test_repa_is_the_cosine_to_standardised_states(repa_projector: str, layers: int) -> None:
    statistics = TeacherStatistics(torch.randn(8), torch.rand(8) + 0.5, causal=True)
    config = TextVAERecipeConfig(network=NETWORK, repa_weight=0.7, repa_projector=repa_projector)  # type: ignore[arg-type]
    recipe = make_recipe(config, statistics)
    assert recipe.loss_weights(0)["repa"] == 0.7 and recipe.module.projector is not None
    assert sum(isinstance(module, torch.nn.Linear) for module in recipe.module.projector.modules()) == layers
    batch = make_batch()
    run = {"run_dir": "x", "max_steps": 1, "data": {"shards": "x"}, "vae": {"repa_weight": 1.0}}
    with pytest.raises(ConfigError, match="extract_hidden_states"):
        teacher_of(from_dict(PretrainVAEConfig, run, "x.yaml"))
    valid = batch.segment == 0
    batch = replace(batch, hidden=torch.randn(*batch.tokens.shape, 8).bfloat16(), hidden_valid=valid)
    prepared = recipe.prepare(batch, step=0)
    output = recipe.module(**prepared.inputs)
    _, _, features = recipe.module.network.encode(batch.tokens, prepared.inputs["layout"])
    assert recipe.module.projector is not None
    ours = torch.nn.functional.normalize(recipe.module.projector(features), dim=-1)
    theirs = torch.nn.functional.normalize((batch.hidden.float() - statistics.mean) / statistics.std, dim=-1)
    expected = (1 - (ours * theirs).sum(-1))[valid].sum()
    torch.testing.assert_close(output.loss_sums["repa"], expected, rtol=1e-4, atol=1e-4)
    assert float(prepared.counts["repa"]) == float(valid.sum())


@pytest.mark.parametrize("standardised", [True, False])
def test_finish_measures_the_latents_of_real_tokens(standardised: bool) -> None:
    network_config = replace(NETWORK, latent_norm="none", standardised=standardised)
    recipe = make_recipe(TextVAERecipeConfig(network=network_config))
    batches = [make_batch(seed=1), make_batch(seed=2)]
    figures = recipe.finish(batches)
    network = recipe.module.network
    latents = torch.cat(
        [
            network.standardise(network.encode(b.tokens, Layout.of(b.segment, b.position))[0])[b.segment >= 0]
            for b in batches
        ]
    )
    if standardised:
        torch.testing.assert_close(latents.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
        torch.testing.assert_close(latents.std(0), torch.ones(6), atol=1e-3, rtol=0)
    else:
        assert torch.equal(network.latent_mean, torch.zeros(6)) and torch.equal(network.latent_std, torch.ones(6))
    hits = [
        (network.decode(network.encode(b.tokens, layout)[0], layout).argmax(-1) == b.tokens)[layout.real]
        for b in batches
        for layout in [Layout.of(b.segment, b.position)]
    ]
    assert figures["accuracy_at_0.0"] == pytest.approx(float(torch.cat(hits).double().mean()))


def test_export_round_trip(tmp_path: Path, tokenizer_directory: Path) -> None:
    vocab_size = load_tokenizer(tokenizer_directory).vocab_size
    vae = TextVAE(NETWORK, vocab_size).eval()
    vae.latent_mean.copy_(torch.randn(6))
    write_model(tmp_path / "vae", "text_vae", NETWORK, vae.state_dict(), tokenizer=tokenizer_directory)
    loaded, fingerprint = load_text_vae(tmp_path / "vae")
    assert fingerprint == load_tokenizer(tokenizer_directory).fingerprint()
    assert not any(p.requires_grad for p in loaded.parameters())
    batch = make_batch()
    layout = Layout.of(batch.segment, batch.position)
    latents, _, _ = vae.encode(batch.tokens, layout)
    assert torch.equal(loaded.encode(batch.tokens, layout)[0], latents)
    assert torch.equal(
        loaded.decode(loaded.unstandardise(loaded.standardise(latents)), layout),
        vae.decode(vae.unstandardise(vae.standardise(latents)), layout),
    )
    with pytest.raises(ConfigError, match="not a text_dit"):
        read_description(tmp_path / "vae", "text_dit")


def test_token_and_latent_dropout_are_of_training_alone() -> None:
    config = TextVAERecipeConfig(network=NETWORK, token_dropout=0.3, latent_dropout=0.6)
    recipe, batch = make_recipe(config), make_batch(rows=60)
    assert "dropped_tokens" not in recipe.prepare(batch, step=0, purpose="validation").inputs
    inputs = recipe.prepare(batch, step=0).inputs
    tokens, channels = inputs["dropped_tokens"], inputs["dropped_channels"]
    assert float(tokens.float().mean()) == pytest.approx(0.3, abs=0.04)
    assert float(channels.float().mean()) == pytest.approx(0.6, abs=0.02)
    network, seen = recipe.module.network, {}
    hooks = [
        network.encoder.register_forward_pre_hook(lambda module, args: seen.update(encoder=args[0])),
        network.latent_in.register_forward_pre_hook(lambda module, args: seen.update(decoder=args[0])),
    ]
    recipe.module(**inputs)
    for hook in hooks:
        hook.remove()
    assert torch.equal((seen["encoder"] == 0).all(-1), tokens)
    assert torch.equal(seen["encoder"][~tokens], network.embedding(batch.tokens)[~tokens])
    assert torch.equal(seen["decoder"] == 0, channels)  # the others keep their scale
    mean, log_variance, _ = network.encode(batch.tokens, inputs["layout"], hidden=tokens)
    latents = network.sample(mean, log_variance, inputs["posterior_noise"])
    torch.testing.assert_close(seen["decoder"][~channels], latents[~channels])
    with pytest.raises(ConfigError, match="dropout"):
        make_recipe(replace(config, latent_dropout=1.0))
