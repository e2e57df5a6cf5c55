"""How rows are cut into segments, contexts and targets, and what becomes noise, one option of the flow at a time."""

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
from megatext.nn.layout import CONTEXT, TARGET
from megatext.recipes.draws import RowDraws
from megatext.recipes.flow_config import FlowConfig
from megatext.recipes.noisy_rows import check_rows, cut_segments, one_shot, pad_with_ends
from tests.recipes.rows import make_batch
from tests.recipes.test_text_dit import BLOCKS, ONE_SHOT, make_recipe


def draws(rows: Tensor) -> RowDraws:
    return RowDraws(3, "train", rows)


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


def test_noisy_copies_of_a_row_have_noise_and_timesteps_of_their_own() -> None:
    one, two = (make_recipe(replace(BLOCKS, noise_copies=copies)) for copies in (1, 2))
    batch = make_batch()
    first, both = (recipe.prepare(batch, step=0) for recipe in (one, two))
    assert both.inputs["noise"].shape[1] == 2 * first.inputs["noise"].shape[1]
    halves = both.inputs["noise"].chunk(2, dim=1)
    assert not torch.equal(*halves)
    one_t, other_t = both.inputs["timesteps"][both.inputs["timestep_index"]].chunk(2, dim=1)
    assert bool((one_t != other_t)[(one_t > 0) & (other_t > 0)].all())
    assert both.inputs["loss_mask"].sum() > 1.5 * first.inputs["loss_mask"].sum()


def test_the_share_of_segments_whose_blocks_see_no_history() -> None:
    batch = make_batch(rows=200)
    recipe = make_recipe(replace(BLOCKS, condition_dropout=0.3))
    mask = recipe.prepare(batch, step=0).inputs["mask"].dense[:, 0]
    ends_of_segments = mask[:, [11, 20], :24].any(dim=-1)
    assert 1 - float(ends_of_segments.double().mean()) == pytest.approx(0.3, abs=0.07)


def test_a_noisy_token_is_told_its_left_neighbour_where_that_is_clean() -> None:
    """It is clean if the token sees it in the clean copy, or if it is given in the noisy copy's own block."""
    flow = replace(BLOCKS, condition_dropout=0.5, partial_block_probability=0.5, noise_copies=2)
    batch = make_batch(rows=8)
    inputs = make_recipe(flow).prepare(batch, step=0).inputs
    given, seen = inputs["timestep_index"] == 0, inputs["mask"].dense[:, 0]
    cases = set()
    for row, column in inputs["layout"].real.nonzero().tolist():
        at = column % 24
        position = int(batch.position[row, at])
        in_history = position > 0 and bool(seen[row, column, at - 1])
        in_block = position % 4 > 0 and bool(given[row, column - 1])
        expected = int(batch.tokens[row, at - 1]) if in_history or in_block else -1
        assert int(inputs["neighbours"][row, column]) == expected, (row, column)
        cases.add((position == 0, position % 4 == 0, in_history, in_block, column // 24))
    assert len(cases) == 2 * 5


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


@pytest.mark.parametrize("least", [8, 32])
def test_lengths_of_cut_segments_follow_their_distribution(least: int) -> None:
    rows, columns = 400, 512
    zeros, places = torch.zeros(rows, columns, dtype=torch.long), torch.arange(columns).expand(rows, -1)
    batch = TokenBatch(zeros, zeros, places, torch.arange(rows), [["d"]] * rows)
    found = {}
    for kind in ("uniform", "log_uniform"):
        flow = FlowConfig(segment_lengths=kind, min_segment_tokens=least)
        cut = cut_segments(flow, batch, draws(batch.row_index))
        found[kind] = (cut.segment == 0).sum(dim=1).double()  # of the first segments, which nothing else cuts
        assert int(found[kind].min()) >= least
    assert float(found["uniform"].mean()) == pytest.approx((least + 512) / 2, rel=0.08)
    assert float(found["log_uniform"].log().mean()) == pytest.approx(math.log(least * 512) / 2, rel=0.03)
    short = math.log(4) / math.log(512 / least)
    assert float((found["log_uniform"] < 4 * least).double().mean()) == pytest.approx(short, abs=0.06)
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
