"""`--dry-run`: what is to be done, what is done already, and how long the rest may take, measured on a few texts."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.cache import Cache, key_of
from evaluation.generation import Settings, cache_of, item_key, items_of, likelihoods_of
from evaluation.manifest import Manifest
from evaluation.scorers import bertscore_key, feature_key, feature_texts, nll_key, pair_key
from evaluation.scoring import Models, ScoreConfig
from evaluation.systems import SystemEntry, open_system
from evaluation.systems.base import Item, System

_PROBE_SECONDS = 10.0
"""No measurement is begun that would take longer, judging by the one before."""


@dataclass(frozen=True)
class Work:
    """A line of the plan."""

    what: str
    """A system's texts, or a family of metrics."""
    total: int
    """Texts or pairs."""
    cached: int
    """Of these, found in the cache."""
    seconds: float
    """What the rest may take on this machine; a line may be off by a factor of 2.5, the sum was within 10 %."""


def plan_generation(manifest: Manifest, entries: Sequence[SystemEntry], settings: Settings) -> list[Work]:
    """What `generate` would do. Writes some shortened texts with each system that is not cached, looks
    closer at a few whole ones where rows ask for it, and keeps none."""
    plan = []
    for entry in entries:
        system = open_system(entry, manifest, judge=settings.judge, device=settings.device)
        continuations, passages = items_of(manifest, entry, settings.length)
        for kind, items in (("continuations", continuations), ("unconditional", passages)):
            if items:
                missing = set(cache_of(system, settings, kind).missing([item_key(item) for item in items]))
                todo = [item for item in items if item_key(item) in missing]
                seconds = _probe_writing(system, todo, entry.batch_size, settings.seed) if system.timed else 0.0
                plan.append(Work(f"{entry.name}, {kind}", len(items), len(items) - len(todo), seconds))
        plan += _plan_traces_and_likelihoods(system, entry, continuations, settings)
    return plan


def _plan_traces_and_likelihoods(
    system: System, entry: SystemEntry, items: Sequence[Item], settings: Settings
) -> Iterator[Work]:
    """The traces and likelihoods of the first texts, where the row asks for them."""
    ways: tuple[tuple[str, int, Callable[[list[Item]], object], int], ...] = (
        ("traces", entry.trace, lambda some: [system.trace(item, settings.seed) for item in some], 1),
        (
            likelihoods_of(entry),
            entry.likelihood,
            lambda some: system.log_likelihood(some, settings.seed, **entry.likelihood_by),
            4,
        ),
    )
    for kind, count, find, most in ways:
        first = items[:count]
        if first:
            missing = set(cache_of(system, settings, kind).missing([item_key(item) for item in first]))
            todo = [item for item in first if item_key(item) in missing]
            weights = [len(item.prefix) + len(item.target) for item in todo]
            seconds = _probe(lambda places: find([todo[p] for p in places]), weights, most)  # noqa: B023
            yield Work(f"{entry.name}, {kind.partition('-')[0]}", len(first), len(first) - len(todo), seconds)


def known_texts(manifest: Manifest, entries: Sequence[SystemEntry], settings: Settings) -> list[list[str] | None]:
    """Every system's texts as far as they are there or cost nothing; None for a system that has yet to write."""
    found: list[list[str] | None] = []
    for entry in entries:
        system = open_system(entry, manifest, judge=settings.judge, device=settings.device)
        items, _ = items_of(manifest, entry, settings.length)
        cache, keys = cache_of(system, settings, "continuations"), [item_key(item) for item in items]
        if not system.timed:
            found.append([written.text for written in system.generate(items, settings.seed)])
        elif cache.missing(keys):
            found.append(None)
        else:
            found.append([value["text"] for value in cache.values(keys)])
    return found


@dataclass(frozen=True)
class _Plan:
    """What the plans of all families are made from."""

    manifest: Manifest
    texts: Sequence[Sequence[str] | None]
    config: ScoreConfig
    cache: Path
    models: Models

    @property
    def targets(self) -> list[str]:
        return [sample.target for sample in self.manifest.samples]

    def work(self, what: str, total: int, cached: int, seconds: float) -> Work:
        """`seconds` for all; what is cached costs nothing."""
        return Work(what, total, cached, seconds * (total - cached) / max(1, total))


def plan_scoring(
    manifest: Manifest, texts: Sequence[Sequence[str] | None], config: ScoreConfig, cache: Path, device: str
) -> list[Work]:
    """What `score` would do for these systems; None stands for texts that are not written yet, which are taken to be
    like the human ones. Reads some texts with each model whose results are not cached."""
    plan = _Plan(manifest, texts, config, cache, Models(config, len(manifest.samples), device))
    return [_PLANS[name](plan) for name in _PLANS if name in config.metrics]


def _plan_rouge(plan: _Plan) -> Work:
    from evaluation.metrics.rouge import rouge

    targets = plan.targets

    def run(places: Sequence[int]) -> None:
        for place in places:
            rouge(targets[place], targets[place - 1], stem=plan.config.stem)

    total = len(plan.texts) * len(targets)
    return plan.work("rouge", total, 0, len(plan.texts) * _probe(run, [len(target) for target in targets], 256))


def _plan_diversity(plan: _Plan) -> Work:
    from evaluation.metrics import diversity
    from evaluation.statistics import jackknife_error

    words = [target.split() for target in plan.targets]

    def run(places: Sequence[int]) -> None:
        rows = [words[place] for place in places]
        diversity.self_bleu(rows)
        for n in (1, 2, 3, 4):
            jackknife_error(rows, lambda pool, n=n: diversity.distinct_n(pool, n))  # type: ignore[misc]

    seconds = _probe(run, [len(row) for row in words], 256)
    return plan.work("diversity", len(plan.texts) * len(words), 0, len(plan.texts) * seconds)


def _plan_perplexity(plan: _Plan) -> Work:
    model = plan.models.judge
    encode = model.judge.tokenizer.encode_batch
    prefixes, targets = encode([s.prefix for s in plan.manifest.samples]), encode(plan.targets)
    cache = Cache(plan.cache, *nll_key(model.weights, plan.config.dtype))
    cached = 0
    for texts in plan.texts:
        if texts is not None:
            rows = [ids[: len(target)] for ids, target in zip(encode(list(texts)), targets, strict=True)]
            missing = set(cache.missing(keys := [pair_key(p, ids) for p, ids in zip(prefixes, rows, strict=True)]))
            cached += sum(key not in missing for key in keys)
    pairs, total, seconds = list(zip(prefixes, targets, strict=True)), len(plan.texts) * len(targets), 0.0
    if cached < total:
        seconds = _probe(lambda p: model.judge.score([pairs[i] for i in p]), [len(p) + len(t) for p, t in pairs], 256)
    return plan.work("perplexity", total, cached, len(plan.texts) * seconds)


def _plan_bertscore(plan: _Plan) -> Work:
    from evaluation.metrics.bertscore import inverse_document_frequencies

    model, config, targets = plan.models.bertscore, plan.config, plan.targets
    layer = config.bertscore_layer or model.encoder.bertscore_layer
    idf = inverse_document_frequencies(model.encoder, targets) if config.bertscore_idf else None
    cache = Cache(plan.cache, *bertscore_key(model.weights, config.dtype, layer, idf))
    cached = 0
    for texts in plan.texts:
        keys = [key_of(text, target) for text, target in zip(texts or [], targets, strict=bool(texts))]
        missing = set(cache.missing(keys))
        cached += sum(key not in missing for key in keys)
    total = len(plan.texts) * len(targets)
    # Each system's texts and, once, the references; the human row is the references.
    seconds = _probe_encoder(plan, model.encoder, layer) if cached < total else 0.0
    return plan.work("bertscore", total, cached, len(plan.texts) * seconds)


def _plan_mauve(plan: _Plan) -> Work:
    from evaluation.metrics.mauve import mauve

    config, targets, samples = plan.config, plan.targets, plan.manifest.samples
    if len(targets) < config.mauve_min_samples:
        return Work("mauve (refused, n is too small)", len(plan.texts) * len(targets), 0, 0.0)
    model = plan.models.featuriser
    features = Cache(plan.cache, *feature_key(model.weights, config.dtype))
    others = plan.manifest.others
    sets = [(samples, texts) for texts in plan.texts] + ([(others, [o.target for o in others])] if others else [])
    todo = 0
    for own, texts in sets:
        keys = [key_of(text) for text in feature_texts(own, texts, config.mauve_text)] if texts else []
        todo += len(features.missing(keys)) if texts else len(targets)
    each = _probe_encoder(plan, model.encoder, None) / len(targets) if todo else 0.0
    random = np.random.default_rng(0).normal(size=(2, len(targets), model.encoder.model.config.hidden_size))
    began = time.perf_counter()
    mauve(random[0], random[1], seeds=[25])  # one seed and one resampling
    clusters = (time.perf_counter() - began) * 0.5 * (1 + len(config.mauve_seeds)) * len(sets)
    total = len(sets) * len(targets)
    return Work("mauve", total, total - todo, each * todo + clusters)


_PLANS: dict[str, Callable[[_Plan], Work]] = {
    "rouge": _plan_rouge,
    "diversity": _plan_diversity,
    "perplexity": _plan_perplexity,
    "bertscore": _plan_bertscore,
    "mauve": _plan_mauve,
}


def _probe_encoder(plan: _Plan, encoder: Any, layer: int | None) -> float:
    """Seconds to encode every target once."""
    rows, _ = encoder.tokenize(plan.targets)
    return _probe(
        lambda places: list(encoder.states([rows[place] for place in places], layer)), [len(row) for row in rows], 256
    )


def _probe_writing(system: System, items: Sequence[Item], batch_size: int, seed: int) -> float:
    """Seconds to write all items, measured on one batch of typical ones that is cut shorter: a sixteenth of the length,
    an eighth, and so on while time allows; the rest is a straight line through the last two."""
    if not items:
        return 0.0
    weights = [item.length.tokens or len(item.target) for item in items]
    batch = [items[place] for place in _typical(weights)[:batch_size]]
    system.generate([_shortened(item, 1 / 16) for item in batch[:1]], seed)  # loads and compiles
    measured: list[tuple[float, float]] = []
    share = 1 / 16
    while share <= 1:
        cut = [_shortened(item, share) for item in batch]
        measured.append((share, _seconds(lambda cut=cut: system.generate(cut, seed))))  # type: ignore[misc]
        if len(measured) > 1 and 2 * measured[-1][1] > _PROBE_SECONDS:
            break
        share *= 2
    (first, before), (last, after) = measured[-2:]
    whole = after + max(0.0, after - before) * (1 - last) / (last - first)
    return whole * sum(weights) / sum(item.length.tokens or len(item.target) for item in batch)


def _shortened(item: Item, share: float) -> Item:
    tokens = item.length.tokens
    length = item.length if tokens is None else replace(item.length, tokens=max(1, round(share * tokens)))
    return replace(item, target=item.target[: max(1, round(share * len(item.target)))], length=length)


def _probe(run: Callable[[Sequence[int]], object], weights: Sequence[int], most: int) -> float:
    """Seconds for all items, measured on growing numbers of typical ones, at most `most` at once."""
    if not weights:
        return 0.0
    typical = _typical(weights)
    run(typical[:1])  # loads and compiles
    count = 1
    while True:
        seconds = _seconds(lambda count=count: run(typical[:count]))  # type: ignore[misc]
        if count >= min(most, len(weights)) or 4 * seconds > _PROBE_SECONDS:
            return seconds * sum(weights) / max(1, sum(weights[place] for place in typical[:count]))
        count = min(4 * count, most, len(weights))


def _typical(weights: Sequence[int]) -> list[int]:
    """Places by how near their weight is to the mean."""
    mean = sum(weights) / len(weights)
    return sorted(range(len(weights)), key=lambda place: abs(weights[place] - mean))


def _seconds(run: Callable[[], object]) -> float:
    import torch

    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def describe(plan: Sequence[Work]) -> str:
    """The plan as a table with its sum."""
    total = Work("together", sum(w.total for w in plan), sum(w.cached for w in plan), sum(w.seconds for w in plan))
    width = max(len(work.what) for work in [*plan, total])
    lines = [f"{'what':<{width}}  {'texts':>8} {'cached':>8} {'about':>10}"]
    for work in [*plan, total]:
        lines.append(f"{work.what:<{width}}  {work.total:>8,} {work.cached:>8,} {_duration(work.seconds):>10}")
    lines.append("Measured on some shortened texts each: a line may be off by a factor of 2 or 3, the sum by less.")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
