"""Each option of the flow changes what it says, checked by a few lines of arithmetic of its own."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatext.config import ConfigError
from megatext.data.packing import TokenBatch
from megatext.data.stream import DataConfig
from megatext.flow import objectives
from megatext.flow.paths import Linear, Path, TanD
from megatext.flow.timesteps import TimestepConfig
from megatext.nn.attention import make_mask
from megatext.nn.blocks import initialise
from megatext.nn.dit import TextDiT, TextDiTConfig
from megatext.nn.layout import CONTEXT, TARGET, Layout
from megatext.recipes.denoiser import check_effects
from megatext.recipes.draws import RowDraws
from megatext.recipes.flow_config import ConsistencyConfig, FlowConfig
from megatext.recipes.noisy_rows import check_rows, cut_segments, one_shot, pad_with_ends
from tests.recipes.rows import make_batch
from tests.recipes.test_text_dit import BLOCKS, ONE_SHOT, TRUNK, make_recipe


def predictions(recipe: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """What the network said in a forward pass of the losses, call by call."""
    seen: list[Tensor] = []
    hook = recipe.module.network.register_forward_hook(
        lambda module, args, output: seen.append(output[0]) if output[0].shape[1] else None
    )
    recipe.module(**inputs)
    hook.remove()
    return seen


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


@pytest.mark.parametrize("flow", [ONE_SHOT, BLOCKS])
def test_consistency_with_a_step_nearer_to_the_data(flow: FlowConfig) -> None:
    consistency = ConsistencyConfig(weight=0.5, steps=4, warmup_steps=10)
    flow = replace(flow, consistency=consistency, timesteps=TimestepConfig(distribution="uniform"))
    recipe = make_recipe(flow)
    prepared = recipe.prepare(make_batch(), step=0)
    inputs, module = prepared.inputs, recipe.module
    z, t = noisy_of(inputs, Linear())
    earlier = (t - 0.25).clamp(min=0.0)
    torch.testing.assert_close(inputs["earlier_timesteps"][inputs["timestep_index"]], earlier[..., 0])
    first, second = predictions(recipe, inputs)
    x0 = module.x0(z, t[..., 0], first)
    nearer = torch.where(t > 0, x0 + earlier / t * (z - x0), z)
    goal = torch.where(earlier > 0, module.x0(nearer, earlier[..., 0], second), inputs["latents"])
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
            (module.x0(z, t[..., 0], predictions(recipe, inputs)[0]) - goal.detach()).square().mean(-1)
            * inputs["loss_mask"]
        ).sum(),
        parameter,
    )
    torch.testing.assert_close(found, by_hand, rtol=1e-3, atol=1e-4, msg=name)


def test_a_dropped_context_is_zero_vectors_in_full_view() -> None:
    """TextLDM's null condition: everything but the dropped contexts' latents is as without any dropping."""
    zeros = replace(ONE_SHOT, condition_dropout=0.5, null_condition="zeros")
    batch = make_batch(rows=40)
    found, kept = (
        make_recipe(flow, local=False).prepare(batch, step=0).inputs
        for flow in (zeros, replace(zeros, condition_dropout=0.0))
    )
    context = (found["layout"].role == CONTEXT) & found["layout"].real
    dropped = context & (found["latents"] == 0).all(dim=-1)
    assert 0.35 < float(dropped.sum() / context.sum()) < 0.65
    for row in range(40):
        for segment in (0, 1):
            assert len(dropped[row][context[row] & (batch.segment[row] == segment)].unique()) <= 1
    expected, real = kept["latents"].masked_fill(dropped[..., None], 0.0), found["layout"].real
    assert torch.equal(found["latents"][real], expected[real])
    assert bool((kept["latents"][context].abs().sum(-1) > 0).all())
    assert torch.equal(found["mask"].dense, kept["mask"].dense) and torch.equal(found["noise"], kept["noise"])
    assert torch.equal(found["loss_mask"], kept["loss_mask"])


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


@pytest.mark.parametrize(("unit_input", "variance"), [(True, 1.0), (False, 1 / 64)])
def test_the_variance_of_what_enters_the_first_block(unit_input: bool, variance: float) -> None:
    """Latents of variance 1 and embeddings of tokens alike, at initialisation and a width of 64."""
    torch.manual_seed(0)
    trunk = replace(TRUNK, width=64)
    config = TextDiTConfig(
        trunk=trunk, unit_input=unit_input, role_embedding=False, token_embedding=True, output="tokens"
    )
    network = TextDiT(config, latent_channels=32, vocab_size=500)
    initialise(network, lambda name, parameter: torch.randn_like(parameter))
    entered: list[Tensor] = []
    network.trunk.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    rows = torch.zeros(1, 400, dtype=torch.long)
    layout = Layout.of(rows, torch.arange(400)[None])
    network(
        torch.randn(1, 400, 32),
        torch.tensor([0.5]),
        rows,
        layout.position,
        rows.bool(),
        make_mask("full", layout),
        history=0,
        tokens=torch.randint(0, 500, (1, 200)),
    )
    for half in entered[0].detach().chunk(2, dim=1):
        assert float(half.square().mean()) == pytest.approx(variance, rel=0.15)


def test_the_share_of_segments_without_a_context() -> None:
    batch = make_batch(rows=300)
    for share in (0.0, 0.3, 1.0):
        flow = replace(ONE_SHOT, unconditional_probability=share)
        target = one_shot(flow, batch, draws(batch.row_index), 6).target
        alone = [bool(target[row][batch.segment[row] == number].all()) for row in range(300) for number in (0, 1)]
        assert sum(alone) / 600 == pytest.approx(share, abs=0.06 if 0 < share < 1 else 0)


def test_blocks_of_both_sizes_are_drawn_a_segment() -> None:
    """A token sees as much of the clean copy as stands before its block; in validation blocks are of 2."""
    flow = replace(BLOCKS, block_tokens=2, training_block_tokens=(1, 2), condition_dropout=0.0)
    recipe, batch = make_recipe(flow), make_batch(rows=200, row_tokens=32)
    found = {}
    for purpose in ("train", "validation"):
        inputs = recipe.prepare(batch, step=0, purpose=purpose).inputs
        seen = inputs["mask"].dense[:, 0, :, :32].sum(dim=-1)
        found[purpose] = []
        for row in range(200):
            for number in (0, 1):
                own = batch.segment[row] == number
                fits = [s for s in (1, 2) if torch.equal(seen[row][own], batch.position[row][own] // s * s)]
                found[purpose] += fits
    assert found["validation"] == [2] * 400
    assert len(found["train"]) == 400 and found["train"].count(1) / 400 == pytest.approx(0.5, abs=0.08)


def test_the_contexts_share_of_a_segment() -> None:
    flow = replace(ONE_SHOT, unconditional_probability=0.0, context_fraction=(0.45, 0.55))
    batch = make_batch(rows=60, row_tokens=83)
    inputs = make_recipe(flow, local=False).prepare(batch, step=0).inputs
    for segment, tokens in ((0, 41), (1, 39)):
        given = ((inputs["layout"].role == CONTEXT) & (batch.segment == segment)).sum(dim=1) / tokens
        assert float(given.min()) > 0.41 and float(given.max()) < 0.59


def test_noisy_copies_of_a_row_have_noise_of_their_own() -> None:
    one, two = (make_recipe(replace(BLOCKS, noise_copies=copies)) for copies in (1, 2))
    batch = make_batch()
    first, both = (recipe.prepare(batch, step=0) for recipe in (one, two))
    assert both.inputs["noise"].shape[1] == 2 * first.inputs["noise"].shape[1]
    halves = both.inputs["noise"].chunk(2, dim=1)
    assert not torch.equal(*halves)
    assert both.inputs["loss_mask"].sum() > 1.5 * first.inputs["loss_mask"].sum()


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


def test_a_prefix_does_not_see_its_target() -> None:
    recipe, batch = make_recipe(replace(ONE_SHOT, attention="prefix"), local=False), make_batch()
    inputs = recipe.prepare(batch, step=0).inputs
    role, mask = inputs["layout"].role, inputs["mask"].dense[:, 0]
    real = batch.segment >= 0
    same = (inputs["layout"].segment[:, :, None] == inputs["layout"].segment[:, None, :]) & real[:, :, None]
    from_context = (role == CONTEXT)[:, :, None]
    assert torch.equal(mask & from_context & real[:, :, None], same & from_context & (role == CONTEXT)[:, None, :])
    assert torch.equal(mask & ~from_context & real[:, :, None], same & ~from_context)


def test_targets_encoded_with_their_context_in_view() -> None:
    recipe, batch = make_recipe(replace(ONE_SHOT, target_encoding="with_context"), local=False), make_batch(rows=3)
    inputs = recipe.prepare(batch, step=0).inputs
    target, real = inputs["layout"].role == TARGET, batch.segment >= 0
    latents = {}
    for name, where in (("target", target), ("context", ~target)):
        changed = replace(batch, tokens=torch.where(where, (batch.tokens + 1) % 60, batch.tokens))
        latents[name] = recipe.prepare(changed, step=0).inputs["latents"]
    context, goal = ~target & real, target & real
    assert torch.equal(latents["target"][context], inputs["latents"][context])  # nothing leaks
    changed_segments = torch.zeros_like(real)
    for row in range(3):
        for segment in (0, 1):
            own = batch.segment[row] == segment
            changed_segments[row] |= own & bool((context[row] & own).any())
    moved = (latents["context"] != inputs["latents"]).any(-1)
    assert torch.equal(moved & goal, changed_segments & goal)


def draws(rows: Tensor) -> RowDraws:
    return RowDraws(3, "train", rows)


@given(st.sampled_from(["uniform", "log_uniform"]), st.integers(1, 9), st.integers(0, 50))
def test_cut_segments_are_parts_of_windows(lengths: Any, least: int, seed: int) -> None:
    batch = make_batch(rows=5, row_tokens=40, seed=seed)
    flow = FlowConfig(segment_lengths=lengths, min_segment_tokens=least)
    cut = cut_segments(flow, batch, draws(batch.row_index))
    assert torch.equal(cut.segment >= 0, batch.segment >= 0) and torch.equal(cut.tokens, batch.tokens)
    for row in range(5):
        numbers = [int(i) for i in cut.segment[row].unique() if i >= 0]
        assert numbers == list(range(len(numbers)))
        for number in numbers:
            own = cut.segment[row] == number
            assert len(batch.segment[row][own].unique()) == 1
            assert cut.position[row][own].tolist() == list(range(int(own.sum())))


def test_lengths_of_cut_segments_follow_their_distribution() -> None:
    rows, columns = 400, 512
    zeros, places = torch.zeros(rows, columns, dtype=torch.long), torch.arange(columns).expand(rows, -1)
    batch = TokenBatch(zeros, zeros, places, torch.arange(rows), [["d"]] * rows)
    found = {}
    for kind in ("uniform", "log_uniform"):
        cut = cut_segments(FlowConfig(segment_lengths=kind, min_segment_tokens=8), batch, draws(batch.row_index))  # type: ignore[arg-type]
        found[kind] = (cut.segment == 0).sum(dim=1).double()  # of the first segments, which nothing else cuts
    assert float(found["uniform"].mean()) == pytest.approx((8 + 512) / 2, rel=0.08)
    assert float(found["log_uniform"].log().mean()) == pytest.approx(math.log(8 * 512) / 2, rel=0.03)
    assert float((found["log_uniform"] < 32).double().mean()) == pytest.approx(math.log(4) / math.log(64), abs=0.06)
    untouched = cut_segments(FlowConfig(), batch, draws(batch.row_index))
    assert untouched is batch


def test_ends_of_text_follow_a_text_in_its_row() -> None:
    flow, columns, rows = FlowConfig(eos_padding_tokens=5), 24, 300
    length = torch.arange(rows) % 22 + 1
    places = torch.arange(columns).expand(rows, -1)
    real = places < length[:, None]
    tokens = torch.where(real, 9, 0)
    batch = TokenBatch(
        tokens, torch.where(real, 0, -1), torch.where(real, places, 0), torch.arange(rows), [["d"]] * rows
    )
    batch.tokens[torch.arange(rows), length - 1] = torch.where(torch.arange(rows) % 5 == 0, 9, 2)  # windows cut short
    padded, added = pad_with_ends(flow, batch, draws(batch.row_index), eos_id=2)
    assert added is not None and torch.equal(added, (padded.segment >= 0) & ~real)
    assert not added[::5].any()  # a text that goes on elsewhere does not end here
    shot = one_shot(replace(ONE_SHOT, unconditional_probability=0.0), padded, draws(batch.row_index), 6, added=added)
    without = one_shot(replace(ONE_SHOT, unconditional_probability=0.0), batch, draws(batch.row_index), 6)
    assert shot.target[added].all() and torch.equal(shot.target[real], without.target[real])
    assert (padded.tokens[added] == 2).all() and torch.equal(padded.tokens[real], batch.tokens[real])
    assert torch.equal(padded.position[padded.segment >= 0], places[padded.segment >= 0])
    counts = added.sum(dim=1)
    room = (length <= 19) & (torch.arange(rows) % 5 > 0)
    assert set(counts[room].tolist()) == set(range(6)) and (counts <= columns - length).all()
    assert float(counts[room].double().mean()) == pytest.approx(2.5, abs=0.35)
    assert pad_with_ends(FlowConfig(), batch, draws(batch.row_index), 2) == (batch, None)


def test_targets_anywhere_for_infilling() -> None:
    batch = make_batch(rows=200, row_tokens=48)
    ends = one_shot(replace(ONE_SHOT, unconditional_probability=0.0), batch, draws(batch.row_index), 6)
    flow = replace(ONE_SHOT, unconditional_probability=0.0, infill_probability=0.5)
    anywhere = one_shot(flow, batch, draws(batch.row_index), 6)
    begins, kept = [], 0
    for row in range(200):
        for segment in (0, 1):
            own = batch.segment[row] == segment
            target, at_end = anywhere.target[row][own], ends.target[row][own]
            assert target.sum() == at_end.sum()
            places = target.nonzero()[:, 0]
            assert (places.diff() == 1).all()  # in one piece
            kept += torch.equal(target, at_end)
            begins.append(int(places[0]) / max(1, int((~target).sum())))
    assert 0.4 < kept / 400 < 0.65  # half are ends, and a few of the others by chance
    assert min(begins) == 0.0 and 0.2 < sum(b < 0.5 for b in begins) / 400 < 0.35


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
        (replace(ONE_SHOT, noise_copies=2), TextDiTConfig(), "dit.flow.noise_copies: only in blocks"),
        (ONE_SHOT, TextDiTConfig(self_conditioning=True), "dit.network.self_conditioning: true needs dit.flow"),
    ],
)
def test_what_would_have_no_effect_is_refused(flow: FlowConfig, network: TextDiTConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_effects(network, flow, "dit")
    for fits in (BLOCKS, replace(BLOCKS, noise_copies=2), replace(ONE_SHOT, null_condition="zeros")):
        check_effects(TextDiTConfig(), fits, "dit")


@pytest.mark.parametrize(
    ("flow", "data", "message"),
    [
        ({"eos_padding_tokens": 2}, {"packed": True, "row_tokens": 40}, "packed: false"),
        ({"eos_padding_tokens": 2}, {"packed": False, "row_tokens": 32}, "row_tokens above max_tokens"),
        ({"segment_lengths": "uniform"}, {"hidden_states": "there"}, "extracted states are of whole windows"),
    ],
)
def test_rows_that_leave_no_place_are_refused(flow: dict[str, Any], data: dict[str, Any], message: str) -> None:
    config = DataConfig("shards", **{"max_tokens": 32, "row_tokens": 64, **data})
    with pytest.raises(ConfigError, match=message):
        check_rows(FlowConfig(**flow), config, "dit.flow")
    check_rows(FlowConfig(), config, "dit.flow")


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
