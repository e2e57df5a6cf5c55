"""Rows that are seeds of one system: their means, and how far they lie apart."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.table import number


@dataclass(frozen=True)
class Point:
    """A system with one way to sample it, over the seeds it was trained with."""

    group: str
    """The rows' `group`."""
    name: str
    """The group, and what tells this sampling from the group's others."""
    rows: list[dict[str, Any]]
    """The rows of results.json, a seed each."""

    def value(self, key: str) -> tuple[float, float | None] | None:
        """Mean over the seeds and their standard deviation (n - 1; None of one seed); None where a row lacks it."""
        found = [value for row in self.rows if (value := number(row, key)) is not None]
        if len(found) < len(self.rows):
            return None
        return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None


def points(systems: Sequence[dict[str, Any]]) -> list[Point]:
    """The rows that name a group, by group and sampling, in the order of their first rows."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in systems:
        if row.get("group"):
            found.setdefault((row["group"], json.dumps(row["sampling"], sort_keys=True)), []).append(row)
    samplings: dict[str, list[dict[str, Any]]] = {}
    for (group, _), rows in found.items():
        samplings.setdefault(group, []).append(rows[0]["sampling"])
    return [
        Point(group, _name(group, rows[0]["sampling"], samplings[group]), rows) for (group, _), rows in found.items()
    ]


def _name(group: str, sampling: dict[str, Any], others: list[dict[str, Any]]) -> str:
    keys = {key for other in others for key in other}
    apart = sorted(key for key in keys if len({json.dumps(other.get(key)) for other in others}) > 1)
    told = ", ".join(f"{key.replace('_', ' ')} {sampling[key]}" for key in apart if key in sampling)
    return f"{group}, {told}" if told else group
