"""A study's commands: what stands on what, which seeds, and that every shipped study's configurations can be read."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatext.config import ConfigError, load_config, to_dict
from megatext.recipes import config_class, meta_module, passes_of
from megatext.recipes.denoiser import check_effects
from megatext.study import Study
from tests.command_lines import ROOT

STUDY: dict[str, Any] = {
    "work_dir": "runs/x",
    "corpus": "pydocs:",
    "judge": "{lm}",
    "task": {"n": 10},
    "set": {"max_steps": 5},
    "runs": {
        "lm": {"launcher": "lm", "config": "launch/configs/quickstart/lm.yaml", "seeds": [0, 1], "sampling": [{}]},
        "vae": {"launcher": "vae", "config": "launch/configs/quickstart/vae.yaml", "seeds": [3], "states": "lm"},
        "dit": {
            "launcher": "dit",
            "config": "launch/configs/quickstart/dit_textldm_paper.yaml",
            "set": {"dit.vae": "{vae}", "dit.flow.condition_dropout": 0.2},
            "seeds": [0, 1],
            "name": "DiT",
            "sampling": [{"steps": 4}, {"steps": 8}],
            "unconditional": 7,
        },
        "other": {"like": "dit", "set": {"dit.flow.context_fraction": [0.2, 0.8], "max_steps": 9}, "seeds": [1]},
    },
}
LAUNCHERS = {"lm": "PretrainLMConfig", "vae": "PretrainVAEConfig", "dit": "PretrainDiTConfig"}
LAUNCHERS |= {"cola": "PretrainColaConfig", "ldlm": "PretrainLDLMConfig"}


def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: dict[str, Any] = STUDY, **options: Any) -> Study:
    monkeypatch.chdir(ROOT)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return Study(path, **options)


def test_a_run_stands_on_the_same_seed_of_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = {stage.name: stage for stage in study(tmp_path, monkeypatch).stages}
    assert "--data.shards runs/x/shards --max_steps 5" in stages["pretrain_lm-1"].shell()
    assert stages["pretrain_lm-0"].needs == ("shard",) and stages["export_lm-1"].needs == ("pretrain_lm-1",)
    vae = stages["pretrain_vae-3"]  # no such seed of the language model: its first
    assert "--data.hidden_states runs/x/states/lm-0" in vae.shell() and "states_lm-0" in vae.needs
    assert set(stages["states_lm-0"].needs) == {"shard", "export_lm-0"}
    again = {**STUDY["runs"], "last": {"like": "vae", "states_layer": -1, "sampling": [{}]}}
    last = {stage.name: stage for stage in study(tmp_path, monkeypatch, {**STUDY, "runs": again}).stages}
    assert last["states_lm-0"].shell() == stages["states_lm-0"].shell()  # the file's layer stays beside it
    assert last["states_lm-0_layer-1"].shell().endswith("--output runs/x/states/lm-0_layer-1 --layer -1")
    assert "--data.hidden_states runs/x/states/lm-0_layer-1" in last["pretrain_last-3"].shell()
    for seed in (0, 1):
        dit = stages[f"pretrain_dit-{seed}"]
        assert f"--seed {seed}" in dit.shell() and set(dit.needs) == {"shard", "export_vae-3"}
        assert "--dit.vae runs/x/models/vae-3 --dit.flow.condition_dropout 0.2" in dit.shell()
    other = stages["pretrain_other-1"].shell()
    assert "--max_steps 9" in other and "--dit.flow.condition_dropout 0.2" in other
    assert shlex.split(other)[-1] == "[0.2, 0.8]"
    assert set(stages["score"].needs) == {"generate", "export_lm-0"}


def test_rows_are_seeds_of_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = study(tmp_path, monkeypatch)
    rows = json.loads(found.files[Path("runs/x/systems.yaml")])
    assert [row["name"] for row in rows if row.get("group") == "DiT"] == [
        f"DiT steps={steps} seed={seed}" for seed in (0, 1) for steps in (4, 8)
    ]
    assert {row["group"] for row in rows if "group" in row} == {"lm", "DiT", "other"}
    assert [row["unconditional"] for row in rows if row.get("group") == "other"] == [7, 0]
    assert [row["system"] for row in rows if row.get("group") == "lm"] == [
        "hf:runs/x/models/lm-0",
        "hf:runs/x/models/lm-1",
    ]
    # seed by seed, so that what is there when it is cut short can be compared
    order = [s.name for s in found.stages if s.name.startswith("pretrain_")]
    assert order == [f"pretrain_{name}" for name in ("lm-0", "vae-3", "dit-0", "other-1", "lm-1", "dit-1")]


def test_a_run_may_sample_the_models_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained for it, and what it samples is trained even where that is not in the table."""
    runs = {**STUDY["runs"], "guided": {"model_of": "dit", "seeds": [1], "sampling": [{"guidance_scale": 3.0}]}}
    found = study(tmp_path, monkeypatch, {**STUDY, "runs": runs}, only=["guided"], judge="judge_dir")
    names = [stage.name for stage in found.stages]
    assert "pretrain_dit-1" in names and "pretrain_guided-1" not in names and "export_guided-1" not in names
    assert [name for name in names if name.startswith("write_")] == ["write_guided-1"]
    write = next(stage for stage in found.stages if stage.name == "write_guided-1")
    assert set(write.needs) == {"manifest", "export_dit-1"}
    rows = [row for row in json.loads(found.files[Path("runs/x/systems.yaml")]) if "group" in row]
    assert [(row["name"], row["system"]) for row in rows] == [
        ("guided guidance_scale=3.0 seed=1", "model:runs/x/models/dit-1")
    ]


def test_a_study_may_extend_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "common.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    runs: dict[str, Any] = {"more": {"like": "dit", "seeds": [0]}, "lm": {"sampling": [], "seeds": [1]}}
    own = {"extends": str(tmp_path / "common.yaml"), "work_dir": "runs/y", "runs": runs}
    names = [stage.name for stage in study(tmp_path, monkeypatch, own, only=["more"]).stages]
    assert "pretrain_more-0" in names and "pretrain_vae-3" in names and "pretrain_dit-0" not in names
    whole = study(tmp_path, monkeypatch, own)
    assert list(whole.runs) == [*STUDY["runs"], "more"] and whole.work_dir == Path("runs/y")
    assert whole.runs["lm"].seeds == (1,) and whole.runs["lm"].launcher == "lm"  # field by field
    assert "lm" not in whole.chosen and "dit" in whole.chosen


def test_a_run_like_another_may_empty_a_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {**STUDY["runs"], "quiet": {"like": "dit", "sampling": [], "unconditional": 0}}
    made = study(tmp_path, monkeypatch, {**STUDY, "runs": runs})
    assert (made.runs["quiet"].sampling, made.runs["quiet"].unconditional) == ((), 0) and "quiet" not in made.chosen
    assert made.runs["other"].unconditional == 7  # what it does not say


def test_the_first_seeds_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {**STUDY["runs"], "guided": {"model_of": "dit", "seeds": [1], "sampling": [{"guidance_scale": 3.0}]}}
    runs["vae"] = {**runs["vae"], "seeds": [1]}
    first = study(tmp_path, monkeypatch, {**STUDY, "runs": runs}, seeds=1)
    commands = {stage.name: stage.shell() for stage in first.stages}
    whole = {stage.name: stage.shell() for stage in study(tmp_path, monkeypatch, {**STUDY, "runs": runs}).stages}
    trained = {name for name in commands if name.startswith(("pretrain_", "write_"))}
    assert trained < set(whole) and all(commands[name] == whole[name] for name in trained)
    with pytest.raises(ConfigError, match="--seeds 0: at least 1"):
        study(tmp_path, monkeypatch, seeds=0)
    # the autoencoder's first seed is 1, and stands on the baseline's seed 1, which is not in the table
    assert trained == {
        "pretrain_lm-0", "write_lm-0", "pretrain_lm-1", "pretrain_vae-1",
        "pretrain_dit-0", "write_dit-0", "pretrain_other-1", "write_other-1",
    }  # fmt: skip
    assert "models/lm-1" in commands["states_lm-1"] and "states/lm-1" in commands["pretrain_vae-1"]
    names = [stage.name for stage in first.stages]
    assert names.index("export_lm-1") < names.index("pretrain_vae-1") < names.index("pretrain_dit-0")


def test_only_some_runs_and_what_they_stand_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = study(tmp_path, monkeypatch, only=["other"], judge="judge_dir", jobs=2)
    names = [stage.name for stage in some.stages]
    assert "pretrain_lm-0" in names and "pretrain_vae-3" in names and "pretrain_dit-0" not in names
    assert [name for name in names if name.startswith("write_")] == ["write_other-1"]
    assert "--judge judge_dir" in next(stage for stage in some.stages if stage.name == "score").shell()
    with pytest.raises(ConfigError, match="no run is called dot; known here: lm"):
        study(tmp_path, monkeypatch, only=["dot"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": {"a": {"launcher": "lm"}}}, "runs.a: launcher, config and seeds are needed"),
        ({"runs": {"a": {"like": "b"}}}, "no run is called b"),
        ({"runs": {"a": {"model_of": "b"}}}, "no run is called b"),
        ({"runs": {**STUDY["runs"], "a": {"model_of": "dit"}}}, "goes with sampling"),
        (
            {"runs": {**STUDY["runs"], "a": {"model_of": "dit", "sampling": [{}], "states_layer": -1}}},
            "goes with sampling",
        ),
        ({"runs": {**STUDY["runs"], "a": {"like": "dit", "states_layer": -1}}}, "states_layer is of states"),
        (
            {"runs": {**STUDY["runs"], "a": {"model_of": "dit", "sampling": [{}]}, "b": {"like": "a"}}},
            "b names a, which samples another run's models",
        ),
        (
            {
                "runs": {
                    **STUDY["runs"],
                    "a": {"model_of": "dit", "sampling": [{}]},
                    "b": {"model_of": "a", "sampling": [{}]},
                }
            },
            "b: model_of names a run that is trained",
        ),
        (
            {"runs": {**STUDY["runs"], "a": {"model_of": "dit", "seeds": [2], "sampling": [{}]}}},
            r"dit has the seeds \[0, 1\] only",
        ),
        ({"runs": {**STUDY["runs"], "a": {"model_of": "dit", "set": {"seed": 1}}}}, "goes with sampling"),
        ({"judge": "{nothing}"}, "judge: no run is called nothing"),
        ({"runs": {"a": {"sedes": [1]}}}, "unknown key 'runs.a.sedes'; did you mean 'runs.a.seeds'"),
        ({"runs": {"a": {**STUDY["runs"]["dit"], "set": {"dit.vae": "{nothing}"}}}}, "no run is called nothing"),
        ({"runs": {"a": {"like": "b"}, "b": {"like": "a"}}}, "names b, which has to stand before it"),
        (
            {"runs": {"a": {**STUDY["runs"]["dit"], "set": {"dit.vae": "{b}"}}, "b": STUDY["runs"]["lm"]}},
            "names b, which has to stand before it",
        ),
    ],
)
def test_what_does_not_fit_together_is_told(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=message):
        study(tmp_path, monkeypatch, {**STUDY, "judge": "j", **change})


@pytest.mark.parametrize("path", sorted((ROOT / "launch/configs/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_of_a_shipped_study_is_a_configuration(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the launcher reads it: every key known, every value of its type, nothing in it that a training refuses, and a
    step of it on the meta device."""
    monkeypatch.chdir(ROOT)
    trained = [stage for stage in Study(path, corpus="pydocs:").stages if stage.name.startswith("pretrain_")]
    assert trained
    for stage in trained:
        launcher = next(word for word in stage.command if word.startswith("launch/pretrain_"))
        cls = config_class(LAUNCHERS[launcher.removeprefix("launch/pretrain_").removesuffix(".py")])
        config, _ = load_config(cls, list(stage.command[stage.command.index(launcher) + 1 :]))
        section = next((getattr(config, name) for name in ("dit", "cola", "ldlm") if hasattr(config, name)), None)
        if section is not None:
            check_effects(section.network, section.flow, section.sampling, "here")
        if config.seed == 0:
            for each in passes_of(config, meta_module(config, 256), 256):
                with torch.device("meta"):
                    each.run()


def settings_of(study: str, launcher: str) -> dict[str, dict[str, Any]]:
    """The first seed's runs of a launcher, by dotted keys."""
    found = {}
    for stage in Study(ROOT / f"launch/configs/studies/{study}.yaml", corpus="pydocs:").stages:
        script = f"launch/pretrain_{launcher}.py"
        if stage.name.startswith("pretrain_") and stage.name.endswith("-0") and script in stage.command:
            config, _ = load_config(
                config_class(LAUNCHERS[launcher]), list(stage.command[stage.command.index(script) + 1 :])
            )
            found[stage.name.removeprefix("pretrain_").removesuffix("-0")] = flat(to_dict(config))
    return found


def apart(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)} - {"run_dir"}


REPAIRS = {
    "adaln": {"network.time_conditioning", "network.trunk.initial_gate"},
    "x0": {"flow.objective"},
    "v_loss_x0": {"flow.latent_loss"},
    "more_noise": {"flow.timesteps.location", "flow.timesteps.scale"},
    "tan": {"flow.path", "flow.timesteps.distribution"},
    "self_conditioning": {"network.self_conditioning", "flow.self_conditioning_probability"},
    "robust": {"vae"},
    "token_local": {"vae"},
    "no_repa": {"vae"},
    "drop": {"flow.null_condition"},
    "null_vector": {"flow.null_condition", "network.null_embedding"},
    "prefix": {"flow.attention"},
    "with_context": {"flow.target_encoding"},
    "log_uniform": {"flow.segment_lengths"},
}
OWN_CHOICES = {
    "last_layer": {"vae"},
    "kl_less": {"vae"},
    "kl_more": {"vae"},
    "larger_vae": {"vae"},
    "dropout": {"vae"},
    "uniform": {"flow.timesteps.distribution"},
    "scale_less": {"flow.timesteps.scale"},
    "larger": {"network.trunk.layers"},
    "always_context": {"flow.condition_dropout", "flow.unconditional_probability"},
    "more_dropout": {"flow.condition_dropout"},
    "letter_muon": {"vae", "flow.segment_lengths", "network.role_embedding"},
}
BY_ADAMW = {"optimizer.name", "optimizer.learning_rate", "optimizer.weight_decay"}
TOGETHER = ("adaln", "x0", "more_noise", "self_conditioning", "robust", "drop", "null_vector")


def test_each_repair_alone_and_seven_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = settings_of("textldm_repairs", "dit")
    expected = {**REPAIRS, **OWN_CHOICES, "seven": set.union(*(REPAIRS[name] for name in TOGETHER))}
    assert found.keys() == {"paper", "letter", *expected}
    assert apart(found["letter"], found["letter_muon"]) == {"dit.vae", *BY_ADAMW}
    for name, keys in expected.items():
        assert apart(found[name], found["paper"]) == {f"dit.{key}" for key in keys}, name
    vaes = settings_of("textldm_repairs", "vae")
    letter = {"vae.truncation", "vae.network.latent_norm", "vae.network.standardised"}
    for name, keys in {
        "vae_robust": {"vae.decoder_noise"},
        "local_vae": {"vae.network.encoder.layers"},
        "vae_no_repa": {"vae.repa_weight", "data.hidden_states"},
        "vae_last_layer": {"data.hidden_states"},
        "vae_kl_less": {"vae.kl_weight"},
        "vae_kl_more": {"vae.kl_weight"},
        "vae_larger": {"vae.network.encoder.layers", "vae.network.decoder.layers"},
        "vae_dropout": {"vae.latent_dropout", "vae.token_dropout"},
        "vae_letter_muon": letter,
        "vae_letter": letter | BY_ADAMW,
    }.items():
        assert apart(vaes[name], vaes["vae"]) == keys


def test_rows_of_blocks_differ_in_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = settings_of("textldm_blocks", "dit")
    loss = {"dit.flow.objective", "dit.network.output", "dit.flow.latent_loss"}
    blocks = {"dit.flow.block_tokens", "dit.flow.null_condition"}
    assert apart(found["cross_entropy"], found["local"]) == loss
    for size in (1, 4, 16):
        assert apart(found[f"block_{size}"], found["cross_entropy"]) == blocks
        assert found[f"block_{size}"]["dit.flow.block_tokens"] == size
    assert apart(found["block_4_x0"], found["local"]) == blocks


def test_rows_of_the_ablation_differ_in_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """LDLM with one ingredient off, and with all: these fields and no others."""
    monkeypatch.chdir(ROOT)
    found = settings_of("ldlm", "ldlm")
    off = {
        "ldlm_cross_entropy": {"ldlm.decoder_loss"},
        "ldlm_no_warmup": {"ldlm.encoder_warmup_steps"},
        "ldlm_uniform": {"ldlm.flow.adaptive_timesteps.bins"},
        "ldlm_no_noise": {"ldlm.decoder_noise"},
    }
    off["ldlm_naive"] = set.union(*off.values())
    unused = {f"ldlm.flow.adaptive_timesteps.{name}" for name in ("decay", "refresh_steps", "floor")}
    assert found.keys() == {"ldlm", *off}
    for name, keys in off.items():
        assert apart(found[name], found["ldlm"]) - (unused if name == "ldlm_naive" else set()) == keys


def flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to values."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
