"""Rows of one group and sampling as seeds of one system: means, deviations, names, table and curve."""

import math
from typing import Any

import pytest

from evaluation import plots, report
from evaluation.manifest import Manifest
from evaluation.report import TaskResults
from evaluation.seeds import points


def row(
    name: str, group: str = "", gap: float | None = 0.5, system: str = "model:x", **sampling: Any
) -> dict[str, Any]:
    values = {"gap": gap, "entropy": 4.0, "distinct2": 0.5, "mauve": 10.0}
    metrics = {key: {"value": value, "spread": 0.01} for key, value in values.items()}
    found = {"name": name, "system": system, "group": group, "sampling": sampling, "metrics": metrics}
    return found | {"seconds_per_sample": None, "is_judge": False, "started_from_judge": False}


ROWS = [
    row("human", gap=0.0, system="human"),
    row("a0 w=1", "a", 0.2, guidance_scale=1.0, steps=4),
    row("a0 w=3", "a", 0.5, guidance_scale=3.0, steps=4),
    row("b", "b", 0.7),
    row("a1 w=1", "a", 0.4, steps=4, guidance_scale=1.0),
    row("a1 w=3", "a", None, guidance_scale=3.0, steps=4),
    row("a2 w=1", "a", 0.9, guidance_scale=1.0, steps=4),
]


def test_rows_of_a_group_and_a_sampling_are_seeds() -> None:
    low, high, b = points(ROWS)
    assert [len(p.rows) for p in (low, high, b)] == [3, 2, 1]
    assert (low.name, high.name, b.name) == ("a, guidance scale 1.0", "a, guidance scale 3.0", "b")
    mean, deviation = low.value("gap") or (0.0, 0.0)
    assert mean == 0.5 and math.isclose(deviation or 0, math.sqrt((0.3**2 + 0.1**2 + 0.4**2) / 2))
    assert high.value("gap") is None  # one seed has none: no mean of the rest
    assert b.value("gap") == (0.7, None)
    assert points(ROWS[:1]) == []


def test_a_report_has_their_table_and_their_curves() -> None:
    results = {"systems": ROWS, "notes": []}
    task = TaskResults("mine", Manifest({}, "", [], []), results, {})
    table = report._seeds_table(task)
    assert table is not None
    texts = report.markdown(table)
    assert "| a, guidance scale 1.0 | 3 | 0.500 (±0.361) |" in texts and "| b | 1 | 0.700 |" in texts
    assert report._seeds_table(TaskResults("none", task.manifest, {"systems": ROWS[:1], "notes": []}, {})) is None
    assert (plots.quality_plot(results) or b"").startswith(b"\x89PNG")


def test_gaps_are_drawn_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plots, "to_png", lambda figure: figures.append(figure) or b"")
    rows = [row("x", "far", 0.9), row("y", "near", 0.1), row("z", "near", 0.3), row("human", gap=0.0, system="human")]
    plots.gaps_plot({"systems": rows})
    gaps, entropies = figures[0].axes
    assert [label.get_text() for label in gaps.get_yticklabels()] == ["far", "near"]  # the lowest on top
    dots = {line.get_ydata()[0]: line.get_xdata()[0] for line in gaps.lines if len(line.get_xdata()) == 1}
    assert dots == {0: pytest.approx(0.9), 1: pytest.approx(0.2)}
    assert gaps.get_xlabel() == "judge gap G" and entropies.get_xlabel().startswith("unigram entropy")
    assert plots.gaps_plot({"systems": rows[3:]}) is None
