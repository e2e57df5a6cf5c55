"""The compute multiplier on curves that are known."""

from typing import Any

import pytest

from evaluation.multiplier import multiplier_table, multipliers
from megatext.data import DataError


def row(
    group: str, pflops: float, gap: float, entropy: float, sampling: dict[str, Any] | None = None
) -> dict[str, Any]:
    metrics = {"gap": {"value": gap}, "entropy": {"value": entropy}}
    sampling = sampling or {}
    return {
        "name": f"{group} {gap}",
        "group": group,
        "sampling": sampling,
        "training_flops": pflops * 1e15,
        "metrics": metrics,
    }


def baseline(budget: float, gap: float) -> list[dict[str, Any]]:
    """At entropies 5 and 6, G falls by 0.2 a nat."""
    return [row(f"AR {budget}", budget, gap - 0.2 * (6 - h), h, {"temperature": h}) for h in (5.0, 6.0)]


def test_a_system_between_two_budgets_and_two_temperatures() -> None:
    """G of the baseline at entropy 5.5 is .4 at 1, .2 at 16 PFLOPs: .3 is half way, at 4."""
    rows = [*baseline(1, 0.5), *baseline(16, 0.3), row("ours", 12, 0.3, 5.5)]
    (found,) = multipliers({"systems": rows}, ["AR 16", "AR 1"])
    assert found.value == pytest.approx(3.0) and found.relation == "="
    assert "= 3.00" in multiplier_table([found])


def test_means_over_seeds_come_first() -> None:
    rows = [*baseline(1, 0.5), *baseline(16, 0.3), row("ours", 8, 0.2, 5.4), row("ours", 8, 0.4, 5.6)]
    (found,) = multipliers({"systems": rows}, ["AR 1", "AR 16"])
    assert (found.gap, found.entropy) == (pytest.approx(0.3), pytest.approx(5.5)) and found.value == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("gap", "entropy", "relation", "value"),
    [
        (0.9, 5.5, ">", 12.0),
        (0.05, 5.5, "<", 0.75),
        (0.3, 4.8, "?", None),
        (0.35, 6.05, "=", None),
        (0.4, 5.5, "=", 12.0),
    ],
)
def test_beyond_what_was_measured_a_bound(gap: float, entropy: float, relation: str, value: float | None) -> None:
    rows = [*baseline(1, 0.5), *baseline(16, 0.3), row("ours", 12, gap, entropy)]
    (found,) = multipliers({"systems": rows}, ["AR 1", "AR 16"])
    assert found.relation == relation
    if value is not None or relation == "?":
        assert found.value == (None if value is None else pytest.approx(value))


def test_what_is_missing_is_told() -> None:
    with pytest.raises(DataError, match="no row has this group"):
        multipliers({"systems": baseline(1, 0.5)}, ["AR 2"])
    rows = [*baseline(1, 0.5), {**row("ours", 1, 0.4, 5.5), "training_flops": None}, row("theirs", 1, 0.4, 5.5)]
    assert [each.name for each in multipliers({"systems": rows}, ["AR 1"])] == ["theirs"]
    with pytest.raises(DataError, match="ours: no training_pflops"):
        multipliers({"systems": rows}, ["ours"])
