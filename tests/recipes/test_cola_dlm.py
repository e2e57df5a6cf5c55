"""Cola DLM's losses against independent arithmetic, what has a gradient and what not, how rows are cut in blocks."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from megatext import rng
from megatext.config import ConfigError
from megatext.data.packing import TokenBatch
from megatext.flow.timesteps import TimestepConfig
from megatext.nn.blocks import TrunkConfig, initialise
from megatext.nn.dit import TextDiTConfig
from megatext.nn.text_vae import TextVAE, TextVAEConfig
from megatext.recipes.cola_dlm import ColaDLMRecipe, ColaDLMRecipeConfig, make_module
from megatext.recipes.draws import RowDraws
from megatext.recipes.flow_config import FlowConfig
from megatext.recipes.text_vae import HiddenTokens
from tests.recipes.rows import make_batch

TRUNK = TrunkConfig(layers=2, width=16, heads=2)
VAE = TextVAEConfig(latent_channels=6, encoder=TRUNK, decoder=TRUNK, attention="causal", mask_token=True)
FLOW = FlowConfig(
    objective="velocity",
    block_tokens=4,
    posterior="sample",
    timesteps=TimestepConfig(location=1.0),
    condition_dropout=0,
)
CONFIG = ColaDLMRecipeConfig(network=TextDiTConfig(trunk=TRUNK), flow=FLOW)


def make_recipe(config: ColaDLMRecipeConfig = CONFIG, vae: TextVAEConfig = VAE) -> ColaDLMRecipe:
    """A recipe with random weights, without files; the trained VAE is not the reference."""
    recipe = object.__new__(ColaDLMRecipe)
    recipe.config, recipe.seed = config, 3
    recipe.reference = TextVAE(vae, 60).requires_grad_(False)
    recipe.module = make_module(config, recipe.reference)
    for number, part in enumerate((recipe.reference, recipe.module)):
        initialise(part, lambda name, p, n=number: torch.randn(p.shape, generator=rng.generator(n, name)))
    with torch.no_grad():  # zero at initialisation, and with them most gradients
        for name, parameter in recipe.module.named_parameters():
            if "modulation" in name or "head" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=rng.generator(2, name)) * 0.3)
        recipe.reference.latent_mean.fill_(0.2)
    if recipe.module.vae is not None:
        recipe.module.vae.latent_mean.fill_(0.2)
    return recipe


def test_losses_are_the_papers() -> None:
    recipe, batch = make_recipe(), make_batch()
    prepared = recipe.prepare(batch, step=0)
    output = recipe.module(**prepared.inputs)
    vae, streams, real = recipe.module.vae, prepared.inputs["streams"], batch.segment >= 0
    assert vae is not None
    layout = vae.layout(batch.segment, batch.position)
    mean, log_variance, _ = vae.encode(batch.tokens, layout)
    posterior = Normal(mean, (0.5 * log_variance).exp())
    reference = recipe.reference.encode(batch.tokens, layout)
    drift = kl_divergence(posterior, Normal(reference[0], (0.5 * reference[1]).exp())).sum(-1)
    latents = mean + posterior.stddev * prepared.inputs["posterior_noise"]
    logits = vae.decode(latents, layout)
    expected = {
        "reconstruction": F.cross_entropy(logits[real], batch.tokens[real], reduction="sum"),
        "entropy": -posterior.entropy().sum(-1)[real].sum(),  # E log q
        "reference": drift[real].sum(),
    }
    # the flow's loss: the velocity noise - x0, read off the denoiser's own row
    z = latents - 0.2
    t = streams.times.table[streams.times.index][..., None]
    velocity, _ = recipe.module.denoiser.network(
        (1 - t) * z + t * streams.noise,
        streams.times.table,
        streams.times.index,
        streams.noisy.position,
        torch.ones_like(real),
        streams.noisy_mask,
        past=recipe.module.denoiser.network(
            z,
            torch.zeros(1),
            torch.zeros_like(batch.tokens),
            batch.position,
            torch.zeros_like(real),
            streams.clean_mask,
        )[1],
    )
    error = (velocity - (streams.noise - z)).square().mean(-1)
    expected["flow"] = error[streams.loss_mask].sum()
    assert set(output.loss_sums) == {*expected, "mask"} == set(prepared.counts) == set(recipe.loss_weights(0))
    for name, value in expected.items():
        torch.testing.assert_close(output.loss_sums[name], value, rtol=1e-4, atol=1e-3, msg=name)
    assert float(prepared.counts["flow"]) == int(streams.loss_mask.sum()) < int(real.sum())


def test_weights_of_the_terms() -> None:
    config = replace(
        CONFIG, vae_weight=2.0, entropy_weight=0.5, mask_weight=0.25, flow_weight=3.0, reference_weight=4.0
    )
    expected = {"flow": 3.0, "reconstruction": 2.0, "entropy": 1.0, "mask": 0.5, "reference": 4.0}
    assert make_recipe(config).loss_weights(7) == expected
    without = make_recipe(replace(config, mask_weight=0.0, reference_weight=0.0))
    assert set(without.loss_weights(0)) == {"flow", "reconstruction", "entropy"}
    assert set(without.module(**without.prepare(make_batch(), step=0).inputs).loss_sums) == set(without.loss_weights(0))


def test_history_has_no_gradient_and_noisy_blocks_have() -> None:
    """The flow's loss of the second block moves the encoder through that block's noisy latents only: not through the
    clean ones before it, nor through those of its own tokens that are given."""
    recipe, batch = make_recipe(replace(CONFIG, flow=replace(FLOW, partial_block_probability=1.0))), make_batch(rows=1)
    streams = recipe.prepare(batch, step=0).inputs["streams"]
    latents = torch.randn(*batch.tokens.shape, 6, requires_grad=True)
    inputs = streams.inputs(batch.tokens, latents)
    second = (batch.segment == 0) & (batch.position // 4 == 1)
    inputs["loss_mask"] = inputs["loss_mask"] & second
    loss = recipe.module.denoiser(**inputs, self_condition=False).loss_sums["flow"]
    (gradient,) = torch.autograd.grad(loss, latents, retain_graph=True)
    assert 0 < int((second & ~inputs["loss_mask"]).sum()) < 4  # some are given
    assert torch.equal(gradient.abs().sum(-1) > 0, inputs["loss_mask"])
    inputs["history"].latents = latents  # what the stop-gradient keeps away
    (through,) = torch.autograd.grad(recipe.module.denoiser(**inputs, self_condition=False).loss_sums["flow"], latents)
    assert (through.abs().sum(-1) > 0)[(batch.segment == 0) & (batch.position < 4)].all()
    parameters = list(recipe.module.denoiser.network.trunk.blocks[0].attention.parameters())
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss, parameters))


def test_a_frozen_vae_is_not_trained() -> None:
    recipe = make_recipe(replace(CONFIG, train_vae=False))
    assert recipe.module.vae is None and set(recipe.loss_weights(0)) == {"flow"}
    prepared = recipe.prepare(make_batch(), step=0)
    assert set(recipe.module(**prepared.inputs).loss_sums) == set(prepared.counts) == {"flow"}
    mean = make_recipe(replace(CONFIG, train_vae=False, flow=replace(FLOW, posterior="mean")))
    batch = make_batch()
    clean = mean.reference.encode(batch.tokens, mean.reference.layout(batch.segment, batch.position))[0] - 0.2
    torch.testing.assert_close(mean.prepare(batch, step=0).inputs["latents"], clean)
    assert not torch.allclose(prepared.inputs["latents"], clean)


def test_hidden_tokens() -> None:
    """Their share of the real ones, no padding, the encoder sees the mask in their place, only they are counted."""
    batch = make_batch(rows=64, row_tokens=40)
    real = batch.segment >= 0
    real[0, 10:] = False
    hidden = HiddenTokens.draw(RowDraws(0, "train", batch.row_index), real, 0.25)
    assert hidden.at.shape == (64, 10) and real.gather(1, hidden.at)[hidden.counted].all()
    assert hidden.counted.sum(1).tolist() == [2] + [9] * 63  # 2.5 and 9.25 to the nearest, halves to even
    assert hidden.at[1:].flatten().bincount(minlength=37).min() > 0
    assert all(len(set(row.tolist())) == 10 for row in hidden.at)
    vae = make_recipe().reference
    layout = vae.layout(batch.segment, batch.position)
    noise = torch.randn(64, 40, 6)
    shown = batch.tokens.clone()
    for row, columns, counted in zip(shown, hidden.at, hidden.counted, strict=True):
        row[columns[counted]] = 60
    mean, log_variance, _ = vae.encode(shown, layout)
    logits = vae.decode(mean + (0.5 * log_variance).exp() * noise, layout)
    expected = F.cross_entropy(logits[shown == 60], batch.tokens[shown == 60], reduction="sum")
    torch.testing.assert_close(hidden.loss_sum(vae, batch.tokens, layout, noise), expected, rtol=1e-4, atol=1e-3)


def test_block_sizes_are_drawn_a_segment() -> None:
    flow = replace(FLOW, block_tokens=8, training_block_tokens=(1, 2, 8, 8))
    recipe, batch = make_recipe(replace(CONFIG, flow=flow)), make_batch(rows=200, row_tokens=32)
    streams = recipe.prepare(batch, step=0).inputs["streams"]
    sizes = []
    for segment in (0, 1):
        where = batch.segment == segment
        block, position = streams.clean.block[where].view(200, -1), batch.position[where].view(200, -1)
        for size in (1, 2, 8):
            sizes += [size] * int((block == position // size).all(dim=1).sum())
    assert len(sizes) == 400 and [sizes.count(s) / 400 for s in (1, 2, 8)] == pytest.approx([0.25, 0.25, 0.5], abs=0.07)
    assert (streams.noisy.block == streams.clean.block).all()
    validation = recipe.prepare(batch, step=0, purpose="validation").inputs["streams"]
    assert torch.equal(validation.clean.block, batch.position // 8)
    with pytest.raises(ConfigError, match="multiples of the VAE's block_tokens"):
        make_recipe(replace(CONFIG, flow=flow), replace(VAE, attention="block_causal", block_tokens=2))


def test_given_tokens_end_where_a_latent_tells_of_nothing_after_them() -> None:
    """Where the VAE looks ahead in blocks of 2, a half given one would tell of its other half."""
    flow = replace(FLOW, partial_block_probability=1.0)
    lengths = {}
    for name, vae in (("causal", VAE), ("blocks", replace(VAE, attention="block_causal", block_tokens=2))):
        streams = make_recipe(replace(CONFIG, flow=flow), vae).prepare(make_batch(rows=50), step=0).inputs["streams"]
        given = (streams.times.index == 0) & streams.noisy.real
        starts = (streams.noisy.position % 4 == 0) & streams.noisy.real
        starts[:, -6:] = False  # the last block of a segment may be short
        rows, columns = starts.nonzero(as_tuple=True)
        lengths[name] = {int(given[r, c : c + 4].sum()) for r, c in zip(rows, columns, strict=True)}
    assert lengths == {"causal": {1, 2, 3}, "blocks": {2}}


@pytest.mark.parametrize("sizes", [(1,), (2,), (4,), (16,), (2, 16)])
def test_as_many_blocks_are_partly_given_as_asked_for(sizes: tuple[int, ...]) -> None:
    """Counted; and blocks of a row are drawn by themselves, also those that are smaller than in generation."""
    flow = replace(FLOW, block_tokens=16, training_block_tokens=sizes, partial_block_probability=0.25)
    batch = one_segment(rows=400, columns=64)
    streams = make_recipe(replace(CONFIG, flow=flow)).prepare(batch, step=0).inputs["streams"]
    given = streams.times.index == 0
    for size in sizes if len(sizes) == 1 else ():
        blocks = given.view(400, -1, size)
        partly = blocks.any(-1).double()
        assert float(partly.mean()) == pytest.approx(0.0 if size == 1 else 0.25, abs=0.03)
        assert blocks[..., 0][blocks.any(-1)].all() and not blocks.all(-1).any()
        if size == 4:  # 16 blocks, of which 4 share a timestep
            together = (partly[:, :4] * partly[:, 4:8]).mean()
            assert float(together) == pytest.approx(0.25**2, abs=0.03)
    assert len(sizes) == 1 or 0.1 < float(given[:, ::16].double().mean()) < 0.4


def one_segment(rows: int, columns: int) -> TokenBatch:
    """Rows of a single segment without padding."""
    position = torch.arange(columns).expand(rows, -1).contiguous()
    tokens = torch.randint(4, 60, (rows, columns), generator=torch.Generator().manual_seed(0))
    return TokenBatch(tokens, torch.zeros_like(position), position, torch.arange(rows), [["d"]] * rows)


def test_the_bar_is_the_best_constant() -> None:
    """`constant_t*` of finish: no velocity that is the same for all tokens does better on the rows."""
    recipe, batch = make_recipe(), make_batch(rows=200)
    prepared = recipe.prepare(batch, step=0, purpose="validation").inputs
    streams, vae = prepared["streams"], recipe.module.vae
    assert vae is not None
    vae.latent_std.fill_(0.5)  # far from variance 1
    report = recipe.finish([batch])
    mean, log_variance, _ = vae.encode(batch.tokens, vae.layout(batch.segment, batch.position))
    z = (mean + (0.5 * log_variance).exp() * prepared["posterior_noise"] - 0.2) / 0.5
    velocity = (streams.noise - z)[streams.loss_mask]
    best = velocity.var(dim=0).mean().item()
    bars = [value for name, value in report.items() if name.startswith("constant_t")]
    assert len(bars) > 5 and bars == pytest.approx([best] * len(bars), rel=0.03)
    assert best > 3 and 0 <= report["accuracy"] <= 1


@pytest.mark.parametrize("per", ["block", "segment"])
def test_what_has_a_timestep_of_its_own(per: str) -> None:
    flow = replace(FLOW, timestep_per=per, partial_block_probability=0.0)  # type: ignore[arg-type]
    recipe, batch = make_recipe(replace(CONFIG, flow=flow)), make_batch(rows=8, row_tokens=48)
    streams = recipe.prepare(batch, step=0).inputs["streams"]
    t = streams.times.table[streams.times.index]
    for row in range(8):
        for segment in (0, 1):
            where = batch.segment[row] == segment
            distinct = t[row, where].unique().numel()
            assert distinct == (1 if per == "segment" else len((batch.position[row, where] // 4).unique()))
    assert t[batch.segment == 0].unique().numel() > 7


def test_timesteps_lean_to_noise_as_their_location_says() -> None:
    """Logit-normal: half of the timesteps lie above sigmoid(location), and 84 % below sigmoid(location + scale)."""
    recipe, batch = make_recipe(), make_batch(rows=500)
    streams = recipe.prepare(batch, step=0).inputs["streams"]
    t = streams.times.table[1:]
    below = [float((t < torch.sigmoid(torch.tensor(at))).float().mean()) for at in (1.0, 2.0)]
    assert below == pytest.approx([0.5, 0.8413], abs=0.01)


def test_rows_do_not_depend_on_the_batch_they_come_in() -> None:
    recipe, batch = make_recipe(), make_batch(rows=4)
    part = TokenBatch(batch.tokens[2:], batch.segment[2:], batch.position[2:], batch.row_index[2:], batch.documents[2:])
    sums = []
    for rows in (batch, part):
        prepared = recipe.prepare(rows, step=0)
        sums.append((prepared.inputs["streams"].noise[-2:], prepared.inputs["hidden"].at[-2:]))
        sums[-1] += (prepared.inputs["posterior_noise"][-2:],)
    assert all(torch.equal(a, b) for a, b in zip(*sums, strict=True))


@pytest.mark.parametrize(
    ("config", "vae", "message"),
    [
        (replace(CONFIG, flow=replace(FLOW, block_tokens=0)), VAE, "block_tokens must be at least 1"),
        (CONFIG, replace(VAE, mask_token=False), "mask_token: true"),
        (CONFIG, replace(VAE, attention="full"), "token-local or \\(block-\\)causal encoder"),
        (
            replace(CONFIG, flow=replace(FLOW, objective="token_cross_entropy")),
            VAE,
            "for the latents of a VAE that stays as it is",
        ),
        (replace(CONFIG, flow=replace(FLOW, training_block_tokens=(0, 4))), VAE, "sizes of at least 1"),
        (CONFIG, replace(VAE, attention="block_causal"), "needs vae.network.block_tokens of at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(config: ColaDLMRecipeConfig, vae: TextVAEConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_recipe(config, vae)


def test_a_share_of_hidden_tokens() -> None:
    with pytest.raises(ConfigError, match="mask_probability must lie between 0 and 1, got 1.5"):
        make_recipe(replace(CONFIG, mask_probability=1.5)).prepare(make_batch(), step=0)
