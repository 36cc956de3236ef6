"""What a batch, its inputs and a network's output may be: the one place where a network meets a loader."""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

from ockham.errors import DataError, OckhamError

__all__ = [
    "READ_ONCE",
    "Batch",
    "Loader",
    "LoaderOptions",
    "ReadBatch",
    "ReadOutput",
    "RowsOf",
    "Substituted",
    "arranged",
    "asked",
    "batches_of",
    "call",
    "count_terms",
    "described",
    "forward",
    "inputs_of",
    "is_packed",
    "random_states",
    "read_batch",
    "restore_random_states",
    "sized",
    "tensor_of",
    "to_device",
]

PYTHON_ERRORS = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError, NotImplementedError)
"""What a network, a loss or a function of the user's raises when it is given something it cannot take."""

_NO_LOADER = (
    "the loader must be an iterable of batches; got {}. A Dataset yields single examples: pass "
    "torch.utils.data.DataLoader(dataset, batch_size=32)"
)

READ_ONCE = "the loader can be read only once, or is empty: pass a DataLoader or a list of batches, not an iterator"
"""What is said of a loader that yields nothing in a later pass."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Some examples as a network and its likelihood take them: ``model(*args, **kwargs)`` is compared with ``target``.

    Attributes:
        args: positional inputs.
        kwargs: keyword inputs.
        target: what the likelihood compares the output with; None where there is nothing to compare.
        weight: sample weights [N] (or of the target's shape), not negative; None counts every example once.

    >>> batch = Batch((torch.zeros(4, 3),), target=torch.zeros(4))
    >>> batch.size
    4
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    target: Any = None
    weight: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of examples: the length of the target, or of the first input where there is no target."""
        for value in (self.target, (self.args, dict(self.kwargs))):
            for leaf in pytree.tree_leaves(value, is_leaf=is_packed):
                if is_packed(leaf):
                    return int(leaf.batch_sizes[0])
                if isinstance(leaf, Tensor) and leaf.ndim:
                    return len(leaf)
        raise DataError(f"a batch of {described(self)} holds no tensor with a batch axis")

    def to(self, device: torch.device | str) -> Batch:
        """The same examples with all tensors on a device."""
        at = torch.device(device)
        args, kwargs = tuple(to_device(v, at) for v in self.args), {k: to_device(v, at) for k, v in self.kwargs.items()}
        return Batch(args, kwargs, to_device(self.target, at), to_device(self.weight, at))

    @property
    def packed(self) -> bool:
        """Whether an input is a PackedSequence."""
        return any(map(is_packed, pytree.tree_leaves((self.args, dict(self.kwargs)), is_leaf=is_packed)))

    def part(self, rows: slice | Tensor) -> Batch:
        """Some of the examples; a PackedSequence is packed anew."""
        size = self.size

        def cut(leaf: Any) -> Any:
            if is_packed(leaf):
                padded, lengths = pad_packed_sequence(leaf, batch_first=True)
                return pack_padded_sequence(padded[rows], lengths[rows], batch_first=True, enforce_sorted=False)
            return leaf[rows] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size else leaf

        args, kwargs, target = pytree.tree_map(cut, (self.args, dict(self.kwargs), self.target), is_leaf=is_packed)
        return Batch(args, kwargs, target, None if self.weight is None else self.weight[rows])


ReadBatch = Callable[[Any], Batch]
"""Turns what a loader yields into a `Batch`, for loaders that yield something else than the forms listed there."""

ReadOutput = Callable[[Any], Any]
"""Takes what the likelihood compares out of what the network returns, such as ``lambda found: found[0]``."""


class LoaderOptions(TypedDict, total=False):
    """How a loader is read: keywords that every verb takes.

    Attributes:
        batch: function from what the loader yields to a `Batch`; default: pairs, triples and mappings are understood.
        output: function that takes what the likelihood compares out of what the network returns.
        steps_per_epoch: batches of an epoch, for loaders without a length.
    """

    batch: ReadBatch | None
    output: ReadOutput | None
    steps_per_epoch: int | None


class Loader(Protocol):
    """Batches, iterable again and again, of known length."""

    def __iter__(self) -> Iterator[Any]:
        """One epoch."""

    def __len__(self) -> int:
        """Batches an epoch."""


class _Steps:
    """The first ``steps`` batches of every pass over a loader."""

    def __init__(self, loader: Iterable[Any], steps: int) -> None:
        self._loader, self._steps = loader, steps

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Any]:
        count = 0
        for raw in itertools.islice(self._loader, self._steps):
            count += 1
            yield raw
        if count < self._steps:
            raise DataError(
                f"steps_per_epoch={self._steps}, but the loader ends after {count} batches: give at most that many"
            )


class RowsOf:
    """Of every batch of a loader the rows of one process, so that all together make the batches of the loader.

    Args:
        loader: the same in all processes, in the same order.
        rank: number of this process; it has the rows rank, rank + count, and so on. Batches with none are left out.
        count: number of processes.
    """

    def __init__(self, loader: Loader, rank: int, count: int) -> None:
        self._loader, self._rows = loader, slice(rank, None, count)

    def __len__(self) -> int:
        """Batches of the loader."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """One epoch."""
        parts = (read_batch(raw).part(self._rows) for raw in self._loader)
        return (part for part in parts if part.size)


def sized(loader: Iterable[Any], steps_per_epoch: int | None = None) -> Loader:
    """The loader itself where it knows its length, else one whose epochs are the first so many batches.

    Args:
        loader: any iterable of batches that can be iterated again and again.
        steps_per_epoch: batches of an epoch, for loaders that do not know their length or are to be cut short.

    Raises:
        DataError: the loader is empty, has no length and none is given, can be read only once, or is no loader.
    """
    if not isinstance(loader, Iterable):
        raise DataError(_NO_LOADER.format(described(loader)))
    if isinstance(loader, Iterator) and not hasattr(loader, "__len__"):
        raise DataError(
            f"the loader is a {type(loader).__name__} that can be read only once, and every epoch reads it anew: pass "
            "a DataLoader, or a list of batches"
        )
    if steps_per_epoch is not None:
        if not isinstance(steps_per_epoch, int) or steps_per_epoch < 1:
            raise OckhamError(f"steps_per_epoch counts batches, at least 1; got {steps_per_epoch!r}")
        return _Steps(loader, steps_per_epoch)
    try:
        length = len(loader)  # type: ignore[arg-type]
    except TypeError as error:
        raise DataError(
            f"the loader ({type(loader).__name__}) needs a length, since schedules are planned from it: pass "
            "steps_per_epoch= (batches an epoch)"
        ) from error
    if length == 0:
        raise DataError("the training loader is empty: no batches")
    return loader  # type: ignore[return-value]


_Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


def _generators(loader: Any) -> list[_Generator]:
    """Random generators that a loader, its sampler, dataset and transforms hold as attributes, in a fixed order."""
    found: list[_Generator] = []
    seen: dict[int, Any] = {}
    queue: list[Any] = [loader]
    while queue and len(seen) < _LOOKED_INTO:
        value = queue.pop(0)
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, _Generator):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            queue += value[:_LISTED]
        elif isinstance(value, dict):
            queue += itertools.islice(value.values(), _LISTED)
        elif not isinstance(value, (Tensor, type, ModuleType, FunctionType)):
            queue += getattr(value, "__dict__", {}).values()
    return found


_LOOKED_INTO, _LISTED = 10_000, 100  # objects in all, and the first of a list: samplers and transforms, not examples


def random_states(loader: Any) -> list[Any]:
    """States of the random generators that a loader holds itself, as plain values and tensors.

    Whoever seeds the global generators does not reach these: a ``generator=`` of a DataLoader or a sampler, a NumPy
    or Python generator of a dataset or a transform.
    """
    states: list[Any] = []
    for own in _generators(loader):
        if isinstance(own, torch.Generator):
            states.append(own.get_state())
        elif isinstance(own, random.Random):
            states.append(list(own.getstate()))
        else:
            state = own.get_state(legacy=False) if isinstance(own, np.random.RandomState) else own.bit_generator.state
            states.append(pytree.tree_map(lambda v: v.tolist() if isinstance(v, np.ndarray) else v, dict(state)))
    return states


def restore_random_states(loader: Any, states: Sequence[Any]) -> None:
    """Put the random generators of a loader where those of `random_states` were.

    Raises:
        DataError: this loader holds other generators.
    """
    own, kinds = _generators(loader), {True: "torch.Generator", False: "generator of NumPy or Python"}
    here, there = [kinds[isinstance(g, torch.Generator)] for g in own], [kinds[isinstance(s, Tensor)] for s in states]
    try:
        if here != there:
            raise ValueError(
                f"it holds {', '.join(here) or 'no generator'}, the one before {', '.join(there) or 'none'}"
            )
        for generator, state in zip(own, states, strict=True):
            if isinstance(generator, torch.Generator):
                generator.set_state(state.cpu())
            elif isinstance(generator, random.Random):
                version, numbers, normal = state
                generator.setstate((version, tuple(numbers), normal))
            elif isinstance(generator, np.random.RandomState):
                generator.set_state(state)
            else:
                generator.bit_generator.state = state
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise DataError(
            f"the order of the examples cannot go on where it was, since the random generators of this loader are "
            f"others: {error}. Build the loader as before, with the same generator="
        ) from error


def read_batch(raw: Any, batch: ReadBatch | None = None) -> Batch:
    """What a loader yields as a `Batch`.

    ``(x, y)`` and ``(x, y, weight)`` have their inputs in x: a tensor, a tuple or list (positional), a mapping
    (keywords), a named tuple, a PackedSequence. A mapping has its targets under ``labels``, and all other entries are
    keyword inputs, as tokenizers and data collators make them.

    Args:
        raw: item as the loader yields it.
        batch: function of the user's that reads everything else.

    Raises:
        DataError: something else; says what came and how to read it.

    >>> read_batch({"input_ids": torch.ones(2, 5, dtype=torch.long), "labels": torch.tensor([0, 1])}).kwargs.keys()
    dict_keys(['input_ids'])
    """
    if batch is not None:
        found = asked(batch, raw, "batch= cannot read what the loader yields")
        if not isinstance(found, Batch):
            raise DataError(f"batch= must return ockham.Batch(args, kwargs, target, weight); got {described(found)}")
        return found
    if isinstance(raw, Batch):
        return raw
    if isinstance(raw, Mapping):
        if "labels" not in raw:
            raise DataError(f"a batch that is a mapping needs its targets under 'labels'; got {described(raw)}. {_HOW}")
        return Batch((), {k: v for k, v in raw.items() if k != "labels"}, raw["labels"])
    if is_packed(raw) or not isinstance(raw, (tuple, list)) or len(raw) not in (2, 3):
        raise DataError(
            "the loader must yield pairs (inputs, targets), triples (inputs, targets, weight) or mappings with "
            f"'labels'; got {described(raw)}. {_HOW}"
        )
    target, weight = raw[1], raw[2] if len(raw) == 3 else None
    if len(raw) == 3 and not (isinstance(weight, Tensor) and weight.is_floating_point()):
        raise DataError(
            f"the third entry of a batch is the floating weight of its examples; got {described(weight)}. Use "
            "torch.as_tensor(weight).float(); for two inputs yield ((x, z), y), or pass batch="
        )
    if target is None:
        raise DataError(f"the targets of a batch are None; got {described(raw)}. {_HOW}")
    return inputs_of(raw[0], target, weight)


_HOW = "Pass batch=, a function from what the loader yields to ockham.Batch(args, kwargs, target, weight)"


def inputs_of(x: Any, target: Any = None, weight: Tensor | None = None) -> Batch:
    """A `Batch` with these inputs: a tuple or list is positional, a mapping keywords, everything else one input."""
    if isinstance(x, Mapping):
        return Batch((), dict(x), target, weight)
    whole = is_packed(x) or _is_named(x) or not isinstance(x, (tuple, list))
    return Batch((x,) if whole else tuple(x), {}, target, weight)


def asked(function: Callable[[Any], Any], given: Any, problem: str) -> Any:
    """What a function of the user's makes of something.

    Args:
        function: the user's.
        given: its argument.
        problem: first words of the error.

    Raises:
        DataError: the function raised what Python raises; says what it was given.
    """
    try:
        return function(given)
    except OckhamError:
        raise
    except PYTHON_ERRORS as error:
        raise DataError(f"{problem}, {described(given)}: {type(error).__name__}: {error}") from error


def batches_of(loader: Iterable[Any], device: torch.device, batch: ReadBatch | None = None) -> Iterator[Batch]:
    """Every batch of a loader, read and moved to a device.

    Raises:
        DataError: it is no loader, or a batch cannot be read.
    """
    if not isinstance(loader, Iterable):
        raise DataError(_NO_LOADER.format(described(loader)))
    for raw in loader:
        yield read_batch(raw, batch).to(device)


def call(model: Callable[..., Any], batch: Batch, output: ReadOutput | None = None) -> Any:
    """What a network answers to a batch, or what ``output`` takes out of it.

    Args:
        model: network called as it stands, in its own mode.
        batch: batch on its device.
        output: function of the user's, for networks whose answer holds more than the likelihood needs.

    Raises:
        DataError: the network, or ``output``, cannot take what it is given; says what that was.
    """
    args, kwargs = arranged(model, batch)
    try:
        found = model(*args, **kwargs)
    except (OckhamError, torch.OutOfMemoryError):
        raise
    except PYTHON_ERRORS as error:
        said = f"{type(error).__name__}: {_way_out(model, (args, kwargs), str(error).strip().splitlines() or [''])}"
        raise DataError(f"the network cannot take the data's inputs, {_call_of(args, kwargs)}: {said}") from error
    return found if output is None else asked(output, found, "output= cannot read what the network returns")


def _way_out(model: Any, given: Any, lines: list[str]) -> str:
    """The first line of what Python said when a network was called, and what mends it, where that is known."""
    leaves, said = pytree.tree_leaves(given), lines[0]
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    kinds = {p.dtype for p in parameters if p.is_floating_point()}
    numbers = {v.dtype for v in leaves if isinstance(v, Tensor) and (v.is_floating_point() or v.dtype is torch.uint8)}
    images = [v for v in leaves if isinstance(v, Tensor) and v.ndim == 4 and v.shape[-1] in (1, 3)]
    if any(isinstance(v, np.ndarray) for v in leaves):
        return f"{said}. Yield tensors: torch.as_tensor(x)"
    if "more than 1 value per channel" in said:  # of torch's BatchNorm in training
        return f"{said}. Leave the last, smaller batch out (DataLoader(..., drop_last=True)), or use another batch size"
    if len(kinds) == 1 and numbers - kinds and ("type" in said or "expected scalar" in said):
        kind, bytes_ = str(*kinds), torch.uint8 in numbers
        return f"{said}. The network computes in {kind}: yield x.to({kind}){' / 255' if bytes_ else ''}"
    if images and "channels" in said:
        return f"{said}. Channels come before rows and columns: yield x.permute(0, 3, 1, 2)"
    if "index out of range in self" in said:
        return f"{said}. An Embedding has no row for some of these ids: give it more rows, or check the ids"
    return said


class Substituted:
    """A network called with other parameters and buffers, without touching its own.

    Args:
        model: network called in its own mode.
        tensors: parameters and buffers by name; names left out keep their values, tied ones share theirs.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self._model, self._tensors = model, dict(tensors)
        self.forward = model.forward  # its signature says how inputs are given

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network with those tensors."""
        return functional_call(self._model, self._tensors, args, kwargs, tie_weights=True)


def tensor_of(found: Any) -> Tensor:
    """The output tensor of a network: a tensor itself, or the ``logits`` of an object that has them.

    Raises:
        DataError: anything else; says what came and which argument reads it.
    """
    if isinstance(found, Tensor):
        return found
    logits = getattr(found, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise DataError(
        f"the network's output must be a tensor, or an object with .logits; got {described(found)}. Pass output=, such "
        "as output=lambda found: found[0]"
    )


def forward(model: nn.Module, x: Any) -> Any:
    """Call a network with inputs alone: a tensor, a tuple of positional or a mapping of keyword inputs."""
    return call(model, inputs_of(x))


def arranged(model: Any, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the call: named tuples spread or whole, a lone keyword by position, as the network wants them.

    Args:
        model: network, or what has the ``forward`` of one.
        batch: batch that it is called with.
    """
    args, kwargs = batch.args, dict(batch.kwargs)
    lone_tuple = len(args) == 1 and _is_named(args[0])
    lone_keyword = not args and len(kwargs) == 1
    if not (lone_tuple or lone_keyword):
        return args, kwargs
    signature = inspect.signature(model.forward)
    if lone_keyword:
        by_position = not _binds(signature, (), kwargs) and _binds(signature, tuple(kwargs.values()), {})
        return (tuple(kwargs.values()), {}) if by_position else (args, kwargs)
    known = set(args[0]._fields) <= set(signature.parameters)
    needed = [p for p in signature.parameters.values() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    spread = _binds(signature, tuple(args[0]), kwargs) and (known or len(needed) != 1)
    return (tuple(args[0]) if spread else args), kwargs


def _binds(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _is_named(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields") and not is_packed(value)


def is_packed(value: Any) -> bool:
    """Whether something is a PackedSequence, which is a named tuple to Python and one input to us."""
    return isinstance(value, PackedSequence)


def to_device(value: Any, device: torch.device) -> Any:
    """Move tensors in (nested) tuples, lists, mappings and anything that has ``to``; types stay what they are."""
    if isinstance(value, Tensor):
        short = device.type == "mps" and value.dtype is torch.float64  # which Apple's processors do not have
        return (value.float() if short else value).to(device, non_blocking=True)
    if isinstance(value, PackedSequence):
        return value.to(device)  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        return {k: to_device(v, device) for k, v in value.items()}
    if _is_named(value):
        return type(value)(*(to_device(v, device) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(v, device) for v in value)
    move = getattr(value, "to", None)
    return move(device) if callable(move) else value


def described(value: Any) -> str:
    """Types, keys and shapes of anything, in one line, for messages."""
    if isinstance(value, Batch):
        return f"Batch({_call_of(value.args, value.kwargs)}, target {described(value.target)})"
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, PackedSequence):
        return f"PackedSequence({described(value.data)})"
    if isinstance(value, Mapping):
        shown = [f"{k}: {described(v)}" for k, v in list(value.items())[:6]]
        return f"{type(value).__name__} {{{', '.join(shown)}{', ...' if len(value) > 6 else ''}}}"
    if isinstance(value, (tuple, list)):
        shown = [described(v) for v in list(value)[:4]]
        return f"{type(value).__name__} of {len(value)} ({', '.join(shown)}{', ...' if len(value) > 4 else ''})"
    shape = getattr(value, "shape", None)
    return type(value).__name__ + (f" {tuple(shape)}" if isinstance(shape, tuple) else "")


def _call_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    return ", ".join([*(described(v) for v in args), *(f"{k}={described(v)}" for k, v in kwargs.items())]) or "nothing"


def count_terms(loader: Iterable[Any], likelihood: Any) -> float:
    """Log-likelihood terms of an epoch: one pass over the targets. `ockham.core.objective.Objective.prepare` does more.

    Raises:
        DataError: the loader is empty.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(17)
        total = sum(float(likelihood.terms(read_batch(raw).target)) for raw in loader)
    if total == 0:
        raise DataError("the training loader is empty: it yields no targets")
    return total
