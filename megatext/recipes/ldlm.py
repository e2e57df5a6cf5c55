"""LDLM (arXiv 2605.07933): an autoencoder of a language model's hidden states and a denoiser, trained jointly.

    flow_weight * L_diff(z) + hidden_weight * |h - D(z + sigma eps)|^2 + token_weight * CE(T(stop-gradient of D))

z is what the trainable encoder E makes of the frozen states h. Naive joint training ends in latents that are easy to
denoise and say little. Four ingredients prevent it, each a field: the decoder's squared error instead of the tokens'
cross-entropy (`decoder_loss`), a gate on the gradient of L_diff into the encoder (`encoder_warmup_steps`), timesteps
drawn where the loss changes (`flow.adaptive_timesteps`), and noise on what the decoder reads (`decoder_noise`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from megatext import rng
from megatext.config import ConfigError
from megatext.data.hidden_states import read_states_manifest
from megatext.data.packing import TokenBatch
from megatext.data.remote import is_remote, local_folder
from megatext.data.stream import TokenStream
from megatext.data.teacher import Teacher, fingerprint, load_teacher
from megatext.flow import objectives
from megatext.nn.blocks import initialise
from megatext.nn.dit import TextDiTConfig
from megatext.nn.layout import PADDING, Layout
from megatext.nn.perceiver import LatentAutoencoder, LatentAutoencoderConfig
from megatext.recipes.base import Output, Pass, Prepared, Recipe, move_frozen
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
from megatext.recipes.hidden_autoencoder import (
    HiddenAutoencoder,
    HiddenAutoencoderConfig,
    states_of_rows,
    write_hidden_autoencoder,
)
from megatext.recipes.noisy_rows import OneShot, check_rows, cut_segments, one_shot, pad_with_ends
from megatext.recipes.pretrained import weights_hash, write_model
from megatext.recipes.sampling import SamplingConfig
from megatext.recipes.text_dit import TextDiTRecipeConfig
from megatext.recipes.text_vae import TeacherStatistics, latent_health
from megatext.tokenizer import load_tokenizer
from megatext.training.run_config import RunConfig

NOISE_LEVELS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)
"""Deviations of the decoder's input noise at which decoding is measured in validation; latents have mean square 1."""
STATISTICS_TOKENS = 4096
"""Tokens of the first step's rows, about, on which means and deviations are measured before training: of the untrained
latents, and of the language model's states where no extracted ones tell them."""
LEAST_VARIANCE = 0.2
"""A lower mean variance of a channel is told as a collapse: the rest of the latents' mean square, which is 1, is what
all tokens share."""
MIN_TOKENS = 4
"""A shorter text does not tell whether a language model is causal."""
GATE_STEEPNESS, GATE_CENTRE = 10.0, 0.8
"""Of the warm-up (LDLM Eq. 29-30; the papers' k and c)."""


@dataclass(frozen=True)
class LDLMRecipeConfig:
    """A frozen language model, an autoencoder of its states, a denoiser, and the four ingredients."""

    language_model: str = ""
    """Directory of a Hugging Face language model with the shards' tokenizer: frozen."""
    layer: int = -3
    """Which of its hidden states: 0 is the embedding, -1 the last layer after its norm."""
    autoencoder: LatentAutoencoderConfig = field(default_factory=LatentAutoencoderConfig)
    """What is trained around the latents."""
    network: TextDiTConfig = field(default_factory=TextDiTConfig)
    """The denoiser."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    """The process; `adaptive_timesteps` is the third ingredient."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How it writes where a call does not say: in previews, `launch/generate.py`, a systems file without `sampling`."""
    decoder_loss: Literal["mse", "cross_entropy"] = "mse"
    """`mse`: the decoder learns hidden states, and the tokens' cross-entropy stops before them. `cross_entropy`: it
    goes all the way, and there is no other."""
    encoder_warmup_steps: int = 50_000
    """The gradient of L_diff into the encoder is multiplied by a sigmoid that is at a half after 0.8 of these steps; 0
    lets all of it through from the start."""
    decoder_noise: float = 3.0
    """Standard deviation of the noise on the decoder's input, in training; latents have mean square 1."""
    flow_weight: float = 1.0
    """Of L_diff."""
    hidden_weight: float = 1.0
    """Of the squared error of hidden states, averaged over channels; only where decoder_loss is mse."""
    token_weight: float = 1.0
    """Of the tokens' cross-entropy."""


@dataclass(frozen=True, kw_only=True)
class PretrainLDLMConfig(RunConfig):
    """launch/pretrain_ldlm.py"""

    vocabulary: ClassVar = ("GPT-2", 50_257)
    presumed_model: ClassVar = "GPT-2 small"
    ldlm: LDLMRecipeConfig
    """The system."""


def encoder_gate(step: int, warmup_steps: int) -> float:
    """What the gradient of L_diff into the encoder is multiplied by at a step (LDLM Eq. 29-30): a sigmoid from near 0
    to near 1. The exact form is a reading of the description."""
    if not warmup_steps:
        return 1.0
    return 1.0 / (1.0 + math.exp(-GATE_STEEPNESS * (step / warmup_steps - GATE_CENTRE)))


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """x itself, whose gradient is multiplied by `factor`."""
    return x.detach() + factor * (x - x.detach())  # in this form x keeps its bits


def latent_rank(latents: Tensor, real: Tensor) -> Tensor:
    """How many directions latents `[rows, tokens, channels]` use where `real`, float64 between 1 and channels: the
    participation ratio (tr C)^2 / tr C^2 of their covariance C."""
    weight = real.float()[..., None]
    centred = (latents - (weight * latents).sum(dim=(0, 1)) / weight.sum().clamp(min=1.0)) * weight
    covariance = torch.einsum("rtc,rtd->cd", centred, centred).double()
    return covariance.trace().square() / covariance.square().sum().clamp(min=1e-30)


class LDLMTraining(nn.Module):
    """Autoencoder and denoiser with their losses: the one module the engine wraps."""

    def __init__(self, autoencoder: LatentAutoencoder, denoiser: TextDiTTraining, config: LDLMRecipeConfig) -> None:
        super().__init__()
        self.autoencoder, self.denoiser, self.config = autoencoder, denoiser, config

    def forward(
        self,
        tokens: Tensor,
        states: Tensor,
        shot: OneShot,
        decoder_noise: Tensor,
        gate: Tensor,
        self_condition: bool,
    ) -> Output:
        """`tokens` int64 and standardised `states` `[rows, columns, ...]`; standard normal `decoder_noise` `[rows,
        columns, channels]`; `gate` of L_diff's gradient into the encoder, a scalar."""
        network, by_tokens = self.autoencoder, self.config.decoder_loss == "cross_entropy"
        layout, real = shot.layout.separated(), shot.layout.real
        latents = network.encode_states(states, shot.layout)
        output: Output = self.denoiser(
            **shot.inputs(tokens, scale_gradient(latents, gate)), self_condition=self_condition
        )
        sigma = self.config.decoder_noise if self.training else 0.0
        decoded = network.decode_states(latents + sigma * decoder_noise, layout)
        logits = network.token_logits(decoded if by_tokens else decoded.detach(), layout)
        output.loss_sums["tokens"] = objectives.masked_sum(objectives.token_losses(logits, tokens), real)[0]
        if not by_tokens:
            output.loss_sums["hidden"] = objectives.masked_sum(objectives.squared_error(decoded, states), real)[0]
        hits, count = (logits.detach().argmax(dim=-1) == tokens) & real, real.sum().double()
        output.metrics |= {"accuracy": (hits.sum().double(), count), **latent_health(latents.detach(), real)}
        output.metrics["latent_rank"] = (latent_rank(latents.detach(), real), torch.ones_like(count))
        output.metrics["gate"] = (gate.double(), torch.ones_like(count))
        if not self.training:
            output.metrics |= self._accuracy_at_noise(tokens, latents, shot, decoder_noise)
        return output

    @torch.no_grad()
    def _accuracy_at_noise(
        self, tokens: Tensor, latents: Tensor, shot: OneShot, noise: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        layout, real, found = shot.layout.separated(), shot.layout.real, {}
        for sigma in NOISE_LEVELS:
            decoded = self.autoencoder.decode_states(latents + sigma * noise, layout)
            hits = (self.autoencoder.token_logits(decoded, layout).argmax(dim=-1) == tokens) & real
            found[f"accuracy_at_{sigma:.1f}"] = (hits.sum().double(), real.sum().double())
        return found


class LDLMRecipe(Recipe):
    """Prepares rows for LDLM: hidden states, splits, timesteps, noise, the gate, all keyed by the row."""

    module: LDLMTraining

    def __init__(self, config: PretrainLDLMConfig) -> None:
        check_effects(config.ldlm.network, config.ldlm.flow, config.ldlm.sampling, "ldlm")
        self.config, self.seed, self.flow = config.ldlm, config.seed, config.ldlm.flow
        self.language_model = Path(config.ldlm.language_model)
        tokenizer = load_tokenizer(self.language_model)
        self.tokenizer_fingerprint = tokenizer.fingerprint()
        self.built_on = {"ldlm.language_model": weights_hash(self.language_model)}
        self.reads_states = bool(config.data.states())
        self.eos_id = tokenizer.eos_id
        check_rows(self.flow, config.data, "ldlm.flow")
        self.teacher: Teacher | None = None
        if self.reads_states:
            check_states(config.data.states()[0], config.ldlm)  # the other sources' are of the same model
            self.statistics = TeacherStatistics.load(config.data.states()[0])
        else:
            self.teacher = load_teacher(
                str(self.language_model),
                config.ldlm.layer,
                "cpu",
                tokenizer_fingerprint=self.tokenizer_fingerprint,
                max_tokens=config.data.max_tokens,
            )
        self._initialise(config, tokenizer.vocab_size)

    @torch.no_grad()
    def _initialise(self, config: PretrainLDLMConfig, vocab_size: int) -> None:
        """The module with its first weights, and with the means and deviations of the first rows."""
        stream = TokenStream(config.data, seed=self.seed, rows_per_step=config.training.rows_per_step)
        rows = slice(0, max(1, STATISTICS_TOKENS // config.data.row_tokens))
        batch = only_extracted(stream.batch(stream.plan(0), rows))
        layout = Layout.of(batch.segment, batch.position)
        states = batch.hidden
        if self.teacher is not None:
            causal = self.teacher.is_causal(longest_window(batch))
            states = states_of_rows(self.teacher, batch.tokens, layout, causal)
            real = states[layout.real].double()
            self.statistics = TeacherStatistics(real.mean(dim=0).float(), real.std(dim=0).float(), causal)
        assert states is not None
        if not bool(layout.real.any()):
            raise ConfigError(f"none of the first {batch.tokens.numel()} tokens has an extracted state: extract more")
        self.module = make_module(config.ldlm, states.shape[-1], vocab_size)
        initialise(
            self.module, lambda name, p: torch.randn(p.shape, generator=rng.generator(self.seed, f"init/{name}"))
        )
        autoencoder = self.module.autoencoder
        autoencoder.hidden_mean.copy_(self.statistics.mean)
        autoencoder.hidden_std.copy_(self.statistics.std.clamp(min=1e-6))
        autoencoder.measure(autoencoder.standardise(states), layout)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        if self.teacher is not None:
            move_frozen(self.teacher.model, device, dtype)

    def loss_weights(self, step: int) -> dict[str, float]:
        weights = {name: self.config.flow_weight * weight for name, weight in self.flow.loss_weights(step).items()}
        weights["tokens"] = self.config.token_weight
        return weights | ({"hidden": self.config.hidden_weight} if self.config.decoder_loss == "mse" else {})

    def end_of_step(self, step: int, applied: bool) -> None:
        if self.module.denoiser.timesteps is not None:
            self.module.denoiser.timesteps.end_of_step(step, applied)

    def warnings(self, figures: Mapping[str, float]) -> list[str]:
        channels = self.config.autoencoder.latent_channels
        narrow = figures["active_units"] < channels / 2 or figures["latent_rank"] < 2.0
        if narrow or figures["latent_variance"] < LEAST_VARIANCE:
            return [
                f"the latents collapse: {figures['active_units']:.0f} of {channels} channels vary, in "
                f"{figures['latent_rank']:.1f} directions, by a variance of {figures['latent_variance']:.2f} of 1"
            ]
        return []

    @torch.no_grad()
    def prepare(self, batch: TokenBatch, *, step: int, purpose: str = "train") -> Prepared:
        draw, channels = RowDraws(self.seed, purpose, batch.row_index), self.config.autoencoder.latent_channels
        batch = only_extracted(batch)
        if purpose == "train":
            batch = cut_segments(self.flow, batch, draw)
        batch, added = pad_with_ends(self.flow, batch, draw, self.eos_id)
        timesteps = self.module.denoiser.timesteps if purpose == "train" else None
        shot = one_shot(self.flow, batch, draw, channels, timesteps, added)
        states = batch.hidden
        if self.teacher is not None:
            states = states_of_rows(self.teacher, batch.tokens, shot.layout, self.statistics.causal)
        assert states is not None
        inputs: dict[str, Any] = {
            "tokens": batch.tokens,
            "states": self.module.autoencoder.standardise(states),
            "shot": shot,
            "decoder_noise": draw.normal("decoder_noise", (batch.tokens.shape[1], channels), batch.tokens.device),
            "gate": torch.full((), encoder_gate(step, self.config.encoder_warmup_steps), device=batch.tokens.device),
            "self_condition": feeds_back(self.flow, self.seed, step, purpose),
        }
        real = shot.layout.real.sum().double()
        counts = self.flow.loss_counts((shot.layout.real & shot.target).sum().double()) | {"tokens": real}
        return Prepared(inputs, counts | ({"hidden": real} if self.config.decoder_loss == "mse" else {}))

    @torch.no_grad()
    def finish(self, batches: list[TokenBatch]) -> dict[str, float]:
        """The flow's bar in every timestep bin (`best_without_input`)."""
        prepared, latents = [], []
        for batch in batches:
            inputs = self.prepare(batch, step=0, purpose="validation").inputs
            found = self.module.autoencoder.encode_states(inputs["states"], inputs["shot"].layout)
            prepared.append(inputs["shot"].inputs(batch.tokens, found))
            latents.append(found[inputs["shot"].layout.real])
        variance = torch.cat(latents).var(dim=0)
        tokens = torch.cat([batch.tokens[batch.segment >= 0] for batch in batches])
        vocab_size = self.module.autoencoder.vocab_size
        bars = best_without_input(self.module.denoiser, prepared, tokens, vocab_size, variance.mean().item())
        return {"latent_variance": variance.mean().item(), "latent_variance_least": variance.min().item(), **bars}

    def preview(self, seed: int) -> list[str]:
        from megatext.generation.text_generator import TextGenerator

        tokenizer = load_tokenizer(self.language_model)
        generator = TextGenerator(self.module.denoiser, self._autoencoder, tokenizer, self.config.sampling)
        generator.flow = found_timesteps(self.flow, dict(self.module.named_buffers()), "denoiser.")
        return generator.preview(seed)

    @property
    def _autoencoder(self) -> HiddenAutoencoder:
        layer, causal, tokenizer = self.config.layer, self.statistics.causal, str(self.tokenizer_fingerprint)
        return HiddenAutoencoder(self.module.autoencoder, self.language_model, layer, causal, tokenizer)

    def export(self, state_dict: dict[str, Tensor], output: Path) -> None:
        weights = {k.removeprefix("autoencoder."): v for k, v in state_dict.items() if k.startswith("autoencoder.")}
        described = HiddenAutoencoderConfig(self.config.autoencoder, self.config.layer, self.statistics.causal)
        write_hidden_autoencoder(output / "vae", described, weights, language_model=self.language_model)
        config = TextDiTRecipeConfig(
            network=self.config.network,
            flow=found_timesteps(self.flow, state_dict, "denoiser."),
            sampling=self.config.sampling,
        )
        weights = stored_weights(state_dict, "denoiser.network.", config.network)
        write_model(output, "text_dit", config, weights, tokenizer=self.language_model, vae=output / "vae")


def only_extracted(batch: TokenBatch) -> TokenBatch:
    """The batch in which what was not extracted is as if it were not there."""
    if batch.hidden_valid is None:
        return batch
    return replace(batch, segment=batch.segment.masked_fill(~batch.hidden_valid, PADDING))


def longest_window(batch: TokenBatch) -> np.ndarray:
    """The tokens of a batch's longest segment. Raises ConfigError where that is too short to tell causality by."""
    segments = [(row, i) for row in range(len(batch.segment)) for i in batch.segment[row].unique() if i != PADDING]
    windows = [batch.tokens[row][batch.segment[row] == i] for row, i in segments]
    longest = max(windows, key=len)
    if len(longest) < MIN_TOKENS:
        raise ConfigError(f"the longest text of the first rows has {len(longest)} tokens, fewer than {MIN_TOKENS}")
    return longest.numpy()


def check_states(place: str, config: LDLMRecipeConfig) -> None:
    """Raise ConfigError unless extracted states are of the recipe's model and layer and may be used as it does."""
    manifest = read_states_manifest(local_folder(place))
    if manifest["teacher_fingerprint"] != fingerprint(config.language_model):
        raise ConfigError(
            f"{place}: states of another model than ldlm.language_model {config.language_model}; extract them with "
            f"--model {config.language_model}"
        )
    if manifest["layer"] != config.layer:
        raise ConfigError(f"{place}: states of layer {manifest['layer']}, but ldlm.layer is {config.layer}")
    if not manifest["causal"] and config.flow.unconditional_probability < 1:
        raise ConfigError(
            f"{place}: the states of a model that is not causal know what follows, so a context's would tell of the "
            "target; set ldlm.flow.unconditional_probability: 1, or leave data.hidden_states out"
        )
    if config.flow.infill_probability > 0:
        raise ConfigError(
            f"{place}: ldlm.flow.infill_probability with extracted states, in which a context after its target has "
            "seen it; leave data.hidden_states out"
        )


def make_module(config: LDLMRecipeConfig, hidden_channels: int, vocab_size: int) -> LDLMTraining:
    """The module of the recipe. Raises ConfigError where the options do not fit together."""
    if config.flow.block_tokens:
        raise ConfigError("ldlm.flow.block_tokens must be 0: LDLM writes in one shot, its latents know what follows")
    if config.flow.target_encoding != "separate":
        raise ConfigError("ldlm.flow.target_encoding: LDLM's encoder always has the context in view, its decoder never")
    autoencoder = LatentAutoencoder(config.autoencoder, hidden_channels, vocab_size)
    return LDLMTraining(autoencoder, make_denoiser(config.network, config.flow, autoencoder), config)


def build(config: PretrainLDLMConfig) -> LDLMRecipe:
    return LDLMRecipe(config)


def needed(config: PretrainLDLMConfig) -> list[str]:
    states = [place for place in config.data.states() if not is_remote(place)]
    return [*config.data.folders(), config.ldlm.language_model, *states]


def make(config: PretrainLDLMConfig, vocab_size: int) -> LDLMTraining:
    return make_module(config.ldlm, _language_model_config(config.ldlm).hidden_size, vocab_size)


def _language_model_config(config: LDLMRecipeConfig) -> Any:
    """Of the language model, or where it is not there yet of GPT-2 small."""
    from transformers import AutoConfig, GPT2Config

    found = AutoConfig.from_pretrained(config.language_model) if Path(config.language_model).is_dir() else GPT2Config()
    return found.get_text_config()


def passes(config: PretrainLDLMConfig, module: LDLMTraining, vocab_size: int) -> list[Pass]:
    from transformers import AutoModel

    columns, channels = config.data.row_tokens, config.ldlm.autoencoder.latent_channels
    tokens, noise = torch.zeros(1, columns, dtype=torch.long), torch.zeros(1, columns, channels)
    states = torch.zeros(1, columns, len(module.autoencoder.hidden_mean))
    shot = OneShot.of_zeros(columns, channels)

    def run(self_condition: bool) -> Output:
        return module(tokens, states, shot, noise, torch.ones(()), self_condition)

    twice = config.ldlm.flow.self_conditioning_probability
    found = [Pass(lambda: run(False), 1 - twice), *([Pass(lambda: run(True), twice)] if twice else [])]
    if not config.data.states():
        model = AutoModel.from_config(_language_model_config(config.ldlm))
        found.append(Pass(lambda: model(input_ids=tokens), trained=False))
    return found
