"""BERTScore (Zhang et al. 2020): greedy matching of token states by cosine. Equal to the package bert-score."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from evaluation.metrics.encoder import Encoder
from megatext.config import ConfigError


@dataclass(frozen=True)
class BertScore:
    """Score of one pair; all 0 where either text is empty."""

    precision: float
    """Weighted mean over the candidate's tokens of the best cosine with a token of the reference."""
    recall: float
    """The same over the reference's tokens."""
    fmeasure: float
    """Their harmonic mean."""
    truncated: bool
    """Either text was longer than the model reads; what is behind the cut is not scored."""


Baseline = tuple[float, float, float]
"""Mean precision, recall and F of unrelated sentences, to which scores are rescaled."""

BASELINES: dict[tuple[str, int], Baseline] = {
    ("roberta-large", 17): (0.83150584, 0.8314941, 0.83122575),
    ("roberta-base", 10): (0.8146725, 0.8146619, 0.814463),
    ("bert-base-uncased", 9): (0.35375935, 0.3537393, 0.35219112),
    ("bert-large-uncased", 18): (0.4278576, 0.42786714, 0.42646673),
    ("distilbert-base-uncased", 5): (0.6666034, 0.66660464, 0.66620487),
    ("deberta-xlarge-mnli", 40): (0.5169066, 0.5170288, 0.5150192),
}
"""(last part of the model's name, layer) -> baseline in English, as published with bert-score 0.3.13 (MIT)."""


def bertscore(
    encoder: Encoder,
    pairs: Sequence[tuple[str, str]],
    *,
    layer: int | None = None,
    idf: Mapping[int, float] | None = None,
) -> list[BertScore]:
    """Scores of (candidate, reference) pairs. Each different text is encoded once, so one call should hold all that is
    to be compared with a reference. With `idf` (see `inverse_document_frequencies`) rare tokens weigh more."""
    layer = encoder.bertscore_layer if layer is None else layer
    texts = [text for text in dict.fromkeys(t.strip() for pair in pairs for t in pair) if text]
    rows, flags = encoder.tokenize(texts)
    ids, cut = dict(zip(texts, rows, strict=True)), dict(zip(texts, flags, strict=True))
    states: dict[str, Tensor] = {}
    for i, state in encoder.states(rows, layer):
        # A tiny norm stays tiny: the states of real networks are far from 0.
        states[texts[i]] = state / state.norm(dim=-1, keepdim=True)
    scores = []
    for candidate, reference in ((c.strip(), r.strip()) for c, r in pairs):
        if not candidate or not reference:
            scores.append(BertScore(0.0, 0.0, 0.0, False))
            continue
        similar = states[candidate] @ states[reference].T
        precision = float(similar.max(dim=1).values @ _weights(ids[candidate], encoder, idf))
        recall = float(similar.max(dim=0).values @ _weights(ids[reference], encoder, idf))
        both = precision + recall
        fmeasure = 2 * precision * recall / both if both else 0.0
        scores.append(BertScore(precision, recall, fmeasure, cut[candidate] or cut[reference]))
    return scores


def inverse_document_frequencies(encoder: Encoder, references: Sequence[str]) -> dict[int, float]:
    """log((n + 1) / (number of references with the token + 1)) for each token of the references; a token that is in
    none of them has log(n + 1), which `bertscore` reads from the key -1."""
    rows, _ = encoder.tokenize([text for text in (r.strip() for r in references) if text])
    count = len(references)
    found = Counter(token for row in rows for token in set(row))
    return {-1: math.log(count + 1), **{token: math.log((count + 1) / (k + 1)) for token, k in found.items()}}


def rescaled(score: BertScore, baseline: Baseline) -> BertScore:
    """Scores spread over [0, 1]: (score - baseline) / (1 - baseline), each with its own."""
    values = (score.precision, score.recall, score.fmeasure)
    precision, recall, fmeasure = ((v - b) / (1 - b) for v, b in zip(values, baseline, strict=True))
    return BertScore(precision, recall, fmeasure, score.truncated)


def baseline_of(model: str, layer: int, file: Path | None) -> Baseline | None:
    """The baseline of a model and layer: from `file` (bert-score's .tsv with LAYER,P,R,F), else a known one, else None.

    `model` is a name on the hub or a directory called like one. Raises ConfigError if the file lacks the layer."""
    if file is None:
        return BASELINES.get((Path(model).name, layer))
    try:
        lines = [line.split(",") for line in file.read_text().splitlines()[1:]]
        table = {int(line[0]): (float(line[1]), float(line[2]), float(line[3])) for line in lines if len(line) == 4}
        return table[layer]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--bertscore-baseline {file}: no row LAYER,P,R,F of layer {layer} ({error})") from None


def _weights(ids: Sequence[int], encoder: Encoder, idf: Mapping[int, float] | None) -> Tensor:
    """Weights [tokens] that sum to 1; CLS and SEP may be matched but do not count."""
    values = [0.0 if i in encoder.outer_ids else 1.0 if idf is None else idf.get(i, idf[-1]) for i in ids]
    inner = torch.tensor(values, device=encoder.device)
    return inner / inner.sum().clamp(min=1e-12)
