"""TextVAE and TextDiT through their launchers: two ranks of ZeRO-3 against one process, export, generation."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from megatext.export import export
from megatext.generation import SamplingConfig, TextGenerator
from tests.training.toy import REPOSITORY, records, run_ranks

TRUNK = {"layers": 2, "width": 32, "heads": 2, "activation_checkpointing": 1}
COMMON = {
    "max_steps": 4,
    "optimizer": {"name": "muon", "learning_rate": 0.01},
    "training": {"rows_per_step": 8, "precision": "fp32", "ema_decay": 0.9},
    "logging": {"log_every_steps": 1},
}
VAE = {"network": {"latent_channels": 8, "encoder": {**TRUNK, "layers": 0}, "decoder": TRUNK}, "decoder_noise": 0.5}
BLOCKS = {
    "network": {"trunk": TRUNK, "output": "tokens", "token_embedding": True, "self_conditioning": True},
    "flow": {
        "objective": "token_cross_entropy",
        "token_likelihood": True,
        "block_tokens": 2,
        "self_conditioning_probability": 0.5,
    },
}
ONE_SHOT = {"network": {"trunk": TRUNK, "time_conditioning": "none"}, "flow": {"null_condition": "zeros"}}


def pretrain(world: int, launcher: str, config: dict[str, object], directory: Path) -> Path:
    """Train on `world` ranks, with the same global batch; returns the run directory."""
    directory.mkdir()
    run = directory / f"{launcher}_{world}"
    path = directory / f"{launcher}_{world}.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(run), **COMMON, **config}))
    command = [sys.executable, f"launch/pretrain_{launcher}.py", "--config", str(path)]
    command += [f"--training.micro_batch_rows={4 if world == 1 else 2}"]
    if world > 1:
        command += ["--deepspeed_config", "ds_configs/zero3.json"]
    finished = run_ranks(world, command)
    assert finished.returncode == 0, finished.stdout[-3000:]
    return run


@pytest.mark.dist
def test_two_ranks_of_zero3_equal_one_process(shards: Path, tmp_path: Path) -> None:
    assert (REPOSITORY / "ds_configs" / "zero3.json").is_file()
    data = {"shards": str(shards), "row_tokens": 32, "max_tokens": 32}
    runs = [pretrain(world, "vae", {"data": data, "vae": VAE}, tmp_path / f"vae{world}") for world in (1, 2)]
    assert_same(*runs)
    finished = [json.loads((run / "finished.json").read_text()) for run in runs]
    assert finished[0]["latent_std"] == pytest.approx(finished[1]["latent_std"], rel=1e-4)
    export(runs[1], tmp_path / "vae", ema=True)
    for name, dit in (("blocks", BLOCKS), ("one_shot", ONE_SHOT)):
        config = {"data": data, "dit": {**dit, "vae": str(tmp_path / "vae")}}
        runs = [pretrain(world, "dit", config, tmp_path / f"{name}{world}") for world in (1, 2)]
        assert_same(*runs)
        export(runs[1], tmp_path / name, ema=True)
        generator = TextGenerator.from_pretrained(tmp_path / name)
        texts = generator.generate(
            ["The quick", ""], target_tokens=[5, 5], seeds=[0, 1], sampling=SamplingConfig(steps=2)
        )
        assert len(texts) == 2
        previews = [next((run / "samples").iterdir()).read_text() for run in runs]
        assert previews[0] == previews[1]


def assert_same(one: Path, two: Path) -> None:
    first, second = ([r["loss"] for r in records(run) if "loss" in r] for run in (one, two))
    assert len(first) == 4 and first == pytest.approx(second, rel=2e-5)
