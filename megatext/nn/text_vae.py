"""TextVAE: one token -> one latent -> one token (TextLDM section 3.1; Cola DLM's VAE with a causal rule)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from megatext.config import ConfigError
from megatext.nn.attention import KeysValues, Mask, make_mask
from megatext.nn.blocks import Trunk, TrunkConfig, make_norm
from megatext.nn.layout import AttentionRule, Layout


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
    standardised: bool = True
    """Diffusion models see latents standardised a channel. False: as they are (Cola DLM, whose latents `latent_norm`
    has brought to scale)."""
    initial_log_variance: float = -4.0
    """Bias of the posterior's log-variance at initialisation."""
    mask_token: bool = False
    """One more embedding, its id the vocabulary's size, which stands for a token that the encoder may not see."""
    output_projection: bool = False
    """A matrix between the decoder's last block and its norm (Cola DLM)."""
    unembedding_bias: bool = False
    """A bias on the logits (Cola DLM)."""


class TextVAE(nn.Module):
    """Encoder, diagonal Gaussian posterior, parallel decoder, and the latents' per-channel statistics.

    `latent_mean` and `latent_std` (float32 `[channels]`) are measured on real tokens after training. Diffusion
    models see standardised latents only: `standardise(z) = (z - latent_mean) / latent_std`.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: TextVAEConfig, vocab_size: int) -> None:
        super().__init__()
        if config.attention == "block_causal" and config.block_tokens < 1:
            raise ConfigError("vae.network.attention block_causal needs vae.network.block_tokens of at least 1")
        self.config, self.vocab_size = config, vocab_size
        channels = config.latent_channels
        self.embedding = nn.Embedding(vocab_size + config.mask_token, config.encoder.width)
        self.encoder = Trunk(config.encoder)
        self.posterior = nn.Linear(config.encoder.width, 2 * channels)
        self.mean_norm = (
            make_norm(config.encoder, channels, affine=False) if config.latent_norm == "layer" else nn.Identity()
        )
        self.latent_in = nn.Linear(channels, config.decoder.width)
        self.decoder = Trunk(replace(config.decoder, final_norm=False) if config.output_projection else config.decoder)
        self.output_projection: nn.Module | None = None
        if config.output_projection:
            width = config.decoder.width
            self.output_projection = nn.Sequential(
                nn.Linear(width, width), make_norm(config.decoder, width, affine=True)
            )
        self.unembedding = nn.Linear(config.decoder.width, vocab_size, bias=config.unembedding_bias)
        self.register_buffer("latent_mean", torch.zeros(channels, dtype=torch.float32))
        self.register_buffer("latent_std", torch.ones(channels, dtype=torch.float32))

    @property
    def token_local(self) -> bool:
        """A token's latent depends on that token alone."""
        return self.config.encoder.layers == 0

    def layout(self, segment: Tensor, position: Tensor) -> Layout:
        """The layout of packed rows as encoder and decoder read them, in blocks of their own size."""
        return Layout.of(segment, position, block_tokens=self.config.block_tokens)

    def encode(
        self, tokens: Tensor, layout: Layout, *, rule: AttentionRule | None = None, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """tokens int64 `[rows, tokens]` -> posterior mean and log-variance, float32 `[rows, tokens, channels]`, and
        the encoder's features `[rows, tokens, width]` (REPA aligns them with a teacher). `rule` instead of the
        configuration's; `hidden` bool `[rows, tokens]`: tokens whose embedding is zero."""
        mask = make_mask(rule or self.config.attention, layout) if self.config.encoder.layers else Mask()
        mean, log_variance, features, _ = self.encode_after(tokens, layout.position, mask, hidden=hidden)
        return mean, log_variance, features

    def encode_after(
        self,
        tokens: Tensor,
        position: Tensor,
        mask: Mask,
        past: Sequence[KeysValues] | None = None,
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, list[KeysValues]]:
        """As `encode`, of tokens that stand after those whose keys and values are `past`; also returns their own."""
        embedded = self.embedding(tokens)
        if hidden is not None:
            embedded = embedded.masked_fill(hidden[..., None], 0.0)
        features, kept = self.encoder(embedded, position, mask, past=past)
        mean, log_variance = self.posterior(features).float().chunk(2, dim=-1)
        log_variance = (log_variance + self.config.initial_log_variance).clamp(-30.0, 20.0)
        return self.mean_norm(mean), log_variance, features, kept

    def decode(self, latents: Tensor, layout: Layout, at: Tensor | None = None) -> Tensor:
        """Raw (not standardised) latents `[rows, tokens, channels]` -> logits `[rows, tokens, vocab_size]`; or only
        those of the columns `at`, int64 `[rows, columns]`: the vocabulary is what costs."""
        mask = make_mask(self.config.attention, layout) if self.config.decoder.layers else Mask()
        hidden, _ = self.decode_after(latents, layout.position, mask)
        if at is not None:
            hidden = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))
        return self.unembedding(hidden)

    def decode_after(
        self, latents: Tensor, position: Tensor, mask: Mask, past: Sequence[KeysValues] | None = None
    ) -> tuple[Tensor, list[KeysValues]]:
        """What `unembedding` makes logits of, `[rows, tokens, width]`, for latents that stand after those whose keys
        and values are `past`; also returns their own."""
        hidden, kept = self.decoder(self.latent_in(latents.to(self.latent_in.weight.dtype)), position, mask, past=past)
        return (hidden if self.output_projection is None else self.output_projection(hidden)), kept

    @staticmethod
    def sample(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
        """A latent of the posterior for standard normal `noise`."""
        return mean + (0.5 * log_variance).exp() * noise

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
