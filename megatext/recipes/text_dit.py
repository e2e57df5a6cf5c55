"""TextDiT on the latents of a frozen TextVAE: TextLDM as published, and what measures better at small scale.

One recipe with options. `block_tokens: 0` is TextLDM (arXiv 2605.07748): a context and a noisy target in one row,
one shot. `block_tokens: n` is block-causal training in two streams (Cola DLM, arXiv 2605.06548): a clean copy of
the row as history, and noisy copies in which every block of n tokens is denoised given the clean blocks before it.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
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
from megatext.nn.blocks import TrunkConfig, initialise
from megatext.nn.dit import TextDiT, TextDiTConfig
from megatext.nn.layout import CONTEXT, TARGET, Layout
from megatext.nn.text_vae import TextVAE, TextVAEConfig
from megatext.recipes.base import Output, Pass, Prepared, Recipe
from megatext.recipes.draws import RowDraws
from megatext.recipes.pretrained import load_text_vae, text_vae_config, weights_hash, write_model
from megatext.recipes.warm_start import load_language_model
from megatext.training.run_config import RunConfig

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


@dataclass(frozen=True)
class TextDiTRecipeConfig:
    """A TextDiT and the VAE it lives on."""

    vae: str = ""
    """Directory of the exported TextVAE (frozen)."""
    warm_start: str = ""
    """Directory of a Hugging Face Qwen3 model of the trunk's sizes that the trunk starts from; empty: random."""
    network: TextDiTConfig = field(default_factory=TextDiTConfig)
    """The denoiser."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    """The process."""


@dataclass(frozen=True, kw_only=True)
class PretrainDiTConfig(RunConfig):
    """launch/pretrain_dit.py"""

    dit: TextDiTRecipeConfig
    """The system."""


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


def make_module(config: TextDiTRecipeConfig, vae: TextVAE) -> TextDiTTraining:
    """The module of a recipe, for training and for generation; checks that the options fit together."""
    flow, network = config.flow, config.network
    tokens_out = network.output == "tokens"
    if (flow.objective == "token_cross_entropy") != tokens_out:
        raise ConfigError(
            f"dit.network.output is {network.output!r} but dit.flow.objective is {flow.objective!r}: "
            "token_cross_entropy needs output: tokens, the others output: latent"
        )
    if tokens_out and not vae.token_local:
        raise ConfigError(
            "dit.flow.objective token_cross_entropy needs a VAE with a token-local encoder "
            "(vae.network.encoder.layers: 0): a contextual one has no latent per token"
        )
    if flow.block_tokens and not vae.token_local and vae.config.attention == "full":
        raise ConfigError(
            "dit.flow.block_tokens needs a VAE with a token-local or (block-)causal encoder: the latents "
            "of a bidirectional one tell the history what comes after it"
        )
    if network.token_embedding and not flow.block_tokens:
        raise ConfigError("dit.network.token_embedding is for the clean history of dit.flow.block_tokens > 0")
    if flow.token_likelihood and not tokens_out:
        raise ConfigError("dit.flow.token_likelihood adds to token logits: it needs objective token_cross_entropy")
    if flow.self_conditioning_probability > 0 and not network.self_conditioning:
        raise ConfigError("dit.flow.self_conditioning_probability > 0 needs dit.network.self_conditioning: true")
    table = vae.token_table() if tokens_out else None
    dit = TextDiT(network, vae.config.latent_channels, vae.vocab_size)
    return TextDiTTraining(dit, flow, path_from_name(flow.path), table)


class TextDiTRecipe(Recipe):
    """Prepares rows for TextDiT: encode, split or copy, draw timesteps and noise, all keyed by the row."""

    module: TextDiTTraining

    def __init__(self, config: PretrainDiTConfig) -> None:
        self.config, self.seed, self.flow = config.dit, config.seed, config.dit.flow
        self.vae_directory = Path(config.dit.vae)
        self.vae, self.tokenizer_fingerprint = load_text_vae(self.vae_directory)
        self.built_on = {"dit.vae": weights_hash(self.vae_directory)}
        self.module = make_module(config.dit, self.vae)
        initialise(
            self.module, lambda name, p: torch.randn(p.shape, generator=rng.generator(self.seed, f"init/{name}"))
        )
        if config.dit.warm_start:
            load_language_model(self.module.network, config.dit.warm_start, self.tokenizer_fingerprint)
            self.built_on["dit.warm_start"] = weights_hash(config.dit.warm_start)

    def to(self, device: torch.device) -> None:
        self.vae.to(device)
        if self.module.table is not None:
            self.module.table = self.module.table.to(device)

    def loss_weights(self, step: int) -> dict[str, float]:
        return {"flow": 1.0}

    @torch.no_grad()
    def prepare(self, batch: TokenBatch, *, step: int, purpose: str = "train") -> Prepared:
        draw = RowDraws(self.seed, purpose, batch.row_index)
        make = self._two_streams if self.flow.block_tokens else self._context_and_target
        inputs = make(batch, draw)
        # one coin a step: all ranks run the same number of forward passes. Validation is always the same.
        share = self.flow.self_conditioning_probability
        coin = rng.uniform(self.seed, "self_condition", [step])[0] if purpose == "train" else 0.0
        inputs["self_condition"] = bool(coin < share)
        return Prepared(inputs, {"flow": inputs["loss_mask"].sum().double()})

    def _timesteps(self, draw: "RowDraws", group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """(`timesteps [1 + rows * groups]`, index `[rows, columns]`): one timestep for each row and group, entry 0 the
        clean end. In a row the timesteps are a golden-ratio sequence: spread evenly, whatever the row's length."""
        u = (draw.uniform("timestep")[:, None] + 0.6180339887498949 * np.arange(groups)) % 1.0
        t = rng.on_device(self.flow.timesteps.quantile(torch.from_numpy(u)).float().flatten().numpy(), group.device)
        rows = torch.arange(group.shape[0], device=group.device)[:, None]
        return torch.cat((t.new_zeros(1), t)), 1 + rows * groups + group

    def _two_streams(self, batch: TokenBatch, draw: "RowDraws") -> dict[str, Any]:
        """One clean copy of the row and `noise_copies` noisy ones, block by block."""
        size, copies = self.flow.block_tokens, self.flow.noise_copies
        clean = Layout.of(batch.segment, batch.position, block_tokens=size)
        rows, columns = batch.tokens.shape
        mean, _, _ = self.vae.encode(batch.tokens, clean)
        latents = self.vae.standardise(mean)
        boundary = torch.ones_like(batch.segment, dtype=torch.bool)
        boundary[:, 1:] = (clean.segment[:, 1:] != clean.segment[:, :-1]) | (clean.block[:, 1:] != clean.block[:, :-1])
        # running number of the block in its row; many short segments share timesteps, so that the table stays small
        blocks = -(-columns // size)
        number = (boundary.cumsum(dim=1) - 1) % blocks
        dropped = draw.per_group("condition_dropout", columns, batch.segment) < self.flow.condition_dropout
        noisy, groups, known, neighbours = [], [], [], []
        first, left = batch.position % size == 0, batch.tokens.roll(1, dims=1)
        for copy in range(copies):
            # A dropped segment gets a number of its own: the clean copy, its history, is out of sight.
            segment = torch.where(dropped & clean.real, clean.segment + columns, clean.segment)
            noisy.append(replace(clean.with_role(TARGET + copy), segment=segment))
            groups.append(copy * blocks + number)
            partial = draw.per_group(f"partial/{copy}", blocks, number)
            length = (partial / max(self.flow.partial_block_probability, 1e-9) * size).long()
            given = (partial < self.flow.partial_block_probability) & (batch.position % size < length)
            known.append(given)
            clean_left = (batch.position > 0) & torch.where(first, ~dropped, given.roll(1, dims=1))
            neighbours.append(torch.where(clean_left, left, -1))
        timesteps, index = self._timesteps(draw, torch.cat(groups, dim=1), copies * blocks)
        pinned = torch.cat(known, dim=1)
        layout = Layout.concatenate(noisy)
        return {
            "latents": latents.repeat(1, copies, 1),
            "noise": draw.normal("noise", (copies * columns, latents.shape[-1]), latents.device),
            "tokens": batch.tokens.repeat(1, copies),
            "timesteps": timesteps,
            "timestep_index": index.masked_fill(pinned, 0),
            "layout": layout,
            "mask": make_mask("two_stream", layout, Layout.concatenate([clean, layout])),
            "loss_mask": layout.real & ~pinned,
            "neighbours": torch.cat(neighbours, dim=1),
            "history": History(batch.tokens, latents, clean, make_mask("two_stream", clean)),
        }

    def _context_and_target(self, batch: TokenBatch, draw: "RowDraws") -> dict[str, Any]:
        """Every segment split in a clean context and a noisy target that are encoded separately."""
        columns = batch.tokens.shape[1]
        low, high = self.flow.context_fraction
        fraction = low + (high - low) * draw.per_group("split", columns, batch.segment)
        alone = draw.per_group("unconditional", columns, batch.segment) < self.flow.unconditional_probability
        same = batch.segment[:, :, None] == batch.segment[:, None, :]
        length = same.sum(dim=-1)
        context = (fraction * length).round().clamp(min=1).minimum(length - 1) * ~alone
        role = torch.where(batch.position < context, CONTEXT, TARGET)
        layout = Layout.of(batch.segment, batch.position, role)
        mean, log_variance, _ = self.vae.encode(batch.tokens, layout.separated())
        posterior = draw.normal("posterior", tuple(mean.shape[1:]), mean.device)
        # The flow's goal is a posterior sample, the condition the mean (papers leave it open).
        sample = mean + (0.5 * log_variance).exp() * posterior
        is_target = role == TARGET
        latents = self.vae.standardise(torch.where(is_target[..., None], sample, mean))
        dropped = (
            draw.per_group("condition_dropout", columns, batch.segment) < self.flow.condition_dropout
        ) & ~is_target
        seen = layout
        if self.flow.null_condition == "zeros":
            latents = latents.masked_fill(dropped[..., None], 0.0)
        else:
            seen = Layout(
                torch.where(dropped & layout.real, layout.segment + columns, layout.segment),
                layout.position,
                layout.role,
                layout.block,
            )
        timesteps, index = self._timesteps(draw, batch.segment.clamp(min=0), columns)
        return {
            "latents": latents,
            "noise": draw.normal("noise", tuple(latents.shape[1:]), latents.device),
            "tokens": batch.tokens,
            "timesteps": timesteps,
            "timestep_index": index.masked_fill(~is_target, 0),
            "layout": seen,
            "mask": make_mask("full", seen),
            "loss_mask": layout.real & is_target,
        }

    @torch.no_grad()
    def finish(self, batches: list[TokenBatch]) -> dict[str, float]:
        """What `validation/loss_t*` has to stay below, in each timestep bin of the validation rows.

        `constant_t*`: the best prediction that is always the same; for token cross-entropy it is the rows' unigrams.
        `no_context_t*`: where the recipe adds the noisy latent's likelihood to the logits, unigrams with that
        likelihood, the best that can be known of a token from its own latent alone. What lies below it is context.
        """
        every = torch.cat([batch.tokens[batch.segment >= 0] for batch in batches])
        shares = torch.bincount(every, minlength=self.vae.vocab_size).double() / len(every)
        unigrams = shares.clamp(min=1e-12).log().float()
        names = ["constant", *(["no_context"] if self.flow.token_likelihood else [])]
        found = {name: torch.zeros(2, TIMESTEP_BINS) for name in names}
        for batch in batches:
            inputs = self.prepare(batch, step=0, purpose="validation").inputs
            t, tokens = inputs["timesteps"][inputs["timestep_index"]], inputs["tokens"]
            if self.flow.objective == "token_cross_entropy":
                errors = [-unigrams[tokens]]
            else:
                errors = [objectives.constant_predictor_error(self.module.path, t, self.flow.objective)]
            if self.flow.token_likelihood:
                errors.append(self.module.no_context_loss(unigrams, inputs["latents"], inputs["noise"], tokens, t))
            for name, error in zip(names, errors, strict=True):
                binned = objectives.by_timestep_bin(error, t, inputs["loss_mask"], TIMESTEP_BINS)
                found[name] += torch.stack(binned).cpu()
        return {
            f"{name}_t{i}": float(total / count)
            for name, bins in found.items()
            for i, (total, count) in enumerate(bins.T)
            if count > 0
        }

    def preview(self, seed: int) -> list[str]:
        from megatext.generation.text_generator import TextGenerator

        generator = TextGenerator.from_recipe(self)
        return generator.generate(["", "", "", ""], target_tokens=[32] * 4, seeds=[seed + i for i in range(4)])

    def export(self, state_dict: dict[str, Tensor], output: Path) -> None:
        weights = {k.removeprefix("network."): v for k, v in state_dict.items() if k.startswith("network.")}
        if self.config.network.token_embedding:
            del weights["head.weight"]  # tied: stored once
        vae, warm_start = self.vae_directory, self.config.warm_start
        write_model(output, "text_dit", self.config, weights, tokenizer=vae, vae=vae, warm_start=warm_start)


def build(config: PretrainDiTConfig) -> TextDiTRecipe:
    return TextDiTRecipe(config)


def needed(config: PretrainDiTConfig) -> list[str]:
    return [*config.data.folders(), config.dit.vae, *([config.dit.warm_start] if config.dit.warm_start else [])]


def make(config: PretrainDiTConfig, vocab_size: int) -> TextDiTTraining:
    return make_module(config.dit, _untrained_vae(config, vocab_size))


def _untrained_vae(config: PretrainDiTConfig, vocab_size: int) -> TextVAE:
    """Of the exported VAE's sizes, or, where it is not there yet, of those that the options ask for."""
    if Path(config.dit.vae, "config.json").is_file():
        network = text_vae_config(config.dit.vae)
    else:
        layers = 0 if config.dit.network.output == "tokens" else 1
        attention: Literal["causal", "full"] = "causal" if config.dit.flow.block_tokens else "full"
        network = TextVAEConfig(encoder=TrunkConfig(layers=layers), attention=attention)
    return TextVAE(network, vocab_size)


def passes(config: PretrainDiTConfig, module: TextDiTTraining, vocab_size: int) -> list[Pass]:
    flow, columns, vae = config.dit.flow, config.data.row_tokens, _untrained_vae(config, vocab_size)
    tokens = torch.zeros(1, columns, dtype=torch.long)
    clean = Layout.of(tokens, tokens)
    copies, groups = (flow.noise_copies, -(-columns // flow.block_tokens)) if flow.block_tokens else (1, columns)
    noisy = Layout.concatenate([clean.with_role(TARGET)] * copies)
    zeros = noisy.segment
    latents = torch.zeros(1, copies * columns, vae.config.latent_channels)
    history = (
        History(tokens, latents[:, :columns], clean, make_mask("two_stream", clean)) if flow.block_tokens else None
    )
    seen = Layout.concatenate([clean, noisy]) if flow.block_tokens else noisy

    def run(self_condition: bool) -> Any:
        return module(
            latents=latents,
            noise=latents,
            tokens=zeros,
            timesteps=torch.zeros(1 + copies * groups),
            timestep_index=zeros,
            layout=noisy,
            mask=make_mask("two_stream" if flow.block_tokens else "full", noisy, seen),
            loss_mask=noisy.real,
            self_condition=self_condition,
            history=history,
            neighbours=zeros if flow.block_tokens else None,
        )

    twice = flow.self_conditioning_probability
    always = [Pass(lambda: vae.encode(tokens, clean), trained=False), Pass(lambda: run(False), 1 - twice)]
    return [*always, Pass(lambda: run(True), twice)] if twice else always
