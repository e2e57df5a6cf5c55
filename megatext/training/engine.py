"""Processes, devices and DeepSpeed: who we are, and a quiet engine."""

import ctypes
import fcntl
import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from megatext.config import ConfigError, to_dict
from megatext.training.optimizer import MuonAdamW

if TYPE_CHECKING:
    from megatext.training.run_config import RunConfig

Precision = Literal["auto", "bf16", "fp32"]
"""Of weights and activations, as `training.precision` names it."""


@dataclass(frozen=True)
class Processes:
    """This process among the others, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_processes() -> Processes:
    """Join the process group; the same under `deepspeed`, `torchrun` and plain `python` (then alone). Idempotent."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _keep_freed_memory()
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, alone)
    if os.environ["WORLD_SIZE"] == "1":  # nobody else has to know it: two runs on a machine do not meet
        os.environ["MASTER_PORT"] = str(_free_port())
    os.environ.setdefault("MASTER_PORT", "29500")
    deepspeed = import_deepspeed()
    # The shared-memory all-reduce for CPU ranks is compiled at first use, which needs ninja, a compiler and half a
    # minute; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ["MASTER_PORT"]
        told = f"port {port} is taken, by another run on this machine? Give one that is free: deepspeed --master_port N"
        raise ConfigError(told) from None
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    return Processes(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def _keep_freed_memory() -> None:
    """Let glibc reuse what large tensors leave. Otherwise it returns their pages to the system, which hands out zeroed
    ones page by page: up to a tenth of a training step on CPU, more in a virtual machine."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes free at the end of the heap before any are returned


def chosen_precision(asked: Precision, processes: Processes) -> Precision:
    """`training.precision` with auto decided: bf16 where the hardware of every process has it. A collective."""
    if asked != "auto":
        return asked
    if processes.device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    found = [False] * processes.world
    torch.distributed.all_gather_object(found, has_bf16)
    return "bf16" if all(found) else "fp32"


@contextmanager
def alone_in(run_dir: Path, processes: Processes) -> Iterator[None]:
    """Keeps a second run out of a directory, as long as this one is in it; the system lets go when rank 0 ends, however
    it ends. Raises ConfigError. A collective."""
    file, problem = None, None
    if processes.is_main:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            file = open(run_dir / "lock", "w")  # noqa: SIM115
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = f"run_dir {run_dir}: another run is at work there; wait for it or stop it"
        except OSError:
            pass  # what cannot be written is told soon; a file system without locks has none
    problems = [problem]
    torch.distributed.broadcast_object_list(problems, src=0)
    try:
        if problems[0]:
            raise ConfigError(problems[0])
        yield
    finally:
        if file is not None:
            file.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_agreement(
    config: "RunConfig", settings: dict[str, Any], order_fingerprint: str, built_on: Mapping[str, str]
) -> None:
    """Raise ConfigError, on every rank, unless all ranks run the same thing. A collective."""
    own = {
        "configuration": to_dict(config),
        "DeepSpeed configuration": settings,
        "data (another copy of the shards?)": order_fingerprint,
        "model to build on": dict(built_on),
        **{f"version of {name}": version(name) for name in ("torch", "deepspeed", "transformers")},
    }
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, own)
    for rank, theirs in enumerate(every):
        for what in own:
            if theirs[what] != every[0][what]:
                differing = _first_difference(every[0][what], theirs[what])
                raise ConfigError(f"rank {rank} has another {what} than rank 0: {differing}")


def _first_difference(a: Any, b: Any, key: str = "") -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        name = next(name for name in [*a, *b] if a.get(name) != b.get(name))
        return _first_difference(a.get(name), b.get(name), f"{key}.{name}".strip("."))
    return f"{key} {b!r} and {a!r}".strip()


def import_deepspeed() -> Any:
    """DeepSpeed, without its start-up chatter. It must be imported after DS_ACCELERATOR is set."""
    deprecated = "all_gather_into|_all_gather_base|reduce_scatter_tensor|_reduce_scatter_base"
    warnings.filterwarnings("ignore", message=rf".*torch\.distributed\.({deprecated}).*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"deepspeed\..*")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"deepspeed\..*")
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"DeepSpeed cannot be imported ({error}); install it with: "
            "DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def accumulation_steps(config: "RunConfig", world: int, *, validation: bool = False) -> int:
    """Micro-batches a rank runs for each step, or for each validation batch. Raises ConfigError where the numbers do
    not divide."""
    training = config.training
    rows, name = training.rows_per_step, "rows_per_step"
    if validation and training.validation_rows is not None:
        rows, name = training.validation_rows, "validation_rows"
    per_pass = world * training.micro_batch_rows
    if rows % per_pass:
        fitting = [n for n in range(1, rows + 1) if rows % (world * n) == 0]
        hint = f"micro_batch_rows could be one of {fitting}" if fitting else f"{name} must be a multiple of {world}"
        raise ConfigError(
            f"training.{name} {rows} is not a multiple of {world} process(es) x "
            f"training.micro_batch_rows {training.micro_batch_rows}; {hint}"
        )
    return rows // per_pass


def build_engine(module: nn.Module, optimizer: MuonAdamW, settings: dict[str, Any]) -> Any:
    """A DeepSpeed engine around `module`. Moves the module to the device and its parameters to their precision.

    Floating-point buffers stay what they were: statistics and rotary tables do not survive bf16.
    """
    deepspeed = import_deepspeed()
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    with _no_stdout_from_deepspeed():
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)
    for name, buffer in engine.module.named_buffers():
        if name in buffers and buffer.dtype != buffers[name].dtype:
            buffer.data = buffers[name].to(buffer.device)
    if engine.zero_optimization_stage() == 0 and engine.world_size == 1:
        engine.enable_backward_allreduce = False  # copies all gradients twice to average them with nobody's
    return engine


class _no_stdout_from_deepspeed:
    """DeepSpeed prints some of its start-up with print(); errors still reach stderr."""

    def __enter__(self) -> None:
        self._stdout = sys.stdout
        sys.stdout = open(os.devnull, "w", encoding="utf-8")

    def __exit__(self, *_: object) -> None:
        sys.stdout.close()
        sys.stdout = self._stdout
