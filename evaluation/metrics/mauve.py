"""MAUVE (Pillutla et al. 2021) by mauve-text, on features of our own, over several k-means seeds."""

import contextlib
import io
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

SCALING = 5
"""mauve-text's c; it sets the floor."""
FLOOR = 1 / math.comb(2 * SCALING, SCALING)
"""What two texts without a common cluster get: 1/252 = 0.00397 for c = 5."""


@dataclass(frozen=True)
class Mauve:
    """MAUVE of one system, a share in [FLOOR, 1]. Comparable at equal n only."""

    mean: float
    """Mean over the k-means seeds."""
    seed_sd: float
    """Standard deviation over the seeds; as large as the gaps between published systems in the middle of the range."""
    seed25: float
    """The value of mauve-text's default seed, which is what papers print."""
    star_mean: float
    """Mean of MAUVE* (smoothed histograms)."""
    clusters: int
    """k of k-means: n / 10."""


def mauve(human: np.ndarray, system: np.ndarray, *, seeds: Sequence[int]) -> Mauve:
    """Compare features [n, width] of human and system texts, rows in the order of the manifest (order moves k-means).

    The first seed should be 25 to be comparable with papers. faiss runs on one thread: faster on small sets, and
    the value does not depend on the machine.
    """
    module = _module()
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        with _silent_stderr():
            runs = [
                module.compute_mauve(
                    p_features=np.ascontiguousarray(human, dtype=np.float32),
                    q_features=np.ascontiguousarray(system, dtype=np.float32),
                    seed=seed,
                    mauve_scaling_factor=SCALING,
                )
                for seed in seeds
            ]
    finally:
        faiss.omp_set_num_threads(threads)
    values = [float(run.mauve) for run in runs]
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    seed25 = values[list(seeds).index(25)] if 25 in seeds else values[0]
    return Mauve(
        float(np.mean(values)), spread, seed25, float(np.mean([r.mauve_star for r in runs])), runs[0].num_buckets
    )


def _module() -> ModuleType:
    try:
        import mauve
    except ImportError:
        raise ImportError(
            "MAUVE needs mauve-text: pip install mauve-text, or score with --metrics without mauve"
        ) from None
    return mauve


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
