"""Multiplicative log-normal noise on the structures of a network: parameters, draws, KL and the hooks that apply them.

A gate is the factor theta = e^y of one structure, with a posterior over y
(`ockham.methods.gates.lognormal`). It multiplies
what *reads* the structure: the input of every layer that has the structure among its columns. So all readers of a
residual stream share one gate, theta = 0 is the network without the structure, and E[theta] folds into the columns
without a rest, whatever norm or activation lies between. `GateNoise` knows no graph: which position of which layer
belongs to which gate is given to it (`ockham.attach_gates` asks the tracer).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ockham.errors import OckhamError
from ockham.methods.gates import lognormal

__all__ = [
    "GateNoise",
    "Reader",
    "detach",
    "per_element",
    "per_example",
]

_LOG_STD_RANGE = (-20.0, 5.0)
_UNGATED = -1


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """Positions of one layer's weight that read gated structures.

    Attributes:
        module: path of the module that owns the weight.
        weight: name of the parameter in it.
        dim: dimension of the weight whose indices are the positions.
        axis: dimension of the module's input with the same positions; None: the weight is multiplied instead, by one
            draw for the whole batch (modules that are not called, such as the output projection of
            `torch.nn.MultiheadAttention`).
        gates: [size of the dimension], number of the gate at each position, -1 for none.
    """

    module: str
    weight: str
    dim: int
    axis: int | None
    gates: Tensor


GateDraw = Callable[["GateNoise", Tensor, int, int], Tensor]
"""(gates, input, axis of it, number of the reader) to the input times theta."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where the positions of a reader stand in a row of drawn gates: a run, each gate ``repeat`` times, or any order.

    ``index`` counts living gates first, then a 0 for removed ones and a 1 for positions without a gate. Rows are
    split at the ends of all runs, once for all readers, since the derivative of every slice is as wide as the row.
    """

    start: int
    count: int
    repeat: int
    index: Tensor | None


class GateNoise(nn.Module):
    """All gates of one network: one vector of means and one of ln standard deviations, initial values 0 and -5.

    In training mode each forward of the network draws theta anew, in evaluation mode it multiplies by E[theta]
    (``gates.train()`` in a network that is in evaluation mode: predictions with drawn gates). Removed gates are
    exactly zero, draw no noise, pay no KL.

    Args:
        count: number of gates.
        readers: weights whose inputs they multiply.
        noise: `per_example` (the model) or `per_element` (the released code of BMRS).
        low: lower end of ln theta.
        high: upper end.
        generator: source of the noise; None is torch's global one, as for dropout.
    """

    mean: Tensor
    log_std: Tensor
    keep: Tensor
    key: Tensor

    def __init__(
        self,
        count: int,
        readers: Sequence[Reader],
        *,
        noise: GateDraw,
        low: float = lognormal.LOW,
        high: float = lognormal.HIGH,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.low, self.high, self.noise, self.generator = low, high, noise, generator
        self.mean = nn.Parameter(torch.zeros(count))
        self.log_std = nn.Parameter(torch.full((count,), -5.0))
        self.register_buffer("keep", torch.ones(count, dtype=torch.bool))
        # Keys never change, so that readers find their gates also after both were sliced by surgery.
        self.register_buffer("key", torch.arange(count))
        self.readers = tuple((r.module, r.weight, r.dim, r.axis) for r in readers)
        for i, reader in enumerate(readers):
            self.register_buffer(f"reader_{i}", reader.gates.clone())
        self._draws: dict[int, tuple[Tensor, tuple[Tensor, ...]]] | None = None
        self._cache: tuple[Any, Tensor | None, list[Place], list[int]] | None = None
        self._swapped: list[tuple[nn.Module, str, nn.Parameter]] = []

    @property
    def std(self) -> Tensor:
        """Standard deviations of the uncut normal, ln std cut off to [-20, 5]."""
        return self.log_std.clamp(*_LOG_STD_RANGE).exp()

    def positions(self, reader: int) -> Tensor:
        """Keys of the gates at the positions of a reader, -1 for none."""
        found: Tensor = getattr(self, f"reader_{reader}")
        return found

    def indices(self, keys: Tensor) -> Tensor:
        """Places in `mean` of gates given by key."""
        return torch.searchsorted(self.key, keys.contiguous())

    def forward(self, x: Any) -> Any:
        """The identity: a `torch.nn.Sequential` calls all its children, the gates among them."""
        return x

    # ------------------------------------------------------------------ scores
    def kl(self) -> Tensor:
        """Sum of the KL divergences of the living gates from their priors, nats, a scalar."""
        mean, std = self._living()
        return lognormal.kl(mean, std, low=self.low, high=self.high).sum()

    @torch.no_grad()
    def expected(self) -> Tensor:
        """E[theta], 0 where removed; no gradient."""
        found = lognormal.moment(self.mean, self.std, 1, low=self.low, high=self.high)
        return torch.where(self.keep, found, 0.0)

    def remove(self, keep: Tensor) -> int:
        """Remove, for good, the gates where ``keep`` is False; returns how many of them were alive.

        Raises:
            OckhamError: ``keep`` is not boolean or has another shape.
        """
        if keep.dtype is not torch.bool or keep.shape != self.keep.shape:
            raise OckhamError(f"keep must be boolean of shape {tuple(self.keep.shape)}; got {keep.dtype} {keep.shape}")
        gone = int((self.keep & ~keep.to(self.keep.device)).sum())
        self.keep &= keep.to(self.keep.device)
        return gone

    # ------------------------------------------------------------------ draws
    def place(self, reader: int) -> Place:
        """Where the positions of a reader stand among the living gates."""
        found: Place = self._layout()[1][reader]
        return found

    def _layout(self) -> tuple[Tensor | None, list[Place], list[int]]:
        """Living gates (None: all of them), places, ends of their runs; anew when gates were removed or moved."""
        stamp = (id(self.keep), self.keep._version, self.keep.numel())
        if self._cache is None or self._cache[0] != stamp:
            alive, total = None if bool(self.keep.all()) else self.keep.nonzero().squeeze(1), int(self.keep.sum())
            rank, places = torch.where(self.keep, self.keep.cumsum(0) - 1, total), []
            for reader in range(len(self.readers)):
                keys = self.positions(reader)
                index = torch.where(keys != _UNGATED, rank[self.indices(keys.clamp_min(0))], total + 1)
                start, count = int(index[0]), int(index[-1] - index[0]) + 1
                repeat = index.numel() // count if count > 0 else 0
                run = torch.arange(start, start + count, device=index.device) if count > 0 else index[:0]
                in_order = int(index.max()) < total and torch.equal(run.repeat_interleave(max(1, repeat)), index)
                places.append(Place(start, count, repeat, None) if in_order else Place(0, 0, 0, index))
            runs = [p for p in places if p.index is None]
            ends = sorted({0, total, *(end for p in runs for end in (p.start, p.start + p.count))})
            self._cache = (stamp, alive, places, ends)
        return self._cache[1:]

    def _living(self) -> tuple[Tensor, Tensor]:
        """Means and stds of the living gates."""
        alive = self._layout()[0]
        return (self.mean, self.std) if alive is None else (self.mean[alive], self.std[alive])

    def draw(self, rows: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Theta of the living gates for a number of examples [rows, gates], and the same split at the ends of runs.

        One row, E[theta], in evaluation mode. Within one forward of the network every reader gets the same.
        """
        rows = rows if self.training else 1
        if self._draws is not None and rows in self._draws:
            return self._draws[rows]
        if self.training:
            mean, std = self._living()
            uniform = torch.rand(rows, mean.numel(), generator=self.generator, device=mean.device, dtype=mean.dtype)
            theta = lognormal.sample(mean, std, uniform, low=self.low, high=self.high)
        else:
            theta = self.expected()[self.keep].unsqueeze(0)
        ends = self._layout()[2]
        found = theta, theta.split([b - a for a, b in itertools.pairwise(ends)], 1)
        if self._draws is not None:
            self._draws[rows] = found
        return found

    def theta(self, rows: int, place: Place) -> Tensor:
        """Theta at the positions of a reader, [rows, positions]; with a run, [rows, gates of the run]."""
        theta, pieces = self.draw(rows)
        if place.index is None:
            ends = self._layout()[2]
            first, last = ends.index(place.start), ends.index(place.start + place.count)
            return pieces[first] if last == first + 1 else theta.narrow(1, place.start, place.count)
        zero, one = theta.new_zeros(theta.shape[0], 1), theta.new_ones(theta.shape[0], 1)
        return torch.cat([theta, zero, one], 1).index_select(1, place.index)

    # ------------------------------------------------------------------ one forward of the network
    def begin(self, model: nn.Module) -> None:
        """Forget the last draws; multiply the weights of readers that are not called."""
        self.end()
        self._draws = {}
        for i, (path, name, dim, axis) in enumerate(self.readers):
            if axis is None:
                module = model.get_submodule(path)
                weight = module._parameters[name]
                assert weight is not None
                self._swapped.append((module, name, weight))
                place = self.place(i)
                theta = self.theta(1, place)[0].repeat_interleave(max(1, place.repeat))
                module._parameters[name] = weight * _along(theta, weight.ndim, dim)  # type: ignore[assignment]

    def end(self) -> None:
        """Put everything back."""
        self._draws = None
        while self._swapped:
            module, name, weight = self._swapped.pop()
            module._parameters[name] = weight

    @torch.no_grad()
    def fold_(self, model: nn.Module) -> None:
        """Multiply E[theta] into the weights of all readers, in place, and take the gates out of the model."""
        expected = torch.cat([self.expected(), self.mean.new_ones(1)])
        done: set[int] = set()
        for i, (path, name, dim, _) in enumerate(self.readers):
            weight = model.get_submodule(path).get_parameter(name)
            keys = self.positions(i)
            index = torch.where(keys == _UNGATED, self.key.numel(), self.indices(keys.clamp_min(0)))
            if id(weight) not in done:
                weight.mul_(_along(expected[index].to(weight.dtype), weight.ndim, dim))
            done.add(id(weight))
        detach(model, self)

    def attach(self, model: nn.Module, name: str) -> None:
        """Become a submodule of the model, and hook its layers."""
        model.add_module(name, self)
        model.register_forward_pre_hook(_Begin(self))
        model.register_forward_hook(_End(self), always_call=True)
        for i, (path, _, _, axis) in enumerate(self.readers):
            if axis is not None:
                model.get_submodule(path).register_forward_pre_hook(_InputGate(self, i, axis), with_kwargs=True)


def per_example(gates: GateNoise, x: Tensor, axis: int, reader: int) -> Tensor:
    """One draw per example (row of the first dimension) and structure: the model of the paper."""
    axis %= x.ndim
    place = gates.place(reader)
    theta = gates.theta(x.shape[0] if axis else 1, place).to(x.dtype)
    if place.index is None and place.repeat > 1:
        split: Tensor = x.unflatten(axis, (place.count, place.repeat))
        gated: Tensor = split * _rows(theta, split.ndim, axis)
        return gated.flatten(axis, axis + 1)
    return x * _rows(theta, x.ndim, axis)


def _rows(theta: Tensor, rank: int, axis: int) -> Tensor:
    shape = [1] * rank
    shape[0], shape[axis] = theta.shape[0], theta.shape[1]
    return theta.view(shape)


def per_element(gates: GateNoise, x: Tensor, axis: int, reader: int) -> Tensor:
    """One draw per element of the activation: what the released code of BMRS does; several times the cost."""
    if not gates.training:
        return per_example(gates, x, axis, reader)
    keys = gates.positions(reader)
    gated = keys != _UNGATED
    index = torch.where(gated, gates.indices(keys.clamp_min(0)), 0)
    mean, std = (_along(v[index], x.ndim, axis) for v in (gates.mean, gates.std))
    uniform = torch.rand(x.shape, generator=gates.generator, device=x.device, dtype=gates.mean.dtype)
    theta = lognormal.sample(mean, std, uniform, low=gates.low, high=gates.high)
    stays = torch.where(_along(gates.keep[index], x.ndim, axis), theta, 0.0)
    return x * torch.where(_along(gated, x.ndim, axis), stays, 1.0).to(x.dtype)


def _along(values: Tensor, rank: int, dim: int) -> Tensor:
    shape = [1] * rank
    shape[dim % rank] = values.numel()
    return values.view(shape)


@dataclass(eq=False)
class _InputGate:
    """Forward pre-hook of a reader."""

    gates: GateNoise
    reader: int
    axis: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = None if args else next(iter(kwargs))
        x = args[0] if name is None else kwargs[name]
        gated = self.gates.noise(self.gates, x, self.axis, self.reader)
        return ((gated, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: gated})


@dataclass(eq=False)
class _Begin:
    gates: GateNoise

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.gates.begin(module)


@dataclass(eq=False)
class _End:
    gates: GateNoise

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.gates.end()


def detach(model: nn.Module, gates: GateNoise) -> None:
    """Take hooks and parameters of the gates out of the model; its weights stay as they are."""
    gates.end()
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in list(hooks.items()):
                if isinstance(hook, (_InputGate, _Begin, _End)) and hook.gates is gates:
                    del hooks[number]
                    module._forward_hooks_always_called.pop(number, None)
                    module._forward_pre_hooks_with_kwargs.pop(number, None)
    for name, child in list(model.named_children()):
        if child is gates:
            delattr(model, name)
