"""A denoiser's trunk that starts as a trained causal language model (DiffuLLaMA, arXiv 2410.17891; Dream 7B).

The clean history of block-causal training is read as that language model reads it, up to the tokens of its own block
that it may now see too; what noise, timestep and latents mean is learned on top.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatext.config import ConfigError
from megatext.nn.dit import TextDiT
from megatext.tokenizer import load_tokenizer


def load_language_model(network: TextDiT, directory: str | Path, tokenizer_fingerprint: str) -> None:
    """Copy the weights of a Hugging Face Qwen3 model into `network`, in place: with its timestep modulation at its
    start (gates 1, shifts and scales 0) the trunk then computes what the language model's does.

    Raises ConfigError where the sizes or the tokenizers differ, naming what to set."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (Path(directory) / "config.json").is_file():
        raise ConfigError(f"dit.warm_start: {directory} holds no Hugging Face model (no config.json)")
    lm_config = AutoConfig.from_pretrained(directory)
    _check_fit(network, lm_config, directory)
    if load_tokenizer(directory).fingerprint() != tokenizer_fingerprint:
        raise ConfigError(f"dit.warm_start: the tokenizer of {directory} is not the VAE's")
    weights = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()
    with torch.no_grad():
        for index, block in enumerate(network.trunk.blocks):
            own = {
                name.removeprefix(f"model.layers.{index}."): value
                for name, value in weights.items()
                if name.startswith(f"model.layers.{index}.")
            }
            for name, value in block_weights(own, lm_config).items():
                block.get_parameter(name).copy_(value)
        network.trunk.norm.weight.copy_(weights["model.norm.weight"])  # type: ignore[operator]
        assert network.token_embedding is not None
        network.token_embedding.weight.copy_(weights["model.embed_tokens.weight"])
        network.neighbour_embedding.weight.copy_(weights["model.embed_tokens.weight"])


def block_weights(layer: dict[str, Tensor], lm_config: Any) -> dict[str, Tensor]:
    """A Qwen3 layer's weights under the names of `nn.blocks.Block`. The gains of its norms go into the matrices that
    read them, because a modulated norm has none; grouped keys and values are repeated for every query head."""
    repeats = lm_config.num_attention_heads // lm_config.num_key_value_heads

    def of_every_head(weight: Tensor) -> Tensor:
        heads = weight.unflatten(0, (lm_config.num_key_value_heads, -1))
        return heads.repeat_interleave(repeats, dim=0).flatten(0, 1)

    names = ("q_proj", "k_proj", "v_proj")
    q, k, v = (layer[f"self_attn.{name}.weight"] * layer["input_layernorm.weight"] for name in names)
    gate, up = (
        layer[f"mlp.{name}.weight"] * layer["post_attention_layernorm.weight"] for name in ("gate_proj", "up_proj")
    )
    return {
        "attention.qkv.weight": torch.cat((q, of_every_head(k), of_every_head(v))),
        "attention.out.weight": layer["self_attn.o_proj.weight"],
        "attention.q_norm.weight": layer["self_attn.q_norm.weight"],
        "attention.k_norm.weight": layer["self_attn.k_norm.weight"],
        "mlp.up.weight": torch.cat((gate, up)),
        "mlp.down.weight": layer["mlp.down_proj.weight"],
    }


def _check_fit(network: TextDiT, lm_config: Any, directory: str | Path) -> None:
    """Raise ConfigError unless the trunk can hold this language model."""
    if lm_config.model_type != "qwen3":
        raise ConfigError(f"dit.warm_start: {directory} is a {lm_config.model_type} model; qwen3 is what is known here")
    if network.token_embedding is None or not lm_config.tie_word_embeddings:
        raise ConfigError("dit.warm_start needs network.token_embedding: true and a model with tied embeddings")
    trunk = network.config.trunk
    width = lm_config.hidden_size
    wanted = {
        "trunk.layers": (trunk.layers, lm_config.num_hidden_layers),
        "trunk.width": (trunk.width, width),
        "trunk.heads": (trunk.heads, lm_config.num_attention_heads),
        "trunk.width / trunk.heads": (trunk.width // trunk.heads, lm_config.head_dim),
        "trunk.mlp": (trunk.mlp, "swiglu"),
        "trunk.mlp_ratio": (trunk.mlp_ratio, lm_config.intermediate_size / width),
        "trunk.norm": (trunk.norm, "rms"),
        "trunk.qk_norm": (trunk.qk_norm, True),
        "trunk.rope_theta": (trunk.rope_theta, lm_config.rope_parameters["rope_theta"]),
        "trunk.initial_gate": (trunk.initial_gate, 1.0),
        "unit_input": (network.config.unit_input, False),
    }
    for name, (have, want) in wanted.items():
        if have != want:
            raise ConfigError(f"dit.warm_start: {directory} needs dit.network.{name} {want}, it is {have}")
