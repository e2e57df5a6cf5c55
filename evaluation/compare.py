"""The compare stage: systems on the same samples, paired with one of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.cache import Cache, key_of
from evaluation.files import read_jsonl
from evaluation.manifest import load_manifest
from evaluation.scorers import feature_key, feature_texts
from evaluation.scoring import load_results
from evaluation.statistics import holm, paired
from evaluation.table import BY_KEY
from megatext.config import ConfigError
from megatext.data import DataError

if TYPE_CHECKING:
    from evaluation.metrics.mauve import MauveDifference

PAIRED = ("rouge1", "rouge2", "rougeL", "bertscore", "nll", "repetition4")
"""Metrics that every sample has of its own."""
_SCORED_ALIKE = (
    "dtype", "stem", "bertscore_layer", "bertscore_idf", "mauve_seeds", "mauve_text",
)  # fmt: skip


def compare(rows: Sequence[tuple[Path, str]], *, cache: Path | None = None, seed: int = 0) -> dict[str, Any]:
    """Differences of each row but the last from the last one. A row is (output directory, system).

    Raises DataError for results of different manifests, models, settings or lengths: their numbers do not compare.
    MAUVE's difference needs the features that scoring left in the cache (of the first directory if not given), and is
    left out without them."""
    results = [load_results(path) for path, _ in rows]
    for path, other in zip([path for path, _ in rows[1:]], results[1:], strict=True):
        _refuse(results[0], other, rows[0][0], path)
    sides = [_samples(path, name) for path, name in rows]
    found: list[dict[str, Any]] = []
    notes: list[str] = []
    # Rows of one name in two directories are told apart by their directories.
    names = [name if len({n for _, n in rows}) == len(rows) else f"{path}:{name}" for path, name in rows]
    for (path, _), name, side in zip(rows[:-1], names[:-1], sides[:-1], strict=True):
        for metric in PAIRED:
            values = [
                (left[metric], right[metric])
                for key, left in side.items()
                if left.get(metric) is not None and (right := sides[-1][key]).get(metric) is not None
            ]
            if len(values) > 1:
                d = paired([x for x, _ in values], [y for _, y in values], seed=seed)
                found.append({
                    "system": name, "metric": metric, "n": len(values), "difference": d.mean, "ci95": list(d.ci95),
                    "p": d.p, "wins": d.wins, "test": "sign flips",
                })  # fmt: skip
        mauve = _mauve(
            results[0], rows[0][0], (cache or path / "cache", side), (cache or rows[-1][0] / "cache", sides[-1])
        )
        if isinstance(mauve, str):
            notes.append(f"{name}: no difference of MAUVE, {mauve}")
        else:
            margin = 100 * 1.96 * mauve.error
            found.append({
                "system": name, "metric": "mauve", "n": len(side), "difference": 100 * mauve.mean,
                "ci95": [100 * mauve.mean - margin, 100 * mauve.mean + margin], "p": mauve.p, "wins": None,
                "test": "normal, error of clusters and texts",
            })  # fmt: skip
    for row, p in zip(found, holm([row["p"] for row in found]), strict=True):
        row["p_holm"] = p
    return {
        "baseline": names[-1], "manifest": results[0]["manifest"]["hash"], "seed": seed, "differences": found,
        "notes": notes,
    }  # fmt: skip


def comparison_table(comparison: dict[str, Any]) -> str:
    """The comparison with aligned columns, for a terminal."""
    rows = comparison["differences"]
    width = max([6, *(len(row["system"]) for row in rows)])
    lines = [
        f"minus {comparison['baseline']}, paired over samples, manifest {comparison['manifest'][:12]}",
        f"{'system':<{width}} {'metric':<10} {'n':>5} {'difference':>11} {'95 % interval':>20} {'p':>8} "
        f"{'p (Holm)':>9} {'wins':>6}",
    ]
    for row in rows:
        interval = f"{row['ci95'][0]:.3f} to {row['ci95'][1]:.3f}"
        wins = "-" if row["wins"] is None else f"{row['wins']:.1%}"
        lines.append(
            f"{row['system']:<{width}} {BY_KEY[row['metric']].heading:<10} {row['n']:>5} {row['difference']:>11.3f} "
            f"{interval:>20} {_p(row['p']):>8} {_p(row['p_holm']):>9} {wins:>6}"
        )
    lines.append(f"p (Holm) holds for all {len(rows)} lines together; wins are samples, ties count half.")
    if any(row["metric"] == "mauve" for row in rows):
        lines.append("MAUVE: all three texts clustered together; interval and p by the normal approximation.")
    return "\n".join([*lines, *comparison["notes"]])


def _p(value: float) -> str:
    return "< 0.0001" if value < 0.00005 else f"{value:.4f}"


def _refuse(first: dict[str, Any], other: dict[str, Any], path: Path, other_path: Path) -> None:
    def differ(what: str, a: Any, b: Any) -> None:
        if a != b:
            both = f"{str(a)[:40]}, {str(b)[:40]}"
            raise DataError(f"{path} and {other_path}: different {what} are never compared ({both})")

    differ("manifests", first["manifest"]["hash"][:12], other["manifest"]["hash"][:12])
    differ("length rules", first["length"], other["length"])
    for role in first["models"].keys() & other["models"].keys():
        weights = (results["models"][role]["weights"][:12] for results in (first, other))
        differ(f"{role.replace('_', ' ')}s", *weights)
    for key in _SCORED_ALIKE:
        differ(f"settings of {key}", first["config"][key], other["config"][key])


def _samples(path: Path, name: str) -> dict[str, dict[str, Any]]:
    records = {record["id"]: record for record in read_jsonl(path / "samples.jsonl") if record["system"] == name}
    if not records:
        known = [system["name"] for system in load_results(path)["systems"]]
        raise ConfigError(f"{path}: no system {name!r}; its systems are {', '.join(known)}")
    return records


Side = tuple[Path, dict[str, dict[str, Any]]]
"""A row's cache and its samples by id."""


def _mauve(results: dict[str, Any], directory: Path, a: Side, b: Side) -> "MauveDifference | str":
    """The difference of two rows, or why there is none."""
    from evaluation.metrics.mauve import difference

    if "mauve" not in results["parameters"]:
        return "MAUVE was not scored"
    config, samples = results["config"], load_manifest(directory).samples
    where = feature_key(results["models"]["featuriser"]["weights"], config["dtype"])
    sets = []
    for folder, texts in (
        (a[0], [sample.target for sample in samples]),
        *((folder, [side[sample.id]["text"] for sample in samples]) for folder, side in (a, b)),
    ):
        cache = Cache(folder, *where)
        keys = [key_of(text) for text in feature_texts(samples, texts, config["mauve_text"])]
        if cache.missing(keys):
            return f"its features are not in {folder}: give --cache DIR, or score again"
        sets.append(cache.stacked(keys))
    return difference(*sets, seeds=config["mauve_seeds"])
