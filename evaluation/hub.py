"""Models named by a directory or by a name on the Hugging Face hub, and what to say where the hub cannot be reached."""

import json
import os
from pathlib import Path
from typing import Any

from megatext.config import ConfigError
from megatext.tokenizer import Tokenizer

_WEIGHTS = ["*.safetensors", "*.json", "*.txt", "*.model"]


def offline_hint(option: str) -> str:
    """What to do where something is not on this machine: which option takes a local copy."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    forbids = "; HF_HUB_OFFLINE forbids fetching it" if offline else ""
    return f"{forbids}; without a network give {option}"


def model_directory(name_or_directory: str, option: str) -> Path:
    """The directory of a model: the one given, or the hub's snapshot of that name, fetched once into the hub's cache.

    Raises ConfigError naming `option` where it is neither here nor to be had."""
    path = Path(name_or_directory)
    if path.is_dir():
        # a release in Cola DLM's format has one a network
        if not any((path / name).is_file() for name in ("config.json", "cola_dit/config.json")):
            raise ConfigError(f"{option} {path}: not a model directory (no config.json)")
        return path
    if path.is_absolute() or name_or_directory.startswith(".") or name_or_directory.count("/") > 1:
        raise ConfigError(f"{option} {path}: no such model directory")
    from huggingface_hub import snapshot_download

    try:
        fetched = Path(snapshot_download(name_or_directory, allow_patterns=_WEIGHTS))
        if not any(fetched.glob("*.safetensors")):
            fetched = Path(snapshot_download(name_or_directory, allow_patterns=[*_WEIGHTS, "*.bin"]))
    except (OSError, ValueError) as error:  # the hub's errors are among these
        reason = " ".join(str(error).split())[:200]
        hint = offline_hint(f"{option} DIR, a local copy of the model")
        raise ConfigError(f"{option} {name_or_directory}: no such directory, nor on the hub ({reason}){hint}") from None
    if not any(fetched.glob("*.safetensors")) and not any(fetched.glob("*.bin")):
        hint = offline_hint(f"{option} DIR, a local copy of the model")
        raise ConfigError(f"{option} {name_or_directory}: its weights are not on this machine{hint}")
    return fetched


def text_start(tokenizer: Tokenizer, config: Any) -> list[int]:
    """What stands before every text a causal LM reads: its tokenizer's start, unless the model has no begin-of-text and
    so never saw one (baselines trained here)."""
    return [] if getattr(config, "bos_token_id", None) is None else list(tokenizer.start_ids)


def scoring_model(name_or_directory: str, option: str) -> Path:
    """The directory of a Hugging Face model that scores. Raises ConfigError for what megatext exported as its own."""
    directory = model_directory(name_or_directory, option)
    described = directory / "config.json"
    kind = json.loads(described.read_text()).get("kind") if described.is_file() else "cola_dlm"
    if kind is not None:
        raise ConfigError(
            f"{option} {directory}: a {kind} model; give a Hugging Face model (an exported AR baseline is one)"
        )
    return directory
