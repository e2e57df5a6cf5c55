"""Small rows that recipes are tested on."""

import torch

from megatext.data.packing import TokenBatch


def make_batch(rows: int = 4, row_tokens: int = 24, vocab_size: int = 60, seed: int = 0) -> TokenBatch:
    """Rows of two segments and a little padding, random tokens."""
    generator = torch.Generator().manual_seed(seed)
    cut, end = row_tokens // 2, row_tokens - 3
    segment = torch.tensor([0] * cut + [1] * (end - cut) + [-1] * (row_tokens - end)).expand(rows, -1).contiguous()
    position = torch.tensor([*range(cut), *range(end - cut), *[0] * (row_tokens - end)]).expand(rows, -1).contiguous()
    tokens = torch.randint(4, vocab_size, (rows, row_tokens), generator=generator)
    return TokenBatch(tokens, segment, position, torch.arange(rows) + 100 * seed, [["d"]] * rows)
