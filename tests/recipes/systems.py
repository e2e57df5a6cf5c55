"""Every recipe at a size of seconds, and how to train them in processes."""

from pathlib import Path
from typing import Any

import torch
import yaml

from megatext import rng
from megatext.config import from_dict
from megatext.nn.blocks import initialise
from megatext.nn.text_vae import TextVAE, TextVAEConfig
from megatext.recipes.pretrained import write_vae
from megatext.tokenizer import load_tokenizer
from tests.processes import run_all

TRUNK = {"layers": 2, "width": 32, "heads": 2, "activation_checkpointing": 1}
OPTIMIZER = {"name": "muon", "learning_rate": 0.01, "warmup_steps": 2}
COMMON = {
    "max_steps": 4,
    "optimizer": OPTIMIZER,
    "training": {"rows_per_step": 8, "micro_batch_rows": 2, "precision": "fp32", "ema_decays": [0.9]},
    "logging": {"log_every_steps": 1},
}
LM = {"model": {"width": 32, "layers": 3, "heads": 2, "activation_checkpointing": 2}}
VAE = {
    "vae": {
        "network": {
            "latent_channels": 8,
            "encoder": {**TRUNK, "layers": 0},
            "decoder": TRUNK,
            "attention": "causal",
            "mask_token": True,
        },
        "decoder_noise": 0.5,
        "mask_weight": 0.1,
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
    "sampling": {"steps": 2, "solver": "ancestral", "temperature": 0.8, "guidance_scale": 2.0},
}
ONE_SHOT = {
    "network": {"trunk": TRUNK, "null_embedding": True},
    "flow": {
        "objective": "x0",
        "latent_loss": "velocity",
        "token_weight": 0.5,
        "consistency": {"weight": 0.5, "steps": 4, "warmup_steps": 2},
        "attention": "prefix",
        "segment_lengths": "log_uniform",
        "min_segment_tokens": 2,
        "infill_probability": 0.3,
    },
}
COLA = {
    "network": {"trunk": {**TRUNK, "qk_norm_kind": "layer"}, "timestep_layers": 3, "final_modulation": True},
    "flow": {"block_tokens": 4, "training_block_tokens": [1, 2, 4], "posterior": "sample"},
    "sampling": {"steps": 2, "grid": "uniform", "history": "latents"},
}
LDLM = {
    "autoencoder": {"latent_channels": 8, "encoder": TRUNK, "decoder": TRUNK, "token_decoder": TRUNK},
    "network": {"trunk": {**TRUNK, "initial_gate": 1.0}, "self_conditioning": True},
    "flow": {
        "path": "tan-3",
        "objective": "x0",
        "timesteps": {"distribution": "uniform"},
        "adaptive_timesteps": {"bins": 4, "decay": 0.5, "refresh_steps": 3},
        "self_conditioning_probability": 0.5,
    },
    "sampling": {"steps": 3},
    "encoder_warmup_steps": 4,
}
SYSTEMS = {
    "lm": ("lm", LM),
    "vae": ("vae", VAE),
    "blocks": ("dit", {"dit": BLOCKS}),
    "one_shot": ("dit", {"dit": ONE_SHOT}),
    "cola": ("cola", {"cola": COLA, "optimizer": {**OPTIMIZER, "learning_rate_scales": {"vae": 0.5}}}),
    "ldlm": ("ldlm", {"ldlm": LDLM}),
}


KINDS = {
    "lm": "PretrainLMConfig",
    "vae": "PretrainVAEConfig",
    "dit": "PretrainDiTConfig",
    "cola": "PretrainColaConfig",
    "ldlm": "PretrainLDLMConfig",
}


def write_cola_vae(directory: Path, shards: Path) -> None:
    """An untrained VAE for cola: causal encoder and decoder, and what else the release's has."""
    trunk = {**TRUNK, "norm_placement": "cola", "qk_norm_kind": "layer_all_heads", "mlp": "swiglu", "mlp_bias": True}
    network = {"latent_channels": 8, "attention": "causal", "encoder": {**trunk, "final_norm": False}, "decoder": trunk}
    network |= {"standardised": False, "mask_token": True, "output_projection": True, "unembedding_bias": True}
    config = from_dict(TextVAEConfig, network, where="test")
    vae = TextVAE(config, load_tokenizer(shards / "tokenizer").vocab_size)
    initialise(vae, lambda name, p: torch.randn(p.shape, generator=rng.generator(0, name)))
    write_vae(directory, config, vae.state_dict(), tokenizer=shards / "tokenizer")


def on_vae(name: str, vae: str) -> tuple[str, dict[str, Any]]:
    """Launcher and own part of the configuration of a system, on a VAE where it stands on one (cola on `vae`_cola)."""
    vae += "_cola" * (name == "cola")
    launcher, own = SYSTEMS[name]
    stands_on = {"dit": {"vae": vae}, "cola": {"vae": vae}, "ldlm": {"language_model": vae + "_lm"}}
    return launcher, {key: {**value, **stands_on.get(key, {})} for key, value in own.items()}


def command(name: str, directory: Path, base: dict[str, Any], *options: str) -> list[str]:
    """The launcher of a system, with run_dir `directory/NAME`. `base`: shards, and the VAE that TextDiTs stand on."""
    directory.mkdir(exist_ok=True, parents=True)
    launcher, own = on_vae(name, base["vae"])
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(directory / name), "data": base["data"], **COMMON, **own}))
    return [f"launch/pretrain_{launcher}.py", "--config", str(path), *options]


def pretrain(names: list[str], world: int, directory: Path, base: dict[str, Any], *options: str) -> None:
    """Train systems on `world` ranks, with the same global batch; run directories are directory/NAME."""
    statuses = run_all(world, [command(name, directory, base, *options) for name in names])
    assert statuses == [0] * len(names)
