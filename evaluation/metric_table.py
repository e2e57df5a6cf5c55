"""What all families of metrics share: the texts, the models, and the table that they fill."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from evaluation import statistics
from evaluation.generation import Generated
from evaluation.manifest import Manifest
from evaluation.scoring import Models, ScoreConfig
from megatext.config import ConfigError


class Metric(dict[str, Any]):
    """value, spread (a standard error or an SD over seeds), spread_kind, ci95, n, unit, higher_is_better."""


def metric(
    value: float,
    unit: str,
    n: int,
    better: str | None,
    spread: float = math.nan,
    kind: str | None = None,
    ci95: Any = None,
    **more: Any,
) -> Metric:
    """A number with what is known of it; None stands for what is not a number."""
    finite = math.isfinite(spread)
    return Metric(
        value=value if math.isfinite(value) else None,
        spread=spread if finite else None,
        spread_kind=kind if finite else None,
        ci95=list(ci95) if finite and ci95 is not None else None,
        n=n,
        unit=unit,
        higher_is_better=None if better is None else better == "higher",
        **more,
    )


@dataclass
class Scoring:
    """What all families share: the texts, the models, and the table as it grows."""

    manifest: Manifest
    generations: Sequence[Generated]
    config: ScoreConfig
    models: Models
    cache: Path
    rows: list[dict[str, Metric]] = field(default_factory=list)
    """Metrics of each system, by name."""
    per_sample: list[dict[str, list[Any]]] = field(default_factory=list)
    """Scores of each system's samples, by name."""
    notes: list[str] = field(default_factory=list)
    """Sentences below the table."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """What each family was measured with."""
    unconditional: list[dict[str, Any]] = field(default_factory=list)
    """Passages without a prefix, with their metrics."""

    def __post_init__(self) -> None:
        self.rows = [{} for _ in self.generations]
        self.per_sample = [{} for _ in self.generations]
        self.n = len(self.manifest.samples)
        self.bootstrap = statistics.Bootstrap(self.n, draws=self.config.bootstrap_draws, seed=self.config.seed)
        self.human = self.row_of("human")
        if self.human is None:
            raise ConfigError("the row `human` is missing; run `generate` again, which adds it")

    def row_of(self, system: str) -> int | None:
        """The place of a sanity row."""
        return next((i for i, item in enumerate(self.generations) if item.entry.system == system), None)

    def add(self, i: int, name: str, values: Sequence[float], unit: str, better: str | None, **more: Any) -> None:
        """A mean over samples with its bootstrap error, and the samples' own scores."""
        se, ci = statistics.spread(self.bootstrap.mean(values))
        mean = float(np.mean(values))
        self.rows[i][name] = metric(mean, unit, self.n, better, se, "bootstrap standard error", ci, **more)
        self.per_sample[i][name] = list(values)

    @cached_property
    def targets(self) -> list[str]:
        return [sample.target for sample in self.manifest.samples]

    def progress(self, what: str, total: int) -> Any:
        return tqdm(total=total, desc=what, disable=None)


def pooled_metric(
    scoring: Scoring, i: int, name: str, rows: Any, budget: int, statistic: Callable[[Any], float], unit: str
) -> None:
    """A statistic of a system's pooled tokens, at the same number of tokens for every system."""
    from evaluation.metrics.diversity import cut_to_budget

    pool = cut_to_budget(rows, budget)
    total = sum(map(len, pool))
    value, error = math.nan, math.nan
    if total:
        value, error = statistic(pool), statistics.jackknife_error(pool, statistic)
    scoring.rows[i][name] = metric(
        value, unit, scoring.n, None, error, "jackknife standard error", tokens=total, below_budget=total < budget
    )
