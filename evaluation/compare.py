"""The compare stage: two systems on the same samples, paired."""

from pathlib import Path
from typing import Any

from evaluation.files import read_jsonl
from evaluation.report import load_results
from evaluation.statistics import holm, paired
from megatext.config import ConfigError
from megatext.data import DataError

PAIRED = ("nll", "rouge1", "rouge2", "rougeL", "bertscore")


def compare(a: tuple[Path, str], b: tuple[Path, str], *, seed: int = 0) -> dict[str, Any]:
    """Differences a - b of every per-sample metric both have. Each side is (output directory, row).

    Raises DataError for results of different manifests, judges or featurisers: their numbers do not compare.
    """
    results = [load_results(path) for path, _ in (a, b)]
    for what, key in (("manifest", "hash"), ("judge", "weights"), ("featuriser", "weights")):
        first, second = (result[what][key] for result in results)
        if first != second:
            raise DataError(f"{a[0]} and {b[0]}: different {what}s ({first[:12]}, {second[:12]}) are never compared")
    sides = [_samples(path, name) for path, name in (a, b)]
    rows = []
    for metric in PAIRED:
        values = [
            (left[metric], right[metric])
            for key, left in sides[0].items()
            if left.get(metric) is not None and (right := sides[1][key]).get(metric) is not None
        ]
        if len(values) > 1:
            rows.append((metric, len(values), paired([x for x, _ in values], [y for _, y in values], seed=seed)))
    adjusted = holm([difference.p for _, _, difference in rows])
    return {
        "a": a[1], "b": b[1], "manifest": results[0]["manifest"]["hash"], "seed": seed,
        "metrics": {
            name: {"n": n, "difference": d.mean, "ci95": list(d.ci95), "p": d.p, "p_holm": p, "wins": d.wins}
            for (name, n, d), p in zip(rows, adjusted, strict=True)
        },
    }  # fmt: skip


def comparison_table(comparison: dict[str, Any]) -> str:
    """The comparison with aligned columns, for a terminal."""
    lines = [f"{comparison['a']} - {comparison['b']}, paired over samples, manifest {comparison['manifest'][:12]}"]
    heads = f"{'metric':<10} {'n':>5} {'difference':>11} {'95 % interval':>20} {'p':>8} {'p (Holm)':>9} {'wins':>6}"
    lines.append(heads)
    for name, row in comparison["metrics"].items():
        interval = f"{row['ci95'][0]:.3f} to {row['ci95'][1]:.3f}"
        lines.append(
            f"{name:<10} {row['n']:>5} {row['difference']:>11.3f} {interval:>20} {row['p']:>8.4f} "
            f"{row['p_holm']:>9.4f} {row['wins']:>6.1%}"
        )
    return "\n".join(lines)


def _samples(path: Path, name: str) -> dict[str, dict[str, Any]]:
    directory = path if path.is_dir() else path.parent
    records = {record["id"]: record for record in read_jsonl(directory / "samples.jsonl") if record["system"] == name}
    if not records:
        known = [system["name"] for system in load_results(path)["systems"]]
        raise ConfigError(f"{path}: no system {name!r}; its systems are {', '.join(known)}")
    return records
