"""What every token of a packed row is, as integers, and which tokens may attend to which.

A row holds several documents; a network sees them apart through integers per token. An attention rule is a
predicate on the integers of two tokens, so one definition serves the dense reference mask, FlexAttention's
block mask and the tests.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

AttentionRule = Literal["full", "prefix", "causal", "block_causal", "two_stream"]

CONTEXT = 0
"""Role of clean tokens that are given: the context of a continuation, the clean copy of two-stream training."""
TARGET = 1
"""Role of tokens to be generated. In two streams noisy copy r has role TARGET + r (r = 0, 1, ...)."""
PADDING = -1
"""Segment of padding."""


@dataclass(frozen=True)
class Layout:
    """Four integer tensors `[rows, tokens]`: `segment` (document in the row, -1 is padding), `position` (in the
    segment, for RoPE), `role` (CONTEXT or TARGET + copy) and `block` (position // block_tokens, or 0)."""

    segment: Tensor
    position: Tensor
    role: Tensor
    block: Tensor

    @staticmethod
    def of(segment: Tensor, position: Tensor, role: Tensor | None = None, block_tokens: Tensor | int = 0) -> "Layout":
        """Layout of packed rows; `role` defaults to CONTEXT, `block_tokens` (one size, or one a token) 0 puts a segment
        in one block."""
        one_block = isinstance(block_tokens, int) and block_tokens == 0
        block = torch.zeros_like(position) if one_block else position // block_tokens
        return Layout(segment, position, torch.full_like(segment, CONTEXT) if role is None else role, block)

    @property
    def real(self) -> Tensor:
        """bool `[rows, tokens]`: not padding."""
        return self.segment != PADDING

    def with_role(self, role: int) -> "Layout":
        return replace(self, role=torch.full_like(self.role, role))

    def separated(self) -> "Layout":
        """Context and target of a segment as two segments, so that under any rule neither sees the other: what
        TextLDM calls encoding them separately. Positions stay, RoPE is relative."""
        return replace(self, segment=torch.where(self.real, 2 * self.segment + self.role, self.segment))

    @staticmethod
    def concatenate(layouts: "list[Layout]") -> "Layout":
        """Layouts side by side along the token axis, as the rows of two-stream training are."""
        fields = ((x.segment, x.position, x.role, x.block) for x in layouts)
        return Layout(*(torch.cat(parts, dim=1) for parts in zip(*fields, strict=True)))


Integers = tuple[Tensor, Tensor, Tensor, Tensor]
"""(segment, position, role, block) of the query or of the key, broadcastable against each other."""


def _full(q: Integers, k: Integers) -> Tensor:
    return q[0] == k[0]


def _prefix(q: Integers, k: Integers) -> Tensor:
    return (q[0] == k[0]) & ((q[2] != CONTEXT) | (k[2] == CONTEXT))


def _causal(q: Integers, k: Integers) -> Tensor:
    return (q[0] == k[0]) & (k[1] <= q[1])


def _block_causal(q: Integers, k: Integers) -> Tensor:
    return (q[0] == k[0]) & (k[3] <= q[3])


def _two_stream(q: Integers, k: Integers) -> Tensor:
    key_clean, query_clean = k[2] == CONTEXT, q[2] == CONTEXT
    history = key_clean & torch.where(query_clean, k[3] <= q[3], k[3] < q[3])
    own_block = (k[2] == q[2]) & ~key_clean & (k[3] == q[3])
    return (q[0] == k[0]) & (history | own_block)


RULES: dict[str, Callable[[Integers, Integers], Tensor]] = {
    "full": _full,
    "prefix": _prefix,
    "causal": _causal,
    "block_causal": _block_causal,
    "two_stream": _two_stream,
}


def allowed(rule: AttentionRule, query: Layout, key: Layout) -> Tensor:
    """bool `[rows, queries, keys]`: the rule, densely. Padding queries see padding keys of their row, so that no
    softmax is over nothing; nobody reads what they compute."""
    q = (query.segment[:, :, None], query.position[:, :, None], query.role[:, :, None], query.block[:, :, None])
    k = (key.segment[:, None, :], key.position[:, None, :], key.role[:, None, :], key.block[:, None, :])
    return RULES[rule](q, k) | ((q[0] == PADDING) & (k[0] == PADDING))
