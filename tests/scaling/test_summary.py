"""Summaries and plots of points that were made from a known law."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatext.config import ConfigError
from megatext.scaling import plots
from megatext.scaling.collect import Measured
from megatext.scaling.fit import Law
from megatext.scaling.summary import read_summary, summarise, table, write_summary

LAW = Law(1.7, 400.0, 420.0, 0.34, 0.30)
BUDGETS = (1e17, 1e18, 1e19)


def points(system: str = "AR", factor: float = 1.0) -> list[Measured]:
    """Five sizes around each budget's best, with an intermediate point each."""
    found = []
    for budget in BUDGETS:
        best, _ = LAW.optimum(budget)
        for width, n in enumerate(best * np.geomspace(0.25, 4, 5), 1):
            tokens = budget / 6 / n
            final = Measured(
                run=f"{system}-{width}-{budget}", system=system, width=width, layers=1, parameters=int(n),
                parameters_without_embeddings=int(n / 2), budget_flops=budget, step=10, final=True, tokens=tokens,
                flops=budget, loss=float(factor * LAW.loss(n, tokens)), seconds=3600.0,
            )  # fmt: skip
            found += [replace(final, step=5, final=False, loss=1.2 * final.loss, flops=budget / 2), final]
    return found


@pytest.fixture(scope="module")
def both() -> dict[str, Any]:
    """Of two systems."""
    return summarise([*points(), *points("DiT", 0.5)], "all", draws=12)


def test_the_law_comes_back_with_intervals_and_a_prediction(both: dict[str, Any]) -> None:
    for name, factor in (("AR", 1.0), ("DiT", 0.5)):
        found = both["systems"][name]
        law = found["law"]
        assert found["runs"] == 15 and not found["missing"]
        for key, true in (("e", 1.7 * factor), ("alpha", 0.34), ("beta", 0.30)):
            assert law[key]["value"] == pytest.approx(true, rel=0.01)
            low, high = law[key]["ci95"]
            assert low * 0.99 <= true <= high * 1.01 and high - low < 0.1 * true
        assert law["parameters_exponent"]["value"] == pytest.approx(0.30 / 0.64, abs=0.005)
        n, d = LAW.optimum(1e20)
        assert law["next"]["flops"] == 1e20 and law["next"]["parameters"]["value"] == pytest.approx(n, rel=0.03)
        assert law["next"]["tokens"]["value"] == pytest.approx(d, rel=0.03)
        assert law["next"]["loss"]["value"] == pytest.approx(factor * LAW.loss(n, d), rel=1e-3)
        assert [least["flops"] for least in found["parabolas"]["least"]] == list(BUDGETS)
        for least in found["parabolas"]["least"]:
            n, _ = LAW.optimum(least["flops"])
            assert least["inside"] and least["parameters"]["value"] == pytest.approx(n, rel=0.1)
            low, high = least["parameters"]["ci95"] or (0, math.inf)
            assert low < least["parameters"]["value"] < high
        assert found["parabolas"]["parameters"]["exponent"]["value"] == pytest.approx(0.30 / 0.64, abs=0.02)
        assert found["held_out"]["flops"] == 1e19 and found["held_out"]["relative_error"] < 2e-3
    told = table(both)
    assert "AR: 15 runs, N: all" in told and "1.00e+19 FLOPs, held out" in told and told.count("best N ~ C^") == 2


def test_other_parameters_give_another_law() -> None:
    found = summarise(points(), "without_embeddings", draws=0)["systems"]["AR"]["law"]
    assert found["a"]["value"] == pytest.approx(400 / 2**0.34, rel=0.02)
    assert found["alpha"]["value"] == pytest.approx(0.34, rel=0.01) and found["alpha"]["ci95"] is None


def test_what_cannot_be_had_is_said() -> None:
    few = [point for point in points() if point.width < 3 and point.budget_flops < 1e19]
    found = summarise(few, "all", draws=0)["systems"]["AR"]
    assert found["missing"].keys() == {"law", "parabolas", "held_out"} and "six runs" in found["missing"]["law"]
    assert "no law: a law of five constants needs six runs" in table(summarise(few, "all", draws=0))
    with pytest.raises(ConfigError, match="no run is finished yet"):
        summarise([point for point in few if not point.final], "all")


def test_plots_and_page(tmp_path: Path, both: dict[str, Any]) -> None:
    measured = [*points(), *points("DiT", 0.5)]
    assert plots.draw(measured, both).keys() == {"loss", "iso_flop", "residuals"}
    assert plots.draw(measured[:-2], both).keys() == {"loss", "iso_flop", "residuals"}  # a run fewer than was fitted
    measured[-1] = replace(measured[-1], metrics={"default": {"gap": 0.4, "entropy": 4.2}})
    with pytest.raises(ConfigError, match="fit. makes it"):
        read_summary(tmp_path)
    write_summary(both, tmp_path)
    json.loads((tmp_path / "fits.json").read_text())
    page = plots.write(measured, read_summary(tmp_path), tmp_path).read_text()
    pngs = sorted((tmp_path / "plots").iterdir())
    assert [file.stem for file in pngs] == ["iso_flop", "loss", "metrics", "residuals"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in pngs) and page.count("data:image/png") == 4
    assert "L = E + A/N^alpha" in page and "DiT-5-1e+19" in page and "0.400" in page
