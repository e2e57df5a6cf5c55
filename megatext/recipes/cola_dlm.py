"""Cola DLM, stage 2 (arXiv 2605.06548, Eq. 2.2.3): a causal TextVAE and a block-causal TextDiT trained together.

Stage 1 is the TextVAE recipe with a causal network and the masking loss. Here its result is trained on, while its
frozen copy, the reference, keeps the latents from drifting:

    vae_weight * (reconstruction + entropy_weight * E log q + mask_weight * mask)
        + flow_weight * flow + reference_weight * KL(q || reference)

The flow's data are latents of the trained encoder, with gradient; the clean history before a block has none. With
`train_vae: false` the latents are the reference's and the flow is all. What is exported is a TextDiT on its TextVAE.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megatext import rng
from megatext.config import ConfigError
from megatext.data.packing import TokenBatch
from megatext.flow import objectives
from megatext.nn.blocks import TrunkConfig, initialise
from megatext.nn.dit import TextDiTConfig
from megatext.nn.layout import Layout
from megatext.nn.text_vae import TextVAE, TextVAEConfig
from megatext.recipes.base import Output, Pass, Prepared, Recipe, move_frozen
from megatext.recipes.denoiser import (
    TextDiTTraining,
    best_without_input,
    check_effects,
    feeds_back,
    make_denoiser,
    stored_weights,
)
from megatext.recipes.draws import RowDraws
from megatext.recipes.flow_config import FlowConfig
from megatext.recipes.noisy_rows import TwoStreams, cut_segments, two_streams
from megatext.recipes.pretrained import (
    is_text_vae,
    load_text_vae,
    text_vae_config,
    weights_hash,
    write_model,
    write_vae,
)
from megatext.recipes.sampling import SamplingConfig
from megatext.recipes.text_dit import TextDiTRecipeConfig
from megatext.recipes.text_vae import HiddenTokens, latent_health
from megatext.tokenizer import load_tokenizer
from megatext.training.run_config import RunConfig


@dataclass(frozen=True)
class ColaDLMRecipeConfig:
    """A TextVAE to go on from, a denoiser, and the weights of their losses."""

    vae: str = ""
    """Directory of the TextVAE of stage 1, or of a release in Cola DLM's format: where training starts, and the frozen
    reference."""
    train_vae: bool = True
    """False: the VAE stays as it is, and only the flow is trained."""
    network: TextDiTConfig = field(default_factory=TextDiTConfig)
    """The denoiser."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    """The process; needs block_tokens > 0."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How it writes where a call does not say: in previews, `launch/generate.py`, a systems file without `sampling`."""
    vae_weight: float = 1.0
    """Of the autoencoder's terms together."""
    entropy_weight: float = 1e-3
    """Of E log q, the posterior's negative entropy, a token, within them."""
    mask_weight: float = 0.1
    """Of the cross-entropy of hidden tokens, within them; 0 saves their passes."""
    mask_probability: float = 0.15
    """Share of a row's tokens that are hidden for it."""
    flow_weight: float = 1.0
    """Of the flow's loss."""
    reference_weight: float = 0.1
    """Of the KL, a token, to the posterior of the reference; 0 saves the reference's pass."""


@dataclass(frozen=True, kw_only=True)
class PretrainColaConfig(RunConfig):
    """launch/pretrain_cola.py"""

    presumed_model: ClassVar = "the TextVAE of the release, 4 + 4 layers of 1536"
    cola: ColaDLMRecipeConfig
    """The system."""


class ColaDLMTraining(nn.Module):
    """Denoiser and, where it is trained, TextVAE with their losses: the one module the engine wraps."""

    def __init__(self, denoiser: TextDiTTraining, vae: TextVAE | None) -> None:
        super().__init__()
        self.denoiser, self.vae = denoiser, vae

    def forward(
        self,
        tokens: Tensor,
        streams: TwoStreams,
        self_condition: bool,
        latents: Tensor | None = None,
        layout: Layout | None = None,
        posterior_noise: Tensor | None = None,
        reference: tuple[Tensor, Tensor] | None = None,
        hidden: HiddenTokens | None = None,
    ) -> Output:
        """`tokens` int64 `[rows, columns]`; standardised `latents` of a frozen VAE, or what the trained one needs: its
        `layout`, `posterior_noise` `[rows, columns, channels]`, mean and log-variance of the `reference`, tokens
        `hidden` from its encoder."""
        if self.vae is None:
            assert latents is not None
            return self.denoiser(**streams.inputs(tokens, latents), self_condition=self_condition)
        assert layout is not None and posterior_noise is not None
        mean, log_variance, _ = self.vae.encode(tokens, layout)
        sample = self.vae.sample(mean, log_variance, posterior_noise)
        logits = self.vae.decode(sample, layout)
        latents = self.flow_data(self.vae, mean, sample)
        output: Output = self.denoiser(**streams.inputs(tokens, latents), self_condition=self_condition)
        real = layout.real
        output.loss_sums |= {
            "reconstruction": (objectives.token_losses(logits, tokens) * real).sum(),
            "entropy": -(objectives.gaussian_entropy(log_variance) * real).sum(),
        }
        if reference is not None:
            drift = objectives.gaussian_kl(mean, log_variance, *reference)
            output.loss_sums["reference"] = (drift * real).sum()
        if hidden is not None:
            output.loss_sums["mask"] = hidden.loss_sum(self.vae, tokens, layout, posterior_noise)
        correct = (logits.detach().argmax(dim=-1) == tokens) & real
        output.metrics |= {"accuracy": (correct.sum().double(), real.sum().double())}
        output.metrics |= latent_health(mean.detach(), real)
        return output

    def flow_data(self, vae: TextVAE, mean: Tensor, sample: Tensor) -> Tensor:
        """What the flow is trained on, standardised: the posterior's mean or a sample of it."""
        return vae.standardise(mean if self.denoiser.flow.posterior == "mean" else sample)


class ColaDLMRecipe(Recipe):
    """Prepares rows for Cola DLM: blocks, timesteps, noise, hidden tokens, the reference's posterior, all keyed by the
    row."""

    module: ColaDLMTraining

    def __init__(self, config: PretrainColaConfig) -> None:
        check_effects(config.cola.network, config.cola.flow, config.cola.sampling, "cola")
        self.config, self.seed = config.cola, config.seed
        self.vae_directory = Path(config.cola.vae)
        self.reference, self.tokenizer_fingerprint = load_text_vae(self.vae_directory)
        self.built_on = {"cola.vae": weights_hash(self.vae_directory)}
        self.module = make_module(config.cola, self.reference)
        initialise(
            self.module.denoiser,
            lambda name, p: torch.randn(p.shape, generator=rng.generator(self.seed, f"init/{name}")),
        )
        if self.module.vae is not None:
            self.module.vae.load_state_dict(self.reference.state_dict())

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        move_frozen(self.reference, device, dtype)

    def loss_weights(self, step: int) -> dict[str, float]:
        c = self.config
        weights = {name: c.flow_weight * weight for name, weight in c.flow.loss_weights(step).items()}
        if c.train_vae:
            weights |= {"reconstruction": c.vae_weight, "entropy": c.vae_weight * c.entropy_weight}
            weights |= {"mask": c.vae_weight * c.mask_weight} if c.mask_weight > 0 else {}
            weights |= {"reference": c.reference_weight} if c.reference_weight > 0 else {}
        return weights

    @torch.no_grad()
    def prepare(self, batch: TokenBatch, *, step: int, purpose: str = "train") -> Prepared:
        draw, c = RowDraws(self.seed, purpose, batch.row_index), self.config
        channels = self.reference.config.latent_channels
        if purpose == "train":
            batch = cut_segments(c.flow, batch, draw)
        streams = two_streams(c.flow, batch, draw, self.reference.config)
        inputs: dict[str, Any] = {
            "tokens": batch.tokens,
            "streams": streams,
            "self_condition": feeds_back(c.flow, self.seed, step, purpose),
        }
        counts = c.flow.loss_counts(streams.loss_mask.sum().double())
        layout = self.reference.layout(batch.segment, batch.position)
        posterior_noise = draw.normal("posterior", (batch.tokens.shape[1], channels), batch.tokens.device)
        if not c.train_vae:
            mean, log_variance, _ = self.reference.encode(batch.tokens, layout)
            sample = self.reference.sample(mean, log_variance, posterior_noise)
            inputs["latents"] = self.module.flow_data(self.reference, mean, sample)
            return Prepared(inputs, counts)
        inputs |= {"layout": layout, "posterior_noise": posterior_noise}
        real = layout.real.sum().double()
        counts |= {"reconstruction": real, "entropy": real}
        if c.reference_weight > 0:
            inputs["reference"] = self.reference.encode(batch.tokens, layout)[:2]
            counts["reference"] = real
        if c.mask_weight > 0:
            inputs["hidden"] = HiddenTokens.draw(draw, layout.real, c.mask_probability)
            counts["mask"] = inputs["hidden"].counted.sum().double()
        return Prepared(inputs, counts)

    @torch.no_grad()
    def finish(self, batches: list[TokenBatch]) -> dict[str, float]:
        """The flow's bar in every timestep bin (`best_without_input`), and how much of clean text is reconstructed."""
        vae, prepared, latents, correct = self._present_vae, [], [], 0
        for batch in batches:
            inputs = self.prepare(batch, step=0, purpose="validation").inputs
            layout, real = vae.layout(batch.segment, batch.position), batch.segment >= 0
            mean, log_variance, _ = vae.encode(batch.tokens, layout)
            found = inputs.get("latents")
            if found is None:
                found = self.module.flow_data(vae, mean, vae.sample(mean, log_variance, inputs["posterior_noise"]))
            prepared.append(inputs["streams"].inputs(batch.tokens, found))
            latents.append(found[real])
            correct += int(((vae.decode(mean, layout).argmax(dim=-1) == batch.tokens) & real).sum())
        variance = torch.cat(latents).var(dim=0).mean().item()
        tokens = torch.cat([batch.tokens[batch.segment >= 0] for batch in batches])
        bars = best_without_input(self.module.denoiser, prepared, tokens, vae.vocab_size, variance)
        return {"accuracy": correct / len(tokens), "latent_variance": variance, **bars}

    @property
    def _present_vae(self) -> TextVAE:
        return self.reference if self.module.vae is None else self.module.vae

    def preview(self, seed: int) -> list[str]:
        from megatext.generation.text_generator import TextGenerator

        tokenizer = load_tokenizer(self.vae_directory)
        generator = TextGenerator(self.module.denoiser, self._present_vae, tokenizer, self.config.sampling)
        return generator.preview(seed)

    def export(self, state_dict: dict[str, Tensor], output: Path) -> None:
        vae = self.vae_directory
        if self.module.vae is not None:
            weights = {k.removeprefix("vae."): v for k, v in state_dict.items() if k.startswith("vae.")}
            vae = output / "vae"
            write_vae(vae, self.module.vae.config, weights, tokenizer=self.vae_directory)
        c = self.config
        config = TextDiTRecipeConfig(vae=c.vae, network=c.network, flow=c.flow, sampling=c.sampling)
        weights = stored_weights(state_dict, "denoiser.network.", config.network)
        write_model(output, "text_dit", config, weights, tokenizer=self.vae_directory, vae=vae)


def make_module(config: ColaDLMRecipeConfig, vae: TextVAE) -> ColaDLMTraining:
    """The module of the recipe on a VAE like `vae`. Raises ConfigError where the options do not fit together."""
    if not config.flow.block_tokens:
        raise ConfigError("cola.flow.block_tokens must be at least 1: Cola DLM writes in blocks")
    if config.flow.objective == "token_cross_entropy":
        raise ConfigError(
            "cola.flow.objective token_cross_entropy is for the latents of a VAE that stays as it is: train it with "
            "launch/pretrain_dit.py, or set objective velocity or x0"
        )
    if not config.train_vae:
        return ColaDLMTraining(make_denoiser(config.network, config.flow, vae), None)
    if config.mask_weight > 0 and not vae.config.mask_token:
        raise ConfigError("cola.mask_weight > 0 needs a TextVAE with network.mask_token: true; or set it to 0")
    return ColaDLMTraining(make_denoiser(config.network, config.flow, vae), TextVAE(vae.config, vae.vocab_size))


def build(config: PretrainColaConfig) -> ColaDLMRecipe:
    return ColaDLMRecipe(config)


def needed(config: PretrainColaConfig) -> list[str]:
    return [*config.data.folders(), config.cola.vae]


def make(config: PretrainColaConfig, vocab_size: int) -> ColaDLMTraining:
    return make_module(config.cola, _untrained_vae(config.cola, vocab_size))


def _untrained_vae(config: ColaDLMRecipeConfig, vocab_size: int) -> TextVAE:
    """Of the VAE's sizes; where it is not there yet, of the release's."""
    trunk = TrunkConfig(layers=4, width=1536, heads=12, mlp="swiglu", mlp_ratio=2.0)
    network = TextVAEConfig(latent_channels=16, encoder=trunk, decoder=trunk, attention="causal", mask_token=True)
    return TextVAE(text_vae_config(config.vae) if is_text_vae(config.vae) else network, vocab_size)


def passes(config: PretrainColaConfig, module: ColaDLMTraining, vocab_size: int) -> list[Pass]:
    cola, columns, vae = config.cola, config.data.row_tokens, _untrained_vae(config.cola, vocab_size)
    tokens = torch.zeros(1, columns, dtype=torch.long)
    layout = Layout.of(tokens, tokens)
    streams = TwoStreams.of_zeros(cola.flow, columns, vae.config.latent_channels)
    latents = torch.zeros(1, columns, vae.config.latent_channels)
    at = tokens[:, : max(1, round(cola.mask_probability * columns))]
    hidden = HiddenTokens(at, at == 0) if cola.mask_weight > 0 else None

    def run(self_condition: bool) -> Output:
        if module.vae is None:
            return module(tokens, streams, self_condition, latents)
        return module(tokens, streams, self_condition, None, layout, latents, (latents, latents), hidden)

    twice = cola.flow.self_conditioning_probability
    found = [Pass(lambda: run(False), 1 - twice), *([Pass(lambda: run(True), twice)] if twice else [])]
    if not cola.train_vae or cola.reference_weight > 0:
        found.append(Pass(lambda: vae.encode(tokens, layout), trained=False))
    return found
