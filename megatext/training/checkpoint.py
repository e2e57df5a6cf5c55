"""Checkpoints: complete or absent, readable without DeepSpeed, resumable on any number of ranks and any ZeRO stage.

A checkpoint is the directory `checkpoints/step-00001000` with

    rank-00000.pt ...   each rank's fragments of every tensor that is laid out like the master weights: the weights
                        themselves, EMA, optimizer state; plain tensors and numbers (torch.load weights_only)
    buffers.pt          the module's persistent buffers, counters, and the probe batch
    meta.json           step, next sample, the resolved configuration, versions, the loss on the probe batch
    COMPLETE            sizes and checksums of the files above

It is written under a temporary name and renamed when it is whole. Because every fragment says which part of which
parameter it is, a run on other ranks reads just the parts that it now owns.
"""

import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatext.config import ConfigError
from megatext.data import DataError
from megatext.training.partitions import Fragment, Partitions

FORMAT_VERSION = 2
_NAME = re.compile(r"step-(\d{8})$")


class DamagedCheckpoint(Exception):
    """A checkpoint's files are missing or changed since it was written."""


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint's name tells."""
    found = _NAME.match(path.name)
    assert found is not None
    return int(found[1])


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints of a run, oldest first, whole or damaged. Unfinished ones are not listed."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step-*") if _NAME.match(path.name))


def verify(path: Path, files: Callable[[int], bool] = lambda index: True) -> None:
    """Check sizes and checksums of (a selection of) the files. Raises DamagedCheckpoint naming the file."""
    try:
        listed = dict(json.loads((path / "COMPLETE").read_text(encoding="utf-8"))["files"])
        ranks = json.loads((path / "meta.json").read_text(encoding="utf-8"))["world_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path}: COMPLETE or meta.json cannot be read ({error})") from None
    wanted = {"buffers.pt", "meta.json", *(f"rank-{rank:05d}.pt" for rank in range(ranks))}
    if listed.keys() != wanted:
        name = min(listed.keys() ^ wanted)
        raise DamagedCheckpoint(f"{path / 'COMPLETE'} is not this checkpoint's: {name} is in one of them only")
    for index, (name, expected) in enumerate(sorted(listed.items())):
        if files(index) and (not (path / name).is_file() or _fingerprint(path / name) != expected):
            raise DamagedCheckpoint(f"{path / name} is missing or was changed after it was written")


def newest_whole(run_dir: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files all ranks find whole; None where there is no checkpoint. A collective.

    The ranks share the reading. `say` is told of damaged ones; where all are damaged, raises ConfigError.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    listed = [list_checkpoints(run_dir)]  # rank 0's: a network disk may show others an older state
    dist.broadcast_object_list(listed, src=0)
    candidates = listed[0]
    for path in reversed(candidates):
        problem = None
        try:
            verify(path, lambda index: index % world == rank)
        except DamagedCheckpoint as error:
            problem = str(error)
        problems: list[Any] = [None] * world
        dist.all_gather_object(problems, problem)
        if not any(problems):
            return path
        say(f"warning: {next(filter(None, problems))}; trying the checkpoint before it")
    if candidates:
        raise ConfigError(f"every checkpoint in {run_dir / 'checkpoints'} is damaged; remove them to start anew")
    return None


def _fingerprint(path: Path) -> dict[str, int]:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return {"bytes": path.stat().st_size, "crc32": crc}


@dataclass
class Content:
    """What one rank writes: tensors of its own on the CPU, so that training may go on meanwhile."""

    part: dict[str, Any]
    """This rank's fragments, and its flat tensors laid out like the master weights."""
    rest: dict[str, Any]
    """Buffers, scalars and the probe batch, alike on all ranks."""
    meta: dict[str, Any]
    """What meta.json will hold."""

    @property
    def bytes(self) -> int:
        """Size of this rank's tensors."""
        flat = [tensor for tensors in self.part["flat"].values() for tensor in tensors if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in flat)


def snapshot(
    partitions: Partitions,
    flat: dict[str, list[Tensor | None]],
    scalars: dict[str, Any],
    buffers: dict[str, Tensor],
    probe: dict[str, Any],
    meta: dict[str, Any],
) -> Content:
    """Copy a run's state to the CPU.

    `flat`: named lists of tensors, one for each partition and laid out like its master ("master", "ema_0.999",
    "exp_avg", ...); None where a partition has no such tensor. `scalars`, `buffers` and the `probe` batch must be
    alike on all ranks.
    """
    rank = partitions.rank
    fragments = {
        f.name: (f.start, f.length, index, f.offset)
        for index, part in enumerate(partitions.parts)
        for f in part.fragments[rank]
    }
    copies = {
        key: [
            _copy(tensor) if tensor is not None and part.fragments[rank] else None
            for tensor, part in zip(tensors, partitions.parts, strict=True)
        ]
        for key, tensors in flat.items()
    }
    copied = {name: _copy(buffer) for name, buffer in buffers.items()}
    rest = {"buffers": copied, "scalars": scalars, "probe": probe}
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()  # the copies are under way
    shapes = {name: list(shape) for name, shape in partitions.shapes.items()}
    identity = {"format_version": FORMAT_VERSION, "world_size": dist.get_world_size()}
    return Content({"fragments": fragments, "flat": copies}, rest, identity | meta | {"shapes": shapes})


def _copy(tensor: Tensor) -> Tensor:
    """On the CPU, never the same memory; from a GPU through pinned memory and not waited for."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor.detach(), non_blocking=True)


class Saver:
    """Writes a run's checkpoints, one at a time, in a thread beside the training.

    Every rank makes one, and calls its methods in the same order. The ranks agree on a checkpoint in a process group of
    its own, so that their other collectives are not disturbed.
    """

    def __init__(self, *, say: Callable[[str], None], beat: Callable[[str], None]) -> None:
        """`beat` is called while a write is waited for."""
        self.say, self.beat = say, beat
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, path: Path, content: Content, done: Callable[[float], None], *, wait: bool) -> None:
        """Write a checkpoint, after `wait()`; rank 0 calls `done` with the seconds it took. A collective.

        A write that is not waited for and fails is a warning. Raises DataError, on every rank, where one that is waited
        for fails.
        """
        self._writing = self._thread.submit(self._write, path, content, done)
        if wait and (error := self.wait()) is not None:
            raise DataError(f"{error}; free the disk and start the same command again: it continues from the last one")

    def wait(self) -> DataError | None:
        """Until nothing is being written any more; what the last write failed of. A collective."""
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        while not writing.done():
            self.beat("the writing of a checkpoint")
            futures.wait([writing], timeout=5.0)
        error = writing.exception()
        if error is not None and not isinstance(error, DataError):
            raise error
        return error

    def _write(self, path: Path, content: Content, done: Callable[[float], None]) -> None:
        started = time.perf_counter()
        try:
            write(path, content, self._group)
        except DataError as error:
            self.say(f"warning: {error}")  # now: who waits for it may do so much later
            raise
        if dist.get_rank() == 0:
            done(time.perf_counter() - started)


def write(path: Path, content: Content, group: dist.ProcessGroup) -> None:
    """Write a checkpoint. A collective of `group`. Raises DataError, on every rank, where the disk refuses."""
    rank = dist.get_rank()
    work = path.with_name(f".unfinished-{path.name}")
    files: dict[str, dict[str, int]] = {}
    sizes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, content.bytes, group=group)

    def begin() -> None:
        if rank == 0:
            for abandoned in path.parent.glob(".unfinished-*"):
                shutil.rmtree(abandoned, ignore_errors=True)
            work.mkdir(parents=True)
            needed, free = sum(sizes), shutil.disk_usage(work).free
            if needed > free:
                raise OSError(f"it takes {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free")

    def write_own() -> None:
        name = f"rank-{rank:05d}.pt"
        torch.save(content.part, work / name)
        files[name] = _fingerprint(work / name)
        if rank == 0:
            torch.save(content.rest, work / "buffers.pt")
            (work / "meta.json").write_text(json.dumps(content.meta, indent=1), encoding="utf-8")
            files.update({name: _fingerprint(work / name) for name in ("buffers.pt", "meta.json")})

    def commit() -> None:
        if rank == 0:
            (work / "COMPLETE").write_text(json.dumps({"files": every}, indent=1), encoding="utf-8")
            for file in work.iterdir():
                _sync(file)
            replaced = path.with_name(f".unfinished-replaced-{path.name}")
            if path.exists():
                path.rename(replaced)
            work.rename(path)
            shutil.rmtree(replaced, ignore_errors=True)
            _sync(path.parent)

    _together(begin, path, work, group)
    _together(write_own, path, work, group)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, files, group=group)
    every = {name: entry for entries in gathered for name, entry in entries.items()}
    _together(commit, path, work, group)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _together(act: Callable[[], None], path: Path, work: Path, group: dist.ProcessGroup) -> None:
    """Every rank acts; where the disk refuses one of them, all clean up and raise DataError."""
    failure = None
    try:
        act()
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        failure = f"rank {dist.get_rank()}: {error}"
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure, group=group)
    if any(failures):
        if dist.get_rank() == 0:
            shutil.rmtree(work, ignore_errors=True)
        raise DataError(f"the checkpoint {path} could not be written: {next(filter(None, failures))}")


def prune(run_dir: Path, step: int, keep_last: int, keep_every_steps: int) -> None:
    """After the checkpoint of `step`: delete the oldest beyond `keep_last`, but not those of multiples of
    `keep_every_steps` (0: none); and later ones, which a run that went back behind them writes anew. Rank 0 only."""
    found = list_checkpoints(run_dir)
    past = [path for path in found if step_of(path) <= step]
    for path in found:
        kept_for_ever = keep_every_steps and step_of(path) % keep_every_steps == 0
        if path not in past or (path in past[:-keep_last] and not kept_for_ever):
            shutil.rmtree(path, ignore_errors=True)


class Reader:
    """A checkpoint's tensors by parameter name, whoever wrote them. Files are memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta: dict[str, Any] = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        if self.meta["format_version"] != FORMAT_VERSION:
            raise ConfigError(f"{path} has format {self.meta['format_version']}; this version reads {FORMAT_VERSION}")
        rest = torch.load(path / "buffers.pt", map_location="cpu", weights_only=True)
        self.buffers: dict[str, Tensor] = rest["buffers"]
        self.scalars: dict[str, Any] = rest["scalars"]
        self.probe: dict[str, Any] = rest["probe"]
        self.ranks = [
            torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            for file in sorted(path.glob("rank-*.pt"))
        ]

    @property
    def keys(self) -> list[str]:
        """The kinds of tensors that are stored: master, exp_avg, ema_0.999, ..."""
        return sorted(set().union(*(rank["flat"] for rank in self.ranks)))

    def read(self, key: str, name: str, start: int, length: int, out: Tensor) -> None:
        """Copy elements [start, start + length) of parameter `name` of the tensors called `key` into `out`."""
        found = 0
        for rank in self.ranks:
            if name not in rank["fragments"] or key not in rank["flat"]:
                continue
            piece_start, piece_length, index, offset = rank["fragments"][name]
            source = rank["flat"][key][index]
            left, right = max(start, piece_start), min(start + length, piece_start + piece_length)
            if source is not None and left < right:
                out[left - start : right - start] = source[offset + left - piece_start : offset + right - piece_start]
                found += right - left
        if found != length:
            raise DamagedCheckpoint(f"{self.path}: {found} of {length} elements of {name} ({key}) found")

    def read_fragments(self, key: str, fragments: list[Fragment], flat: Tensor) -> None:
        """Fill a rank's flat tensor."""
        for f in fragments:
            self.read(key, f.name, f.start, f.length, flat[f.offset : f.offset + f.length])

    def state_dict(self, key: str) -> dict[str, Tensor]:
        """Whole fp32 parameters and all persistent buffers, as the module's state_dict would name them."""
        state = {name: torch.empty(shape, dtype=torch.float32) for name, shape in self.meta["shapes"].items()}
        for name, tensor in state.items():
            self.read(key, name, 0, tensor.numel(), tensor.view(-1))
        return state | {alias: state[name] for alias, name in self.meta["tied"].items()} | self.buffers
