"""The teacher behind `extract_hidden_states`: a Hugging Face model without its head, and the states of windows."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatext.data import DataError
from megatext.tokenizer import load_tokenizer

_SAME_STATES = {torch.float32: 1e-4, torch.bfloat16: 0.02}
"""Relative difference up to which states are the same: what another shape of the batch changes by rounding alone."""


@dataclass
class Teacher:
    """A loaded model and which of its states are wanted."""

    model: Any
    layer: int
    """Index into `hidden_states`: 0 is the embedding, -1 the last layer after its norm."""
    width: int

    @torch.no_grad()
    def states(self, windows: list[np.ndarray]) -> list[Tensor]:
        """`[tokens, width]` of each window, on the model's device and in its dtype; one padded forward pass."""
        longest = max(map(len, windows))
        ids = np.zeros((len(windows), longest), np.int64)
        mask = np.zeros((len(windows), longest), np.int64)
        for row, window in enumerate(windows):
            ids[row, : len(window)] = window
            mask[row, : len(window)] = 1
        device = self.model.device
        inputs = {"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.from_numpy(mask).to(device)}
        found = self.model(**inputs, output_hidden_states=True).hidden_states[self.layer]
        return [found[row, : len(window)] for row, window in enumerate(windows)]

    def states_in_order(self, windows: list[np.ndarray], batch_tokens: int) -> list[Tensor]:
        """States of the windows, run in order of length so that little is padding: at most `batch_tokens` tokens in a
        pass, padding included, or one window."""
        states: list[Tensor] = [torch.empty(0)] * len(windows)
        by_length = sorted(range(len(windows)), key=lambda number: len(windows[number]))
        while by_length:
            count = max(1, batch_tokens // len(windows[by_length[-1]]))
            batch, by_length = by_length[-count:], by_length[:-count]
            for number, result in zip(batch, self.states([windows[n] for n in batch]), strict=True):
                states[number] = result
        return states

    def is_causal(self, window: np.ndarray) -> bool:
        """Whether a token's state is the same when what follows is cut off: asked of the model, not of its name. The
        first token's state is left out, as it is huge in many models and the same in all texts."""
        half = max(2, len(window) // 2)
        whole, cut = self.states([window])[0][1:half].float(), self.states([window[:half]])[0][1:].float()
        differences = (whole - cut).norm(dim=1) / whole.norm(dim=1)
        return bool(differences.median() <= _SAME_STATES[self.model.dtype]) if len(differences) else True


def load_teacher(name: str, layer: int, device: str, *, tokenizer_fingerprint: str, max_tokens: int) -> Teacher:
    """The trunk of a causal language model or an encoder (of an encoder-decoder, the encoder), in evaluation mode:
    bf16 on accelerators, fp32 on a CPU. Raises DataError where it does not fit the shards."""
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # a head that is left out is no news
    logging.disable_progress_bar()
    try:
        found = load_tokenizer(name).fingerprint()
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DataError(f"--model {name}: no model with a tokenizer can be loaded from it ({error})") from error
    if found != tokenizer_fingerprint:
        raise DataError(
            f"--model {name}: its tokenizer is not the one of the shards; shard the text with --tokenizer {name}"
        )
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and max_tokens > positions:
        raise DataError(f"--max-tokens {max_tokens}: --model {name} was made for {positions} positions at most")
    layers: int = text_config.num_hidden_layers
    if not -layers - 1 <= layer <= layers:
        raise DataError(f"--layer {layer}: the model has hidden states {-layers - 1} to {layers}")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model: Any = AutoModel.from_pretrained(name, dtype=dtype)
    if config.is_encoder_decoder:
        model = model.get_encoder()
    else:
        model.config.use_cache = False
    return Teacher(model.to(device).eval(), layer, text_config.hidden_size)


def fingerprint(model: str) -> str:
    """sha256 over the config and the weight files of a local model; the name itself for a model on the hub."""
    path = Path(model)
    if not path.is_dir():
        return model
    digest = hashlib.sha256()
    for file in sorted([path / "config.json", *path.glob("*.safetensors"), *path.glob("*.bin")]):
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def forward_flops(model: str, windows: Iterator[np.ndarray]) -> tuple[int, float, int]:
    """(tokens, FLOPs, width) of running the teacher over windows, whose lengths are given in int64 arrays; loads no
    weights. Two a parameter and token, and four a channel and pair of tokens that attend to each other."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        network = AutoModel.from_config(config)
    if config.is_encoder_decoder:
        network = network.get_encoder()
    text = config.get_text_config()
    parameters = sum(p.numel() for p in network.parameters()) - network.get_input_embeddings().weight.numel()
    heads, layers = text.num_attention_heads, text.num_hidden_layers
    channels = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    tokens, pairs = 0, 0.0
    for lengths in windows:
        tokens += int(lengths.sum())
        pairs += float(np.square(lengths, dtype=np.float64).sum())  # also what a causal model is run with, masked
    return tokens, 2.0 * parameters * tokens + 4.0 * layers * channels * pairs, text.hidden_size
