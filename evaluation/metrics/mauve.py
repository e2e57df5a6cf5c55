"""MAUVE (Pillutla et al. 2021) by mauve-text, on features of our own, over several k-means seeds, with its error."""

import contextlib
import io
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType

import numpy as np

SCALING = 5
"""mauve-text's c; it sets the floor."""
FLOOR = 1 / math.comb(2 * SCALING, SCALING)
"""What two texts without a common cluster get: 1/252 = 0.00397 for c = 5."""
_MIXTURES = np.linspace(1e-6, 1 - 1e-6, 25)
_DRAWS = 500


@dataclass(frozen=True)
class Mauve:
    """MAUVE of one system, a share in [FLOOR, 1]. Comparable at equal n only."""

    mean: float
    """Mean over the k-means seeds."""
    seed_sd: float
    """Standard deviation over the seeds; as large as the gaps between published systems in the middle of the range."""
    sampling_sd: float
    """Standard deviation over resampled texts in fixed clusters; a bootstrap that clusters again is biased upwards."""
    seed25: float
    """The value of mauve-text's default seed, which is what papers print."""
    star_mean: float
    """Mean of MAUVE* (smoothed histograms)."""
    clusters: int
    """k of k-means: n / 10."""
    seeds: int
    """Number of k-means seeds."""

    @property
    def error(self) -> float:
        """Standard error of the mean over seeds: of the seeds (SD / sqrt of their number) and of the choice of texts,
        in quadrature. Measured by drawing both sets anew 40 times: 1.0 to 1.24 times the true spread."""
        return math.hypot(self.seed_sd / math.sqrt(self.seeds), self.sampling_sd)


@dataclass(frozen=True)
class MauveDifference:
    """MAUVE of system a minus system b against the same human texts, all three clustered together."""

    mean: float
    """Mean over the k-means seeds."""
    error: float
    """Standard error as of `Mauve`, over resampled samples that are the same for all three."""

    @property
    def p(self) -> float:
        """Two-sided p-value of no difference, by the normal approximation."""
        return math.erfc(abs(self.mean) / (self.error * math.sqrt(2))) if self.error else float(self.mean == 0)


def mauve(human: np.ndarray, system: np.ndarray, *, seeds: Sequence[int]) -> Mauve:
    """Compare features [n, width] of human and system texts, rows in the order of the manifest (order moves k-means).

    The first seed should be 25 to be comparable with papers.
    """
    module = _module()
    human, system = _float32(human), _float32(system)
    with _one_thread(), _silent_stderr():
        runs = [
            module.compute_mauve(p_features=human, q_features=system, seed=seed, mauve_scaling_factor=SCALING)
            for seed in seeds
        ]
        sampling = float(_resampled([human, system], seeds[0])[0].std(ddof=1))
    values = [float(run.mauve) for run in runs]
    return Mauve(
        mean=float(np.mean(values)),
        seed_sd=float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
        sampling_sd=sampling,
        seed25=values[list(seeds).index(25)] if 25 in seeds else values[0],
        star_mean=float(np.mean([run.mauve_star for run in runs])),
        clusters=runs[0].num_buckets,
        seeds=len(values),
    )


def difference(human: np.ndarray, a: np.ndarray, b: np.ndarray, *, seeds: Sequence[int]) -> MauveDifference:
    """MAUVE(a) - MAUVE(b) with its uncertainty, for features [n, width] of the same samples."""
    sets = [_float32(human), _float32(a), _float32(b)]
    with _one_thread(), _silent_stderr():
        values = []
        for seed in seeds:
            p, q, r = _histograms(quantise(sets, seed))
            values.append(float(area(p, q) - area(p, r)))
        first, second = _resampled(sets, seeds[0])
    seed_sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    error = math.hypot(seed_sd / math.sqrt(len(values)), float((first - second).std(ddof=1)))
    return MauveDifference(float(np.mean(values)), error)


def quantise(sets: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """Cluster labels [n] of each set of features [n, width], all clustered together into n / 10 clusters.

    As MAUVE does it: rows of length 1, principal components that hold 90 % of the variance, k-means with 5 restarts.
    For two sets, human first, these are mauve-text's own clusters."""
    import faiss
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import normalize

    clusters = max(2, round(min(map(len, sets)) / 10))
    rows = normalize(np.vstack(sets[::-1]), norm="l2", axis=1)
    components = PCA(n_components=None, random_state=seed + 1).fit(rows)
    kept = int(np.argmax(np.cumsum(components.explained_variance_ratio_) >= 0.9)) + 1
    data = _float32(components.transform(rows)[:, :kept])
    kmeans = faiss.Kmeans(kept, clusters, niter=500, nredo=5, update_index=True, seed=seed + 2)
    kmeans.train(data)
    labels = kmeans.index.search(data, 1)[1].reshape(-1)
    bounds = np.cumsum([len(rows) for rows in sets[::-1]])[:-1]
    return [*np.split(labels, bounds)][::-1]


def area(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """MAUVE of histograms [..., clusters]: the area under the divergence curve (their equations 1 and 2)."""
    mixtures = _MIXTURES[:, *[None] * p.ndim]
    mixed = mixtures * p + (1 - mixtures) * q
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = (np.exp(-SCALING * np.where(one > 0, one * np.log(one / mixed), 0.0).sum(axis=-1)) for one in (q, p))
    zero, one = np.zeros_like(x[:1]), np.ones_like(x[:1])
    # From all weight on q (x = 0 there is the human end) to all on p; x falls and y rises along the curve.
    x, y = np.concatenate([one, x, zero]), np.concatenate([zero, y, one])
    return 0.5 * (np.abs(_trapezoid(y, x)) + np.abs(_trapezoid(x, y)))


def _trapezoid(values: np.ndarray, along: np.ndarray) -> np.ndarray:
    return ((values[1:] + values[:-1]) / 2 * np.diff(along, axis=0)).sum(axis=0)


def _resampled(sets: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """MAUVE [draws] of each set but the first against the first, over resampled samples in fixed clusters."""
    labels = quantise(sets, seed)
    n, clusters = len(labels[0]), int(max(map(np.max, labels))) + 1
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=_DRAWS) / n
    histograms = [weights @ np.eye(clusters)[rows] for rows in labels]
    return [area(histograms[0], histogram) for histogram in histograms[1:]]


def _histograms(labels: Sequence[np.ndarray]) -> list[np.ndarray]:
    clusters = int(max(map(np.max, labels))) + 1
    return [np.bincount(rows, minlength=clusters) / len(rows) for rows in labels]


def _float32(features: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(features, dtype=np.float32)


def _module() -> ModuleType:
    try:
        import mauve
    except ImportError:
        raise ImportError(
            "MAUVE needs mauve-text: pip install mauve-text, or score with --metrics without mauve"
        ) from None
    return mauve


def _one_thread() -> AbstractContextManager[object]:
    """One thread for faiss and for the linear algebra of the principal components: faster on small sets, and the number
    of threads moves the last digits."""
    import faiss  # noqa: F401 (limits hold for libraries that are loaded)
    import sklearn.decomposition  # noqa: F401
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """faiss warns about 20 points a cluster (MAUVE's own choice) at every redo, from C++, straight to file 2."""
    try:
        sys.stderr.flush()
        saved = os.dup(2)
    except (OSError, io.UnsupportedOperation):
        yield
        return
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
