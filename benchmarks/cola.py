"""Cola DLM beside its released code: `python benchmarks/cola.py --official CLONE`.

CLONE is a checkout of github.com/ByteDance-Seed/Cola-DLM. Same sizes, same dtype, one process, in generation the
same weights:

- a training step, token ids to optimizer: the trainer with `train_vae: false` against `prepare_batch`,
  `flow_matching_step` and AdamW of the community script, with each of its attention backends;
- generation with KV caches: the text generator against `ColaEngine` (a prompt) and `generate_task_repaint_inference`
  (a batch of prompts of different lengths), greedy, with guidance, as many solver steps.

Their code says CUDA and bf16 throughout; on a CPU it is given a torch whose bf16 is fp32, without autocast.
"""

import argparse
import ast
import contextlib
import importlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import report, rounds, write_shards
from train_step import WARMUP, make_trainer, run_steps

from megatext.config import from_dict
from megatext.generation import SamplingConfig, TextGenerator
from megatext.generation.noise import Request
from megatext.nn.blocks import TrunkConfig
from megatext.nn.dit import TextDiT, TextDiTConfig
from megatext.nn.text_vae import TextVAE, TextVAEConfig
from megatext.recipes import cola_format, config_class
from megatext.recipes.flow_config import FlowConfig
from megatext.tokenizer import SentencePieceTokenizer
from megatext.training.engine import Processes, start_processes

OF_THEIR_SCRIPT = (
    "sample_block_size",
    "build_noisy_sample_pretrain",
    "sample_timestep",
    "prepare_batch",
    "flow_matching_step",
)
"""What is taken from scripts/cola_pretrain.py, which trains as soon as it is imported."""


class FP32Torch:
    """torch for code that asks for CUDA and bf16, where there is neither."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def autocast(self, *arguments: Any, **options: Any) -> Any:
        return contextlib.nullcontext()


class Theirs:
    """The released code with the weights of `release`."""

    def __init__(self, clone: Path, release: Path, device: torch.device) -> None:
        sys.path.insert(0, str(clone))
        self.torch: Any = torch if device.type == "cuda" else FP32Torch()
        names = ("modeling_cola_dit", "modeling_cola_vae", "engine", "inference")
        self.modules = {name: importlib.import_module(f"cola_dlm.{name}") for name in names}
        for module in self.modules.values():
            module.torch = self.torch  # type: ignore[attr-defined]
        self.clone, self.device = clone, device
        self.vae = self.modules["modeling_cola_vae"].ColaTextVAEModel.from_pretrained(release / cola_format.VAE)
        self.dit = self.modules["modeling_cola_dit"].ColaDiTModel.from_pretrained(release / cola_format.DIT)
        self.vae = self.vae.to(device).eval().requires_grad_(False)
        self.dit = self.dit.to(device)

    def training_step(self, backend: str, rows: np.ndarray, steps: int) -> Callable[[], float]:
        """Tokens a second of their step on `rows [steps, rows of a step, row tokens]`."""
        source = ast.parse((self.clone / "scripts" / "cola_pretrain.py").read_text())
        wanted = [node for node in source.body if isinstance(node, ast.FunctionDef) and node.name in OF_THEIR_SCRIPT]
        masks = importlib.import_module("cola_dlm.attention_utils")
        size = self.dit.block_size
        scope: dict[str, Any] = {
            "torch": self.torch,
            "random": random,
            "device": self.device,
            "vae": self.vae,
            "attn_backend": backend,
            "T": 1000.0,
            "BLOCK_SIZES": [size],
            "BLOCK_SIZE_PROBS": [1.0],
            "STOP_TOKEN_ID": 0,
            "create_2l_block_causal_mask": masks.create_2l_block_causal_mask,
            "create_2l_flex_block_mask": masks.create_2l_flex_block_mask,
            "args": SimpleNamespace(
                prompt_block_prob=0.05,
                timestep_dist="logit_normal",
                logit_normal_loc=1.0,
                logit_normal_scale=1.0,
                vae_mode="sample",
            ),
        }
        exec(compile(ast.Module(body=[*wanted], type_ignores=[]), "cola_pretrain.py", "exec"), scope)
        optimizer = torch.optim.AdamW(self.dit.parameters(), lr=0.0, betas=(0.9, 0.999), weight_decay=0.01)
        batches = [torch.from_numpy(batch).to(self.device) for batch in rows]

        def run(count: int = steps) -> float:
            self.modules["modeling_cola_dit"].set_attn_backend(backend)
            self.dit.train()
            started = time.perf_counter()
            for batch in batches[:count]:
                scope["flow_matching_step"](self.dit, scope["prepare_batch"](batch)).backward()
                torch.nn.utils.clip_grad_norm_(self.dit.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            _wait(self.device)
            return float(rows[:count].size / (time.perf_counter() - started))

        run(1)
        return run

    def generation(
        self, backend: str, prompts: list[list[int]], tokens: int, steps: int, scale: float
    ) -> Callable[[], float]:
        """New tokens a second of their engine for one prompt, of their batch inference for several."""
        pad = self.vae.vocab_size  # has an embedding, and no logit: they stop where they write the padding
        options = {"timestep_num": steps, "guidance_scale": scale, "temperature": 0.0, "repetition_penalty": 1.0}

        def run() -> float:
            self.modules["modeling_cola_dit"].set_attn_backend(backend)
            self.dit.eval()
            started = time.perf_counter()
            if len(prompts) == 1:
                engine = self.modules["engine"].ColaEngine(self.dit, self.vae, _Ids())
                made = engine.generate(prompts[0], max_new_tokens=tokens, stop_text=None, pad_token_id=pad, **options)
                written = sum(len(block.is_prompt) - sum(block.is_prompt) for block in made)
            else:
                self.modules["inference"].generate_task_repaint_inference(
                    self.dit,
                    self.vae,
                    _Ids(),
                    [{"question": str(i)} for i in range(len(prompts))],
                    device=self.device,
                    max_new_tokens=tokens,
                    pad_token_id=pad,
                    **options,
                )
                written = len(prompts) * tokens
            _wait(self.device)
            return written / (time.perf_counter() - started)

        _Ids.prompts = prompts
        return run


class _Ids:
    """A tokenizer for prompts that are ids already; a batch's are asked for by their number."""

    prompts: list[list[int]]

    def encode(self, number: str) -> Any:
        return SimpleNamespace(ids=self.prompts[int(number)])

    def decode(self, ids: list[int]) -> str:
        return ""

    def decode_batch(self, texts: list[list[int]], **options: Any) -> list[str]:
        return ["" for _ in texts]


class _NoEnd:
    """A tokenizer whose end of text is never written."""

    eos_id = -1
    end_ids = (-1,)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def write_inputs(options: argparse.Namespace, folder: Path) -> np.ndarray:
    """Random weights in Cola DLM's format under `release/`, with a tokenizer, and shards of whole rows; the rows."""
    from data_tools.train_tokenizer import train

    letters = np.random.default_rng(0).integers(97, 123, (4 * options.vocab_size, 5), dtype=np.uint8)
    words = [bytes(row).decode() for row in letters] * 2
    tokenizer: SentencePieceTokenizer = train(
        [" ".join(words[i : i + 10]) for i in range(0, len(words), 10)], options.vocab_size
    )
    vae, network, flow = networks(options)
    cola_format.write(vae, network, flow, folder / "release")
    tokenizer.save_json(folder / "release")
    shape = ((WARMUP + options.steps), options.rows, options.row_tokens)
    rows = np.random.default_rng(1).integers(4, options.vocab_size, shape)
    documents = [row.astype(np.uint16) for row in rows.reshape(-1, options.row_tokens)]
    write_shards(folder / "shards", documents, tokenizer=_as_read(folder / "release"))
    return rows


def _as_read(release: Path) -> Any:
    from megatext.tokenizer import load_tokenizer

    return load_tokenizer(release)


def networks(options: argparse.Namespace) -> tuple[TextVAE, TextDiT, FlowConfig]:
    """Cola DLM at the benchmark's sizes, the VAE three quarters as wide as in the release; random weights."""
    width = options.width * 3 // 4
    trunk = TrunkConfig(
        layers=options.vae_layers,
        width=width,
        heads=max(1, width // 64),
        mlp="swiglu",
        mlp_ratio=2.0,
        mlp_bias=True,
        attention_bias=True,
        norm_placement="cola",
        final_norm=False,
        qk_norm_kind="layer_all_heads",
        rope_theta=500_000.0,
    )
    vae_config = TextVAEConfig(
        latent_channels=16,
        encoder=trunk,
        decoder=trunk,
        attention="causal",
        standardised=False,
        initial_log_variance=0.0,
        mask_token=True,
        output_projection=True,
        unembedding_bias=True,
    )
    own = TrunkConfig(
        layers=options.layers,
        width=options.width,
        heads=options.width // 64,
        mlp="gelu_tanh",
        mlp_bias=True,
        norm_eps=1e-5,
        qk_norm_kind="layer",
        rope_fraction=0.75,
    )
    config = TextDiTConfig(trunk=own, timestep_layers=3, final_modulation=True, role_embedding=False)
    torch.manual_seed(0)
    flow = FlowConfig(block_tokens=options.block_tokens)
    vae, network = TextVAE(vae_config, options.vocab_size), TextDiT(config, 16, options.vocab_size)
    for module in (vae, network):
        for parameter in module.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return vae.requires_grad_(False), network.requires_grad_(False), flow


def precision(device: torch.device) -> str:
    """What both compute in."""
    return "bf16" if device.type == "cuda" else "fp32"


def our_training_step(options: argparse.Namespace, folder: Path, processes: Processes) -> Callable[[], float]:
    """Tokens a second of the trainer's steps, reading the rows included."""
    from dataclasses import asdict

    _, network, flow = networks(options)
    cola = {
        "vae": str(folder / "release"),
        "train_vae": False,
        "network": asdict(network.config),
        "flow": {
            **asdict(flow),
            "timesteps": {"distribution": "logit_normal", "location": 1.0, "scale": 1.0},
            "posterior": "sample",
            "timestep_per": "segment",
            "partial_block_probability": 0.05,
            "condition_dropout": 0.0,
        },
    }
    rows = {"rows_per_step": options.rows, "micro_batch_rows": options.rows, "validation_batches": 0, "ema_decays": []}
    rows["precision"] = precision(processes.device)  # theirs
    given = {
        "run_dir": tempfile.mkdtemp(dir=folder),
        "data": {"shards": str(folder / "shards"), "row_tokens": options.row_tokens, "max_tokens": options.row_tokens},
        "training": rows,
        "optimizer": {"name": "adamw", "learning_rate": 0.0, "weight_decay": 0.01},
        "max_steps": WARMUP + options.steps,
        "save_every_steps": 10**6,
        "logging": {"log_every_steps": 10**6},
        "cola": _as_lists(cola),
    }
    config = from_dict(config_class("PretrainColaConfig"), given, where="benchmark")
    trainer = make_trainer(config, None, processes)
    run_steps(trainer, WARMUP)
    return lambda: options.rows * options.row_tokens / run_steps(trainer, options.steps)


def _as_lists(value: Any) -> Any:
    """Tuples as YAML has them."""
    if isinstance(value, dict):
        return {key: _as_lists(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def our_generation(
    generator: TextGenerator, prompts: list[list[int]], tokens: int, sampling: SamplingConfig
) -> Callable[[], float]:
    """New tokens a second."""
    requests = [Request(prompt, tokens, seed) for seed, prompt in enumerate(prompts)]

    def run() -> float:
        started = time.perf_counter()
        written = sum(len(piece) for pieces in generator._pieces(requests, sampling) for piece in pieces)
        _wait(generator.device)
        return written / (time.perf_counter() - started)

    return run


def against_the_best(what: str, found: dict[str, list[float]], rows: list[list[str]]) -> dict[str, Any]:
    """Adds a row to the table, against the peer's best attention; the figures of all rounds, the ratio of the best and
    the median of the rounds' own ratios."""
    best = {name: max(figures) for name, figures in found.items()}
    name = max((key for key in best if key != "megatext"), key=best.__getitem__)
    ratio = best["megatext"] / best[name]
    median = statistics.median(ours / theirs for ours, theirs in zip(found["megatext"], found[name], strict=True))
    cells = [f"{best['megatext']:,.1f}", f"{best[name]:,.1f}", name.removeprefix("official, ")]
    rows.append([what, *cells, f"{ratio:.2f} x", f"{median:.2f} x"])
    return {"tokens_per_second": found, "ratio": ratio, "median_ratio": median}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="a checkout of ByteDance-Seed/Cola-DLM")
    parser.add_argument("--width", type=int, default=768, help="of the DiT; the VAE is three quarters as wide")
    parser.add_argument("--layers", type=int, default=6, help="of the DiT")
    parser.add_argument("--vae-layers", type=int, default=2, help="of encoder and decoder each")
    parser.add_argument("--rows", type=int, default=4, help="rows of a training step")
    parser.add_argument("--row-tokens", type=int, default=256)
    parser.add_argument("--block-tokens", type=int, default=16)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3, help="measured training steps of a round")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of the longest prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--sampling-steps", type=int, default=16)
    parser.add_argument("--guidance-scale", type=float, default=7.0)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="prompts written at once")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, in each of which everybody runs once")
    options = parser.parse_args()
    processes = start_processes()
    device, rows_of_table = processes.device, list[list[str]]()
    figures: dict[str, Any] = {"precision": precision(device)}
    backends = ["naive", "sdpa", *(["flex"] if device.type == "cuda" else [])]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_inputs(options, folder)
        theirs = Theirs(options.official, folder / "release", device)
        contestants = {f"official, {b}": theirs.training_step(b, rows[WARMUP:], options.steps) for b in backends}
        found = rounds({"megatext": our_training_step(options, folder, processes), **contestants}, options.repeats)
        figures["training"] = against_the_best("training step", found, rows_of_table)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = TextGenerator.from_pretrained(folder / "release", device=str(device), dtype=dtype)
        generator.tokenizer = _NoEnd()  # type: ignore[assignment]
        sampling = SamplingConfig(
            steps=options.sampling_steps,
            grid="uniform",
            guidance_scale=options.guidance_scale,
            history="latents",
            length="eos",
        )
        draw = np.random.default_rng(2)
        for count in options.batches:
            lengths = [options.prompt_tokens - i * options.prompt_tokens // (2 * count) for i in range(count)]
            prompts = [draw.integers(4, options.vocab_size, n).tolist() for n in lengths]
            # whole blocks of both, as their code writes no others
            whole = [p[: len(p) // options.block_tokens * options.block_tokens] for p in prompts]
            found = rounds(
                {
                    "megatext": our_generation(generator, whole, options.new_tokens, sampling),
                    **{
                        f"official, {backend}": theirs.generation(
                            backend, whole, options.new_tokens, options.sampling_steps, options.guidance_scale
                        )
                        for backend in ("naive", "sdpa")
                    },
                },
                options.repeats,
            )
            figures[f"generation_{count}"] = against_the_best(f"generation, batch of {count}", found, rows_of_table)
    columns = ["", "megatext, tokens/s", "official, tokens/s", "its attention", "megatext is", "median round"]
    figures["options"] = vars(options) | {"official": str(options.official.name)}
    report("cola", columns, rows_of_table, figures)


if __name__ == "__main__":
    main()
