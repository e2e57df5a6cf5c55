"""The families of metrics, a function each: what they measure of every system, and what they were measured with."""

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np

import megatext.tokenizer
from evaluation import statistics
from evaluation.cache import Cache, key_of, packed
from evaluation.files import hash_of, hash_of_code
from evaluation.generation import Generated
from evaluation.manifest import Sample
from evaluation.metric_table import Scoring, metric, pooled_metric
from megatext.config import ConfigError

_METRICS = Path(__file__).parent / "metrics"
_LOT = 64
"""Texts or pairs that a model reads between two writes to the cache: what a kill loses."""


def rouge(scoring: Scoring) -> None:
    from evaluation.metrics.rouge import rouge, tokenize

    stem = scoring.config.stem
    with scoring.progress("rouge", len(scoring.generations) * scoring.n) as progress:
        for i, item in enumerate(scoring.generations):
            scores = []
            for target, text in zip(scoring.targets, item.texts, strict=True):
                scores.append(rouge(target, text, stem=stem))
                progress.update()
            for name in ("rouge1", "rouge2", "rougeL"):
                scoring.add(i, name, [100 * s[name].fmeasure for s in scores], "percent", "higher")
    wordless = sum(not tokenize(target) for target in scoring.targets)
    scoring.parameters["rouge"] = {"value": "F1", "stemmer": stem, "targets_without_words": wordless}


def bertscore(scoring: Scoring) -> None:
    from evaluation.metrics import bertscore as bert

    config, model = scoring.config, scoring.models.bertscore
    layer = config.bertscore_layer or model.encoder.bertscore_layer
    idf = bert.inverse_document_frequencies(model.encoder, scoring.targets) if config.bertscore_idf else None
    # By reference, so that the candidates of one reference are encoded beside it; long ones last, as rows of a batch
    # should be of like length.
    order = sorted(range(scoring.n), key=lambda k: len(scoring.targets[k]))
    pairs = [(item.texts[k], scoring.targets[k]) for k in order for item in scoring.generations]
    cache = Cache(scoring.cache, *bertscore_key(model.weights, config.dtype, layer, idf))

    def compute(places: list[int]) -> list[tuple[float, float, float, bool]]:
        found = bert.bertscore(model.encoder, [pairs[p] for p in places], layer=layer, idf=idf)
        return [astuple(score) for score in found]

    with scoring.progress("bertscore", len(pairs)) as progress:
        lot = _LOT * len(scoring.generations)
        found = cache.complete([key_of(*pair) for pair in pairs], compute, lot=lot, done=progress.update)
    scores = [bert.BertScore(*values) for values in found]
    baseline = bert.baseline_of(config.bertscore_model, layer, config.bertscore_baseline)
    for i in range(len(scoring.generations)):
        own = [scores[rank * len(scoring.generations) + i] for rank in np.argsort(order).tolist()]
        truncated = sum(score.truncated for score in own) / scoring.n
        values = [100 * score.fmeasure for score in own]
        scoring.add(i, "bertscore", values, "percent", "higher", truncated_share=truncated)
        if baseline is not None:
            spread = [100 * bert.rescaled(score, baseline).fmeasure for score in own]
            scoring.add(i, "bertscore_rescaled", spread, "percent", "higher")
    most = max(row["bertscore"]["truncated_share"] for row in scoring.rows)
    if most:
        scoring.notes.append(
            f"BERTScore reads {model.encoder.max_tokens} tokens: up to {most:.1%} of a row's pairs were cut there, and "
            "what is behind is not scored."
        )
    scoring.parameters["bertscore"] = {
        "value": "F1", "layer": layer, "idf": config.bertscore_idf, "baseline": list(baseline) if baseline else None,
    }  # fmt: skip


def bertscore_key(weights: str, dtype: str, layer: int, idf: dict[int, float] | None) -> tuple[str, Any]:
    """Where the cache holds the scores of pairs."""
    code = hash_of_code(_METRICS / "bertscore.py", _METRICS / "encoder.py")
    return "bertscore", [weights, dtype, layer, None if idf is None else hash_of(sorted(idf.items())), code]


def mauve(scoring: Scoring) -> None:
    from evaluation.metrics.mauve import FLOOR, SCALING

    config = scoring.config
    if scoring.n < config.mauve_min_samples:
        scoring.notes.append(
            f"MAUVE is not given: n = {scoring.n}, below {config.mauve_min_samples} it measures n, not text."
        )
        return
    if scoring.n < 1000:
        scoring.notes.append(
            f"MAUVE at n = {scoring.n} is comparable with MAUVE at n = {scoring.n} only; papers use 1000 or more."
        )
    names = [item.entry.name for item in scoring.generations]
    samples = scoring.manifest.samples
    texts = [feature_texts(samples, item.texts, config.mauve_text) for item in scoring.generations]
    features = [
        _features(scoring, samples, item.texts, name) for item, name in zip(scoring.generations, names, strict=True)
    ]
    assert scoring.human is not None
    clusters = 0
    with scoring.progress("mauve", len(features)) as progress:
        for i, item in enumerate(scoring.generations):
            # Equal sets are at 1 by definition, and so is a row of the same texts in other order.
            reordered = item.entry.system == "other" and not scoring.manifest.others
            same = i == scoring.human or (reordered and config.mauve_text == "continuation")
            found = _mauve(scoring, features[scoring.human], features[i], config.mauve_seeds[: 1 if same else None])
            clusters = found.clusters
            low, high = (100 * (found.mean + sign * 1.96 * found.error) for sign in (-1, 1))
            scoring.rows[i]["mauve"] = metric(
                100 * found.mean, "percent", scoring.n, "higher", math.nan if same else 100 * found.error,
                "error over k-means seeds and over resampled texts, in quadrature",
                (max(100 * FLOOR, low), min(100.0, high)),
                seed_sd=100 * found.seed_sd, sampling_sd=100 * found.sampling_sd, seed25=100 * found.seed25,
                star=100 * found.star_mean, seeds=1 if same else len(config.mauve_seeds),
            )  # fmt: skip
            progress.update()
        ceiling = None
        if scoring.manifest.others:
            others = _features(scoring, scoring.manifest.others, [s.target for s in scoring.manifest.others], "others")
            ceiling = _mauve(scoring, features[scoring.human], others, config.mauve_seeds)
    scoring.parameters["mauve"] = {
        "scaling": SCALING, "clusters": clusters, "floor": 100 * FLOOR, "text": config.mauve_text,
        "ceiling": 100 * ceiling.mean if ceiling else None, "ceiling_sd": 100 * ceiling.seed_sd if ceiling else None,
        "seeds": len(config.mauve_seeds), "faiss_threads": 1,
        "features": f"{config.dtype}, last token of the last layer",
    }  # fmt: skip
    cut = _cut_share(scoring, texts)
    if cut:
        scoring.notes.append(
            f"MAUVE's model reads {scoring.models.featuriser.encoder.max_tokens} tokens: up to {cut:.1%} of a row's "
            "texts end there for it."
        )
    between = f"floor {100 * FLOOR:.2f}"
    if ceiling:
        between += f", human against other human texts {100 * ceiling.mean:.1f}"
    else:
        between += "; the source has too few documents for a ceiling of human against other human texts"
    scoring.notes.append(f"MAUVE: {between}; mean of {len(config.mauve_seeds)} k-means seeds.")


def _mauve(scoring: Scoring, human: np.ndarray, system: np.ndarray, seeds: Sequence[int]) -> Any:
    from evaluation.metrics.mauve import Mauve, mauve

    cache = Cache(scoring.cache, "mauve", hash_of_code(_METRICS / "mauve.py"))
    key = key_of(packed(human), packed(system), str(list(seeds)))
    (values,) = cache.complete([key], lambda _: [astuple(mauve(human, system, seeds=seeds))], lot=1)
    return Mauve(*values)


def _features(scoring: Scoring, samples: Sequence[Sample], texts: Sequence[str], name: str) -> np.ndarray:
    """Features [n, width] of texts, found by their content: a text is featurised once, whichever row it is in."""
    config, model = scoring.config, scoring.models.featuriser
    texts = feature_texts(samples, texts, config.mauve_text)
    cache = Cache(scoring.cache, *feature_key(model.weights, config.dtype))
    order = sorted(range(len(texts)), key=lambda k: len(texts[k]))

    def compute(places: list[int]) -> list[dict[str, Any]]:
        rows, cut = model.encoder.tokenize([texts[order[p]] for p in places])
        features = model.encoder.last_token(rows).numpy()
        return [{"feature": packed(feature), "cut": flag} for feature, flag in zip(features, cut, strict=True)]

    with scoring.progress(f"features, {name}", len(texts)) as progress:
        cache.complete([key_of(texts[k]) for k in order], compute, lot=_LOT, done=progress.update)
    return cache.stacked([key_of(text) for text in texts])


def _cut_share(scoring: Scoring, rows: Sequence[Sequence[str]]) -> float:
    """The largest share of a row's texts that the featuriser does not read to their end."""
    cache = Cache(scoring.cache, *feature_key(scoring.models.featuriser.weights, scoring.config.dtype))
    return max(sum(value["cut"] for value in cache.values([key_of(t) for t in texts])) / len(texts) for texts in rows)


def feature_key(weights: str, dtype: str) -> tuple[str, Any]:
    """Where the cache holds the features of a model's texts."""
    return "features", [weights, dtype, hash_of_code(_METRICS / "encoder.py")]


def feature_texts(samples: Sequence[Sample], texts: Sequence[str], text: str) -> list[str]:
    """What is featurised of continuations: themselves, or prefix and continuation (`whole`)."""
    if text == "continuation":
        return list(texts)
    return [sample.prefix + written for sample, written in zip(samples, texts, strict=True)]


def perplexity(scoring: Scoring) -> None:
    """Generative perplexity, nll and G; entropy and repetition in the judge's tokens, without which they say little."""
    from evaluation.metrics import diversity

    tokenizer, human = scoring.models.judge.judge.tokenizer, scoring.human
    assert human is not None
    prefixes = tokenizer.encode_batch([sample.prefix for sample in scoring.manifest.samples])
    written = [_judge_tokens(item, tokenizer) for item in scoring.generations]
    lengths = [len(ids) for ids in written[human]]
    # Every system is read for as many tokens as the human wrote, no more: later tokens are easier.
    tokens = [[ids[:length] for ids, length in zip(rows, lengths, strict=True)] for rows in written]
    _judge_gap(scoring, prefixes, tokens)
    budget = diversity.common_budget(tokens, human)
    scoring.parameters["perplexity"]["token_budget"] = budget
    for i, rows in enumerate(tokens):
        pooled_metric(scoring, i, "entropy", rows, budget, diversity.unigram_entropy, "nats")
        scoring.add(i, "repetition4", [diversity.repetition(ids, 4) for ids in rows], "share", "lower")
        scoring.per_sample[i]["judge_tokens"] = [len(ids) for ids in written[i]]
    _passages(scoring, tokenizer)


def _judge_tokens(item: Generated, tokenizer: Any) -> list[list[int]]:
    if item.ids is None:
        return tokenizer.encode_batch(item.texts)
    if item.ids_tokenizer != tokenizer.fingerprint():
        raise ConfigError(
            f"{item.entry.name}: shuffled with another judge's tokens; run `generate` again with this judge"
        )
    return item.ids


def _nlls(scoring: Scoring, pairs: Sequence[tuple[list[int], list[int]]], what: str) -> list[tuple[float, int, bool]]:
    """(nats, scored tokens, whether the judge read less) of each (prefix, text)."""
    model = scoring.models.judge
    cache = Cache(scoring.cache, *nll_key(model.weights, scoring.config.dtype))
    order = sorted(range(len(pairs)), key=lambda k: len(pairs[k][0]) + len(pairs[k][1]))

    def compute(places: list[int]) -> list[tuple[float, int, bool]]:
        return [(nll.nats, nll.tokens, nll.cut) for nll in model.judge.score([pairs[order[p]] for p in places])]

    with scoring.progress(what, len(pairs)) as progress:
        keys = [pair_key(*pairs[k]) for k in order]
        found = cache.complete(keys, compute, lot=4 * _LOT, done=progress.update)
    by_place = dict(zip(order, found, strict=True))
    return [tuple(by_place[k]) for k in range(len(pairs))]  # type: ignore[misc]


def nll_key(weights: str, dtype: str) -> tuple[str, Any]:
    """Where the cache holds what a judge said."""
    return "nll", [weights, dtype, hash_of_code(_METRICS / "perplexity.py", Path(megatext.tokenizer.__file__))]


def pair_key(prefix: Sequence[int], text: Sequence[int]) -> str:
    """The key of a prefix and a text, both judge tokens."""
    return key_of(repr(list(prefix)), repr(list(text)))


def _judge_gap(scoring: Scoring, prefixes: list[list[int]], tokens: list[list[list[int]]]) -> None:
    """Generative perplexity, nll, and, where the row `shuffled` is there, G of every system."""
    from evaluation.metrics.perplexity import gap

    n, human, shuffled = scoring.n, scoring.human, scoring.row_of("shuffled")
    assert human is not None
    found = _nlls(scoring, [(p, ids) for rows in tokens for p, ids in zip(prefixes, rows, strict=True)], "nll")
    by_system = [found[i * n : (i + 1) * n] for i in range(len(tokens))]
    nats = [np.array([nat for nat, _, _ in row]) for row in by_system]
    counts = [np.array([count for _, count, _ in row]) for row in by_system]
    cut = max(sum(flag for *_, flag in row) / n for row in by_system)
    if cut:
        scoring.notes.append(
            f"The judge reads {scoring.models.judge.judge.max_tokens} tokens: in up to {cut:.1%} of a row's samples it "
            "saw less of the prefix, or of the text."
        )
    corpus = [float(s.sum() / c.sum()) if c.sum() else math.nan for s, c in zip(nats, counts, strict=True)]
    with np.errstate(invalid="ignore", divide="ignore"):
        sums = scoring.bootstrap.sums
        drawn = [sums(s) / sums(c) for s, c in zip(nats, counts, strict=True)]
    scoring.parameters["perplexity"] = {
        "judge": scoring.config.judge, "human_nll": corpus[human],
        "shuffled_nll": None if shuffled is None else corpus[shuffled],
    }  # fmt: skip
    kind = "bootstrap standard error"
    for i, row in enumerate(scoring.rows):
        total = int(counts[i].sum())
        for name, value, draws, unit in (
            ("generative_perplexity", _exp(corpus[i]), np.exp(np.minimum(drawn[i], 700)), "perplexity"),
            ("nll", corpus[i], drawn[i], "nats a token"),
        ):
            se, ci = statistics.spread(draws)
            row[name] = metric(value, unit, n, None, se, kind, ci, tokens=total)
        scoring.per_sample[i]["nll"] = [nat / count if count else None for nat, count, _ in by_system[i]]
        if shuffled is not None:
            with np.errstate(invalid="ignore", divide="ignore"):
                se, ci = statistics.spread(gap(drawn[i], drawn[human], drawn[shuffled]))
                value = gap(*(np.array([corpus[j]]) for j in (i, human, shuffled)))[0]
            row["gap"] = metric(float(value), "share", n, "lower", se, kind, ci)


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700)) if math.isfinite(nats) else math.nan


def _passages(scoring: Scoring, tokenizer: Any) -> None:
    """nll, entropy and distinct-2 of passages without prefix, beside as many human documents."""
    from evaluation.metrics import diversity

    groups = [(item.entry.name, item.unconditional) for item in scoring.generations if item.unconditional]
    if not groups:
        return
    assert scoring.human is not None
    most = max(len(texts) for _, texts in groups)
    documents = [sample.prefix + sample.target for sample in scoring.manifest.samples[:most]]
    groups.insert(0, (scoring.generations[scoring.human].entry.name, documents))
    encoded = [tokenizer.encode_batch(texts) for _, texts in groups]
    budget = diversity.common_budget(encoded, 0)
    for (name, texts), rows in zip(groups, encoded, strict=True):
        nlls = _nlls(scoring, [([], ids) for ids in rows], f"nll, passages of {name}")
        count = sum(tokens for _, tokens, _ in nlls)
        pool = diversity.cut_to_budget(rows, budget)
        nll = sum(nats for nats, _, _ in nlls) / count if count else math.nan
        each = [nats / tokens for nats, tokens, _ in nlls if tokens]
        error = float(np.std(each, ddof=1) / math.sqrt(len(each))) if len(each) > 1 else math.nan
        scoring.unconditional.append({
            "name": name,
            "texts": texts,
            "metrics": {
                "nll": metric(nll, "nats a token", len(texts), None, error, "standard error", tokens=count),
                "entropy": metric(diversity.unigram_entropy(pool), "nats", len(texts), None, tokens=budget),
                "distinct2": metric(diversity.distinct_n(pool, 2), "share", len(texts), None, tokens=budget),
            },
        })  # fmt: skip


def likelihood(scoring: Scoring) -> None:
    """Bits a character of the targets, of the rows that were asked for it: pooled, with the jackknife's error over
    texts and that of the estimates."""
    for i, item in enumerate(scoring.generations):
        if not item.likelihoods:
            continue
        lengths = [len(target) for target in scoring.targets[: len(item.likelihoods)]]
        texts = [(nats.nats / math.log(2), length) for nats, length in zip(item.likelihoods, lengths, strict=True)]

        def pooled(some: Any) -> float:
            return sum(bits for bits, _ in some) / max(1, sum(length for _, length in some))

        error = statistics.jackknife_error(texts, pooled)
        # texts share an estimate's noise: its spread is that of the pooled sums
        sums = np.array([nats.estimates for nats in item.likelihoods]).sum(axis=0) / math.log(2) / max(1, sum(lengths))
        estimate = float(np.std(sums, ddof=1) / math.sqrt(len(sums))) if len(sums) > 1 else 0.0
        name = item.likelihoods[0].estimator
        scoring.rows[i]["bits_per_character"] = metric(
            pooled(texts), "bits a character", len(texts), "lower", error, "jackknife standard error",
            estimator=name, estimator_error=estimate, bound=name != "exact",
        )  # fmt: skip


def diversity(scoring: Scoring) -> None:
    """distinct-n, self-BLEU, length ratio, empty and copied texts, over words between white space: no model needed."""
    from evaluation.metrics import diversity as measures

    words = [[text.split() for text in item.texts] for item in scoring.generations]
    prefixes = [sample.prefix.split() for sample in scoring.manifest.samples]
    human = scoring.human
    assert human is not None
    budget = measures.common_budget(words, human)
    total = max(1, sum(map(len, words[human])))
    with scoring.progress("diversity", len(words)) as progress:
        for i, rows in enumerate(words):
            for n in (1, 2, 3, 4):
                pooled_metric(scoring, i, f"distinct{n}", rows, budget, _distinct(n), "share")
            scoring.add(i, "self_bleu", measures.self_bleu(rows), "percent", "lower")
            ratio = sum(map(len, rows)) / total
            scoring.rows[i]["length_ratio"] = metric(ratio, "ratio", scoring.n, None)
            scoring.per_sample[i]["words"] = [len(row) for row in rows]
            copies = [measures.copied(p, row, 4) for p, row in zip(prefixes, rows, strict=True)]
            scoring.add(i, "copied4", copies, "share", "lower")
            scoring.add(i, "empty", [float(not row) for row in rows], "share", "lower")
            progress.update()
    scoring.parameters["diversity"] = {"tokens": "words between white space", "word_budget": budget}


def _distinct(n: int) -> Callable[[Any], float]:
    from evaluation.metrics.diversity import distinct_n

    return lambda texts: distinct_n(texts, n)


FAMILIES: dict[str, Callable[[Scoring], None]] = {
    "rouge": rouge,
    "diversity": diversity,
    "perplexity": perplexity,
    "bertscore": bertscore,
    "mauve": mauve,
}
"""In the order they are measured: what is cheap first."""
