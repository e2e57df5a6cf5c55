"""A recipe of a second's size for tests of the trainer, and a program that runs it in processes of its own."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatext import rng
from megatext.config import ConfigError, cli_errors, load_config
from megatext.data.packing import TokenBatch
from megatext.data.shards import FORMAT_VERSION, ShardWriter, write_json
from megatext.recipes.base import Output, Pass, Prepared, Recipe
from megatext.training.run_config import RunConfig
from megatext.training.trainer import train
from tests.processes import run_ranks

VOCABULARY = 61


@dataclass(frozen=True, kw_only=True)
class ToyConfig(RunConfig):
    """A toy run, with accidents to order."""

    width: int = 24
    """Of the network."""
    accident_rank: int = 0
    """The rank that the following happens to."""
    sleep_at_step: int | None = None
    """Sleep for ten minutes in this step."""
    signal_at_step: int | None = None
    """A signal to itself in this step."""
    signal_number: int = 15
    """Which."""
    nan_at_steps: tuple[int, ...] = ()
    """Steps whose loss is not a number."""
    nan_gradient_at_steps: tuple[int, ...] = ()
    """Steps whose loss is a number and whose gradient is not, behind the first block."""


class PoisonedGradient(torch.autograd.Function):
    """The identity, of gradient nan."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * float("nan")


class ToyModule(nn.Module):
    """Predicts the next token from one token; matrices of several shapes, a tied head, a statistic."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))
            for _ in range(2)
        )
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("latent_mean", torch.full((3,), 1 / 3))

    def forward(self, tokens: Tensor, targets: Tensor, real: Tensor, noise: Tensor, poisoned: bool) -> Output:
        x = self.embed(tokens) + noise.to(self.embed.weight.dtype)
        for block in self.blocks:
            mixed = block(x)
            if poisoned and block is self.blocks[0]:
                mixed = PoisonedGradient.apply(mixed)
            x = x + mixed
        logits = self.head(x).float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(real)
        square = (logits.logsumexp(-1).square() * real).sum()
        correct = ((logits.argmax(-1) == targets) * real).sum()
        return Output({"ce": (loss * real).sum(), "z": square}, {"accuracy": (correct, real.sum())})


class ToyRecipe(Recipe):
    """Noise keyed by row; two loss terms with different counts."""

    module: ToyModule

    def __init__(self, config: ToyConfig) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        self.module = ToyModule(config.width)

    def prepare(self, batch: TokenBatch, *, step: int, purpose: str = "train") -> Prepared:
        here = purpose == "train" and dist.get_rank() == self.config.accident_rank
        if here and step + 1 == self.config.sleep_at_step:
            time.sleep(600)
        if here and step + 1 == self.config.signal_at_step:
            os.kill(os.getpid(), self.config.signal_number)
        real = (batch.segment >= 0).float()
        real[:, -1] = 0
        width = self.config.width
        noise = 0.02 * rng.normal(
            self.config.seed, f"noise/{purpose}", batch.row_index.tolist(), (batch.tokens.shape[1], width)
        )
        if here and step + 1 in self.config.nan_at_steps:
            noise[0, 0] = float("nan")
        inputs: dict[str, Any] = {"tokens": batch.tokens, "targets": batch.tokens.roll(-1, 1), "real": real}
        inputs |= {"noise": noise, "poisoned": here and step + 1 in self.config.nan_gradient_at_steps}
        return Prepared(inputs, {"ce": real.sum(), "z": real.sum() + 7})

    def loss_weights(self, step: int) -> dict[str, float]:
        return {"ce": 1.0, "z": 1e-3 * step}

    def finish(self, batches: list[TokenBatch]) -> dict[str, float]:
        self.module.latent_mean.fill_(0.1)
        return {"measured": 1.5}

    def preview(self, seed: int) -> list[str]:
        return ["a sample"]

    def export(self, state_dict: dict[str, Tensor], output: Path) -> None:
        self.module.load_state_dict(state_dict)
        torch.save(self.module.state_dict(), output / "weights.pt")
        write_json(output / "config.json", {"width": self.config.width})


def build(config: ToyConfig) -> ToyRecipe:
    """This and the two below: what the registry asks of a recipe's module."""
    return ToyRecipe(config)


def make(config: ToyConfig, vocab_size: int) -> ToyModule:
    return ToyModule(config.width)


def passes(config: ToyConfig, module: ToyModule, vocab_size: int) -> list[Pass]:
    tokens = torch.zeros(1, config.data.row_tokens, dtype=torch.long)
    noise = torch.zeros(1, config.data.row_tokens, config.width)
    return [Pass(lambda: module(tokens, tokens, tokens.float(), noise, False))]


def write_toy_shards(directory: Path) -> Path:
    """Shards of arithmetic sequences; returns the directory."""
    directory.mkdir(parents=True)
    splits = {}
    for split, documents in (("train", 400), ("validation", 60)):
        writer = ShardWriter(directory / f"{split}-000000.tar")
        for number in range(documents):
            draw = np.random.default_rng((len(split), number))
            length = int(draw.integers(3, 30))
            tokens = (draw.integers(VOCABULARY) + draw.integers(1, 4) * np.arange(length)) % VOCABULARY
            writer.add(f"{split}-{number}", {"tokens": tokens.astype(np.uint16)}, {"n_tokens": length}, length)
        entry = writer.close()
        splits[split] = {"documents": entry["samples"], "tokens": entry["tokens"], "shards": [entry]}
    tokenizer = {"fingerprint": "toy", "vocab_size": VOCABULARY, "eos_id": 0}
    write_json(
        directory / "manifest.json", {"format_version": FORMAT_VERSION, "tokenizer": tokenizer, "splits": splits}
    )
    return directory


def command(folder: Path, name: str, **overrides: object) -> list[str]:
    """This file's program with run_dir `folder/name`."""
    options = [
        f"--{key.replace('__', '.')}={json.dumps(value) if value is None else value}"
        for key, value in overrides.items()
    ]
    return ["-m", "tests.training.toy", "--config", str(folder / "toy.yaml"), f"--run_dir={folder / name}", *options]


def start(world: int, folder: Path, name: str, **overrides: object) -> "subprocess.CompletedProcess[str]":
    """Run this file's program on `world` gloo processes."""
    return run_ranks(world, [sys.executable, *command(folder, name, **overrides)])


def records(run_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def write_toy_config(folder: Path) -> None:
    """`folder/toy.yaml` and its shards."""
    write_toy_shards(folder / "shards")
    (folder / "toy.yaml").write_text(
        f"""
run_dir: {folder / "unnamed"}
max_steps: 10
save_every_steps: 3
data: {{shards: {folder / "shards"}, row_tokens: 32, max_tokens: 32}}
optimizer: {{name: muon, learning_rate: 1e-2, warmup_steps: 2, weight_decay: 0.1, clip_norm: 0.5}}
training: {{rows_per_step: 8, micro_batch_rows: 2, precision: fp32, ema_decays: [0.9, 0.5]}}
logging: {{log_every_steps: 1}}
"""
    )


if __name__ == "__main__":
    with cli_errors():
        configuration, flags = load_config(ToyConfig, sys.argv[1:])
        if configuration.data.shards == "":
            raise ConfigError("data.shards is empty")
        train(configuration, ToyRecipe(configuration), flags.deepspeed_config)
