"""The denoiser in training: process, loss, and the rows of two-stream training. TextDiT and Cola DLM share it."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from megatext import rng
from megatext.config import ConfigError
from megatext.data.packing import TokenBatch
from megatext.flow import objectives
from megatext.flow.paths import Path as NoisePath
from megatext.flow.paths import path_from_name
from megatext.flow.timesteps import TimestepConfig
from megatext.nn.attention import Mask, make_mask
from megatext.nn.dit import TextDiT, TextDiTConfig
from megatext.nn.layout import CONTEXT, TARGET, Layout
from megatext.nn.text_vae import TextVAE, TextVAEConfig
from megatext.recipes.base import Output
from megatext.recipes.draws import RowDraws

TIMESTEP_BINS = 10
"""Loss is logged in this many equal bins of the timestep."""


@dataclass(frozen=True)
class FlowConfig:
    """The process: how latents become noise, what the network predicts, which timesteps it trains on."""

    path: str = "linear"
    """`linear` interpolation (TextLDM, Cola), or the tangent schedule `tan-D` (LDLM: tan-3)."""
    objective: Literal["velocity", "x0", "token_cross_entropy"] = "velocity"
    """`token_cross_entropy`: logits whose expected latent is x0 (score interpolation, CDCD arXiv 2211.15089)."""
    timesteps: TimestepConfig = field(default_factory=TimestepConfig)
    """Distribution of training timesteps; the quantile inference grid follows it."""
    token_likelihood: bool = False
    """Add the exact log-likelihood of each token's noisy latent to the logits (Bayes with the network as prior)."""
    block_tokens: int = 0
    """Tokens of a block; 0 generates the whole target in one shot."""
    training_block_tokens: tuple[int, ...] = ()
    """Sizes of which every segment draws one in training (one named twice is drawn twice as often); empty: always
    block_tokens. Any of them can be asked for in generation."""
    timestep_per: Literal["block", "segment"] = "block"
    """What has a timestep of its own (two-stream training only; one shot: a segment)."""
    posterior: Literal["mean", "sample"] = "mean"
    """What the latents of two-stream training are: means of the VAE's posterior, or samples."""
    noise_copies: int = 1
    """Noisy copies of a row that share one clean copy (two-stream training only)."""
    partial_block_probability: float = 0.1
    """Share of blocks whose first tokens are given clean, as the block in which a prompt ends."""
    self_conditioning_probability: float = 0.0
    """Share of steps in which a first pass provides the self-condition."""
    condition_dropout: float = 0.1
    """Share of segments that are generated without context, for classifier-free guidance."""
    null_condition: Literal["zeros", "drop"] = "drop"
    """A dropped context is zero vectors (TextLDM) or not there at all (Cola's empty prefix)."""
    unconditional_probability: float = 0.1
    """Share of segments that are all target (one shot only; blocks start from nothing by themselves)."""
    context_fraction: tuple[float, float] = (0.1, 0.9)
    """Range of the context's share of a segment (one shot only)."""


@dataclass
class History:
    """The clean copy of two-stream training: tokens, latents `[rows, columns, channels]`, layout, block-causal mask."""

    tokens: Tensor
    latents: Tensor
    layout: Layout
    mask: Mask


class TextDiTTraining(nn.Module):
    """The denoiser with its loss: the one module the engine wraps."""

    def __init__(self, network: TextDiT, flow: FlowConfig, path: NoisePath, table: Tensor | None) -> None:
        super().__init__()
        self.network, self.flow, self.path, self.table = network, flow, path, table

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        tokens: Tensor,
        timesteps: Tensor,
        timestep_index: Tensor,
        layout: Layout,
        mask: Mask,
        loss_mask: Tensor,
        self_condition: bool,
        history: "History | None" = None,
        neighbours: Tensor | None = None,
    ) -> Output:
        """`latents` (clean) and `noise` float32 `[rows, columns, channels]`; `tokens`, `timestep_index`, `layout`,
        `loss_mask` and `neighbours` `[rows, columns]`; `history` the clean copy that two-stream training attends to."""
        t = timesteps[timestep_index]
        noisy = self.path.interpolate(latents, noise, t)
        past = None
        if history is not None:
            # keys and values with gradient: the clean copy runs once, whatever is denoised beside it
            _, past = self.network(
                history.latents,
                timesteps[:1],
                torch.zeros_like(history.layout.position),
                history.layout.position,
                torch.zeros_like(history.layout.real),
                history.mask,
                tokens=history.tokens,
                predict=False,
            )
        target = layout.role != CONTEXT

        def predict(previous: Tensor | None) -> Tensor:
            return self.network(
                noisy,
                timesteps,
                timestep_index,
                layout.position,
                target,
                mask,
                self_condition=previous,
                neighbours=neighbours,
                past=past,
            )[0].float()

        previous = None
        if self_condition:
            with torch.no_grad():
                previous = self.x0(noisy, t, predict(None))
        predicted = predict(previous)
        per_token = self._loss_per_token(predicted, noisy, latents, noise, tokens, t)
        sums, counts = objectives.by_timestep_bin(per_token.detach(), t, loss_mask, TIMESTEP_BINS)
        metrics = {f"loss_t{i}": (sums[i], counts[i]) for i in range(TIMESTEP_BINS)}
        return Output({"flow": objectives.masked_sum(per_token, loss_mask)[0]}, metrics)

    def logits(self, predicted: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """Token logits, with the likelihood of the noisy latent added where the recipe says so."""
        if not self.flow.token_likelihood:
            return predicted
        assert self.table is not None
        return predicted + objectives.token_log_likelihood(self.path, noisy, self.table, t)

    def x0(self, noisy: Tensor, t: Tensor, predicted: Tensor, temperature: float = 1.0) -> Tensor:
        """The clean latents that a prediction stands for, float32 `[rows, columns, channels]`."""
        if self.flow.objective == "token_cross_entropy":
            assert self.table is not None
            return objectives.expected_latent(self.logits(predicted, noisy, t), self.table, temperature)
        return self.path.x0_from_velocity(noisy, predicted, t) if self.flow.objective == "velocity" else predicted

    def no_context_loss(self, prior: Tensor, latents: Tensor, noise: Tensor, tokens: Tensor, t: Tensor) -> Tensor:
        """float32 `[rows, columns]`: the loss if the network's logits were `prior` `[vocab_size]` everywhere. Row by
        row, as the logits of all at once may not fit."""
        noisy = self.path.interpolate(latents, noise, t)
        rows = zip(noisy, tokens, t, strict=True)
        return torch.stack([objectives.token_losses(self.logits(prior, z, at), ids) for z, ids, at in rows])

    def _loss_per_token(
        self, predicted: Tensor, noisy: Tensor, latents: Tensor, noise: Tensor, tokens: Tensor, t: Tensor
    ) -> Tensor:
        """float32 `[rows, columns]`: nats of a token, or squared error averaged over channels."""
        if self.flow.objective == "token_cross_entropy":
            return objectives.token_losses(self.logits(predicted, noisy, t), tokens)
        goal = self.path.velocity(latents, noise, t) if self.flow.objective == "velocity" else latents
        return objectives.squared_error(predicted, goal)


def make_denoiser(network: TextDiTConfig, flow: FlowConfig, vae: TextVAE) -> TextDiTTraining:
    """The module of a recipe, for training and for generation. Raises ConfigError where the options do not fit
    together."""
    tokens_out = network.output == "tokens"
    if (flow.objective == "token_cross_entropy") != tokens_out:
        raise ConfigError(
            f"network.output is {network.output!r} but flow.objective is {flow.objective!r}: "
            "token_cross_entropy needs output: tokens, the others output: latent"
        )
    if tokens_out and not vae.token_local:
        raise ConfigError(
            "flow.objective token_cross_entropy needs a VAE with a token-local encoder "
            "(vae.network.encoder.layers: 0): a contextual one has no latent per token"
        )
    if flow.block_tokens and not vae.token_local and vae.config.attention == "full":
        raise ConfigError(
            "flow.block_tokens needs a VAE with a token-local or (block-)causal encoder: the latents "
            "of a bidirectional one tell the history what comes after it"
        )
    check_block_sizes(flow, vae.config)
    if network.token_embedding and not flow.block_tokens:
        raise ConfigError("network.token_embedding is for the clean history of flow.block_tokens > 0")
    if flow.token_likelihood and not tokens_out:
        raise ConfigError("flow.token_likelihood adds to token logits: it needs objective token_cross_entropy")
    if flow.self_conditioning_probability > 0 and not network.self_conditioning:
        raise ConfigError("flow.self_conditioning_probability > 0 needs network.self_conditioning: true")
    table = vae.token_table() if tokens_out else None
    dit = TextDiT(network, vae.config.latent_channels, vae.vocab_size)
    return TextDiTTraining(dit, flow, path_from_name(flow.path), table)


def check_block_sizes(flow: FlowConfig, vae: TextVAEConfig) -> None:
    """Raise ConfigError where the blocks of a process cannot be those of latents from a `vae`."""
    sizes = {flow.block_tokens, *flow.training_block_tokens}
    if flow.training_block_tokens and not (flow.block_tokens and min(sizes) > 0):
        raise ConfigError("flow.training_block_tokens needs flow.block_tokens, and sizes of at least 1")
    if flow.block_tokens and vae.attention == "block_causal" and any(size % vae.block_tokens for size in sizes):
        raise ConfigError(
            "flow.block_tokens and flow.training_block_tokens must be multiples of the VAE's block_tokens "
            f"({vae.block_tokens}): a latent tells of its whole block"
        )


def stored_weights(state_dict: dict[str, Tensor], prefix: str, network: TextDiTConfig) -> dict[str, Tensor]:
    """The denoiser's tensors among a module's, as an export holds them: what is tied is there once."""
    weights = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    if network.token_embedding:
        del weights["head.weight"]
    return weights


def draw_timesteps(flow: FlowConfig, draw: RowDraws, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """(`timesteps [1 + rows * groups]`, index `[rows, columns]`): one timestep for each row and group, entry 0 the
    clean end. In a row the timesteps are a golden-ratio sequence: spread evenly, whatever the row's length."""
    u = (draw.uniform("timestep")[:, None] + 0.6180339887498949 * np.arange(groups)) % 1.0
    t = rng.on_device(flow.timesteps.quantile(torch.from_numpy(u)).float().flatten().numpy(), group.device)
    rows = torch.arange(group.shape[0], device=group.device)[:, None]
    return torch.cat((t.new_zeros(1), t)), 1 + rows * groups + group


def feeds_back(flow: FlowConfig, seed: int, step: int, purpose: str) -> bool:
    """Whether a first pass of a step provides the self-condition: one coin a step, so that all ranks run as many
    forward passes. Validation is always the same."""
    coin = rng.uniform(seed, "self_condition", [step])[0] if purpose == "train" else 0.0
    return bool(coin < flow.self_conditioning_probability)


def segment_groups(columns: int) -> int:
    """How many timesteps the segments of a row have: more segments share them, so that the table stays small."""
    return -(-columns // 32)


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
    timesteps: Tensor
    timestep_index: Tensor
    loss_mask: Tensor
    neighbours: Tensor

    @staticmethod
    def of_zeros(flow: FlowConfig, columns: int, channels: int) -> "TwoStreams":
        """One row of the shapes of training, for counting FLOPs."""
        zeros = torch.zeros(1, columns, dtype=torch.long)
        clean = Layout.of(zeros, zeros)
        noisy = Layout.concatenate([clean.with_role(TARGET)] * flow.noise_copies)
        groups = -(-columns // flow.block_tokens) if flow.timestep_per == "block" else segment_groups(columns)
        return TwoStreams(
            clean=clean,
            clean_mask=make_mask("two_stream", clean),
            noisy=noisy,
            noisy_mask=make_mask("two_stream", noisy, Layout.concatenate([clean, noisy])),
            noise=torch.zeros(*noisy.segment.shape, channels),
            timesteps=torch.zeros(1 + flow.noise_copies * groups),
            timestep_index=noisy.segment,
            loss_mask=noisy.real,
            neighbours=noisy.segment,
        )

    def inputs(self, tokens: Tensor, latents: Tensor) -> dict[str, Any]:
        """What `TextDiTTraining.forward` takes, of tokens and latents `[rows, columns, ...]`. What is given clean,
        history and the first tokens of some blocks, has no gradient into the latents."""
        copies, given = self.noisy.segment.shape[1] // self.clean.segment.shape[1], self.timestep_index == 0
        noisy = latents.repeat(1, copies, 1)
        return {
            "latents": torch.where(given[..., None], noisy.detach(), noisy),
            "noise": self.noise,
            "tokens": tokens.repeat(1, copies),
            "timesteps": self.timesteps,
            "timestep_index": self.timestep_index,
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
    # running number of the block in its row; many short segments share timesteps, so that the table stays small
    blocks = -(-columns // flow.block_tokens)
    number = (boundary.cumsum(dim=1) - 1) % blocks
    groups, group = blocks, number
    if flow.timestep_per == "segment":
        groups = segment_groups(columns)
        group = batch.segment.clamp(min=0) % groups
    dropped = draw.per_group("condition_dropout", columns, batch.segment) < flow.condition_dropout
    noisy, index, known, neighbours = [], [], [], []
    first, left = batch.position % size == 0, batch.tokens.roll(1, dims=1)
    for copy in range(copies):
        # A dropped segment gets a number of its own: the clean copy, its history, is out of sight.
        segment = torch.where(dropped & clean.real, clean.segment + columns, clean.segment)
        noisy.append(replace(clean.with_role(TARGET + copy), segment=segment))
        index.append(copy * groups + group)
        partial = draw.per_group(f"partial/{copy}", blocks, number)
        length = (partial / max(flow.partial_block_probability, 1e-9) * size).long()
        if vae.attention == "block_causal":  # a latent tells of its whole block
            length = length // vae.block_tokens * vae.block_tokens
        given = (partial < flow.partial_block_probability) & (batch.position % size < length)
        known.append(given)
        clean_left = (batch.position > 0) & torch.where(first, ~dropped, given.roll(1, dims=1))
        neighbours.append(torch.where(clean_left, left, -1))
    timesteps, timestep_index = draw_timesteps(flow, draw, torch.cat(index, dim=1), copies * groups)
    pinned, layout = torch.cat(known, dim=1), Layout.concatenate(noisy)
    return TwoStreams(
        clean=clean,
        clean_mask=make_mask("two_stream", clean),
        noisy=layout,
        noisy_mask=make_mask("two_stream", layout, Layout.concatenate([clean, layout])),
        noise=draw.normal("noise", (copies * columns, vae.latent_channels), batch.tokens.device),
        timesteps=timesteps,
        timestep_index=timestep_index.masked_fill(pinned, 0),
        loss_mask=layout.real & ~pinned,
        neighbours=torch.cat(neighbours, dim=1),
    )


def best_without_input(
    module: TextDiTTraining,
    prepared: list[dict[str, Any]],
    tokens: Tensor,
    vocab_size: int,
    latent_variance: float = 1.0,
) -> dict[str, float]:
    """What `loss_t*` has to stay below, in each timestep bin of validation rows prepared for `module`.

    `constant_t*`: the best prediction that is always the same, for latents of this variance a channel; for token
    cross-entropy it is the unigrams of `tokens`.
    `no_context_t*`: where the recipe adds the noisy latent's likelihood to the logits, unigrams with that likelihood,
    the best that can be known of a token from its own latent alone. What lies below it is context.
    """
    shares = torch.bincount(tokens, minlength=vocab_size).double() / len(tokens)
    unigrams = shares.clamp(min=1e-12).log().float()
    names = ["constant", *(["no_context"] if module.flow.token_likelihood else [])]
    found = {name: torch.zeros(2, TIMESTEP_BINS) for name in names}
    for inputs in prepared:
        t, ids = inputs["timesteps"][inputs["timestep_index"]], inputs["tokens"]
        if module.flow.objective == "token_cross_entropy":
            errors = [-unigrams[ids]]
        else:
            errors = [objectives.constant_predictor_error(module.path, t, module.flow.objective, latent_variance)]
        if module.flow.token_likelihood:
            errors.append(module.no_context_loss(unigrams, inputs["latents"], inputs["noise"], ids, t))
        for name, error in zip(names, errors, strict=True):
            binned = objectives.by_timestep_bin(error, t, inputs["loss_mask"], TIMESTEP_BINS)
            found[name] += torch.stack(binned).cpu()
    return {
        f"{name}_t{i}": float(total / count)
        for name, bins in found.items()
        for i, (total, count) in enumerate(bins.T)
        if count > 0
    }
