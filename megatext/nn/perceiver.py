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

    latent_channels: int = 256
    """Channels of the latent of one token."""
    encoder: TrunkConfig = field(default_factory=TrunkConfig)
    """Perceiver from hidden states to latents."""
    decoder: TrunkConfig = field(default_factory=TrunkConfig)
    """Perceiver from latents back to hidden states."""
    token_decoder: TrunkConfig = field(default_factory=TrunkConfig)
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


class LatentAutoencoder(nn.Module):
    """Hidden states -> latents of fixed scale -> hidden states -> tokens.

    `hidden_mean` and `hidden_std` (float32 `[hidden_channels]`) bring the language model's states to one scale: in
    GPT-2 a few channels hold most of the energy. All states that enter and leave here are standardised by them.
    `initial_mean` and `initial_std` (float32 `[latent_channels]`) are those of the untrained encoder's outputs and stay
    (as ActNorm's start, Glow, arXiv 1807.03039): what all tokens share would take most of the scale at first."""

    hidden_mean: Tensor
    hidden_std: Tensor
    initial_mean: Tensor
    initial_std: Tensor
    token_local = False

    def __init__(self, config: LatentAutoencoderConfig, hidden_channels: int, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.encoder = Perceiver(config.encoder, hidden_channels, config.latent_channels)
        self.scale = make_norm(config.encoder, config.latent_channels, affine=False)
        self.decoder = Perceiver(config.decoder, config.latent_channels, hidden_channels)
        self.token_in = nn.Linear(hidden_channels, config.token_decoder.width)
        self.token_decoder = Trunk(config.token_decoder)
        self.unembedding = nn.Linear(config.token_decoder.width, vocab_size)
        for name, channels in (("hidden", hidden_channels), ("initial", config.latent_channels)):
            self.register_buffer(f"{name}_mean", torch.zeros(channels, dtype=torch.float32))
            self.register_buffer(f"{name}_std", torch.ones(channels, dtype=torch.float32))

    def standardise(self, states: Tensor) -> Tensor:
        """A language model's states `[..., hidden_channels]`, float32, on the scale of all that follows."""
        return (states.float() - self.hidden_mean) / self.hidden_std

    @torch.no_grad()
    def measure(self, states: Tensor, layout: Layout) -> None:
        """Set `initial_mean` and `initial_std` on standardised states `[rows, tokens, hidden_channels]`."""
        outputs = self.encoder(states, layout).float()[layout.real]
        self.initial_mean.copy_(outputs.mean(dim=0))
        self.initial_std.copy_(outputs.std(dim=0).clamp(min=1e-6))

    def encode_states(self, states: Tensor, layout: Layout) -> Tensor:
        """Latents, float32 `[rows, tokens, latent_channels]` and each of mean square 1, of standardised states: noise
        that is added to them cannot be escaped by growing."""
        return self.scale((self.encoder(states, layout).float() - self.initial_mean) / self.initial_std)

    def decode_states(self, latents: Tensor, layout: Layout) -> Tensor:
        """Standardised states, float32 `[rows, tokens, hidden_channels]`."""
        return self.decoder(latents, layout).float()

    def token_logits(self, states: Tensor, layout: Layout) -> Tensor:
        """Logits `[rows, tokens, vocab_size]` of decoded states."""
        x = self.token_in(states.to(self.token_in.weight.dtype))
        return self.unembedding(self.token_decoder(x, layout.position, make_mask("prefix", layout))[0])
