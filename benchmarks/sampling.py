"""How long a text takes in latent diffusion and by an AR model with its KV cache: `python benchmarks/sampling.py`.

One prompt, one text, random weights of the same trunk (speed does not depend on what they say): Hugging Face's
`generate` with its cache; TextDiT in one shot at several numbers of steps, with its context seen by all or cached
(prefix attention), with guidance; in blocks with caches; LDLM with the AR model as its language model. Seconds are the
best of several alternating rounds.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import best_of, report
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatext.data.teacher import Teacher
from megatext.generation import SamplingConfig, TextGenerator
from megatext.generation.noise import Request
from megatext.nn.blocks import TrunkConfig
from megatext.nn.dit import TextDiTConfig
from megatext.nn.perceiver import LatentAutoencoder, LatentAutoencoderConfig
from megatext.nn.text_vae import TextVAE, TextVAEConfig
from megatext.recipes.denoiser import make_denoiser
from megatext.recipes.flow_config import FlowConfig
from megatext.recipes.hidden_autoencoder import HiddenAutoencoder

TOKENIZER: Any = SimpleNamespace(end_ids=(0,), eos_id=0, pad_id=1)
"""All that sampling asks of one when it is given ids."""


def language_model(options: argparse.Namespace) -> Any:
    config = Qwen3Config(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=int(2.75 * options.width),
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64,
        head_dim=64,
        max_position_embeddings=options.prompt + options.tokens,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=1,
    )
    return Qwen3ForCausalLM(config).to(options.device, options.dtype).eval().requires_grad_(False)


def autoregressive(options: argparse.Namespace, model: Any) -> Callable[[], float]:
    ids = torch.randint(2, options.vocabulary, (1, options.prompt), device=options.device)
    length = {"min_new_tokens": options.tokens, "max_new_tokens": options.tokens}

    def run() -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, **length)
        return 1 / (time.perf_counter() - began)

    return run


def trunk(options: argparse.Namespace, layers: int) -> TrunkConfig:
    heads = options.width // 64
    return TrunkConfig(layers=layers, width=options.width, heads=heads, mlp="swiglu", mlp_ratio=2.75)


def textdit(options: argparse.Namespace, flow: FlowConfig) -> TextGenerator:
    tokens_out = flow.objective == "token_cross_entropy"
    encoder = trunk(options, 0 if flow.block_tokens else 2)
    sizes = TextVAEConfig(latent_channels=64, encoder=encoder, decoder=trunk(options, 2))
    vae = TextVAE(sizes, options.vocabulary).eval().requires_grad_(False)
    output: Any = "tokens" if tokens_out else "latent"
    network = TextDiTConfig(
        trunk=trunk(options, options.layers),
        output=output,
        token_embedding=tokens_out,
        role_embedding=not tokens_out,
    )
    module = make_denoiser(network, flow, vae, frozen=True)
    return loaded(options, module, vae)


def loaded(options: argparse.Namespace, module: Any, vae: Any) -> TextGenerator:
    """As an export is loaded; with --unpacked as a training has it, its linear layers as they are."""
    if options.unpacked:
        return TextGenerator(module.eval(), vae, TOKENIZER, SamplingConfig())
    return TextGenerator._on(module, vae, TOKENIZER, SamplingConfig(), options.device, options.dtype)


def ldlm(options: argparse.Namespace, model: Any) -> TextGenerator:
    """Perceivers of half as many layers as the DiT, a token decoder of a quarter, as published."""
    perceiver = trunk(options, options.layers // 2)
    sizes = LatentAutoencoderConfig(options.width, perceiver, perceiver, trunk(options, options.layers // 4))
    autoencoder = LatentAutoencoder(sizes, options.width, options.vocabulary).eval().requires_grad_(False)
    vae = HiddenAutoencoder(autoencoder, Path(), -3, True, "")
    vae._teacher = Teacher(model.model, -3, options.width)
    network = TextDiTConfig(trunk=trunk(options, options.layers), self_conditioning=True, role_embedding=False)
    flow = FlowConfig(path="tan-3", objective="x0", self_conditioning_probability=0.5)
    module = make_denoiser(network, flow, autoencoder, frozen=True)
    return loaded(options, module, vae)


def diffusion(
    options: argparse.Namespace, generator: TextGenerator, steps: int, **sampling: Any
) -> Callable[[], float]:
    request = Request(torch.randint(2, options.vocabulary, (options.prompt,)).tolist(), options.tokens, 0)

    def run() -> float:
        began = time.perf_counter()
        list(generator._pieces([request], SamplingConfig(steps=steps, **sampling)))
        return 1 / (time.perf_counter() - began)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--prompt", type=int, default=64, help="tokens given")
    parser.add_argument("--tokens", type=int, default=512, help="tokens to write")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--unpacked", action="store_true", help="on a CPU: without packed weights, to compare")
    options = parser.parse_args()
    options.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    torch.manual_seed(0)
    model = language_model(options)
    full = textdit(options, FlowConfig(objective="x0"))
    prefix = textdit(options, FlowConfig(objective="x0", attention="prefix"))
    joint = ldlm(options, model)
    default = FlowConfig(objective="token_cross_entropy", token_likelihood=True)
    of = {tokens: textdit(options, replace(default, block_tokens=tokens)) for tokens in (16, 4, 2, 1)}
    runs = {"AR, KV cache": autoregressive(options, model)}
    for steps in options.steps:
        runs[f"one shot, {steps} steps"] = diffusion(options, full, steps)
        runs[f"one shot, {steps} steps, cached context"] = diffusion(options, prefix, steps)
        runs[f"LDLM, {steps} steps"] = diffusion(options, joint, steps)
    steps = options.steps[-1]
    runs[f"one shot, {steps} steps, cached context, guidance"] = diffusion(options, prefix, steps, guidance_scale=2.0)
    runs["blocks of 16, 8 steps"] = diffusion(options, of[16], 8)
    runs["blocks of 2, 2 steps"] = diffusion(options, of[2], 2, solver="ancestral")
    for tokens in (4, 2, 1):
        runs[f"blocks of {tokens}, 1 step"] = diffusion(options, of[tokens], 1, solver="ancestral")
    runs["blocks of 2, 1 step, guidance"] = diffusion(options, of[2], 1, solver="ancestral", guidance_scale=2.0)
    seconds = {name: 1 / rate for name, rate in best_of(runs, options.repeats).items()}
    ar = seconds["AR, KV cache"]
    rows = [[name, f"{s:.2f}", f"{ar / s:.2f} x"] for name, s in seconds.items()]
    figures = {"seconds": seconds, "width": options.width, "layers": options.layers, "tokens": options.tokens}
    title = f"{options.tokens} tokens after {options.prompt}, batch 1, {options.layers} layers of {options.width}"
    report(title, ["", "seconds", "AR takes"], rows, figures)


if __name__ == "__main__":
    main()
