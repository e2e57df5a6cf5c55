"""Windows into rows of a fixed number of tokens, and the batch that every recipe receives."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class TokenBatch:
    """Some rows of a step, each holding one or more whole windows one after another, then padding."""

    tokens: Tensor
    """int64 `[rows, row_tokens]`; padding is 0."""
    segment: Tensor
    """int64 `[rows, row_tokens]`: 0, 1, ... for the row's windows, -1 on padding."""
    position: Tensor
    """int64 `[rows, row_tokens]`: position inside the segment; padding is 0."""
    row_index: Tensor
    """int64 `[rows]`: the global index of the row's first sample. Key of all randomness of the row: it depends
    neither on the number of ranks nor on the micro-batch size, and no two rows of a run share it."""
    documents: Sequence[list[str]]
    """The keys of each row's documents, for error messages."""
    hidden: Tensor | None = None
    """Teacher states `[rows, row_tokens, width]`, bfloat16, zero where not valid; None without teacher shards."""
    hidden_valid: Tensor | None = None
    """bool `[rows, row_tokens]`: where `hidden` holds a teacher state."""

    def to(self, device: torch.device | str) -> "TokenBatch":
        """The same batch on `device`; `row_index` stays on the CPU, where random draws are made from it."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and name != "row_index"
        }
        return replace(self, **moved)

    def pinned(self) -> "TokenBatch":
        """The same batch in memory that a GPU reads from without making the host wait."""
        pinned: dict[str, Any] = {name: v.pin_memory() for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **pinned)


def best_fit_decreasing(lengths: np.ndarray, rows: int, row_tokens: int) -> np.ndarray | None:
    """The row of each window (int64, like `lengths`), or None where the windows do not fit into `rows` rows.

    Longest first, each window goes to the fullest row that still has room for it. Ties go to the earlier window.
    """
    order = np.argsort(-lengths, kind="stable")
    whole = int(np.searchsorted(-lengths[order], -row_tokens, side="right"))  # these fill a row each
    if whole > rows:
        return None
    placed = np.empty(len(lengths), np.int64)
    placed[order[:whole]] = np.arange(whole)
    # free tokens * rows + row, ascending: one number instead of a pair
    free = [row_tokens * rows + row for row in range(whole, rows)]
    found = []
    for needed in (lengths[order[whole:]] * rows).tolist():
        slot = bisect_left(free, needed)
        if slot == len(free):
            return None
        room = free.pop(slot)
        found.append(room % rows)
        if room - needed >= rows:
            insort(free, room - needed)
    placed[order[whole:]] = found
    return placed


def pack_prefix(lengths: np.ndarray, rows: int, row_tokens: int) -> tuple[int, np.ndarray]:
    """How many of the next windows one step takes, and the row of each (int64, rows numbered by first window).

    The longest prefix that best-fit-decreasing packs into `rows` rows: from the sum of lengths as the upper bound
    down in doubling steps, then by bisection, since nearly all that fits by sum also packs. A pure function of the
    lengths, which must reach beyond what fits (or be all there is) and be at most `row_tokens` each.
    """
    trial = int(np.searchsorted(np.cumsum(lengths), rows * row_tokens, side="right"))
    high, down = trial + 1, 1  # `high` does not pack
    while (packed := best_fit_decreasing(lengths[:trial], rows, row_tokens)) is None:
        high, trial, down = trial, max(0, trial - down), 2 * down
    count = trial
    while high - count > 1:
        trial = (count + high) // 2
        attempt = best_fit_decreasing(lengths[:trial], rows, row_tokens)
        if attempt is None:
            high = trial
        else:
            count, packed = trial, attempt
    _, first = np.unique(packed, return_index=True)
    renumber = np.full(rows, -1, np.int64)
    renumber[packed[np.sort(first)]] = np.arange(len(first))
    return count, renumber[packed]
