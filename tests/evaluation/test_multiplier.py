"""The compute multiplier on curves that are known."""

import math
from pathlib import Path
from typing import Any

import pytest

from evaluation import plots
from evaluation.__main__ import main
from evaluation.multiplier import multiplier_table, multipliers
from megatext.data import DataError


def row(
    group: str,
    pflops: float,
    gap: float,
    entropy: float,
    sampling: dict[str, Any] | None = None,
    error: float | None = None,
    entropy_error: float = 0.0,
) -> dict[str, Any]:
    metrics = {"gap": {"value": gap, "spread": error}, "entropy": {"value": entropy, "spread": entropy_error}}
    sampling = sampling or {}
    return {
        "name": f"{group} {gap}",
        "group": group,
        "sampling": sampling,
        "training_flops": pflops * 1e15,
        "metrics": metrics,
    }


def baseline(budget: float, gap: float, error: float | None = None) -> list[dict[str, Any]]:
    """At entropies 5 and 6, G falls by 0.2 a nat."""
    return [row(f"AR {budget}", budget, gap - 0.2 * (6 - h), h, {"temperature": h}, error) for h in (5.0, 6.0)]


def test_a_system_between_two_budgets_and_two_temperatures() -> None:
    """G of the baseline at entropy 5.5 is .4 at 1, .2 at 16 PFLOPs: .3 is half way, at 4."""
    rows = [*baseline(1, 0.5), *baseline(16, 0.3), row("ours", 12, 0.3, 5.5)]
    (found,) = multipliers({"systems": rows}, ["AR 16", "AR 1"])
    assert found.same.value == pytest.approx(3.0) and found.same.relation == "="
    # within 0.1 nats the baseline is best at 5.4, where it is .02 lower at every budget: .3 is at 16^.45
    assert found.near.value == pytest.approx(12 / 16**0.4) and found.near.relation == "="
    assert f"= 3.00  = {12 / 16**0.4:.2f}" in multiplier_table([found])


def test_means_over_seeds_come_first() -> None:
    rows = [*baseline(1, 0.5), *baseline(16, 0.3), row("ours", 8, 0.2, 5.4), row("ours", 8, 0.4, 5.6)]
    (found,) = multipliers({"systems": rows}, ["AR 1", "AR 16"])
    assert (found.gap, found.entropy) == (pytest.approx(0.3), pytest.approx(5.5)) and found.same.value == pytest.approx(
        2.0
    )


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
    assert found.same.relation == relation
    if value is not None or relation == "?":
        assert found.same.value == (None if value is None else pytest.approx(value))


def test_groups_of_equal_flops_are_one_budget_and_its_frontier_is_their_hull() -> None:
    """Guided, the budget of 16 is .1 lower at 5.5, and from there in a line with its own unguided ends; a sampling
    above the lines changes nothing."""
    guided = [row("guided", 16, 0.1, 5.5, {"guidance_scale": 2.0}), row("guided", 16, 0.9, 5.2)]
    rows = [*baseline(1, 0.5), *baseline(16, 0.3), *guided]
    for gap, entropy, equal in ((0.1, 5.5, 16), (0.2, 5.75, 16), (0.25, 5.5, 16**0.5), (0.1, 5.0, 16)):
        (found,) = multipliers({"systems": [*rows, row("ours", 32, gap, entropy)]}, ["AR 1", "AR 16", "guided"])
        assert found.same.value == pytest.approx(32 / equal), (gap, entropy)
    (near,) = multipliers({"systems": [*rows, row("ours", 32, 0.1, 5.58)]}, ["AR 1", "AR 16", "guided"])
    assert near.same.relation == "<" and near.near.value == pytest.approx(2.0) and near.near.relation == "="


def test_an_error_of_the_entropy_widens_the_interval() -> None:
    """.05 nats are .01 of G here, which is a factor of 1.31 (below)."""
    exact = [*baseline(1, 0.5, 0.0), *baseline(16, 0.3, 0.0)]
    rows = [*exact, row("ours", 12, 0.3, 5.5, error=0.0, entropy_error=0.05)]
    (found,) = multipliers({"systems": rows}, ["AR 1", "AR 16"])
    assert found.same.interval == (pytest.approx(3 / 1.312, rel=0.05), pytest.approx(3 * 1.312, rel=0.05))


def test_an_interval_by_the_errors_of_g() -> None:
    """Log2 of the FLOPs falls by 20 over a G of 1: an error of .01 makes a factor of 2^(.2 x 1.96) = 1.31 (95 %)."""
    exact = [*baseline(1, 0.5, 0.0), *baseline(16, 0.3, 0.0)]
    (found,) = multipliers({"systems": [*exact, row("ours", 12, 0.3, 5.5, error=0.01)]}, ["AR 1", "AR 16"])
    assert found.same.interval == (pytest.approx(3 / 1.312, rel=0.05), pytest.approx(3 * 1.312, rel=0.05))
    assert f"(95 %: {found.same.interval[0]:.2f} to" in multiplier_table([found])
    # the baseline's own errors, the same for both temperatures of a budget: half way between two budgets .02 / sqrt(2)
    rough = [*baseline(1, 0.5, 0.02), *baseline(16, 0.3, 0.02), row("ours", 12, 0.3, 5.5, error=0.0)]
    (found,) = multipliers({"systems": rough}, ["AR 1", "AR 16"])
    assert found.same.interval == (pytest.approx(3 / 1.468, rel=0.1), pytest.approx(3 * 1.468, rel=0.1))


def test_an_interval_of_seeds_and_one_beyond_the_budgets() -> None:
    exact = [*baseline(1, 0.5, 0.0), *baseline(16, 0.3, 0.0)]
    # four seeds .02 apart in standard deviation, whose texts say .001: .02 / 2; whose texts say .01: that, not less
    for step, error in ((0.01732, 0.001), (0.0, 0.01)):
        seeds = [row("ours", 12, 0.3 + sign * step, 5.5, error=error) for sign in (-1, -1, 1, 1)]
        (found,) = multipliers({"systems": [*exact, *seeds]}, ["AR 1", "AR 16"])
        assert found.same.interval == (pytest.approx(3 / 1.312, rel=0.05), pytest.approx(3 * 1.312, rel=0.05))
    (found,) = multipliers({"systems": [*exact, row("ours", 12, 0.395, 5.5, error=0.01)]}, ["AR 1", "AR 16"])
    assert (
        found.same.interval is not None
        and found.same.interval[1] == math.inf
        and " or more)" in multiplier_table([found])
    )
    # a bound is no more certain than what it bounds: its G is .001 above, with an error of .02
    (found,) = multipliers({"systems": [*exact, row("ours", 12, 0.401, 5.5, error=0.02)]}, ["AR 1", "AR 16"])
    assert found.same.relation == ">" and found.same.interval == (pytest.approx(12 / 1.70, rel=0.1), math.inf)
    (found,) = multipliers({"systems": [*exact, row("ours", 12, 0.199, 5.5, error=0.02)]}, ["AR 1", "AR 16"])
    assert found.same.relation == "<" and found.same.interval == (0.0, pytest.approx(0.75 * 1.70, rel=0.1))
    assert f"< 0.75 (95 %: {found.same.interval[1]:.2f} or less)" in multiplier_table([found])
    (found,) = multipliers({"systems": [*exact, row("ours", 12, 0.9, 5.5, error=0.01)]}, ["AR 1", "AR 16"])
    assert found.same.interval == (math.inf, math.inf) and multiplier_table([found]).endswith("> 12.00")
    (found,) = multipliers({"systems": [*exact, row("ours", 12, 0.3, 5.5)]}, ["AR 1", "AR 16"])
    assert found.same.interval is None


def test_the_command_prints_the_table_and_draws_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*baseline(1, 0.5, 0.0), *baseline(16, 0.3, 0.0), row("ours 1", 12, 0.3, 5.5, error=0.01)]
    rows += [row("ours 2", 24, 0.28, 5.5), row("theirs", 5, 0.9, 5.5), row("quiet", 5, 0.9, 1.0)]
    monkeypatch.setattr("evaluation.scoring.load_results", lambda output: {"systems": rows})
    main(["compute", "--output", str(tmp_path), "--baseline", "AR 1", "AR 16"])
    printed = capsys.readouterr().out
    assert "= 3.00" in printed and "> 5.00" in printed and "no baseline at this entropy" in printed
    whole = (tmp_path / "plots" / "multiplier.png").read_bytes()
    main(["compute", "--output", str(tmp_path), "--baseline", "AR 1", "AR 16", "--show", "ours 2"])
    printed = capsys.readouterr().out
    assert "ours 2" in printed and "ours 1" not in printed and "theirs" not in printed
    drawn = (tmp_path / "plots" / "multiplier.png").read_bytes()
    assert whole.startswith(b"\x89PNG") and drawn.startswith(b"\x89PNG") and drawn != whole
    with pytest.raises(SystemExit):
        main(["compute", "--output", str(tmp_path), "--baseline", "AR 1", "AR 16", "--show", "ours"])
    assert "--show ours: no such row; there are: ours 1; ours 2; theirs; quiet" in capsys.readouterr().err


def test_what_is_missing_is_told() -> None:
    with pytest.raises(DataError, match="no row has this group"):
        multipliers({"systems": baseline(1, 0.5)}, ["AR 2"])
    with pytest.raises(DataError, match="AR: its rows differ in FLOPs"):
        multipliers({"systems": [row("AR", 1, 0.4, 5.0), row("AR", 2, 0.3, 5.5, {"temperature": 1.0})]}, ["AR"])
    rows = [*baseline(1, 0.5), {**row("ours", 1, 0.4, 5.5), "training_flops": None}, row("theirs", 1, 0.4, 5.5)]
    assert [each.name for each in multipliers({"systems": rows}, ["AR 1"])] == ["theirs"]
    with pytest.raises(DataError, match="ours: no training_pflops"):
        multipliers({"systems": rows}, ["ours"])


def test_a_sampling_over_budgets_is_one_line_however_its_rows_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group with one sampling is named without it."""
    figures: list[Any] = []
    monkeypatch.setattr(plots, "to_png", lambda figure: figures.append(figure) or b"")
    rows = [*baseline(1, 0.5, 0.0), *baseline(16, 0.3, 0.0), row("ours 1", 4, 0.45, 5.5, {"steps": 8})]
    rows += [row("ours 2", 12, 0.4, 5.5, {"steps": 8}), row("ours 2", 12, 0.42, 5.5, {"steps": 4})]
    found = multipliers({"systems": rows}, ["AR 1", "AR 16"])
    plots.multiplier_plot({"systems": rows}, ["AR 1", "AR 16"], found)
    lines = {line.get_label(): line.get_xdata().tolist() for line in figures[0].axes[0].lines if line.get_lw() == 1.2}
    assert lines == {"ours, steps 8": [4e15, 12e15], "ours, steps 4": [12e15]}
