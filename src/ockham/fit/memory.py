"""Flat memory of an optimizer's state: slices, noise in pieces, what is saved, checks of its parameters."""

from __future__ import annotations

import copy
import io
import operator
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from ockham.core.processes import Processes, dividers, holders, own_rows, rows_here, sharded_as, whole
from ockham.errors import OckhamError, check_keywords
from ockham.fit.priors import GroupPrior, Prior, plain_prior, restored_prior, slice_scales

if TYPE_CHECKING:
    from ockham.fit.optimizer import VariationalOptimizer

__all__ = [
    "CYCLE",
    "WORK",
    "Arena",
    "Block",
    "Divided",
    "Piece",
    "RunFacts",
    "Schedule",
    "Span",
    "alive_index",
    "cache_chunks",
    "check_group",
    "check_keep",
    "read",
    "read_state",
    "renew_",
    "saved_state",
    "schedule_of",
    "sliced",
    "spans",
    "write",
]


CYCLE = 4
_SHORT = 1 << 12  # shorter vectors are never rotated: their elements would meet their old noise again


def renew_(noise: Tensor, phase: int, generator: torch.Generator) -> None:
    """Turn the noise e of the last draw into that of the next: new, -e, e rotated, -(e rotated), and again.

    Each is an exact draw, since neither sign nor order changes the distribution of independent normals. The mirrored
    draw of a pair cancels what is odd in the gradient noise; the rotated one gives each weight the noise of another,
    at a random distance, for a fraction of the price of the generator.

    Args:
        noise: a vector, changed in place.
        phase: 0 to 3, the place in the cycle.
        generator: generator of the noise's device.
    """
    if phase % 2:
        noise.neg_()
    elif phase == 0 or len(noise) < _SHORT:
        noise.copy_(torch.randn(noise.shape, generator=generator, device=noise.device))
    else:
        quarter = len(noise) // 4
        shift = quarter + int(torch.randint(2 * quarter, (), generator=generator, device=generator.device))
        noise.copy_(noise.roll(shift))


_CPU_SPAN = 3 << 17
_CPU_CHUNK = 1 << 15
_ACCELERATOR_SPAN = 1 << 24


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A run of living weights of one parameter.

    Attributes:
        parameter: the parameter.
        start: first position in the parameter's state vectors.
        stop: one past the last.
        index: flat positions in the parameter, or None where the run is elements start..stop of a dense parameter.
    """

    parameter: Tensor
    start: int
    stop: int
    index: Tensor | None

    def flat(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """The run's values of a tensor shaped like the parameter; a view where possible, else a copy (in ``out``)."""
        flat = rows_here(tensor).detach().reshape(-1)
        if self.index is None:
            return flat[self.start : self.stop]
        return torch.index_select(flat, 0, self.index, out=out)

    def put(self, values: Tensor) -> None:
        """Write the run's values into the parameter; nothing to do where they are a view of it."""
        target = rows_here(self.parameter).detach()
        if self.index is None and target.is_contiguous():
            place = target.view(-1)[self.start : self.stop]
            if place.data_ptr() != values.data_ptr():
                place.copy_(values)
        elif self.index is None:
            target.copy_(values.view(target.shape))
        elif target.is_contiguous():
            target.view(-1).scatter_(0, self.index, values)
        else:
            target.put_(self.index, values)


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """A run of the arena: positions start..stop, and the pieces that lie there in order."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]

    @property
    def lengths(self) -> list[int]:
        """Of the pieces."""
        return [p.stop - p.start for p in self.pieces]

    def split(self) -> list[Span]:
        """The same run, one span per piece."""
        result, at = [], self.start
        for piece in self.pieces:
            length = piece.stop - piece.start
            result.append(Span(at, at + length, (piece,)))
            at += length
        return result


def alive_index(keep: Tensor) -> Tensor:
    """Flat positions of the survivors, in logical (row-major) order."""
    return keep.reshape(-1).nonzero().squeeze(1)


def spans(alive: Sequence[tuple[Tensor, Tensor | None]], device: torch.device | None = None) -> list[Span]:
    """Cut the arena of (parameter, index of survivors or None) into spans of bounded, about equal length.

    Bounded for the device of the first parameter, or for another.
    """
    total = sum(rows_here(p).numel() if index is None else index.numel() for p, index in alive)
    kind = "cpu" if not alive else (device or alive[0][0].device).type
    limit = _CPU_SPAN if kind == "cpu" else _ACCELERATOR_SPAN
    size = -(-total // max(1, -(-total // limit)))
    result: list[Span] = []
    run: list[Piece] = []
    start = at = 0
    for parameter, index in alive:
        length = rows_here(parameter).numel() if index is None else index.numel()
        if index is None and not rows_here(parameter).is_contiguous():  # written back through its shape, so never cut
            pieces = [Piece(parameter, 0, length, None)]
        else:
            first = min(size - (at - start), length)
            edges = [0, *range(first, length, size), length] if length else [0]
            cuts = [(a, b) for a, b in pairwise(edges) if b > a]
            pieces = [Piece(parameter, a, b, None if index is None else index[a:b]) for a, b in cuts]
        for piece in pieces:
            run.append(piece)
            at += piece.stop - piece.start
            if at - start >= size:
                result.append(Span(start, at, tuple(run)))
                run, start = [], at
    return [*result, Span(start, at, tuple(run))] if run else result


def cache_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat tensors of one length side by side, on the CPU in pieces whose temporaries stay in cache.

    Longer ones are given back to the system after every operation and faulted in again, which costs more than it.
    """
    size = _CPU_CHUNK if tensors[0].device.type == "cpu" else max(1, tensors[0].numel())
    return zip(*(t.split(size) for t in tensors), strict=True)


def read(span: Span, tensors: Sequence[Tensor], out: Tensor) -> Tensor:
    """The span's values, one tensor per piece, shaped like its parameter: a view if one dense piece, else ``out``."""
    if len(span.pieces) == 1:
        return span.pieces[0].flat(tensors[0], out)
    return torch.cat([piece.flat(t) for piece, t in zip(span.pieces, tensors, strict=True)], out=out)


def write(span: Span, values: Tensor) -> None:
    """Write a flat vector back into the parameters of the span."""
    if len(span.pieces) == 1:
        span.pieces[0].put(values)
        return
    for piece, part in zip(span.pieces, values.split(span.lengths), strict=True):
        piece.put(part)


WORK = ("first", "second", "third")  # names of the vectors as long as a span that a step may overwrite
_SMALL = 1 << 20


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What all weights of a run share: steps taken (the current one included) and prior precision."""

    step: int
    prior_precision: float


@dataclass(frozen=True, slots=True, eq=False)
class Divided:
    """Where the living weights that this process holds stand among those of all, where parameters are sharded.

    Attributes:
        processes: those that hold the parameters of the arena together.
        runs: (first position here, one past the last, first position among all) of each parameter's rows.
        edges: ends of the spans that one process with all weights would cut, so that the noise is that of one process.
    """

    processes: Processes
    runs: tuple[tuple[int, int, int], ...]
    edges: tuple[int, ...]

    @classmethod
    def of(cls, parameters: Sequence[Tensor], counts: Sequence[int]) -> Divided | None:
        """The division of these parameters, of which so many weights live here; None where they are not sharded."""
        if not parameters or not hasattr(parameters[0], "device_mesh"):
            return None
        processes = holders(parameters[0])
        every = processes.gathered(torch.tensor(counts))  # [processes, parameters]
        totals, before = every.sum(0).tolist(), every[: processes.rank].sum(0).tolist()
        stand_ins = [(torch.empty(total, device="meta"), None) for total in totals]
        here, there, runs = 0, 0, []
        for count, total, others in zip(counts, totals, before, strict=True):
            runs.append((here, here + count, there + others))
            here, there = here + count, there + total
        return cls(processes, tuple(runs), (0, *(x.stop for x in spans(stand_ins, parameters[0].device))))

    def renew_(self, noise: Tensor, phase: int, generator: torch.Generator) -> None:
        """`renew_` of the noise of all processes together, of which each takes its part; sends half of it every turn.

        Every process draws all of it, a span at a time: the generator is the same everywhere.
        """
        if phase % 2:
            noise.neg_()
            return
        for start, stop in pairwise(self.edges):
            mine = [
                (slice(a + max(0, start - g), min(b, a + stop - g)), max(g, start) - start) for a, b, g in self.runs
            ]
            parts = [(part, at) for part, at in mine if part.start < part.stop]
            whole = noise.new_zeros(stop - start)
            if phase == CYCLE // 2 and len(whole) >= _SHORT:  # it is rotated, so all of the noise before is needed
                for part, at in parts:
                    whole[at : at + part.stop - part.start] = noise[part]
                whole = self.processes.summed(whole.float()).to(noise.dtype)
            renew_(whole, phase, generator)
            for part, at in parts:
                noise[part] = whole[at : at + part.stop - part.start]


@dataclass(frozen=True, slots=True, eq=False)
class Arena:
    """State vectors of all living weights of a group, their division into spans, and memory to work in.

    Memory to work in is kept from step to step: fresh memory for every operation would cost more than the operations.
    It is shared by all spans, except the ``first`` part of it in a small arena, which then still holds the standard
    deviations of the draw (runs in `drawn`) when the step needs them again.
    """

    parameters: tuple[Tensor, ...]
    vectors: Mapping[str, Tensor]
    spans: tuple[Span, ...]
    divided: Divided | None = None
    drawn: set[tuple[int, int]] = field(default_factory=set)
    _views: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)
    _work: dict[str, Tensor] = field(default_factory=dict)

    def holds(self, alive: list[Tensor]) -> bool:
        """Whether these are the arena's parameters."""
        return len(self.parameters) == len(alive) and all(map(operator.is_, self.parameters, alive))

    def at(self, span: Span) -> dict[str, Tensor]:
        """Views, made once: of all vectors on a span, of ``mean`` (the mean behind a draw), and of `WORK`."""
        key = (span.start, span.stop)
        if key not in self._views:
            size, own = span.stop - span.start, slice(span.start, span.stop)
            found = {name: v[own] for name, v in self.vectors.items()}
            found["mean"] = self._memory("mean", found, self.spans[-1].stop)[own]
            for name in WORK:
                if name == "first" and self.small:
                    found[name] = self._memory(name, found, self.spans[-1].stop)[own]
                else:
                    found[name] = self._memory(name, found, max(x.stop - x.start for x in self.spans))[:size]
            self._views[key] = found
        return self._views[key]

    def lent(self, parameter: Tensor) -> Tensor:
        """One value per living weight of a parameter whose weights are not drawn: its unused part of ``mean``."""
        at, first, last = 0, 0, 0
        for span in self.spans:
            for piece in span.pieces:
                length = piece.stop - piece.start
                if piece.parameter is parameter:
                    first, last = (at if last == 0 else first), at + length
                at += length
        return self._memory("mean", self.vectors, at)[first:last]

    @property
    def small(self) -> bool:
        """Whether memory for one more vector does not matter."""
        return self.spans[-1].stop <= _SMALL

    def _memory(self, name: str, like: Mapping[str, Tensor], size: int) -> Tensor:
        if name not in self._work:
            kind = next(v for n, v in like.items() if n != "noise")
            self._work[name] = torch.empty(size, dtype=kind.dtype, device=kind.device)
        return self._work[name]


class Block(io.IOBase):
    """A generator as a context. `io.IOBase` leaves it in C: no interrupt falls between the body and its ``finally``.

    A block that is dropped without having been left, by an interrupt between two bytecodes, is closed just so.
    """

    def __init__(self, steps: Generator[None]) -> None:
        self._steps = steps
        self.close = steps.close  # type: ignore[method-assign]

    def __enter__(self) -> None:  # type: ignore[override]
        try:
            next(self._steps)
            del self  # an interrupt from here to the body drops the block, whatever holds this frame
        except BaseException:
            self.close()  # noqa: F821 - there is no bytecode between that and the end of the try
            raise


Take = Callable[[str, Tensor], Tensor]
"""(Parameter name, tensor of the parameter's old shape) to what stays of it."""


@torch.no_grad()
def sliced(optimizer: VariationalOptimizer, parameters: Mapping[str, Tensor], take: Take) -> VariationalOptimizer:
    """A copy of the optimizer over the parameters of a smaller network; the original is left as it is.

    Moments, spreads, masks, the pending draw and the state of the noise generator go along, so training goes on as if
    the removed weights had only been removed.

    Args:
        optimizer: optimizer of the network before.
        parameters: name to parameter of the smaller network.
        take: cuts a tensor shaped like a parameter.

    Raises:
        OckhamError: called inside `sampled`, or a parameter is missing.
    """
    optimizer._outside("sliced")
    missing = [name for name in optimizer._names.values() if name not in parameters]
    if missing:
        raise OckhamError(f"the smaller network has no parameter {missing[:3]}: shrink the network of this optimizer")
    twin = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__getstate__())  # attributes of subclasses included
    twin.state, twin.param_groups = defaultdict(dict), []
    twin._index, twin._arenas = {}, {}
    twin._generators = {d: g.clone_state() for d, g in optimizer._generators.items()}
    twin._names = {parameters[name]: name for name in optimizer._names.values()}
    twin._dividers = dividers(twin._names) if optimizer._dividers else []
    twin._held = {}
    for p, at in optimizer._held.items():
        fixed = torch.zeros_like(rows_here(p), dtype=torch.bool).view(-1).index_fill(0, at, True)
        name, fixed = optimizer._names[p], whole(sharded_as(p, fixed.view(rows_here(p).shape)))
        twin._held[parameters[name]] = alive_index(own_rows(parameters[name], take(name, fixed)).to(p.device))
    shapes = {name: tuple(p.shape) for p, name in optimizer._names.items()}
    for group in optimizer.param_groups:
        fresh = {k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "prior")}
        if "prior" in group:
            prior = group["prior"]
            fresh["prior"] = prior.sliced(take, shapes) if isinstance(prior, GroupPrior) else prior
        twin.param_groups.append({"params": [parameters[optimizer._names[p]] for p in group["params"]], **fresh})
        for p in group["params"]:
            if optimizer.state.get(p):
                _carry(optimizer, twin, p, take, group)
    return twin


def _carry(
    optimizer: VariationalOptimizer, twin: VariationalOptimizer, p: Tensor, take: Take, group: dict[str, Any]
) -> None:
    name, state = optimizer._names[p], optimizer.state[p]
    new = next(q for q, n in twin._names.items() if n == name)
    old_keep = optimizer._keep_of(p)

    def taken(rows: Tensor) -> Tensor:
        return own_rows(new, take(name, whole(sharded_as(p, rows)))).to(new.device)

    keep = taken(old_keep)
    vectors = (*optimizer._vectors, "noise")
    kept = {k: copy.deepcopy(v) for k, v in state.items() if k not in vectors and k != "keep"}
    for vector in vectors:
        wide = torch.zeros(old_keep.shape, dtype=state[vector].dtype, device=p.device)
        wide[old_keep] = state[vector]
        kept[vector] = taken(wide)[keep]
    if not bool(keep.all()):
        kept["keep"] = keep
        twin._index[new] = alive_index(keep)
    twin.state[new] = kept | slice_scales(p, group, state, lambda t: take(name, t))


def divided_state(p: Tensor, state: Mapping[str, Any], keep: Tensor, vectors: Sequence[str]) -> dict[str, Any]:
    """The state of a sharded parameter as `torch.distributed.checkpoint` knows it: sharded tensors of its shape."""
    wide = {n: state[n].new_zeros(keep.shape).masked_scatter_(keep, state[n]) for n in vectors}
    return {**state, **{n: sharded_as(p, values) for n, values in {**wide, "keep": keep}.items()}}


def fitted_state(p: Tensor, state: Mapping[str, Any], vectors: Sequence[str]) -> dict[str, Any]:
    """The state of a parameter as its optimizer keeps it, saved by any number of processes: `divided_state` undone."""
    read = rows_here if hasattr(p, "device_mesh") else whole
    mine = {name: read(value) if hasattr(value, "device_mesh") else value for name, value in state.items()}
    keep = mine.get("keep")
    if keep is None:
        keep = torch.ones(p.shape, dtype=torch.bool, device=p.device)
    for name in vectors:
        dense = mine[name]
        if dense.numel() != keep.numel():  # of the living weights only
            dense = dense.new_zeros(keep.shape).masked_scatter_(keep, dense)
        mine[name] = own_rows(p, dense.view(keep.shape))
    keep = own_rows(p, keep.bool())
    mine |= {name: mine[name][keep] for name in vectors}
    left = int(holders(p).summed((~keep).sum()))
    return {k: v for k, v in mine.items() if k != "keep"} | ({"keep": keep} if left else {})


def saved_state(optimizer: VariationalOptimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Torch's state of an optimizer made plain, with that of its noise: what `read_state` reads."""
    groups = state["param_groups"]
    state["param_groups"] = [{k: plain_prior(v) if isinstance(v, Prior) else v for k, v in g.items()} for g in groups]
    order = [p for group in optimizer.param_groups for p in group["params"]]
    if optimizer._dividers:
        optimizer._generator(order[0].device)  # torch.distributed.checkpoint loads what is there already
    noise = {str(d): g.get_state() for d, g in optimizer._generators.items()}
    state["sampler"] = {"pending": optimizer._pending, "phase": optimizer._phase, "seed": optimizer._seed}
    state["sampler"]["generators"] = noise
    if optimizer._dividers:
        vectors, there = (*optimizer._vectors, "noise"), [at for at, value in state["state"].items() if value]
        state["state"] = {
            at: divided_state(p := order[at], optimizer.state[p], optimizer._keep_of(p), vectors) for at in there
        }
        state["param_groups"][0]["sampler"] = state["sampler"]  # its state_dict functions keep nothing but groups
    return state


def read_state(
    owner: str, saved: Mapping[str, Any], own: Sequence[Mapping[str, Any]], vectors: Sequence[str]
) -> tuple[Mapping[str, Any], list[dict[str, Any]], dict[Any, dict[str, Any]]]:
    """What an optimizer saved: the state of its noise, its groups with priors, and the states of its parameters.

    Args:
        owner: name of the optimizer's class, for the error.
        saved: value of its `state_dict`, perhaps by way of `torch.distributed.checkpoint`, which keeps groups only
            and puts plain values under text keys.
        own: groups of the optimizer that loads it, whose classes of priors count.
        vectors: names of what that optimizer holds of every parameter.

    Raises:
        OckhamError: it is the state of another optimizer.
    """
    groups = [dict(group) for group in saved["param_groups"]]
    sampler = saved.get("sampler", *[group.pop("sampler") for group in groups if "sampler" in group])
    if sampler is None:
        raise OckhamError(f"this is not the state of a {owner}: it has no 'sampler' entry")
    for group, mine in zip(groups, own, strict=False):  # torch raises where the numbers differ
        if isinstance(group.get("prior"), dict):
            group["prior"] = restored_prior(group["prior"], mine["prior"])
    states: dict[Any, dict[str, Any]] = {}
    keys = {str(key): key for group in groups for key in group["params"]}
    for key, value in saved["state"].items():
        states.setdefault(keys.get(str(key), key), {}).update(value)
    lack = [name for name in vectors if any(name not in value for value in states.values() if value)]
    if lack:
        raise OckhamError(
            f"this is the state of another optimizer, without {', '.join(lack)}: a {owner} holds that of every "
            "parameter. Go on with the optimizer that was saved, or start anew"
        )
    return sampler, groups, states


class Schedule(TypedDict, total=False):
    """When and how strongly the KL acts: keywords that every variational optimizer takes.

    Attributes:
        temperature: T of the posterior, default 1; below 1 it is colder, and its evidence is tempered.
        kl_warmup: steps over which the KL gets its weight, default 0; learned priors move only after them.
        prior_interval: steps between two updates of a learned prior, default 100.
    """

    temperature: float
    kl_warmup: int
    prior_interval: int


def schedule_of(owner: str, given: Schedule) -> Schedule:
    """A schedule with its defaults; names the class when a keyword is unknown."""
    check_keywords(owner, given, Schedule)
    return {"temperature": 1.0, "kl_warmup": 0, "prior_interval": 100, **given}


def check_group(group: Mapping[str, Any], taken: Mapping[Tensor, str], divisible: bool) -> None:
    """Named parameters, each once, of a kind that can be perturbed.

    Args:
        group: parameter group.
        taken: parameters that the optimizer holds already, with their names.
        divisible: whether the method knows parameters that are sharded over processes.

    Raises:
        OckhamError: otherwise; says which and what to do.
    """
    if "param_names" not in group:
        raise OckhamError("parameters need names: pass model.named_parameters(), not model.parameters()")
    names, params = group["param_names"], group["params"]
    if len(set(params)) != len(params):
        raise OckhamError("duplicate parameters: name a tied weight once, as named_parameters() does")
    again = sorted({n for n in names if n in taken.values() or names.count(n) > 1})
    if again:
        raise OckhamError(f"parameter names must differ, also between groups; twice: {again[:6]}")
    for name, p in zip(names, params, strict=True):
        if problem := _undivided(p, next(iter(taken), params[0]), group, divisible):
            raise OckhamError(f"parameter {name!r} {problem}")
        if p.dtype not in (torch.float32, torch.float64):
            raise OckhamError(
                f"parameter {name!r} is {p.dtype}: variational inference needs float32 or float64 parameters, since a "
                "perturbation is lost in a shorter format. Keep float32 weights and use torch.autocast for speed; "
                "freeze parameters of other types (requires_grad_(False)) and leave them out"
            )


def _undivided(p: Tensor, first: Tensor, group: Mapping[str, Any], divisible: bool) -> str:
    """Why a parameter as it is sharded (or not) cannot be trained; empty where it can."""
    mesh: Any = getattr(p, "device_mesh", None)
    places: tuple[Any, ...] = getattr(p, "placements", ())
    if mesh != getattr(first, "device_mesh", None):
        return (
            "is sharded otherwise than the first parameter: let fully_shard(model), after those of its blocks, divide "
            "all of them over one mesh, and leave out what it shall ignore"
        )
    if mesh is None:
        return ""
    if not divisible:
        return (
            "is a DTensor, sharded over processes (FSDP2): of the variational optimizers MeanField, IVON and "
            "PointEstimate step on shards. Use one of them, or DistributedDataParallel"
        )
    if mesh.ndim != 1 or not places[0].is_shard(0):
        return (
            f"is sharded as {places} over {mesh.ndim} dimensions: rows over one dimension are known here, as "
            "fully_shard(model, mesh=init_device_mesh(device, (processes,))) divides them"
        )
    if isinstance(group.get("prior"), GroupPrior):
        return (
            f"is sharded over processes (FSDP2), and {type(group['prior']).__name__} needs whole tensors: take a prior "
            "with one scale per tensor, such as ockham.LayerScale()"
        )
    return ""


def check_keep(name: str, mask: Tensor, by_name: Mapping[str, Tensor]) -> None:
    """A boolean mask of a known parameter's shape.

    Raises:
        OckhamError: otherwise; says what was got.
    """
    if name not in by_name:
        raise OckhamError(f"keep names {name!r}, which this optimizer does not hold")
    if mask.dtype is not torch.bool or mask.shape != by_name[name].shape:
        raise OckhamError(
            f"keep[{name!r}] must be boolean (True = stays) of shape {tuple(by_name[name].shape)}; "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
