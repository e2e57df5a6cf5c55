"""The score stage: every metric of every system, with n, spread and what it was measured with."""

import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from evaluation import statistics
from evaluation.files import atomic_write, hash_of, hash_of_code, hash_of_model
from evaluation.generation import Generations, refuse_other_manifests
from evaluation.manifest import Manifest
from megatext.config import ConfigError
from megatext.recipes.pretrained import weights_hash

METRICS = ("judge", "rouge", "bertscore", "mauve")


@dataclass(frozen=True)
class ScoreConfig:
    """How texts are scored. All of it is in results.json."""

    judge: str
    """Hugging Face causal LM directory: nll, G, and the tokens of entropy and distinct-2."""
    featuriser: str
    """Hugging Face directory for BERTScore and MAUVE."""
    metrics: tuple[str, ...] = METRICS
    """Of: judge, rouge, bertscore, mauve."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of judge and featuriser. bf16 is several times faster where the machine has it; compare like with like."""
    bertscore_layer: int | None = None
    """Hidden layer, counted from 1; None: the published choice for known models, else 0.7 of the depth."""
    mauve_seeds: tuple[int, ...] = (25, 26, 27, 28, 29)
    """k-means seeds; 25 is mauve-text's own."""
    mauve_min_samples: int = 100
    """MAUVE of fewer samples is refused: it measures n, not text."""
    bootstrap_draws: int = 10_000
    """Resamples for standard errors and intervals."""
    seed: int = 0
    """Seed of the bootstrap."""


class Metric(dict[str, Any]):
    """value, spread (a standard error or an SD over seeds), spread_kind, ci95, n, unit, higher_is_better."""


def _metric(
    value: float,
    unit: str,
    n: int,
    better: str | None,
    spread: float = math.nan,
    kind: str | None = None,
    ci95: Any = None,
    **more: Any,
) -> Metric:
    higher = None if better is None else better == "higher"
    finite = math.isfinite(spread)
    return Metric(
        value=value if math.isfinite(value) else None,
        spread=spread if finite else None,
        spread_kind=kind if finite else None,
        ci95=list(ci95) if finite and ci95 is not None else None,
        n=n,
        unit=unit,
        higher_is_better=higher,
        **more,
    )


def score(
    manifest: Manifest, generations: Sequence[Generations], config: ScoreConfig, output: Path, *, device: str = "cpu"
) -> dict[str, Any]:
    """Score and write `results.json` and `samples.jsonl`; returns the results. Equal inputs are not scored again."""
    refuse_other_manifests(generations, manifest, output)
    unknown = sorted(set(config.metrics) - set(METRICS))
    if unknown:
        raise ConfigError(f"unknown metrics {', '.join(unknown)}; known: {', '.join(METRICS)}")
    judge_hash = hash_of_model(Path(config.judge))
    featuriser_hash = (
        judge_hash if Path(config.featuriser) == Path(config.judge) else hash_of_model(Path(config.featuriser))
    )
    key = hash_of(
        [
            manifest.hash,
            [asdict(g) for g in generations],
            asdict(config),
            judge_hash,
            featuriser_hash,
            hash_of_code(Path(__file__).parent),
        ]
    )
    path = output / "results.json"
    if path.exists() and (output / "samples.jsonl").exists():
        stored = json.loads(path.read_text())
        if stored.get("inputs_hash") == key:
            return stored
    scorer = _Scorer(
        manifest, generations, config, device, judge_hash=judge_hash, featuriser_hash=featuriser_hash, output=output
    )
    timings: dict[str, float] = {}
    steps: dict[str, Callable[[], None]] = {
        "judge": scorer.judge_and_diversity,
        "rouge": scorer.rouge,
        "bertscore": scorer.bertscore,
        "mauve": scorer.mauve,
    }
    with tqdm(total=len(config.metrics) * len(generations), desc="score", unit="row", disable=None) as scorer.progress:
        for name, step in steps.items():
            if name in config.metrics:
                scorer.progress.set_postfix_str(name)
                began = time.perf_counter()
                step()
                timings[name] = round(time.perf_counter() - began, 2)
    results = {
        "schema_version": 1,
        "command": shlex.join(["python", "-m", "evaluation", *sys.argv[1:]]),
        "inputs_hash": key,
        "manifest": {"hash": manifest.hash, **manifest.task, "n": len(manifest.samples)},
        "judge": {"directory": config.judge, "weights": judge_hash},
        "featuriser": {"directory": config.featuriser, "weights": featuriser_hash},
        "config": asdict(config),
        "config_hash": hash_of(asdict(config)),
        "seed": generations[0].seed,
        "length_policy": "oracle: each system is given the number of its own tokens that the human target has",
        "notes": scorer.notes,
        "parameters": scorer.parameters,
        "seconds": timings,
        "versions": _versions(),
        "systems": [scorer.row(i) for i in range(len(generations))],
        "unconditional": scorer.unconditional,
    }
    atomic_write(output / "samples.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in scorer.samples()))
    atomic_write(path, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return results


class _Scorer:
    """State shared by the metrics of one run: models are loaded once, human texts are read once."""

    def __init__(
        self,
        manifest: Manifest,
        generations: Sequence[Generations],
        config: ScoreConfig,
        device: str,
        *,
        judge_hash: str,
        featuriser_hash: str,
        output: Path,
    ) -> None:
        self.manifest = manifest
        self.generations = generations
        self.config = config
        self.device = device
        self.n = len(manifest.samples)
        self.human = _row_of(generations, "human")
        self.rows: list[dict[str, Metric]] = [{} for _ in generations]
        self.per_sample: list[dict[str, list[Any]]] = [{} for _ in generations]
        self.notes: list[str] = []
        self.parameters: dict[str, Any] = {}
        self.unconditional: list[dict[str, Any]] = []
        self.progress: Any = None
        self._bootstrap = statistics.Bootstrap(self.n, draws=config.bootstrap_draws, seed=config.seed)
        self._cache = output / "cache" / "features"
        self._judge_hash = judge_hash
        self._judge_weights = weights_hash(config.judge)
        self._featuriser_hash = featuriser_hash
        self._judge: Any = None
        self._encoder: Any = None

    @property
    def _dtype(self) -> Any:
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.config.dtype]

    @property
    def judge(self) -> Any:
        if self._judge is None:
            from evaluation.metrics.perplexity import Judge

            self._judge = Judge(Path(self.config.judge), device=self.device, dtype=self._dtype)
        return self._judge

    @property
    def encoder(self) -> Any:
        if self._encoder is None:
            from evaluation.metrics.encoder import Encoder

            shared = self._featuriser_hash == self._judge_hash and "judge" in self.config.metrics
            trunk = self.judge.model.base_model if shared else None
            self._encoder = Encoder(Path(self.config.featuriser), device=self.device, dtype=self._dtype, model=trunk)
        return self._encoder

    def judge_and_diversity(self) -> None:
        """nll and G; entropy, distinct-2, repetition, copying; length ratio and empty share, in the judge's tokens."""
        tokenizer = self.judge.tokenizer
        prefixes = tokenizer.encode_batch([sample.prefix for sample in self.manifest.samples])
        written = [self._tokens(item, tokenizer) for item in self.generations]
        lengths = [len(ids) for ids in written[self.human]]
        # Every system is read for as many tokens as the human wrote, no more: later tokens are easier.
        tokens = [[ids[:length] for ids, length in zip(rows, lengths, strict=True)] for rows in written]
        self._judge_gap(prefixes, tokens)
        budget = min(total for rows in tokens if (total := sum(map(len, rows))) >= sum(lengths) / 2)
        self.parameters["judge"]["token_budget"] = budget
        for i, rows in enumerate(tokens):
            self._diversity(i, prefixes, rows, budget)
            length_ratio = sum(map(len, written[i])) / max(1, sum(lengths))
            self.rows[i]["length_ratio"] = _metric(length_ratio, "ratio", self.n, None)
            self.per_sample[i]["tokens"] = [len(ids) for ids in written[i]]
        self._score_unconditional(tokenizer)
        self.progress.update(len(tokens))

    def _judge_gap(self, prefixes: list[list[int]], tokens: list[list[list[int]]]) -> None:
        """nll and G of every system."""
        from evaluation.metrics.perplexity import gap

        nlls = self.judge.score([(p, ids) for rows in tokens for p, ids in zip(prefixes, rows, strict=True)])
        by_system = [nlls[i * self.n : (i + 1) * self.n] for i in range(len(tokens))]
        nats = [np.array([nll.nats for nll in row]) for row in by_system]
        counts = [np.array([nll.tokens for nll in row]) for row in by_system]
        corpus = [float(s.sum() / c.sum()) if c.sum() else math.nan for s, c in zip(nats, counts, strict=True)]
        shuffled = _row_of(self.generations, "shuffled")
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = [self._bootstrap.sums(s) / self._bootstrap.sums(c) for s, c in zip(nats, counts, strict=True)]
            drawn_gaps = [gap(draw, drawn[self.human], drawn[shuffled]) for draw in drawn]
        self.parameters["judge"] = {"human_nll": corpus[self.human], "shuffled_nll": corpus[shuffled]}
        kind = "bootstrap standard error"
        for i, row in enumerate(self.rows):
            se, ci = statistics.spread(drawn_gaps[i])
            row["gap"] = _metric(
                gap(corpus[i], corpus[self.human], corpus[shuffled]), "share", self.n, "lower", se, kind, ci
            )
            se, ci = statistics.spread(drawn[i])
            row["nll"] = _metric(corpus[i], "nats a token", self.n, None, se, kind, ci, tokens=int(counts[i].sum()))
            self.per_sample[i]["nll"] = [nll.nats / nll.tokens if nll.tokens else None for nll in by_system[i]]

    def _diversity(self, i: int, prefixes: list[list[int]], rows: list[list[int]], budget: int) -> None:
        """Entropy and distinct-2 at the same number of tokens for every system, and shares of texts and n-grams."""
        from evaluation.metrics import diversity

        pool = diversity.cut_to_budget(rows, budget)
        total = sum(map(len, pool))
        for name, statistic, unit in (
            ("entropy", diversity.unigram_entropy, "nats"),
            ("distinct2", _distinct2, "share"),
        ):
            self.rows[i][name] = _metric(
                statistic(pool) if total else math.nan,
                unit,
                self.n,
                None,
                statistics.jackknife_error(pool, statistic) if total else math.nan,
                "jackknife standard error",
                tokens=total,
                below_budget=total < budget,
            )
        shares = {
            "repetition4": [diversity.repetition(ids, 4) for ids in rows],
            "copied4": [diversity.copied(p, ids, 4) for p, ids in zip(prefixes, rows, strict=True)],
            "empty": [float(not text.strip()) for text in self.generations[i].texts],
        }
        for name, values in shares.items():
            self.rows[i][name] = self._mean(values, "share", "lower")

    def _score_unconditional(self, tokenizer: Any) -> None:
        """nll, entropy and distinct-2 of passages without prefix, beside as many human documents."""
        from evaluation.metrics import diversity

        groups = [(item.entry.name, item.unconditional) for item in self.generations if item.unconditional]
        if not groups:
            return
        most = max(len(texts) for _, texts in groups)
        documents = [sample.prefix + sample.target for sample in self.manifest.samples[:most]]
        groups.insert(0, (self.generations[self.human].entry.name, documents))
        encoded = [tokenizer.encode_batch(texts) for _, texts in groups]
        budget = min((total for rows in encoded if (total := sum(map(len, rows)))), default=0)
        for (name, texts), rows in zip(groups, encoded, strict=True):
            nlls = self.judge.score([([], ids) for ids in rows])
            count = sum(nll.tokens for nll in nlls)
            pool = diversity.cut_to_budget(rows, budget)
            nll = sum(nll.nats for nll in nlls) / count if count else math.nan
            each = [nll.nats / nll.tokens for nll in nlls if nll.tokens]
            error = float(np.std(each, ddof=1) / math.sqrt(len(each))) if len(each) > 1 else math.nan
            self.unconditional.append({
                "name": name,
                "texts": texts,
                "metrics": {
                    "nll": _metric(nll, "nats a token", len(texts), None, error, "standard error", tokens=count),
                    "entropy": _metric(diversity.unigram_entropy(pool), "nats", len(texts), None, tokens=budget),
                    "distinct2": _metric(_distinct2(pool), "share", len(texts), None, tokens=budget),
                },
            })  # fmt: skip

    def rouge(self) -> None:
        from evaluation.metrics.rouge import rouge, tokenize

        for i, item in enumerate(self.generations):
            scores = [
                rouge(sample.target, text) for sample, text in zip(self.manifest.samples, item.texts, strict=True)
            ]
            for name in ("rouge1", "rouge2", "rougeL"):
                values = [100 * s[name].fmeasure for s in scores]
                self.rows[i][name] = self._mean(values, "percent", "higher")
                self.per_sample[i][name] = values
            self.progress.update()
        wordless = sum(not tokenize(sample.target) for sample in self.manifest.samples)
        self.parameters["rouge"] = {"value": "F1", "stemmer": False, "targets_without_words": wordless}

    def bertscore(self) -> None:
        from evaluation.metrics.bertscore import bertscore

        layer = self.config.bertscore_layer or self.encoder.bertscore_layer
        references = [sample.target for sample in self.manifest.samples]
        scores = bertscore(self.encoder, [item.texts for item in self.generations], references, layer=layer)
        for i, result in enumerate(scores):
            values = [100 * f for f in result.fmeasure]
            self.rows[i]["bertscore"] = Metric(
                {**self._mean(values, "percent", "higher"), "truncated": result.truncated}
            )
            self.per_sample[i]["bertscore"] = values
            self.progress.update()
        self.parameters["bertscore"] = {"value": "F1", "layer": layer, "idf": False, "rescaled": False}

    def mauve(self) -> None:
        from evaluation.metrics.mauve import FLOOR, SCALING, mauve

        if self.n < self.config.mauve_min_samples:
            self.notes.append(
                f"MAUVE is not given: n = {self.n}, below {self.config.mauve_min_samples} it measures n, not text."
            )
            self.progress.update(len(self.generations))
            return
        if self.n < 1000:
            self.notes.append(
                f"MAUVE at n = {self.n} is comparable with MAUVE at n = {self.n} only; papers use 1000 or more."
            )
        human = self._features(self.generations[self.human].texts)
        clusters = 0
        for i, item in enumerate(self.generations):
            seeds = (
                self.config.mauve_seeds if i != self.human else self.config.mauve_seeds[:1]
            )  # equal sets: 1 by definition
            result = mauve(human, self._features(item.texts), seeds=seeds)
            clusters = result.clusters
            spread = 100 * result.seed_sd if len(seeds) > 1 else math.nan
            more = {"seed25": 100 * result.seed25, "star": 100 * result.star_mean, "seeds": len(seeds)}
            self.rows[i]["mauve"] = _metric(
                100 * result.mean, "percent", self.n, "higher", spread, "SD over k-means seeds", **more
            )
            self.progress.update()
        self.parameters["mauve"] = {
            "scaling": SCALING, "clusters": clusters, "floor": 100 * FLOOR, "text": "continuation", "faiss_threads": 1,
            "features": f"{self.config.dtype}, last token of the last layer",
        }  # fmt: skip

    def _features(self, texts: Sequence[str]) -> np.ndarray:
        """Features [n, width] of a system's texts, kept under the hash of what they are features of."""
        code = hash_of_code(Path(__file__).parent / "metrics" / "encoder.py")
        path = self._cache / f"{hash_of([self._featuriser_hash, self.config.dtype, code, list(texts)])[:24]}.npy"
        if path.exists():
            return np.load(path)
        features = self.encoder.last_token(self.encoder.tokenize(texts)[0]).numpy()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{os.getpid()}.npy")
        np.save(temporary, features)
        os.replace(temporary, path)
        return features

    def _tokens(self, item: Generations, tokenizer: Any) -> list[list[int]]:
        if item.ids is not None and item.ids_tokenizer == tokenizer.fingerprint():
            return item.ids
        if item.ids is not None:
            raise ConfigError(
                f"{item.entry.name}: shuffled with another judge's tokens; run `generate` again with this judge"
            )
        return tokenizer.encode_batch(item.texts)

    def _mean(self, values: list[float], unit: str, better: str) -> Metric:
        se, ci = statistics.spread(self._bootstrap.mean(values))
        return _metric(float(np.mean(values)), unit, self.n, better, se, "bootstrap standard error", ci)

    def row(self, i: int) -> dict[str, Any]:
        item = self.generations[i]
        return {
            "name": item.entry.name,
            "system": item.entry.system,
            "sampling": item.entry.sampling,
            "fingerprint": item.fingerprint,
            "weights": item.weights,
            "is_judge": item.weights is not None and item.weights == self._judge_hash,
            "started_from_judge": item.started_from is not None and item.started_from == self._judge_weights,
            "seed": item.seed,
            "n": self.n,
            "seconds_per_sample": item.seconds_per_sample,
            "metrics": self.rows[i],
        }

    def samples(self) -> list[dict[str, Any]]:
        """One record a sample and system: the text and its scores."""
        return [
            {
                "id": sample.id,
                "system": item.entry.name,
                "text": item.texts[k],
                **{name: values[k] for name, values in scores.items()},
            }
            for item, scores in zip(self.generations, self.per_sample, strict=True)
            for k, sample in enumerate(self.manifest.samples)
        ]


def _row_of(generations: Sequence[Generations], system: str) -> int:
    for i, item in enumerate(generations):
        if item.entry.system == system:
            return i
    raise ConfigError(f"the row `{system}` is missing: G is measured between `human` and `shuffled`; generate them too")


def _distinct2(texts: Sequence[Sequence[int]]) -> float:
    from evaluation.metrics.diversity import distinct_n

    return distinct_n(texts, 2)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "mauve-text", "faiss-cpu", "rapidfuzz", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found
