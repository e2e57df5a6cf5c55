"""The autoregressive baseline: a Qwen3 language model of any size, exported in Hugging Face format.

It is also the small frozen teacher and the featuriser of the metrics where no pretrained model is at hand.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatext.config import ConfigError
from megatext.data.packing import TokenBatch
from megatext.data.remote import local_folder
from megatext.data.shards import TOKENIZER_FOLDER, read_manifest
from megatext.recipes.base import Output, Pass, Prepared, Recipe
from megatext.rng import generator, uniform
from megatext.tokenizer import load_tokenizer
from megatext.training.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class CausalLMConfig:
    """Sizes of the network. The vocabulary is the tokenizer's."""

    width: int = 256
    """Of the residual stream."""
    layers: int = 6
    """Decoder layers."""
    heads: int = 4
    """Query heads; width / heads is a head's size."""
    key_value_heads: int | None = None
    """Key and value heads; null: as many as query heads."""
    mlp_width: int | None = None
    """Hidden width of the gated MLP; null: 8/3 of the width, rounded up to a multiple of 64."""
    tied_embeddings: bool = True
    """Use the embedding as output head."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    attention: Literal["eager", "sdpa"] | None = None
    """null: eager on a CPU, where SDPA with a mask is slow for short rows, sdpa on a GPU."""
    activation_checkpointing: int = 0
    """Recompute every n-th layer in the backward pass; 0 keeps all activations."""
    logits_chunk_tokens: int | None = None
    """Compute logits and loss for this many tokens at a time, recomputed in the backward pass: saves memory where
    the vocabulary is large. null: all at once."""

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ConfigError("model.width / model.heads must be a whole even number")
        if self.heads % (self.key_value_heads or self.heads):
            raise ConfigError("model.heads must be a multiple of model.key_value_heads")


@dataclass(frozen=True, kw_only=True)
class PretrainLMConfig(RunConfig):
    """Configuration of launch/pretrain_lm.py."""

    model: CausalLMConfig = field(default_factory=CausalLMConfig)
    """The network."""


class CausalLM(nn.Module):
    """A Hugging Face causal language model with the loss of packed rows."""

    lm: Any

    def __init__(self, lm: nn.Module, logits_chunk_tokens: int | None) -> None:
        super().__init__()
        self.lm = lm
        self.logits_chunk_tokens = logits_chunk_tokens

    def forward(self, tokens: Tensor, targets: Tensor, position: Tensor, allowed: Tensor) -> Output:
        """`tokens`, `targets` (-100: no loss) and `position` int64 `[rows, row_tokens]`; `allowed` bool
        `[rows, 1, row_tokens, row_tokens]`, query before key. Sums are fp32."""
        states = self.lm.model(
            input_ids=tokens, position_ids=position, attention_mask=self.mask(allowed), use_cache=False
        ).last_hidden_state
        states, flat = states.flatten(0, 1), targets.flatten()
        if self.logits_chunk_tokens is None:
            total, correct = self._loss(states, flat)
        else:
            size = self.logits_chunk_tokens
            chunks = zip(states.split(size), flat.split(size), strict=True)
            loss = partial(checkpoint, self._loss, use_reentrant=False) if self.training else self._loss
            parts = [loss(s, t) for s, t in chunks]
            total, correct = (torch.stack(column).sum() for column in zip(*parts, strict=True))
        count = (flat >= 0).sum()
        return Output({"cross_entropy": total}, {"accuracy": (correct, count)})

    def mask(self, allowed: Tensor) -> Tensor:
        """`allowed` in the form that the attention wants: boolean for SDPA, additive for eager."""
        if self.lm.config._attn_implementation == "sdpa":
            return allowed
        dtype = self.lm.lm_head.weight.dtype
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)

    def _loss(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.lm.lm_head(states).float()
        total = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        return total, (logits.detach().argmax(-1) == targets).sum()


class CausalLMRecipe(Recipe):
    """Next-token prediction within each segment of packed rows."""

    module: CausalLM

    def __init__(self, config: PretrainLMConfig) -> None:
        shards = local_folder(config.data.shards)
        read_manifest(shards)  # a clear error where there are no shards
        self.tokenizer = load_tokenizer(shards / TOKENIZER_FOLDER)
        self.tokenizer_fingerprint = self.tokenizer.fingerprint()
        self.config = config
        self.module = make(config, self.tokenizer.vocab_size, self.tokenizer.eos_id, self.tokenizer.pad_id)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Tensor by tensor from (seed, name): the same on every rank and for any order."""
        for name, parameter in self.module.lm.named_parameters():
            if parameter.dim() >= 2:
                # GPT-2's scaling: what writes into the residual stream starts smaller, the deeper the network.
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * self.config.model.layers) if writes else 0.02
                parameter.normal_(0.0, std, generator=generator(self.config.seed, f"init/{name}"))

    def prepare(self, batch: TokenBatch, *, step: int, purpose: str = "train") -> Prepared:
        tokens, segment, position = batch.tokens, batch.segment, batch.position
        targets = torch.full_like(tokens, -100)
        same = (segment[:, 1:] == segment[:, :-1]) & (segment[:, 1:] >= 0)
        targets[:, :-1] = torch.where(same, tokens[:, 1:], -100)
        inputs = {"tokens": tokens, "targets": targets, "position": position, "allowed": causal_in_segment(segment)}
        return Prepared(inputs, {"cross_entropy": same.sum()})

    def loss_weights(self, step: int) -> dict[str, float]:
        return {"cross_entropy": 1.0}

    def preview(self, seed: int, count: int = 4, tokens: int = 64) -> list[str]:
        """Unconditional samples at temperature 1, starting after an end of text."""
        device = self.module.lm.lm_head.weight.device
        ids = torch.full((count, tokens + 1), self.tokenizer.eos_id, device=device)
        allowed = causal_in_segment(torch.zeros_like(ids))
        position = torch.arange(tokens + 1, device=device).expand(count, -1)
        draws = torch.from_numpy(uniform(seed, "preview", range(count * tokens)).reshape(count, tokens)).to(device)
        for index in range(tokens):
            # The inner model, always on the same shape: neither compiled nor cached, but a collective that all ranks
            # run equally often.
            states = self.module.lm.model(
                input_ids=ids, position_ids=position, attention_mask=self.module.mask(allowed), use_cache=False
            ).last_hidden_state
            logits = self.module.lm.lm_head(states[:, index : index + 1])[:, 0]
            cumulative = logits.double().softmax(-1).cumsum(-1)
            picked = torch.searchsorted(cumulative, draws[:, index : index + 1].contiguous()).clamp(
                max=logits.shape[-1] - 1
            )
            ids[:, index + 1] = picked[:, 0]
        texts = []
        for row in ids[:, 1:].tolist():
            end = row.index(self.tokenizer.eos_id) if self.tokenizer.eos_id in row else len(row)
            texts.append(self.tokenizer.decode(row[:end]))
        return texts

    def export(self, state_dict: dict[str, Tensor], output: Path) -> None:
        from transformers.utils import logging as transformers_logging

        self.module.load_state_dict(state_dict)
        transformers_logging.disable_progress_bar()
        self.module.lm.save_pretrained(output)
        self.tokenizer.save(output)


def causal_in_segment(segment: Tensor) -> Tensor:
    """int64 `[rows, n]` -> bool `[rows, 1, n, n]`: a token sees itself and what precedes it in its segment.

    Padding (-1) sees padding, so that no softmax is over nothing.
    """
    n = segment.shape[1]
    before = torch.ones(n, n, dtype=torch.bool, device=segment.device).tril()
    return ((segment[:, :, None] == segment[:, None, :]) & before)[:, None]


def make(config: PretrainLMConfig, vocab_size: int, eos_id: int = 0, pad_id: int = 0) -> CausalLM:
    """The network, fp32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = config.model
    on_gpu = torch.cuda.is_available()
    mlp_width = model.mlp_width or math.ceil(model.width * 8 / 3 / 64) * 64
    architecture = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=model.width,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.key_value_heads or model.heads,
        head_dim=model.width // model.heads,
        intermediate_size=mlp_width,
        max_position_embeddings=config.data.row_tokens,
        tie_word_embeddings=model.tied_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )
    architecture._attn_implementation = model.attention or ("sdpa" if on_gpu else "eager")
    lm = Qwen3ForCausalLM(architecture).float()
    if model.activation_checkpointing:
        lm.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=model.activation_checkpointing)
    return CausalLM(lm, model.logits_chunk_tokens)


def build(config: PretrainLMConfig) -> CausalLMRecipe:
    return CausalLMRecipe(config)


def needed(config: PretrainLMConfig) -> list[str]:
    return config.data.folders()


def passes(config: PretrainLMConfig, module: CausalLM, vocab_size: int) -> list[Pass]:
    module.lm.config._attn_implementation = "eager"  # as many operations as any, and countable
    tokens = torch.zeros(1, config.data.row_tokens, dtype=torch.long)
    return [Pass(lambda: module(tokens, tokens, tokens, causal_in_segment(tokens)))]
