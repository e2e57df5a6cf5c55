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
from megatext.recipes import cola_format
from megatext.tokenizer import Tokenizer, load_tokenizer


def weights_hash(directory: str | Path) -> str:
    """sha256 of a model's weights and description: what a DiT remembers of its VAE and of what it started from."""
    digest = hashlib.sha256()
    folders = [Path(directory)]
    if cola_format.is_cola_directory(directory):
        folders = [Path(directory) / name for name in (cola_format.VAE, cola_format.DIT)]
    files = [path for folder in folders for path in (folder / "config.json", *sorted(folder.glob("*.safetensors")))]
    for path in files:
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
    """Write a self-contained model directory; `vae` is copied into it where it is not there yet, its hash recorded,
    as is the hash of the model that training started from."""
    output.mkdir(parents=True, exist_ok=True)
    loaded = load_tokenizer(tokenizer)
    loaded.save(output)
    description = {"kind": kind, "config": to_dict(config), "tokenizer_fingerprint": loaded.fingerprint()}
    if vae is not None:
        _copy_vae(vae, output / "vae")
        description["vae_hash"] = weights_hash(output / "vae")
    if warm_start:
        description["warm_start_hash"] = weights_hash(warm_start)
    save_file({name: value.contiguous() for name, value in weights.items()}, output / "model.safetensors")
    (output / "config.json").write_text(json.dumps(description, indent=2) + "\n")


def write_vae(output: Path, config: TextVAEConfig, weights: dict[str, Tensor], *, tokenizer: Path) -> None:
    """Write a TextVAE. Raises ConfigError where it has not got the statistics that its configuration speaks of."""
    if config.standardised and not weights["latent_mean"].any() and bool((weights["latent_std"] == 1).all()):
        raise ConfigError(
            "this checkpoint has no statistics of the latents, which are measured when a run ends: train to "
            "max_steps (with validation_batches > 0), or lower max_steps and run the same command"
        )
    write_model(output, "text_vae", config, weights, tokenizer=tokenizer)


def _copy_vae(directory: Path, output: Path) -> None:
    if directory == output:
        return
    if cola_format.is_cola_directory(directory):
        vae = cola_format.read_vae(directory)
        write_vae(output, vae.config, vae.state_dict(), tokenizer=directory)
    else:
        shutil.copytree(directory, output, dirs_exist_ok=True)


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


def is_text_vae(directory: str | Path) -> bool:
    """Whether there is a TextVAE, exported or in Cola DLM's format."""
    return cola_format.is_cola_directory(directory) or Path(directory, "config.json").is_file()


def text_vae_config(directory: str | Path) -> TextVAEConfig:
    """The architecture of a TextVAE."""
    if cola_format.is_cola_directory(directory):
        return cola_format.read_vae_config(directory)
    described = read_description(directory, "text_vae")["config"]
    return from_dict(TextVAEConfig, described, where=f"{directory}/config.json")


def check_vocabulary(vae: TextVAE, tokenizer: Tokenizer, directory: str | Path) -> None:
    """Raise ConfigError where a tokenizer gives ids that a VAE has no embedding for."""
    if tokenizer.vocab_size > vae.vocab_size:
        raise ConfigError(f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, the VAE {vae.vocab_size}")


def load_text_vae(directory: str | Path) -> tuple[TextVAE, str]:
    """A TextVAE, exported or in Cola DLM's format (CPU, float32, frozen, evaluation mode), and the fingerprint of its
    tokenizer."""
    if cola_format.is_cola_directory(directory):
        vae, tokenizer = cola_format.read_vae(directory), load_tokenizer(directory)
        check_vocabulary(vae, tokenizer, directory)
        return vae, tokenizer.fingerprint()
    description = read_description(directory, "text_vae")
    weights = load_file(Path(directory) / "model.safetensors")
    # a network may know more ids than its tokenizer gives
    vae = TextVAE(text_vae_config(directory), len(weights["unembedding.weight"]))
    vae.load_state_dict(weights)
    return vae.eval().requires_grad_(False), description["tokenizer_fingerprint"]
