"""What a run knows of itself beyond its training loss: held-out rows, previews, and the probe batch."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatext.data.packing import TokenBatch
from megatext.data.stream import DataConfig, TokenStream
from megatext.recipes.base import Output, Recipe
from megatext.training.ema import EMA, ema_key
from megatext.training.engine import Processes, accumulation_steps
from megatext.training.guards import uncompiled
from megatext.training.metrics import Meter
from megatext.training.run_config import RunConfig
from megatext.training.watchdog import Watchdog


def read_held_out(config: RunConfig, data: DataConfig, world: int) -> list[list[TokenBatch]]:
    """Every rank's part of the validation batches of `data`, on the CPU; raises DataError where the split is too small.

    A validation is split over the ranks; what a recipe measures at the end is measured by all of them on all rows, or
    the ranks would export different figures.
    """
    held_out: list[list[TokenBatch]] = [[] for _ in range(world)]
    if config.training.validation_batches:
        accumulation = accumulation_steps(config, world, validation=True)
        rows = accumulation * config.training.micro_batch_rows * world
        stream = TokenStream(dataclasses.replace(data, split="validation"), seed=0, rows_per_step=rows)
        sample = 0
        for _ in range(config.training.validation_batches):
            plan = stream.plan(sample)
            for rank, part in enumerate(held_out):
                part += stream.micro_batches(plan, rank, accumulation, config.training.micro_batch_rows)
            sample = plan.next_sample
    return held_out


class Validation:
    """Evaluates the engine's present weights. Every method is a collective."""

    def __init__(
        self,
        recipe: Recipe,
        engine: Any,
        ema: EMA,
        processes: Processes,
        watchdog: Watchdog,
        *,
        held_out: list[list[TokenBatch]],
    ) -> None:
        self.recipe, self.engine, self.ema, self.processes, self.watchdog = recipe, engine, ema, processes, watchdog
        self.held_out = held_out

    def losses(self, step: int) -> dict[str, float]:
        """Loss terms, their weighted total and metrics on the held-out rows with fixed noise, by the raw weights
        (`validation/...`) and by the averages: the first is `validation_ema/...`, others `validation_ema_0.99/...`."""
        batches = [batch.to(self.processes.device) for batch in self.held_out[self.processes.rank]]
        if not batches:
            return {}
        figures = {f"validation/{name}": value for name, value in self._evaluate(batches, step).items()}
        for number, decay in enumerate(self.ema.averages):
            prefix = f"validation_{ema_key(decay)}" if number else "validation_ema"
            with self.ema.swapped(decay):
                figures |= {f"{prefix}/{name}": value for name, value in self._evaluate(batches, step).items()}
        return figures

    def preview(self, path: Path, seed: int) -> None:
        """Write the recipe's sample texts, by the averaged weights where there are such."""
        with self._averaged(), self._evaluating():
            texts = self.recipe.preview(seed)
        self.watchdog.beat("a preview")
        if texts and self.processes.is_main:
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n\n----\n\n".join(texts) + "\n", encoding="utf-8")

    def finish(self) -> dict[str, float]:
        """What the recipe measures for its export, by the averaged weights where there are such."""
        every = [batch.to(self.processes.device) for part in self.held_out for batch in part]
        if not every:
            return {}
        self.watchdog.beat("what comes before the recipe's measurements")
        with self._averaged(), self._evaluating():
            return self.recipe.finish(every)

    def probe_loss(self, probe: TokenBatch, step: int) -> float:
        """The loss on one small batch, the same for all ranks and for the whole run: equal before a checkpoint is saved
        and after it is loaded."""
        with self._evaluating():
            item = self.recipe.prepare(probe.to(self.processes.device), step=step, purpose="validation")
            output = self.engine(**item.inputs)
        counts = {name: count.double().clamp(min=1.0) for name, count in item.counts.items()}
        return float(total_loss(output, counts, self.recipe.loss_weights(step)))

    def _averaged(self) -> Any:
        return self.ema.swapped(next(iter(self.ema.averages))) if self.ema.averages else nullcontext()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """No gradients, evaluation mode, and uncompiled: compiling it once more would cost more than it saves."""
        self.engine.eval()
        try:
            with uncompiled(self.recipe.module), torch.no_grad():
                yield
        finally:
            self.engine.train()

    def _evaluate(self, batches: list[TokenBatch], step: int) -> dict[str, float]:
        """Mean loss terms, their weighted total and metrics over batches that are split over the ranks."""
        meter = Meter()
        with self._evaluating():
            for batch in batches:
                item = self.recipe.prepare(batch, step=step, purpose="validation")
                output = self.engine(**item.inputs)
                for name, total in output.loss_sums.items():
                    meter.add(f"loss/{name}", total, item.counts[name])
                for name, (total, count) in output.metrics.items():
                    meter.add(name, total, count)
                self.watchdog.beat("a validation batch")
        figures = meter.read()
        weights = self.recipe.loss_weights(step)
        figures["loss"] = sum(weights[name] * figures.get(f"loss/{name}", 0.0) for name in weights)
        return figures


def total_loss(output: Output, counts: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """sum_k weight_k * sum_k / count_k, this micro-batch's share of the global loss."""
    missing = output.loss_sums.keys() ^ counts.keys()
    if missing:
        raise KeyError(f"loss terms without a count or a sum: {sorted(missing)}")
    terms = [weights[name] * (total / counts[name].to(total.dtype)) for name, total in output.loss_sums.items()]
    return torch.stack(terms).sum()
