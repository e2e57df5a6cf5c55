"""TextDiT's rows: what the network may see, what the loss counts, and that randomness belongs to the row."""

from dataclasses import replace

import pytest
import torch

from megatext.config import ConfigError
from megatext.data.packing import TokenBatch
from megatext.flow.timesteps import TimestepConfig
from megatext.nn.blocks import TrunkConfig
from megatext.nn.dit import TextDiTConfig
from megatext.nn.text_vae import TextVAE, TextVAEConfig
from megatext.recipes.denoiser import make_denoiser
from megatext.recipes.flow_config import FlowConfig
from megatext.recipes.text_dit import TextDiTRecipe, TextDiTRecipeConfig
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
    with torch.no_grad():
        for parameter in recipe.module.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return recipe


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
