"""What keeps a low nll honest: entropy, distinct n-grams, self-BLEU, repetition and copying, over lists of tokens."""

import bisect
import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

Tokens = Sequence[Hashable]


def unigram_entropy(texts: Sequence[Tokens]) -> float:
    """Entropy in nats of the pooled tokens' distribution; falls when a system uses few words. 0 for no tokens."""
    counts = np.array(list(Counter(token for text in texts for token in text).values()), dtype=np.float64)
    if not counts.size:
        return 0.0
    share = counts / counts.sum()
    return max(0.0, float(-(share * np.log(share)).sum()))


def distinct_n(texts: Sequence[Tokens], n: int) -> float:
    """Distinct over all n-grams inside the texts. Falls with the number of tokens: compare equal budgets only."""
    grams = Counter(gram for text in texts for gram in _ngrams(text, n))
    return len(grams) / max(1, grams.total())


def self_bleu(texts: Sequence[Tokens], most: int = 4) -> list[float]:
    """BLEU-4 in percent of each text against all others as references: high where texts repeat each other.

    Equal to sacrebleu's sentence_bleu without tokenizer, smoothing and effective order, but linear in the number of
    texts: the highest count of an n-gram among the others is the highest of all, or the second where that is one's
    own (Papineni et al. 2002; Zhu et al. 2018)."""
    if len(texts) < 2:
        return [0.0] * len(texts)
    lengths = sorted(len(text) for text in texts)
    precisions = [_clipped_precisions([_ngrams(text, n) for text in texts]) for n in range(1, most + 1)]
    scores = []
    for text, shares in zip(texts, zip(*precisions, strict=True), strict=True):
        if not all(shares):
            scores.append(0.0)
            continue
        closest = _closest_other(lengths, len(text))
        brevity = 1.0 if len(text) >= closest else math.exp(1 - closest / len(text))
        scores.append(100 * brevity * math.exp(sum(map(math.log, shares)) / most))
    return scores


def _clipped_precisions(grams: Sequence[list[tuple[Hashable, ...]]]) -> list[float]:
    """Share of each text's n-grams that occur in some other text, counted at most as often as there."""
    counts = [Counter(found) for found in grams]
    best: dict[tuple[Hashable, ...], tuple[int, int, int]] = {}  # highest count, whose, second highest
    for owner, counted in enumerate(counts):
        for gram, count in counted.items():
            first, whose, second = best.get(gram, (0, -1, 0))
            if count > first:
                best[gram] = (count, owner, first)
            elif count > second:
                best[gram] = (first, whose, count)
    shares = []
    for owner, (counted, found) in enumerate(zip(counts, grams, strict=True)):
        hits = 0
        for gram, count in counted.items():
            first, whose, second = best[gram]
            hits += min(count, second if whose == owner else first)
        shares.append(hits / len(found) if found else 0.0)
    return shares


def _closest_other(ordered: Sequence[int], length: int) -> int:
    """The length nearest to `length` among the others (one entry of `ordered` is its own); the shorter of two."""
    place = bisect.bisect_left(ordered, length)
    near = [ordered[i] for i in (place - 1, place + 1) if 0 <= i < len(ordered)]
    return min(near, key=lambda other: (abs(other - length), other))


def repetition(text: Tokens, n: int) -> float:
    """Share of a text's n-grams that occurred in it before."""
    grams = _ngrams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def copied(prefix: Tokens, text: Tokens, n: int) -> float:
    """Share of a text's n-grams that occur in its prefix."""
    grams, given = _ngrams(text, n), set(_ngrams(prefix, n))
    return sum(gram in given for gram in grams) / len(grams) if grams else 0.0


def cut_to_budget(texts: Sequence[Tokens], tokens: int) -> list[Tokens]:
    """The first texts, in order, that hold `tokens` tokens together; the last one is cut."""
    kept: list[Tokens] = []
    for text in texts:
        if tokens <= 0:
            break
        kept.append(text[:tokens])
        tokens -= len(kept[-1])
    return kept


def common_budget(systems: Sequence[Sequence[Tokens]], human: int) -> int:
    """The number of tokens at which all systems are compared: what the shortest has, but for those that wrote less
    than half of what the human did."""
    totals = [sum(map(len, texts)) for texts in systems]
    return min(total for total in totals if total >= totals[human] / 2)


def _ngrams(tokens: Tokens, n: int) -> list[tuple[Hashable, ...]]:
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))
