"""The presets: every command the quickstart would run names options, files and configuration keys that exist."""

import shutil
from pathlib import Path

import pytest
import yaml

from megatext.config import ConfigError, load_config
from megatext.data import DataError
from megatext.flow.timesteps import TimestepConfig
from megatext.quickstart import RECIPES, Quickstart
from megatext.recipes.sampling import SamplingConfig
from megatext.recipes.text_dit import PretrainDiTConfig
from megatext.recipes.text_vae import PretrainVAEConfig
from megatext.stages import Stage, stage_keys
from megatext.training.engine import accumulation_steps
from megatext.training.run_config import RunConfig
from tests.command_lines import ROOT, config_of, problems

PRESETS = ("quickstart", "small")


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_command_of_a_preset_is_well_formed(preset: str, recipe: str, tmp_path: Path) -> None:
    text = tmp_path / "my corpus.txt"
    text.touch()
    for options in ({}, {"num_processes": 2, "corpus": str(text)}):
        quickstart = Quickstart(Path("launch/configs") / preset, recipe=recipe, **options)  # type: ignore[arg-type]
        wrong = {stage.name: found for stage in quickstart.stages if (found := problems(stage.shell()))}
        assert not wrong


@pytest.mark.parametrize("preset", PRESETS)
def test_the_batch_is_divided_among_the_ranks(preset: str) -> None:
    trainings = 0
    for stage in Quickstart(Path("launch/configs") / preset, num_processes=2).stages:
        if stage.name.startswith("pretrain_"):
            script = next(i for i, word in enumerate(stage.command) if word.startswith("launch/pretrain_"))
            config, flags = load_config(config_of(stage.command[script]), list(stage.command[script + 1 :]))
            assert accumulation_steps(config, world=2) == 1
            assert flags.deepspeed_config == Path("ds_configs/zero3.json")
            trainings += 1
    assert trainings == 4


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_stage_has_what_it_needs(preset: str, recipe: str) -> None:
    quickstart = Quickstart(Path("launch/configs") / preset, recipe=recipe)
    earlier: set[str] = set()
    written: set[Path] = set()
    for stage in quickstart.stages:
        assert set(stage.needs) <= earlier
        assert all(path.is_relative_to(quickstart.work_dir) for path in stage.writes)
        assert not written & set(stage.writes)
        assert all(set(path.parents) & written <= needed_outputs(quickstart, stage) for path in stage.writes)
        earlier.add(stage.name)
        written |= set(stage.writes)
        assert quickstart.name_in_preset(stage.name) in quickstart.preset.seconds, "a time is expected for every stage"


@pytest.mark.parametrize(
    "name", [*(f"{preset}/dit_textldm_paper" for preset in PRESETS), *(f"textldm/dit_{m}m" for m in (114, 328, 768))]
)
def test_the_denoisers_of_textldm_are_as_published(name: str) -> None:
    """docs/textldm.md, "The paper's choices"; what is left to a default too."""
    config, _ = load_config(PretrainDiTConfig, ["--config", f"launch/configs/{name}.yaml"])
    network, flow, sampling = config.dit.network, config.dit.flow, config.dit.sampling
    assert (network.time_conditioning, network.output, network.self_conditioning) == ("none", "latent", False)
    assert (flow.path, flow.objective, flow.latent_space) == ("linear", "velocity", "velocity")
    assert flow.loss_weights(0) == {"flow": 1.0} and flow.adaptive_timesteps.bins == 0
    assert flow.timesteps == TimestepConfig("logit_normal", location=0.0, scale=1.5)
    assert (flow.null_condition, flow.condition_dropout) == ("zeros", 0.1)
    assert (flow.block_tokens, flow.attention, flow.target_encoding) == (0, "full", "separate")
    assert sampling == SamplingConfig(50, "euler", "quantile", guidance_scale=7.0, guidance_interval=(0.0, 1.0))
    if name.startswith("textldm/"):
        assert flow.segment_lengths == "uniform" and not network.role_embedding
        assert_adamw_of_the_paper(config)


@pytest.mark.parametrize("millions", [350, 502, 690])
def test_the_autoencoders_of_textldm_are_as_published(millions: int) -> None:
    config, _ = load_config(PretrainVAEConfig, ["--config", f"launch/configs/textldm/vae_{millions}m.yaml"])
    network = config.vae.network
    assert (network.latent_channels, network.latent_norm, network.standardised) == (64, "none", False)
    assert network.attention == "full" and not network.mask_token
    assert (config.vae.kl_weight, config.vae.repa_weight, config.vae.repa_projector) == (1e-3, 1.0, "linear")
    assert config.vae.kl_warmup_steps > 0 and config.vae.truncation == 1.0
    assert config.vae.decoder_noise == config.vae.latent_dropout == 0
    assert config.vae.token_dropout == config.vae.mask_weight == 0
    assert_adamw_of_the_paper(config)


def assert_adamw_of_the_paper(config: RunConfig) -> None:
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay) == ("adamw", 1e-4, 0.01)
    assert optimizer.learning_rate_scales == {}


def needed_outputs(quickstart: Quickstart, stage: Stage) -> set[Path]:
    return {path for other in quickstart.stages if other.name in stage.needs for path in other.writes}


def test_options_of_the_command_line_reach_the_stages(tmp_path: Path) -> None:
    configs = Path("launch/configs/quickstart")
    plain = {stage.name: stage.shell() for stage in Quickstart(configs).stages}
    assert "--input pydocs: " in plain["shard"]
    assert plain["pretrain_lm"] == f"deepspeed --quiet --num_gpus 1 launch/pretrain_lm.py --config {configs}/lm.yaml"
    assert "--model runs/quickstart/models/lm " in plain["extract_hidden_states"]
    assert (
        plain["export_dit"] == "python launch/export.py --run runs/quickstart/dit --output runs/quickstart/models/dit"
    )
    text = tmp_path / "a b.txt"
    text.touch()
    both = {stage.name: stage.shell() for stage in Quickstart(configs, num_processes=2, corpus=str(text)).stages}
    assert f"--input '{text}' " in both["shard"]
    for name in ("lm", "vae", "token_vae", "dit"):
        assert "deepspeed --quiet --num_gpus 2 " in both[f"pretrain_{name}"]
        assert both[f"pretrain_{name}"].endswith(
            " --deepspeed_config ds_configs/zero3.json --training.micro_batch_rows 16"
        )
    teacher = {stage.name: stage.shell() for stage in Quickstart(configs, teacher="Qwen/Qwen3-1.7B").stages}
    assert "train_tokenizer" not in teacher
    assert "--tokenizer Qwen/Qwen3-1.7B" in teacher["shard"]
    assert "--model Qwen/Qwen3-1.7B" in teacher["extract_hidden_states"]
    paper = {stage.name for stage in Quickstart(configs, recipe="textldm_paper").stages}
    assert "pretrain_dit_textldm_paper" in paper
    assert "pretrain_token_vae" not in paper


def test_a_corpus_that_changes_is_sharded_again_and_recipes_do_not_undo_each_other(tmp_path: Path) -> None:
    text, configs = tmp_path / "corpus.txt", Path("launch/configs/quickstart")

    def keys(recipe: str = "default") -> dict[str, str]:
        return stage_keys(Quickstart(configs, corpus=str(text), recipe=recipe).stages)

    with pytest.raises(DataError, match="no such input"):
        keys()
    text.write_text("one")
    first = keys()
    other = keys("textldm_paper")
    assert {name for name in first.keys() & other.keys() if first[name] != other[name]} == set()
    assert "score" not in other and "score_textldm_paper" in other
    text.write_text("another")
    assert {name for name, key in keys().items() if key == first[name]} == set()


@pytest.mark.parametrize("ranks", [0, 3])
def test_ranks_that_do_not_divide_the_rows_are_told_at_the_start(ranks: int) -> None:
    with pytest.raises(ConfigError, match=f"--num_processes {ranks}: the 32 rows of a step of .*lm.yaml"):
        Quickstart(Path("launch/configs/quickstart"), num_processes=ranks)


def test_bad_presets_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere/stages\.yaml: no such file"):
        Quickstart(Path("nowhere"))
    configs = tmp_path / "preset"
    shutil.copytree("launch/configs/quickstart", configs)
    dit = yaml.safe_load((configs / "dit.yaml").read_text())
    dit["dit"]["vae"] = "runs/other"
    (configs / "dit.yaml").write_text(yaml.safe_dump(dit))
    with pytest.raises(ConfigError, match=r"dit\.vae is runs/other, but trained here is .*models/token_vae"):
        Quickstart(configs)
    stages = yaml.safe_load((configs / "stages.yaml").read_text())
    stages["seconds"]["pretrain_ditt"] = 1
    shutil.copy("launch/configs/quickstart/dit.yaml", configs)
    (configs / "stages.yaml").write_text(yaml.safe_dump(stages))
    with pytest.raises(ConfigError, match="no stage is called pretrain_ditt"):
        Quickstart(configs)
