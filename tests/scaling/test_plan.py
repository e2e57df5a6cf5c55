"""Plans: sizes, rules, budgets and refusals, against arithmetic done here."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatext.config import ConfigError, load_config
from megatext.data.stream import TokenStream
from megatext.recipes import config_class, meta_module
from megatext.scaling.plan import SYSTEMS, Plan, _content, config_file, read_plan
from megatext.training.estimate import row_flops
from tests.command_lines import ROOT

LM = {
    "run_dir": "anywhere",
    "max_steps": 99,
    "save_every_steps": 5,
    "data": {"shards": "nowhere", "row_tokens": 32, "max_tokens": 32},
    "optimizer": {"learning_rate": 0.01, "warmup_steps": 7},
    "training": {"rows_per_step": 4, "micro_batch_rows": 2, "ema_decays": [0.9]},
    "model": {"layers": 1, "width": 32, "heads": 2},
}


def write_plan(folder: Path, shards: Path, **changes: Any) -> Path:
    """A plan of the AR baseline in two sizes and budgets, but for the changes; None removes a key."""
    (folder / "lm.yaml").write_text(json.dumps(LM))
    content: dict[str, Any] = {
        "work_dir": str(folder / "ladder"),
        "systems": {"AR": {"launcher": "lm", "config": str(folder / "lm.yaml")}},
        "ladder": [{"width": 32}, {"width": 64}],
        "budgets": [{"flops": 1e9}, {"flops": 4e9}],
        "set": {"data.shards": str(shards)},
        "max_epochs": 1000.0,
        **changes,
    }
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


def test_a_plan_is_every_size_of_every_budget(tmp_path: Path, shards: Path) -> None:
    plan = Plan(write_plan(tmp_path, shards))
    plan.write()
    config, runs = read_plan(tmp_path / "plan.yaml")
    assert runs == plan.runs and config == plan.config
    assert [(run.width, run.layers, run.heads, run.budget_flops) for run in runs] == [
        (32, 1, 2, 1e9), (32, 1, 2, 4e9), (64, 2, 4, 1e9), (64, 2, 4, 4e9),
    ]  # fmt: skip
    for run in runs:
        written, _ = load_config(config_class("PretrainLMConfig"), ["--config", str(config_file(run))])
        model = written.model  # type: ignore[attr-defined]
        assert (model.layers, model.width, model.heads, written.max_steps) == (
            run.layers,
            run.width,
            run.heads,
            run.steps,
        )
        assert written.run_dir == run.run_dir and written.logging.wandb_group == "ladder"
        assert written.optimizer.warmup_steps == round(0.1 * run.steps)
        assert written.training.validation_every_steps == math.ceil(run.steps / 4)
        module = meta_module(written, 300)
        assert run.parameters == sum(p.numel() for p in module.parameters())
        assert run.parameters - run.parameters_without_embeddings == 300 * run.width  # tied
        assert run.flops_per_step == 4 * row_flops(written, module, 300).model
        assert abs(run.flops - run.budget_flops) <= run.flops_per_step / 2
        assert written.training.validation_rows == 4
        stream = TokenStream(written.data, seed=0, rows_per_step=4)
        assert run.tokens == run.steps * stream.plan(0).tokens < run.steps * 4 * 32
        assert run.epochs == stream.epochs(run.steps * stream.plan(0).next_sample)[0]
        # fp32 masters, gradients, two moments and an average at least, and less than twice that
        assert 5 * 4 * run.parameters <= run.memory_gib * 2**30 < 10 * 4 * run.parameters


def test_a_width_that_is_the_vocabulary_s_is_no_embedding(tmp_path: Path, shards: Path) -> None:
    (run,) = Plan(write_plan(tmp_path, shards, ladder=[{"width": 300, "heads": 2}], budgets=[{"flops": 1e11}])).runs
    assert run.parameters - run.parameters_without_embeddings == 300 * 300


def test_rules_start_at_the_preset_and_the_least_budget(tmp_path: Path, shards: Path) -> None:
    rules = {"optimizer.learning_rate": {"width": -0.5}, "training.rows_per_step": {"flops": 0.5}}
    shares = {"optimizer.warmup_steps": 0.25, "save_every_steps": 0.5}
    plan = Plan(write_plan(tmp_path, shards, rules=rules, step_shares=shares, reference_flops=1e9))
    assert [run.learning_rate for run in plan.runs] == pytest.approx([0.01, 0.01, 0.01 / 2**0.5, 0.01 / 2**0.5])
    assert [run.rows_per_step for run in plan.runs] == [4, 8, 4, 8]
    for run, config in zip(plan.runs, plan.configs, strict=True):
        assert config.optimizer.warmup_steps == round(0.25 * run.steps)
        assert config.save_every_steps == round(0.5 * run.steps)
        assert config.training.validation_rows == 4  # the same for every batch
    more = [{"flops": 1e9}, {"flops": 4e9}, {"flops": 3e8}]
    again = Plan(write_plan(tmp_path, shards, rules=rules, step_shares=shares, reference_flops=1e9, budgets=more))
    assert {run.name for run in plan.runs} < {run.name for run in again.runs}  # what is there stays as it is


@pytest.mark.parametrize(("exponent", "processes"), [(0.3, 1), (0.6, 2), (0.7, 3)])
def test_batches_are_whole_micro_batches(tmp_path: Path, shards: Path, exponent: float, processes: int) -> None:
    rules = {"training.rows_per_step": {"flops": exponent}}
    device = {"processes": processes, "peak_tflops": 1.0, "mfu": 0.5}
    changes = {"rules": rules, "device": device, "reference_flops": 2e9}
    plan = Plan(write_plan(tmp_path, shards, budgets=[{"flops": 2e9}, {"flops": 4e10}], **changes))
    for run in plan.runs:
        assert run.rows_per_step % (2 * processes) == 0
        exact = max(2 * processes, 4 * (run.budget_flops / 2e9) ** exponent)
        assert abs(run.rows_per_step - exact) <= processes
        assert run.device_hours == pytest.approx(run.flops / (1e12 * 0.5 * 3600))


def test_tokens_a_parameter_instead_of_budgets(tmp_path: Path, shards: Path) -> None:
    plan = Plan(write_plan(tmp_path, shards, budgets=None, tokens_per_parameter=[0.5, 2.0]))
    ratios = [run.tokens / run.parameters for run in plan.runs]
    assert ratios == pytest.approx([0.5, 2.0, 0.5, 2.0], rel=0.03)


def test_a_budget_of_some_sizes_only(tmp_path: Path, shards: Path) -> None:
    plan = Plan(write_plan(tmp_path, shards, budgets=[{"flops": 1e9}, {"flops": 4e9, "widths": [64]}]))
    assert [(run.width, run.budget_flops) for run in plan.runs] == [(32, 1e9), (64, 1e9), (64, 4e9)]


def test_a_system_of_some_sizes_only(tmp_path: Path, shards: Path) -> None:
    config = str(tmp_path / "lm.yaml")
    systems = {"AR": {"launcher": "lm", "config": config}, "wide": {"launcher": "lm", "config": config, "widths": [64]}}
    plan = Plan(write_plan(tmp_path, shards, systems=systems, budgets=[{"flops": 1e9}, {"flops": 4e9, "widths": [32]}]))
    assert [(run.system, run.width, run.budget_flops) for run in plan.runs] == [
        ("AR", 32, 1e9), ("AR", 32, 4e9), ("AR", 64, 1e9), ("wide", 64, 1e9),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="systems.wide: no budget has any of its widths"):
        Plan(write_plan(tmp_path, shards, systems=systems, budgets=[{"flops": 1e9, "widths": [32]}]))


def test_the_identity_is_of_what_makes_a_difference(tmp_path: Path, shards: Path) -> None:
    first = [run.name for run in Plan(write_plan(tmp_path, shards)).runs]
    logged = {"data.shards": str(shards), "logging.log_every_steps": 3}
    assert [run.name for run in Plan(write_plan(tmp_path, shards, set=logged)).runs] == first
    seeded = {"data.shards": str(shards), "seed": 1}
    assert not {run.name for run in Plan(write_plan(tmp_path, shards, set=seeded)).runs} & set(first)
    assert len(set(first)) == 4
    moved = [run.name for run in Plan(write_plan(tmp_path, shards, work_dir=str(tmp_path / "elsewhere"))).runs]
    assert moved == first


def test_the_identity_is_of_what_is_read_too(tmp_path: Path, shards: Path) -> None:
    vae = tmp_path / "vae"
    vae.mkdir()
    (vae / "config.json").write_text("{}")
    assert _content(vae) == _content(vae)
    before = _content(vae)
    (vae / "model.safetensors").write_bytes(b"weights")
    assert _content(vae) != before and _content(shards) != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_epochs": 0.01}, "more than max_epochs .0.01.: ar-32-1e09-.* take more data"),
        ({"device": {"memory_gib": 1e-4}}, "more than device.memory_gib .0.0001.: ar-32-1e09"),
        ({"budgets": None}, "either budgets or tokens_per_parameter"),
        ({"tokens_per_parameter": [1.0]}, "either budgets or tokens_per_parameter"),
        ({"ladder": [{"width": 32}, {"width": 32, "layers": 2}]}, "two sizes have one width"),
        ({"budgets": [{"flops": 1e9, "widths": [48]}]}, "budgets: no size of the ladder has the width 48"),
        (
            {"systems": {"AR": {"launcher": "lm", "config": "lm.yaml", "widths": [96]}}},
            "systems: no size of the ladder has the width 96",
        ),
        ({"budgets": [{"flops": 1e6}]}, "1e.06 FLOPs are 0 steps of AR at 4 rows, fewer than validations"),
        ({"rules": {"optimizer.name": {"width": 1.0}}}, "rules: optimizer.name of .* is 'adamw', not a number"),
        ({"rules": {"optimizer.learning_rate": {"flops": 1.0}}}, "rules that follow the budget need reference_flops"),
        ({"set": {"data.shards": "nowhere", "model.depth": 3}}, "--model.depth: unknown key 'model.depth'"),
        ({"set": {"training.ema_decays": []}}, "systems.AR: no validation_ema/loss without validation batches and av"),
        ({"device": {"processes": 4}}, "training.rows_per_step 4 is not a multiple of 4 process"),
        ({"budgets": [{"flops": 1e9}, {"flops": 1e9, "widths": [32]}]}, "budgets: two have the same FLOPs"),
        ({"budgets": [{"flops": 1e9}, {"flops": 1.0001e9}]}, "two runs are the same: ar-32-1e09"),
        ({"systems": {"AR": {"launcher": "gpt", "config": "x"}}}, "key 'systems.launcher' is 'gpt', which is not"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path: Path, shards: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan(write_plan(tmp_path, shards, **changes)).refuse_what_does_not_fit()


def test_a_plan_before_the_shards_is_told_and_not_written(tmp_path: Path) -> None:
    plan = Plan(write_plan(tmp_path, Path("nowhere"), budgets=[{"flops": 1e12}]))
    assert plan.runs[0].parameters - plan.runs[0].parameters_without_embeddings == 151_669 * 32
    assert plan.table().count("\n") == 3
    with pytest.raises(ConfigError, match="nowhere: not there yet. The above presumes Qwen3's vocabulary"):
        plan.refuse_what_does_not_fit()


@pytest.mark.parametrize(
    ("launcher", "preset", "absent"),
    [("dit", "dit_textldm_paper", "vae"), ("cola", "dit_cola", "vae_cola"), ("ldlm", "dit_ldlm", "lm")],
)
def test_other_systems_and_what_they_stand_on(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, launcher: str, preset: str, absent: str
) -> None:
    monkeypatch.chdir(ROOT)
    file = f"launch/configs/quickstart/{preset}.yaml"
    systems, own = {"X": {"launcher": launcher, "config": file}}, yaml.safe_load(Path(file).read_text())
    for name in SYSTEMS[launcher][1].split("."):
        own = own[name]
    settings = {"data.shards": str(shards), "training.rows_per_step": 4, "training.micro_batch_rows": 4}
    changes: dict[str, Any] = {
        "systems": systems,
        "budgets": [{"flops": 1e13}],
        "ladder": [{"width": 64}, {"width": 128}],
    }
    plan = Plan(write_plan(tmp_path, shards, **changes, set=settings))
    for run, config in zip(plan.runs, plan.configs, strict=True):
        part: Any = config
        for name in SYSTEMS[launcher][1].split("."):
            part = getattr(part, name)
        expected = [run.width, *(max(1, round(run.width * own[key] / own["width"])) for key in ("layers", "heads"))]
        assert [part.width, part.layers, part.heads] == expected == [run.width, run.layers, run.heads]
    assert plan.runs[0].parameters < plan.runs[1].parameters
    otherwise = {**settings, f"{SYSTEMS[launcher][1].split('.')[0]}.sampling.steps": 3}  # written so, trained the same
    again = Plan(write_plan(tmp_path, shards, **changes, set=otherwise))
    assert [run.name for run in again.runs] == [run.name for run in plan.runs]
    with pytest.raises(ConfigError, match=f"runs/quickstart/models/{absent}: not there yet. The above presumes"):
        plan.refuse_what_does_not_fit()


def test_a_plan_is_of_its_file(tmp_path: Path, shards: Path) -> None:
    path = write_plan(tmp_path, shards)
    with pytest.raises(ConfigError, match=r"plan.json: no such file; make it by: .* plan --config"):
        read_plan(path)
    Plan(path).write()
    write_plan(tmp_path, shards, max_epochs=999.0)
    with pytest.raises(ConfigError, match="is not what .*plan.json was made from"):
        read_plan(path)


@pytest.mark.parametrize("file", sorted((ROOT / "launch/configs/scaling").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_plans_make_runs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = Plan(file)
    assert all(run.width % run.heads == 0 and 0 < run.learning_rate < 0.1 for run in plan.runs)
    assert {run.system for run in plan.runs} == set(plan.config.systems)
