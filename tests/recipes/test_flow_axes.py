"""Each option of the flow changes what it says, checked by a few lines of arithmetic of its own."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatext.config import ConfigError
from megatext.flow import objectives
from megatext.flow.paths import Linear, Path, TanD
from megatext.flow.timesteps import TimestepConfig
from megatext.nn.dit import TextDiTConfig
from megatext.nn.layout import CONTEXT
from megatext.recipes.denoiser import check_effects
from megatext.recipes.flow_config import ConsistencyConfig, FlowConfig
from megatext.recipes.sampling import SamplingConfig
from tests.recipes.rows import make_batch
from tests.recipes.test_text_dit import BLOCKS, ONE_SHOT, TRUNK, make_recipe


@dataclass
class Call:
    """One pass of the network over noisy latents `[rows, columns, channels]`, with the table of their timesteps."""

    latents: Tensor
    timesteps: Tensor
    self_condition: Tensor | None
    predicted: Tensor


def calls(recipe: Any, inputs: dict[str, Any]) -> list[Call]:
    """What the network was told and said in a forward pass of the losses."""
    seen: list[Call] = []

    def note(module: Any, args: Any, options: dict[str, Any], output: Any) -> None:
        if output[0].shape[1]:
            seen.append(Call(args[0], args[1], options["self_condition"], output[0]))

    hook = recipe.module.network.register_forward_hook(note, with_kwargs=True)
    recipe.module(**inputs)
    hook.remove()
    return seen


def predictions(recipe: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """What the network said in a forward pass of the losses, call by call."""
    return [call.predicted for call in calls(recipe, inputs)]


def noisy_of(inputs: dict[str, Any], path: Path) -> tuple[Tensor, Tensor]:
    """z and t `[rows, columns, 1]`."""
    t = inputs["timesteps"][inputs["timestep_index"]]
    return path.interpolate(inputs["latents"], inputs["noise"], t), t[..., None]


@pytest.mark.parametrize("path", [Linear(), TanD(3.0)])
def test_an_error_of_x0_as_one_of_the_velocity(path: Path) -> None:
    x0, guess, noise = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    t = torch.rand(2, 5, dtype=torch.float64) * 0.9 + 0.08
    z = path.interpolate(x0, noise, t)
    by_hand = (path.velocity_from_x0(z, guess, t) - path.velocity(x0, noise, t)).square().mean(-1)
    torch.testing.assert_close(
        objectives.converted_error(path, guess, x0, t, "velocity").double(), by_hand, rtol=1e-4, atol=1e-6
    )
    assert torch.equal(objectives.converted_error(path, guess, x0, t, "x0"), objectives.squared_error(guess, x0))
    at_clean = objectives.converted_error(path, guess, x0, torch.zeros(2, 5, dtype=torch.float64), "velocity")
    assert bool(at_clean.isfinite().all())


@pytest.mark.parametrize(("objective", "latent_loss"), [("velocity", "x0"), ("x0", "velocity"), ("x0", "x0")])
def test_predictions_and_losses_in_either_space(objective: str, latent_loss: str) -> None:
    flow = replace(ONE_SHOT, objective=objective, latent_loss=latent_loss)  # type: ignore[arg-type]
    recipe = make_recipe(flow, local=False)
    prepared = recipe.prepare(make_batch(), step=0)
    (predicted,) = predictions(recipe, prepared.inputs)
    z, t = noisy_of(prepared.inputs, Linear())
    x0 = predicted if objective == "x0" else z - t * predicted
    error = x0 - prepared.inputs["latents"]
    error = error if latent_loss == "x0" else error / t.clamp(min=0.05)
    expected = (error.square().mean(-1) * prepared.inputs["loss_mask"]).sum()
    torch.testing.assert_close(recipe.module(**prepared.inputs).loss_sums["flow"], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("target_encoding", ["separate", "with_context"])
def test_cross_entropy_through_the_frozen_decoder(target_encoding: str) -> None:
    flow = replace(ONE_SHOT, objective="x0", token_weight=0.5, target_encoding=target_encoding)  # type: ignore[arg-type]
    recipe = make_recipe(flow, local=False)
    recipe.vae.latent_mean.fill_(0.3)
    recipe.vae.latent_std.fill_(2.0)
    prepared = recipe.prepare(make_batch(), step=0)
    output = recipe.module(**prepared.inputs)
    (x0,) = predictions(recipe, prepared.inputs)
    layout, mask = prepared.inputs["layout"], prepared.inputs["loss_mask"]
    whole = torch.where((layout.role == CONTEXT)[..., None], prepared.inputs["latents"], x0) * 2.0 + 0.3
    logits = recipe.vae.decode(whole, layout.separated() if target_encoding == "separate" else layout)
    expected = torch.nn.functional.cross_entropy(logits[mask], prepared.inputs["tokens"][mask], reduction="sum")
    torch.testing.assert_close(output.loss_sums["flow_tokens"], expected, rtol=1e-4, atol=1e-3)
    assert (
        recipe.loss_weights(0) == {"flow": 1.0, "flow_tokens": 0.5}
        and prepared.counts.keys() == output.loss_sums.keys()
    )
    output.loss_sums["flow_tokens"].backward()
    assert recipe.module.network.head.weight.grad is not None
    assert not any(name.startswith("decoder") for name, _ in recipe.module.named_parameters())
    alone = make_recipe(replace(flow, latent_weight=0.0), local=False)
    assert alone.loss_weights(0) == {"flow": 0.0, "flow_tokens": 0.5}


def test_the_expected_latents_error_beside_token_cross_entropy() -> None:
    recipe = make_recipe(replace(BLOCKS, latent_weight=2.0))
    prepared = recipe.prepare(make_batch(), step=0)
    (logits,) = predictions(recipe, prepared.inputs)
    z, t = noisy_of(prepared.inputs, Linear())
    table = recipe.module.table
    assert table is not None
    x0 = recipe.module.logits(logits, z, t[..., 0]).softmax(-1) @ table
    expected = ((x0 - prepared.inputs["latents"]).square().mean(-1) * prepared.inputs["loss_mask"]).sum()
    output = recipe.module(**prepared.inputs)
    torch.testing.assert_close(output.loss_sums["flow_latent"], expected, rtol=1e-4, atol=1e-3)
    assert recipe.loss_weights(0) == {"flow": 1.0, "flow_latent": 2.0}


@pytest.mark.parametrize("token_likelihood", [True, False])
def test_token_cross_entropy_with_the_likelihood_of_noisy_latents_and_without_it(token_likelihood: bool) -> None:
    recipe = make_recipe(replace(BLOCKS, token_likelihood=token_likelihood))
    inputs = recipe.prepare(make_batch(), step=0).inputs
    (logits,) = predictions(recipe, inputs)
    z, t = noisy_of(inputs, Linear())
    table = recipe.module.table
    assert table is not None
    if token_likelihood:
        off = (z[..., None, :] - (1 - t)[..., None] * table) / t.clamp(min=0.05)[..., None]
        logits = logits - off.square().sum(dim=-1) / 2
    counted = inputs["loss_mask"]
    expected = torch.nn.functional.cross_entropy(logits[counted], inputs["tokens"][counted], reduction="sum")
    torch.testing.assert_close(recipe.module(**inputs).loss_sums["flow"], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("flow", [ONE_SHOT, replace(ONE_SHOT, objective="x0"), BLOCKS])
def test_the_self_condition_is_the_first_passes_estimate_without_gradient(flow: FlowConfig) -> None:
    flow = replace(flow, self_conditioning_probability=0.5)
    output: Any = "tokens" if flow.objective == "token_cross_entropy" else "latent"
    recipe = make_recipe(flow, network=TextDiTConfig(trunk=TRUNK, output=output, self_conditioning=True))
    inputs = recipe.prepare(make_batch(), step=0).inputs | {"self_condition": True}
    first, second = calls(recipe, inputs)
    z, t = noisy_of(inputs, Linear())
    noisy = t[..., 0] > 0
    assert first.self_condition is None and second.self_condition is not None
    assert torch.equal(first.latents, z) and torch.equal(second.latents, z)
    estimate = recipe.module.x0(z, t[..., 0], first.predicted)
    torch.testing.assert_close(second.self_condition[noisy], estimate[noisy])
    assert not second.self_condition.requires_grad and second.predicted.requires_grad
    (alone,) = calls(recipe, inputs | {"self_condition": False})
    assert alone.self_condition is None


@pytest.mark.parametrize(("flow", "feeds_back"), [(ONE_SHOT, False), (BLOCKS, False), (ONE_SHOT, True), (BLOCKS, True)])
def test_consistency_with_a_step_nearer_to_the_data(flow: FlowConfig, feeds_back: bool) -> None:
    consistency = ConsistencyConfig(weight=0.5, steps=4, warmup_steps=10)
    flow = replace(flow, consistency=consistency, timesteps=TimestepConfig(distribution="uniform"))
    flow = replace(flow, self_conditioning_probability=0.5 if feeds_back else 0.0)
    output_kind: Any = "tokens" if flow.objective == "token_cross_entropy" else "latent"
    network = TextDiTConfig(trunk=TRUNK, output=output_kind, self_conditioning=feeds_back)
    recipe = make_recipe(flow, network=network)
    prepared = recipe.prepare(make_batch(), step=0)
    inputs, module = prepared.inputs | {"self_condition": feeds_back}, recipe.module
    z, t = noisy_of(inputs, Linear())
    earlier = (t - 0.25).clamp(min=0.0)
    torch.testing.assert_close(inputs["earlier_timesteps"][inputs["timestep_index"]], earlier[..., 0])
    *_, here, there = calls(recipe, inputs)
    x0 = module.x0(z, t[..., 0], here.predicted)
    nearer = torch.where(t > 0, x0 + earlier / t * (z - x0), z)
    goal = torch.where(earlier > 0, module.x0(nearer, earlier[..., 0], there.predicted), inputs["latents"])
    asked = earlier[..., 0] > 0
    torch.testing.assert_close(there.latents[asked], nearer[asked])
    assert torch.equal(there.timesteps, inputs["earlier_timesteps"])
    assert (there.self_condition is not None) == feeds_back
    if there.self_condition is not None:
        torch.testing.assert_close(there.self_condition[asked], x0[asked])
        given = (inputs["timestep_index"] == 0) & inputs["layout"].real
        assert torch.equal(there.self_condition[given], inputs["latents"][given])
    expected = ((x0 - goal).square().mean(-1) * inputs["loss_mask"]).sum()
    output = module(**inputs)
    torch.testing.assert_close(output.loss_sums["consistency"], expected, rtol=1e-4, atol=1e-3)
    assert recipe.loss_weights(4)["consistency"] == pytest.approx(0.25)
    assert recipe.loss_weights(10)["consistency"] == 0.5 and "consistency" in prepared.counts
    # the goal has no gradient: that of the loss is that of x0 towards a constant
    name, parameter = next(iter(module.network.named_parameters()))
    ((found),) = torch.autograd.grad(output.loss_sums["consistency"], parameter)
    ((by_hand),) = torch.autograd.grad(
        (
            (module.x0(z, t[..., 0], predictions(recipe, inputs)[-2]) - goal.detach()).square().mean(-1)
            * inputs["loss_mask"]
        ).sum(),
        parameter,
    )
    torch.testing.assert_close(found, by_hand, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("time_conditioning", ["adaln", "none"])
def test_a_network_without_a_timestep_does_not_tell_them_apart(time_conditioning: str) -> None:
    network = TextDiTConfig(trunk=TRUNK, time_conditioning=time_conditioning)  # type: ignore[arg-type]
    recipe = make_recipe(ONE_SHOT, local=False, network=network)
    inputs = recipe.prepare(make_batch(), step=0).inputs
    out = []
    for t in (0.2, 0.9):
        times = torch.tensor([0.0, t])
        index, layout = inputs["loss_mask"].long(), inputs["layout"]
        args = (inputs["latents"], times, index, layout.position, inputs["loss_mask"], inputs["mask"])
        out.append(recipe.module.network(*args)[0])
    assert torch.equal(*out) == (time_conditioning == "none")
    assert recipe.module.network.modulations(torch.tensor([0.5])) == [] or time_conditioning == "adaln"


@pytest.mark.parametrize("role_embedding", [True, False])
def test_a_network_without_a_role_embedding_does_not_tell_target_from_context(role_embedding: bool) -> None:
    network = TextDiTConfig(trunk=TRUNK, role_embedding=role_embedding)
    recipe = make_recipe(ONE_SHOT, local=False, network=network)
    inputs = recipe.prepare(make_batch(), step=0).inputs
    target, layout = inputs["loss_mask"], inputs["layout"]
    times, index = torch.tensor([0.0, 0.5]), target.long()
    out = [
        recipe.module.network(inputs["latents"], times, index, layout.position, role, inputs["mask"])[0]
        for role in (target, ~target)
    ]
    assert torch.equal(*out) != role_embedding


def test_the_null_embedding_is_on_tokens_that_see_no_context() -> None:
    flow = replace(ONE_SHOT, condition_dropout=0.4, unconditional_probability=0.3)
    recipe = make_recipe(flow, local=False, network=TextDiTConfig(trunk=TRUNK, null_embedding=True))
    batch = make_batch(rows=40)
    inputs = recipe.prepare(batch, step=0).inputs
    target, mask = inputs["loss_mask"], inputs["mask"].dense[:, 0]
    context = (inputs["layout"].role == CONTEXT) & (batch.segment >= 0)
    sees = (mask & context[:, None, :]).any(dim=-1)
    assert torch.equal(inputs["alone"] & target, ~sees & target)
    assert 0.3 < float((inputs["alone"] & target).sum() / target.sum()) < 0.8
    before = predictions(recipe, inputs)[0]
    with torch.no_grad():
        assert recipe.module.network.null is not None
        recipe.module.network.null.weight += 1.0
    moved = (predictions(recipe, inputs)[0] != before).any(-1)
    assert torch.equal(moved & target, inputs["alone"] & target)


def test_blocks_that_see_nothing_clean_have_the_null_embedding() -> None:
    recipe, batch = (
        make_recipe(replace(BLOCKS, condition_dropout=0.5, partial_block_probability=0.0)),
        make_batch(rows=8),
    )
    inputs = recipe.prepare(batch, step=0).inputs
    history = inputs["mask"].dense[:, 0, :, : batch.tokens.shape[1]]
    real = batch.segment >= 0
    sees = (history & real[:, None, :]).any(dim=-1)
    assert torch.equal(inputs["alone"][real], ~sees[real]) and inputs["alone"][real].any() and sees.any()


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        (replace(BLOCKS, attention="prefix"), "only in one shot"),
        (replace(BLOCKS, infill_probability=0.5), "only in one shot"),
        (replace(BLOCKS, eos_padding_tokens=2), "only in one shot"),
        (replace(ONE_SHOT, block_tokens=4, objective="x0", token_weight=1.0), "token_weight.*only in one shot"),
    ],
)
def test_axes_of_one_shot_alone(flow: FlowConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_recipe(flow)


@pytest.mark.parametrize(
    ("flow", "network", "message"),
    [
        (replace(BLOCKS, null_condition="zeros"), TextDiTConfig(), "dit.flow.null_condition zeros: only in one shot"),
        *(
            (replace(ONE_SHOT, **{name: value}), TextDiTConfig(), f"dit.flow.{name}: only in blocks")
            for name, value in {
                "noise_copies": 2,
                "posterior": "sample",
                "timestep_per": "segment",
                "partial_block_probability": 0.1,
            }.items()
        ),
        (
            replace(BLOCKS, unconditional_probability=0.3),
            TextDiTConfig(),
            "unconditional_probability: only in one shot",
        ),
        (replace(BLOCKS, context_fraction=(0.2, 0.8)), TextDiTConfig(), "dit.flow.context_fraction: only in one shot"),
        (replace(ONE_SHOT, min_segment_tokens=2), TextDiTConfig(), "dit.flow.min_segment_tokens: windows are not cut"),
        (ONE_SHOT, TextDiTConfig(self_conditioning=True), "dit.network.self_conditioning: true needs dit.flow"),
    ],
)
def test_what_would_have_no_effect_is_refused(flow: FlowConfig, network: TextDiTConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_effects(network, flow, SamplingConfig(), "dit")
    for fits in (BLOCKS, replace(BLOCKS, noise_copies=2), replace(ONE_SHOT, null_condition="zeros")):
        check_effects(TextDiTConfig(), fits, SamplingConfig(), "dit")


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (SamplingConfig(temperature=0.5), "temperature needs"),
        (SamplingConfig(solver="ancestral"), "solver ancestral needs"),
        (SamplingConfig(block_tokens=2), "block_tokens 2: the model is trained in one shot"),
        (SamplingConfig(history="latents"), "history latents: only in blocks"),
    ],
)
def test_a_training_refuses_previews_that_its_model_cannot_write(sampling: SamplingConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=f"dit.sampling.{message}"):
        check_effects(TextDiTConfig(), ONE_SHOT, sampling, "dit")
    by_tokens = replace(BLOCKS, objective="token_cross_entropy")
    check_effects(TextDiTConfig(output="tokens"), by_tokens, SamplingConfig(temperature=0.5), "dit")


@pytest.mark.parametrize(
    "wrong",
    [
        {"condition_dropout": 1.7},
        {"infill_probability": -0.1},
        {"context_fraction": (0.9, 0.1)},
        {"context_fraction": (0.5, 1.5)},
        {"block_tokens": -2},
        {"noise_copies": 0},
        {"min_segment_tokens": 0},
        {"latent_weight": -1.0},
        {"consistency": ConsistencyConfig(weight=-1.0)},
    ],
)
def test_a_process_that_cannot_be_is_refused_by_its_field(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"flow.{next(iter(wrong))}"):
        FlowConfig(**wrong)


@pytest.mark.parametrize("objective", ["x0", "token_cross_entropy"])
def test_at_given_tokens_the_self_condition_is_what_a_sampler_feeds_back(objective: str) -> None:
    """Their clean latents, not what the network makes of them: it has no loss there."""
    output = "tokens" if objective == "token_cross_entropy" else "latent"
    network = TextDiTConfig(trunk=TRUNK, self_conditioning=True, output=output)  # type: ignore[arg-type]
    flow = replace(
        BLOCKS,
        objective=objective,
        token_likelihood=False,
        partial_block_probability=0.9,
        self_conditioning_probability=1.0,
    )  # type: ignore[arg-type]
    recipe = make_recipe(flow, network=network)
    inputs = recipe.prepare(make_batch(), step=0).inputs
    fed = calls(recipe, inputs | {"self_condition": True})[1].self_condition
    assert fed is not None
    given = (inputs["timestep_index"] == 0) & inputs["layout"].real
    assert bool(given.any()) and torch.equal(fed[given], inputs["latents"][given])
    noisy = (inputs["timestep_index"] > 0) & inputs["layout"].real
    assert not torch.allclose(fed[noisy], inputs["latents"][noisy])


@pytest.mark.parametrize(("objective", "latent_loss"), [("x0", "velocity"), ("velocity", "x0"), ("x0", "own")])
def test_bars_of_converted_losses_are_those_of_a_constant(objective: str, latent_loss: str) -> None:
    """A network that says nothing, on many latents of variance 1, loses the bar."""
    flow = replace(ONE_SHOT, objective=objective, latent_loss=latent_loss)  # type: ignore[arg-type]
    recipe = make_recipe(flow, local=False)
    with torch.no_grad():
        recipe.module.network.head.weight.zero_()
        recipe.module.network.head.bias.zero_()
    path, t = recipe.module.path, torch.tensor([0.15, 0.35, 0.65, 0.95]).repeat(4000)[None]
    latents, noise = torch.randn(2, 1, t.shape[1], 6).unbind(0)
    noisy = path.interpolate(latents, noise, t)
    lost = recipe.module._own_loss(torch.zeros_like(latents), noisy, latents, noise, torch.zeros_like(t).long(), t)
    measured = lost[0].view(-1, 4).mean(0)
    torch.testing.assert_close(measured, recipe.module.constant_error(t, 1.0)[0, :4], rtol=0.05, atol=0.01)


def test_a_flow_without_any_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing would be learnt"):
        FlowConfig(latent_weight=0.0)
    with pytest.raises(ConfigError, match="no error of latents"):
        FlowConfig(objective="x0", latent_loss="velocity", latent_weight=0.0, token_weight=1.0)
    with pytest.raises(ConfigError, match="nothing would be learnt"):
        FlowConfig(objective="token_cross_entropy", token_weight=0.0)
