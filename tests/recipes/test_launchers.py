"""Launchers on several ranks with every file of ds_configs/, against one process; export; what --dry_run says."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatext.config import ConfigError, from_dict
from megatext.data.stream import DataConfig, TokenStream
from megatext.export import export
from megatext.generation import SamplingConfig, TextGenerator
from megatext.launch import launch
from megatext.nn.layout import Layout
from megatext.recipes import build_recipe, config_class
from megatext.recipes.pretrained import load_text_vae
from megatext.training import checkpoint
from tests.processes import REPOSITORY, run_ranks
from tests.recipes.systems import KINDS, SYSTEMS, pretrain, write_cola_vae
from tests.training.toy import records

FILES = sorted(path.stem for path in (REPOSITORY / "ds_configs").glob("*.json"))


@pytest.fixture(scope="module")
def alone(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """All systems trained by one process; what the others need to train the same."""
    directory = tmp_path_factory.mktemp("alone")
    base = {"data": {"shards": str(shards), "row_tokens": 32, "max_tokens": 32}, "vae": str(directory / "model")}
    pretrain(["lm", "vae"], 1, directory, base)
    export(directory / "vae", directory / "model")
    export(directory / "lm", directory / "model_lm")
    write_cola_vae(directory / "model_cola", shards)
    pretrain(["blocks", "one_shot", "cola", "ldlm"], 1, directory, base)
    return directory, base


@pytest.mark.dist
@pytest.mark.parametrize(
    ("stage", "world"), [("zero0", 2), ("zero1", 4), *((name, 2) for name in FILES if name != "zero1")]
)
def test_ranks_equal_one_process(stage: str, world: int, alone: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """1 rank x 4 micro-batches, 2 x 2 and 4 x 1 take the same steps: all systems under ZeRO-1 and 3, two under the
    other stages."""
    assert FILES == ["zero1", "zero2", "zero3", "zero3_offload"]
    directory, base = alone
    ds_config = REPOSITORY / "ds_configs" / f"{stage}.json"
    if stage == "zero0":  # has nothing to tune, so there is no file of ours
        ds_config = tmp_path / "zero0.json"
        ds_config.write_text('{"zero_optimization": {"stage": 0}}')
    names = list(SYSTEMS) if stage in ("zero1", "zero3") else ["vae", "blocks"]
    pretrain(names, world, tmp_path, base, f"--deepspeed_config={ds_config}")
    for name in names:
        first, second = ([r["loss"] for r in records(d / name) if "loss" in r] for d in (directory, tmp_path))
        assert len(first) == 4 and first == pytest.approx(second, rel=1e-5), name
        previews = [[p.read_text() for p in sorted((d / name / "samples").glob("*"))] for d in (directory, tmp_path)]
        passages = [[text.split("\n\n----\n\n") for text in texts] for texts in previews]
        assert len(passages[0]) == len(passages[1]), name
        # Weights differ by rounding, and a token drawn near the border of two takes what follows it along.
        for one, several in zip(*passages, strict=True):
            assert len(one) == len(several), name
            assert sum(map(str.__eq__, one, several)) >= len(one) / 2, (name, one, several)
    if "ldlm" in names:  # every rank's losses have come together in its sampler
        readers = [checkpoint.Reader(checkpoint.checkpoint_path(d / "ldlm", 4)) for d in (directory, tmp_path)]
        for key in ("probabilities", "loss_sum", "loss_count"):
            one, several = (reader.buffers[f"denoiser.timesteps.{key}"] for reader in readers)
            torch.testing.assert_close(one, several, rtol=1e-4, atol=1e-5)
        assert float(one.sum()) > 1  # there were losses
    finished = [json.loads((d / "vae" / "finished.json").read_text()) for d in (directory, tmp_path)]
    assert finished[0]["latent_std"] == pytest.approx(finished[1]["latent_std"], rel=1e-4)
    for name in {"blocks", "one_shot", "cola", "ldlm"} & {*names}:
        export(tmp_path / name, tmp_path / "model" / name)
        generator = TextGenerator.from_pretrained(tmp_path / "model" / name)
        own = next(iter(SYSTEMS[name][1].values())).get("sampling", {})
        assert generator.sampling == SamplingConfig(**own)
        assert len(generator.generate(["The quick", ""], target_tokens=[5, 5], seeds=[0, 1])) == 2


def test_a_run_goes_on_with_the_vae_it_began_with_only(
    alone: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, _ = alone
    run, other = tmp_path / "run", tmp_path / "model"
    shutil.copytree(directory / "blocks", run)
    shutil.copytree(directory / "model", other)
    weights = load_file(other / "model.safetensors")
    save_file(weights | {"latent_mean": weights["latent_mean"] + 0.01}, other / "model.safetensors")
    options = ["--config", str(directory / "blocks.yaml"), f"--run_dir={run}", "--training.micro_batch_rows=4"]
    with pytest.raises(SystemExit):
        launch("PretrainDiTConfig", [*options, "--max_steps=5", f"--dit.vae={other}"])
    assert "was trained on another dit.vae than lies there now" in capsys.readouterr().err
    launch("PretrainDiTConfig", [*options, "--max_steps=5"])
    assert "at step 4" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["vae_350m", "dit_768m"])
def test_a_dry_run_tells_the_paper_sizes_cost_on_a_fresh_clone(
    size: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # no shards, no models
    kind = "PretrainVAEConfig" if size.startswith("vae") else "PretrainDiTConfig"
    launch(kind, ["--config", str(REPOSITORY / f"launch/configs/textldm/{size}.yaml"), "--dry_run"])
    told = capsys.readouterr().out
    millions = float(re.search(r"\(([\d.]+) x 2\^20\)", told)[1])  # type: ignore[index]
    assert millions == pytest.approx(float(re.sub(r"\D", "", size)), rel=0.03)
    assert "151,669 (Qwen3, as there are no shards yet)" in told
    assert "no step was tried, data/openwebtext2-qwen3 and " in told
    assert not list(tmp_path.iterdir())


def test_a_dry_run_tries_a_step(
    alone: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, _ = alone
    options = [f"--run_dir={tmp_path / 'run'}", "--training.micro_batch_rows", "4", "--dry_run"]
    for name, (kind, _) in SYSTEMS.items():
        config = KINDS[kind]
        launch(config, ["--config", str(directory / f"{name}.yaml"), *options])
        told = capsys.readouterr().out
        assert "vocabulary      300\n" in told, name
        assert told.endswith("dry run: one step on one row a process worked\n"), name
    repeats = tmp_path / "ds.json"  # what the configuration says, of which the tried step is not
    repeats.write_text(json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": 2}}))
    launch(config, ["--config", str(directory / f"{name}.yaml"), *options, f"--deepspeed_config={repeats}"])
    assert "ZeRO stage 2 | weights" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.dist
def test_a_dry_run_on_two_ranks(alone: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    command = [sys.executable, "launch/pretrain_lm.py", "--config", str(alone[0] / "lm.yaml"), "--dry_run"]
    told = run_ranks(2, [*command, f"--run_dir={tmp_path / 'run'}", "--training.micro_batch_rows", "4"])
    assert told.returncode == 0 and told.stdout.count("one step on one row a process worked") == 1, told.stdout
    wrong = run_ranks(2, [*command, f"--run_dir={tmp_path / 'run'}", "--training.micro_batch_rows", "3"])
    assert wrong.returncode == 1 and "micro_batch_rows could be one of" in wrong.stdout, wrong.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", SYSTEMS)
def test_an_export_computes_what_training_did(name: str, alone: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """launch/export.py with DeepSpeed out of reach; what is loaded from it gives the outputs of the trained weights."""
    run, output = alone[0] / name, tmp_path / "model"
    blocked = (
        "import runpy, sys; sys.modules['deepspeed'] = None; runpy.run_path('launch/export.py', run_name='__main__')"
    )
    arguments = ["--run", str(run), "--ema", "--output", str(output)]
    done = subprocess.run([sys.executable, "-c", blocked, *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    assert "exported the averaged weights (decay 0.9) of " in done.stdout, done.stderr
    reader = checkpoint.Reader(checkpoint.list_checkpoints(run)[-1])
    recipe = build_recipe(from_dict(config_class(reader.meta["config_class"]), reader.meta["config"], where="test"))
    recipe.module.load_state_dict(reader.state_dict("ema_0.9"))
    module = recipe.module.eval()
    tokens = torch.randint(3, 300, (2, 8), generator=torch.Generator().manual_seed(0))
    if name == "lm":
        model = AutoModelForCausalLM.from_pretrained(output, attn_implementation="eager")
        pairs = [(model(tokens).logits, module.lm(tokens).logits)]
    elif name == "vae":
        layout = Layout.of(torch.zeros_like(tokens), torch.arange(8).expand(2, -1))
        pairs = list(
            zip(load_text_vae(output)[0].encode(tokens, layout), module.network.encode(tokens, layout), strict=True)
        )
    else:
        loaded = TextGenerator.from_pretrained(output)
        data = from_dict(DataConfig, reader.meta["config"]["data"], where="test")
        stream = TokenStream(data, seed=0, rows_per_step=2)
        inputs = recipe.prepare(stream.batch(stream.plan(0), slice(None)), step=0).inputs
        theirs = module(**inputs).loss_sums["flow"]
        if name == "cola":
            mean, log_variance, _ = loaded.vae.encode(inputs["tokens"], inputs["layout"])
            latents = loaded.vae.standardise(mean + (0.5 * log_variance).exp() * inputs["posterior_noise"])
            inputs = {**inputs["streams"].inputs(inputs["tokens"], latents), "self_condition": False}
        if name == "ldlm":
            latents = loaded.vae.encode(inputs["tokens"], inputs["shot"].layout)[0]
            condition = inputs["self_condition"]
            inputs = {**inputs["shot"].inputs(inputs["tokens"], latents), "self_condition": condition}
        pairs = [(loaded.module(**inputs).loss_sums["flow"], theirs)]
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_ldlm_on_extracted_states_takes_the_steps_of_the_online_model(
    alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The same losses, but for rounding and for means and deviations of the whole split instead of the first rows';
    what was not extracted is as if it were not there."""
    from data_tools.extract_hidden_states import main as extract

    directory, base = alone
    model, shards = str(directory / "model_lm"), base["data"]["shards"]
    options = ["--shards", shards, "--model", model, "--layer", "-3", "--max-tokens", "32"]
    for name, more in (("states", []), ("some", ["--limit-tokens", "2000"])):
        extract([*options, "--output", str(tmp_path / name), *more])
    runs: dict[str, list[float]] = {}
    for name in ("online", "states", "some"):
        given = [] if name == "online" else [f"--data.hidden_states={tmp_path / name}"]
        steps = ["--config", str(directory / "ldlm.yaml"), f"--run_dir={tmp_path / f'run_{name}'}", "--max_steps=3"]
        launch("PretrainLDLMConfig", [*steps, "--training.micro_batch_rows=8", *given])
        runs[name] = [record["loss"] for record in records(tmp_path / f"run_{name}") if "loss" in record]
    assert len(runs["online"]) == 3 and runs["states"] == pytest.approx(runs["online"], rel=0.03)
    assert runs["some"] != pytest.approx(runs["online"], rel=1e-3)
    assert all(math.isfinite(loss) for loss in runs["some"])


def test_a_vae_without_statistics_is_not_exported(alone: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    directory, _ = alone
    options = [f"--run_dir={tmp_path / 'run'}", "--training.micro_batch_rows=4", "--save_every_steps=2"]
    launch("PretrainVAEConfig", ["--config", str(directory / "vae.yaml"), *options])
    with pytest.raises(ConfigError, match="no statistics of the latents"):
        export(tmp_path / "run", tmp_path / "model", step=2)
    export(tmp_path / "run", tmp_path / "model")
