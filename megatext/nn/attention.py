"""From a rule and two layouts to attention: dense mask, FlexAttention block mask, or no mask at all."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatext.nn.layout import PADDING, RULES, AttentionRule, Layout, allowed

Backend = Literal["auto", "dense", "flex"]
KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one block, each `[rows, heads, tokens, head width]`."""


@dataclass(frozen=True)
class Mask:
    """Who sees whom, built once for a forward pass and shared by all blocks.

    `dense` is bool `[rows, 1, queries, keys]`, `block` FlexAttention's BlockMask; both None means everybody sees
    everybody (one whole segment a row)."""

    dense: Tensor | None = None
    block: Any = None


def make_mask(rule: AttentionRule, query: Layout, key: Layout | None = None, *, backend: Backend = "auto") -> Mask:
    """The mask of a rule. `auto` is FlexAttention on CUDA (skips empty tiles; needs rows of >= 128 tokens to pay)
    and the dense mask elsewhere (FlexAttention has no backward on CPU)."""
    key = query if key is None else key
    if backend == "auto":
        backend = "flex" if query.segment.is_cuda and query.segment.shape[1] >= 128 else "dense"
    if backend == "dense":
        return Mask(dense=allowed(rule, query, key)[:, None])
    from torch.nn.attention.flex_attention import create_block_mask

    def predicate(row: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        q = (query.segment[row, i], query.position[row, i], query.role[row, i], query.block[row, i])
        k = (key.segment[row, j], key.position[row, j], key.role[row, j], key.block[row, j])
        return RULES[rule](q, k) | ((q[0] == PADDING) & (k[0] == PADDING))

    rows, queries, keys = query.segment.shape[0], query.segment.shape[1], key.segment.shape[1]
    device = str(query.segment.device)
    return Mask(block=create_block_mask(predicate, rows, None, queries, keys, device=device))


_flex = None


def _flex_attention(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Tensor:
    """FlexAttention, compiled once per process: uncompiled it materialises the scores."""
    global _flex
    if _flex is None:
        from torch.nn.attention.flex_attention import flex_attention

        _flex = torch.compile(flex_attention)
    return _flex(q, k, v, block_mask=block_mask)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Softmax attention; q `[rows, heads, queries, d]`, k and v `[rows, heads, keys, d]`, any float dtype."""
    if mask.block is not None:
        return _flex_attention(q, k, v, mask.block)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense)


class KVCache:
    """Keys and values of committed clean tokens, a slot a position: `[layers][rows, heads, slots, d]`.

    Slot p of a row holds the token at position p, so rows of different lengths need no padding to the longest:
    the attention rule leaves out slots that are not yet written (their block is not before the query's)."""

    def __init__(
        self,
        layers: int,
        rows: int,
        heads: int,
        slots: int,
        head_width: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (layers, rows, heads, slots, head_width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def rows(self) -> int:
        """How many there are."""
        return self.keys.shape[1]

    def write(self, kept: list[KeysValues], rows: Tensor, position: Tensor) -> None:
        """Store keys and values, a block, of n columns of the cache's rows `rows [m]` at slots `position [m, n]`."""
        for layer, (k, v) in enumerate(kept):
            self.keys[layer][rows[:, None], :, position] = k.transpose(1, 2)
            self.values[layer][rows[:, None], :, position] = v.transpose(1, 2)

    def of(self, rows: Tensor, slots: int) -> list[KeysValues]:
        """Keys and values a block of the first `slots` slots of some rows, ascending; views where these are all."""
        keys, values = self.keys[:, :, :, :slots], self.values[:, :, :, :slots]
        if len(rows) < self.rows:
            keys, values = keys[:, rows], values[:, rows]
        return list(zip(keys, values, strict=True))
