"""Exported models: a directory with config.json, model.safetensors, the tokenizer, and for a DiT its VAE in vae/."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from megatext.config import ConfigError, from_dict, to_dict
from megatext.nn.text_vae import TextVAE, TextVAEConfig
from megatext.tokenizer import load_tokenizer


def weights_hash(directory: str | Path) -> str:
    """sha256 of a model's weights and description: what a DiT remembers of its VAE and of what it started from."""
    digest = hashlib.sha256()
    for path in [Path(directory) / "config.json", *sorted(Path(directory).glob("*.safetensors"))]:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def write_model(
    output: Path,
    kind: str,
    config: Any,
    weights: dict[str, Tensor],
    *,
    tokenizer: Path,
    vae: Path | None = None,
    warm_start: str | Path = "",
) -> None:
    """Write a self-contained model directory; `vae` is copied into it and its hash recorded, as is the hash of the
    model that training started from."""
    output.mkdir(parents=True, exist_ok=True)
    loaded = load_tokenizer(tokenizer)
    loaded.save(output)
    description = {"kind": kind, "config": to_dict(config), "tokenizer_fingerprint": loaded.fingerprint()}
    if vae is not None:
        shutil.copytree(vae, output / "vae", dirs_exist_ok=True)
        description["vae_hash"] = weights_hash(vae)
    if warm_start:
        description["warm_start_hash"] = weights_hash(warm_start)
    save_file({name: value.contiguous() for name, value in weights.items()}, output / "model.safetensors")
    (output / "config.json").write_text(json.dumps(description, indent=2) + "\n")


def read_description(directory: str | Path, kind: str) -> dict[str, Any]:
    """config.json of an exported model, checked to be of a kind."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist: export the model first, with "
            f"`python launch/export.py --run RUN --output {directory}`"
        )
    description = json.loads(path.read_text())
    if description.get("kind") != kind:
        raise ConfigError(f"{path} describes a {description.get('kind', 'Hugging Face model')}, not a {kind}")
    return description


def text_vae_config(directory: str | Path) -> TextVAEConfig:
    """The architecture of an exported TextVAE."""
    described = read_description(directory, "text_vae")["config"]
    return from_dict(TextVAEConfig, described, where=f"{directory}/config.json")


def load_text_vae(directory: str | Path) -> tuple[TextVAE, str]:
    """An exported TextVAE (CPU, float32, frozen, evaluation mode) and the fingerprint of its tokenizer."""
    description = read_description(directory, "text_vae")
    vae = TextVAE(text_vae_config(directory), load_tokenizer(directory).vocab_size)
    vae.load_state_dict(load_file(Path(directory) / "model.safetensors"))
    return vae.eval().requires_grad_(False), description["tokenizer_fingerprint"]
