"""What of a network is there and takes part: training modes, names, what the user fixed, who trains it."""

from __future__ import annotations

import copy
import difflib
import gc
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ockham.errors import OckhamError

__all__ = [
    "ALONE",
    "Entry",
    "Ignore",
    "Processes",
    "check_module",
    "check_network",
    "compare_processes",
    "copied",
    "device_of",
    "dividers",
    "evaluating",
    "finite_gradients",
    "fixed_entries",
    "frozen_modules",
    "holders",
    "ignored",
    "keeping_modes",
    "own_rows",
    "protected_names",
    "rows_here",
    "seeded",
    "sharded_as",
    "train_",
    "unwrapped",
    "whole",
]


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter; the CPU for a network without parameters."""
    check_module(model)
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def check_module(model: Any) -> None:
    """Raise where something else than an instance of `torch.nn.Module` is given as a network.

    Raises:
        OckhamError: says what was got.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type):
        raise OckhamError(
            f"the network must be an instance; got the class {model.__name__}: call it, {model.__name__}(...)"
        )
    raise OckhamError(f"the network must be a torch.nn.Module; got {type(model).__name__}")


def check_network(model: nn.Module, *, meta: bool = False, values: bool = True) -> None:
    """Check that a network can be worked with at all, before anything is done with it.

    Args:
        model: the network, or what was given for one.
        meta: permission for tensors of the device "meta", which have no values.
        values: check of the values too: there are parameters, all are finite, and gradients can be taken.

    Raises:
        OckhamError: it is no `torch.nn.Module`, is TorchScript, lies on the device "meta", waits for its first input
            to know its sizes, has no parameters or such that are not finite, or runs in `torch.inference_mode`; says
            what to do instead.
    """
    check_module(model)
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise OckhamError(
            f"the network is TorchScript ({type(model).__name__}), whose parameters cannot be edited: pass the "
            "nn.Module that it was made from, and script the result"
        )
    states: tuple[tuple[Callable[[Any], bool], str], ...] = (
        (
            nn.parameter.is_lazy,
            "are of Lazy modules and have no sizes yet: call the network once with an example first",
        ),
        (
            lambda t: t.is_meta and not meta,
            "lie on the device 'meta', which holds shapes and no values: load the weights first "
            "(model.to_empty(device=...), then load_state_dict)",
        ),
    )
    for without, way_out in states:
        names = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if without(t)]
        if names:
            raise OckhamError(f"{names[0]!r} and {len(names) - 1} more tensors {way_out}")
    if not values:
        return
    if next(model.parameters(), None) is None:
        packed = [n for n, m in model.named_modules() if "quantized" in type(m).__module__]
        why = f": {packed[0]!r} is quantized; pass the network before that" if packed else ""
        raise OckhamError(f"the model has no parameters{why}")
    for name, p in model.named_parameters():  # one pass without a second tensor; exactly only where it is needed
        if not p.detach().sum().isfinite() and (bad := int((~p.detach().isfinite()).sum())):
            raise OckhamError(f"parameter {name!r} is NaN or infinite in {bad} of {p.numel()} places: load it again")
    if torch.is_inference_mode_enabled():
        raise OckhamError("gradients are needed and torch.inference_mode() is on: leave that block")


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of a network, to be changed at will.

    Args:
        model: the network.
        memo: copies that are made already, by `id` of the original, as `copy.deepcopy` takes them; with them the
            network is not checked.

    Raises:
        OckhamError: it cannot be worked with (see `check_network`), or not be copied.
    """
    if memo is None:
        check_network(model)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever a module of the user's raises
        raise OckhamError(
            f"the network cannot be copied ({type(error).__name__}: {str(error).splitlines()[0]}): it holds something "
            "else than parameters and buffers. After the old torch.nn.utils.weight_norm or spectral_norm, use those of "
            "torch.nn.utils.parametrizations, or take them off (torch.nn.utils.remove_weight_norm)"
        ) from error


def frozen_modules(model: nn.Module) -> set[nn.Module]:
    """Modules that have parameters of which none requires a gradient, and all that is inside them."""
    check_module(model)
    found: set[nn.Module] = set()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            found.update(module.modules())
    return found


def train_(model: nn.Module) -> nn.Module:
    """Training mode, in place, but evaluation mode for what is wholly frozen: its dropout and statistics stay out."""
    model.train()
    for module in frozen_modules(model):
        module.training = False
    return model


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside the block, every module is in its own training or evaluation mode again after it."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode inside the block, every module's own mode again after it.

    Yields:
        The device of the network.
    """
    with keeping_modes(model):
        model.eval()
        yield device_of(model)


@contextmanager
def seeded(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """Global randomness of (seed, epoch) inside the block, the old state after it: torch's, NumPy's and Python's."""
    devices = [device] if device.type == "cuda" else []
    number, others = (seed * 1_000_003 + epoch * 7919 + 17) % 2**63, (random.getstate(), np.random.get_state())
    with torch.random.fork_rng(devices=devices):
        try:
            torch.manual_seed(number)
            random.seed(number)
            np.random.seed(number % 2**32)
            yield
        finally:
            random.setstate(others[0])
            np.random.set_state(others[1])


_PADDED = (nn.Embedding, nn.EmbeddingBag)


def fixed_entries(model: nn.Module) -> dict[str, Tensor]:
    """Which weights the network itself never trains, as boolean masks (True = fixed).

    Fixed are the row ``padding_idx`` of `torch.nn.Embedding` and `torch.nn.EmbeddingBag`, and the entries where a mask
    of `torch.nn.utils.prune` is zero: a buffer ``<name>_mask`` beside the parameter ``<name>_orig``. A buffer
    ``<name>_mask`` of zeros and ones beside the parameter ``<name>`` itself, the usual form of home-made masks, counts
    where the weights are zero already. A parameter that several modules share is fixed only where all of them say so.

    Args:
        model: any network; it is not changed.

    Returns:
        Mask of the parameter's shape by parameter name; parameters without a fixed entry are left out.

    Raises:
        OckhamError: a parameter of a Lazy module has no shape yet.

    >>> fixed_entries(nn.Sequential(nn.Embedding(4, 2, padding_idx=3)))["0.weight"].tolist()
    [[False, False], [False, False], [False, False], [True, True]]
    """
    for name, p in model.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise OckhamError(f"parameter {name!r} has no shape yet (a Lazy module): call the network on a batch first")
    claims: dict[Tensor, list[Tensor | None]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                claims.setdefault(parameter, []).append(_claim(module, name, parameter))
    found = {}
    for name, parameter in model.named_parameters():
        masks = [mask for mask in claims[parameter] if mask is not None]
        if len(masks) == len(claims[parameter]) and bool((fixed := torch.stack(masks).all(0)).any()):
            found[name] = fixed
    return found


@torch.no_grad()
def _claim(module: nn.Module, name: str, parameter: Tensor) -> Tensor | None:
    """What one module says of its parameter; None where it fixes nothing."""
    if isinstance(module, _PADDED) and name == "weight" and module.padding_idx is not None:
        fixed = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
        fixed[module.padding_idx] = True
        return fixed
    mask = module._buffers.get(f"{name.removesuffix('_orig')}_mask")
    if mask is None or mask.shape != parameter.shape or not bool(((mask == 0) | (mask == 1)).all()):
        return None
    fixed = (mask == 0).to(parameter.device)
    return fixed if name.endswith("_orig") else fixed & (whole(parameter.detach()) == 0).to(fixed.device)


Entry = str | type[nn.Module] | nn.Module | Tensor
"""A name of a parameter or module, a "re:" pattern on names, a module type, a module, or a parameter."""

Ignore = Iterable[Entry] | Entry
"""Parameters to protect: one `Entry`, or several."""


def ignored(model: nn.Module, entries: Ignore, *, buffers: bool = False) -> frozenset[str]:
    """Names of the parameters that ``entries`` cover.

    Args:
        model: whose parameters they are; names may be those of tied parameters or of modules inside it, "" is all.
        entries: one entry or several; a single string is one entry and not its letters.
        buffers: whether names and patterns cover buffers, too.

    Returns:
        Names as `named_parameters` has them: a tied parameter under its first name.

    Raises:
        OckhamError: an entry covers nothing (the nearest names are given), is of another type, or is a pattern that is
            no regular expression; or the network cannot be worked with (see `check_network`).

    >>> sorted(ignored(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "0"))
    ['0.bias', '0.weight']
    """
    check_network(model, meta=True, values=False)
    first: dict[Tensor, str] = {}
    every: dict[str, str] = {}
    pairs = list(model.named_parameters(remove_duplicate=False))
    for name, p in [*pairs, *(model.named_buffers(remove_duplicate=False) if buffers else ())]:
        every[name] = first.setdefault(p, name)
    single = isinstance(entries, (str, type, nn.Module, Tensor))
    several: list[Any] = [entries] if single else list(entries)  # type: ignore[arg-type]
    found: set[str] = set()
    for entry in several:
        names = _covered(model, entry, every, first)
        if not names:
            kind = entry if isinstance(entry, type) else type(entry)
            shown = repr(entry) if isinstance(entry, str) else kind.__name__
            if isinstance(entry, Tensor):
                shown = f"parameter of shape {tuple(entry.shape)}"
            raise OckhamError(f"ignore entry {shown} matches no parameter{_near(model, entry, every)}")
        found |= names
    return frozenset(found)


def protected_names(model: nn.Module, ignore: Ignore) -> frozenset[str]:
    """The same as `ignored`, under its older name."""
    return ignored(model, ignore)


def _covered(model: nn.Module, entry: Any, every: dict[str, str], first: dict[Tensor, str]) -> set[str]:
    if isinstance(entry, Tensor):
        return {name for p, name in first.items() if p is entry}
    if isinstance(entry, nn.Module):
        inside = {first[p] for p in (*entry.parameters(), *entry.buffers()) if p in first}
        return inside if any(m is entry for m in model.modules()) else set()
    if isinstance(entry, type) and issubclass(entry, nn.Module):
        return {first[p] for m in model.modules() if isinstance(m, entry) for p in m.parameters()}
    if not isinstance(entry, str):
        raise OckhamError(
            f"ignore takes names, 're:' patterns, module types, modules and parameters; got {entry!r} "
            f"({type(entry).__name__})"
        )
    if entry.startswith("re:"):
        try:
            pattern = re.compile(entry[3:])
        except re.error as error:
            raise OckhamError(f"ignore pattern {entry!r} is not a regular expression: {error}") from error
        return {own for name, own in every.items() if pattern.search(name)}
    return {own for name, own in every.items() if entry in ("", name) or name.startswith(entry + ".")}


def _near(model: nn.Module, entry: Any, every: dict[str, str]) -> str:
    if isinstance(entry, str) and not entry.startswith("re:"):
        known = [*every, *(n for n, m in model.named_modules() if n and any(True for _ in m.parameters()))]
        close = difflib.get_close_matches(entry, known, n=3, cutoff=0.5)
        if close:
            return f"; did you mean {', '.join(map(repr, close))}?"
    return f"; there are {', '.join(list(every)[:8])}{', ...' if len(every) > 8 else ''}"


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

    def told(self, values: Tensor) -> Tensor:
        """The values of process 0, of the shape and type that ``values`` have here."""
        if self.count == 1:
            return values
        plain = values.to(torch.uint8) if values.dtype is torch.bool else values  # gloo sends no booleans
        sent = plain.detach().to(self._place).contiguous().clone()
        dist.broadcast(sent, group=self.group, group_src=0)
        return sent.to(values)

    def told_bytes(self, content: bytes) -> bytes:
        """The bytes of process 0, however many there are here."""
        if self.count == 1:
            return content
        size = int(self.told(torch.tensor(len(content))))
        mine = torch.zeros(size, dtype=torch.uint8)
        if self.rank == 0 and size:
            mine = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return self.told(mine).numpy().tobytes()

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


@torch.no_grad()
def rows_here(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor (a DTensor) that this process holds, in its memory; any other tensor itself."""
    rows: Tensor = tensor.to_local() if hasattr(tensor, "device_mesh") else tensor  # type: ignore[attr-defined]
    return rows


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


def finite_gradients(parameters: Mapping[str, Tensor], *, skip: bool) -> bool:
    """Whether the gradients of named parameters are finite numbers in all processes that hold them together.

    One norm over all gradients costs a read of them; only where it overflows each is looked at.

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
    norm = get_total_norm(found.values()) if found else torch.zeros(())
    if not processes.summed((~norm.isfinite()).double()):
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


def unwrapped(model: nn.Module) -> tuple[nn.Module, Processes]:
    """The network inside `DistributedDataParallel` and the processes that hold it; any other network and `ALONE`.

    Raises:
        OckhamError: the parameters are sharded over processes (FSDP), or it is no network.
    """
    check_network(model, meta=True, values=False)
    for name, p in model.named_parameters():
        if hasattr(p, "device_mesh") or type(p).__name__ == "FlatParameter":
            raise OckhamError(
                f"parameter {name!r} is sharded over processes (FSDP): whole tensors are needed here. Wrap the network "
                "in DistributedDataParallel instead"
            )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.module, Processes(model.process_group)
    return model, ALONE
