"""TextDiT's rows: what the network may see, what the loss counts, and that randomness belongs to the row."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatext.config import ConfigError
from megatext.data.packing import TokenBatch
from megatext.data.stream import DataConfig
from megatext.flow.timesteps import AdaptiveTimestepConfig, TimestepConfig, probabilities_of
from megatext.generation.text_generator import TextGenerator
from megatext.nn.blocks import TrunkConfig
from megatext.nn.dit import TextDiTConfig
from megatext.nn.text_vae import TextVAE, TextVAEConfig
from megatext.recipes.denoiser import make_denoiser
from megatext.recipes.draws import RowDraws
from megatext.recipes.flow_config import FlowConfig
from megatext.recipes.pretrained import write_model
from megatext.recipes.sampling import SamplingConfig
from megatext.recipes.text_dit import PretrainDiTConfig, TextDiTRecipe, TextDiTRecipeConfig
from megatext.tokenizer import load_tokenizer
from tests.recipes.rows import make_batch

TRUNK = TrunkConfig(layers=2, width=16, heads=2)
BLOCKS = FlowConfig(
    objective="token_cross_entropy", block_tokens=4, token_likelihood=True, timesteps=TimestepConfig(location=1.0)
)
ONE_SHOT = FlowConfig(objective="velocity", condition_dropout=0.2)


def make_recipe(flow: FlowConfig, *, local: bool = True, network: TextDiTConfig | None = None) -> TextDiTRecipe:
    """A recipe with random weights, without files."""
    torch.manual_seed(0)
    encoder = replace(TRUNK, layers=0) if local else TRUNK
    vae = TextVAE(TextVAEConfig(latent_channels=6, encoder=encoder, decoder=TRUNK), vocab_size=60).eval()
    tokens_out = flow.objective == "token_cross_entropy"
    network = network or TextDiTConfig(trunk=TRUNK, output="tokens" if tokens_out else "latent")
    config = TextDiTRecipeConfig(network=network, flow=flow)
    recipe = object.__new__(TextDiTRecipe)
    recipe.config, recipe.seed, recipe.flow, recipe.vae, recipe.eos_id = config, 3, flow, vae, 2
    recipe.module = make_denoiser(config.network, config.flow, vae, frozen=True)
    randomise(recipe)
    return recipe


def randomise(recipe: TextDiTRecipe) -> None:
    with torch.no_grad():
        for parameter in recipe.module.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)


def build_recipe(directory: Path, tokenizer: Path, config: TextDiTRecipeConfig) -> TextDiTRecipe:
    """A recipe as a launcher builds it, on an exported VAE with random weights."""
    torch.manual_seed(0)
    sizes = TextVAEConfig(latent_channels=6, encoder=replace(TRUNK, layers=0), decoder=TRUNK)
    vae = TextVAE(sizes, load_tokenizer(tokenizer).vocab_size)
    write_model(directory / "vae", "text_vae", sizes, vae.state_dict(), tokenizer=tokenizer)
    config = replace(config, vae=str(directory / "vae"))
    return TextDiTRecipe(PretrainDiTConfig(run_dir="", max_steps=1, data=DataConfig("shards"), dit=config))


@pytest.mark.parametrize(("flow", "local"), [(ONE_SHOT, False), (ONE_SHOT, True), (BLOCKS, True)])
def test_rows_do_not_depend_on_the_batch_they_come_in(flow: FlowConfig, local: bool) -> None:
    recipe, batch = make_recipe(flow, local=local), make_batch(rows=4)
    part = TokenBatch(batch.tokens[2:], batch.segment[2:], batch.position[2:], batch.row_index[2:], batch.documents[2:])
    whole, half = recipe.prepare(batch, step=0).inputs, recipe.prepare(part, step=9).inputs
    for name in ("latents", "noise", "tokens", "loss_mask"):
        assert torch.equal(whole[name][2:], half[name]), name
    t_whole, t_half = (x["timesteps"][x["timestep_index"]] for x in (whole, half))
    assert torch.equal(t_whole[2:], t_half)


def test_target_tokens_never_leak_into_context_latents() -> None:
    recipe, batch = make_recipe(ONE_SHOT, local=False), make_batch(rows=3)
    inputs = recipe.prepare(batch, step=0).inputs
    target = inputs["layout"].role == 1
    changed = replace(batch, tokens=torch.where(target, (batch.tokens + 1) % 60, batch.tokens))
    again = recipe.prepare(changed, step=0).inputs
    context = ~target & (batch.segment >= 0)
    assert context.any() and torch.equal(inputs["latents"][context], again["latents"][context])
    assert not torch.equal(inputs["latents"][target], again["latents"][target])
    # and the other way round: the target is encoded without its context
    changed = replace(batch, tokens=torch.where(context, (batch.tokens + 1) % 60, batch.tokens))
    again = recipe.prepare(changed, step=0).inputs
    goal = target & (batch.segment >= 0)
    assert torch.equal(inputs["latents"][goal], again["latents"][goal])


def test_noisy_blocks_see_clean_history_and_nothing_later() -> None:
    """The prediction of a block changes with earlier tokens and not with later ones, nor with its own clean ones."""
    flow = replace(BLOCKS, condition_dropout=0.0, partial_block_probability=0.0)
    network = TextDiTConfig(trunk=TRUNK, output="tokens", token_embedding=True)
    recipe, batch = make_recipe(flow, network=network), make_batch(rows=1)
    inputs = recipe.prepare(batch, step=0).inputs

    def predict(tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the noisy copy where only the clean copy's tokens change."""
        other = recipe.prepare(replace(batch, tokens=tokens), step=0).inputs
        seen: list[torch.Tensor] = []
        inputs["neighbours"] = other["neighbours"]
        handle = recipe.module.network.register_forward_hook(lambda module, args, output: seen.append(output[0]))
        recipe.module(**(inputs | {"history": other["history"]}))
        handle.remove()
        return seen[-1]

    before = predict(batch.tokens)
    for column in (0, 5, 11):
        tokens = batch.tokens.clone()
        tokens[0, column] = (tokens[0, column] + 1) % 60
        moved = (predict(tokens) != before).any(-1)[0]
        segment, block = batch.segment[0], batch.position[0] // 4
        later = (segment == segment[column]) & (block > block[column])
        assert torch.equal(moved, later), column


def test_dropped_conditions_hide_the_history() -> None:
    recipe, batch = make_recipe(replace(BLOCKS, condition_dropout=1.0)), make_batch(rows=1)
    mask = recipe.prepare(batch, step=0).inputs["mask"].dense[0, 0]
    assert not mask[:, : batch.tokens.shape[1]][batch.segment[0] >= 0].any()
    inputs = recipe.prepare(batch, step=0).inputs
    assert (inputs["neighbours"][batch.position % 4 == 0] == -1).all()


def test_partly_given_blocks_are_clean_and_cost_no_loss() -> None:
    recipe, batch = make_recipe(replace(BLOCKS, partial_block_probability=1.0)), make_batch(rows=8, row_tokens=48)
    inputs = recipe.prepare(batch, step=0).inputs
    pinned = (inputs["timestep_index"] == 0) & (batch.segment >= 0)
    assert pinned.any() and not inputs["loss_mask"][pinned].any()
    assert (batch.position[pinned] % 4 < 3).all()  # at least one token of a block is left to write


def test_timesteps_follow_the_distribution() -> None:
    flow = replace(BLOCKS, timesteps=TimestepConfig(distribution="uniform"), partial_block_probability=0.0)
    inputs = make_recipe(flow).prepare(make_batch(rows=64), step=0).inputs
    t = inputs["timesteps"][inputs["timestep_index"]].flatten().sort().values
    assert (t - torch.linspace(0, 1, len(t))).abs().max() < 0.03


def test_best_possible_network_under_token_likelihood() -> None:
    """With a uniform prior (zero logits) the likelihood alone is Bayes' answer: nothing known at t = 1, all at 0."""
    recipe = make_recipe(BLOCKS)
    module, table = recipe.module, recipe.module.table
    tokens = torch.randint(0, 60, (1, 200))
    noise = torch.randn(1, 200, 6)
    for t, low, high in ((1.0, 4.0, 4.2), (0.05, 0.0, 0.05)):
        every = torch.full((1, 200), t)
        z = module.path.interpolate(table[tokens], noise, every)
        logits = module.logits(torch.zeros(1, 200, 60), z, every)
        joint = (-(z[..., None, :] - (1 - t) * table).square().sum(-1) / (2 * t * t)).log_softmax(-1)
        torch.testing.assert_close(logits.log_softmax(-1), joint, rtol=1e-3, atol=1e-3)
        assert low <= torch.nn.functional.cross_entropy(logits[0], tokens[0]) <= high


def test_self_conditioning_sees_the_first_estimate() -> None:
    flow = replace(BLOCKS, self_conditioning_probability=0.5)
    network = TextDiTConfig(trunk=TRUNK, output="tokens", self_conditioning=True)
    recipe = make_recipe(flow, network=network)
    coins = [recipe.prepare(make_batch(), step=step).inputs["self_condition"] for step in range(60)]
    assert 15 < sum(coins) < 45
    inputs = recipe.prepare(make_batch(), step=0).inputs
    losses = [
        float(recipe.module(**(inputs | {"self_condition": c})).loss_sums["flow"].detach()) for c in (False, True)
    ]
    assert losses[0] != losses[1]


def test_what_enters_a_column_moves_with_its_left_neighbour() -> None:
    network = TextDiTConfig(trunk=TRUNK, output="tokens", token_embedding=True)
    recipe = make_recipe(replace(BLOCKS, partial_block_probability=0.5), network=network)
    inputs = recipe.prepare(make_batch(), step=0).inputs
    entered: list[torch.Tensor] = []
    recipe.module.network.trunk.register_forward_pre_hook(lambda module, args: entered.append(args[0].detach()))
    neighbours = inputs["neighbours"]
    told = neighbours >= 0
    for others in (neighbours, torch.where(told, (neighbours + 7) % 60, -1), torch.full_like(neighbours, -1)):
        recipe.module(**(inputs | {"neighbours": others}))
    own, others, without = entered[1::2]
    table = recipe.module.network.neighbour_embedding.weight.detach() * TRUNK.width**0.5
    expected = table[neighbours].masked_fill(~told[..., None], 0.0)
    assert told.any() and not told.all()
    torch.testing.assert_close(own - without, expected, rtol=1e-4, atol=1e-5)
    moved = table[(neighbours + 7) % 60].masked_fill(~told[..., None], 0.0)
    torch.testing.assert_close(others - own, moved - expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_latents_of_blocks_are_means_of_the_posterior_or_samples(posterior: Any) -> None:
    recipe, batch = make_recipe(FlowConfig(block_tokens=4, posterior=posterior)), make_batch()
    recipe.vae.latent_mean.fill_(0.3)
    recipe.vae.latent_std.fill_(2.0)
    inputs = recipe.prepare(batch, step=0).inputs
    latents, log_variance, _ = recipe.vae.encode(batch.tokens, recipe.vae.layout(batch.segment, batch.position))
    if posterior == "sample":
        noise = RowDraws(3, "train", batch.row_index).normal("posterior", (24, 6), torch.device("cpu"))
        latents = latents + (log_variance / 2).exp() * noise
    torch.testing.assert_close(inputs["latents"], (latents - 0.3) / 2.0)
    torch.testing.assert_close(inputs["history"].latents, (latents - 0.3) / 2.0)


def test_targets_of_one_shot_are_samples_of_the_posterior_and_contexts_its_means() -> None:
    recipe, batch = make_recipe(replace(ONE_SHOT, condition_dropout=0.0), local=False), make_batch()
    recipe.vae.latent_mean.fill_(0.3)
    recipe.vae.latent_std.fill_(2.0)
    inputs = recipe.prepare(batch, step=0).inputs
    layout = inputs["layout"]
    mean, log_variance, _ = recipe.vae.encode(batch.tokens, layout.separated())
    noise = RowDraws(3, "train", batch.row_index).normal("posterior", (24, 6), torch.device("cpu"))
    latents = torch.where((layout.role == 1)[..., None], mean + (log_variance / 2).exp() * noise, mean)
    assert (layout.role[layout.real] == 0).any() and (layout.role[layout.real] == 1).any()
    torch.testing.assert_close(inputs["latents"], (latents - 0.3) / 2.0)


@pytest.mark.parametrize("flow", [replace(ONE_SHOT, eos_padding_tokens=3), BLOCKS])
def test_segments_are_cut_and_padded_with_ends_of_text_in_training(flow: FlowConfig) -> None:
    flow = replace(flow, segment_lengths="log_uniform", min_segment_tokens=2, condition_dropout=0.0)
    recipe, batch = make_recipe(flow), make_batch(rows=40)
    batch.tokens[:, 20] = 2  # where the rows' texts end
    inputs = recipe.prepare(batch, step=0).inputs
    layout = inputs["layout"]
    assert layout.segment.max() > 1  # more of them than windows
    added = layout.real & (batch.segment < 0)
    assert bool(added.any()) == (flow.eos_padding_tokens > 0)
    assert (inputs["tokens"][added] == 2).all() and inputs["loss_mask"][added].all()
    plain = recipe.prepare(batch, step=0, purpose="validation").inputs
    assert plain["layout"].segment.max() == 1


def test_adaptive_timesteps_are_drawn_from_and_follow_the_loss() -> None:
    adaptive = AdaptiveTimestepConfig(bins=4, decay=0.5, refresh_steps=2)
    recipe = make_recipe(replace(ONE_SHOT, adaptive_timesteps=adaptive))
    sampler, seen = recipe.module.timesteps, {}
    assert sampler is not None
    for favoured in (0, 3):
        sampler.probabilities.fill_(0.01)[favoured] = 0.97
        for purpose in ("train", "validation"):
            seen[purpose, favoured] = recipe.prepare(make_batch(rows=100), step=0, purpose=purpose).inputs["timesteps"]
        drawn = (seen["train", favoured][1:] * 4).long()
        assert float((drawn == favoured).double().mean()) == pytest.approx(0.97, abs=0.05)
    assert torch.equal(seen["validation", 0], seen["validation", 3])
    sampler.probabilities.fill_(0.25)
    for step, applied in enumerate((True, False, True, True)):
        recipe.module(**recipe.prepare(make_batch(rows=100, seed=step), step=step).inputs)
        before = sampler.loss_count.clone()
        recipe.end_of_step(step, applied)
        assert torch.equal(sampler.loss_count, before) != applied
    assert bool((sampler.loss_count > 0).all())
    found = probabilities_of(sampler.loss_sum, sampler.loss_count, adaptive.floor).float()
    torch.testing.assert_close(sampler.probabilities, found)
    assert not torch.equal(found, torch.full((4,), 0.25))


def test_previews_and_exports_follow_the_sampling_and_the_timesteps_that_were_found(
    tmp_path: Path, tokenizer_directory: Path
) -> None:
    flow = replace(ONE_SHOT, adaptive_timesteps=AdaptiveTimestepConfig(bins=4))
    own = SamplingConfig(steps=3)
    config = TextDiTRecipeConfig(network=TextDiTConfig(trunk=TRUNK), flow=flow, sampling=own)
    recipe = build_recipe(tmp_path, tokenizer_directory, config)
    randomise(recipe)
    assert recipe.module.timesteps is not None
    shares = (0.0625, 0.0625, 0.125, 0.75)
    recipe.module.timesteps.probabilities.copy_(torch.tensor(shares))
    timesteps = TimestepConfig(distribution="bins", probabilities=shares)
    generator = TextGenerator(recipe.module, recipe.vae, load_tokenizer(tokenizer_directory), SamplingConfig())
    asked: dict[str, Any] = {"target_tokens": [32] * 4, "seeds": [5, 6, 7, 8]}
    on_other_timesteps = generator.generate([""] * 4, **asked, sampling=own)
    generator.flow = replace(flow, timesteps=timesteps)
    written = generator.generate([""] * 4, **asked, sampling=own)
    assert written not in (on_other_timesteps, generator.generate([""] * 4, **asked))
    assert recipe.preview(5) == written
    recipe.export(recipe.module.state_dict(), tmp_path / "export")
    exported = TextGenerator.from_pretrained(tmp_path / "export")
    assert exported.flow.timesteps == timesteps and exported.sampling == own
    assert exported.generate([""] * 4, **asked) == written


@pytest.mark.parametrize(
    ("flow", "local", "network", "message"),
    [
        (BLOCKS, True, TextDiTConfig(trunk=TRUNK, output="latent"), "output"),
        (BLOCKS, False, None, "token-local"),
        (replace(ONE_SHOT, block_tokens=4), False, None, "history"),
        (replace(ONE_SHOT, token_likelihood=True), True, None, "token_likelihood"),
        (replace(BLOCKS, self_conditioning_probability=0.5), True, None, "self_conditioning"),
    ],
)
def test_options_that_do_not_fit_together(
    flow: FlowConfig, local: bool, network: TextDiTConfig | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_recipe(flow, local=local, network=network)


def test_bins_add_up_to_the_loss() -> None:
    recipe = make_recipe(BLOCKS)
    prepared = recipe.prepare(make_batch(), step=0)
    output = recipe.module(**prepared.inputs)
    sums = [output.metrics[f"loss_t{i}"] for i in range(10)]
    torch.testing.assert_close(sum(s for s, _ in sums), output.loss_sums["flow"].detach(), rtol=1e-5, atol=1e-3)
    assert float(sum(c for _, c in sums)) == float(prepared.counts["flow"])


def test_best_constant_predictors() -> None:
    batches = [make_batch(seed=seed) for seed in (1, 2)]
    velocity = make_recipe(ONE_SHOT).finish(batches)
    # linear path, latents of variance 1: the velocity noise - x0 has variance 2 at every timestep
    assert velocity and all(value == pytest.approx(2.0) for value in velocity.values())


def test_best_predictors_without_context() -> None:
    """Unigrams as the prior, the Gaussian of the noise as the likelihood: Bayes' rule by hand, one token at a time."""
    recipe, batch = make_recipe(BLOCKS), make_batch(seed=1)
    inputs = recipe.prepare(batch, step=0, purpose="validation").inputs
    tokens, table = batch.tokens[batch.segment >= 0], recipe.module.table
    assert recipe.flow.token_likelihood and table is not None
    shares = tokens.bincount(minlength=len(table)).double() / len(tokens)
    t = inputs["timesteps"][inputs["timestep_index"]].double()
    noisy = (1 - t[..., None]) * inputs["latents"] + t[..., None] * inputs["noise"]
    lost: dict[str, list[float]] = {}
    for row, column in inputs["loss_mask"].nonzero().tolist():
        at, token = float(t[row, column]), inputs["tokens"][row, column]
        squares = (noisy[row, column] - (1 - at) * table.double()).square().sum(dim=-1)
        posterior = shares * (-squares / (2 * max(at, 0.05) ** 2)).exp()
        where = min(int(at * 10), 9)
        lost.setdefault(f"constant_t{where}", []).append(-float(shares[token].log()))
        lost.setdefault(f"no_context_t{where}", []).append(-float((posterior[token] / posterior.sum()).log()))
    expected = {name: pytest.approx(sum(nats) / len(nats), rel=1e-3, abs=1e-4) for name, nats in lost.items()}
    assert recipe.finish([batch]) == expected
