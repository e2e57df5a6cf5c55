"""TextVAE: one token -> one latent -> one token (TextLDM section 3.1; Cola DLM's VAE with a causal rule)."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from megatext.nn.attention import make_mask
from megatext.nn.blocks import Trunk, TrunkConfig, make_norm
from megatext.nn.layout import Layout


@dataclass(frozen=True)
class TextVAEConfig:
    """Architecture of a text autoencoder."""

    latent_channels: int = 64
    """Channels of the latent of one token."""
    encoder: TrunkConfig = field(default_factory=TrunkConfig)
    """Encoder trunk. With `layers: 0` the latent of a token depends on that token alone (token-local)."""
    decoder: TrunkConfig = field(default_factory=TrunkConfig)
    """Decoder trunk; sees latents only, predicts all tokens in parallel."""
    attention: Literal["full", "causal", "block_causal"] = "full"
    """Who sees whom inside a segment, in encoder and decoder."""
    block_tokens: int = 0
    """Block size of the block_causal rule."""
    latent_norm: Literal["none", "layer"] = "layer"
    """`layer` fixes the scale of the posterior mean (LayerNorm over channels, no parameters): noise added to it
    cannot be escaped by scaling up."""
    initial_log_variance: float = -4.0
    """Bias of the posterior's log-variance at initialisation."""


class TextVAE(nn.Module):
    """Encoder, diagonal Gaussian posterior, parallel decoder, and the latents' per-channel statistics.

    `latent_mean` and `latent_std` (float32 `[channels]`) are measured on real tokens after training. Diffusion
    models see standardised latents only: `standardise(z) = (z - latent_mean) / latent_std`.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: TextVAEConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        channels = config.latent_channels
        self.embedding = nn.Embedding(vocab_size, config.encoder.width)
        self.encoder = Trunk(config.encoder)
        self.posterior = nn.Linear(config.encoder.width, 2 * channels)
        self.mean_norm = (
            make_norm(config.encoder, channels, affine=False) if config.latent_norm == "layer" else nn.Identity()
        )
        self.latent_in = nn.Linear(channels, config.decoder.width)
        self.decoder = Trunk(config.decoder)
        self.unembedding = nn.Linear(config.decoder.width, vocab_size, bias=False)
        self.register_buffer("latent_mean", torch.zeros(channels, dtype=torch.float32))
        self.register_buffer("latent_std", torch.ones(channels, dtype=torch.float32))

    @property
    def token_local(self) -> bool:
        """A token's latent depends on that token alone."""
        return self.config.encoder.layers == 0

    def encode(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """tokens int64 `[rows, tokens]` -> posterior mean and log-variance, float32 `[rows, tokens, channels]`, and
        the encoder's features `[rows, tokens, width]` (REPA aligns them with a teacher)."""
        mask = make_mask(self.config.attention, layout) if self.config.encoder.layers else None
        features, _ = self.encoder(self.embedding(tokens), layout.position, mask)
        mean, log_variance = self.posterior(features).float().chunk(2, dim=-1)
        log_variance = (log_variance + self.config.initial_log_variance).clamp(-12.0, 4.0)
        return self.mean_norm(mean), log_variance, features

    def decode(self, latents: Tensor, layout: Layout) -> Tensor:
        """Raw (not standardised) latents `[rows, tokens, channels]` -> logits `[rows, tokens, vocab_size]`."""
        mask = make_mask(self.config.attention, layout) if self.config.decoder.layers else None
        hidden = self.latent_in(latents.to(self.latent_in.weight.dtype))
        return self.unembedding(self.decoder(hidden, layout.position, mask)[0])

    def standardise(self, latents: Tensor) -> Tensor:
        return (latents - self.latent_mean) / self.latent_std

    def unstandardise(self, latents: Tensor) -> Tensor:
        return latents * self.latent_std + self.latent_mean

    @torch.no_grad()
    def token_table(self) -> Tensor:
        """float32 `[vocab_size, channels]`: the standardised latent of every token of a token-local encoder."""
        if not self.token_local:
            raise ValueError("a contextual encoder has no latent per token of the vocabulary")
        every = torch.arange(self.vocab_size, device=self.latent_mean.device)[None]
        layout = Layout.of(torch.zeros_like(every), torch.zeros_like(every))
        return self.standardise(self.encode(every, layout)[0])[0]
