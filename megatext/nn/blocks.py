"""The parts every network here is built from: RoPE, QK-norm attention, MLPs, adaLN-zero, timestep embedding."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatext.config import ConfigError
from megatext.nn.attention import KeysValues, Mask, attend


@dataclass(frozen=True)
class TrunkConfig:
    """A stack of pre-norm transformer blocks."""

    layers: int = 6
    """Number of blocks."""
    width: int = 256
    """Channels of the residual stream."""
    heads: int = 4
    """Attention heads; width / heads is the head width."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over `width`."""
    mlp: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu"
    """`swiglu` has three matrices, so the same ratio costs half as much again. The tanh form of GELU is Cola DLM's; in
    bf16 on CPU the erf form is four times faster."""
    mlp_bias: bool = False
    """Biases in the MLP."""
    attention_bias: bool = False
    """A bias in attention's output projection (queries, keys and values never have one)."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm (TextLDM) or RMSNorm."""
    norm_eps: float = 1e-6
    """Added to the variance in every norm."""
    norm_placement: Literal["pre", "cola"] = "pre"
    """`pre`: x + f(norm(x)). `cola`: norm(x) + attention(x), then x + norm(mlp(x)), as in Cola DLM's released VAE."""
    final_norm: bool = True
    """A norm after the last block."""
    qk_norm: bool = True
    """Normalise queries and keys: keeps attention logits bounded in bf16."""
    qk_norm_kind: Literal["rms", "layer", "layer_all_heads"] = "rms"
    """RMSNorm of each head, LayerNorm of each head (Cola DLM's DiT), or of all heads together (its VAE)."""
    rope_theta: float = 10_000.0
    """Base of the rotary embedding."""
    rope_fraction: float = 1.0
    """Share of a head's channels, its first ones, that are rotated; the others know no position (Cola DLM: 0.75)."""
    initial_gate: float = 0.0
    """Gates of adaLN at initialisation. 0 is adaLN-zero; 1 starts as a plain pre-norm block, which short runs need:
    gates open slowly."""
    activation_checkpointing: int = 0
    """Recompute every n-th block in the backward pass; 0 keeps all activations."""

    @property
    def rope_channels(self) -> int:
        """How many channels of a head are rotated; even."""
        return 2 * round(self.rope_fraction * self.width / self.heads / 2)


def make_norm(config: TrunkConfig, width: int, affine: bool) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(width, eps=config.norm_eps, elementwise_affine=affine)
    return nn.LayerNorm(width, eps=config.norm_eps, elementwise_affine=affine)


def rope_tables(position: Tensor, channels: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 `[rows, 1, tokens, channels / 2]`, computed in full precision once a forward pass."""
    frequency = theta ** (-torch.arange(0, channels, 2, device=position.device, dtype=torch.float32) / channels)
    angle = position.float()[:, None, :, None] * frequency
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + r/2) of the first r channels of x `[rows, heads, tokens, d]` (arXiv 2104.09864); r is
    twice the width of the tables."""
    half = cos.shape[-1]
    a, b, rest = x.float().split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with RoPE and QK-norm over packed rows; reads and extends a KV cache if given."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.heads, self.head_width = config.heads, config.width // config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=config.attention_bias)
        self.norm_all_heads = config.qk_norm and config.qk_norm_kind == "layer_all_heads"
        self.q_norm, self.k_norm = self._qk_norm(config), self._qk_norm(config)

    def _qk_norm(self, config: TrunkConfig) -> nn.Module:
        if not config.qk_norm:
            return nn.Identity()
        width = config.width if self.norm_all_heads else self.head_width
        return (nn.RMSNorm if config.qk_norm_kind == "rms" else nn.LayerNorm)(width, eps=config.norm_eps)

    def _normed(self, x: Tensor, norm: nn.Module) -> Tensor:
        """`[rows, heads, tokens, head width]`, the same."""
        if not self.norm_all_heads:
            return norm(x)
        return norm(x.transpose(1, 2).flatten(2)).unflatten(2, (self.heads, self.head_width)).transpose(1, 2)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, past: KeysValues | None = None, mix: bool = True
    ) -> tuple[Tensor, KeysValues]:
        """x `[rows, tokens, width]` -> (output, own keys and values); `past` ones stand before the row's own. Without
        `mix` only the keys and values are worked out and x is returned as it came."""
        rows, tokens, width = x.shape
        q, k, v = self.qkv(x).view(rows, tokens, 3, self.heads, self.head_width).permute(2, 0, 3, 1, 4)
        k = apply_rope(self._normed(k, self.k_norm), *rope)
        if not mix:
            return x, (k, v)
        q = apply_rope(self._normed(q, self.q_norm), *rope)
        keys, values = (k, v) if past is None else (torch.cat((past[0], k), 2), torch.cat((past[1], v), 2))
        mixed = attend(q, keys, values, mask).transpose(1, 2).reshape(rows, tokens, width)
        return self.out(mixed), (k, v)


class MLP(nn.Module):
    """width -> ratio * width -> width, GELU or SwiGLU."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        hidden = int(config.mlp_ratio * config.width)
        self.gated = config.mlp == "swiglu"
        self.approximate = "tanh" if config.mlp == "gelu_tanh" else "none"
        self.up = nn.Linear(config.width, hidden * (2 if self.gated else 1), bias=config.mlp_bias)
        self.down = nn.Linear(hidden, config.width, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, value = self.up(x).chunk(2, dim=-1)
            return self.down(F.silu(gate) * value)
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


class Block(nn.Module):
    """Attention and MLP; with `conditioned` the (pre-)norms are modulated by adaLN-zero (DiT, arXiv 2212.09748)."""

    def __init__(self, config: TrunkConfig, conditioned: bool = False) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, config.width, affine=not conditioned)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config, config.width, affine=not conditioned)
        self.mlp = MLP(config)
        self.modulation = nn.Linear(config.width, 6 * config.width) if conditioned else None
        self.initial_gate, self.norm_placement = config.initial_gate, config.norm_placement

    def modulate(self, embedding: Tensor) -> Tensor:
        """Shifts, scales and gates `[distinct, 6 width]` of timesteps embedded as `[distinct, width]`."""
        assert self.modulation is not None
        return self.modulation(F.silu(embedding))

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Mask,
        condition: tuple[Tensor, Tensor] | None = None,
        past: KeysValues | None = None,
        mix: bool = True,
    ) -> tuple[Tensor, KeysValues]:
        """`condition` is (what `modulate` gave, index `[rows, tokens]` into it): modulation is computed once for each
        distinct timestep and gathered, not once a token. Returns x and the block's keys and values; without `mix` only
        these are worked out and x means nothing."""
        if self.norm_placement == "cola":
            mixed, own = self.attention(x, rope, mask, past, mix)
            if not mix:
                return x, own
            x = self.attention_norm(x) + mixed
            return x + self.mlp_norm(self.mlp(x)), own
        if self.modulation is None:
            mixed, own = self.attention(self.attention_norm(x), rope, mask, past, mix)
            if not mix:
                return x, own
            x = x + mixed
            return x + self.mlp(self.mlp_norm(x)), own
        assert condition is not None
        table, index = condition
        # an embedding look-up: its backward is several times faster than that of indexing, on CPU
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = F.embedding(index, table).chunk(6, dim=-1)
        mixed, own = self.attention(self.attention_norm(x) * (1 + scale_a) + shift_a, rope, mask, past, mix)
        if not mix:
            return x, own
        x = x + gate_a * mixed
        return x + gate_m * self.mlp(self.mlp_norm(x) * (1 + scale_m) + shift_m), own


class Trunk(nn.Module):
    """A stack of blocks with a final norm."""

    def __init__(self, config: TrunkConfig, conditioned: bool = False) -> None:
        super().__init__()
        if config.width % config.heads or (config.width // config.heads) % 2:
            raise ConfigError(f"trunk.width {config.width} must be an even multiple of trunk.heads {config.heads}")
        if config.norm_placement == "cola" and conditioned:
            raise ConfigError("trunk.norm_placement cola has no place for the timestep: it is for autoencoders")
        if not 0 < config.rope_channels <= config.width // config.heads:
            raise ConfigError(
                f"trunk.rope_fraction {config.rope_fraction}: must be in (0, 1] and leave a pair to rotate"
            )
        self.config = config
        self.blocks = nn.ModuleList(Block(config, conditioned) for _ in range(config.layers))
        self.norm = make_norm(config, config.width, affine=True) if config.final_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        mask: Mask,
        condition: tuple[Sequence[Tensor], Tensor] | None = None,
        past: Sequence[KeysValues] | None = None,
        only_keys_values: bool = False,
        context: Tensor | None = None,
    ) -> tuple[Tensor, list[KeysValues]]:
        """x `[rows, tokens, width]`, `position [rows, tokens]` -> (output, keys and values a block). `condition` is
        what every block's `modulate` gave, and the index `[rows, tokens]` into it. `past` holds, a block, those of
        tokens that stand before the row's own: a KV cache, or the clean copy in training. With `only_keys_values` the
        last block stops there and the output means nothing. A `context` `[rows, tokens, width]` at the same positions
        stands before x in every block and is not changed by any: what a Perceiver reads."""
        rope = rope_tables(position, self.config.rope_channels, self.config.rope_theta)
        every = self.config.activation_checkpointing
        kept = []
        for i, block in enumerate(self.blocks):
            before = None if past is None else past[i]
            if context is not None:
                _, before = block(context, rope, mask, mix=False)
            own_condition = None if condition is None else (condition[0][i], condition[1])
            mix = not (only_keys_values and block is self.blocks[-1])
            if every and i % every == 0 and self.training and torch.is_grad_enabled():
                x, own = checkpoint(block, x, rope, mask, own_condition, before, mix, use_reentrant=False)
            else:
                x, own = block(x, rope, mask, own_condition, before, mix)
            kept.append(own)
        return (x if only_keys_values else self.norm(x)), kept


class TimestepEmbedding(nn.Module):
    """t in [0, 1] -> sinusoids of 1000 t in float32 -> MLP of two (DiT) or more layers."""

    def __init__(self, width: int, layers: int = 2, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        further = [part for _ in range(layers - 1) for part in (nn.SiLU(), nn.Linear(width, width))]
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), *further)

    def forward(self, t: Tensor) -> Tensor:
        """t `[n]` -> `[n, width]`."""
        half = self.frequencies // 2
        rate = torch.exp(-math.log(10_000.0) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
        angle = 1000.0 * t.float()[:, None] * rate
        sinusoids = torch.cat((angle.cos(), angle.sin()), dim=-1)
        return self.mlp(sinusoids.to(next(self.mlp.parameters()).dtype))


def initialise(module: nn.Module, draw: Callable[[str, Tensor], Tensor]) -> None:
    """Fill every parameter by name, so that the values do not depend on construction order or sharding.

    Matrices get a normal of standard deviation 1 / sqrt(fan in) (embeddings 1 / sqrt(width)), projections back
    into the residual stream are scaled by 1 / sqrt(2 layers), norms are 1, biases, modulations and output heads
    named `head` 0 (adaLN-zero and DiT's zero-initialised output)."""
    layers = max(1, sum(isinstance(m, Block) for m in module.modules()))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            kind = name.rsplit(".", 2)[-2] if "." in name else name
            if parameter.ndim < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            elif kind in ("modulation", "head"):
                parameter.zero_()
            else:
                scale = parameter.shape[-1] ** -0.5
                if kind in ("out", "down"):
                    scale /= math.sqrt(2 * layers)
                parameter.copy_(draw(name, parameter) * scale)
        for part in module.modules():
            if isinstance(part, Block) and part.modulation is not None:
                part.modulation.bias.view(6, -1)[[2, 5]] = part.initial_gate  # gate_a, gate_m
