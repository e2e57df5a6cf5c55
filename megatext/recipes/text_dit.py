"""TextDiT on the latents of a frozen TextVAE: TextLDM as published, and what measures better at small scale.

One recipe with options. `block_tokens: 0` is TextLDM (arXiv 2605.07748): a context and a noisy target in one row,
one shot. `block_tokens: n` is block-causal training in two streams (Cola DLM, arXiv 2605.06548): a clean copy of
the row as history, and noisy copies in which every block of n tokens is denoised given the clean blocks before it.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from megatext import rng
from megatext.data.packing import TokenBatch
from megatext.nn.blocks import TrunkConfig, initialise
from megatext.nn.dit import TextDiTConfig
from megatext.nn.layout import Layout
from megatext.nn.text_vae import TextVAE, TextVAEConfig
from megatext.recipes.base import Pass, Prepared, Recipe, move_frozen
from megatext.recipes.denoiser import (
    TextDiTTraining,
    best_without_input,
    check_effects,
    feeds_back,
    found_timesteps,
    make_denoiser,
    stored_weights,
)
from megatext.recipes.draws import RowDraws
from megatext.recipes.flow_config import FlowConfig
from megatext.recipes.noisy_rows import (
    OneShot,
    TwoStreams,
    check_rows,
    cut_segments,
    one_shot,
    pad_with_ends,
    two_streams,
)
from megatext.recipes.pretrained import is_text_vae, load_text_vae, text_vae_config, weights_hash, write_model
from megatext.recipes.sampling import SamplingConfig
from megatext.recipes.warm_start import load_language_model
from megatext.tokenizer import load_tokenizer
from megatext.training.run_config import RunConfig


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
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How it writes where a call does not say: in previews, `launch/generate.py`, a systems file without `sampling`."""


@dataclass(frozen=True, kw_only=True)
class PretrainDiTConfig(RunConfig):
    """launch/pretrain_dit.py"""

    presumed_model: ClassVar = "a TextVAE with an encoder of 1 layer, of none where the network ends in tokens"
    dit: TextDiTRecipeConfig
    """The system."""


class TextDiTRecipe(Recipe):
    """Prepares rows for TextDiT: encode, split or copy, draw timesteps and noise, all keyed by the row."""

    module: TextDiTTraining

    def __init__(self, config: PretrainDiTConfig) -> None:
        check_effects(config.dit.network, config.dit.flow, config.dit.sampling, "dit")
        self.config, self.seed, self.flow = config.dit, config.seed, config.dit.flow
        self.vae_directory = Path(config.dit.vae)
        self.vae, self.tokenizer_fingerprint = load_text_vae(self.vae_directory)
        self.built_on = {"dit.vae": weights_hash(self.vae_directory)}
        check_rows(self.flow, config.data.without_states(), "dit.flow")
        self.eos_id = load_tokenizer(self.vae_directory).eos_id
        self.module = make_denoiser(config.dit.network, config.dit.flow, self.vae, frozen=True)
        initialise(
            self.module, lambda name, p: torch.randn(p.shape, generator=rng.generator(self.seed, f"init/{name}"))
        )
        if config.dit.warm_start:
            load_language_model(self.module.network, config.dit.warm_start, self.tokenizer_fingerprint)
            self.built_on["dit.warm_start"] = weights_hash(config.dit.warm_start)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        move_frozen(self.vae, device, dtype)
        if self.module.table is not None:
            self.module.table = self.module.table.to(device)

    def loss_weights(self, step: int) -> dict[str, float]:
        return self.flow.loss_weights(step)

    def end_of_step(self, step: int, applied: bool) -> None:
        if self.module.timesteps is not None:
            self.module.timesteps.end_of_step(step, applied)

    @torch.no_grad()
    def prepare(self, batch: TokenBatch, *, step: int, purpose: str = "train") -> Prepared:
        draw = RowDraws(self.seed, purpose, batch.row_index)
        if purpose == "train":
            batch = cut_segments(self.flow, batch, draw)
        if self.flow.block_tokens:
            inputs = self._two_streams(batch, draw)
        else:
            inputs = self._context_and_target(*pad_with_ends(self.flow, batch, draw, self.eos_id), draw)
        inputs["self_condition"] = feeds_back(self.flow, self.seed, step, purpose)
        return Prepared(inputs, self.flow.loss_counts(inputs["loss_mask"].sum().double()))

    def _two_streams(self, batch: TokenBatch, draw: RowDraws) -> dict[str, Any]:
        """One clean copy of the row and `noise_copies` noisy ones, block by block."""
        streams = two_streams(self.flow, batch, draw, self.vae.config)
        mean, log_variance, _ = self.vae.encode(batch.tokens, self.vae.layout(batch.segment, batch.position))
        if self.flow.posterior == "sample":
            noise = draw.normal("posterior", tuple(mean.shape[1:]), mean.device)
            mean = self.vae.sample(mean, log_variance, noise)
        return streams.inputs(batch.tokens, self.vae.standardise(mean))

    def _context_and_target(self, batch: TokenBatch, added: Tensor | None, draw: RowDraws) -> dict[str, Any]:
        """Every segment split in a clean context and a noisy target, encoded without it or beside it."""
        timesteps = self.module.timesteps if draw.purpose == "train" else None
        shot = one_shot(self.flow, batch, draw, self.vae.config.latent_channels, timesteps, added)
        if self.flow.target_encoding == "separate":
            mean, log_variance, _ = self.vae.encode(batch.tokens, shot.layout.separated())
        else:
            mean, log_variance, _ = self.vae.encode(batch.tokens, shot.layout, rule="prefix")
        posterior = draw.normal("posterior", tuple(mean.shape[1:]), mean.device)
        # The flow's goal is a posterior sample, the condition the mean (papers leave it open).
        sample = self.vae.sample(mean, log_variance, posterior)
        latents = self.vae.standardise(torch.where(shot.target[..., None], sample, mean))
        return shot.inputs(batch.tokens, latents)

    @torch.no_grad()
    def finish(self, batches: list[TokenBatch]) -> dict[str, float]:
        """What `validation/loss_t*` has to stay below, in each timestep bin of the validation rows.

        `constant_t*`: the best prediction that is always the same; for token cross-entropy it is the rows' unigrams.
        `no_context_t*`: where the recipe adds the noisy latent's likelihood to the logits, unigrams with that
        likelihood, the best that can be known of a token from its own latent alone. What lies below it is context.
        """
        prepared = [self.prepare(batch, step=0, purpose="validation").inputs for batch in batches]
        tokens = torch.cat([batch.tokens[batch.segment >= 0] for batch in batches])
        return best_without_input(self.module, prepared, tokens, self.vae.vocab_size)

    def preview(self, seed: int) -> list[str]:
        from megatext.generation.text_generator import TextGenerator

        generator = TextGenerator(self.module, self.vae, load_tokenizer(self.vae_directory), self.config.sampling)
        generator.flow = found_timesteps(self.flow, dict(self.module.named_buffers()), "")
        return generator.preview(seed)

    def export(self, state_dict: dict[str, Tensor], output: Path) -> None:
        weights = stored_weights(state_dict, "network.", self.config.network)
        vae, warm_start = self.vae_directory, self.config.warm_start
        config = replace(self.config, flow=found_timesteps(self.flow, state_dict, ""))
        write_model(output, "text_dit", config, weights, tokenizer=vae, vae=vae, warm_start=warm_start)


def build(config: PretrainDiTConfig) -> TextDiTRecipe:
    return TextDiTRecipe(config)


def needed(config: PretrainDiTConfig) -> list[str]:
    return [*config.data.folders(), config.dit.vae, *([config.dit.warm_start] if config.dit.warm_start else [])]


def make(config: PretrainDiTConfig, vocab_size: int) -> TextDiTTraining:
    return make_denoiser(config.dit.network, config.dit.flow, _untrained_vae(config, vocab_size), frozen=True)


def _untrained_vae(config: PretrainDiTConfig, vocab_size: int) -> TextVAE:
    """Frozen, of the exported VAE's sizes, or, where it is not there yet, of those that the options ask for."""
    if is_text_vae(config.dit.vae):
        network = text_vae_config(config.dit.vae)
    else:
        layers = 0 if config.dit.network.output == "tokens" else 1
        attention: Literal["causal", "full"] = "causal" if config.dit.flow.block_tokens else "full"
        network = TextVAEConfig(encoder=TrunkConfig(layers=layers), attention=attention)
    return TextVAE(network, vocab_size).eval().requires_grad_(False)


def passes(config: PretrainDiTConfig, module: TextDiTTraining, vocab_size: int) -> list[Pass]:
    flow, columns, vae = config.dit.flow, config.data.row_tokens, _untrained_vae(config, vocab_size)
    tokens = torch.zeros(1, columns, dtype=torch.long)
    clean = Layout.of(tokens, tokens)
    latents = torch.zeros(1, columns, vae.config.latent_channels)

    channels = vae.config.latent_channels
    rows: TwoStreams | OneShot = (
        TwoStreams.of_zeros(flow, columns, channels) if flow.block_tokens else OneShot.of_zeros(columns, channels)
    )

    def run(self_condition: bool) -> Any:
        return module(**rows.inputs(tokens, latents), self_condition=self_condition)

    twice = flow.self_conditioning_probability
    always = [Pass(lambda: vae.encode(tokens, clean), trained=False), Pass(lambda: run(False), 1 - twice)]
    return [*always, Pass(lambda: run(True), twice)] if twice else always
