"""The plan of a family of runs: sizes x budgets x systems from one file, a configuration each, and what each costs."""

import copy
import dataclasses
import hashlib
import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatext.config import ConfigError, from_dict, read_yaml, save_yaml, to_dict
from megatext.data.stream import TokenStream
from megatext.recipes import config_class, meta_module
from megatext.scaling.config import PlanConfig, Size, System, load_plan_config
from megatext.training.deepspeed_json import deepspeed_json
from megatext.training.estimate import rank_bytes, row_flops
from megatext.training.run_config import RunConfig

if TYPE_CHECKING:
    from torch import nn

SYSTEMS = {
    "lm": ("PretrainLMConfig", "model"),
    "dit": ("PretrainDiTConfig", "dit.network.trunk"),
    "cola": ("PretrainColaConfig", "cola.network.trunk"),
    "ldlm": ("PretrainLDLMConfig", "ldlm.network.trunk"),
}
"""Launcher -> its configuration class, and the section whose layers, width and heads are the size of a run."""
PLAN = "plan.json"


@dataclass(frozen=True)
class PlannedRun:
    """One run and what it costs."""

    name: str
    """system-width-FLOPs-identity; the identity is a hash of the configuration, but for where and how it is logged."""
    system: str
    launcher: str
    run_dir: str
    loss: str
    width: int
    layers: int
    heads: int
    learning_rate: float
    rows_per_step: int
    steps: int
    parameters: int
    parameters_without_embeddings: int
    """Without what has a row or a column for each entry of the vocabulary."""
    tokens: int
    """Of all steps, padding included."""
    epochs: float
    """Of the data, if there were no padding: at most so many."""
    flops_per_step: float
    budget_flops: float
    """What was asked for."""
    memory_gib: float
    """Weights, gradients, optimizer and averages of a rank."""
    device_hours: float | None

    @property
    def flops(self) -> float:
        """Of the whole run."""
        return self.flops_per_step * self.steps


@dataclass(frozen=True)
class _Sized:
    """A system in a size: what does not depend on the budget."""

    settings: dict[str, Any]
    width_ratio: float
    parameters: int
    without_embeddings: int
    row_flops: float
    tokens_per_epoch: float
    """nan where there are no shards yet."""
    memory_gib: float


class Plan:
    """The runs of a file, and their configurations."""

    def __init__(self, file: Path) -> None:
        """Raises ConfigError for a file that does not fit together, DataError for shards that cannot be read."""
        self.config, self.content = load_plan_config(file)
        self.file, self.work_dir = file, Path(self.config.work_dir)
        sized = [
            (name, size, self._sized(name, system, size))
            for name, system in self.config.systems.items()
            for size in self.config.ladder
        ]
        targets = [(*each, flops) for each in sized for flops in self._targets(each[1], each[2])]
        least = min(flops for *_, flops in targets)
        self.runs: list[PlannedRun] = []
        self.configs: list[RunConfig] = []
        for name, _, of_size, flops in targets:
            config = self._configured(name, of_size, flops, flops / least)
            self.runs.append(self._cost(name, of_size, config, flops))
            self.configs.append(dataclasses.replace(config, run_dir=self.runs[-1].run_dir))

    def refuse_what_does_not_fit(self) -> None:
        """Raises ConfigError, naming the runs that read the data too often or need too much memory, and where there are
        no shards yet, so that all is told for a presumed vocabulary."""
        if absent := {shards for config in self.configs for shards in self.absent(config)}:
            names = " and ".join(sorted({f"{config.vocabulary[0]}'s" for config in self.configs}))
            raise ConfigError(
                f"{self.file}: {', '.join(sorted(absent))}: no such directory; the above is for {names} vocabulary, "
                "and nothing was written: make the shards (python -m data_tools.shard), then plan again"
            )
        limit, memory = self.config.max_epochs, self.config.device.memory_gib
        if over := [f"{run.name} ({run.epochs:.2g} epochs)" for run in self.runs if run.epochs > limit]:
            raise ConfigError(
                f"{self.file}: more than max_epochs ({limit:g}): {', '.join(over)}; take more data, smaller budgets, "
                "or leave small sizes out of large budgets (budgets: widths)"
            )
        if memory is not None and (
            over := [f"{run.name} ({run.memory_gib:.3g} GiB)" for run in self.runs if run.memory_gib > memory]
        ):
            raise ConfigError(
                f"{self.file}: more than device.memory_gib ({memory:g}): {', '.join(over)}; take more processes, or "
                "ds_configs/zero3.json as device.deepspeed_config"
            )

    @staticmethod
    def absent(config: RunConfig) -> list[str]:
        """The directories of shards that are not there."""
        return [folder for folder in config.data.folders() if not Path(folder).is_dir()]

    def write(self) -> None:
        """plan.json, and a configuration for each run that its launcher can be given."""
        configs = self.work_dir / "configs"
        shutil.rmtree(configs, ignore_errors=True)
        configs.mkdir(parents=True)
        for run, config in zip(self.runs, self.configs, strict=True):
            save_yaml(config, config_file(run))
        content = {"plan": self.content, "runs": [asdict(run) for run in self.runs]}
        temporary = self.work_dir / f"{PLAN}.tmp"
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(self.work_dir / PLAN)

    def table(self) -> str:
        """A line a run, and the sum."""
        headings = "run layers width heads params -embed lr rows steps tokens epochs tok/param FLOPs GiB hours".split()
        rows = [
            [
                run.name, str(run.layers), str(run.width), str(run.heads), short(run.parameters),
                short(run.parameters_without_embeddings), f"{run.learning_rate:.2g}", str(run.rows_per_step),
                str(run.steps), short(run.tokens), f"{run.epochs:.2f}", f"{run.tokens / run.parameters:.1f}",
                f"{run.flops:.2e}", f"{run.memory_gib:.2f}", _hours(run.device_hours),
            ]
            for run in self.runs
        ]  # fmt: skip
        hours = [run.device_hours for run in self.runs]
        total = sum(h for h in hours if h is not None) if None not in hours else None
        told = (
            f", {_hours(total)} device-hours at {self.config.device.mfu:.0%} of the peak" if total is not None else ""
        )
        flops = sum(run.flops for run in self.runs)
        return f"{aligned([headings, *rows])}\n{len(rows)} runs, {flops:.2e} FLOPs{told}"

    def _sized(self, name: str, system: System, size: Size) -> _Sized:
        cls, section = SYSTEMS[system.launcher]
        settings = read_yaml(Path(system.config))
        for key, value in {**self.config.set, **system.set}.items():
            _set(settings, key, value)
        preset = _get(settings, section)
        if not isinstance(preset, dict) or not {"layers", "width", "heads"} <= preset.keys():
            raise ConfigError(f"{system.config}: {section} has to say layers, width and heads: the rules start there")
        layers = size.layers or max(1, round(size.width * preset["layers"] / preset["width"]))
        heads = size.heads or max(1, round(size.width * preset["heads"] / preset["width"]))
        ratio = size.width / preset["width"]
        preset |= {"layers": layers, "width": size.width, "heads": heads}
        settings |= {"run_dir": "", "max_steps": 1}
        config = self._parsed(cls, settings, name)
        vocab_size, tokens_per_epoch = config.vocabulary[1], math.nan
        if not self.absent(config):
            stream = TokenStream(config.data.without_states(), seed=0, rows_per_step=1)
            vocab_size, tokens_per_epoch = stream.vocab_size, stream.tokens_per_epoch
        module = meta_module(config, vocab_size)
        shapes = {name: p.shape for name, p in meta_module(config, vocab_size + 1).named_parameters()}
        counts = [(p.numel(), p.shape != shapes[name]) for name, p in module.named_parameters() if p.requires_grad]
        return _Sized(
            settings=settings,
            width_ratio=ratio,
            parameters=sum(n for n, _ in counts),
            without_embeddings=sum(n for n, embedding in counts if not embedding),
            row_flops=row_flops(config, module, vocab_size).total,
            tokens_per_epoch=tokens_per_epoch,
            memory_gib=self._memory_gib(config, module),
        )

    def _memory_gib(self, config: RunConfig, module: "nn.Module") -> float:
        device, training = self.config.device, config.training
        rows = training.micro_batch_rows * device.processes
        precision = device.precision if training.precision == "auto" else training.precision
        config = dataclasses.replace(
            config, training=dataclasses.replace(training, precision=precision, rows_per_step=rows)
        )
        file = Path(device.deepspeed_config) if device.deepspeed_config else None
        settings = deepspeed_json(config, file, device.processes)
        return rank_bytes(config, module, settings, device.processes) / 2**30

    def _targets(self, size: Size, sized: _Sized) -> list[float]:
        """The FLOPs of a size's runs."""
        if self.config.budgets:
            return [b.flops for b in self.config.budgets if size.width in (b.widths or [size.width])]
        row_tokens = sized.settings["data"]["row_tokens"]
        tokens = [ratio * sized.parameters for ratio in self.config.tokens_per_parameter]
        return [sized.row_flops * count / row_tokens for count in tokens]

    def _configured(self, name: str, sized: _Sized, flops: float, flops_ratio: float) -> RunConfig:
        """A run's configuration, its run_dir open."""
        system, settings, device = self.config.systems[name], copy.deepcopy(sized.settings), self.config.device
        for key, rule in {**self.config.rules, **system.rules}.items():
            value = _get(settings, key)
            if not isinstance(value, int | float):
                raise ConfigError(f"{self.file}: rules: {key} is {value!r} in {system.config}, not a number")
            new = value * sized.width_ratio**rule.width * flops_ratio**rule.flops
            if key == "training.rows_per_step":
                unit = settings["training"]["micro_batch_rows"] * device.processes
                new = max(unit, unit * round(new / unit))
            _set(settings, key, round(new) if isinstance(value, int) else new)
        steps = round(flops / (sized.row_flops * settings["training"]["rows_per_step"]))
        if steps < self.config.validations:
            raise ConfigError(
                f"{self.file}: {flops:.2g} FLOPs are {steps} steps of {name} at {settings['training']['rows_per_step']}"
                f" rows, fewer than validations ({self.config.validations}): take larger budgets or smaller batches"
            )
        settings["max_steps"] = steps
        settings["training"]["validation_every_steps"] = math.ceil(steps / self.config.validations)
        for key, share in {**self.config.step_shares, **system.step_shares}.items():
            _set(settings, key, round(share * steps))
        _set(settings, "logging.wandb_group", self.work_dir.name)
        return self._parsed(SYSTEMS[system.launcher][0], settings, name)

    def _parsed(self, cls: str, settings: dict[str, Any], name: str) -> RunConfig:
        return from_dict(config_class(cls), copy.deepcopy(settings), where=f"{self.file}: systems.{name}")

    def _cost(self, name: str, sized: _Sized, config: RunConfig, flops: float) -> PlannedRun:
        system, device, training = self.config.systems[name], self.config.device, config.training
        own = {key: value for key, value in to_dict(config).items() if key not in ("run_dir", "logging")}
        identity = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:8]
        size = _get(to_dict(config), SYSTEMS[system.launcher][1])
        label = re.sub(r"[^a-z0-9.]+", "_", name.lower()) + f"-{size['width']}-{flops:.2g}-{identity}".replace("+", "")
        tokens = training.rows_per_step * config.max_steps * config.data.row_tokens
        per_step = sized.row_flops * training.rows_per_step
        speed = (device.peak_tflops or 0.0) * 1e12 * device.mfu
        return PlannedRun(
            name=label,
            system=name,
            launcher=system.launcher,
            run_dir=str(self.work_dir / "runs" / label),
            loss=system.loss,
            width=size["width"],
            layers=size["layers"],
            heads=size["heads"],
            learning_rate=config.optimizer.learning_rate,
            rows_per_step=training.rows_per_step,
            steps=config.max_steps,
            parameters=sized.parameters,
            parameters_without_embeddings=sized.without_embeddings,
            tokens=tokens,
            epochs=tokens / sized.tokens_per_epoch,
            flops_per_step=per_step,
            budget_flops=flops,
            memory_gib=sized.memory_gib,
            device_hours=per_step * config.max_steps / speed / 3600 if speed else None,
        )


def read_plan(file: Path) -> tuple[PlanConfig, list[PlannedRun]]:
    """What was planned from a file. Raises ConfigError where there is no plan, or one of another content."""
    config, content = load_plan_config(file)
    path = Path(config.work_dir) / PLAN
    again = f"python launch/scaling_law.py plan --config {file}"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; make it by: {again}")
    found = json.loads(path.read_text())
    if found["plan"] != content:
        raise ConfigError(f"{file} is not what {path} was made from; make it anew by: {again}")
    return config, [PlannedRun(**run) for run in found["runs"]]


def config_file(run: PlannedRun) -> Path:
    """The configuration of a run, as its launcher takes it."""
    return Path(run.run_dir).parent.parent / "configs" / f"{run.name}.yaml"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table for the console: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    )


def short(count: float) -> str:
    """A large number in three digits."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.3g}"


def _hours(hours: float | None) -> str:
    return "-" if hours is None else f"{hours:.2f}" if hours < 10 else f"{hours:,.0f}"


def _get(settings: dict[str, Any], key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _set(settings: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        settings = settings.setdefault(parent, {})
    settings[leaf] = value
