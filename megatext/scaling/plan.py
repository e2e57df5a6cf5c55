"""The plan of a family of runs: sizes x budgets x systems from one file, a configuration each, and what each costs."""

import copy
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from evaluation.files import atomic_write
from megatext.config import ConfigError, from_dict, load_config, to_dict
from megatext.data.shards import MANIFEST
from megatext.data.stream import TokenStream
from megatext.recipes import config_class, meta_module, needed_by
from megatext.recipes.pretrained import weights_hash
from megatext.scaling.config import PlanConfig, Size, System, load_plan_config
from megatext.training.deepspeed_json import deepspeed_json
from megatext.training.engine import accumulation_steps
from megatext.training.estimate import RowFlops, rank_bytes, row_flops
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
    """system-width-FLOPs-identity. The identity is a hash of the configuration, but for where the run is and how it is
    logged, and of the content of the shards, states and models that it reads."""
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
    """Without padding, if all steps have as much of it as the first."""
    epochs: float
    """Of the source that is read most often; nan where there are no shards yet."""
    flops_per_step: float
    """Forward and backward passes, frozen networks included, recomputation not."""
    budget_flops: float
    """What was asked for."""
    memory_gib: float
    """Weights, gradients, optimizer and averages of a rank."""
    device_hours: float | None
    """At the plan's MFU, which is of what is trained."""

    @property
    def flops(self) -> float:
        """Of the whole run."""
        return self.flops_per_step * self.steps


@dataclass(frozen=True)
class _Sized:
    """A system in a size: what does not depend on the budget."""

    settings: dict[str, Any]
    """The whole configuration, the rules not applied."""
    preset_width: int
    parameters: int
    without_embeddings: int
    flops: RowFlops
    tokens_per_row: float
    memory_gib: float
    read: dict[str, str]
    """The content of the shards, states and models that a run reads, hashed."""


class Plan:
    """The runs of a file, and their configurations."""

    def __init__(self, file: Path) -> None:
        """Raises ConfigError for a file that does not fit together, DataError for shards that cannot be read."""
        self.config, self.content = load_plan_config(file)
        self.file, self.work_dir = file, Path(self.config.work_dir)
        self.runs: list[PlannedRun] = []
        self.configs: list[RunConfig] = []
        for name, system in self.config.systems.items():
            before = len(self.runs)
            for size in self.config.ladder:
                if system.widths and size.width not in system.widths:
                    continue
                sized = self._sized(name, system, size)
                for flops in self._targets(size, sized):
                    config = self._configured(name, sized, flops)
                    self.runs.append(self._cost(name, sized, config, flops))
                    self.configs.append(dataclasses.replace(config, run_dir=self.runs[-1].run_dir))
            if len(self.runs) == before:
                raise ConfigError(f"{file}: systems.{name}: no budget has any of its widths")
        names = [run.name for run in self.runs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"{file}: two runs are the same: {', '.join(twice)}")

    def refuse_what_does_not_fit(self) -> None:
        """Raises ConfigError, naming the runs that read the data too often or need too much memory, or what they stand
        on that is not there yet, so that its vocabulary or its latents are presumed."""
        if absent := sorted({path for config in self.configs for path in absent_of(config)}):
            presumed = sorted({f"{c.vocabulary[0]}'s vocabulary" for c in self.configs})
            presumed += sorted({c.presumed_model for c in self.configs if c.presumed_model})
            raise ConfigError(
                f"{self.file}: {', '.join(absent)}: not there yet. The above presumes {', '.join(presumed)} in such "
                "places, and nothing was written: make what is missing, then plan again"
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

    def write(self) -> None:
        """A configuration for each run that its launcher can be given, and plan.json. Those of an earlier plan stay:
        its runs may be under way."""
        for run, config in zip(self.runs, self.configs, strict=True):
            atomic_write(config_file(run), OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))
        content = {"plan": self.content, "runs": [asdict(run) for run in self.runs]}
        atomic_write(self.work_dir / PLAN, json.dumps(content, indent=1) + "\n")

    def table(self) -> str:
        """A line a run, and the sum."""
        headings = "run layers width heads params -embed lr rows steps tokens epochs tok/param FLOPs GiB hours".split()
        rows = [
            [
                run.name, str(run.layers), str(run.width), str(run.heads), short(run.parameters),
                short(run.parameters_without_embeddings), f"{run.learning_rate:.2g}", str(run.rows_per_step),
                str(run.steps), short(run.tokens), f"{run.epochs:.2f}", f"{run.tokens / run.parameters:.3g}",
                f"{run.flops:.2e}", f"{run.memory_gib:.2f}", _hours(run.device_hours),
            ]
            for run in self.runs
        ]  # fmt: skip
        hours = sum(run.device_hours or 0.0 for run in self.runs)
        told = f", {_hours(hours)} device-hours at {self.config.device.mfu:.0%} of the peak" if hours else ""
        flops = sum(run.flops for run in self.runs)
        return f"{aligned([headings, *rows])}\n{len(rows)} runs, {flops:.2e} FLOPs{told}"

    def _sized(self, name: str, system: System, size: Size) -> _Sized:
        cls, section = SYSTEMS[system.launcher]
        options = [
            word
            for key, value in {**self.config.set, **system.set}.items()
            for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
        ]
        preset, _ = load_config(config_class(cls), ["--config", system.config, *options])
        settings = to_dict(preset)
        trunk = _get(settings, section)
        preset_width = trunk["width"]
        layers = size.layers or max(1, round(size.width * trunk["layers"] / preset_width))
        heads = size.heads or max(1, round(size.width * trunk["heads"] / preset_width))
        trunk |= {"layers": layers, "width": size.width, "heads": heads}
        config = self._parsed(cls, settings, name)
        averaged = bool(config.training.ema_decays) or not system.loss.startswith("validation_ema/")
        if not config.training.validation_batches or not averaged:
            raise ConfigError(f"{self.file}: systems.{name}: no {system.loss} without validation batches and averages")
        vocab_size, tokens_per_row = config.vocabulary[1], float(config.data.row_tokens)
        if stream := stream_of(config):
            vocab_size, tokens_per_row = stream.vocab_size, stream.plan(0).tokens / stream.rows_per_step
        module = meta_module(config, vocab_size)
        shapes = {key: p.shape for key, p in meta_module(config, vocab_size + 1).named_parameters()}
        counts = [(p.numel(), p.shape != shapes[key]) for key, p in module.named_parameters() if p.requires_grad]
        return _Sized(
            settings=settings,
            preset_width=preset_width,
            parameters=sum(n for n, _ in counts),
            without_embeddings=sum(n for n, embedding in counts if not embedding),
            flops=row_flops(config, module, vocab_size),
            tokens_per_row=tokens_per_row,
            memory_gib=self._memory_gib(config, module),
            read={path: _content(Path(path)) for path in needed_by(config) if path not in absent_of(config)},
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
        rows = [ratio * sized.parameters / sized.tokens_per_row for ratio in self.config.tokens_per_parameter]
        return [count * (sized.flops.model + sized.flops.frozen) for count in rows]

    def _configured(self, name: str, sized: _Sized, flops: float) -> RunConfig:
        """A run's configuration, its run_dir that of the preset."""
        system, settings = self.config.systems[name], copy.deepcopy(sized.settings)
        training, cls = settings["training"], SYSTEMS[system.launcher][0]
        self._follow_rules(system, settings, sized.preset_width, flops)
        steps = round(flops / ((sized.flops.model + sized.flops.frozen) * training["rows_per_step"]))
        if steps < self.config.validations:
            raise ConfigError(
                f"{self.file}: {flops:.2g} FLOPs are {steps} steps of {name} at {training['rows_per_step']} rows, "
                f"fewer than validations ({self.config.validations}): take larger budgets or smaller batches"
            )
        settings["max_steps"] = steps
        training["validation_every_steps"] = math.ceil(steps / self.config.validations)
        for key, share in {**self.config.step_shares, **system.step_shares}.items():
            _set(settings, key, round(share * steps))
        settings["logging"]["wandb_group"] = self.work_dir.name
        config = self._parsed(cls, settings, name)
        accumulation_steps(config, self.config.device.processes)
        accumulation_steps(config, self.config.device.processes, validation=True)
        return config

    def _follow_rules(self, system: System, settings: dict[str, Any], preset_width: int, flops: float) -> None:
        """Change the numbers that follow the width and the budget."""
        training, unit = settings["training"], settings["training"]["micro_batch_rows"] * self.config.device.processes
        if training["validation_rows"] is None:  # the same ones, whatever batch the rules make
            training["validation_rows"] = max(unit, unit * round(training["rows_per_step"] / unit))
        width_ratio = _get(settings, SYSTEMS[system.launcher][1])["width"] / preset_width
        flops_ratio = flops / (self.config.reference_flops or flops)
        for key, rule in {**self.config.rules, **system.rules}.items():
            value = _get(settings, key)
            if not isinstance(value, int | float):
                raise ConfigError(f"{self.file}: rules: {key} of {system.config} is {value!r}, not a number")
            new = value * width_ratio**rule.width * flops_ratio**rule.flops
            if key == "training.rows_per_step":
                new = max(unit, unit * round(new / unit))
            _set(settings, key, round(new) if isinstance(value, int) else new)

    def _parsed(self, cls: str, settings: dict[str, Any], name: str) -> RunConfig:
        return from_dict(config_class(cls), copy.deepcopy(settings), where=f"{self.file}: systems.{name}")

    def _cost(self, name: str, sized: _Sized, config: RunConfig, flops: float) -> PlannedRun:
        system, device, training = self.config.systems[name], self.config.device, config.training
        size = _get(to_dict(config), SYSTEMS[system.launcher][1])
        label = re.sub(r"[^a-z0-9.]+", "_", name.lower()) + f"-{size['width']}-{flops:.2g}".replace("+", "")
        label, epochs = f"{label}-{_identity(config, sized.read)}", math.nan
        if stream := stream_of(config):
            epochs = max(stream.epochs(config.max_steps * stream.plan(0).next_sample))
        speed = (device.peak_tflops or 0.0) * 1e12 * device.mfu
        rows = config.max_steps * training.rows_per_step
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
            tokens=round(rows * sized.tokens_per_row),
            epochs=epochs,
            flops_per_step=(sized.flops.model + sized.flops.frozen) * training.rows_per_step,
            budget_flops=flops,
            memory_gib=sized.memory_gib,
            device_hours=rows * sized.flops.model / speed / 3600 if speed else None,
        )


def _identity(config: RunConfig, read: dict[str, str]) -> str:
    """Of what a run measures: its configuration, but for where it writes and how its model would, and what it reads."""
    own = {key: value for key, value in to_dict(config).items() if key not in ("run_dir", "logging")}
    for section in own.values():
        if isinstance(section, dict):
            section.pop("sampling", None)
    return hashlib.sha256(json.dumps([own, read], sort_keys=True).encode()).hexdigest()[:8]


def stream_of(config: RunConfig) -> TokenStream | None:
    """The tokens that a run reads; None where its shards are not there yet. Raises DataError."""
    if any(not Path(folder).is_dir() for folder in config.data.folders()):
        return None
    return TokenStream(config.data.without_states(), seed=config.seed, rows_per_step=config.training.rows_per_step)


def absent_of(config: RunConfig) -> list[str]:
    """What a run reads that is not there yet."""
    return [path for path in needed_by(config) if not Path(path).is_dir()]


def _content(directory: Path) -> str:
    """Of shards or states their manifest, of a model its description and weights, hashed."""
    manifest = directory / MANIFEST
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else weights_hash(directory)


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
