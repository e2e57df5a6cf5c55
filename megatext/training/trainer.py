"""The loop around any recipe: rows -> inputs -> loss -> step -> EMA -> log, validate, save."""

import dataclasses
import json
import math
import os
import re
import shutil
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatext.config import ConfigError, save_yaml, to_dict
from megatext.data import DataError
from megatext.data.packing import TokenBatch
from megatext.data.stream import StepPlan, TokenStream
from megatext.recipes import meta_module
from megatext.recipes.base import Output, Prepared, Recipe
from megatext.training import checkpoint
from megatext.training.deepspeed_json import deepspeed_json
from megatext.training.engine import (
    Processes,
    accumulation_steps,
    alone_in,
    build_engine,
    check_agreement,
    chosen_precision,
    start_processes,
)
from megatext.training.estimate import row_flops
from megatext.training.guards import StepGuard
from megatext.training.memory import StateMeter, group_sizes, persistent_parameters, state_bytes
from megatext.training.metrics import Clock, Logger, Meter, console_line, memory_gib, peak_tflops
from megatext.training.optimizer import build_optimizer
from megatext.training.run_config import RunConfig
from megatext.training.run_state import RunState
from megatext.training.schedule import learning_rate_share
from megatext.training.signals import REQUEUE_EXIT_CODE, StopSignal
from megatext.training.validation import Validation, read_held_out, total_loss
from megatext.training.watchdog import Watchdog


def train(config: RunConfig, recipe: Recipe, deepspeed_config: Path | None = None) -> dict[str, float]:
    """Train to `max_steps`, resuming where the run stopped; returns the final validation and recipe figures.

    Every process of the run calls it. Exits with REQUEUE_EXIT_CODE after SIGTERM or SIGUSR1.
    """
    with StopSignal() as stop:
        processes = start_processes()
        config = with_precision(config, processes)
        with alone_in(Path(config.run_dir), processes):
            trainer = Trainer(config, recipe, deepspeed_config, processes, stop)
            try:
                trainer.resume()
                if processes.is_main:
                    save_yaml(
                        config, Path(config.run_dir) / "config.yaml"
                    )  # now: a refused resume leaves the run's own
                with trainer.watchdog:
                    trainer.loop()
                    return trainer.finish()
            finally:
                trainer.logger.finish()


def with_precision(config: RunConfig, processes: Processes) -> RunConfig:
    """The configuration with `training.precision` decided. A collective."""
    precision = chosen_precision(config.training.precision, processes)
    return dataclasses.replace(config, training=dataclasses.replace(config.training, precision=precision))


def compiled_parts(module: nn.Module) -> list[nn.Module]:
    """Its transformer blocks: alike as they are, one is compiled for all, in seconds where a deep network as a whole
    takes minutes."""
    names = re.compile(r"(^|\.)(blocks|layers)\.\d+$")
    return [part for name, part in module.named_modules() if names.search(name)]


class Trainer:
    """One run on this process. `train` is its whole use."""

    def __init__(
        self,
        config: RunConfig,
        recipe: Recipe,
        deepspeed_config: Path | dict[str, Any] | None,
        processes: Processes,
        stop: StopSignal | None = None,
    ) -> None:
        self.config, self.recipe, self.processes = config, recipe, processes
        self.stop = stop or StopSignal()
        self.run_dir = Path(config.run_dir)
        self.accumulation = accumulation_steps(config, processes.world)
        settings = deepspeed_json(config, deepspeed_config, processes.world)
        self._prepare_run_dir()
        self.logger = Logger(self.run_dir, config.logging, is_main=processes.is_main, resolved=to_dict(config))
        data = config.data if recipe.reads_states else config.data.without_states()
        self.stream = TokenStream(data, seed=config.seed, rows_per_step=config.training.rows_per_step)
        check_agreement(config, settings, self.stream.order_fingerprint, recipe.built_on)
        if recipe.tokenizer_fingerprint not in (None, self.stream.tokenizer_fingerprint):
            raise DataError(
                f"{config.data.shards}: the shards' tokenizer is not the one this model was made for; "
                "shard the corpus with the model's tokenizer"
            )
        # now, so that a split that is too small ends the run at its start
        held_out = read_held_out(config, data, processes.world)
        frozen = [name for name, parameter in recipe.module.named_parameters() if not parameter.requires_grad]
        if frozen:
            raise ConfigError(f"frozen parameters ({frozen[0]}, ...) belong into the recipe, not into its module")

        dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
        self.optimizer = build_optimizer(recipe.module, config.optimizer, muon_dtype=dtype)
        self.stage: int = settings["zero_optimization"].get("stage", 0)
        self.groups = group_sizes(self.optimizer)
        self.persistent = persistent_parameters(recipe.module, settings)
        self._compile_module()
        self.engine = build_engine(recipe.module, self.optimizer, settings)
        recipe.to(processes.device, dtype)
        self.state = RunState(config, recipe, self.engine, self.optimizer, self.stream)
        training, say = config.training, self.logger.say
        self.guard = StepGuard(training.on_non_finite, training.skipped_steps_limit, say, self.state)
        self.watchdog = Watchdog(self.run_dir / "stacks", training.hang_timeout_seconds, processes.rank)
        self.saver = checkpoint.Saver(say=say, beat=self.watchdog.beat)
        self.validation = Validation(recipe, self.engine, self.state.ema, processes, self.watchdog, held_out=held_out)
        self.peak_tflops = peak_tflops(processes.device)
        if self.peak_tflops is not None:
            vocab_size = self.stream.vocab_size
            self.row_flops = row_flops(config, meta_module(config, vocab_size), vocab_size).model
        self.state_meter = StateMeter(self.engine, self.optimizer, self.state.ema.averages.values())
        self.first_step = 0
        self._print_plan()

    # -- one step ------------------------------------------------------------------------------------------------

    def loop(self) -> None:
        """All steps that are left."""
        config, state, max_steps = self.config, self.state, self.config.max_steps
        meter, clock = Meter(), Clock()
        loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows")
        following = loader.submit(self._load, state.sample)
        window_first, window_tokens = state.step, state.tokens
        while state.step < max_steps:
            batches, plan, waited = self._take(following)
            clock.waited_for_data += waited
            if state.step + 1 < max_steps:
                following = loader.submit(self._load, plan.next_sample)
            self.train_step(batches, meter)
            state.sample, state.tokens = plan.next_sample, state.tokens + plan.tokens
            step = state.step
            self.watchdog.beat(f"step {step}")
            if step == self.first_step + 2:  # the first has no optimizer state yet
                self._tell_memory()
            if step % config.logging.log_every_steps == 0 or step == max_steps or step == self.first_step + 1:
                self._log(meter, clock, step - window_first, state.tokens - window_tokens)
                window_first, window_tokens = step, state.tokens
            if self._stop_requested:
                self._leave(f"step {step}")
            pause = time.perf_counter()
            every = config.training.validation_every_steps
            if every and step % every == 0 and step < max_steps:
                self.validate()
            if step % config.save_every_steps == 0 and step < max_steps:
                self.save()
            clock.paused += time.perf_counter() - pause
        loader.shutdown()

    def _leave(self, after: str) -> None:
        """Save, and exit so that the run is queued again. A collective."""
        self.save(wait=True)
        self.logger.say(f"stopped by a signal after {after}; the same command continues from here")
        self.logger.finish()
        dist.barrier()  # SLURM ends all ranks as soon as one has left
        raise SystemExit(REQUEUE_EXIT_CODE)

    def train_step(self, batches: list[TokenBatch], meter: Meter) -> None:
        """One optimizer step on this rank's micro-batches of a global batch. A collective."""
        state, step, engine = self.state, self.state.step, self.engine
        prepared = [self.recipe.prepare(batch, step=step) for batch in batches]
        counts = self._global_counts(prepared)
        weights = self.recipe.loss_weights(step)
        self.learning_rate = self.optimizer.set_learning_rate(
            learning_rate_share(self.config.optimizer, step - state.skipped_steps, self.config.max_steps)
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
        self._stop_requested = self._votes_to_stop()
        applied = self.guard.check(
            engine,
            step,
            losses,
            [item.inputs for item in prepared],
            batches,
            lambda output: total_loss(output, counts, weights) * scale,
        )
        if applied:
            state.ema.update()
        self.recipe.end_of_step(step, applied)
        for loss in losses:
            meter.add("loss", loss)
        state.step += 1

    def _global_counts(self, prepared: list[Prepared]) -> dict[str, Tensor]:
        """Elements of each loss term over all ranks and micro-batches; also asks whether a rank was told to stop."""
        names = sorted(prepared[0].counts)
        counts = [torch.stack([item.counts[name].double() for item in prepared]).sum() for name in names]
        own = torch.stack([*counts, torch.full_like(counts[0], float(self.stop.received))])
        if self.processes.world > 1:
            dist.all_reduce(own)
        self._votes = torch.empty((), dtype=own.dtype, pin_memory=own.is_cuda).copy_(own[-1], non_blocking=True)
        if own.is_cuda:
            self._votes_arrived = torch.cuda.Event()
            self._votes_arrived.record()
        return {name: own[index].clamp(min=1.0) for index, name in enumerate(names)}

    def _votes_to_stop(self) -> bool:
        """Whether any rank was told to stop before this step. Asked at the end of the step, when the answer has long
        arrived, so that the host does not wait for the GPU."""
        if self.processes.device.type == "cuda":
            self._votes_arrived.synchronize()
        return bool(self._votes > 0)

    @staticmethod
    def _measure(output: Output, counts: dict[str, Tensor], meter: Meter) -> None:
        for name, total in output.loss_sums.items():
            meter.add(f"loss/{name}", total.detach() / counts[name])
        for name, (total, count) in output.metrics.items():
            meter.add(f"metric/{name}", total, count)

    # -- rows ----------------------------------------------------------------------------------------------------

    def _load(self, sample: int) -> tuple[list[TokenBatch], StepPlan]:
        """This rank's micro-batches of the step that begins at a sample, and the plan of the whole step."""
        plan = self.stream.plan(sample)
        rows = self.config.training.micro_batch_rows
        batches = self.stream.micro_batches(plan, self.processes.rank, self.accumulation, rows)
        if self.processes.device.type == "cuda":
            batches = [batch.pinned() for batch in batches]
        return batches, plan

    def _take(self, loading: "Future[tuple[list[TokenBatch], StepPlan]]") -> tuple[list[TokenBatch], StepPlan, float]:
        started = time.perf_counter()
        batches, plan = loading.result()
        waited = time.perf_counter() - started
        return [batch.to(self.processes.device) for batch in batches], plan, waited

    # -- looking at itself ---------------------------------------------------------------------------------------

    def _log(self, meter: Meter, clock: Clock, steps: int, tokens: int) -> None:
        state, figures = self.state, dict[str, float | int]()
        read = meter.read()
        timing = clock.timing(self.config.max_steps - state.step, steps)
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
            "skipped_steps": state.skipped_steps,
            "tokens": state.tokens,
            "samples": state.sample,
            "epoch": max(self.stream.epochs(state.sample)),
        }
        if self.peak_tflops is not None:
            flops = self.row_flops * self.config.training.rows_per_step / self.processes.world
            figures["mfu"] = flops / timing["seconds_per_step"] / (self.peak_tflops * 1e12)
        self.logger.record(state.step, figures)
        terms = sorted(name.removeprefix("loss/") for name in figures if name.startswith("loss/"))
        self.logger.say(console_line(state.step, self.config.max_steps, figures, terms))
        for warning in self.recipe.warnings(figures):
            self.logger.say(f"warning: {warning}")
        clock.start_window()

    def validate(self) -> dict[str, float]:
        """Losses on the held-out rows, and previews. A collective."""
        step = self.state.step
        figures = self.validation.losses(step)
        self.validation.preview(self.run_dir / "samples" / f"step-{step:08d}.txt", self.config.seed)
        if figures:
            self.logger.record(step, dict(figures))
            losses = [f"{name} {value:.4f}" for name, value in figures.items() if name.endswith("/loss")]
            self.logger.say(f"step {step:>{len(str(self.config.max_steps))}} | " + " | ".join(losses))
        return figures

    # -- saving and resuming -------------------------------------------------------------------------------------

    def save(self, *, wait: bool = False) -> Path:
        """Write a checkpoint of this step, beside the training unless told to wait. A collective."""
        started, step, training = time.perf_counter(), self.state.step, self.config.training
        path = checkpoint.checkpoint_path(self.run_dir, step)
        wait = self.saver.wait() is not None or wait or not training.async_save  # after a failure: until it is written
        content = self.state.snapshot(self.validation.probe_loss(self.state.probe, step))
        stalled = time.perf_counter() - started

        def done(seconds: float) -> None:
            checkpoint.prune(self.run_dir, step, training.keep_last, training.keep_every_steps)
            size = f"{content.bytes / 2**20:.1f} MiB" + (" a rank" if self.processes.world > 1 else "")
            stood = stalled + (seconds if wait else 0.0)
            self.logger.say(f"step {step} | saved {size} in {seconds:.2f} s, training stood still for {stood:.2f} s")

        self.saver.save(path, content, done, wait=wait)
        self.logger.record(step, {"save_stall_seconds": time.perf_counter() - started})
        self.watchdog.beat(f"the checkpoint of step {step}")
        return path

    def resume(self) -> None:
        """Continue from the newest whole checkpoint, if there is one. A collective."""
        path = checkpoint.newest_whole(self.run_dir, self.logger.say)
        if path is None:
            self.logger.rewind(0)
            return
        if self.config.resume == "never":
            raise ConfigError(
                f"{self.run_dir} holds a run already; set resume: auto to continue it, or another run_dir"
            )
        meta = self.state.read(path)
        saved = float(meta["probe_loss"])
        step = self.first_step = self.state.step
        self.engine.global_steps, self.engine.micro_steps = step, step * self.accumulation
        probe = self.validation.probe_loss(self.state.probe, step)
        rounded = "bf16" in (self.config.training.precision, meta["config"]["training"]["precision"])
        if not math.isclose(probe, saved, rel_tol=1e-2 if rounded else 1e-4):
            raise ConfigError(
                f"{path}: the loss on the probe batch is {probe:.6f}, it was {saved:.6f} when this was "
                "saved; the checkpoint does not fit this configuration or this code"
            )
        self.logger.rewind(step)
        self.logger.say(f"resumed from {path} at step {step} (probe loss {probe:.5f}, saved {saved:.5f})")

    def finish(self) -> dict[str, float]:
        """After the last step: validate, let the recipe measure what its export carries, save. A collective."""
        done, step = self.run_dir / "finished.json", self.state.step
        if self.first_step == step and done.exists():
            finished: dict[str, float] = json.loads(done.read_text(encoding="utf-8"))
            if finished.get("step") == step:  # else it is of a shorter run that was continued
                self.logger.say(f"the run is finished: {checkpoint.checkpoint_path(self.run_dir, step)}")
                return finished
        path = self.save(wait=True)  # before anything that may fail
        self._leave_if_stopped()
        figures = self.validate()
        self._leave_if_stopped()
        if measured := self.validation.finish():
            figures |= measured
            self.logger.record(step, dict(measured))
            self.logger.say(" | ".join(f"{name} {value:.4f}" for name, value in measured.items()))
            path = self.save(wait=True)  # with what was measured in the module's buffers
        if self.processes.is_main:
            done.write_text(json.dumps({"step": step, **figures}, indent=1), encoding="utf-8")
        dist.barrier()
        self.logger.say(f"finished after {step} steps: {path}")
        return figures

    def _leave_if_stopped(self) -> None:
        stopped = torch.tensor(float(self.stop.received), device=self.processes.device)
        dist.all_reduce(stopped)
        if stopped > 0:
            self._leave(f"step {self.state.step}, before the end was measured")

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

    def _compile_module(self) -> None:
        if not self.config.training.compile:
            return
        on_cpu = self.processes.device.type == "cpu"
        if self.stage == 3:
            self.logger.say("training.compile: not under ZeRO-3, whose hooks break the graph at every module")
        elif on_cpu and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
            self.logger.say("training.compile: no C++ compiler found, running uncompiled")
        else:
            parts = compiled_parts(self.recipe.module)
            if not parts:
                self.logger.say('training.compile: the module has no blocks, no list called "blocks" or "layers"')
            for part in parts:
                part.compile(dynamic=False)

    def _tell_memory(self) -> None:
        training, world, measured = self.config.training, self.processes.world, self.state_meter.stop()
        expected, promised = (
            state_bytes(
                self.groups,
                stage=self.stage,
                world=world,
                precision=training.precision,
                averages=len(training.ema_decays),
                persistent=self.persistent,
                promised=promise,
            )
            for promise in (False, True)
        )
        gib = {"state_gib": measured, "state_expected_gib": expected, "state_zero_gib": promised}
        self.logger.record(self.state.step, {name: size / 2**30 for name, size in gib.items()})
        self.logger.say(
            f"weights, gradients, optimizer and averages: {measured / 2**20:.1f} MiB a rank at their peak, "
            f"{expected / 2**20:.1f} expected (ZeRO stage {self.stage} by the paper: {promised / 2**20:.1f})"
        )

    def _print_plan(self) -> None:
        config, world = self.config, self.processes.world
        parameters = sum(n for n, _ in self.groups)
        tokens = config.training.rows_per_step * config.data.row_tokens
        say = self.logger.say
        say(
            f"{parameters / 1e6:.2f}M parameters | {world} process(es) on {self.processes.device.type}, "
            f"ZeRO stage {self.stage} | weights {config.training.precision}, "
            "masters, accumulation and reduction fp32"
        )
        say(
            f"{config.training.rows_per_step} rows of {config.data.row_tokens} tokens a step = {world} x "
            f"{self.accumulation} micro-batches x {config.training.micro_batch_rows} rows | {config.max_steps} steps, "
            f"{tokens * config.max_steps / 1e6:.1f}M tokens, {self.stream.tokens_per_epoch / 1e6:.1f}M an epoch"
        )
        sources = self.stream.sources
        if len(sources) > 1:
            samples = config.max_steps * self.stream.plan(0).next_sample
            for source, epochs in zip(sources, self.stream.epochs(samples), strict=True):
                say(f"{source.name}: {source.tokens / 1e6:.1f}M tokens, read about {epochs:.2f} times")
