"""Cola DLM's Hugging Face format: `cola_dit/`, `cola_vae/` and `tokenizer.json` in one directory, read and written.

The networks are ours; what differs is named here once: tensors' names, the order of a SwiGLU's halves, of a timestep's
sinusoids and of rotated channels (theirs are pairs (2i, 2i + 1), ours (i, i + r/2)). Their patch embedding of size 1 is
a matrix behind the embedding and is folded into it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megatext.config import ConfigError
from megatext.flow.timesteps import TimestepConfig
from megatext.nn.blocks import TrunkConfig
from megatext.nn.dit import TextDiT, TextDiTConfig
from megatext.nn.text_vae import TextVAE, TextVAEConfig
from megatext.recipes.denoiser import check_block_sizes
from megatext.recipes.flow_config import FlowConfig

DIT, VAE, TOKENIZER = "cola_dit", "cola_vae", "tokenizer.json"

Weights = dict[str, Tensor]

_BLOCK_OF_VAE = {
    "attention_norm": "norm_attn",
    "attention.qkv": "qkv_proj",
    "attention.q_norm": "q_norm",
    "attention.k_norm": "k_norm",
    "attention.out": "attn_out_proj",
    "mlp_norm": "norm_ffn",
    "mlp.up": "ffn_proj",
    "mlp.down": "ffn_out",
}
_REST_OF_VAE = {
    "posterior": "encoder.final_layer",
    "latent_in": "decoder.in_layer",
    "output_projection.0": "decoder.unpatch_layer",
    "output_projection.1": "decoder.final_norm",
    "unembedding": "decoder.final_layer",
}
_BLOCK_OF_DIT = {
    "attention.qkv": "msa.proj_qkv",
    "attention.q_norm": "msa.norm_q",
    "attention.k_norm": "msa.norm_k",
    "attention.out": "msa.proj_out",
    "mlp.up": "mlp.proj_in",
    "mlp.down": "mlp.proj_out",
}
_MODULATION = (("msa_in", 2), ("msa_out", 1), ("mlp_in", 2), ("mlp_out", 1))
"""Parts of a block's modulation in our order, and how many widths each has."""

_REST_OF_DIT = {
    "latent_in": "txt_in.proj",
    "timestep.mlp.0": "emb_in.proj_in",
    "timestep.mlp.2": "emb_in.proj_hid",
    "timestep.mlp.4": "emb_in.proj_out",
    "trunk.norm": "txt_out_norm",
    "modulation": "txt_out_ada.out_in.1",
    "head": "txt_out.proj",
}


_DEFAULTS: dict[str, dict[str, Any]] = {
    VAE: {
        "vocab_size": 100278,
        "encoder_num_blocks": 4,
        "decoder_num_blocks": 4,
        "dim": 1536,
        "ffn_dim": 6144,
        "latent_dim": 16,
        "num_heads": 12,
        "encoder_last_ln": True,
        "layer_norm_eps": 1e-6,
        "post_norm": True,
        "qk_norm": True,
        "rope_theta": 500000,
        "block_size": 4,
        "scaling_factor": 1.0,
        "shifting_factor": 0.0,
    },
    DIT: {
        "txt_in_channels": 16,
        "txt_dim": 2048,
        "heads": 16,
        "head_dim": 128,
        "expand_ratio": 4,
        "num_layers": 24,
        "norm_eps": 1e-5,
        "rope_dim": 96,
        "block_size": 4,
    },
}
"""What a field is that a config.json leaves out."""


def is_cola_directory(directory: str | Path) -> bool:
    """Whether a model directory is in this format."""
    return (Path(directory) / DIT).is_dir()


def read_vae(directory: str | Path) -> TextVAE:
    """The VAE of a directory: CPU, float32, frozen, evaluation mode. Raises ConfigError."""
    with _as_described(Path(directory) / VAE):
        return _read_vae(directory)


def _read_vae(directory: str | Path) -> TextVAE:
    official, theirs = _read_config(Path(directory) / VAE), _read_weights(Path(directory) / VAE)
    config = vae_config(official)
    weights = {ours: theirs[name] for ours, name in _names_of_vae(config) if name in theirs}
    _swap_halves(weights, "mlp.up.")  # theirs are (value, gate), ours (gate, value)
    patch = theirs["encoder.patch_embedder.weight"][:, :, 0]
    weights["embedding.weight"] = theirs["encoder.wte.weight"] @ patch.T + theirs["encoder.patch_embedder.bias"]
    scale, shift = official["scaling_factor"], official["shifting_factor"]
    # their decoder reads latents as the DiT gives them, scaled and shifted
    weights["latent_in.bias"] = weights["latent_in.bias"] - shift * scale * weights["latent_in.weight"].sum(dim=1)
    weights["latent_in.weight"] = weights["latent_in.weight"] * scale
    weights["latent_mean"] = torch.full((config.latent_channels,), float(shift))
    weights["latent_std"] = torch.full((config.latent_channels,), 1.0 / scale)
    vae = TextVAE(config, official["vocab_size"])
    vae.load_state_dict(weights)
    return vae.eval().requires_grad_(False)


def read_vae_config(directory: str | Path) -> TextVAEConfig:
    """The architecture of a directory's VAE. Raises ConfigError."""
    return vae_config(_read_config(Path(directory) / VAE))


def read_dit(directory: str | Path) -> tuple[TextDiT, FlowConfig]:
    """The DiT of a directory, as `read_vae`, and its process. Raises ConfigError."""
    with _as_described(Path(directory) / DIT):
        return _read_dit(directory)


def _read_dit(directory: str | Path) -> tuple[TextDiT, FlowConfig]:
    official, theirs = _read_config(Path(directory) / DIT), _read_weights(Path(directory) / DIT)
    config, flow = dit_config(official)
    weights = {ours: theirs[name] for ours, name in _names_of_dit(config) if name in theirs}
    _swap_halves(weights, "timestep.mlp.0.weight", dim=1)  # theirs are (sine, cosine)
    _reorder_rotated(weights, config.trunk, theirs_to_ours=True)
    for i in range(config.trunk.layers):
        for part in ("weight", "bias"):
            parts = [theirs[f"blocks.{i}.ada.{name}.1.{part}"] for name, _ in _MODULATION]
            weights[f"trunk.blocks.{i}.modulation.{part}"] = torch.cat(parts)
    # nothing of their DiT depends on the vocabulary
    network = TextDiT(config, official["txt_in_channels"], vocab_size=0)
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False), flow


def read(directory: str | Path) -> tuple[TextVAE, TextDiT, FlowConfig]:
    """Both networks of a directory, on the CPU, and the process. Raises ConfigError, also where they do not fit."""
    vae, (network, flow) = read_vae(directory), read_dit(directory)
    if vae.config.latent_channels != network.latent_channels:
        of_vae, of_dit = vae.config.latent_channels, network.latent_channels
        raise ConfigError(f"{directory}: {VAE} has {of_vae} latent channels, {DIT} {of_dit}")
    check_block_sizes(flow, vae.config)
    return vae, network, flow


def check(vae: TextVAE, network: TextDiT, flow: FlowConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both networks' configurations in the format. Raises ConfigError, naming the fields, for what it has no words
    for."""
    of_vae, of_dit = _official_vae_config(vae), _official_dit_config(network, flow)
    _check_same("vae.network", vae.config, vae_config(of_vae))
    _check_same("network", network.config, dit_config(of_dit)[0])
    if not bool((vae.latent_mean == 0).all() and (vae.latent_std == 1).all()):
        raise ConfigError(
            "the format has no statistics of the latents a channel: train the VAE with network.standardised: false"
        )
    return of_vae, of_dit


def write(vae: TextVAE, network: TextDiT, flow: FlowConfig, output: str | Path) -> None:
    """Write both networks in fp32; `check` says what cannot be. What only training knows, the distribution of timesteps
    and other sizes of blocks, is not in the format: grids by quantile are read back as those of the release."""
    of_vae, of_dit = check(vae, network, flow)
    ours = _floats(vae)
    ours["posterior.bias"][vae.config.latent_channels :] += vae.config.initial_log_variance
    _swap_halves(ours, "mlp.up.")
    theirs = {name: ours[own] for own, name in _names_of_vae(vae.config) if own in ours}
    width = vae.config.encoder.width
    theirs["encoder.wte.weight"] = torch.cat((ours["embedding.weight"], torch.zeros(1, width)))[: vae.vocab_size + 1]
    theirs["encoder.patch_embedder.weight"] = torch.eye(width)[:, :, None]
    theirs["encoder.patch_embedder.bias"] = torch.zeros(width)
    _save(Path(output) / VAE, of_vae, theirs)
    ours, trunk = _floats(network), network.config.trunk
    _swap_halves(ours, "timestep.mlp.0.weight", dim=1)
    _reorder_rotated(ours, trunk, theirs_to_ours=False)
    theirs = {name: ours[own] for own, name in _names_of_dit(network.config) if own in ours}
    frequency = trunk.rope_theta ** -(torch.arange(0, of_dit["rope_dim"], 2).float() / of_dit["rope_dim"])
    for i in range(trunk.layers):
        theirs[f"blocks.{i}.msa.rope.rope.freqs"] = frequency.clone()
        for part in ("weight", "bias"):
            parts = ours[f"trunk.blocks.{i}.modulation.{part}"].split([n * trunk.width for _, n in _MODULATION])
            for (name, _), value in zip(_MODULATION, parts, strict=True):
                theirs[f"blocks.{i}.ada.{name}.1.{part}"] = value
    _save(Path(output) / DIT, of_dit, theirs)


def vae_config(official: dict[str, Any]) -> TextVAEConfig:
    """Our architecture of their `cola_vae/config.json`. Raises ConfigError for what it cannot be."""
    _require(
        official,
        VAE,
        patch_size=1,
        shared_heads_kv=1,
        layer_norm_type="layer_norm",
        layer_norm_affine=True,
        qk_bias=False,
        qk_norm_affine=True,
        clip_qkv=None,
        rope_full_precision=True,
        bias=True,
        act="swiglu",
        block_causal=True,
        use_variation=True,
    )
    trunk = TrunkConfig(
        width=official["dim"],
        heads=official["num_heads"],
        mlp="swiglu",
        mlp_ratio=official["ffn_dim"] / 2 / official["dim"],
        mlp_bias=True,
        attention_bias=True,
        norm="layer",
        norm_eps=official["layer_norm_eps"],
        norm_placement="cola" if official["post_norm"] else "pre",
        final_norm=False,
        qk_norm=official["qk_norm"],
        qk_norm_kind="layer_all_heads",
        rope_theta=float(official["rope_theta"]),
    )
    return TextVAEConfig(
        latent_channels=official["latent_dim"],
        encoder=replace(trunk, layers=official["encoder_num_blocks"]),
        decoder=replace(trunk, layers=official["decoder_num_blocks"]),
        attention="causal" if official["block_size"] == 1 else "block_causal",
        block_tokens=0 if official["block_size"] == 1 else official["block_size"],
        latent_norm="layer" if official["encoder_last_ln"] else "none",
        standardised=False,
        initial_log_variance=0.0,
        mask_token=True,
        output_projection=True,
        unembedding_bias=True,
    )


def _official_vae_config(vae: TextVAE) -> dict[str, Any]:
    """Their `cola_vae/config.json` of our network; fields it has no word for are left to `write` to find."""
    config, trunk = vae.config, vae.config.encoder
    return {
        "model_type": "cola_text_vae",
        "architectures": ["ColaTextVAEModel"],
        "vocab_size": vae.vocab_size,
        "encoder_num_blocks": config.encoder.layers,
        "decoder_num_blocks": config.decoder.layers,
        "dim": trunk.width,
        "ffn_dim": 2 * int(trunk.mlp_ratio * trunk.width),
        "latent_dim": config.latent_channels,
        "patch_size": 1,
        "num_heads": trunk.heads,
        "shared_heads_kv": 1,
        "encoder_last_ln": config.latent_norm == "layer",
        "layer_norm_type": "layer_norm",
        "layer_norm_eps": trunk.norm_eps,
        "layer_norm_affine": True,
        "post_norm": trunk.norm_placement == "cola",
        "qk_bias": False,
        "qk_norm": trunk.qk_norm,
        "qk_norm_affine": True,
        "clip_qkv": None,
        "rope_theta": int(trunk.rope_theta),
        "rope_full_precision": True,
        "bias": True,
        "dropout": 0.0,
        "attn_dropout": 0.0,
        "act": "swiglu",
        "causal": False,
        "block_causal": True,
        "block_size": 1 if config.attention == "causal" else config.block_tokens,
        "use_variation": True,
        "scaling_factor": 1.0,
        "shifting_factor": 0.0,
    }


def dit_config(official: dict[str, Any]) -> tuple[TextDiTConfig, FlowConfig]:
    """Our architecture and process of their `cola_dit/config.json`. Raises ConfigError for what it cannot be."""
    _require(
        official,
        DIT,
        patch_size=1,
        qk_bias=False,
        emb_dim=official["txt_dim"],
        txt_out_channels=official["txt_in_channels"],
        head_dim=official["txt_dim"] // official["heads"],
    )
    trunk = TrunkConfig(
        layers=official["num_layers"],
        width=official["txt_dim"],
        heads=official["heads"],
        mlp="gelu_tanh",
        mlp_ratio=float(official["expand_ratio"]),
        mlp_bias=True,
        norm="layer",
        norm_eps=official["norm_eps"],
        qk_norm_kind="layer",
        rope_fraction=official["rope_dim"] / official["head_dim"],
    )
    network = TextDiTConfig(trunk=trunk, timestep_layers=3, final_modulation=True, role_embedding=False)
    timesteps = TimestepConfig(distribution="logit_normal", location=1.0, scale=1.0)
    return network, FlowConfig(objective="velocity", timesteps=timesteps, block_tokens=official["block_size"])


def _official_dit_config(network: TextDiT, flow: FlowConfig) -> dict[str, Any]:
    """Their `cola_dit/config.json` of our network; fields it has no word for are left to `write` to find."""
    trunk = network.config.trunk
    if (flow.objective, flow.path) != ("velocity", "linear") or not flow.block_tokens:
        raise ConfigError("Cola DLM's format is for flow.objective velocity on the linear path in blocks of tokens")
    return {
        "model_type": "cola_dit",
        "architectures": ["ColaDiTModel"],
        "txt_in_channels": network.latent_channels,
        "txt_out_channels": network.latent_channels,
        "txt_dim": trunk.width,
        "emb_dim": trunk.width,
        "heads": trunk.heads,
        "head_dim": trunk.width // trunk.heads,
        "expand_ratio": int(trunk.mlp_ratio),
        "num_layers": trunk.layers,
        "norm_eps": trunk.norm_eps,
        "qk_bias": False,
        "patch_size": 1,
        "rope_dim": trunk.rope_channels,
        "block_size": flow.block_tokens,
    }


def _with_parts(names: dict[str, str]) -> list[tuple[str, str]]:
    return [(f"{ours}.{part}", f"{theirs}.{part}") for ours, theirs in names.items() for part in ("weight", "bias")]


def _names_of_vae(config: TextVAEConfig) -> list[tuple[str, str]]:
    """(our name, their name) of the tensors that are stored alike."""
    sides = [("encoder", config.encoder.layers), ("decoder", config.decoder.layers)]
    places = [f"{side}.blocks.{i}" for side, layers in sides for i in range(layers)]
    blocks = {f"{place}.{a}": f"{place}.{b}" for place in places for a, b in _BLOCK_OF_VAE.items()}
    return _with_parts(blocks | _REST_OF_VAE)


def _names_of_dit(config: TextDiTConfig) -> list[tuple[str, str]]:
    blocks = {
        f"trunk.blocks.{i}.{a}": f"blocks.{i}.{b}" for i in range(config.trunk.layers) for a, b in _BLOCK_OF_DIT.items()
    }
    return _with_parts(blocks | _REST_OF_DIT)


def _swap_halves(weights: Weights, name: str, dim: int = 0) -> None:
    """In place, of every tensor with `name` in its name; its own inverse."""
    for key in [key for key in weights if name in key]:
        weights[key] = weights[key].roll(weights[key].shape[dim] // 2, dim)


def _reorder_rotated(weights: Weights, trunk: TrunkConfig, *, theirs_to_ours: bool) -> None:
    """In place: a head's channels of queries, keys and the norms on them, pairs side by side or half a head apart."""
    head = trunk.width // trunk.heads
    rotated = trunk.rope_channels
    order = torch.tensor([*range(0, rotated, 2), *range(1, rotated, 2), *range(rotated, head)])
    order = order if theirs_to_ours else order.argsort()
    for i in range(trunk.layers):
        place = f"trunk.blocks.{i}.attention"
        for norm in (f"{place}.{n}_norm.{part}" for n in "qk" for part in ("weight", "bias")):
            weights[norm] = weights[norm][order]
        qkv = weights[f"{place}.qkv.weight"].view(3, trunk.heads, head, -1).clone()
        qkv[:2] = qkv[:2, :, order]
        weights[f"{place}.qkv.weight"] = qkv.view(3 * trunk.width, -1)


def _require(official: dict[str, Any], where: str, **wanted: Any) -> None:
    """Raise ConfigError unless the fields have the only values that are known here."""
    for name, value in wanted.items():
        if official.get(name, value) != value:
            raise ConfigError(f"{where}/config.json: {name} is {official[name]!r}; only {value!r} is known here")


def _check_same(where: str, ours: Any, read_back: Any) -> None:
    """Raise ConfigError, naming the first field, unless what the format would be read as is what we have."""
    free = {"activation_checkpointing", "initial_gate", "initial_log_variance", "mask_token", "standardised"}
    for field in fields(ours):
        a, b = getattr(ours, field.name), getattr(read_back, field.name)
        if is_dataclass(a):
            _check_same(f"{where}.{field.name}", a, b)
        elif a != b and field.name not in free:
            raise ConfigError(f"Cola DLM's format needs {where}.{field.name} {b!r}, it is {a!r}")


def _read_config(directory: Path) -> dict[str, Any]:
    """config.json over the release's defaults. Raises ConfigError."""
    path = directory / "config.json"
    try:
        return _DEFAULTS[directory.name] | json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not the config.json of a model in Cola DLM's format ({error})") from None


def _read_weights(directory: Path) -> Weights:
    """The tensors, whole or in several files, as float32. Raises ConfigError."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{directory}: holds no *.safetensors")
    found: Weights = {}
    for file in files:
        try:
            found |= {name: value.float() for name, value in load_file(file).items()}
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file}: cannot be read ({error}); is it whole?") from None
    return found


@contextmanager
def _as_described(directory: Path) -> Iterator[None]:
    """Raises ConfigError where tensors are missing or of other shapes."""
    try:
        yield
    except (KeyError, RuntimeError) as error:
        raise ConfigError(f"{directory}: its tensors are not those of its config.json: {error}") from None


def _floats(module: nn.Module) -> Weights:
    return {name: value.detach().float().clone() for name, value in module.state_dict().items()}


def _save(directory: Path, config: dict[str, Any], weights: Weights) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: w.contiguous() for name, w in weights.items()}, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
