"""The score stage: every metric of every system, with n, spread and what it was measured with."""

import hashlib
import json
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from evaluation.files import atomic_write, hash_of, hash_of_code, hash_of_file, hash_of_model
from evaluation.generation import Generated, refuse_other_manifests
from evaluation.hub import scoring_model
from evaluation.manifest import Manifest, load_manifest
from megatext.config import ConfigError
from megatext.data import DataError

SCHEMA = 5
METRICS = ("rouge", "bertscore", "mauve", "perplexity", "diversity")


@dataclass(frozen=True)
class ScoreConfig:
    """How texts are scored. All of it is in results.json."""

    metrics: tuple[str, ...] = METRICS
    """Of: rouge, bertscore, mauve, perplexity, diversity."""
    judge: str = "openai-community/gpt2-large"
    """Hugging Face causal LM, a directory or a name on the hub: generative perplexity, G, entropy, repetition."""
    featuriser: str = "openai-community/gpt2-large"
    """Hugging Face model whose last hidden state MAUVE clusters."""
    bertscore_model: str = "FacebookAI/roberta-large"
    """Hugging Face model whose token states BERTScore matches."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of these models. bf16 is several times faster where the machine has it; compare like with like."""
    stem: bool = False
    """ROUGE on Porter stems. The papers of the field do not say; rouge-score's default is off."""
    bertscore_layer: int | None = None
    """Hidden layer, counted from 1; None: the published choice for known models, else 0.7 of the depth."""
    bertscore_idf: bool = False
    """Weigh tokens by their rarity among the references."""
    bertscore_baseline: Path | None = None
    """bert-score's .tsv of the model, to rescale to; known models have theirs built in."""
    mauve_seeds: tuple[int, ...] = tuple(range(25, 35))
    """k-means seeds; 25 is mauve-text's own."""
    mauve_text: Literal["continuation", "whole"] = "continuation"
    """What MAUVE compares: the continuations, or prefix and continuation."""
    mauve_min_samples: int = 100
    """MAUVE of fewer samples is refused: it measures n, not text."""
    bootstrap_draws: int = 10_000
    """Resamples for standard errors and intervals."""
    seed: int = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.metrics) - set(METRICS))
        if unknown or not self.metrics:
            raise ConfigError(f"--metrics {','.join(unknown)}: not known; known are {', '.join(METRICS)}")
        if not self.mauve_seeds:
            raise ConfigError("--mauve-seeds: needs one seed at least")
        if self.bertscore_baseline is not None and not self.bertscore_baseline.is_file():
            raise ConfigError(f"--bertscore-baseline {self.bertscore_baseline}: no such file")
        if "mauve" in self.metrics and find_spec("mauve") is None:
            raise ConfigError("MAUVE needs mauve-text: pip install mauve-text, or score with --metrics without mauve")


class Model:
    """A directory, its hash, and what is loaded of it when first asked for."""

    def __init__(self, directory: Path, name: str, *, device: str, dtype: str) -> None:
        self.directory, self._name, self._device, self._dtype = directory, name, device, dtype

    @cached_property
    def weights(self) -> str:
        """hash_of_model."""
        return hash_of_model(self.directory)

    @cached_property
    def judge(self) -> Any:
        from evaluation.metrics.perplexity import Judge

        return Judge(self.directory, device=self._device, dtype=self._torch_dtype)

    @cached_property
    def encoder(self) -> Any:
        from evaluation.metrics.encoder import Encoder

        trunk = self.judge.model.base_model if "judge" in self.__dict__ else None
        return Encoder(self.directory, device=self._device, dtype=self._torch_dtype, model=trunk, name=self._name)

    @property
    def _torch_dtype(self) -> Any:
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self._dtype]


class Models:
    """The models that a scoring of n samples needs; roles that one directory plays share it. Raises ConfigError where
    one is neither here nor on the hub."""

    def __init__(self, config: ScoreConfig, n: int, device: str) -> None:
        opened: dict[Path, Model] = {}
        self.used: dict[str, Model] = {}
        for role, family, option in (
            ("judge", "perplexity", "--judge"),
            ("featuriser", "mauve", "--featuriser"),
            ("bertscore_model", "bertscore", "--bertscore-model"),
        ):
            if family in config.metrics and not (family == "mauve" and n < config.mauve_min_samples):
                given = getattr(config, role)
                directory = scoring_model(given, option).resolve()
                if directory not in opened:
                    opened[directory] = Model(directory, Path(given).name, device=device, dtype=config.dtype)
                self.used[role] = opened[directory]

    @property
    def judge(self) -> Model:
        return self.used["judge"]

    @property
    def featuriser(self) -> Model:
        return self.used["featuriser"]

    @property
    def bertscore(self) -> Model:
        return self.used["bertscore_model"]


def score(
    manifest: Manifest,
    generations: Sequence[Generated],
    config: ScoreConfig,
    output: Path,
    *,
    cache: Path,
    device: str = "cpu",
) -> dict[str, Any]:
    """Score and write `results.json` and `samples.jsonl`; returns the results. Equal inputs are not scored again."""
    from evaluation.metric_table import Scoring
    from evaluation.scorers import FAMILIES, likelihood

    refuse_other_manifests(generations, manifest, output)
    for what in ("seed", "length"):
        if len({str(getattr(item, what)) for item in generations}) > 1:
            raise DataError(f"the rows were generated with different {what}s; run `generate` again")
    models = Models(config, len(manifest.samples), device)
    weights = {role: model.weights for role, model in models.used.items()}
    code = hash_of_code(Path(__file__).parent)
    baseline = hash_of_file(config.bertscore_baseline) if config.bertscore_baseline else None
    key = hash_of([manifest.hash, [asdict(g) for g in generations], _plain(config), weights, baseline, code])
    path = output / "results.json"
    if path.exists():
        stored = json.loads(path.read_text())
        written = output / "samples.jsonl"
        if stored.get("inputs_hash") == key and written.exists() and hash_of_file(written) == stored["samples_hash"]:
            return stored
    scoring = Scoring(manifest, generations, config, models, cache)
    timings: dict[str, float] = {}
    for name, family in FAMILIES.items():
        if name in config.metrics:
            began = time.perf_counter()
            family(scoring)
            timings[name] = round(time.perf_counter() - began, 2)
    likelihood(scoring)
    samples = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in _samples(scoring))
    results = {
        "schema_version": SCHEMA,
        "command": shlex.join(["python", "-m", "evaluation", *sys.argv[1:]]),
        "inputs_hash": key,
        "samples_hash": hashlib.sha256(samples.encode()).hexdigest(),
        "manifest": {
            **manifest.task,
            "hash": manifest.hash,
            "n": len(manifest.samples),
            "others": len(manifest.others),
        },
        "models": {role: {"name": getattr(config, role), "weights": found} for role, found in weights.items()},
        "config": _plain(config),
        "config_hash": hash_of(_plain(config)),
        "seed": generations[0].seed,
        "length": asdict(generations[0].length),
        "notes": scoring.notes,
        "parameters": scoring.parameters,
        "seconds": timings,
        "device": device,
        "versions": _versions(),
        "systems": [_row(scoring, i, weights.get("judge")) for i in range(len(generations))],
        "unconditional": scoring.unconditional,
        "traces": _traces(manifest, generations),
    }
    atomic_write(output / "samples.jsonl", samples)
    atomic_write(path, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return results


def load_results(output: Path) -> dict[str, Any]:
    """Read output/results.json. Raises DataError if it is missing, of another version, of another manifest than lies
    beside it, or of other texts."""
    path = output / "results.json"
    if not path.is_file():
        raise DataError(f"{path}: no such file; run `python -m evaluation score --output {output}` first")
    results = json.loads(path.read_text())
    if results.get("schema_version") != SCHEMA:
        raise DataError(f"{path}: written by another version of the harness; score again")
    manifest = load_manifest(output)
    if results["manifest"]["hash"] != manifest.hash:
        raise DataError(
            f"{path}: scored on manifest {results['manifest']['hash'][:12]}, not on {manifest.hash[:12]}; score again"
        )
    samples = output / "samples.jsonl"
    if not samples.is_file() or hash_of_file(samples) != results["samples_hash"]:
        raise DataError(f"{samples}: not the texts that {path} was made from; score again")
    return results


def _plain(config: ScoreConfig) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}


def _row(scoring: Any, i: int, judge: str | None) -> dict[str, Any]:
    from megatext.recipes.pretrained import weights_hash

    item: Generated = scoring.generations[i]
    started = False
    if judge is not None and item.started_from is not None:
        started = item.started_from == weights_hash(scoring.models.judge.directory)
    return {
        "name": item.entry.name,
        "system": item.entry.system,
        "sampling": item.entry.sampling,
        "sampled_by": item.sampled_by,
        "likelihood_by": item.entry.likelihood_by,
        "group": item.entry.group,
        "dtype": item.entry.dtype,
        "batch_size": item.entry.batch_size,
        "fingerprint": item.fingerprint,
        "weights": item.weights,
        "is_judge": item.weights is not None and item.weights == judge,
        "started_from_judge": started,
        "training_flops": item.training_flops,
        "prefixes_cut": item.prefixes_cut,
        "n": scoring.n,
        "seconds_per_sample": item.seconds_per_sample,
        "metrics": scoring.rows[i],
    }


def _traces(manifest: Manifest, generations: Sequence[Generated]) -> list[dict[str, Any]]:
    """What systems had to read after every step, of the samples that were traced."""
    return [
        {"name": item.entry.name, "prefix": sample.prefix, "steps": steps}
        for item in generations
        for sample, steps in zip(manifest.samples, item.traces, strict=False)
        if steps
    ]


def _samples(scoring: Any) -> list[dict[str, Any]]:
    """One record a sample and system: the text and its scores."""
    return [
        {
            "id": sample.id,
            "system": item.entry.name,
            "text": item.texts[k],
            **{name: values[k] for name, values in scores.items()},
        }
        for item, scores in zip(scoring.generations, scoring.per_sample, strict=True)
        for k, sample in enumerate(scoring.manifest.samples)
    ]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "mauve-text", "faiss-cpu", "rapidfuzz", "nltk", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found
