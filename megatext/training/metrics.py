"""What a run says: one aligned console line a logging step, metrics.jsonl as the record, wandb as a mirror of it.

python -m megatext.training.metrics plot runs/small/vae runs/small/dit --output curves.png
"""

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatext.config import ConfigError, cli_errors
from megatext.training.wandb_mirror import WandbMirror

PEAK_BF16_TFLOPS = {"H200": 989.0, "H100": 989.0, "B200": 2250.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0}
"""Dense bf16 peak by card."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is logged, and where to."""

    log_every_steps: int = 20
    """Steps between two lines; their losses are the mean over the steps between."""
    wandb_project: str | None = None
    """Also log to this project of Weights & Biases; null does not."""
    wandb_group: str | None = None
    """The group there that the run belongs to."""
    wandb_mode: Literal["online", "offline"] | None = None
    """null: what $WANDB_MODE says; without it online where a key is configured, else offline."""

    def __post_init__(self) -> None:
        if self.log_every_steps < 1:
            raise ConfigError("logging.log_every_steps must be at least 1")


class Meter:
    """Sums of losses and metrics on the device; nothing waits for the device until `read`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor, count: Tensor | None = None) -> None:
        """Add to a (sum, count) pair; without `count` to a plain sum over ranks (as a loss already divided by its
        global count)."""
        total = total.detach()
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        if count is not None:
            count = count.detach()
            self._counts[name] = self._counts[name] + count if name in self._counts else count

    def read(self) -> dict[str, float]:
        """Global figures since the last call: sum / count, or the sum where there is no count. A collective.

        A pair whose count is 0 is left out.
        """
        names = sorted(self._sums)
        if not names:
            return {}
        none = torch.tensor(math.nan)
        pairs = torch.stack(
            [torch.stack([self._sums[n].double().cpu(), self._counts.get(n, none).double().cpu()]) for n in names]
        )
        if dist.is_initialized() and dist.get_world_size() > 1:
            device = self._sums[names[0]].device
            pairs = pairs.to(device)
            dist.all_reduce(pairs)
        self._sums.clear()
        self._counts.clear()
        return {
            name: total if math.isnan(count) else total / count
            for name, (total, count) in zip(names, pairs.tolist(), strict=True)
            if count != 0
        }


class Logger:
    """Writes records. Only rank 0's writes anything; the others may call it as well."""

    def __init__(self, run_dir: Path, config: LoggingConfig, *, is_main: bool, resolved: dict[str, Any]) -> None:
        self.is_main = is_main
        self.path = run_dir / "metrics.jsonl"
        self._mirror: WandbMirror | None = None
        if is_main and config.wandb_project:
            self._mirror = WandbMirror(run_dir, config, resolved, self.say)

    def rewind(self, step: int) -> None:
        """Forget records after `step`: a resumed run logs those steps again."""
        if not self.is_main or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError):
                continue  # the line that a killed process was writing
        new = self.path.with_suffix(".new")
        new.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        new.replace(self.path)

    def record(self, step: int, figures: dict[str, float | int]) -> None:
        """Append one object to metrics.jsonl and send it to wandb. What is not finite is written as null."""
        if not self.is_main:
            return
        written = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **written}) + "\n")
        except OSError as error:  # a full disk, which may have room again before the next checkpoint
            self.say(f"warning: {self.path} lacks the record of step {step}: {error.strerror}")
        if self._mirror is not None:
            self._mirror.record(step, figures)

    def say(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)

    def finish(self) -> None:
        if self._mirror is not None:
            self._mirror.finish()


class Clock:
    """Where the time between two log lines went."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.start_window()

    def start_window(self) -> None:
        self.window_started = time.perf_counter()
        self.waited_for_data = 0.0
        self.paused = 0.0

    def timing(self, steps_left: int, window_steps: int) -> dict[str, float]:
        """seconds_per_step, data_wait (a share), elapsed_seconds and eta_seconds, without pauses for validation."""
        window = max(time.perf_counter() - self.window_started - self.paused, 1e-9)
        per_step = window / max(window_steps, 1)
        return {
            "seconds_per_step": per_step,
            "data_wait": self.waited_for_data / window,
            "elapsed_seconds": time.perf_counter() - self.started,
            "eta_seconds": per_step * steps_left,
        }


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process: the accelerator's, or the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def peak_tflops(device: torch.device) -> float | None:
    """Dense bf16 peak of the device in TFLOP/s, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BF16_TFLOPS.items() if key in name), None)


def console_line(step: int, max_steps: int, figures: dict[str, float | int], terms: list[str]) -> str:
    """`step 120/1000 | loss 3.2101 | ...`, columns aligned from line to line."""
    width = len(str(max_steps))
    cells = [f"step {step:>{width}}/{max_steps}", f"loss {figures['loss']:7.4f}"]
    if len(terms) > 1:
        cells.append(" ".join(f"{term} {figures[f'loss/{term}']:.4f}" for term in terms if f"loss/{term}" in figures))
    cells += [
        f"lr {figures['learning_rate']:.2e}",
        f"grad {figures['grad_norm']:6.2f}",
        f"{_short(figures['tokens_per_second']):>6} tok/s",
    ]
    if "mfu" in figures:
        cells.append(f"mfu {100 * figures['mfu']:4.1f}%")
    cells += [
        f"data {100 * figures['data_wait']:4.1f}%",
        f"mem {figures['memory_gib']:5.2f}G",
        f"eta {duration(figures['eta_seconds'])}",
    ]
    if figures.get("skipped_steps"):
        cells.append(f"skipped {figures['skipped_steps']}")
    return " | ".join(cells)


def _short(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """h:mm:ss, with days where there are any."""
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    clock = f"{rest // 3600}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}d {clock}" if days else clock


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl. Raises ConfigError."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; is {run_dir} the run_dir of a run that has logged?")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append({"step": -1} | json.loads(line))
        except ValueError:
            print(f"warning: {path}:{number} is not whole, passed over", file=sys.stderr)
    return records


def main(argv: list[str]) -> None:
    """The command line."""
    from megatext.training.plots import plot

    parser = argparse.ArgumentParser(prog="python -m megatext.training.metrics", description="What runs recorded.")
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "plot", help="curves of one or several runs", description="Draw loss, throughput and latent health of runs."
    )
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    command.add_argument("--output", type=Path, help="PNG to write; by default curves.png in the first run")
    command.add_argument("--smooth", type=float, default=0.0, metavar="DECAY", help="average curves by this decay")
    arguments = parser.parse_args(argv)
    if not 0.0 <= arguments.smooth < 1.0:
        parser.error("--smooth must be at least 0 and below 1")
    output = arguments.output or arguments.runs[0] / "curves.png"
    plot({str(run): read_records(run) for run in arguments.runs}, output, arguments.smooth)
    print(f"{output}")


if __name__ == "__main__":
    with cli_errors():
        main(sys.argv[1:])
