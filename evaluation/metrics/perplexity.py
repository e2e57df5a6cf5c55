"""The judge: nats a causal language model needs for a continuation given its prefix: generative perplexity, and the
gap G."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from evaluation.hub import text_start

_MAX_BATCH_TOKENS = 8192
_MAX_LOGITS = 1 << 26


@dataclass(frozen=True)
class Nll:
    """Negative log-likelihood of one text."""

    nats: float
    """Sum over the scored tokens."""
    tokens: int
    """Scored tokens; 0 for an empty text."""
    cut: bool = False
    """The model does not read as much: tokens at the start of the prefix, or at the end of the text, were left out."""


class Judge:
    """A Hugging Face causal LM directory with its tokenizer."""

    def __init__(self, directory: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoModelForCausalLM

        from megatext.tokenizer import load_tokenizer

        self.device = device
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval().to(device)
        self.tokenizer = load_tokenizer(directory)
        config = self.model.config
        self.max_tokens: int = getattr(config, "max_position_embeddings", None) or 1 << 30
        self._start = text_start(self.tokenizer, config)

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Nll]:
        """Nll of each continuation given its prefix, both judge tokens. Equal pairs are scored once.

        A prefix is cut at its start where both do not fit. Without a prefix the first token is not scored unless the
        model has a begin-of-text token. Does not depend on how pairs are batched but for rounding.
        """
        keys = [(tuple(prefix), tuple(text)) for prefix, text in pairs]
        found: dict[tuple[tuple[int, ...], tuple[int, ...]], Nll] = {}
        cut: dict[tuple[tuple[int, ...], tuple[int, ...]], bool] = {}
        todo: list[tuple[tuple[tuple[int, ...], tuple[int, ...]], list[int], int]] = []
        for key in dict.fromkeys(keys):
            text = list(key[1][: self.max_tokens - max(1, len(self._start))])
            room = self.max_tokens - len(text) - len(self._start)
            cut[key] = len(key[0]) > max(0, room) or len(text) < len(key[1])
            context = self._start + (list(key[0][-room:]) if room > 0 else [])
            if not context and text:
                context, text = text[:1], text[1:]
            if text:
                todo.append((key, context + text, len(text)))
            else:
                found[key] = Nll(0.0, 0)
        todo.sort(key=lambda item: (len(item[1]), item[2]))
        vocabulary = self.model.config.vocab_size
        start = 0
        while start < len(todo):
            stop, keep, shortest = start, 0, self.max_tokens
            while stop < len(todo):
                # Padding is on the right, so the last `keep` columns cover every row's continuation and one before.
                width = len(todo[stop][1])
                shortest = min(shortest, width - todo[stop][2])
                need = width - shortest + 1
                rows = stop - start + 1
                if rows > 1 and (rows * width > _MAX_BATCH_TOKENS or rows * need * vocabulary > _MAX_LOGITS):
                    break
                stop, keep = stop + 1, need
            for (key, _, _), nll in zip(todo[start:stop], self._nll(todo[start:stop], keep), strict=True):
                found[key] = replace(nll, cut=cut[key])
            start = stop
        return [found[key] for key in keys]

    @torch.inference_mode()
    def _nll(self, batch: Sequence[tuple[Any, list[int], int]], keep: int) -> list[Nll]:
        width = max(len(ids) for _, ids, _ in batch)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for _, ids, _ in batch], device=self.device)
        logits = self.model(input_ids=ids, logits_to_keep=min(keep, width), use_cache=False).logits[:, :-1].float()
        first = width - logits.shape[1]  # logits[:, j] predict the token at position first + j
        position = torch.arange(first, width, device=self.device)
        ends = torch.tensor([len(row) for _, row, _ in batch], device=self.device)[:, None]
        counts = torch.tensor([n for _, _, n in batch], device=self.device)[:, None]
        scored = (position >= ends - counts) & (position < ends)
        nats = (logits.logsumexp(dim=-1) - logits.gather(2, ids[:, first:, None])[..., 0]).double()
        sums = (nats * scored).sum(dim=1).tolist()
        return [Nll(total, n) for total, (_, _, n) in zip(sums, batch, strict=True)]


Nats = TypeVar("Nats", float, np.ndarray)


def gap(nll: Nats, human: Nats, shuffled: Nats) -> Nats:
    """G: 0 is human text, 1 is human tokens in random order; all three in nats a token. Below 0: safer than human."""
    return (nll - human) / (shuffled - human)
