"""Where a training step goes, for every recipe: `python benchmarks/train_step.py`.

The trainer's steps on shards written for the purpose: tokens a second, MFU against the matrix product that this machine
does best in the same precision, and the shares of waiting for data, frozen encoders, preparing inputs (noise, masks),
forward, backward, optimizer, averages and logging. Beside it the peer: the same network on the same inputs in a plain
PyTorch loop (fused AdamW, clipping, no sharding, no averages, no checks). Then what torch.compile gains.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import best_of, documents, report, write_shards

from megatext.config import from_dict
from megatext.recipes import build_recipe, config_class, meta_module
from megatext.recipes.pretrained import write_model
from megatext.tokenizer import SentencePieceTokenizer
from megatext.training.engine import Processes, start_processes
from megatext.training.estimate import row_flops
from megatext.training.metrics import Meter
from megatext.training.run_config import RunConfig
from megatext.training.trainer import Trainer, with_precision
from megatext.training.validation import total_loss

PARTS = ("data wait", "encoders", "prepare", "forward", "backward", "optimizer", "EMA", "logging", "rest")
WARMUP = 2
"""Steps that are not measured."""


def systems(width: int, layers: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> configuration class and its own section; TextDiTs without their VAE."""
    trunk = {"layers": layers, "width": width, "heads": width // 64}
    vae = {"latent_channels": 64, "encoder": {**trunk, "layers": 0}, "decoder": trunk}
    blocks = {
        "network": {"trunk": trunk, "output": "tokens", "token_embedding": True},
        "flow": {"objective": "token_cross_entropy", "block_tokens": 4},
    }
    cola = {
        "network": {"trunk": {**trunk, "mlp": "gelu_tanh", "qk_norm_kind": "layer"}, "final_modulation": True},
        "flow": {"block_tokens": 16, "posterior": "sample", "condition_dropout": 0.0},
    }
    return {
        "lm": ("PretrainLMConfig", {"model": {"width": width, "layers": layers, "heads": width // 64}}),
        "vae": ("PretrainVAEConfig", {"vae": {"network": {**vae, "encoder": trunk}}}),
        "dit": ("PretrainDiTConfig", {"dit": {"network": {"trunk": trunk, "time_conditioning": "none"}}}),
        "dit in blocks": ("PretrainDiTConfig", {"dit": blocks}),
        "cola": ("PretrainColaConfig", {"cola": cola}),
    }


def write_inputs(folder: Path, width: int, vocab_size: int) -> SentencePieceTokenizer:
    """Shards of random tokens, and a random VAE for each kind of TextDiT."""
    from data_tools.train_tokenizer import train
    from megatext.nn.text_vae import TextVAE, TextVAEConfig

    letters = np.random.default_rng(0).integers(97, 123, (4 * vocab_size, 5), dtype=np.uint8)
    words = [bytes(row).decode() for row in letters] * 2
    tokenizer = train([" ".join(words[i : i + 10]) for i in range(0, len(words), 10)], vocab_size)
    write_shards(folder / "shards", documents(4000, 300, 0, vocab_size), tokenizer=tokenizer)
    trunk = {"layers": 2, "width": width, "heads": width // 64}
    for name, layers in (("vae", 2), ("token_vae", 0), ("causal_vae", 2)):
        described = {"latent_channels": 64, "encoder": {**trunk, "layers": layers}, "decoder": trunk}
        if name == "causal_vae":
            described |= {"latent_channels": 16, "attention": "causal", "mask_token": True}
        config = from_dict(TextVAEConfig, described, where="benchmark")
        weights = TextVAE(config, vocab_size).state_dict()
        write_model(folder / name, "text_vae", config, weights, tokenizer=folder / "shards" / "tokenizer")
    return tokenizer


def configuration(options: argparse.Namespace, name: str, folder: Path, **training: Any) -> RunConfig:
    kind, own = systems(options.width, options.layers)[name]
    vae = {"dit": "vae", "dit in blocks": "token_vae", "cola": "causal_vae"}.get(name)
    if vae:
        own = {key: {**section, "vae": str(folder / vae)} for key, section in own.items()}
    data = {"shards": str(folder / "shards"), "row_tokens": options.row_tokens, "max_tokens": options.row_tokens}
    steps = {"max_steps": WARMUP + options.steps, "save_every_steps": 10**6, "logging": {"log_every_steps": 10**6}}
    sizes = {"rows_per_step": options.rows, "micro_batch_rows": options.rows, "validation_batches": 0, **training}
    given = {"run_dir": tempfile.mkdtemp(dir=folder), "data": data, "training": sizes, **steps, **own}
    return from_dict(config_class(kind), given, where="benchmark")


def frozen_vaes(recipe: Any) -> list[Any]:
    """The frozen autoencoder of a recipe, where it has one."""
    return [getattr(recipe, name) for name in ("vae", "reference") if hasattr(recipe, name)]


class Shares:
    """Seconds of a trainer's parts, without what is inside of it counted elsewhere. A GPU is waited for at every
    border, so the sum is more than a step takes undisturbed."""

    def __init__(self, trainer: Trainer) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[float] = []
        self.on_gpu = trainer.processes.device.type == "cuda"
        for part, owner, method in [
            ("data wait", trainer, "_take"),
            *[("encoders", vae, "encode") for vae in frozen_vaes(trainer.recipe)],
            ("prepare", trainer.recipe, "prepare"),
            ("forward", trainer.engine, "forward"),
            ("backward", trainer.engine, "backward"),
            ("optimizer", trainer.engine, "step"),
            ("EMA", trainer.state.ema, "update"),
            ("logging", trainer, "_log"),
            ("rest", trainer, "train_step"),
        ]:
            setattr(owner, method, self._timed(part, getattr(owner, method)))

    def _timed(self, part: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._wait()
            started = time.perf_counter()
            self._open.append(0.0)
            result = run(*args, **kwargs)
            self._wait()
            took = time.perf_counter() - started
            inside = self._open.pop()
            if self._open:
                self._open[-1] += took
            self.seconds[part] += took - inside
            return result

        return timed

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def make_trainer(config: RunConfig, ds_config: Path | None, processes: Processes) -> Trainer:
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        shown, sys.stdout = sys.stdout, nowhere
        try:
            return Trainer(with_precision(config, processes), build_recipe(config), ds_config, processes)
        finally:
            sys.stdout = shown


def run_steps(trainer: Trainer, steps: int) -> float:
    """Take steps; seconds a step, reading the rows included."""
    meter, started = Meter(), time.perf_counter()
    for _ in range(steps):
        batches, plan = trainer._load(trainer.state.sample)
        trainer.train_step([batch.to(trainer.processes.device) for batch in batches], meter)
        trainer.state.sample = plan.next_sample
    if trainer.processes.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps


def shares(config: RunConfig, ds_config: Path | None, processes: Processes, every: int) -> dict[str, float]:
    """The parts' shares of a step, logging at every `every`-th step."""
    trainer = make_trainer(config, ds_config, processes)
    trainer.logger.say = lambda text: None  # type: ignore[method-assign]
    run_steps(trainer, WARMUP)
    found = Shares(trainer)
    trainer.config = dataclasses.replace(
        trainer.config, logging=dataclasses.replace(trainer.config.logging, log_every_steps=1)
    )
    steps = config.max_steps - WARMUP
    trainer.loop()
    found.seconds["logging"] *= 1 / every  # it logged at every step
    total = sum(found.seconds.values())
    assert trainer.state.step == WARMUP + steps
    return {part: found.seconds[part] / total for part in PARTS}


def plain_loop(config: RunConfig, processes: Processes, compiled: bool = False) -> Callable[[], float]:
    """Steps of the same network on the same inputs, as one writes them without a trainer; tokens a second."""
    config = with_precision(config, processes)
    recipe = build_recipe(config)
    module = recipe.module.to(processes.device)
    bf16 = config.training.precision == "bf16"
    recipe.to(processes.device, torch.bfloat16 if bf16 else torch.float32)
    trainer = make_trainer(config, None, processes)  # for its batches only
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, fused=True)
    if compiled:
        module.compile(dynamic=False)

    def run(steps: int = config.max_steps - WARMUP) -> float:
        tokens, started = 0, time.perf_counter()
        for _ in range(steps):
            (batch,), plan = trainer._load(trainer.state.sample)
            trainer.state.sample = plan.next_sample
            item = recipe.prepare(batch.to(processes.device), step=0)
            with torch.autocast(processes.device.type, torch.bfloat16, enabled=bf16):
                output = module(**item.inputs)
            counts = {name: count.clamp(min=1.0) for name, count in item.counts.items()}
            total_loss(output, counts, recipe.loss_weights(0)).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            tokens += batch.tokens.numel()
        if processes.device.type == "cuda":
            torch.cuda.synchronize()
        return tokens / (time.perf_counter() - started)

    run(WARMUP)
    return run


def ours(config: RunConfig, ds_config: Path | None, processes: Processes) -> Callable[[], float]:
    """Steps of the trainer; tokens (padding included, as for the peer) a second."""
    trainer = make_trainer(config, ds_config, processes)
    run_steps(trainer, WARMUP)
    tokens = config.training.rows_per_step * config.data.row_tokens

    return lambda: tokens / run_steps(trainer, config.max_steps - WARMUP)


def matrix_product_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of the best of five products of square matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(6):
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16, help="rows of a step")
    parser.add_argument("--row-tokens", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a round")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the best counts")
    parser.add_argument("--log-every", type=int, default=20, help="steps between two log lines")
    parser.add_argument("--systems", nargs="+", default=list(systems(64, 1)), choices=list(systems(64, 1)))
    parser.add_argument("--deepspeed_config", type=Path, help="a file of ds_configs/")
    options = parser.parse_args()
    processes = start_processes()
    rows, figures = [], dict[str, Any]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, options.width, options.vocab_size)
        first = with_precision(configuration(options, "lm", folder), processes)
        dtype = torch.bfloat16 if first.training.precision == "bf16" else torch.float32
        peak = matrix_product_flops(processes.device, dtype, 8192 if processes.device.type == "cuda" else 2048)
        for system in options.systems:
            config, ds_config = configuration(options, system, folder), options.deepspeed_config
            compiled = configuration(options, system, folder, compile=True)
            contestants = {
                "megatext": ours(config, ds_config, processes),
                "plain": plain_loop(config, processes),
                "megatext compiled": ours(compiled, ds_config, processes),
                "plain compiled": plain_loop(compiled, processes, compiled=True),
            }
            best = best_of(contestants, options.repeats)
            spent = shares(configuration(options, system, folder), ds_config, processes, options.log_every)
            flops = row_flops(config, meta_module(config, options.vocab_size), options.vocab_size).model
            mfu = {k: v / options.row_tokens * flops / peak for k, v in best.items()}
            figures[system] = {"tokens_per_second": best, "mfu": mfu, "shares": spent}
            rows.append(
                [system, f"{best['megatext']:,.0f}", f"{100 * mfu['megatext']:.0f} %"]
                + [f"{best['megatext'] / best['plain']:.2f} x", f"{best['megatext compiled'] / best['megatext']:.2f} x"]
                + [f"{best['megatext compiled'] / best['plain compiled']:.2f} x"]
                + [f"{100 * spent[part]:.2f} %" for part in PARTS]
            )
            print(json.dumps({system: figures[system]}), file=sys.stderr, flush=True)
    columns = ["recipe", "tokens/s", "MFU", "of plain", "compiling", "of plain, both compiled", *PARTS]
    figures |= {
        "peak_flops": peak,
        "precision": first.training.precision,
        "options": vars(options) | {"deepspeed_config": str(options.deepspeed_config)},
    }
    report("train_step", columns, rows, figures)


if __name__ == "__main__":
    main()
