"""LDLM's autoencoder with the language model whose states it reads: tokens in, tokens out, as a TextVAE does it."""

import json
import shutil
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from megatext.config import ConfigError, from_dict
from megatext.data.teacher import Teacher, load_teacher
from megatext.nn.layout import Layout, allowed
from megatext.nn.perceiver import LatentAutoencoder, LatentAutoencoderConfig
from megatext.recipes.pretrained import read_description, write_model

KIND = "hidden_autoencoder"
LANGUAGE_MODEL = "language_model"
"""Its folder in a model's."""


@dataclass(frozen=True)
class HiddenAutoencoderConfig:
    """config.json of an exported one."""

    network: LatentAutoencoderConfig = field(default_factory=LatentAutoencoderConfig)
    """Sizes of the trained part."""
    layer: int = -3
    """Which hidden states of the language model it reads."""
    causal: bool = True
    """Whether these depend on nothing that follows."""


@torch.no_grad()
def states_of_rows(teacher: Teacher, tokens: Tensor, layout: Layout, causal: bool) -> Tensor:
    """A language model's states, float32 `[rows, columns, width]`, of packed rows of tokens `[rows, columns]`: every
    segment is read alone and from its start, a target without its context where the model is not `causal`. Rows stay
    rows, so that nothing waits for the device to count; what stands on padding means nothing. Raises ConfigError for a
    model that takes no positions."""
    if "position_ids" not in signature(teacher.model.forward).parameters:
        raise ConfigError(f"{type(teacher.model).__name__} takes no positions, so it cannot read packed rows")
    position = layout.position.masked_fill(~layout.real, 0)  # beyond the end of a row there may be no position
    if causal:  # a context may also stand behind its target
        seen = allowed("causal", layout, layout) & allowed("prefix", layout, layout)
    else:
        seen = allowed("full", layout.separated(), layout.separated())
    dtype = teacher.model.dtype
    mask = torch.zeros(seen.shape, dtype=dtype, device=tokens.device).masked_fill(~seen, torch.finfo(dtype).min)
    found = teacher.model(
        input_ids=tokens, attention_mask=mask[:, None], position_ids=position, output_hidden_states=True
    )
    return found.hidden_states[teacher.layer].float()


class HiddenAutoencoder(nn.Module):
    """A `LatentAutoencoder` on a frozen language model, with what generation asks of a TextVAE. Latents are of fixed
    scale as they are, so they are standardised by nothing."""

    token_local = False

    def __init__(
        self, network: LatentAutoencoder, language_model: Path, layer: int, causal: bool, fingerprint: str
    ) -> None:
        super().__init__()
        self.network, self.vocab_size, self.config = network, network.vocab_size, network.config
        self._source, self._causal = (language_model, layer, fingerprint), causal
        self._teacher: Teacher | None = None

    def encode(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, None, None]:
        """Latents `[rows, tokens, channels]` of tokens `[rows, tokens]`. The language model is loaded when something is
        first encoded: from nothing, text is written without it."""
        if not bool(layout.real.any()):
            return torch.zeros(*tokens.shape, self.config.latent_channels, device=tokens.device), None, None
        if self._teacher is None:
            self._teacher = _load(*self._source, str(tokens.device))
        longest = int(layout.position[layout.real].max()) + 1
        most = getattr(self._teacher.model.config.get_text_config(), "max_position_embeddings", longest)
        if longest > most:
            raise ConfigError(f"a prompt of {longest} tokens: the language model reads {most} at most")
        states = states_of_rows(self._teacher, tokens, layout, self._causal)
        return self.network.encode_states(self.network.standardise(states), layout), None, None

    def decode(self, latents: Tensor, layout: Layout) -> Tensor:
        """Logits `[rows, tokens, vocab_size]`."""
        return self.network.token_logits(self.network.decode_states(latents, layout), layout)

    def standardise(self, latents: Tensor) -> Tensor:
        return latents

    def unstandardise(self, latents: Tensor) -> Tensor:
        return latents


def _load(directory: Path, layer: int, fingerprint: str, device: str) -> Teacher:
    return load_teacher(str(directory), layer, device, tokenizer_fingerprint=fingerprint, max_tokens=0)


def write_hidden_autoencoder(
    output: Path, config: HiddenAutoencoderConfig, weights: dict[str, Tensor], *, language_model: Path
) -> None:
    """Write it, the language model with it."""
    write_model(output, KIND, config, weights, tokenizer=language_model)
    folder = output / LANGUAGE_MODEL
    folder.mkdir(exist_ok=True)
    weights_files = ".safetensors" if any(language_model.glob("*.safetensors")) else ".bin"
    for file in language_model.iterdir():  # a download may have the weights of other frameworks too
        if file.is_file() and file.suffix in (".json", ".txt", ".model", weights_files):
            shutil.copy2(file, folder)


def is_hidden_autoencoder(directory: Path) -> bool:
    """Whether an exported autoencoder is one of these."""
    return bool(json.loads((directory / "config.json").read_text())["kind"] == KIND)


def load_hidden_autoencoder(directory: Path) -> tuple[HiddenAutoencoder, str]:
    """What `write_hidden_autoencoder` wrote (CPU, float32, frozen, evaluation mode), and its tokenizer's fingerprint.
    Raises ConfigError where it is something else."""
    description = read_description(directory, KIND)
    config = from_dict(HiddenAutoencoderConfig, description["config"], where=f"{directory}/config.json")
    weights = load_file(directory / "model.safetensors")
    network = LatentAutoencoder(config.network, len(weights["hidden_mean"]), len(weights["unembedding.weight"]))
    network.load_state_dict(weights)
    fingerprint = description["tokenizer_fingerprint"]
    language_model = directory / LANGUAGE_MODEL
    loaded = HiddenAutoencoder(network, language_model, config.layer, config.causal, fingerprint)
    return loaded.eval().requires_grad_(False), fingerprint
