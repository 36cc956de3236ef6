"""Who trains a network: several processes that hold it whole, or by rows of its parameters."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ockham.errors import OckhamError

__all__ = [
    "ALONE",
    "Processes",
    "compare_processes",
    "dividers",
    "finite_gradients",
    "holders",
    "own_rows",
    "rows_here",
    "sharded_as",
    "whole",
]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, eq=False)
class Processes:
    """The processes that train one network together, each on its own part of the data.

    All hold the same weights and draw the same noise; gradients are those of the joined batch, and what is removed is
    decided by process 0. Every method but the properties is to be called by all of them, in the same order.

    Attributes:
        group: torch's process group; None: this process is alone, and nothing is sent.
    """

    group: Any = None

    @staticmethod
    def world() -> Processes:
        """All processes that torch knows of; this one alone where there is no group."""
        return Processes(dist.group.WORLD) if dist.is_available() and dist.is_initialized() else ALONE

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def count(self) -> int:
        """Number of processes."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def gathered(self, values: Tensor) -> Tensor:
        """The values of all processes, of one shape everywhere: [processes, ...], on the device of ``values``."""
        mine = values.detach().to(self._place)
        if self.count == 1:
            return values.detach()[None]
        every = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(every, mine.contiguous(), group=self.group)
        return torch.stack(every).to(values.device)

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all processes, in the type and on the device of ``values``."""
        if self.count == 1:
            return values.detach()
        total = values.detach().to(self._place, copy=True).contiguous()
        dist.all_reduce(total, group=self.group)
        return total.to(values.device)

    def told(self, values: Tensor, by: int = 0) -> Tensor:
        """The values of process ``by``, of the shape and type that ``values`` have here."""
        if self.count == 1:
            return values
        plain = values.to(torch.uint8) if values.dtype is torch.bool else values  # gloo sends no booleans
        sent = plain.detach().to(self._place).contiguous().clone()
        dist.broadcast(sent, group=self.group, group_src=by)
        return sent.to(values)

    def shares(self, costs: Sequence[float]) -> list[int]:
        """Which process does each of several pieces of work: the dearest first, always to the one with least so far."""
        loads, owners = [0.0] * self.count, [0] * len(costs)
        for piece in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owners[piece] = loads.index(min(loads))
            loads[owners[piece]] += costs[piece]
        return owners

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let all processes leave a block or none: what fails in one stops the others, which would wait for it.

        Raises:
            OckhamError: the block failed in other processes; in those their own error.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        failed = self.gathered(torch.tensor(float(failure is not None)))
        if failure is not None:
            raise failure
        if failed.any():
            who = ", ".join(str(rank) for rank in failed.nonzero().flatten().tolist())
            raise OckhamError(f"stopped, since process {who} failed: the message there says why")

    def told_bytes(self, content: bytes, by: int = 0) -> bytes:
        """The bytes of process ``by``, however many there are here."""
        if self.count == 1:
            return content
        size = int(self.told(torch.tensor(len(content)), by))
        mine = torch.zeros(size, dtype=torch.uint8)
        if self.rank == by and size:
            mine = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return self.told(mine, by).numpy().tobytes()

    def own(self, count: int) -> list[int]:
        """The numbers below ``count`` that this process works on, in turn with the others."""
        return list(range(self.rank, count, self.count))

    def joined(self, sums: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """The sums over all processes; a process that has none of a key adds nothing.

        Args:
            sums: sums of this process.
            shapes: shapes of all that any process may have, in the same order everywhere.
        """
        if self.count == 1 or not shapes:
            return dict(sums)
        there = self.summed(torch.tensor([float(k in sums) for k in shapes])).tolist()
        some = next(iter(sums.values()), torch.zeros(0))
        return {
            k: self.summed(sums[k] if k in sums else some.new_zeros(tuple(shape)))
            for (k, shape), n in zip(shapes.items(), there, strict=True)
            if n
        }

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Compare checksums of what all processes should hold alike.

        Raises:
            OckhamError: they differ; the processes that differ from process 0 are named. All processes raise.
        """
        if self.count == 1:
            return
        values = [t.detach().double().nan_to_num(nan=0.5, posinf=0.25, neginf=-0.25) for t in tensors]
        sums = [torch.stack([v.sum() * (i % 97 + 1), v.square().sum()]).cpu() for i, v in enumerate(values)]
        every = self.gathered(torch.stack(sums).sum(0) if sums else torch.zeros(2, dtype=torch.float64))
        apart = [str(rank) for rank, other in enumerate(every) if not torch.equal(other, every[0])]
        if apart:
            several = len(apart) > 1
            raise OckhamError(
                f"the weights of process{'es' if several else ''} {', '.join(apart)} differ from those of process 0: "
                "give all the same starting weights and the same seed= of the optimizer, and let "
                "DistributedDataParallel average the gradients"
            )

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        """Replace floating tensors by their mean over all processes, in place; others are left alone."""
        if self.count > 1:
            for tensor in (t for t in tensors if t.is_floating_point()):
                tensor.copy_(self.gathered(tensor).mean(0))

    @torch.no_grad()
    def join_gradients_(self, parameters: Sequence[Tensor], means: Tensor, terms: float) -> Tensor:
        """Turn gradients of a mean over this process's terms into those of the mean over the terms of all, in place.

        So unequal batches count by their size, and a process that has no batch left takes part with no terms.

        Args:
            parameters: those that are trained, in the same order everywhere; a gradient may be missing.
            means: means over this process's terms, [M], such as the loss.
            terms: their number; 0 where there is no batch.

        Returns:
            The means over the terms of all processes, [M].
        """
        there = torch.tensor([float(p.grad is not None) for p in parameters], dtype=torch.float64)
        own = means.detach().double().cpu() * terms if terms else torch.zeros(len(means), dtype=torch.float64)
        sums = self.gathered(torch.cat([torch.tensor([terms], dtype=torch.float64), own, there])).sum(0)
        total = float(sums[0])
        parts = [torch.zeros_like(p) if p.grad is None or not terms else p.grad.mul(terms / total) for p in parameters]
        for kind in dict.fromkeys(p.dtype for p in parts):  # a set has another order in every process
            some = [p for p in parts if p.dtype == kind]
            flat = torch.cat([p.reshape(-1) for p in some])
            dist.all_reduce(flat, group=self.group)
            for part, values in zip(some, flat.split([p.numel() for p in some]), strict=True):
                part.copy_(values.view(part.shape))
        for p, part, holders in zip(parameters, parts, sums[1 + len(means) :].tolist(), strict=True):
            p.grad = part if holders else None
        return (sums[1 : 1 + len(means)] / total).to(means)

    def padded(self, batches: Iterable[_T], steps: int) -> Iterator[_T | None]:
        """This process's batches, then None, until all processes have made ``steps`` steps.

        Raises:
            OckhamError: there are several processes and here are more batches than steps.
        """
        count = 0
        for batch in batches:
            if self.count > 1 and count == steps:
                raise OckhamError(f"the loader of process {self.rank} yields more batches than its length, {steps}")
            count += 1
            yield batch
        if self.count > 1:
            yield from (None for _ in range(steps - count))

    @property
    def _place(self) -> torch.device:
        nccl = self.group is not None and dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


ALONE = Processes()
"""This process, with nobody beside it."""


def holders(parameter: Tensor) -> Processes:
    """The processes among which `fully_shard` has divided the rows of a parameter; this one alone for any other."""
    return Processes(parameter.device_mesh.get_group()) if hasattr(parameter, "device_mesh") else ALONE


def rows_here(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor (a DTensor) that this process holds, in its memory; any other tensor itself."""
    if type(tensor) in _PLAIN or not hasattr(tensor, "device_mesh"):  # a step asks dozens of times
        return tensor
    with torch.no_grad():
        rows: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return rows


_PLAIN = (Tensor, nn.Parameter)


def own_rows(parameter: Tensor, whole: Tensor) -> Tensor:
    """This process's rows of a tensor shaped like a parameter, or broadcastable to it."""
    if not hasattr(parameter, "device_mesh") or hasattr(whole, "device_mesh"):
        return rows_here(whole)
    if whole.ndim < parameter.ndim or len(whole) != len(parameter):
        return whole
    from torch.distributed.tensor import distribute_tensor

    placed = whole.detach().to(parameter.device_mesh.device_type)
    return rows_here(distribute_tensor(placed, parameter.device_mesh, parameter.placements, src_data_rank=None))  # type: ignore[attr-defined]


def sharded_as(parameter: Tensor, rows: Tensor) -> Tensor:
    """The sharded tensor of a parameter's shape of which this process holds these rows; or the rows."""
    if not hasattr(parameter, "device_mesh"):
        return rows
    from torch.distributed.tensor import DTensor

    mesh, places = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    stride = torch.empty(parameter.shape, device="meta").stride()
    return DTensor.from_local(rows.contiguous(), mesh, places, run_check=False, shape=parameter.shape, stride=stride)


def whole(tensor: Tensor) -> Tensor:
    """All rows of a sharded tensor, on the CPU; any other tensor itself."""
    if not hasattr(tensor, "device_mesh"):
        return tensor
    plain = tensor.to(torch.uint8) if tensor.dtype is torch.bool else tensor  # gloo sends no booleans
    gathered: Tensor = plain.full_tensor()  # type: ignore[attr-defined]
    return gathered.to("cpu", tensor.dtype)


def compare_processes(parameters: Sequence[Tensor], numbers: Mapping[str, float]) -> None:
    """Where several processes train the parameters together, compare what must be alike in all of them.

    Under `DistributedDataParallel` gradients are averaged and nothing else, under `fully_shard` each process steps on
    its own rows: from another seed or other weights each would go its own way without a word.

    Args:
        parameters: those of this process; their means, outside of a draw.
        numbers: what else must be alike, by name.

    Raises:
        OckhamError: they differ; in all processes, naming the values of two.
    """
    if not parameters or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    wrapper, first, every = nn.parallel.DistributedDataParallel, parameters[0], dict(numbers)
    processes = holders(first)
    if processes is ALONE:
        everything = (o for o in gc.get_objects() if issubclass(type(o), wrapper))  # torch keeps no list of them
        group = next((w.process_group for w in everything if any(p is first for p in w.parameters())), None)
        if group is None:
            return
        processes = Processes(group)
        sums = [t.detach().double().sum() * (i % 97 + 1) for i, t in enumerate(parameters)]
        every["sum of the weights"] = float(torch.stack(sums).sum())
    theirs = processes.gathered(torch.tensor(list(every.values()), dtype=torch.float64)).tolist()
    for rank, other in enumerate(theirs):
        for name, zero, value in zip(every, theirs[0], other, strict=True):
            if zero != value:
                raise OckhamError(
                    f"processes that train one network together differ in {name}: process 0 has "
                    f"{zero:.17g}, process {rank} {value:.17g}. Give the optimizer the same seed=, n_data= (of the "
                    "data of all) and starting weights in every process"
                )


def dividers(parameters: Iterable[Tensor]) -> list[Any]:
    """The modules whose parameters, these among them, `fully_shard` has divided."""
    from torch.distributed.fsdp import FSDPModule

    wanted = set(parameters)
    modules = [o for o in gc.get_objects() if issubclass(type(o), FSDPModule)]  # torch keeps no list of them
    return [m for m in modules if any(p in wanted for p in m.parameters())]


def _squares(gradients: Collection[Tensor]) -> Tensor:
    """Sum of the squares of all, not finite where one is not; a product with itself is the fastest read on a CPU."""
    flat = [g.detach().reshape(-1) for g in gradients]
    found = [torch.dot(g, g) if g.dtype in _DOT and g.is_contiguous() else g.norm() for g in flat if g.numel()]
    return torch.stack([f.to(flat[0].device, torch.float32) for f in found]).sum() if found else torch.zeros(())


_DOT = (torch.float32, torch.float64)


def finite_gradients(parameters: Mapping[str, Tensor], *, skip: bool) -> bool:
    """Whether the gradients of named parameters are finite numbers in all processes that hold them together.

    One sum of squares over all gradients costs a read of them; only where it overflows each is looked at.

    Args:
        parameters: those that have a gradient.
        skip: whether the answer may be no; else that is an error.

    Raises:
        OckhamError: a gradient is sparse, or, unless ``skip``, NaN or infinite; says whose.
    """
    found = {name: rows_here(p.grad) for name, p in parameters.items() if p.grad is not None}
    for name, grad in found.items():
        if grad.is_sparse:
            raise OckhamError(f"parameter {name!r} has a sparse gradient; build its Embedding with sparse=False")
    processes = holders(next(iter(parameters.values()), torch.empty(0)))
    if not processes.summed((~_squares(found.values()).isfinite()).double()):
        return True
    counts = processes.summed(torch.stack([(~g.isfinite()).sum() for g in found.values()])).tolist()
    bad = {name: int(count) for name, count in zip(found, counts, strict=True) if count}
    if bad and not skip:
        first = next(iter(bad))
        raise OckhamError(
            f"the gradient of {first!r} is NaN or infinite in {bad[first]} of {parameters[first].numel()} places"
            f"{f' (so are those of {len(bad) - 1} more parameters)' if len(bad) > 1 else ''}; nothing was updated. "
            "Look for NaN in the data, lower lr, or set optimizer.skip_nonfinite = True to leave such steps out"
        )
    return not bad
