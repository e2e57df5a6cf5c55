"""TextDiT: a transformer over clean and noisy latents in one packed row (TextLDM section 3.2, Cola DLM)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatext.config import ConfigError
from megatext.nn.attention import KeysValues, Mask
from megatext.nn.blocks import TimestepEmbedding, Trunk, TrunkConfig


@dataclass(frozen=True)
class TextDiTConfig:
    """Architecture of the denoiser."""

    trunk: TrunkConfig = field(default_factory=TrunkConfig)
    """The transformer."""
    time_conditioning: Literal["none", "adaln"] = "adaln"
    """`none` is TextLDM as published (no timestep enters the network), `adaln` is DiT's adaLN-zero."""
    timestep_layers: int = 2
    """Layers of the MLP that embeds the timestep (Cola DLM: 3)."""
    final_modulation: bool = False
    """The timestep also shifts and scales what the last norm gives (adaLN's final layer; Cola DLM)."""
    output: Literal["latent", "tokens"] = "latent"
    """`latent` predicts a velocity or x0; `tokens` ends in logits, whose expected latent is x0 (CDCD)."""
    self_conditioning: bool = False
    """Feed the previous x0 estimate back in (Analog Bits, arXiv 2208.04202)."""
    token_embedding: bool = False
    """Clean tokens enter by a learned embedding instead of their latents, tied to the token head, and a noisy token
    whose left neighbour is clean is told that neighbour: frozen latents say which token it is, not what it means.
    Needs output: tokens."""
    unit_input: bool = True
    """What enters the first block has variance 1 a channel at initialisation. False: 1 / width, as in language models,
    which warm_start needs."""
    role_embedding: bool = True
    """A learned vector that tells target from context; without it only the timestep does."""
    null_embedding: bool = False
    """A learned vector on tokens that see no context: the null condition of guidance, and of passages from nothing."""


class TextDiT(nn.Module):
    """Latents at per-token noise levels in, x0 / velocity / token logits out.

    Knows no noise schedule: what the timestep means is the caller's affair; t = 0 marks clean tokens."""

    def __init__(self, config: TextDiTConfig, latent_channels: int, vocab_size: int) -> None:
        super().__init__()
        self.config, self.latent_channels = config, latent_channels
        width = config.trunk.width
        self.latent_in = nn.Linear(latent_channels * (2 if config.self_conditioning else 1), width)
        self.role = nn.Embedding(2, width) if config.role_embedding else None
        self.null = nn.Embedding(1, width) if config.null_embedding else None
        conditioned = config.time_conditioning == "adaln"
        self.timestep = TimestepEmbedding(width, config.timestep_layers) if conditioned else None
        if config.final_modulation and not conditioned:
            raise ConfigError("network.final_modulation needs network.time_conditioning: adaln")
        self.modulation = nn.Linear(width, 2 * width) if config.final_modulation else None
        self.trunk = Trunk(config.trunk, conditioned)
        self.token_embedding: nn.Embedding | None = None
        if config.token_embedding:
            if config.output != "tokens":
                raise ConfigError("network.token_embedding is tied to the token head: it needs output: tokens")
            self.token_embedding = nn.Embedding(vocab_size, width)
            self.neighbour_embedding = nn.Embedding(vocab_size, width)
            self.head = nn.Linear(width, vocab_size, bias=False)
            self.head.weight = self.token_embedding.weight
        else:
            self.head = nn.Linear(width, vocab_size if config.output == "tokens" else latent_channels)

    def modulations(self, timesteps: Tensor) -> list[Tensor]:
        """Shifts, scales and gates of every block, and of the output, for `timesteps [distinct]`; [] where no timestep
        enters. A sampler works them out once for its whole grid: at a block of few tokens they are a third of a
        pass."""
        if self.timestep is None:
            return []
        embedding = self.timestep(timesteps)
        tables = [block.modulate(embedding) for block in self.trunk.blocks]  # type: ignore[operator]
        return tables if self.modulation is None else [*tables, self.modulation(F.silu(embedding))]

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor | list[Tensor],
        timestep_index: Tensor,
        position: Tensor,
        target: Tensor,
        mask: Mask,
        *,
        self_condition: Tensor | None = None,
        alone: Tensor | None = None,
        tokens: Tensor | None = None,
        neighbours: Tensor | None = None,
        past: Sequence[KeysValues] | None = None,
        history: int = 0,
    ) -> tuple[Tensor, list[KeysValues]]:
        """latents `[rows, columns, channels]`; `timesteps [distinct]` float32, or what `modulations` gave for them, and
        `timestep_index [rows, columns]` into it; `position [rows, columns]`; `target` bool `[rows, columns]` (to be
        generated); `alone` bool `[rows, columns]` (sees no context); `tokens` int64 `[rows, known]`, those of the first
        columns where they are known; `neighbours` int64 `[rows, columns]` the tokens to the left, -1 where not clean;
        `past` keys and values of tokens before these; nothing is predicted of the first `history` columns. Returns the
        prediction `[rows, columns - history, channels or vocab_size]` and the columns' own keys and values."""
        if self.config.self_conditioning:
            # context has no estimate: its latents are known
            previous = torch.zeros_like(latents) if self_condition is None else self_condition * target[..., None]
            latents = torch.cat((latents, previous), dim=-1)
        scale = self.config.trunk.width**0.5 if self.config.unit_input else 1.0  # of an embedding
        parts, known = [], 0
        if self.token_embedding is not None and tokens is not None:
            parts, known = [self.token_embedding(tokens) * scale], tokens.shape[1]
        if known < latents.shape[1]:
            x = self.latent_in(latents[:, known:].to(self.latent_in.weight.dtype))
            parts.append(x if self.config.unit_input else x * self.config.trunk.width**-0.5)
        x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if self.token_embedding is not None and neighbours is not None:
            left = self.neighbour_embedding(neighbours.clamp(min=0)) * scale
            x = x + left.masked_fill((neighbours < 0)[..., None], 0.0)
        if self.role is not None:
            x = x + self.role(target.long())
        if self.null is not None and alone is not None:
            x = x + self.null(torch.zeros_like(position)) * alone[..., None]
        tables = timesteps if isinstance(timesteps, list) else self.modulations(timesteps)
        condition = (tables, timestep_index) if tables else None
        nothing = history == x.shape[1]
        x, kept = self.trunk(x, position, mask, condition, past, only_keys_values=nothing)
        x = x[:, history:]
        if self.modulation is not None and not nothing:
            shift, scale = F.embedding(timestep_index[:, history:], tables[-1]).chunk(2, dim=-1)
            x = x * (1 + scale) + shift
        return (x if nothing else self.head(x)), kept
