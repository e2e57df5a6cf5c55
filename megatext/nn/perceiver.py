"""LDLM's autoencoder of a frozen language model's hidden states: Perceivers, and a token decoder (arXiv 2605.07933)."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from megatext.nn.attention import make_mask
from megatext.nn.blocks import Trunk, TrunkConfig, make_norm
from megatext.nn.layout import Layout


@dataclass(frozen=True)
class LatentAutoencoderConfig:
    """Sizes of LDLM's trainable autoencoder."""

    latent_channels: int = 768
    """Channels of the latent of one token."""
    encoder: TrunkConfig = field(default_factory=lambda: TrunkConfig(layers=6, width=768, heads=12))
    """Perceiver from hidden states to latents."""
    decoder: TrunkConfig = field(default_factory=lambda: TrunkConfig(layers=6, width=768, heads=12))
    """Perceiver from latents back to hidden states."""
    token_decoder: TrunkConfig = field(default_factory=lambda: TrunkConfig(layers=3, width=768, heads=12))
    """Transformer from decoded hidden states to tokens."""
    attention: ClassVar[str] = "full"
    """Who sees whom inside a segment: everybody."""


class Perceiver(nn.Module):
    """As many outputs as inputs, each from a learned query that reads them all.

    In every block the queries attend to the inputs and to each other (Perceiver, arXiv 2103.03206; keys and values of
    both side by side as in Flamingo's resampler, arXiv 2204.14198); which input stands where they know by RoPE."""

    def __init__(self, config: TrunkConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.read = nn.Linear(in_channels, config.width)
        self.query = nn.Embedding(1, config.width)
        self.trunk = Trunk(config)
        self.write = nn.Linear(config.width, out_channels)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """x `[rows, tokens, in_channels]` -> `[rows, tokens, out_channels]`; a context sees itself alone, a target its
        whole segment."""
        mask = make_mask("prefix", layout, Layout.concatenate([layout, layout]))
        queries = self.query(torch.zeros_like(layout.position))
        read = self.read(x.to(self.read.weight.dtype))
        return self.write(self.trunk(queries, layout.position, mask, context=read)[0])


class RunningStandardisation(nn.Module):
    """Mean 0 and variance 1 a channel, by moving averages over past steps (as BatchNorm on the latents in REPA-E, arXiv
    2504.10483, but with no gradient through them): all ranks have the same, and a row does not depend on its batch."""

    sums: Tensor

    def __init__(self, channels: int, decay: float = 0.99, eps: float = 1e-5) -> None:
        super().__init__()
        self.decay, self.eps = decay, eps
        # rows: how many, their sum, the sum of their squares; decaying alike, so that the first step counts in full
        self.register_buffer("sums", torch.zeros(3, channels))
        self.pending: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """float32 `[..., channels]`, the same; unchanged before the first step."""
        count = self.sums[0].clamp(min=1.0)
        mean = self.sums[1] / count
        variance = torch.where(self.sums[0] > 0, self.sums[2] / count - mean.square(), 1.0)
        return (x - mean) * (variance + self.eps).rsqrt()

    @torch.no_grad()
    def observe(self, x: Tensor, real: Tensor) -> None:
        """Note a micro-batch's `x [rows, tokens, channels]` where `real`."""
        weight = real[..., None].float()
        found = torch.stack([y.sum(dim=(0, 1)) for y in (weight.expand_as(x), weight * x, weight * x.square())])
        self.pending = found if self.pending is None else self.pending + found

    def end_of_step(self) -> None:
        """Merge what all ranks noted. A collective."""
        found, self.pending = self.pending, None
        if found is None:
            return
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(found)
        self.sums.mul_(self.decay).add_(found)


class LatentAutoencoder(nn.Module):
    """Hidden states -> latents of fixed scale -> hidden states -> tokens.

    `hidden_mean` and `hidden_std` (float32 `[hidden_channels]`) bring the language model's states to one scale: in
    GPT-2 a few channels hold most of the energy. All states that enter and leave here are standardised by them."""

    hidden_mean: Tensor
    hidden_std: Tensor
    token_local = False

    def __init__(self, config: LatentAutoencoderConfig, hidden_channels: int, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.encoder = Perceiver(config.encoder, hidden_channels, config.latent_channels)
        self.scale = make_norm(config.encoder, config.latent_channels, affine=False)
        self.standard = RunningStandardisation(config.latent_channels)
        self.decoder = Perceiver(config.decoder, config.latent_channels, hidden_channels)
        self.token_in = nn.Linear(hidden_channels, config.token_decoder.width)
        self.token_decoder = Trunk(config.token_decoder)
        self.unembedding = nn.Linear(config.token_decoder.width, vocab_size)
        self.register_buffer("hidden_mean", torch.zeros(hidden_channels, dtype=torch.float32))
        self.register_buffer("hidden_std", torch.ones(hidden_channels, dtype=torch.float32))

    def standardise(self, states: Tensor) -> Tensor:
        """A language model's states `[..., hidden_channels]`, float32, on the scale of all that follows."""
        return (states.float() - self.hidden_mean) / self.hidden_std

    def bounded_latents(self, states: Tensor, layout: Layout) -> Tensor:
        """float32 `[rows, tokens, latent_channels]` of standardised states, each of mean square 1: noise that is added
        to them cannot be escaped by growing."""
        return self.scale(self.encoder(states, layout).float())

    def encode_states(self, states: Tensor, layout: Layout) -> Tensor:
        """Latents, float32 `[rows, tokens, latent_channels]`, of standardised states: bounded ones, each channel
        brought to variance 1, or the part that all tokens share would take most of the scale."""
        return self.standard(self.bounded_latents(states, layout))

    def decode_states(self, latents: Tensor, layout: Layout) -> Tensor:
        """Standardised states, float32 `[rows, tokens, hidden_channels]`."""
        return self.decoder(latents, layout).float()

    def token_logits(self, states: Tensor, layout: Layout) -> Tensor:
        """Logits `[rows, tokens, vocab_size]` of decoded states."""
        x = self.token_in(states.to(self.token_in.weight.dtype))
        return self.unembedding(self.token_decoder(x, layout.position, make_mask("prefix", layout))[0])
