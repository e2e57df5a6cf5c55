"""`--dry-run`: what is to be done, what is done already, and how long the rest may take, measured on a few texts."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.cache import Cache, key_of
from evaluation.generation import Settings, cache_of, item_key, items_of
from evaluation.manifest import Manifest
from evaluation.scorers import feature_key, feature_texts
from evaluation.scoring import Models, ScoreConfig
from evaluation.systems import SystemEntry, open_system

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
    """What the rest may take on this machine; within a factor of 2 when the machine does nothing else."""


def plan_generation(manifest: Manifest, entries: Sequence[SystemEntry], settings: Settings) -> list[Work]:
    """What `generate` would do. Writes a few texts with each system that is not cached, and keeps none of them."""
    plan = []
    for entry in entries:
        system = open_system(entry, manifest, judge=settings.judge, device=settings.device)
        continuations, passages = items_of(manifest, entry, settings.length)
        for kind, items in (("continuations", continuations), ("unconditional", passages)):
            if not items:
                continue
            missing = set(cache_of(system, settings, kind).missing([item_key(item) for item in items]))
            todo = [item for item in items if item_key(item) in missing]

            def write(places: Sequence[int], todo: Any = todo, system: Any = system) -> None:
                system.generate([todo[place] for place in places], settings.seed)

            weights = [item.length.tokens or len(item.target) for item in todo]
            seconds = _probe(write, weights, entry.batch_size) if system.timed else 0.0
            plan.append(Work(f"{entry.name}, {kind}", len(items), len(items) - len(todo), seconds))
    return plan


def plan_scoring(
    manifest: Manifest, texts: Sequence[Sequence[str] | None], config: ScoreConfig, cache: Path, device: str
) -> list[Work]:
    """What `score` would do for these systems; None stands for texts that are not written yet, which are taken to be
    like the human ones. Reads a few texts with each model whose results are not cached."""
    models = Models(config, device)
    return [_PLANS[name](manifest, texts, config, cache, models) for name in _PLANS if name in config.metrics]


def _plan_rouge(manifest: Manifest, texts: Any, config: ScoreConfig, cache: Path, models: Models) -> Work:
    from evaluation.metrics.rouge import rouge

    targets = [sample.target for sample in manifest.samples]

    def run(places: Sequence[int]) -> None:
        for place in places:
            rouge(targets[place], targets[place - 1], stem=config.stem)

    seconds = _probe(run, [len(target) for target in targets], 256)
    return Work("rouge", len(texts) * len(targets), 0, seconds * len(texts))


def _plan_diversity(manifest: Manifest, texts: Any, config: ScoreConfig, cache: Path, models: Models) -> Work:
    from evaluation.metrics import diversity
    from evaluation.statistics import jackknife_error

    words = [sample.target.split() for sample in manifest.samples]

    def run(places: Sequence[int]) -> None:
        rows = [words[place] for place in places]
        diversity.self_bleu(rows)
        for n in (1, 2, 3, 4):
            jackknife_error(rows, lambda pool, n=n: diversity.distinct_n(pool, n))  # type: ignore[misc]

    return Work("diversity", len(texts) * len(words), 0, _probe(run, [len(row) for row in words], 256) * len(texts))


def _plan_perplexity(manifest: Manifest, texts: Any, config: ScoreConfig, cache: Path, models: Models) -> Work:
    # Which pairs are cached is known only after all is tokenized; the plan counts all of them.
    judge = models.judge.judge
    pairs = [(judge.tokenizer.encode(s.prefix), judge.tokenizer.encode(s.target)) for s in manifest.samples]
    seconds = _probe(
        lambda places: judge.score([pairs[place] for place in places]), [len(p) + len(t) for p, t in pairs], 256
    )
    return Work("perplexity", len(texts) * len(pairs), 0, seconds * len(texts))


def _plan_bertscore(manifest: Manifest, texts: Any, config: ScoreConfig, cache: Path, models: Models) -> Work:
    encoder = models.bertscore.encoder
    layer = config.bertscore_layer or encoder.bertscore_layer
    seconds = _probe_encoder(manifest, encoder, layer)
    total = len(texts) * len(manifest.samples)
    return Work("bertscore", total, 0, seconds * len(texts))  # the human row is the references themselves


def _plan_mauve(manifest: Manifest, texts: Any, config: ScoreConfig, cache: Path, models: Models) -> Work:
    from evaluation.metrics.mauve import mauve

    targets = [sample.target for sample in manifest.samples]
    sets: list[Any] = [*texts, [sample.target for sample in manifest.others] or targets]
    if len(targets) < config.mauve_min_samples:
        return Work("mauve (refused, n is too small)", len(texts) * len(targets), 0, 0.0)
    features = Cache(cache, *feature_key(models.featuriser.weights, config.dtype))
    todo = 0
    for own in sets:
        keys = [key_of(text) for text in feature_texts(manifest.samples, own or [], config.mauve_text)] if own else []
        todo += len(features.missing(keys)) if own else len(targets)
    encoder = models.featuriser.encoder
    each = _probe_encoder(manifest, encoder, None) / len(targets) if todo else 0.0
    random = np.random.default_rng(0).normal(size=(2, len(targets), encoder.model.config.hidden_size))
    began = time.perf_counter()
    mauve(random[0], random[1], seeds=[25])  # one seed and one resampling
    clusters = (time.perf_counter() - began) * 0.5 * (1 + len(config.mauve_seeds)) * len(sets)
    total = len(sets) * len(targets)
    return Work("mauve", total, total - todo, each * todo + clusters)


_PLANS: dict[str, Callable[..., Work]] = {
    "rouge": _plan_rouge,
    "diversity": _plan_diversity,
    "perplexity": _plan_perplexity,
    "bertscore": _plan_bertscore,
    "mauve": _plan_mauve,
}


def _probe_encoder(manifest: Manifest, encoder: Any, layer: int | None) -> float:
    """Seconds to encode every target once."""
    rows, _ = encoder.tokenize([sample.target for sample in manifest.samples])
    return _probe(
        lambda places: list(encoder.states([rows[place] for place in places], layer)), [len(row) for row in rows], 256
    )


def _probe(run: Callable[[Sequence[int]], object], weights: Sequence[int], most: int) -> float:
    """Seconds for all items, measured on growing numbers of typical ones, at most `most` at once."""
    if not weights:
        return 0.0
    mean = sum(weights) / len(weights)
    typical = sorted(range(len(weights)), key=lambda place: abs(weights[place] - mean))
    run(typical[:1])  # loads and compiles
    count = 1
    while True:
        began = time.perf_counter()
        run(typical[:count])
        seconds = time.perf_counter() - began
        if count >= min(most, len(weights)) or 4 * seconds > _PROBE_SECONDS:
            return seconds * sum(weights) / sum(weights[place] for place in typical[:count])
        count = min(4 * count, most, len(weights))


def describe(plan: Sequence[Work]) -> str:
    """The plan as a table with its sum."""
    total = Work("together", sum(w.total for w in plan), sum(w.cached for w in plan), sum(w.seconds for w in plan))
    width = max(len(work.what) for work in [*plan, total])
    lines = [f"{'what':<{width}}  {'texts':>8} {'cached':>8} {'about':>10}"]
    for work in [*plan, total]:
        lines.append(f"{work.what:<{width}}  {work.total:>8,} {work.cached:>8,} {_duration(work.seconds):>10}")
    lines.append("Measured on a few texts each; a machine that does other things too takes longer.")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
