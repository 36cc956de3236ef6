"""A trial before anything is promised: does the smaller network run, and does it compute the masked one?

A copy with random weights (in float64, biases, scales and statistics of norms random too) loses some units of every
group, unevenly; masked and shrunk copies are compared in evaluation and in training mode. What goes wrong only
*because* something was removed is frozen, group by group; a network that cannot be tried as it is (on the ``meta``
device, or too large to be copied) is tried by its shapes alone.
"""

from __future__ import annotations

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ockham.surgery.cloning import clone, named_tensors
from ockham.surgery.comparing import (
    Arguments,
    difference,
    first_different,
    outputs,
    place_of_failure,
    still,
    tensors_of,
    to_double,
)
from ockham.surgery.groups import Group, Groups, Plan, plan_masks
from ockham.surgery.refitting import refit
from ockham.surgery.shrinking import masked_tensor, slice_tensor

Keep = dict[str, Tensor]
LARGEST = 2**28
"""Number of parameters up to which values are compared; three copies in float64 are made."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What goes wrong without some units: a reason for people, and the path of the module where it shows."""

    reason: str
    path: str


class Trial(ABC):
    """A way to find out whether a plan would leave the right network."""

    @abstractmethod
    def problem(self, plan: Plan) -> Problem | None:
        """Return what goes wrong with this plan, or None."""


@dataclass(frozen=True, slots=True, eq=False)
class ByValues(Trial):
    """Masked and shrunk copies of a network with random weights are run and compared.

    Attributes:
        model: network with the values to try.
        arguments: of a call.
        modes: in which it runs with nothing removed: False evaluation, True training.
        tolerance: largest difference that counts as equal.
    """

    model: nn.Module
    arguments: Arguments
    modes: tuple[bool, ...]
    tolerance: float

    def problem(self, plan: Plan) -> Problem | None:
        """Return the first difference between masked and shrunk outputs."""
        learned = {name for name, _ in self.model.named_parameters()} - set(plan.spared)
        masked = clone(self.model, lambda n, t: masked_tensor(plan, n, t) if n in learned else t.detach().clone())
        small = clone(self.model, lambda n, t: slice_tensor(plan, n, t))
        try:
            refit(self.model, small, plan)
            for training in self.modes:
                found = self._compared(masked.train(training), small.train(training))
                if found is not None:
                    return found
        except Exception as error:
            with still(small):
                return Problem(
                    f"the forward fails at another size ({_said(error)})", place_of_failure(small, self.arguments)
                )
        return None

    def _compared(self, masked: nn.Module, small: nn.Module) -> Problem | None:
        with still(masked):
            expected = outputs(masked, self.arguments)
        with still(small):
            gap = difference(expected, outputs(small, self.arguments))
        if gap <= self.tolerance:
            return None
        with still(masked), still(small):
            where = first_different(masked, small, self.arguments, self.tolerance)
        said = f", first in {where[0]!r}" if where is not None else ""
        mode = " in training mode" if small.training else ""
        return Problem(
            f"the smaller network computes something else{mode} (by {gap:.1e}{said})", where[0] if where else ""
        )


@dataclass(frozen=True, slots=True, eq=False)
class ByShapes(Trial):
    """The shrunk network runs on tensors without values; its outputs must keep their sizes.

    Attributes:
        model: the network.
        arguments: of a call.
        expected: sizes of the outputs with nothing removed; None where even that cannot be tried.
    """

    model: nn.Module
    arguments: Arguments
    expected: list[tuple[int, ...]] | None

    def problem(self, plan: Plan) -> Problem | None:
        """Return why the shrunk network does not run, or what is wrong with its outputs' sizes."""
        if self.expected is None:
            return None
        try:
            found = shapes_without_values(self.model, self.arguments, plan)
        except Exception as error:
            return Problem(f"the forward fails at another size ({_said(error)})", "")
        if found == self.expected:
            return None
        return Problem(f"the forward fails at another size (outputs of sizes {found} instead of {self.expected})", "")


def _said(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shapes_without_values(model: nn.Module, arguments: Arguments, plan: Plan) -> list[tuple[int, ...]]:
    """Return the sizes of the outputs of the shrunk network, run on fake tensors."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = pytree.tree_map_only(Tensor, fake.from_tensor, arguments)
    loud = logging.getLogger("torch._subclasses.fake_tensor")
    quiet, loud.disabled = loud.disabled, True

    def empty(name: str, tensor: Tensor) -> Tensor:
        with fake:
            new = torch.empty(plan.shape(name), dtype=tensor.dtype, device=tensor.device)
        return nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new

    try:
        small = clone(model, empty, others=fake.from_tensor)
        with fake, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            refit(model, small, plan)
            return [tuple(t.shape) for t in tensors_of(small.eval()(*args, **kwargs))]
    finally:
        loud.disabled = quiet


def prepared(model: nn.Module, groups: Groups, arguments: Arguments) -> Trial:
    """Return a trial of `model` which succeeds with nothing removed."""
    held = named_tensors(model).values()
    if sum(t.numel() for t in held) <= LARGEST and not any(t.is_meta for t in held):
        for twin, given, tolerance in _twins(model, groups, arguments):
            try:
                run = clone(twin, lambda _, t: t.detach().clone()).eval()  # a forward may leave tensors behind
                with still(run):
                    first = outputs(run, given)
            except Exception:
                continue
            if all(bool(t.isfinite().any()) for t in first if t.numel()):
                return ByValues(twin, given, (False, True) if _trains(twin, given) else (False,), tolerance)
    try:
        expected: Any = shapes_without_values(model, arguments, plan_masks(groups, {}))
    except Exception:
        expected = None
    return ByShapes(model, arguments, expected)


def _trains(twin: nn.Module, arguments: Arguments) -> bool:
    """Does the network run in training mode, too?"""
    trained = clone(twin, lambda _, t: t.detach().clone()).train()
    try:
        with still(trained):
            outputs(trained, arguments)
    except Exception:
        return False
    return True


def _twins(model: nn.Module, groups: Groups, arguments: Arguments) -> Iterator[tuple[nn.Module, Arguments, float]]:
    """Yield copies to try, the most telling ones first: random weights before its own, float64 before its own dtype."""
    generator = torch.Generator().manual_seed(0)
    for values in (_random, _perturbed):
        for double in (True, False):
            twin = clone(model, lambda n, t, values=values: values(n, t, generator))  # type: ignore[misc]
            for path, names in groups.caches.items():
                for name in names:
                    getattr(twin.get_submodule(path), name).clear()
            if double:
                yield twin.double(), to_double(arguments), 1e-6
            else:
                yield twin, arguments, 1e-3


def _random(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return values which let every op matter: attention scores around one, scales and biases far from their start."""
    leaf = name.rpartition(".")[2]
    if not tensor.is_floating_point() or not (
        isinstance(tensor, nn.Parameter) or leaf in ("running_mean", "running_var")
    ):
        return tensor.detach().clone()
    noise = torch.randn(tensor.shape, generator=generator)
    if tensor.ndim >= 2:
        kernel = tensor.ndim > 2 and tensor.shape[-1] <= 11
        fan = tensor[0].numel() if tensor.ndim == 2 or kernel else tensor.shape[-1]
        noise = noise * 1.3 / max(1, fan) ** 0.5
    elif "bias" in leaf or leaf == "running_mean":
        noise = 0.3 * noise
    else:
        noise = torch.rand(tensor.shape, generator=generator) + 0.5
    return noise.to(tensor)


def _perturbed(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return the model's own values with a little noise."""
    if not tensor.is_floating_point() or not isinstance(tensor, nn.Parameter):
        return tensor.detach().clone()
    noise = torch.randn(tensor.shape, generator=generator).to(tensor)
    return tensor.detach() * (1 + 0.2 * noise)


def tried(groups: Groups, trial: Trial, touching: Mapping[str, Collection[str]]) -> Groups:
    """Return `groups` without those whose removal leaves another function, each with the reason.

    Attributes that count heads are corrected, or left alone where only that is right.

    Args:
        groups: what the graph says can be removed.
        trial: what finds the problems.
        touching: path of a module to the groups whose units occur in its forward.
    """
    if not len(groups):
        return groups
    search = _Search(trial, touching, _trial_masks(groups))
    bare = replace(groups, heads=())
    for variant in (groups, bare):
        if search.problem(variant, list(variant.groups)) is None:
            return variant
    found = [search.without_guilty(variant) for variant in (groups, bare)]
    return max(found, key=lambda g: sum(group.size for group in g))


def _trial_masks(groups: Groups) -> list[Keep]:
    """Return masks of two kinds: every group loses a share of its own; all groups lose equally many, others each."""
    generator = torch.Generator().manual_seed(0)
    uneven, alike = {}, {}
    for group in groups:
        share = 0.2 + 0.5 * float(torch.rand((), generator=generator))
        uneven[group.id] = _mask(group, round(share * group.size), generator)
        alike[group.id] = _mask(group, round(0.35 * group.size), generator)
    return [uneven, alike]


def _mask(group: Group, count: int, generator: torch.Generator) -> Tensor:
    keep = torch.ones(group.size, dtype=torch.bool)
    keep[torch.randperm(group.size, generator=generator)[: min(max(count, 1), group.size - 1)]] = False
    return keep


@dataclass(frozen=True, slots=True, eq=False)
class _Search:
    """Which groups are to blame."""

    trial: Trial
    touching: Mapping[str, Collection[str]]
    masks: list[Keep]

    def problem(self, groups: Groups, keys: list[str]) -> Problem | None:
        """Return what goes wrong when only the groups in `keys` lose units."""
        for keep in self.masks:
            plan = plan_masks(groups, {k: keep[k] for k in keys})
            found = self.trial.problem(plan)
            if found is not None:
                return found
        return None

    def without_guilty(self, groups: Groups) -> Groups:
        """Freeze groups until nothing goes wrong; those that go wrong alone first, at the place where it shows."""
        bad: dict[str, Problem] = {}
        while left := [k for k in groups.groups if k not in bad]:
            problem = self.problem(groups, left)
            if problem is None:
                break
            here = self.touching.get(problem.path, ())
            suspects = [k for k in left if k in here]
            found = self._alone(groups, suspects) if 0 < len(suspects) < len(left) else {}
            bad |= found or self._alone(groups, left) or self._together(groups, left, suspects)
        return _frozen(groups, bad)

    def _alone(self, groups: Groups, keys: list[str]) -> dict[str, Problem]:
        """Return the groups of `keys` which go wrong on their own, by halving."""
        problem = self.problem(groups, keys)
        if problem is None or len(keys) == 1:
            return {} if problem is None else {keys[0]: problem}
        half = len(keys) // 2
        return self._alone(groups, keys[:half]) | self._alone(groups, keys[half:])

    def _together(self, groups: Groups, keys: list[str], last: list[str]) -> dict[str, Problem]:
        """Return the groups which go wrong with those before them; suspects are asked last."""
        kept: list[str] = []
        bad: dict[str, Problem] = {}
        for key in [*(k for k in keys if k not in last), *last]:
            problem = self.problem(groups, [*kept, key])
            if problem is None:
                kept.append(key)
            else:
                bad[key] = problem
        return bad


def _frozen(groups: Groups, bad: Mapping[str, Problem]) -> Groups:
    frozen = dict(groups.frozen)
    for key, problem in bad.items():
        for member in groups[key].members:
            frozen.setdefault((member.name, member.dim), f"cannot shrink: {problem.reason}")
    return replace(groups, groups={k: g for k, g in groups.groups.items() if k not in bad}, frozen=frozen)
