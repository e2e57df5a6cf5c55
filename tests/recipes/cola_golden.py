"""What Cola DLM's released code computes with random weights, kept in cola_golden.npz, and how that was made:

    PYTHONPATH=CLONE python -m tests.recipes.cola_golden

with CLONE a checkout of github.com/ByteDance-Seed/Cola-DLM (which needs einops and rotary-embedding-torch), on a CPU in
fp32. The weights are drawn here, by name, shape and seed, so that the arrays are all that has to be kept.
"""

import contextlib
import json
import zlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

FILE = Path(__file__).with_suffix(".npz")
SEED = 20260507
SIZES: dict[str, dict[str, Any]] = {
    "causal": {"vae_block": 1, "block": 4, "post_norm": True},
    "block_causal": {"vae_block": 4, "block": 4, "post_norm": True},
    "pre_norm": {"vae_block": 2, "block": 4, "post_norm": False},
}
"""Cases: block sizes of VAE and DiT, and where the VAE's norms are."""
VOCABULARY, WIDTH, CHANNELS = 40, 32, 6
LENGTHS = (12, 8)
"""Tokens of the texts that are encoded, decoded and denoised, whole blocks as their code asks for."""
PROMPTS = (6, 8, 3)
"""Tokens of the prompts that are continued: a block in part, whole blocks, less than a block."""
NEW_TOKENS, STEPS, GUIDANCE = 10, 5, 3.0


def vae_config(case: str) -> dict[str, Any]:
    """`cola_vae/config.json`."""
    size = SIZES[case]
    sizes = {"vocab_size": VOCABULARY, "dim": WIDTH, "ffn_dim": 2 * WIDTH, "latent_dim": CHANNELS, "num_heads": 4}
    depth = {"encoder_num_blocks": 2, "decoder_num_blocks": 2}
    return {**sizes, **depth, "block_size": size["vae_block"], "post_norm": size["post_norm"]}


def dit_config(case: str) -> dict[str, Any]:
    """`cola_dit/config.json`."""
    sizes = {"txt_dim": WIDTH, "emb_dim": WIDTH, "heads": 2, "head_dim": 16, "num_layers": 2, "rope_dim": 12}
    channels = {"txt_in_channels": CHANNELS, "txt_out_channels": CHANNELS}
    return {**sizes, **channels, "block_size": SIZES[case]["block"]}


def random(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 standard normal, a function of `SEED`, `name` and `shape`."""
    return np.random.default_rng([SEED, zlib.crc32(name.encode())]).standard_normal(shape).astype(np.float32)


def weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """A model's weights: matrices that keep the scale of what they read about, biases and gains around 0 and 1."""
    found = {}
    for name, shape in shapes.items():
        value = torch.from_numpy(random(name, tuple(shape)))
        is_gain = len(shape) == 1 and name.endswith("weight")
        found[name] = value * (0.3 if len(shape) == 1 else 0.2) + (1.0 if is_gain else 0.0)
    return found


def tokens(name: str, length: int) -> list[int]:
    """Token ids."""
    return np.random.default_rng([SEED, zlib.crc32(name.encode())]).integers(0, VOCABULARY, length).tolist()


def timesteps() -> torch.Tensor:
    """float32 `[sum of LENGTHS]`: one for each token."""
    return torch.from_numpy(np.random.default_rng(SEED).random(sum(LENGTHS)).astype(np.float32))


class _OnCPU:
    """The torch that their code, which says CUDA and bf16 throughout, is given here: fp32, and `noise` for randn."""

    bfloat16 = torch.float32

    def __init__(self) -> None:
        self.noise: Iterator[np.ndarray] = iter(())

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def autocast(self, *arguments: Any, **options: Any) -> Any:
        return contextlib.nullcontext()

    def randn(self, *shape: int, **options: Any) -> torch.Tensor:
        return torch.from_numpy(next(self.noise))


def official(case: str) -> dict[str, np.ndarray]:
    """Everything their code computes of a case, and the shapes of its tensors."""
    names = ("engine", "modeling_cola_dit", "modeling_cola_vae", "attention_utils")
    engine, modeling_dit, modeling_vae, masks = (import_module(f"cola_dlm.{name}") for name in names)
    on_cpu = _OnCPU()
    for module in (engine, modeling_dit, modeling_vae):
        module.torch = on_cpu  # type: ignore[attr-defined]
    vae = modeling_vae.ColaTextVAEModel(modeling_vae.ColaTextVAEConfig(**vae_config(case))).eval()
    dit = modeling_dit.ColaDiTModel(modeling_dit.ColaDiTConfig(**dit_config(case))).eval()
    found: dict[str, np.ndarray] = {}
    for name, model in (("vae", vae), ("dit", dit)):
        shapes = {n: list(p.shape) for n, p in model.named_parameters()}
        model.load_state_dict(weights(shapes), strict=False)
        found[f"{name}_shapes"] = np.array(json.dumps(shapes))
    lengths = torch.tensor(LENGTHS)[:, None]
    size = SIZES[case]["block"]
    ids = [torch.tensor(tokens(f"text {i}", n)) for i, n in enumerate(LENGTHS)]
    with torch.no_grad():
        posterior = vae.encode(ids).latent_dists
        found["mean"] = torch.cat([p.mean for p in posterior]).numpy()
        found["log_variance"] = torch.cat([p.logvar for p in posterior]).numpy()
        latents = torch.cat([p.mean for p in posterior])
        found["logits"] = vae.decode(latents, lengths, lengths)[0].numpy()
        noisy = torch.from_numpy(random("noisy", (sum(LENGTHS), CHANNELS)))
        found["velocity"] = dit(noisy, lengths, lengths, timesteps() * 1000).txt_sample.numpy()
        # the last block of each text after a cache of the others
        before = lengths - size
        last = torch.cat(
            [torch.arange(n - size, n) + offset for n, offset in zip(LENGTHS, (0, LENGTHS[0]), strict=True)]
        )
        rest = torch.tensor([i for i in range(sum(LENGTHS)) if i not in last])
        own = torch.full_like(lengths, size)
        vae.set_kv_cache(True)
        vae.decode(latents[rest], before, before, update_kv=True)
        found["logits_cached"] = vae.decode(latents[last], lengths, own)[0].numpy()
        vae.set_kv_cache(False)
        for block in dit.blocks:
            block.set_kv_cache(True)
        dit(latents[rest], before, before, torch.zeros(len(rest)), update_kv=True, use_kv_cache=True)
        cached = dit(noisy[last], lengths, own, timesteps()[last] * 1000, use_kv_cache=True)
        found["velocity_cached"] = cached.txt_sample.numpy()
        for block in dit.blocks:
            block.set_kv_cache(False)
        for i, length in enumerate(PROMPTS):
            on_cpu.noise = iter([random(f"noise {i} {b}", (size, CHANNELS)) for b in range(8)])
            written = engine.ColaEngine(dit, vae, _NoText()).generate(
                tokens(f"prompt {i}", length),
                max_new_tokens=NEW_TOKENS,
                timestep_num=STEPS,
                guidance_scale=GUIDANCE,
                temperature=0.0,
                repetition_penalty=1.0,
                stop_text=None,
                pad_token_id=VOCABULARY,  # has an embedding, and no logit: nothing stops early
            )
            found[f"written {i}"] = np.array([token for block in written for token in block.token_ids])
        # training, a clean copy and a noisy one in a row; last, as their RoPE caches these positions as 0, 1, ...
        n = LENGTHS[0]
        both, twice = torch.cat((latents[:n], noisy[:n])), torch.tensor([[2 * n]])
        mask = masks.create_2l_block_causal_mask(twice, twice, [n], size, torch.float32, torch.device("cpu"))
        place, t = torch.arange(n).repeat(2), torch.cat((torch.zeros(n), timesteps()[:n] * 1000))
        out = dit(both, twice, twice, t, k_position_ids=place, q_position_ids=place, attn_mask_override=mask)
        found["velocity_two_streams"] = out.txt_sample[n:].numpy()
    return found


class _NoText:
    """A tokenizer of which only ids are asked."""

    def decode(self, ids: list[int]) -> str:
        return ""


def main() -> None:
    """Write `FILE`."""
    arrays = {f"{case}/{name}": value for case in SIZES for name, value in official(case).items()}
    np.savez_compressed(FILE, **arrays)  # type: ignore[arg-type]
    print(f"{FILE}: {len(arrays)} arrays, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
