"""Every recipe at a size of seconds, and how to train them in processes."""

from pathlib import Path
from typing import Any

import yaml

from tests.processes import run_all

TRUNK = {"layers": 2, "width": 32, "heads": 2, "activation_checkpointing": 1}
COMMON = {
    "max_steps": 4,
    "optimizer": {"name": "muon", "learning_rate": 0.01, "warmup_steps": 2},
    "training": {"rows_per_step": 8, "micro_batch_rows": 2, "precision": "fp32", "ema_decays": [0.9]},
    "logging": {"log_every_steps": 1},
}
LM = {"model": {"width": 32, "layers": 3, "heads": 2, "activation_checkpointing": 2}}
VAE = {
    "vae": {
        "network": {"latent_channels": 8, "encoder": {**TRUNK, "layers": 0}, "decoder": TRUNK},
        "decoder_noise": 0.5,
    }
}
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
SYSTEMS = {
    "lm": ("lm", LM),
    "vae": ("vae", VAE),
    "blocks": ("dit", {"dit": BLOCKS}),
    "one_shot": ("dit", {"dit": ONE_SHOT}),
}


def command(name: str, directory: Path, base: dict[str, Any], *options: str) -> list[str]:
    """The launcher of a system, with run_dir `directory/NAME`. `base`: shards, and the VAE that TextDiTs stand on."""
    directory.mkdir(exist_ok=True, parents=True)
    launcher, own = SYSTEMS[name]
    if "dit" in own:
        own = {"dit": {**own["dit"], "vae": base["vae"]}}
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(directory / name), "data": base["data"], **COMMON, **own}))
    return [f"launch/pretrain_{launcher}.py", "--config", str(path), *options]


def pretrain(names: list[str], world: int, directory: Path, base: dict[str, Any], *options: str) -> None:
    """Train systems on `world` ranks, with the same global batch; run directories are directory/NAME."""
    statuses = run_all(world, [command(name, directory, base, *options) for name in names])
    assert statuses == [0] * len(names)
