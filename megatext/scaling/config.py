"""What a file of launch/configs/scaling says."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatext.config import ConfigError, from_dict, read_yaml


@dataclass(frozen=True)
class Size:
    """A size of the ladder."""

    width: int
    """Channels of the trunk."""
    layers: int | None = None
    """null: as many for the width as the system's preset has."""
    heads: int | None = None
    """null: as wide as the heads of the system's preset."""


@dataclass(frozen=True)
class Budget:
    """Training FLOPs that several sizes are given."""

    flops: float
    """Of a run, frozen networks included, recomputation not; a run gets the whole number of steps that is nearest."""
    widths: tuple[int, ...] = ()
    """The sizes of the ladder that get it; empty: all."""


@dataclass(frozen=True)
class Rule:
    """How a number changes: times (width / the preset's width)^width (FLOPs / the plan's reference_flops)^flops."""

    width: float = 0.0
    """Exponent of the width's ratio."""
    flops: float = 0.0
    """Exponent of the budget's ratio."""


@dataclass(frozen=True)
class System:
    """A recipe of the plan."""

    launcher: Literal["lm", "dit", "cola", "ldlm"]
    """launch/pretrain_*.py"""
    config: str
    """The preset: everything but the size and what depends on it; its own size is where the rules start."""
    set: dict[str, Any] = field(default_factory=dict)
    """Keys of the configuration, dotted, that are other than in the preset."""
    rules: dict[str, Rule] = field(default_factory=dict)
    """Beside the plan's."""
    step_shares: dict[str, float] = field(default_factory=dict)
    """Beside the plan's."""
    widths: tuple[int, ...] = ()
    """The sizes of the ladder that it takes; empty: all."""
    loss: str = "validation_ema/loss"
    """The record of metrics.jsonl that is fitted."""
    sampling: tuple[dict[str, Any], ...] = ({},)
    """How the finished models are sampled, for the evaluation; {}: as their own configuration says."""


@dataclass(frozen=True)
class Device:
    """What a run is given."""

    processes: int = 1
    """Ranks of every run."""
    processes_per_node: int = 8
    """In a SLURM job."""
    memory_gib: float | None = None
    """Of a rank: a plan whose weights, gradients, optimizer and averages need more is refused; null: is not looked at.
    Activations come on top."""
    peak_tflops: float | None = None
    """Of a rank; with the next one, for telling hours."""
    mfu: float = 0.4
    """Share of the peak that a run is expected to reach."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """What `training.precision: auto` becomes there."""
    deepspeed_config: str | None = None
    """A file of ds_configs/; null: chosen by the number of processes."""


@dataclass(frozen=True)
class PlanConfig:
    """A file of launch/configs/scaling."""

    work_dir: str
    """Everything is in here; its last part is the name of the runs' group in wandb."""
    systems: dict[str, System]
    """By the name that plots and tables show."""
    ladder: tuple[Size, ...]
    """The sizes, one a width."""
    budgets: tuple[Budget, ...] = ()
    """Iso-FLOP grid: a run for every size of every budget."""
    tokens_per_parameter: tuple[float, ...] = ()
    """Instead of budgets: a run for every size and ratio, embeddings counted as parameters."""
    set: dict[str, Any] = field(default_factory=dict)
    """Keys that all systems set, before their own."""
    rules: dict[str, Rule] = field(default_factory=dict)
    """Keys whose number grows or falls with the width or the budget. `training.rows_per_step` is rounded to whole
    micro-batches, other whole numbers to the nearest."""
    reference_flops: float | None = None
    """The budget whose runs have the preset's numbers, where a rule follows the budget."""
    step_shares: dict[str, float] = field(default_factory=lambda: {"optimizer.warmup_steps": 0.1})
    """Keys that are this share of a run's steps."""
    validations: int = 4
    """In each run, at equal distances: its intermediate points."""
    max_epochs: float = 1.0
    """A plan that reads the data more often is refused."""
    device: Device = field(default_factory=Device)
    """Memory and hours."""
    parameters: Literal["all", "without_embeddings"] = "all"
    """What N is in the fits."""

    def __post_init__(self) -> None:
        if not self.systems or not self.ladder or bool(self.budgets) == bool(self.tokens_per_parameter):
            raise ConfigError("a plan needs systems, a ladder, and either budgets or tokens_per_parameter")
        widths = [size.width for size in self.ladder]
        if len(set(widths)) < len(widths):
            raise ConfigError("ladder: two sizes have one width, which names them")
        for key, chosen in (("budgets", self.budgets), ("systems", self.systems.values())):
            if unknown := {width for each in chosen for width in each.widths} - set(widths):
                unknown_widths = ", ".join(map(str, sorted(unknown)))
                raise ConfigError(f"{key}: no size of the ladder has the width {unknown_widths}")
        flops = [budget.flops for budget in self.budgets]
        if self.validations < 1 or self.device.processes < 1 or not all(each > 0 for each in flops):
            raise ConfigError("validations, device.processes and the budgets' FLOPs have to be positive")
        if len(set(flops)) < len(flops):
            raise ConfigError("budgets: two have the same FLOPs; one with the widths of both is meant")
        rules = [self.rules, *(system.rules for system in self.systems.values())]
        if self.reference_flops is None and any(rule.flops for each in rules for rule in each.values()):
            raise ConfigError("rules that follow the budget need reference_flops, whose runs have the preset's numbers")


def load_plan_config(file: Path) -> tuple[PlanConfig, dict[str, Any]]:
    """A file, and its content as it is written there. Raises ConfigError."""
    content = read_yaml(file)
    return from_dict(PlanConfig, copy.deepcopy(content), where=str(file)), content
