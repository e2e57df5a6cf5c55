"""Which part of which parameter lies where in the flat fp32 master weights that DeepSpeed gives each rank.

DeepSpeed keeps master weights in flat tensors whose layout depends on the ZeRO stage. Here that layout becomes
data: a list of fragments (parameter, where in it, where in the flat tensor). On it stand EMA, Muon and checkpoints,
and none of them needs to know the stage or the number of ranks.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatext.config import ConfigError


@dataclass(frozen=True)
class Fragment:
    """`length` elements of the flattened parameter `name` from `start`, at `offset` of a rank's flat tensor."""

    name: str
    start: int
    length: int
    offset: int


@dataclass
class Partition:
    """One flat fp32 tensor of this rank, and the layout of its siblings on all ranks."""

    stepped: Tensor
    """The fp32 tensor that the optimizer steps on, and the key of its state."""
    group: int
    """Which of the optimizer's parameter groups it belongs to."""
    fragments: list[list[Fragment]]
    """For each rank, what its flat tensor holds; elements that no fragment covers are padding."""
    push: Callable[[Tensor], None]
    """Write a flat fp32 tensor, laid out like `master`, into the trained module. A collective."""

    @property
    def master(self) -> Tensor:
        """fp32 `[elements]`, the same memory as `stepped`; as many elements on every rank."""
        return self.stepped.data.view(-1)


class Partitions:
    """All master weights of this rank."""

    def __init__(self, partitions: list[Partition], shapes: dict[str, torch.Size], rank: int, aliased: bool) -> None:
        self.parts = partitions
        self.shapes = shapes
        """Full shape of every trained parameter."""
        self.rank = rank
        self.aliased = aliased
        """True where the masters are the module's own parameters (ZeRO stage 0)."""

    def own_fragments(self) -> list[list[Fragment]]:
        """For each partition, what this rank needs to fill it."""
        return [part.fragments[0 if self.aliased else self.rank] for part in self.parts]

    @property
    def masters(self) -> list[Tensor]:
        return [part.master for part in self.parts]

    @torch.no_grad()
    def push(self, values: Iterable[Tensor]) -> None:
        """Make the trained module compute with `values`, one flat tensor for each partition. A collective."""
        for part, value in zip(self.parts, values, strict=True):
            part.push(value)

    def push_masters(self) -> None:
        """After the masters were written (a checkpoint was read): make the module agree with them. A collective."""
        if not self.aliased:
            self.push(self.masters)


def of_engine(engine: Any) -> Partitions:
    """The partitions of a DeepSpeed engine. Raises ConfigError for layouts that are not supported (NVMe offload)."""
    module: nn.Module = engine.module
    optimizer = engine.optimizer
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    shapes = {n: torch.Size(getattr(p, "ds_shape", p.shape)) for n, p in module.named_parameters() if p.requires_grad}
    rank, world = dist.get_rank(), dist.get_world_size()

    def contiguous(group: int, params: list[nn.Parameter], flat: Tensor, master: Tensor) -> Partition:
        own = flat.narrow(0, rank * master.numel(), master.numel())

        def push(values: Tensor) -> None:
            own.copy_(values)
            if world > 1:
                dist.all_gather_into_tensor(flat, own.clone())

        return Partition(master, group, _contiguous(names, params, master.numel(), world), push)

    kind = type(optimizer).__name__
    if kind == "BF16_Optimizer":
        groups = zip(
            optimizer.bf16_groups, optimizer.bf16_groups_flat, optimizer.fp32_groups_flat_partition, strict=True
        )
        return Partitions([contiguous(i, *group) for i, group in enumerate(groups)], shapes, rank, aliased=False)
    if kind == "DeepSpeedZeroOptimizer":
        groups = zip(
            optimizer.round_robin_bit16_groups,
            optimizer.bit16_groups_flat,
            optimizer.single_partition_of_fp32_groups,
            strict=True,
        )
        return Partitions([contiguous(i, *group) for i, group in enumerate(groups)], shapes, rank, aliased=False)
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        return Partitions(_stage3(optimizer, names, world), shapes, rank, aliased=False)
    if isinstance(optimizer, torch.optim.Optimizer):
        return Partitions(_unpartitioned(optimizer, names, world), shapes, rank, aliased=True)
    raise ConfigError(f"DeepSpeed's {kind} is not supported; use a file of ds_configs/")


def _contiguous(names: dict[int, str], params: list[nn.Parameter], size: int, world: int) -> list[list[Fragment]]:
    """ZeRO 1 and 2: the group's parameters one after another, cut in `world` pieces of `size` elements."""
    fragments: list[list[Fragment]] = [[] for _ in range(world)]
    position = 0
    for parameter in params:
        end = position + parameter.numel()
        for rank in range(position // size, min((end - 1) // size, world - 1) + 1):
            left, right = max(position, rank * size), min(end, (rank + 1) * size)
            if left < right:
                fragments[rank].append(
                    Fragment(names[id(parameter)], left - position, right - left, left - rank * size)
                )
        position = end
    return fragments


def _stage3(optimizer: Any, names: dict[int, str], world: int) -> list[Partition]:
    """ZeRO 3: every parameter cut in `world` pieces; a sub-group's pieces one after another."""
    partitions = []
    for index, params in enumerate(optimizer.fp16_groups):
        low = optimizer.fp16_partitioned_groups_flat[index]
        master = optimizer.fp32_partitioned_groups_flat[index]
        if low is None or master.numel() == 0:
            raise ConfigError("ZeRO-3 with NVMe offload is not supported; offload to cpu instead")
        fragments: list[list[Fragment]] = [[] for _ in range(world)]
        offset = 0
        for parameter in params:
            size = parameter.partition_numel()
            for rank in range(world):
                length = min(size, parameter.ds_numel - rank * size)
                if length > 0:
                    fragments[rank].append(Fragment(names[id(parameter)], rank * size, length, offset))
            offset += size

        def push(values: Tensor, low: Tensor = low, params: list[Any] = params) -> None:
            low.copy_(values)
            persistent = [p for p in params if p.ds_persist]
            if persistent:  # small parameters that ZeRO-3 keeps whole on every rank
                for parameter in persistent:
                    parameter.partition()
                persistent[0].all_gather(persistent)

        partitions.append(Partition(master, optimizer.sub_group_to_group_id[index], fragments, push))
    return partitions


def _unpartitioned(optimizer: torch.optim.Optimizer, names: dict[int, str], world: int) -> list[Partition]:
    """ZeRO 0: the parameters themselves, whole and alike on every rank; rank 0's copy is the one that is saved."""
    partitions = []
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            fragment = Fragment(names[id(parameter)], 0, parameter.numel(), 0)
            fragments = [[fragment]] + [[] for _ in range(world - 1)]

            def push(values: Tensor, parameter: nn.Parameter = parameter) -> None:
                parameter.data.view(-1).copy_(values)

            partitions.append(Partition(parameter, index, fragments, push))
    return partitions
