"""TextVAE: reconstruction, KL with warm-up, REPA alignment to a frozen language model, noise-robust decoding."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megatext import rng
from megatext.config import ConfigError
from megatext.data.hidden_states import read_states_manifest
from megatext.data.packing import TokenBatch
from megatext.data.remote import is_remote, local_folder
from megatext.data.shards import TOKENIZER_FOLDER, read_manifest
from megatext.flow import objectives
from megatext.nn.blocks import initialise
from megatext.nn.layout import Layout
from megatext.nn.text_vae import TextVAE, TextVAEConfig
from megatext.recipes.base import Output, Pass, Prepared, Recipe
from megatext.recipes.draws import RowDraws
from megatext.recipes.pretrained import write_vae
from megatext.tokenizer import load_tokenizer
from megatext.training.run_config import RunConfig

NOISE_LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Noise levels of the reconstruction curve: latents (1 - s) z + s eps, standardised."""

NOISE_BINS = 10
"""Decode accuracy is logged in this many equal bins of the decoder's noise level."""


@dataclass(frozen=True)
class TextVAERecipeConfig:
    """A TextVAE and its losses (TextLDM sections 3.1 and A)."""

    network: TextVAEConfig = field(default_factory=TextVAEConfig)
    """The autoencoder."""
    kl_weight: float = 1e-3
    """Weight of the KL to a standard normal, summed over channels, a token."""
    kl_warmup_steps: int = 0
    """Linear warm-up of the KL's weight."""
    repa_weight: float = 0.0
    """Weight of REPA's cosine alignment; needs `data.hidden_states`."""
    repa_projector: Literal["linear", "mlp"] = "linear"
    """From the encoder's features to the teacher's width."""
    decoder_noise: float = 0.0
    """Decoder inputs become (1 - s) z + s eps with s uniform in [0, decoder_noise] a segment."""
    latent_dropout: float = 0.0
    """Share of the channels of what the decoder reads that are zero, without rescaling the others (AURORA-LM)."""
    token_dropout: float = 0.0
    """Share of the tokens whose embedding the encoder sees as zero (AURORA-LM)."""
    truncation: float = 0.0
    """Share of segments cut at a random length in training (TextLDM's random truncation)."""
    mask_weight: float = 0.0
    """Weight of the cross-entropy of tokens that the encoder did not see (Cola DLM, Eq. 2.2.1: BERT's masking, which
    keeps the decoder from copying); needs `network.mask_token`. It doubles the work of a step."""
    mask_probability: float = 0.15
    """Share of a row's tokens that are hidden for it."""


@dataclass(frozen=True, kw_only=True)
class PretrainVAEConfig(RunConfig):
    """launch/pretrain_vae.py"""

    vae: TextVAERecipeConfig
    """The system."""


class TextVAETraining(nn.Module):
    """The autoencoder and REPA's projector with their losses: the one module the engine wraps."""

    def __init__(self, network: TextVAE, config: TextVAERecipeConfig, teacher_width: int) -> None:
        super().__init__()
        self.network, self.decoder_noise = network, config.decoder_noise
        if not (0 <= config.latent_dropout < 1 and 0 <= config.token_dropout < 1):
            raise ConfigError("vae.latent_dropout and vae.token_dropout must be at least 0 and below 1")
        if config.mask_weight > 0 and not network.config.mask_token:
            raise ConfigError("mask_weight > 0 needs vae.network.mask_token: true")
        self.projector: nn.Module | None = None
        if config.repa_weight > 0:
            width = network.config.encoder.width
            hidden = nn.Linear(width, width), nn.SiLU()
            last = nn.Linear(width, teacher_width)
            self.projector = nn.Sequential(*hidden, last) if config.repa_projector == "mlp" else last

    def forward(
        self,
        tokens: Tensor,
        layout: Layout,
        posterior_noise: Tensor,
        decoder_noise: Tensor,
        noise_level: Tensor,
        teacher: Tensor | None,
        teacher_mask: Tensor | None,
        hidden: "HiddenTokens | None" = None,
        dropped_tokens: Tensor | None = None,
        dropped_channels: Tensor | None = None,
    ) -> Output:
        """`tokens` int64 and `noise_level` float32 `[rows, columns]`, both noises `[rows, columns, channels]`,
        `teacher` standardised states `[rows, columns, teacher width]` and where they are valid; `hidden` the tokens of
        the masking loss; `dropped_tokens` `[rows, columns]` and `dropped_channels` `[rows, columns, channels]` bool."""
        mean, log_variance, features = self.network.encode(tokens, layout, hidden=dropped_tokens)
        latents = self.network.sample(mean, log_variance, posterior_noise)
        level = noise_level[..., None]
        read = (1 - level) * latents + level * decoder_noise
        logits = self.network.decode(
            read if dropped_channels is None else read.masked_fill(dropped_channels, 0.0), layout
        )
        cross_entropy = objectives.token_losses(logits, tokens)
        kl = objectives.gaussian_kl(mean, log_variance)
        real = layout.real
        correct = (logits.detach().argmax(dim=-1) == tokens) & real
        count = real.sum().double()
        output = Output(
            {"reconstruction": (cross_entropy * real).sum(), "kl": (kl * real).sum()},
            {"accuracy": (correct.sum().double(), count), **latent_health(mean.detach(), real)},
        )
        if hidden is not None:
            output.loss_sums["mask"] = hidden.loss_sum(self.network, tokens, layout, posterior_noise)
        if self.decoder_noise > 0:
            hits, tried = objectives.by_timestep_bin(correct.float(), noise_level, real, NOISE_BINS)
            output.metrics |= {f"accuracy_s{i}": (hits[i], tried[i]) for i in range(NOISE_BINS)}
        if self.projector is not None and teacher is not None and teacher_mask is not None:
            projected = self.projector(features).float()
            cosine = torch.nn.functional.cosine_similarity(projected, teacher, dim=-1)
            output.loss_sums["repa"] = ((1 - cosine) * teacher_mask).sum()
            output.metrics["repa_cosine"] = (
                (cosine.detach() * teacher_mask).sum().double(),
                teacher_mask.sum().double(),
            )
        return output


@dataclass
class HiddenTokens:
    """Tokens that the encoder does not see and the decoder has to guess (BERT's masking, arXiv 1810.04805)."""

    at: Tensor
    """int64 `[rows, n]`: their columns."""
    counted: Tensor
    """bool `[rows, n]`: which of them are; a row of fewer real tokens hides fewer."""

    @staticmethod
    def draw(draw: RowDraws, real: Tensor, probability: float) -> "HiddenTokens":
        """A share of the `real [rows, columns]` tokens of every row. n is the same for every row, so that nothing
        waits for the device to count."""
        columns = real.shape[1]
        u = draw.per_group("mask", columns, torch.arange(columns, device=real.device).expand_as(real))
        if not 0 < probability < 1:
            raise ConfigError(f"mask_probability must lie between 0 and 1, got {probability}")
        n = max(1, round(probability * columns))
        at = u.masked_fill(~real, 2.0).argsort(dim=1)[:, :n]
        wanted = (probability * real.sum(dim=1)).round().clamp(max=n)
        return HiddenTokens(at, torch.arange(n, device=real.device) < wanted[:, None])

    def loss_sum(self, vae: TextVAE, tokens: Tensor, layout: Layout, posterior_noise: Tensor) -> Tensor:
        """Summed cross-entropy of the hidden tokens, decoded from a posterior sample of what is left."""
        wanted = tokens.gather(1, self.at)
        shown = tokens.scatter(1, self.at, torch.where(self.counted, vae.vocab_size, wanted))
        mean, log_variance, _ = vae.encode(shown, layout)
        logits = vae.decode(vae.sample(mean, log_variance, posterior_noise), layout, self.at)
        return (objectives.token_losses(logits, wanted) * self.counted).sum()


def latent_health(mean: Tensor, real: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What tells a collapsing latent space, of posterior means `[rows, columns, channels]` where `real`.

    `latent_variance` of a channel over the tokens and `latent_mean_abs`, both averaged over channels, and the variance
    of the channel that varies least; `active_units`, the channels whose mean varies by more than 0.01 (Burda et al.,
    arXiv 1509.00519, section 5.1).
    """
    one = torch.ones((), dtype=torch.float64, device=mean.device)
    weight = real.double()[..., None]
    count = weight.sum().clamp(min=1.0)
    centre = (mean * weight).sum(dim=(0, 1)) / count
    variance = ((mean - centre).square() * weight).sum(dim=(0, 1)) / count
    return {
        "latent_variance": (variance.mean(), one),
        "latent_variance_least": (variance.min(), one),
        "latent_mean_abs": (centre.abs().mean(), one),
        "active_units": ((variance > 0.01).double().sum(), one),
    }


class TextVAERecipe(Recipe):
    """Rows of tokens in, tokens out, through latents of fixed scale."""

    module: TextVAETraining

    def __init__(self, config: PretrainVAEConfig) -> None:
        self.config, self.seed = config.vae, config.seed
        self.shards = local_folder(config.data.shards)
        read_manifest(self.shards)  # a clear error where there are no shards
        tokenizer = load_tokenizer(self.shards / TOKENIZER_FOLDER)
        self.tokenizer_fingerprint = tokenizer.fingerprint()
        self.teacher = teacher_of(config)
        self.reads_states = self.teacher is not None
        self.module = make(config, tokenizer.vocab_size)
        initialise(
            self.module, lambda name, p: torch.randn(p.shape, generator=rng.generator(self.seed, f"init/{name}"))
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        if self.teacher is not None:
            self.teacher = self.teacher.to(device)

    def loss_weights(self, step: int) -> dict[str, float]:
        warm = min(1.0, (step + 1) / self.config.kl_warmup_steps) if self.config.kl_warmup_steps else 1.0
        weights = {"reconstruction": 1.0, "kl": self.config.kl_weight * warm}
        weights |= {"mask": self.config.mask_weight} if self.config.mask_weight > 0 else {}
        return weights | ({"repa": self.config.repa_weight} if self.teacher else {})

    @torch.no_grad()
    def prepare(self, batch: TokenBatch, *, step: int, purpose: str = "train") -> Prepared:
        draw = RowDraws(self.seed, purpose, batch.row_index)
        rows, columns = batch.tokens.shape
        segment = batch.segment
        if purpose == "train" and self.config.truncation > 0:
            same = (segment[:, :, None] == segment[:, None, :]).sum(dim=-1)
            u = draw.per_group("truncation", columns, segment) / self.config.truncation
            segment = torch.where((u < 1) & (batch.position > u * same), -1, segment)
        layout = self.module.network.layout(segment, batch.position)
        shape = (columns, self.config.network.latent_channels)
        device = batch.tokens.device
        inputs: dict[str, Any] = {
            "tokens": batch.tokens,
            "layout": layout,
            "posterior_noise": draw.normal("posterior", shape, device),
            "decoder_noise": draw.normal("decoder_noise", shape, device),
            "noise_level": draw.per_group("noise_level", columns, batch.segment) * self.config.decoder_noise,
            "teacher": None,
            "teacher_mask": None,
        }
        if purpose == "train" and self.config.token_dropout > 0:
            places = torch.arange(columns, device=device).expand_as(segment)
            inputs["dropped_tokens"] = draw.per_group("token_dropout", columns, places) < self.config.token_dropout
        if purpose == "train" and self.config.latent_dropout > 0:
            threshold = NormalDist().inv_cdf(self.config.latent_dropout)
            inputs["dropped_channels"] = draw.normal("latent_dropout", shape, device) < threshold
        counts = {"reconstruction": layout.real.sum().double(), "kl": layout.real.sum().double()}
        if self.config.mask_weight > 0:
            inputs["hidden"] = HiddenTokens.draw(draw, layout.real, self.config.mask_probability)
            counts["mask"] = inputs["hidden"].counted.sum().double()
        if self.teacher is not None:
            assert batch.hidden is not None and batch.hidden_valid is not None  # there are states, or no teacher
            inputs["teacher"] = self.teacher.standardise(batch.hidden)
            inputs["teacher_mask"] = batch.hidden_valid & layout.real
            counts["repa"] = inputs["teacher_mask"].sum().double()
        return Prepared(inputs, counts)

    @torch.no_grad()
    def finish(self, batches: list[TokenBatch]) -> dict[str, float]:
        """Measure the latents' mean and deviation a channel, then reconstruction clean and against noise."""
        network = self.module.network.eval()
        network.latent_mean.zero_()
        network.latent_std.fill_(1.0)
        layouts = [network.layout(b.segment, b.position) for b in batches]
        means = [network.encode(b.tokens, layout)[0] for b, layout in zip(batches, layouts, strict=True)]
        every = torch.cat([m[layout.real] for m, layout in zip(means, layouts, strict=True)]).double()
        if self.config.network.standardised:
            network.latent_mean.copy_(every.mean(dim=0))
            network.latent_std.copy_(every.std(dim=0).clamp(min=1e-6))
        report = {
            "latent_mean_abs": every.mean(dim=0).abs().mean().item(),
            "latent_std": every.std(dim=0).mean().item(),
        }
        for level in NOISE_LEVELS:
            correct = total = 0
            for batch, layout, mean in zip(batches, layouts, means, strict=True):
                noise = RowDraws(self.seed, "finish", batch.row_index).normal(
                    "noise", tuple(mean.shape[1:]), mean.device
                )
                noisy = (1 - level) * network.standardise(mean) + level * noise
                hit = network.decode(network.unstandardise(noisy), layout).argmax(dim=-1) == batch.tokens
                correct += int((hit & layout.real).sum())
                total += int(layout.real.sum())
            report[f"accuracy_at_{level:.1f}"] = correct / total
        return report

    def export(self, state_dict: dict[str, Tensor], output: Path) -> None:
        weights = {k.removeprefix("network."): v for k, v in state_dict.items() if k.startswith("network.")}
        write_vae(output, self.config.network, weights, tokenizer=self.shards / TOKENIZER_FOLDER)


@dataclass(frozen=True)
class TeacherStatistics:
    """Mean and deviation of the teacher's states a channel: a few channels hold most of the energy, and without
    standardisation the cosine of two random states is already high."""

    mean: Tensor
    std: Tensor
    causal: bool
    """Whether states depend on nothing that follows."""

    @staticmethod
    def load(directory: str) -> "TeacherStatistics":
        """Read them from the manifest of a directory of teacher states."""
        manifest = read_states_manifest(local_folder(directory))
        split = manifest["splits"].get("train")
        if split is None or "mean" not in split:
            raise ConfigError(
                f"{directory} has no states of the train split; extract them with "
                "`python -m data_tools.extract_hidden_states ... --split train`"
            )
        return TeacherStatistics(torch.tensor(split["mean"]), torch.tensor(split["std"]), manifest["causal"])

    def standardise(self, states: Tensor) -> Tensor:
        """float32, same shape."""
        return (states.float() - self.mean) / self.std

    def to(self, device: torch.device) -> "TeacherStatistics":
        """The same on `device`."""
        return replace(self, mean=self.mean.to(device), std=self.std.to(device))


def build(config: PretrainVAEConfig) -> TextVAERecipe:
    return TextVAERecipe(config)


def teacher_of(config: PretrainVAEConfig) -> TeacherStatistics | None:
    """Of the first source that has teacher states; None where REPA is off. Raises ConfigError where states are missing,
    or where truncation would make them those of other windows."""
    if config.vae.repa_weight == 0:
        return None
    states = config.data.states()
    if not states:
        raise ConfigError(
            "vae.repa_weight > 0 needs data.hidden_states: extract them with "
            "`python -m data_tools.extract_hidden_states`, or set vae.repa_weight: 0"
        )
    teacher = TeacherStatistics.load(states[0])
    if config.vae.truncation > 0 and not teacher.causal:
        raise ConfigError(
            f"vae.truncation > 0 with {states[0]}: its teacher is not causal, so its states of a cut window are not "
            "those stored; set vae.truncation: 0"
        )
    return teacher


def needed(config: PretrainVAEConfig) -> list[str]:
    states = config.data.states() if config.vae.repa_weight > 0 else []
    return config.data.folders() + [place for place in states if not is_remote(place)]


def make(config: PretrainVAEConfig, vocab_size: int) -> TextVAETraining:
    """The projector has the width of the teacher's states; where they are not there yet, that of Qwen3-1.7B's."""
    absent = [place for place in config.data.states() if not is_remote(place) and not Path(place).is_dir()]
    teacher = None if absent else teacher_of(config)
    width = teacher.mean.numel() if teacher else 2048
    return TextVAETraining(TextVAE(config.vae.network, vocab_size), config.vae, width)


def passes(config: PretrainVAEConfig, module: TextVAETraining, vocab_size: int) -> list[Pass]:
    tokens = torch.zeros(1, config.data.row_tokens, dtype=torch.long)
    layout = Layout.of(tokens, tokens)
    noise = torch.zeros(*tokens.shape, config.vae.network.latent_channels)
    last = [m for m in module.projector.modules() if isinstance(m, nn.Linear)][-1] if module.projector else None
    teacher = torch.zeros(*tokens.shape, last.out_features) if last else None
    hidden = None
    if config.vae.mask_weight > 0:
        at = tokens[:, : max(1, round(config.vae.mask_probability * config.data.row_tokens))]
        hidden = HiddenTokens(at, at == 0)
    return [Pass(lambda: module(tokens, layout, noise, noise, tokens.float(), teacher, tokens == 0, hidden))]
