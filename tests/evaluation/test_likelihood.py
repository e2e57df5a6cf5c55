"""Traces and likelihoods in the harness: exact for causal LMs, bounds for diffusion models, in table and report."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.estimate import plan_generation
from evaluation.generation import Settings, generate, generate_all, load_generations
from evaluation.manifest import build_manifest, save_manifest
from evaluation.report import _pick_steps, write_report
from evaluation.scoring import ScoreConfig, score
from evaluation.systems import SystemEntry, complete
from evaluation.table import console_table
from evaluation.tasks import load_task
from megatext.config import ConfigError
from megatext.generation import LikelihoodConfig, TextGenerator
from tests.generation.test_text_generator import export


@pytest.fixture
def directory(
    task_file: Path, tiny_lm: Path, tokenizer_directory: Path, tmp_path: Path
) -> tuple[Path, Path, dict[str, Any]]:
    """A scored stage directory with a causal LM and a one-shot model, and the latter."""
    model, output = export(tmp_path / "model", tokenizer_directory, "one_shot"), tmp_path / "table"
    manifest = build_manifest(load_task(str(task_file)))
    output.mkdir()
    save_manifest(manifest, output)
    entries = [
        SystemEntry("AR", f"hf:{tiny_lm}", likelihood=4),
        SystemEntry("DiT", f"model:{model}", {"steps": 3}, trace=2, likelihood=3),
    ]
    settings = Settings(judge=tiny_lm, cache=tmp_path / "cache")
    generate_all(manifest, complete(entries, tiny_lm), settings, output)
    found = load_generations(output, manifest)
    config = ScoreConfig(metrics=("rouge",))
    return output, model, score(manifest, found, config, output, cache=tmp_path / "cache")


def test_likelihoods_and_traces_reach_table_and_report(
    directory: tuple[Path, Path, dict[str, Any]], tiny_lm: Path, task_file: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from megatext.tokenizer import load_tokenizer

    output, model, results = directory
    rows = {row["name"]: row["metrics"] for row in results["systems"]}
    samples = build_manifest(load_task(str(task_file))).samples
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_lm), load_tokenizer(tiny_lm)
    nats = 0.0
    for sample in samples[:4]:
        prefix, target = tokenizer.encode(sample.prefix), tokenizer.encode(sample.target)
        with torch.no_grad():
            logits = lm(torch.tensor([prefix + target])).logits[0].log_softmax(-1)
        nats -= sum(float(logits[len(prefix) + i - 1, token]) for i, token in enumerate(target))
    expected = nats / math.log(2) / sum(len(sample.target) for sample in samples[:4])
    exact = rows["AR"]["bits_per_character"]
    assert exact["value"] == pytest.approx(expected, rel=1e-4) and exact["n"] == 4
    assert not exact["bound"] and exact["estimator"] == "exact" and exact["estimator_error"] == 0
    generator = TextGenerator.from_pretrained(model)
    ours = generator.log_likelihood(
        [s.prefix for s in samples[:3]], [s.target for s in samples[:3]], LikelihoodConfig(first_seed=0)
    )
    bound = rows["DiT"]["bits_per_character"]
    bits = sum(each.nats for each in ours) / math.log(2) / sum(len(s.target) for s in samples[:3])
    assert bound["value"] == pytest.approx(bits, rel=1e-3) and bound["bound"]
    pooled = (
        torch.tensor([each.estimates for each in ours]).sum(0) / math.log(2) / sum(len(s.target) for s in samples[:3])
    )
    assert bound["estimator_error"] == pytest.approx(float(pooled.std()) / len(pooled) ** 0.5, rel=1e-2)
    table = console_table(results)
    assert "bits/char" in table and f"{bits:.3f}§" in table and "§ an upper bound: variational bound." in table
    assert "bits_per_character" not in rows["human"]
    traces = results["traces"]
    assert [trace["name"] for trace in traces] == ["DiT", "DiT"] and all(len(trace["steps"]) == 3 for trace in traces)
    html = write_report(output, [output]).read_text()
    assert "Step by step: tiny" in html and html.count("<dt>step 3</dt>") == 2


def test_a_trace_ends_in_the_text_that_is_scored(directory: tuple[Path, Path, dict[str, Any]], task_file: Path) -> None:
    output, _, results = directory
    manifest = build_manifest(load_task(str(task_file)))
    found = next(item for item in load_generations(output, manifest) if item.entry.name == "DiT")
    assert [steps[-1] for steps in found.traces] == found.texts[:2]


def test_the_plan_tells_of_traces_and_likelihoods(
    directory: tuple[Path, Path, dict[str, Any]], task_file: Path, tiny_lm: Path, tmp_path: Path
) -> None:
    """Those that are asked for, and how many of them are there."""
    manifest = build_manifest(load_task(str(task_file)))
    model = f"model:{directory[1]}"

    def plan(trace: int, likelihood: int) -> dict[str, tuple[int, int, bool]]:
        entry = SystemEntry("DiT", model, {"steps": 3}, trace=trace, likelihood=likelihood)
        found = plan_generation(manifest, [entry], Settings(judge=tiny_lm, cache=tmp_path / "cache"))
        return {work.what: (work.total, work.cached, work.seconds > 0) for work in found[1:]}

    assert plan(0, 0) == {}
    assert plan(2, 3) == {"DiT, traces": (2, 2, False), "DiT, likelihoods": (3, 3, False)}
    assert plan(3, 5) == {"DiT, traces": (3, 2, True), "DiT, likelihoods": (5, 3, True)}


def test_a_row_says_how_its_likelihood_is_estimated(
    directory: tuple[Path, Path, dict[str, Any]], task_file: Path, tiny_lm: Path, tmp_path: Path
) -> None:
    manifest = build_manifest(load_task(str(task_file)))
    by = {"estimator": "ode", "seeds": 3, "steps": 4, "smallest_timestep": 0.3}

    def found(**changes: Any) -> Any:
        entry = SystemEntry("DiT", f"model:{directory[1]}", {"steps": 3}, likelihood=1, **changes)
        return generate(manifest, entry, Settings(judge=tiny_lm, cache=tmp_path / "cache")).likelihoods[0]

    sample = manifest.samples[0]
    (expected,) = TextGenerator.from_pretrained(directory[1]).log_likelihood(
        [sample.prefix],
        [sample.target],
        LikelihoodConfig(**by),  # type: ignore[arg-type]
    )
    assert found(likelihood_by=by).estimates == pytest.approx(expected.estimates)
    assert found(likelihood_by=by).estimator == expected.estimator and len(found().estimates) == 8
    for wrong, message in (
        ({"steppes": 3}, "likelihood_by: .*did you mean 'steps'"),
        ({"first_seed": 1}, "first_seed is the run's"),
        ({"steps": 0}, "steps be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            found(likelihood_by=wrong)
    for system in (f"hf:{tiny_lm}", "human"):
        entry = SystemEntry("row", system, likelihood=1, likelihood_by={"seeds": 2})
        with pytest.raises(ConfigError, match="only a diffusion model's likelihood is estimated"):
            generate(manifest, entry, Settings(judge=tiny_lm, cache=tmp_path / "c"))
    with pytest.raises(ConfigError, match="likelihood of how many texts"):
        SystemEntry("DiT", f"model:{directory[1]}", likelihood_by={"seeds": 2})


def test_rows_without_a_likelihood_say_so(task_file: Path, tmp_path: Path) -> None:
    manifest = build_manifest(load_task(str(task_file)))
    with pytest.raises(ConfigError, match="no likelihood"):
        generate(manifest, SystemEntry("human", "human", likelihood=2), Settings(cache=tmp_path / "cache"))


def test_steps_of_a_trace_are_thinned_evenly() -> None:
    steps = [str(i) for i in range(1, 51)]
    shown = _pick_steps(steps, 5)
    assert shown == [(10, "10"), (20, "20"), (30, "30"), (40, "40"), (50, "50")]
    assert _pick_steps(["a", "b"]) == [(1, "a"), (2, "b")]


def test_targets_that_a_model_does_not_read_whole_are_refused(tiny_lm: Path) -> None:
    from evaluation.systems.base import Item, Length
    from evaluation.systems.causal_lm import CausalLM, CausalSampling

    system = CausalLM(tiny_lm, CausalSampling())
    with pytest.raises(ConfigError, match="does not read all of long"):
        system.log_likelihood([Item("long", "the cat", "dog " * 300, Length())], 0)
