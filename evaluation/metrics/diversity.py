"""What keeps a low nll honest: entropy, distinct n-grams, repetition and copying, over lists of token ids."""

from collections import Counter
from collections.abc import Sequence

import numpy as np


def unigram_entropy(texts: Sequence[Sequence[int]]) -> float:
    """Entropy in nats of the pooled tokens' distribution; falls when a system uses few words. 0 for no tokens."""
    counts = np.array(list(Counter(token for text in texts for token in text).values()), dtype=np.float64)
    if not counts.size:
        return 0.0
    share = counts / counts.sum()
    return max(0.0, float(-(share * np.log(share)).sum()))


def distinct_n(texts: Sequence[Sequence[int]], n: int) -> float:
    """Distinct over all n-grams inside the texts. Falls with the number of tokens: compare equal budgets only."""
    grams = Counter(gram for text in texts for gram in _ngrams(text, n))
    return len(grams) / max(1, grams.total())


def repetition(text: Sequence[int], n: int) -> float:
    """Share of a text's n-grams that occurred in it before."""
    grams = _ngrams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def copied(prefix: Sequence[int], text: Sequence[int], n: int) -> float:
    """Share of a text's n-grams that occur in its prefix."""
    grams, given = _ngrams(text, n), set(_ngrams(prefix, n))
    return sum(gram in given for gram in grams) / len(grams) if grams else 0.0


def cut_to_budget(texts: Sequence[Sequence[int]], tokens: int) -> list[Sequence[int]]:
    """The first texts, in order, that hold `tokens` tokens together; the last one is cut."""
    kept: list[Sequence[int]] = []
    for text in texts:
        if tokens <= 0:
            break
        kept.append(text[:tokens])
        tokens -= len(kept[-1])
    return kept


def _ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))
