"""Checkpoints: complete or absent, readable without DeepSpeed, resumable on any number of ranks and any ZeRO stage.

A checkpoint is the directory `checkpoints/step-00001000` with

    rank-00000.pt ...   each rank's fragments of every tensor that is laid out like the master weights: the weights
                        themselves, EMA, optimizer state; plain tensors and numbers (torch.load weights_only)
    buffers.pt          the module's persistent buffers
    meta.json           step, next sample, the resolved configuration, versions, the loss on the probe batch
    COMPLETE            sizes and checksums of the files above

It is written under a temporary name and renamed when it is whole. Because every fragment says which part of which
parameter it is, a run on other ranks reads just the parts that it now owns.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatext.config import ConfigError
from megatext.data import DataError
from megatext.training.partitions import Fragment, Partitions

FORMAT_VERSION = 1
_NAME = re.compile(r"step-(\d{8})$")


class DamagedCheckpoint(Exception):
    """A checkpoint's files are missing or changed since it was written."""


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Committed checkpoints of a run, oldest first. Unfinished ones are not listed."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted(path for path in found if _NAME.match(path.name) and (path / "COMPLETE").is_file())


def verify(path: Path, files: Callable[[int], bool] = lambda index: True) -> None:
    """Check sizes and checksums of (a selection of) the files. Raises DamagedCheckpoint naming the file."""
    try:
        listed = json.loads((path / "COMPLETE").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        raise DamagedCheckpoint(f"{path / 'COMPLETE'}: {error}") from None
    for index, (name, expected) in enumerate(sorted(listed.items())):
        if files(index) and (not (path / name).is_file() or _fingerprint(path / name) != expected):
            raise DamagedCheckpoint(f"{path / name} is missing or was changed after it was written")


def newest_whole(run_dir: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files all ranks find whole; None where there is no checkpoint. A collective.

    The ranks share the reading. `say` is told of damaged ones; where all are damaged, raises ConfigError.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    candidates = list_checkpoints(run_dir)
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


def save(
    path: Path,
    partitions: Partitions,
    flat: dict[str, list[Tensor | None]],
    scalars: dict[str, Any],
    buffers: dict[str, Tensor],
    meta: dict[str, Any],
) -> None:
    """Write a checkpoint. Every rank calls it.

    `flat`: named lists of tensors, one for each partition and laid out like its master ("master", "ema", "exp_avg",
    ...); None where a partition has no such tensor. `scalars` must be alike on all ranks.
    Raises DataError, on every rank, where the disk refuses.
    """
    rank = partitions.rank
    work = path.with_name(f".unfinished-{path.name}")
    files: dict[str, dict[str, int]] = {}

    def begin() -> None:
        if rank == 0:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)

    def write() -> None:
        name = f"rank-{rank:05d}.pt"
        torch.save(_own_part(partitions, flat), work / name)
        files[name] = _fingerprint(work / name)
        if rank == 0:
            torch.save({"buffers": buffers, "scalars": scalars}, work / "buffers.pt")
            whole = {"format_version": FORMAT_VERSION, "world_size": dist.get_world_size(), **meta}
            whole["shapes"] = {name: list(shape) for name, shape in partitions.shapes.items()}
            (work / "meta.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
            files.update({name: _fingerprint(work / name) for name in ("buffers.pt", "meta.json")})

    def commit() -> None:
        if rank == 0:
            (work / "COMPLETE").write_text(json.dumps({"files": every}, indent=1), encoding="utf-8")
            for file in work.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            if path.exists():
                shutil.rmtree(path)
            work.rename(path)

    _together(begin, path, work)
    _together(write, path, work)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, files)
    every = {name: entry for entries in gathered for name, entry in entries.items()}
    _together(commit, path, work)


def _own_part(partitions: Partitions, flat: dict[str, list[Tensor | None]]) -> dict[str, Any]:
    """What this rank's file holds: its fragments, and its flat tensors on the CPU."""
    rank = partitions.rank
    return {
        "fragments": {
            f.name: (f.start, f.length, index, f.offset)
            for index, part in enumerate(partitions.parts)
            for f in part.fragments[rank]
        },
        "flat": {
            key: [
                tensor.detach().cpu() if tensor is not None and part.fragments[rank] else None
                for tensor, part in zip(tensors, partitions.parts, strict=True)
            ]
            for key, tensors in flat.items()
        },
    }


def _together(act: Callable[[], None], path: Path, work: Path) -> None:
    """Every rank acts; where the disk refuses one of them, all clean up and raise DataError."""
    failure = None
    try:
        act()
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        failure = f"rank {dist.get_rank()}: {error}"
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    if any(failures):
        if dist.get_rank() == 0:
            shutil.rmtree(work, ignore_errors=True)
        raise DataError(
            f"the checkpoint {path} could not be written: {next(filter(None, failures))}; remove the cause and start "
            "the same command again, it continues from the checkpoint before"
        )


def prune(run_dir: Path, keep_last: int) -> None:
    """Delete the oldest checkpoints beyond `keep_last`, and what killed processes left half-written. Rank 0 only."""
    unfinished = (run_dir / "checkpoints").glob(".unfinished-*")
    for path in (*list_checkpoints(run_dir)[:-keep_last], *unfinished):
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
        self.ranks = [
            torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            for file in sorted(path.glob("rank-*.pt"))
        ]

    def has(self, key: str) -> bool:
        """Whether any parameter has a tensor called `key`."""
        return any(tensor is not None for rank in self.ranks for tensor in rank["flat"].get(key, ()))

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
