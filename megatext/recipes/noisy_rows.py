"""Rows of a denoiser in training: what is clean, what is noise and how much, who sees whom. All but the latents."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatext import rng
from megatext.config import ConfigError
from megatext.data.packing import TokenBatch
from megatext.data.stream import DataConfig
from megatext.flow.timesteps import AdaptiveTimesteps, TimestepConfig
from megatext.nn.attention import Mask, make_mask
from megatext.nn.layout import CONTEXT, PADDING, TARGET, Layout
from megatext.nn.text_vae import TextVAEConfig
from megatext.recipes.denoiser import History
from megatext.recipes.draws import RowDraws
from megatext.recipes.flow_config import FlowConfig


@dataclass
class Times:
    """The timesteps of some rows."""

    table: Tensor
    """float32 `[1 + rows * groups]`: a timestep for each row and group; entry 0 is the clean end."""
    earlier: Tensor | None
    """Like it: each a step of `consistency.steps` nearer to the data; None where no loss asks for them."""
    index: Tensor
    """int64 `[rows, columns]` into both."""


def draw_timesteps(
    flow: FlowConfig, timesteps: TimestepConfig | AdaptiveTimesteps, draw: RowDraws, group: Tensor, groups: int
) -> Times:
    """One timestep for each row and group `[rows, columns]`. In a row they are a golden-ratio sequence: spread evenly,
    whatever the row's length."""
    u = (draw.uniform("timestep")[:, None] + 0.6180339887498949 * np.arange(groups)) % 1.0
    rows = torch.arange(group.shape[0], device=group.device)[:, None]

    def at(u: np.ndarray) -> Tensor:
        t = timesteps.quantile(rng.on_device(u.flatten(), group.device)).float()
        return torch.cat((t.new_zeros(1), t))

    earlier = at(np.maximum(u - 1 / flow.consistency.steps, 0.0)) if flow.consistency.weight > 0 else None
    return Times(at(u), earlier, 1 + rows * groups + group)


def segment_groups(columns: int) -> int:
    """How many timesteps the segments of a row have: more segments share them, so that the table stays small."""
    return -(-columns // 32)


@dataclass
class OneShot:
    """Segments split in a clean context and a noisy target (TextLDM section 3.2): all but the latents."""

    layout: Layout
    """Roles of context and target, `[rows, columns]`; the two are encoded separately."""
    seen: Layout
    """The same as the denoiser sees it: a dropped context is out of sight."""
    mask: Mask
    zeroed: Tensor
    """bool `[rows, columns]`: context that is zero vectors."""
    alone: Tensor
    """bool `[rows, columns]`: target that sees no context, or zeros in its place."""
    noise: Tensor
    times: Times

    @property
    def target(self) -> Tensor:
        """bool `[rows, columns]`: to be generated."""
        return self.layout.role == TARGET

    @staticmethod
    def of_zeros(columns: int, channels: int) -> "OneShot":
        """One row of the shapes of training, for counting FLOPs."""
        zeros = torch.zeros(1, columns, dtype=torch.long)
        layout = Layout.of(zeros, zeros).with_role(TARGET)
        of_times = torch.zeros(1 + segment_groups(columns))
        noise = torch.zeros(1, columns, channels)
        mask = make_mask("full", layout)
        return OneShot(layout, layout, mask, zeros > 0, zeros > 0, noise, Times(of_times, of_times, zeros))

    def inputs(self, tokens: Tensor, latents: Tensor) -> dict[str, Any]:
        """What `TextDiTTraining.forward` takes, of tokens and latents `[rows, columns, ...]`."""
        return {
            "latents": latents.masked_fill(self.zeroed[..., None], 0.0),
            "noise": self.noise,
            "tokens": tokens,
            "timesteps": self.times.table,
            "earlier_timesteps": self.times.earlier,
            "timestep_index": self.times.index,
            "alone": self.alone,
            "layout": self.seen,
            "mask": self.mask,
            "loss_mask": self.layout.real & self.target,
        }


def one_shot(
    flow: FlowConfig,
    batch: TokenBatch,
    draw: RowDraws,
    channels: int,
    timesteps: AdaptiveTimesteps | None = None,
    added: Tensor | None = None,
) -> OneShot:
    """Splits, dropped contexts, timesteps and noise for latents of so many channels; `timesteps` instead of the flow's
    own. Ends of text that were `added` belong to the target, wherever a segment is split."""
    columns = batch.tokens.shape[1]
    is_target = _targets(flow, batch, draw, torch.zeros_like(batch.segment > 0) if added is None else added)
    layout = Layout.of(batch.segment, batch.position, torch.where(is_target, TARGET, CONTEXT))
    no_context = ~_any_of_segment(~is_target, batch.segment)
    dropped = draw.per_group("condition_dropout", columns, batch.segment) < flow.condition_dropout
    out_of_sight = dropped & ~is_target
    seen, zeroed = layout, out_of_sight
    if flow.null_condition == "drop":
        segment = torch.where(out_of_sight & layout.real, layout.segment + columns, layout.segment)
        seen, zeroed = replace(layout, segment=segment), torch.zeros_like(dropped)
    groups = segment_groups(columns)
    times = draw_timesteps(flow, timesteps or flow.timesteps, draw, batch.segment.clamp(min=0) % groups, groups)
    return OneShot(
        layout=layout,
        seen=seen,
        mask=make_mask(flow.attention, seen),
        zeroed=zeroed,
        alone=is_target & (dropped | no_context),
        noise=draw.normal("noise", (columns, channels), batch.tokens.device),
        times=replace(times, index=times.index.masked_fill(~is_target, 0)),
    )


def _targets(flow: FlowConfig, batch: TokenBatch, draw: RowDraws, added: Tensor) -> Tensor:
    """bool `[rows, columns]`: what is to be generated, of each segment its end, or a part that lies anywhere in it."""
    columns, (low, high) = batch.tokens.shape[1], flow.context_fraction
    fraction = low + (high - low) * draw.per_group("split", columns, batch.segment)
    unconditional = draw.per_group("unconditional", columns, batch.segment) < flow.unconditional_probability
    length = ((batch.segment[:, :, None] == batch.segment[:, None, :]) & ~added[:, None, :]).sum(dim=-1)
    context = (fraction * length).round().clamp(min=1).minimum(length - 1) * ~unconditional
    before = context
    if flow.infill_probability > 0:
        place = draw.per_group("infill", columns, batch.segment) / flow.infill_probability
        before = torch.where(place < 1, (place * (context + 1)).floor(), context)
    return (batch.position >= before) & (batch.position < before + length - context) | added


def _any_of_segment(there: Tensor, segment: Tensor) -> Tensor:
    """bool `[rows, columns]`: whether it holds anywhere in a token's own segment."""
    same = segment[:, :, None] == segment[:, None, :]
    return (same & there[:, None, :]).any(dim=-1)


def check_rows(flow: FlowConfig, data: DataConfig, where: str) -> None:
    """Raise ConfigError where `data` leaves no place for what a flow, named `where`, does to the rows."""
    if flow.eos_padding_tokens and (data.packed or data.row_tokens <= data.max_tokens):
        raise ConfigError(f"{where}.eos_padding_tokens needs data.packed: false, and data.row_tokens above max_tokens")
    if (flow.eos_padding_tokens or flow.segment_lengths != "windows") and data.states():
        raise ConfigError(f"{where}: extracted states are of whole windows; leave data.hidden_states out")


def cut_segments(flow: FlowConfig, batch: TokenBatch, draw: RowDraws) -> TokenBatch:
    """The batch with its windows cut into segments of random lengths, as `flow.segment_lengths` says; the teacher's
    states no longer belong to it."""
    columns, least = batch.tokens.shape[1], flow.min_segment_tokens
    if flow.segment_lengths == "windows":
        return batch
    places = torch.arange(columns, device=batch.segment.device).expand_as(batch.segment)
    u = draw.per_group("segment_length", columns, places).double()
    most = max(columns, least)
    drawn = least * (most / least) ** u if flow.segment_lengths == "log_uniform" else least + (most - least) * u
    ends = drawn.round().long().cumsum(dim=1)
    piece = torch.searchsorted(ends, places.contiguous(), right=True)
    begins = torch.ones_like(batch.segment, dtype=torch.bool)
    begins[:, 1:] = (batch.segment[:, 1:] != batch.segment[:, :-1]) | (piece[:, 1:] != piece[:, :-1])
    real = batch.segment != PADDING
    segment = torch.where(real, begins.cumsum(dim=1) - 1, PADDING)
    first = torch.where(begins, places, 0).cummax(dim=1).values
    position = torch.where(real, places - first, 0)
    return replace(batch, segment=segment, position=position, hidden=None, hidden_valid=None)


def pad_with_ends(flow: FlowConfig, batch: TokenBatch, draw: RowDraws, eos_id: int) -> tuple[TokenBatch, Tensor | None]:
    """The batch with up to `flow.eos_padding_tokens` ends of text after each row's last segment, as its own tokens,
    where that is whole: it ends in one. And what was added, bool `[rows, columns]`; None: nothing."""
    if not flow.eos_padding_tokens:
        return batch, None
    columns = batch.tokens.shape[1]
    places = torch.arange(columns, device=batch.tokens.device).expand_as(batch.tokens)
    filled = (batch.segment != PADDING).sum(dim=1, keepdim=True)  # what is free is at a row's end
    drawn = (rng.on_device(draw.uniform("eos_padding"), places.device) * (flow.eos_padding_tokens + 1)).long()
    last = (filled - 1).clamp(min=0)
    whole = (filled > 0) & (batch.tokens.gather(1, last) == eos_id)
    added = (places >= filled) & (places < filled + drawn[:, None]) & whole
    position = batch.position.gather(1, last) + places - last
    padded = replace(
        batch,
        tokens=batch.tokens.masked_fill(added, eos_id),
        segment=torch.where(added, batch.segment.gather(1, last), batch.segment),
        position=torch.where(added, position, batch.position),
        hidden=None,
        hidden_valid=None,
    )
    return padded, added


@dataclass
class TwoStreams:
    """One clean copy of a row and `noise_copies` noisy ones, block by block: all but the latents."""

    clean: Layout
    """Of the clean copy, `[rows, columns]`."""
    clean_mask: Mask
    noisy: Layout
    """Of the noisy copies side by side, `[rows, copies * columns]`, as all that follows."""
    noisy_mask: Mask
    noise: Tensor
    times: Times
    loss_mask: Tensor
    alone: Tensor
    """bool, as `noisy`: sees nothing clean."""
    neighbours: Tensor

    @staticmethod
    def of_zeros(flow: FlowConfig, columns: int, channels: int) -> "TwoStreams":
        """One row of the shapes of training, for counting FLOPs."""
        zeros = torch.zeros(1, columns, dtype=torch.long)
        clean = Layout.of(zeros, zeros)
        noisy = Layout.concatenate([clean.with_role(TARGET)] * flow.noise_copies)
        groups = -(-columns // flow.block_tokens) if flow.timestep_per == "block" else segment_groups(columns)
        of_times = torch.zeros(1 + flow.noise_copies * groups)
        return TwoStreams(
            clean=clean,
            clean_mask=make_mask("two_stream", clean),
            noisy=noisy,
            noisy_mask=make_mask("two_stream", noisy, Layout.concatenate([clean, noisy])),
            noise=torch.zeros(*noisy.segment.shape, channels),
            times=Times(of_times, of_times, noisy.segment),
            loss_mask=noisy.real,
            alone=noisy.segment > 0,
            neighbours=noisy.segment,
        )

    def inputs(self, tokens: Tensor, latents: Tensor) -> dict[str, Any]:
        """What `TextDiTTraining.forward` takes, of tokens and latents `[rows, columns, ...]`. What is given clean,
        history and the first tokens of some blocks, has no gradient into the latents."""
        copies, given = self.noisy.segment.shape[1] // self.clean.segment.shape[1], self.times.index == 0
        noisy = latents.repeat(1, copies, 1)
        return {
            "latents": torch.where(given[..., None], noisy.detach(), noisy),
            "noise": self.noise,
            "tokens": tokens.repeat(1, copies),
            "timesteps": self.times.table,
            "earlier_timesteps": self.times.earlier,
            "timestep_index": self.times.index,
            "alone": self.alone,
            "layout": self.noisy,
            "mask": self.noisy_mask,
            "loss_mask": self.loss_mask,
            "neighbours": self.neighbours,
            "history": History(tokens, latents.detach(), self.clean, self.clean_mask),
        }


def two_streams(flow: FlowConfig, batch: TokenBatch, draw: RowDraws, vae: TextVAEConfig) -> TwoStreams:
    """Blocks, timesteps, noise and who sees whom (Cola DLM Eq. 2.2.3; block diffusion, arXiv 2503.09573) for the
    latents of a `vae`. Where `flow.training_block_tokens` has several sizes a segment draws one, but in validation."""
    columns, copies = batch.tokens.shape[1], flow.noise_copies
    sizes = flow.training_block_tokens if draw.purpose == "train" else ()
    size: Tensor | int = flow.block_tokens
    if sizes:
        drawn = (draw.per_group("block_tokens", columns, batch.segment) * len(sizes)).long().clamp(max=len(sizes) - 1)
        size = rng.on_device(np.array(sizes), drawn.device)[drawn]
    clean = Layout.of(batch.segment, batch.position, block_tokens=size)
    boundary = torch.ones_like(batch.segment, dtype=torch.bool)
    boundary[:, 1:] = (clean.segment[:, 1:] != clean.segment[:, :-1]) | (clean.block[:, 1:] != clean.block[:, :-1])
    number = boundary.cumsum(dim=1) - 1  # of the block in its row
    # where blocks are shorter than those of generation, far ones share timesteps, so that the table stays small
    groups = -(-columns // flow.block_tokens)
    group = number % groups
    if flow.timestep_per == "segment":
        groups = segment_groups(columns)
        group = batch.segment.clamp(min=0) % groups
    dropped = draw.per_group("condition_dropout", columns, batch.segment) < flow.condition_dropout
    noisy, index, known, neighbours, alone = [], [], [], [], []
    first, left = batch.position % size == 0, batch.tokens.roll(1, dims=1)
    for copy in range(copies):
        # A dropped segment gets a number of its own: the clean copy, its history, is out of sight.
        segment = torch.where(dropped & clean.real, clean.segment + columns, clean.segment)
        noisy.append(replace(clean.with_role(TARGET + copy), segment=segment))
        index.append(copy * groups + group)
        partial = draw.per_group(f"partial/{copy}", columns, number)
        unit = vae.block_tokens if vae.attention == "block_causal" else 1  # a latent tells of its whole block
        units = torch.as_tensor(size, device=partial.device) // unit
        drawn = 1 + partial / max(flow.partial_block_probability, 1e-9) * (units - 1)
        length = drawn.long().minimum(units - 1) * unit
        given = (partial < flow.partial_block_probability) & (batch.position % size < length)
        known.append(given)
        clean_left = (batch.position > 0) & torch.where(first, ~dropped, given.roll(1, dims=1))
        neighbours.append(torch.where(clean_left, left, -1))
        alone.append(dropped | (clean.block == 0))
    times = draw_timesteps(flow, flow.timesteps, draw, torch.cat(index, dim=1), copies * groups)
    pinned, layout = torch.cat(known, dim=1), Layout.concatenate(noisy)
    return TwoStreams(
        clean=clean,
        clean_mask=make_mask("two_stream", clean),
        noisy=layout,
        noisy_mask=make_mask("two_stream", layout, Layout.concatenate([clean, layout])),
        noise=draw.normal("noise", (copies * columns, vae.latent_channels), batch.tokens.device),
        times=replace(times, index=times.index.masked_fill(pinned, 0)),
        loss_mask=layout.real & ~pinned,
        alone=torch.cat(alone, dim=1),
        neighbours=torch.cat(neighbours, dim=1),
    )
