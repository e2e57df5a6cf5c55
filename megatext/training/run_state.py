"""What a run is at a step, and how a checkpoint holds it: weights, optimizer state, average, buffers, counters."""

import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatext.config import ConfigError, to_dict
from megatext.data import DataError
from megatext.data.packing import TokenBatch
from megatext.data.stream import TokenStream
from megatext.recipes.base import Recipe
from megatext.training import checkpoint, partitions
from megatext.training.ema import EMA, ema_key
from megatext.training.optimizer import MuonAdamW
from megatext.training.run_config import RunConfig


class RunState:
    """All that changes from step to step. `read` is a collective."""

    def __init__(
        self, config: RunConfig, recipe: Recipe, engine: Any, optimizer: MuonAdamW, stream: TokenStream
    ) -> None:
        self.config, self.recipe, self.optimizer, self.stream = config, recipe, optimizer, stream
        self.partitions = partitions.of_engine(engine)
        optimizer.bind(self.partitions)
        self.ema = EMA(self.partitions, config.training.ema_decays)
        probe = stream.batch(stream.plan(0), slice(0, 1))
        self.probe = replace(probe, documents=[list(keys) for keys in probe.documents])  # its own are read lazily
        """The batch that checkpoints are compared by; that of the checkpoint once one was read."""
        self.step = 0
        """Optimizer steps done."""
        self.sample = 0
        """The sample that the next step begins with, counted over all epochs."""
        self.tokens = 0
        """Tokens trained on, padding not counted."""
        self.skipped_steps = 0
        """Steps whose gradient was not finite."""

    def snapshot(self, probe_loss: float) -> checkpoint.Content:
        """A copy of everything, to be written as a checkpoint of this step."""
        flat: dict[str, list[Tensor | None]] = {"master": list(self.partitions.masters)}
        flat |= {ema_key(decay): list(values) for decay, values in self.ema.averages.items()}
        states = [self.optimizer.state.get(part.stepped, {}) for part in self.partitions.parts]
        for key in sorted({key for state in states for key in state if key != "step"}):
            flat[key] = [state[key].view(-1) if key in state else None for state in states]
        steps = [int(state["step"]) for state in states if "step" in state]
        scalars = {
            "step": self.step,
            "sample": self.sample,
            "tokens": self.tokens,
            "adam_step": max(steps, default=0),
            "ema_updates": self.ema.updates,
            "skipped_steps": self.skipped_steps,
        }
        meta = {
            **scalars,
            "config_class": type(self.config).__name__,
            "config": to_dict(self.config),
            "tokenizer_fingerprint": self.stream.tokenizer_fingerprint,
            "order_fingerprint": self.stream.order_fingerprint,
            "built_on": dict(self.recipe.built_on),
            "tied": self._tied(),
            "probe_loss": probe_loss,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "deepspeed": version("deepspeed"),
            },
        }
        return checkpoint.snapshot(self.partitions, flat, scalars, self._buffers(), vars(self.probe), meta)

    def read(self, path: Path) -> dict[str, Any]:
        """Become what a checkpoint holds; its meta.json. Raises ConfigError and DataError where it is not a checkpoint
        of this run."""
        reader = checkpoint.Reader(path)
        self._check_same_run(path, reader.meta)
        scalars, own = reader.scalars, self.partitions.own_fragments()
        for part, fragments in zip(self.partitions.parts, own, strict=True):
            reader.read_fragments("master", fragments, part.master)
            is_muon = self.optimizer.param_groups[part.group]["muon"]
            state = self.optimizer.state[part.stepped]
            for key in ("momentum",) if is_muon else ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(part.stepped.data)
                reader.read_fragments(key, fragments, state[key].view(-1))
            if not is_muon:
                state["step"] = torch.tensor(float(scalars["adam_step"]), device=part.stepped.device)
        self.partitions.push_masters()
        for decay, values in self.ema.averages.items():
            key = ema_key(decay) if ema_key(decay) in reader.keys else "master"  # a new average begins here
            for value, fragments in zip(values, own, strict=True):
                reader.read_fragments(key, fragments, value)
        self.ema.updates = scalars["ema_updates"]
        for name, buffer in self._buffers().items():
            buffer.copy_(reader.buffers[name])
        self.step, self.sample, self.tokens = scalars["step"], scalars["sample"], scalars["tokens"]
        self.skipped_steps = scalars["skipped_steps"]
        self.probe = TokenBatch(**reader.probe)
        return reader.meta

    def _check_same_run(self, path: Path, saved: dict[str, Any]) -> None:
        shapes = {name: list(shape) for name, shape in self.partitions.shapes.items()}
        differing = [
            name for name in shapes.keys() | saved["shapes"].keys() if shapes.get(name) != saved["shapes"].get(name)
        ]
        if differing:
            name = min(differing)
            raise ConfigError(
                f"{path}: {name} is {saved['shapes'].get(name)} there and {shapes.get(name)} in this configuration; "
                "continue with the run's own config.yaml or choose another run_dir"
            )
        for key, mine in (("optimizer.name", self.config.optimizer.name), ("seed", self.config.seed)):
            theirs: Any = saved["config"]
            for part in key.split("."):
                theirs = theirs[part]
            if theirs != mine:
                raise ConfigError(
                    f"{path}: was written with {key} {theirs!r}, now it is {mine!r}; a run cannot change it"
                )
        check_built_on(path, saved["built_on"], self.recipe.built_on)
        if saved["tokenizer_fingerprint"] != self.stream.tokenizer_fingerprint:
            raise DataError(f"{self.config.data.shards}: these shards have another tokenizer than those of {path}")
        if saved["order_fingerprint"] != self.stream.order_fingerprint:
            raise DataError(
                f"{path}: was trained on other shards, weights or windows (data.max_tokens) than these, so documents "
                "would be read twice or never; continue with the same, or start another run_dir"
            )

    def _buffers(self) -> dict[str, Tensor]:
        persistent = self.recipe.module.state_dict().keys()
        return {name: buffer for name, buffer in self.recipe.module.named_buffers() if name in persistent}

    def _tied(self) -> dict[str, str]:
        """Second names of shared parameters -> the name they are stored under."""
        names = dict(self.recipe.module.named_parameters())
        return {
            alias: next(name for name, other in names.items() if other is parameter)
            for alias, parameter in self.recipe.module.named_parameters(remove_duplicate=False)
            if alias not in names
        }


def check_built_on(checkpoint_path: Path, saved: Mapping[str, str], present: Mapping[str, str]) -> None:
    """Raise ConfigError unless the models that a recipe stands on are those that its checkpoint was trained on."""
    for name, weights in saved.items():
        if present.get(name, weights) != weights:
            raise ConfigError(
                f"{checkpoint_path}: was trained on another {name} than lies there now; put the old one back, or train "
                "anew in another run_dir"
            )
