"""The denoiser in training: its losses, and what it has to stay below. TextDiT, Cola DLM and LDLM share it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatext import rng
from megatext.config import ConfigError
from megatext.flow import objectives
from megatext.flow.paths import Path as NoisePath
from megatext.flow.paths import path_from_name
from megatext.flow.solvers import euler_step
from megatext.flow.timesteps import AdaptiveTimesteps, TimestepConfig
from megatext.nn.attention import KeysValues, Mask
from megatext.nn.dit import TextDiT, TextDiTConfig
from megatext.nn.layout import CONTEXT, Layout
from megatext.nn.perceiver import LatentAutoencoder
from megatext.nn.text_vae import TextVAE, TextVAEConfig
from megatext.recipes.base import Output
from megatext.recipes.flow_config import FlowConfig
from megatext.recipes.sampling import SamplingConfig, check_sampling

TIMESTEP_BINS = 10
"""Loss is logged in this many equal bins of the timestep."""


Decoder = Callable[[Tensor, Layout], Tensor]
"""Standardised latents `[rows, columns, channels]` and their layout -> logits `[rows, columns, vocab_size]`."""


@dataclass
class History:
    """The clean copy of two-stream training: tokens, latents `[rows, columns, channels]`, layout, block-causal mask."""

    tokens: Tensor
    latents: Tensor
    layout: Layout
    mask: Mask


class TextDiTTraining(nn.Module):
    """The denoiser with its loss: the one module the engine wraps."""

    def __init__(
        self,
        network: TextDiT,
        flow: FlowConfig,
        path: NoisePath,
        table: Tensor | None,
        decoder: Decoder | None = None,
    ) -> None:
        """`table`: the latents of all tokens, where the network ends in tokens. `decoder`: of the frozen VAE, where the
        tokens' cross-entropy goes through it."""
        super().__init__()
        self.network, self.flow, self.path, self.table, self.decoder = network, flow, path, table, decoder
        self.timesteps = AdaptiveTimesteps(flow.adaptive_timesteps) if flow.adaptive_timesteps.bins else None

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
        alone: Tensor | None = None,
        earlier_timesteps: Tensor | None = None,
        history: History | None = None,
        neighbours: Tensor | None = None,
    ) -> Output:
        """`latents` (clean) and `noise` float32 `[rows, columns, channels]`; `tokens`, `timestep_index`, `layout`,
        `loss_mask`, `alone` and `neighbours` `[rows, columns]`; `earlier_timesteps`, like `timesteps`, a step nearer to
        the data; `history` the clean copy that two-stream training attends to."""
        t = timesteps[timestep_index]
        noisy = self.path.interpolate(latents, noise, t)
        past = None if history is None else self._past(history, timesteps)
        target = layout.role != CONTEXT

        def predict(z: Tensor, times: Tensor, previous: Tensor | None) -> Tensor:
            return self.network(
                z,
                times,
                timestep_index,
                layout.position,
                target,
                mask,
                self_condition=previous,
                alone=alone,
                neighbours=neighbours,
                past=past,
            )[0].float()

        previous = None
        clean = (timestep_index == 0)[..., None]  # a sampler feeds these back as they are given
        if self_condition:
            with torch.no_grad():
                estimate = self.x0(noisy, t, predict(noisy, timesteps, None))
                previous = torch.where(clean, latents, estimate)
        predicted = predict(noisy, timesteps, previous)
        per_token = self._own_loss(predicted, noisy, latents, noise, tokens, t)
        if self.timesteps is not None and self.training:
            self.timesteps.observe(per_token, t, loss_mask)
        output = _summed(per_token, t, loss_mask)
        if self.flow.other_weight > 0:
            other = self._other_loss(self.x0(noisy, t, predicted), noisy, latents, tokens, layout, t)
            output.loss_sums[self.flow.other_loss] = objectives.masked_sum(other, loss_mask)[0]
        if self.flow.consistency.weight > 0:
            assert earlier_timesteps is not None
            x0, earlier = self.x0(noisy, t, predicted), earlier_timesteps[timestep_index]
            fed_back = torch.where(clean, latents, x0.detach()) if self_condition else None
            predict_earlier = partial(predict, times=earlier_timesteps, previous=fed_back)
            off = self._inconsistency(x0, noisy, latents, t, earlier, predict_earlier)
            output.loss_sums["consistency"] = objectives.masked_sum(off, loss_mask)[0]
        return output

    def _past(self, history: History, timesteps: Tensor) -> Sequence[KeysValues]:
        """Keys and values of the clean copy, with gradient: it runs once, whatever is denoised beside it."""
        _, past = self.network(
            history.latents,
            timesteps[:1],
            torch.zeros_like(history.layout.position),
            history.layout.position,
            torch.zeros_like(history.layout.real),
            history.mask,
            tokens=history.tokens,
            history=history.tokens.shape[1],
        )
        return past

    def _inconsistency(
        self,
        x0: Tensor,
        noisy: Tensor,
        latents: Tensor,
        t: Tensor,
        earlier: Tensor,
        predict: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """float32 `[rows, columns]`: squared error of estimated clean latents against what is estimated, without
        gradient, an Euler step nearer to the data: from t to `earlier`; where that is 0 against the data themselves."""
        with torch.no_grad():
            nearer = euler_step(self.path, noisy, x0, t, earlier)
            goal = torch.where((earlier > 0)[..., None], self.x0(nearer, earlier, predict(nearer)), latents)
        return objectives.squared_error(x0, goal)

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

    def _own_loss(
        self, predicted: Tensor, noisy: Tensor, latents: Tensor, noise: Tensor, tokens: Tensor, t: Tensor
    ) -> Tensor:
        """float32 `[rows, columns]`: nats of a token, or squared error averaged over channels."""
        if self.flow.objective == "token_cross_entropy":
            return objectives.token_losses(self.logits(predicted, noisy, t), tokens)
        if self.flow.objective != self.flow.latent_space:
            return objectives.converted_error(
                self.path, self.x0(noisy, t, predicted), latents, t, self.flow.latent_space
            )
        goal = self.path.velocity(latents, noise, t) if self.flow.objective == "velocity" else latents
        return objectives.squared_error(predicted, goal)

    def constant_error(self, t: Tensor, latent_variance: float) -> Tensor:
        """Shape of t: the expected own loss of the best constant prediction of latents (not of tokens)."""
        predicted, space = self.flow.objective, self.flow.latent_space
        assert predicted != "token_cross_entropy"
        error = objectives.constant_predictor_error(self.path, t, predicted, latent_variance)
        if predicted == space:
            return error
        as_x0 = error if predicted == "x0" else error * (self.path.sigma(t) / self.path.wronskian(t)).square()
        return objectives.in_space(self.path, as_x0, t, space)

    def _other_loss(
        self, x0: Tensor, noisy: Tensor, latents: Tensor, tokens: Tensor, layout: Layout, t: Tensor
    ) -> Tensor:
        """float32 `[rows, columns]`: what `FlowConfig.other_weight` is of, for estimated clean latents."""
        if self.flow.objective == "token_cross_entropy":
            return objectives.converted_error(self.path, x0, latents, t, self.flow.latent_space)
        assert self.decoder is not None
        whole = torch.where((layout.role == CONTEXT)[..., None], latents, x0)
        together = self.flow.target_encoding == "with_context"
        return objectives.token_losses(self.decoder(whole, layout if together else layout.separated()), tokens)


def _summed(per_token: Tensor, t: Tensor, loss_mask: Tensor) -> Output:
    """The flow's loss, float32 `[rows, columns]`, summed, and its sums by bins of the timestep."""
    sums, counts = objectives.by_timestep_bin(per_token.detach(), t, loss_mask, TIMESTEP_BINS)
    metrics = {f"loss_t{i}": (sums[i], counts[i]) for i in range(TIMESTEP_BINS)}
    return Output({"flow": objectives.masked_sum(per_token, loss_mask)[0]}, metrics)


def make_denoiser(
    network: TextDiTConfig, flow: FlowConfig, vae: TextVAE | LatentAutoencoder, *, frozen: bool = False
) -> TextDiTTraining:
    """The module of a recipe, for training and for generation. `frozen`: the VAE stays as it is, so that losses may go
    through its decoder. Raises ConfigError where the options do not fit together."""
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
    if isinstance(vae.config, TextVAEConfig):
        check_block_sizes(flow, vae.config)
    if flow.block_tokens and flow.adaptive_timesteps.bins:
        raise ConfigError("flow.adaptive_timesteps is for one-shot training: set its bins, or block_tokens, to 0")
    if network.token_embedding and not flow.block_tokens:
        raise ConfigError("network.token_embedding is for the clean history of flow.block_tokens > 0")
    if flow.token_likelihood and not tokens_out:
        raise ConfigError("flow.token_likelihood adds to token logits: it needs objective token_cross_entropy")
    if flow.self_conditioning_probability > 0 and not network.self_conditioning:
        raise ConfigError("flow.self_conditioning_probability > 0 needs network.self_conditioning: true")
    check_one_shot(flow, vae)
    table = vae.token_table() if tokens_out and isinstance(vae, TextVAE) else None
    decoder = None
    if flow.other_weight > 0 and not tokens_out:
        if not (frozen and isinstance(vae, TextVAE)):
            raise ConfigError("flow.token_weight needs a frozen TextVAE: it is for launch/pretrain_dit.py")
        decoder = frozen_decoder(vae)
    dit = TextDiT(network, vae.config.latent_channels, vae.vocab_size)
    return TextDiTTraining(dit, flow, path_from_name(flow.path), table, decoder)


def frozen_decoder(vae: TextVAE) -> Decoder:
    """Its decoder, no part of the module that is trained."""
    return lambda latents, layout: vae.decode(vae.unstandardise(latents), layout)


def check_one_shot(flow: FlowConfig, vae: TextVAE | LatentAutoencoder) -> None:
    """Raise ConfigError where blocks, or a VAE, leave no place for what is asked for."""
    asked = {
        "infill_probability": flow.infill_probability > 0,
        "attention prefix": flow.attention == "prefix",
        "target_encoding with_context": flow.target_encoding == "with_context",
        "eos_padding_tokens": flow.eos_padding_tokens > 0,
        "token_weight through the decoder": flow.objective != "token_cross_entropy" and flow.other_weight > 0,
    }
    if flow.block_tokens and any(asked.values()):
        names = ", ".join(name for name, there in asked.items() if there)
        raise ConfigError(f"flow.{names}: only in one shot (flow.block_tokens: 0)")
    if flow.target_encoding == "with_context" and vae.config.attention != "full":
        raise ConfigError("flow.target_encoding with_context needs a VAE whose attention is full")


def check_effects(network: TextDiTConfig, flow: FlowConfig, sampling: SamplingConfig, where: str) -> None:
    """Raise ConfigError, naming the field below `where`, where a training would be asked for what has no effect on it,
    or its model for texts that it cannot write. An export that was trained so is not asked: it writes as it did."""
    check_sampling(sampling, flow, f"{where}.sampling.")
    usual = FlowConfig()
    of_blocks = ("noise_copies", "posterior", "timestep_per", "partial_block_probability")
    of_one_shot = ("unconditional_probability", "context_fraction")
    if flow.block_tokens and flow.null_condition == "zeros":
        raise ConfigError(f"{where}.flow.null_condition zeros: only in one shot (flow.block_tokens: 0); set it to drop")
    for name in of_one_shot if flow.block_tokens else of_blocks:
        if getattr(flow, name) not in (getattr(usual, name), 0.0):
            place = "in one shot (flow.block_tokens: 0)" if flow.block_tokens else "in blocks (flow.block_tokens > 0)"
            raise ConfigError(f"{where}.flow.{name}: only {place}; leave it out, or set it to {getattr(usual, name)}")
    if sampling.history == "latents" and not flow.block_tokens:
        raise ConfigError(f"{where}.sampling.history latents: only in blocks (flow.block_tokens > 0); set it to tokens")
    if flow.segment_lengths == "windows" and flow.min_segment_tokens != usual.min_segment_tokens:
        raise ConfigError(f"{where}.flow.min_segment_tokens: windows are not cut; set flow.segment_lengths")
    if network.self_conditioning and not flow.self_conditioning_probability:
        raise ConfigError(
            f"{where}.network.self_conditioning: true needs {where}.flow.self_conditioning_probability above 0"
        )


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


def found_timesteps(flow: FlowConfig, state_dict: dict[str, Tensor], prefix: str) -> FlowConfig:
    """The process as an export describes it: with the distribution of timesteps that training has found, if it has
    sought one. `prefix` is the denoiser's."""
    if not flow.adaptive_timesteps.bins:
        return flow
    probabilities = tuple(state_dict[f"{prefix}timesteps.probabilities"].tolist())
    return replace(flow, timesteps=TimestepConfig(distribution="bins", probabilities=probabilities))


def feeds_back(flow: FlowConfig, seed: int, step: int, purpose: str) -> bool:
    """Whether a first pass of a step provides the self-condition: one coin a step, so that all ranks run as many
    forward passes. Validation is always the same."""
    coin = rng.uniform(seed, "self_condition", [step])[0] if purpose == "train" else 0.0
    return bool(coin < flow.self_conditioning_probability)


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
            errors = [module.constant_error(t, latent_variance)]
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
