"""The loop around any recipe: rows -> inputs -> loss -> step -> EMA -> log, validate, save."""

import dataclasses
import json
import math
import os
import platform
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatext.config import ConfigError, save_yaml, to_dict
from megatext.data import DataError
from megatext.data.packing import TokenBatch
from megatext.data.stream import DataConfig, TokenStream
from megatext.recipes.base import Output, Prepared, Recipe
from megatext.training import checkpoint, partitions
from megatext.training.ema import EMA
from megatext.training.engine import (
    Precision,
    Processes,
    accumulation_steps,
    build_engine,
    chosen_precision,
    deepspeed_json,
    start_processes,
)
from megatext.training.guards import StepGuard
from megatext.training.metrics import Clock, Logger, LoggingConfig, Meter, console_line, memory_gib, peak_tflops
from megatext.training.optimizer import OptimizerConfig, build_optimizer
from megatext.training.schedule import learning_rate_share

REQUEUE_EXIT_CODE = 75
"""Exit status after SIGTERM or SIGUSR1: a checkpoint is saved, start the same command again to continue."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a step is computed, and how often the run looks at itself."""

    rows_per_step: int = 32
    """Rows of a global batch, over all processes and micro-batches."""
    micro_batch_rows: int = 32
    """Rows in one forward pass of one process; accumulation follows."""
    precision: Precision = "auto"
    """Of weights and activations; master weights, accumulation and reduction are fp32. auto: bf16 where the hardware
    multiplies in it, fp32 elsewhere (a CPU without AVX-512-BF16 or AMX does bf16 hundreds of times slower)."""
    ema_decay: float | None = 0.999
    """Decay of the average of the weights, warmed up from 0.1; None keeps no average."""
    compile: bool = False
    """torch.compile the module; ignored under ZeRO-3 and without a C++ compiler."""
    validation_every_steps: int = 0
    """Steps between validations, each with previews; 0 validates only at the end."""
    validation_batches: int = 1
    """Validation batches of rows_per_step rows, the same ones each time; 0 never validates."""
    keep_last: int = 2
    """Checkpoints kept."""
    skipped_steps_limit: int = 5
    """Steps in a row with non-finite gradients after which the run stops."""

    def __post_init__(self) -> None:
        if self.rows_per_step < 1 or self.micro_batch_rows < 1 or self.keep_last < 1:
            raise ConfigError("training: rows_per_step, micro_batch_rows and keep_last must be at least 1")
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise ConfigError("training.ema_decay must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run. Launchers extend it by the sections of their recipe."""

    run_dir: str
    """Where the run lives: config.yaml, metrics.jsonl, checkpoints/, samples/."""
    seed: int = 0
    """Of everything random."""
    max_steps: int
    """Optimizer steps of the whole run."""
    save_every_steps: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the newest whole checkpoint of run_dir; never: refuse a run_dir that has one."""
    data: DataConfig
    """Shards and rows."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and schedule."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Batch, precision, EMA, validation."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Console, metrics.jsonl, wandb."""

    def __post_init__(self) -> None:
        if self.max_steps < 1 or self.save_every_steps < 1:
            raise ConfigError("max_steps and save_every_steps must be at least 1")


def train(
    config: RunConfig, recipe: Recipe, deepspeed_config: Path | None = None, dry_run: bool = False
) -> dict[str, float]:
    """Train to `max_steps`, resuming where the run stopped; returns the final validation and recipe figures.

    Every process of the run calls it. Exits with REQUEUE_EXIT_CODE after SIGTERM or SIGUSR1.
    """
    processes = start_processes()
    precision = chosen_precision(config.training.precision, processes)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, precision=precision))
    if dry_run:
        from megatext.training.estimate import dry_run as estimate_and_try

        return estimate_and_try(config, recipe, deepspeed_config, processes)
    trainer = Trainer(config, recipe, deepspeed_config, processes)
    trainer.resume()
    if processes.is_main:
        save_yaml(config, Path(config.run_dir) / "config.yaml")  # now: a refused resume leaves the run's own
    trainer.loop()
    return trainer.finish()


class Trainer:
    """One run on this process. `train` is its whole use."""

    def __init__(self, config: RunConfig, recipe: Recipe, deepspeed_config: Path | None, processes: Processes) -> None:
        self.config, self.recipe, self.processes = config, recipe, processes
        self.run_dir = Path(config.run_dir)
        self.accumulation = accumulation_steps(config, processes.world)
        settings = deepspeed_json(config, deepspeed_config, processes.world)
        self._prepare_run_dir()
        self.logger = Logger(self.run_dir, config.logging, is_main=processes.is_main, resolved=to_dict(config))
        self.stream = TokenStream(config.data, seed=config.seed, rows_per_step=config.training.rows_per_step)
        if recipe.tokenizer_fingerprint not in (None, self.stream.tokenizer_fingerprint):
            raise DataError(
                f"{config.data.shards}: the shards' tokenizer is not the one this model was made for; "
                "shard the corpus with the model's tokenizer"
            )
        self.probe = self.stream.batch(self.stream.plan(0), slice(0, 1))
        self.held_out = self._read_held_out()  # now, so that a split that is too small ends the run at its start
        frozen = [name for name, parameter in recipe.module.named_parameters() if not parameter.requires_grad]
        if frozen:
            raise ConfigError(f"frozen parameters ({frozen[0]}, ...) belong into the recipe, not into its module")

        muon_dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
        optimizer = build_optimizer(recipe.module, config.optimizer, muon_dtype=muon_dtype)
        self._compile_module(settings["zero_optimization"].get("stage", 0))
        self.engine = build_engine(recipe.module, optimizer, settings)
        recipe.to(processes.device)
        self.partitions = partitions.of_engine(self.engine)
        self.optimizer = optimizer
        self.optimizer.bind(self.partitions)
        self.ema = EMA(self.partitions, config.training.ema_decay) if config.training.ema_decay is not None else None
        self.guard = StepGuard(config.training.skipped_steps_limit, self.logger.say)

        self.step, self.sample, self.tokens, self.first_step = 0, 0, 0, 0
        self._stop_signal: int | None = None
        self._print_plan(settings)

    # -- one step ------------------------------------------------------------------------------------------------

    def loop(self) -> None:
        """All steps that are left."""
        config, max_steps = self.config, self.config.max_steps
        self._listen_to_signals()
        meter, clock = Meter(), Clock()
        loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows")
        following = loader.submit(self._load, self.sample)
        window_first = self.step
        while self.step < max_steps:
            batches, next_sample, waited = self._take(following)
            clock.waited_for_data += waited
            if self.step + 1 < max_steps:
                following = loader.submit(self._load, next_sample)
            self.train_step(batches, meter)
            self.sample = next_sample
            step = self.step
            if step % config.logging.log_every_steps == 0 or step == max_steps or step == self.first_step + 1:
                self._log(meter, clock, step - window_first)
                window_first = step
            pause = time.perf_counter()
            every = config.training.validation_every_steps
            if every and step % every == 0 and step < max_steps:
                self.validate()
            if step % config.save_every_steps == 0 and step < max_steps:
                self.save()
            clock.paused += time.perf_counter() - pause
            if self._stop_requested:
                self.save()
                self.logger.say(f"stopped by a signal after step {step}; the same command continues from here")
                raise SystemExit(REQUEUE_EXIT_CODE)
        loader.shutdown()

    def train_step(self, batches: list[TokenBatch], meter: Meter) -> None:
        """One optimizer step on this rank's micro-batches of a global batch. A collective."""
        step, engine = self.step, self.engine
        prepared = [self.recipe.prepare(batch, step=step) for batch in batches]
        counts = self._global_counts(prepared)
        weights = self.recipe.loss_weights(step)
        self.learning_rate = self.optimizer.set_learning_rate(
            learning_rate_share(self.config.optimizer, step, self.config.max_steps)
        )
        # DeepSpeed averages over ranks and micro-batches; the counts are global already, so undo that.
        scale = self.processes.world * len(prepared)
        losses = []
        for item in prepared:
            output = engine(**item.inputs)
            loss = total_loss(output, counts, weights)
            engine.backward(loss * scale)
            engine.step()
            losses.append(loss.detach())
            self._measure(output, counts, meter)
        applied = self.guard.check(engine, step, losses, [item.inputs for item in prepared], batches)
        if applied and self.ema is not None:
            self.ema.update()
        for batch, loss in zip(batches, losses, strict=True):
            meter.add("loss", loss)
            meter.add("tokens", (batch.segment >= 0).sum())
        self.step += 1

    def _global_counts(self, prepared: list[Prepared]) -> dict[str, Tensor]:
        """Elements of each loss term over all ranks and micro-batches, and whether any rank was told to stop."""
        names = sorted(prepared[0].counts)
        own = torch.stack([torch.stack([item.counts[name].double() for item in prepared]).sum() for name in names])
        self._stop_requested = self._stop_signal is not None
        if self.processes.world > 1:
            own = torch.cat([own, own.new_tensor([float(self._stop_requested)])])
            dist.all_reduce(own)
            self._stop_requested = bool(own[-1] > 0)
        return {name: own[index].clamp(min=1.0) for index, name in enumerate(names)}

    @staticmethod
    def _measure(output: Output, counts: dict[str, Tensor], meter: Meter) -> None:
        for name, total in output.loss_sums.items():
            meter.add(f"loss/{name}", total.detach() / counts[name])
        for name, (total, count) in output.metrics.items():
            meter.add(f"metric/{name}", total, count)

    # -- rows ----------------------------------------------------------------------------------------------------

    def _load(self, sample: int) -> tuple[list[TokenBatch], int]:
        """This rank's micro-batches of the step that begins at a sample, and where the next step begins."""
        plan = self.stream.plan(sample)
        return self._micro_batches(self.stream, plan, self.processes.rank), plan.next_sample

    def _micro_batches(self, stream: TokenStream, plan: Any, rank: int) -> list[TokenBatch]:
        size = self.config.training.micro_batch_rows
        first = rank * self.accumulation * size
        return [
            stream.batch(plan, slice(start, start + size))
            for start in range(first, first + self.accumulation * size, size)
        ]

    def _take(self, loading: "Future[tuple[list[TokenBatch], int]]") -> tuple[list[TokenBatch], int, float]:
        started = time.perf_counter()
        batches, next_sample = loading.result()
        waited = time.perf_counter() - started
        return [batch.to(self.processes.device) for batch in batches], next_sample, waited

    # -- looking at itself ---------------------------------------------------------------------------------------

    def _log(self, meter: Meter, clock: Clock, steps: int) -> None:
        figures: dict[str, float | int] = {}
        read = meter.read()
        tokens = int(read.pop("tokens"))
        self.tokens += tokens
        timing = clock.timing(self.config.max_steps - self.step, steps)
        for name, value in read.items():
            if name == "loss" or name.startswith("loss/"):
                figures[name] = value / steps
            else:
                figures[name.removeprefix("metric/")] = value
        norm = self.engine.get_global_grad_norm()
        figures |= {
            "learning_rate": self.learning_rate,
            "grad_norm": float(norm) if norm is not None else math.nan,
            "tokens_per_second": tokens / (timing["seconds_per_step"] * steps),
            **timing,
            "memory_gib": memory_gib(self.processes.device),
            "skipped_steps": self.guard.skipped,
            "tokens": self.tokens,
            "samples": self.sample,
            "epoch": self.sample / self.stream.samples_per_epoch,
        }
        peak = peak_tflops(self.processes.device)
        if peak is not None:
            # 6 FLOPs a parameter and token; attention and recomputation are not counted.
            flops = 6 * self.parameters * float(figures["tokens_per_second"]) / self.processes.world
            figures["mfu"] = flops / (peak * 1e12)
        self.logger.record(self.step, figures)
        terms = sorted(name.removeprefix("loss/") for name in figures if name.startswith("loss/"))
        self.logger.say(console_line(self.step, self.config.max_steps, figures, terms))
        clock.start_window()

    def validate(self) -> dict[str, float]:
        """Loss on fixed rows with fixed noise, by the raw and by the averaged weights, and previews. A collective."""
        figures: dict[str, float | int] = {}
        batches = [batch.to(self.processes.device) for batch in self.held_out[self.processes.rank]]
        if batches:
            figures |= {f"validation/{name}": value for name, value in self._evaluate(batches).items()}
        if self.ema is not None:
            with self.ema.swapped():
                if batches:
                    figures |= {f"validation_ema/{name}": value for name, value in self._evaluate(batches).items()}
                self._preview()
        else:
            self._preview()
        if figures:
            self.logger.record(self.step, figures)
            losses = [f"{name} {value:.4f}" for name, value in figures.items() if name.endswith("/loss")]
            self.logger.say(f"step {self.step:>{len(str(self.config.max_steps))}} | " + " | ".join(losses))
        return figures

    def _read_held_out(self) -> list[list[TokenBatch]]:
        """Every rank's part of the validation batches, on the CPU: a validation is split over the ranks, what a recipe
        measures at the end is measured by all of them on all rows, or the ranks would export different figures."""
        held_out: list[list[TokenBatch]] = [[] for _ in range(self.processes.world)]
        if self.config.training.validation_batches:
            data = dataclasses.replace(self.config.data, split="validation")
            stream = TokenStream(data, seed=0, rows_per_step=self.config.training.rows_per_step)
            sample = 0
            for _ in range(self.config.training.validation_batches):
                plan = stream.plan(sample)
                for rank, part in enumerate(held_out):
                    part += self._micro_batches(stream, plan, rank)
                sample = plan.next_sample
        return held_out

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """No gradients, evaluation mode, and uncompiled: compiling it once more would cost more than it saves."""
        module = self.recipe.module
        compiled, module._compiled_call_impl = module._compiled_call_impl, None
        self.engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.engine.train()
            module._compiled_call_impl = compiled

    def _evaluate(self, batches: list[TokenBatch]) -> dict[str, float]:
        """Mean loss terms, their weighted total and metrics over batches that are split over the ranks."""
        meter = Meter()
        with self._evaluating():
            for batch in batches:
                item = self.recipe.prepare(batch, step=self.step, purpose="validation")
                output = self.engine(**item.inputs)
                for name, total in output.loss_sums.items():
                    meter.add(f"loss/{name}", total, item.counts[name])
                for name, (total, count) in output.metrics.items():
                    meter.add(name, total, count)
        figures = meter.read()
        weights = self.recipe.loss_weights(self.step)
        figures["loss"] = sum(weights[name] * figures.get(f"loss/{name}", 0.0) for name in weights)
        return figures

    def _preview(self) -> None:
        with self._evaluating():
            texts = self.recipe.preview(self.config.seed)
        if texts and self.processes.is_main:
            folder = self.run_dir / "samples"
            folder.mkdir(exist_ok=True)
            (folder / f"step-{self.step:08d}.txt").write_text("\n\n----\n\n".join(texts) + "\n", encoding="utf-8")

    # -- saving and resuming -------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint of this step. A collective."""
        path = checkpoint.checkpoint_path(self.run_dir, self.step)
        flat: dict[str, list[Tensor | None]] = {"master": list(self.partitions.masters)}
        if self.ema is not None:
            flat["ema"] = list(self.ema.values)
        states = [self.optimizer.state.get(part.stepped, {}) for part in self.partitions.parts]
        for key in sorted({key for state in states for key in state if key != "step"}):
            flat[key] = [state[key].view(-1) if key in state else None for state in states]
        steps = [int(state["step"]) for state in states if "step" in state]
        scalars = {
            "step": self.step,
            "sample": self.sample,
            "tokens": self.tokens,
            "adam_step": max(steps, default=0),
            "ema_updates": self.ema.updates if self.ema is not None else 0,
            "skipped_steps": self.guard.skipped,
        }
        names = dict(self.recipe.module.named_parameters())
        tied = {
            alias: next(name for name, other in names.items() if other is parameter)
            for alias, parameter in self.recipe.module.named_parameters(remove_duplicate=False)
            if alias not in names
        }
        meta = {
            **scalars,
            "config_class": type(self.config).__name__,
            "config": to_dict(self.config),
            "tokenizer_fingerprint": self.stream.tokenizer_fingerprint,
            "built_on": dict(self.recipe.built_on),
            "tied": tied,
            "probe_loss": self._probe_loss(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "deepspeed": _deepspeed_version(),
            },
        }
        checkpoint.save(path, self.partitions, flat, scalars, self._buffers(), meta)
        if self.processes.is_main:
            checkpoint.prune(self.run_dir, self.config.training.keep_last)
        return path

    def resume(self) -> None:
        """Continue from the newest whole checkpoint, if there is one. A collective."""
        candidates = checkpoint.list_checkpoints(self.run_dir)
        if candidates and self.config.resume == "never":
            raise ConfigError(
                f"{self.run_dir} holds a run already; set resume: auto to continue it, or another run_dir"
            )
        for path in reversed(candidates):
            try:
                problem = None
                checkpoint.verify(path, lambda index: index % self.processes.world == self.processes.rank)
            except checkpoint.DamagedCheckpoint as error:
                problem = str(error)
            problems: list[Any] = [None] * self.processes.world
            dist.all_gather_object(problems, problem)
            if not any(problems):
                self._load_checkpoint(path)
                return
            self.logger.say(f"warning: {next(filter(None, problems))}; trying the checkpoint before it")
        if candidates:
            raise ConfigError(
                f"every checkpoint in {self.run_dir / 'checkpoints'} is damaged; remove them to start anew"
            )
        self.logger.rewind(0)

    def _load_checkpoint(self, path: Path) -> None:
        reader = checkpoint.Reader(path)
        saved = reader.meta
        self._check_same_model(path, saved)
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
        if self.ema is not None:
            for value, fragments in zip(self.ema.values, own, strict=True):
                reader.read_fragments("ema" if reader.has("ema") else "master", fragments, value)
            self.ema.updates = scalars["ema_updates"]
        for name, buffer in self._buffers().items():
            buffer.copy_(reader.buffers[name])
        self.step, self.sample, self.tokens = scalars["step"], scalars["sample"], scalars["tokens"]
        self.first_step = self.step
        self.guard.skipped = scalars["skipped_steps"]
        self.engine.global_steps = self.step
        self.engine.micro_steps = self.step * self.accumulation
        probe = self._probe_loss()
        if not math.isclose(probe, saved["probe_loss"], rel_tol=2e-2, abs_tol=1e-3):
            raise ConfigError(
                f"{path}: the loss on the probe batch is {probe:.5f}, it was {saved['probe_loss']:.5f} when this was "
                "saved; the checkpoint does not fit this configuration or this code"
            )
        self.logger.rewind(self.step)
        self.logger.say(
            f"resumed from {path} at step {self.step} (probe loss {probe:.5f}, saved {saved['probe_loss']:.5f})"
        )

    def _check_same_model(self, path: Path, saved: dict[str, Any]) -> None:
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
        check_built_on(path, saved.get("built_on", {}), self.recipe.built_on)
        if saved["tokenizer_fingerprint"] != self.stream.tokenizer_fingerprint:
            raise DataError(f"{self.config.data.shards}: these shards have another tokenizer than those of {path}")

    def _buffers(self) -> dict[str, Tensor]:
        persistent = self.recipe.module.state_dict().keys()
        return {name: buffer for name, buffer in self.recipe.module.named_buffers() if name in persistent}

    def _probe_loss(self) -> float:
        """The loss on one small batch that is the same for all ranks and for the whole run. A collective."""
        with self._evaluating():
            item = self.recipe.prepare(self.probe.to(self.processes.device), step=self.step, purpose="validation")
            output = self.engine(**item.inputs)
        counts = {name: count.double().clamp(min=1.0) for name, count in item.counts.items()}
        return float(total_loss(output, counts, self.recipe.loss_weights(self.step)))

    def finish(self) -> dict[str, float]:
        """After the last step: validate, let the recipe measure what its export carries, save. A collective."""
        done = self.run_dir / "finished.json"
        if self.first_step == self.step and done.exists():  # resumed from the end: nothing was done, nothing is new
            finished: dict[str, float] = json.loads(done.read_text(encoding="utf-8"))
            self.logger.say(f"the run is finished: {checkpoint.checkpoint_path(self.run_dir, self.step)}")
            return finished
        figures = self.validate()
        every = [batch.to(self.processes.device) for part in self.held_out for batch in part]
        if every:
            with self.ema.swapped() if self.ema is not None else nullcontext(), self._evaluating():
                measured = self.recipe.finish(every)
            if measured:
                figures |= measured
                self.logger.record(self.step, dict(measured))
                self.logger.say(" | ".join(f"{name} {value:.4f}" for name, value in measured.items()))
        path = self.save()
        if self.processes.is_main:
            done.write_text(json.dumps(figures, indent=1), encoding="utf-8")
        dist.barrier()
        self.logger.say(f"finished after {self.step} steps: {path}")
        self.logger.finish()
        return figures

    # -- starting ------------------------------------------------------------------------------------------------

    def _prepare_run_dir(self) -> None:
        problem = None
        if self.processes.is_main:
            try:
                self.run_dir.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self.run_dir).close()
            except OSError as error:
                problem = f"run_dir {self.run_dir} cannot be written: {error.strerror}"
        problems = [problem]
        dist.broadcast_object_list(problems, src=0)
        if problems[0]:
            raise ConfigError(problems[0])

    def _compile_module(self, stage: int) -> None:
        if not self.config.training.compile:
            return
        on_cpu = self.processes.device.type == "cpu"
        if stage == 3:
            self.logger.say("training.compile: not under ZeRO-3, whose hooks break the graph at every module")
        elif on_cpu and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
            self.logger.say("training.compile: no C++ compiler found, running uncompiled")
        else:
            self.recipe.module.compile(dynamic=False)

    def _listen_to_signals(self) -> None:
        def note(number: int, frame: FrameType | None) -> None:
            self._stop_signal = number

        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, note)

    def _print_plan(self, settings: dict[str, Any]) -> None:
        config, world = self.config, self.processes.world
        self.parameters = sum(math.prod(shape) for shape in self.partitions.shapes.values())
        tokens = config.training.rows_per_step * config.data.row_tokens
        say = self.logger.say
        say(
            f"{self.parameters / 1e6:.2f}M parameters | {world} process(es) on {self.processes.device.type}, "
            f"ZeRO stage {settings['zero_optimization'].get('stage', 0)} | weights {config.training.precision}, "
            "masters, accumulation and reduction fp32"
        )
        say(
            f"{config.training.rows_per_step} rows of {config.data.row_tokens} tokens a step = {world} x "
            f"{self.accumulation} micro-batches x {config.training.micro_batch_rows} rows | {config.max_steps} steps, "
            f"{tokens * config.max_steps / 1e6:.1f}M tokens, {self.stream.tokens_per_epoch / 1e6:.1f}M an epoch"
        )


def total_loss(output: Output, counts: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """sum_k weight_k * sum_k / count_k, this micro-batch's share of the global loss."""
    missing = output.loss_sums.keys() ^ counts.keys()
    if missing:
        raise KeyError(f"loss terms without a count or a sum: {sorted(missing)}")
    terms = [weights[name] * (total / counts[name].to(total.dtype)) for name, total in output.loss_sums.items()]
    return torch.stack(terms).sum()


def check_built_on(checkpoint_path: Path, saved: Mapping[str, str], present: Mapping[str, str]) -> None:
    """Raise ConfigError unless the models that a recipe stands on are those that its checkpoint was trained on."""
    for name, weights in saved.items():
        if present.get(name, weights) != weights:
            raise ConfigError(
                f"{checkpoint_path}: was trained on another {name} than lies there now; put the old one back, or train "
                "anew in another run_dir"
            )


def _deepspeed_version() -> str:
    from importlib.metadata import version

    return version("deepspeed")
