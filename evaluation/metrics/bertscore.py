"""BERTScore (Zhang et al. 2020): greedy matching of token states by cosine.

Equal to bert-score without idf and rescaling.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evaluation.metrics.encoder import Encoder


@dataclass(frozen=True)
class BertScore:
    """Scores of one system against the references."""

    precision: list[float]
    """One share a pair; 0 where either text is empty."""
    recall: list[float]
    """One share a pair; 0 where either text is empty."""
    fmeasure: list[float]
    """One share a pair; 0 where either text is empty."""
    truncated: int
    """Pairs in which either text was longer than the model reads; what is behind the cut is not scored."""


def bertscore(
    encoder: Encoder, systems: Sequence[Sequence[str]], references: Sequence[str], *, layer: int | None = None
) -> list[BertScore]:
    """Scores of every system. Each text is encoded once, whichever system wrote it; 64 references at a time."""
    layer = encoder.bertscore_layer if layer is None else layer
    scores: list[list[tuple[float, float, float, bool]]] = [[(0.0, 0.0, 0.0, False)] * len(references) for _ in systems]
    order = sorted(range(len(references)), key=lambda i: len(references[i]))
    for start in range(0, len(order), 64):
        block = order[start : start + 64]
        texts = list(dict.fromkeys(t.strip() for column in [references, *systems] for t in (column[i] for i in block)))
        texts = [text for text in texts if text]
        rows, flags = encoder.tokenize(texts)
        ids, cut = dict(zip(texts, rows, strict=True)), dict(zip(texts, flags, strict=True))
        states: dict[str, Tensor] = {}
        for i, state in encoder.states(rows, layer):
            # A tiny norm stays tiny: the states of real networks are far from 0.
            states[texts[i]] = state / state.norm(dim=-1, keepdim=True)
        for scored, candidates in zip(scores, systems, strict=True):
            for i in block:
                candidate, reference = candidates[i].strip(), references[i].strip()
                if not candidate or not reference:
                    continue
                similar = states[candidate] @ states[reference].T
                weight_c, weight_r = (_weights(ids[text], encoder) for text in (candidate, reference))
                precision = float(similar.max(dim=1).values @ weight_c)
                recall = float(similar.max(dim=0).values @ weight_r)
                both = precision + recall
                scored[i] = (
                    precision,
                    recall,
                    2 * precision * recall / both if both else 0.0,
                    cut[candidate] or cut[reference],
                )
    return [
        BertScore(
            [row[0] for row in pairs],
            [row[1] for row in pairs],
            [row[2] for row in pairs],
            sum(row[3] for row in pairs),
        )
        for pairs in scores
    ]


def _weights(ids: Sequence[int], encoder: Encoder) -> Tensor:
    """Equal weights [tokens] for all tokens but CLS and SEP, which may be matched but do not count."""
    inner = torch.tensor([0.0 if i in encoder.outer_ids else 1.0 for i in ids], device=encoder.device)
    return inner / inner.sum().clamp(min=1)
