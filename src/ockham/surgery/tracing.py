"""Tracing: the groups of units that a walk through the network finds, and their trial by values."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ockham.core.batch import Batch
from ockham.core.network import Ignore, check_network, ignored
from ockham.errors import OckhamError, OckhamWarning, TraceError, first_line
from ockham.surgery.copies import (
    Arguments,
    Caches,
    Gradless,
    as_arguments,
    canonical_names,
    clone,
    difference,
    emptied,
    first_different,
    named_tensors,
    outputs,
    place_of_failure,
    refilled,
    still,
    tensors_of,
    to_double,
    trial_masks,
)
from ockham.surgery.groups import Axis, Group, Groups, Plan, build, plan_masks, random_plan
from ockham.surgery.labels import Labels, Note, Value, along, settle_labels
from ockham.surgery.ops import ALWAYS, RULES
from ockham.surgery.refitting import refit, shapes_without_values
from ockham.surgery.resizing import Branch, plain_norms
from ockham.surgery.shrinking import masked_copy, slice_tensor
from ockham.surgery.streams import expert_groups, residual_branches
from ockham.surgery.walk import Values, Walker, settled, shapes_of

Keep = dict[str, Tensor]
LARGEST_TRIAL = 2**28
"""Number of parameters up to which values are compared; three copies in float64 are made."""
LARGEST_INPUT = 2**19
"""Number of input values up to which the trial runs with one example more, too."""


@dataclass(frozen=True, slots=True)
class TrialProblem:
    """What goes wrong without some units: a reason for people, and the path of the module where it shows."""

    reason: str
    path: str


class TrialPair(ABC):
    """A way to find out whether a plan would leave the right network."""

    @abstractmethod
    def problem(self, plan: Plan) -> TrialProblem | None:
        """Return what goes wrong with this plan, or None."""


@dataclass(frozen=True, slots=True, eq=False)
class ByValues(TrialPair):
    """Masked and shrunk copies of a network with random weights are run and compared.

    Attributes:
        model: network with the values to try.
        arguments: arguments of a call.
        modes: modes in which it runs with nothing removed: False evaluation, True training.
        tolerance: largest difference that counts as equal.
        more: arguments of a call with another number of examples, if the network takes them.
    """

    model: nn.Module
    arguments: Arguments
    modes: tuple[bool, ...]
    tolerance: float
    more: Arguments | None = None

    def problem(self, plan: Plan) -> TrialProblem | None:
        """Return the first difference between masked and shrunk outputs."""
        masked = masked_copy(self.model, plan)
        small = clone(self.model, lambda n, t: slice_tensor(plan, n, t))
        try:
            refit(self.model, small, plan)
            for training in self.modes:
                found = self._compared(masked.train(training), small.train(training), self.arguments)
                if found is not None:
                    return found
            return None if self.more is None else self._compared(masked.eval(), small.eval(), self.more)
        except Exception as error:
            with still(small):
                return TrialProblem(
                    f"the forward fails at another size ({first_line(error)})", place_of_failure(small, self.arguments)
                )

    def _compared(self, masked: nn.Module, small: nn.Module, arguments: Arguments) -> TrialProblem | None:
        with still(small):  # first: where it fails, the other need not run
            found = outputs(small, arguments)
        with still(masked):
            gap = difference(outputs(masked, arguments), found)
        if gap <= self.tolerance:
            return None
        with still(masked), still(small):
            where = first_different(masked, small, arguments, self.tolerance)
        said = f", first in {where[0]!r}" if where is not None else ""
        mode = " in training mode" if small.training else ""
        return TrialProblem(
            f"the smaller network computes something else{mode} (by {gap:.1e}{said})", where[0] if where else ""
        )


@dataclass(frozen=True, slots=True, eq=False)
class ByShapes(TrialPair):
    """The shrunk network runs on tensors without values; its outputs must keep their sizes.

    Attributes:
        model: the network.
        arguments: arguments of a call.
        nothing: plan that removes nothing; it runs only where another plan goes wrong, to see whose fault that is.
        sizes: those of the outputs in the traced graph.
        whole: whether it runs on the device `meta` (or needs fake tensors), and its outputs' sizes, once asked.
    """

    model: nn.Module
    arguments: Arguments
    nothing: Plan
    sizes: list[tuple[int, ...]]
    whole: list[tuple[bool, list[tuple[int, ...]] | None]] = field(default_factory=list, init=False)

    def problem(self, plan: Plan) -> TrialProblem | None:
        """Return why the shrunk network does not run, or what is wrong with its outputs' sizes."""
        if not self.whole:
            with contextlib.suppress(Exception):
                if shapes_without_values(self.model, self.arguments, plan, bare=True) == self.sizes:
                    return None
            for bare in (True, False):
                with contextlib.suppress(Exception):
                    sizes = shapes_without_values(self.model, self.arguments, self.nothing, bare=bare)
                    self.whole.append((bare, sizes))
                    break
            else:
                self.whole.append((False, None))
        bare, expected = self.whole[0]
        if expected is None:  # not even the network as it is can be tried
            return None
        try:
            found = shapes_without_values(self.model, self.arguments, plan, bare=bare)
        except Exception as error:
            return TrialProblem(f"the forward fails at another size ({first_line(error)})", "")
        if found == expected:
            return None
        return TrialProblem(f"the forward fails at another size (outputs of sizes {found} instead of {expected})", "")


def prepared(model: nn.Module, groups: Groups, arguments: Arguments, sizes: list[tuple[int, ...]]) -> TrialPair:
    """Return a trial of `model`, which succeeds with nothing removed; its outputs have these sizes."""
    held = named_tensors(model).values()
    if sum(t.numel() for t in held) > LARGEST_TRIAL or any(t.is_meta for t in held):
        return ByShapes(model, arguments, plan_masks(groups, {}), sizes)
    unsteady: list[TrialPair] = []
    for twin, given, tolerance in _twins(model, groups, arguments):
        pair = clone(twin, lambda _, t: t.detach().clone()), _rounded(twin)  # a forward may leave tensors behind
        noise, more = _noise(*pair, given), _other_batch(given)
        if noise is None:
            continue
        training = _noise(*pair, given, training=True)
        blown = training is None or training > max(noise, tolerance / 100)  # copies differ by some 50 times that
        more = more if more and _noise(*pair, more) is not None else None
        trial = ByValues(twin, given, (False,) if blown else (False, True), tolerance, more)
        if noise <= tolerance / 10:
            return trial
        unsteady.append(trial)
    return unsteady[0] if unsteady else ByShapes(model, arguments, plan_masks(groups, {}), sizes)


def _rounded(model: nn.Module) -> nn.Module:
    """Return a copy with every weight rounded anew."""
    generator = torch.Generator().manual_seed(0)

    def rounded(_: str, tensor: Tensor) -> Tensor:
        own = tensor.detach().clone()
        if not own.is_floating_point():
            return own
        noise = torch.randn(own.shape, generator=generator).to(own)
        return own * (1 + 2 * torch.finfo(own.dtype).eps * noise)

    copy: nn.Module = clone(model, rounded)
    return copy


def _noise(one: nn.Module, other: nn.Module, arguments: Arguments, *, training: bool = False) -> float | None:
    """Return how far apart rounding moves the outputs; None if the network does not run or returns nothing finite.

    Layers that blow small differences up (hundreds of batch norms which use the batch's statistics) leave nothing to
    compare: the masked and the shrunk network round their sums in another order.
    """
    runs = []
    try:
        for model in (one.train(training), other.train(training)):
            with still(model):
                runs.append(outputs(model, arguments))
    except Exception:
        return None
    return difference(*runs) if all(bool(t.isfinite().any()) for t in runs[0] if t.numel()) else None


def _other_batch(arguments: Arguments) -> Arguments | None:
    """Return arguments with the first example twice: no number of examples may stand in the plan.

    Of large inputs only the first example is taken, and of a single large one nothing: memory would double.
    """
    found = [t for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor) and t.ndim]
    sizes = {t.shape[0] for t in found}
    large = sum(t.numel() for t in found) > LARGEST_INPUT
    if len(sizes) != 1 or sizes == {0} or (large and sizes == {1}):
        return None
    result: Arguments = pytree.tree_map_only(
        Tensor, lambda t: t if not t.ndim else t[:1] if large else torch.cat([t, t[:1]]), arguments
    )
    return result


def _twins(model: nn.Module, groups: Groups, arguments: Arguments) -> Iterator[tuple[nn.Module, Arguments, float]]:
    """Yield copies to try, the most telling ones first: random weights before its own, float64 before its own dtype."""
    generator = torch.Generator().manual_seed(0)

    def perturbed(_: str, tensor: Tensor) -> Tensor:
        own = tensor.detach().clone()
        if not tensor.is_floating_point() or not isinstance(tensor, nn.Parameter):
            return own
        return own * (1 + 0.2 * torch.randn(tensor.shape, generator=generator).to(tensor))

    for values in (lambda n, t: _random(n, t, generator), perturbed):
        for double in (True, False):
            twin = clone(model, values)
            for path, names in groups.caches.items():
                for name in names:
                    getattr(twin.get_submodule(path), name).clear()
            if double:
                yield twin.double(), to_double(arguments), 3e-5
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
        fan = math.prod(tensor.shape[1:]) if tensor.ndim == 2 or kernel else tensor.shape[-1]
        noise = noise * 1.3 / max(1, fan) ** 0.5
    elif "bias" in leaf or leaf == "running_mean":
        noise = 0.3 * noise
    else:
        noise = torch.rand(tensor.shape, generator=generator) + 0.5
    return noise.to(tensor)


def tried(groups: Groups, trial: TrialPair, touching: Mapping[str, Collection[str]]) -> Groups:
    """Return `groups` without those whose removal leaves another function, each with the reason.

    Attributes that count heads are corrected, or left alone where only that is right.

    Args:
        groups: what the graph says can be removed.
        trial: what finds the problems.
        touching: path of a module to the groups whose units occur in its forward.
    """
    if not len(groups):
        return groups
    masks = trial_masks({group.id: group.size for group in groups})
    search = _Search(trial, touching, masks if isinstance(trial, ByValues) else masks[::2])
    bare = replace(groups, heads=())
    for variant in (groups, bare):
        if search.problem(variant, list(variant.groups)) is None:
            return variant
    found = [search.without_guilty(variant) for variant in (groups, bare)]
    return max(found, key=lambda g: sum(group.size for group in g))


def _with_experts(groups: Groups, found: list[Group], trial: TrialPair) -> Groups:
    """Return the groups with those of experts without which the network is one whose routers never choose them."""
    for group in found:
        frozen = {key: why for key, why in groups.frozen.items() if key not in {(m.name, m.dim) for m in group.members}}
        own = torch.arange(group.size) - (1 + group.size) * (1 + len(groups))  # no component of the trace
        more = {"groups": {**groups.groups, group.id: group}, "units": {**groups.units, group.id: own}}
        trying = replace(groups, frozen=frozen, **more)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(0)
        plans = [random_plan(trying, ratio, generator=generator) for ratio in (0.0, 0.3, 0.6)]
        order = torch.randperm(group.size, generator=generator)
        plans[0] = plan_masks(trying, {group.id: order < group.least})
        if group.id not in groups.groups and all(trial.problem(plan) is None for plan in plans):
            groups = trying
    return groups


def _proved(groups: Groups, found: Mapping[str, Branch], trial: TrialPair) -> dict[str, Branch]:
    """Return the branches without which the network computes what it does with zeros in their weights."""

    def works(keys: Collection[str]) -> bool:
        some, gone = replace(groups, branches=found), dict.fromkeys(keys, torch.tensor([False]))
        few = {g.id: torch.arange(g.size) % 3 > 0 for g in groups}  # units beside them, too
        return all(trial.problem(plan_masks(some, {**units, **gone})) is None for units in ({}, few))

    left = list(found)
    halves = (left, left[::2], left[1::2])
    if not all(works(half) for half in halves if half):
        left = [key for key in left if works([key])]
        if not works(left):
            left = []
    return {key: found[key] for key in left}


@dataclass(frozen=True, slots=True, eq=False)
class _Search:
    """Which groups are to blame."""

    trial: TrialPair
    touching: Mapping[str, Collection[str]]
    masks: list[Keep]

    def problem(self, groups: Groups, keys: list[str]) -> TrialProblem | None:
        """Return what goes wrong when only the groups in `keys` lose units."""
        return next(filter(None, (self._with(keep, groups, keys) for keep in self.masks)), None)

    def _with(self, keep: Keep, groups: Groups, keys: list[str]) -> TrialProblem | None:
        return self.trial.problem(plan_masks(groups, {k: keep[k] for k in keys}))

    def without_guilty(self, groups: Groups) -> Groups:
        """Freeze groups until nothing goes wrong; those that go wrong alone first, at the place where it shows."""
        bad: dict[str, TrialProblem] = {}
        before = -1
        while before != len(bad):  # what one of the masks freezes is one more network for the others
            before = len(bad)
            for keep in self.masks:
                while left := [k for k in groups.groups if k not in bad]:
                    problem = self._with(keep, groups, left)
                    if problem is None:
                        break
                    here = self.touching.get(problem.path, ())
                    suspects = [k for k in left if k in here]
                    found = self._alone(keep, groups, suspects) if 0 < len(suspects) < len(left) else {}
                    bad |= found or self._alone(keep, groups, left) or self._together(keep, groups, left, suspects)
        frozen = dict(groups.frozen)
        for key, found_problem in bad.items():
            for member in groups[key].members:
                frozen.setdefault((member.name, member.dim), f"cannot shrink: {found_problem.reason}")
        return replace(groups, groups={k: g for k, g in groups.groups.items() if k not in bad}, frozen=frozen)

    def _alone(self, keep: Keep, groups: Groups, keys: list[str]) -> dict[str, TrialProblem]:
        """Return the groups of `keys` which go wrong on their own, by halving."""
        problem = self._with(keep, groups, keys)
        if problem is None or len(keys) == 1:
            return {} if problem is None else {keys[0]: problem}
        half = len(keys) // 2
        return self._alone(keep, groups, keys[:half]) | self._alone(keep, groups, keys[half:])

    def _together(self, keep: Keep, groups: Groups, keys: list[str], last: list[str]) -> dict[str, TrialProblem]:
        """Return the groups which go wrong with those before them; suspects are asked last."""
        kept: list[str] = []
        bad: dict[str, TrialProblem] = {}
        for key in [*(k for k in keys if k not in last), *last]:
            problem = self._with(keep, groups, [*kept, key])
            if problem is None:
                kept.append(key)
            else:
                bad[key] = problem
        return bad


def trace(model: nn.Module, example_inputs: Any, *, ignore: Ignore = (), whole: Collection[str] = ()) -> Groups:
    """Find the structures of `model` that can be removed, and say why the others cannot.

    The model is exported with fake tensors in evaluation mode (and in training mode where parts of it run only there);
    every dimension of every parameter is followed through the graph by rules for known ops. An op without a rule
    freezes the dimensions that touch it. Then copies with random weights lose some units of every group, and what
    would not compute the masked network is frozen, too. `model` is left as it is.

    Args:
        model: any module `torch.export` can trace.
        example_inputs: a tensor, a tuple of arguments (or a named one), or a dict of keyword arguments. The trial runs
            on them some thirty times in float64, so a small batch of short texts or small images is enough.
        ignore: what stays whole: names of modules or parameters, ``"re:..."`` patterns on names of parameters, module
            types, modules, or parameters.
        whole: what may go as a whole, too: "branches", residual ones (x + branch(x)), which ``.branches`` has, and
            "experts" of which a router chooses ``top_k`` and which are held in batched tensors.

    Returns:
        The groups; ``.frozen`` maps (tensor, dimension) to a reason.

    Raises:
        TraceError: when the model cannot be exported (control flow that depends on data, inputs that do not fit).
        OckhamError: when an entry of `ignore` matches nothing, `whole` asks for something else, or the network cannot
            be worked with (see `ockham.core.network.check_network`).
    """
    if isinstance(whole, str) or set(whole) - {"branches", "experts"}:
        raise OckhamError(f"whole is a collection of 'branches' and 'experts'; got {whole!r}")
    check_network(model, meta=True, values=False)
    arguments = as_arguments(model, example_inputs)
    if Batch(*arguments).packed:
        raise TraceError(
            f"{type(model).__name__} cannot be traced with a PackedSequence, whose lengths decide all shapes. Way out: "
            "trace the parts that take tensors on their own, or remove single weights only"
        )
    held = ignored(model, ignore, buffers=True)
    caches = refilled(model, arguments)
    ledger = Labels()
    axes, placed = _axes(model, ledger)
    notes: list[Note] = []
    program = _export(model, arguments, caches, training=False)
    read = _walk(model, program, ledger, notes, placed)
    passing = {name for module in model.modules() for name in module._non_persistent_buffers_set}
    if any(axis.name not in read and axis.name.rpartition(".")[2] not in passing for axis in axes):  # in training only?
        with contextlib.suppress(TraceError):
            read |= _walk(model, _export(model, arguments, caches, training=True), ledger, notes, placed)
    for axis in axes:
        atoms = torch.arange(axis.start, axis.start + axis.size)
        if axis.name in held:
            ledger.freeze(atoms, "is named in ignore")
        elif axis.name not in read:
            ledger.freeze(atoms, "is not used in the traced forward")
    groups, touching = _grouped(model, axes, ledger, notes)
    groups = replace(groups, caches=caches, arguments=arguments)
    ends = pytree.arg_tree_leaves(*next(iter(reversed(program.graph.nodes))).args)
    sizes = [shapes_of(node.meta.get("val")) for node in ends if isinstance(node, fx.Node)]
    trial = prepared(model, groups, arguments, sizes) if len(groups) or whole else None
    groups = tried(groups, trial, touching) if trial and len(groups) else groups
    if isinstance(trial, ByValues) and "experts" in whole:
        experts = [g for g in expert_groups(model, groups.shapes) if not held & g.shapes.keys()]
        groups = _with_experts(groups, experts, trial)
    if isinstance(trial, ByValues) and "branches" in whole:
        found = residual_branches(model, program.graph, arguments)
        free = {key: b for key, b in found.items() if not held & {*b.parameters, *b.buffers}}
        groups = replace(groups, branches=_proved(groups, free, trial))
    if not len(groups) and not groups.branches:
        first = next((f"{name}, dimension {dim}: {why}" for (name, dim), why in groups.frozen.items()), "no parameters")
        warnings.warn(f"nothing of this network can be removed; {first}", OckhamWarning, stacklevel=2)
    return groups


def _walk(
    model: nn.Module,
    program: torch.export.ExportedProgram,
    ledger: Labels,
    notes: list[Note],
    placed: dict[str, Value],
) -> set[str]:
    """Follow the labels through one graph; returns the tensors it reads."""
    signature = program.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    every = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    names = canonical_names(model)
    known: dict[fx.Node, Values] = {}
    read = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            target = held.get(node.name)
            tensor = every.get(target) if target is not None else None
            if tensor is None:
                shape = shapes_of(node.meta.get("val"))
                known[node] = Value(shape if isinstance(shape, tuple) else ())
                continue
            known[node] = placed[names[id(tensor)]]
            if node.users:
                read.add(names[id(tensor)])
    try:
        results = Walker(RULES, ALWAYS, ledger, notes).walk(program.graph, known)
    except torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode as error:
        raise TraceError(
            "the network makes tensors whose size depends on the data, and does something with that size that cannot "
            "be followed. Way out: trace the part before it on its own, or use masks only."
        ) from error
    for result in results:
        for value in result if isinstance(result, list) else [result]:
            ledger.freeze_value(value, "is an output of the network")
    return read


def _grouped(
    model: nn.Module, axes: list[Axis], ledger: Labels, notes: list[Note]
) -> tuple[Groups, dict[str, set[str]]]:
    """Return the groups, and for each module those whose units occur in its forward."""
    count = ledger.count[0]
    root = settle_labels(ledger, count)
    shapes = {name: tuple(t.shape) for name, t in named_tensors(model).items()}
    groups = build(
        axes,
        root,
        frozen=ledger.frozen,
        consumed=_marked(ledger.consumed, count),
        made=_marked(ledger.made, count),
        shapes=shapes,
    )
    spared = _marked(ledger.spared, count)
    names = dict.fromkeys(a.name for a in axes if bool(spared[a.start]))
    sites = tuple(  # layers of torch make tensors by their attributes, which are corrected (`refitting.py`)
        site
        for site in settled(notes, root)
        if site.op != "factory" or not type(model.get_submodule(site.module)).__module__.startswith("torch.nn.")
    )
    number = torch.full((count,), -1)
    keys = list(groups.groups)
    for i, key in enumerate(keys):
        number[groups.units[key]] = i
    number = number[root]
    touching = {}
    for path, found in ledger.touched.items():
        met = torch.zeros(len(keys) + 1, dtype=torch.bool)  # the last one: of no group
        for atoms in found.values():
            met[number[atoms[atoms >= 0]]] = True
        touching[path] = {keys[i] for i in met[:-1].nonzero().flatten().tolist()}
    return replace(groups, sites=sites, heads=sites, spared=tuple(names)), touching


def _marked(lists: list[Tensor], count: int) -> Tensor:
    """Return a boolean over atoms, True for those in `lists`."""
    marked = torch.zeros(count, dtype=torch.bool)
    for atoms in lists:
        marked[atoms[atoms >= 0]] = True
    return marked


def _export(model: nn.Module, arguments: Arguments, caches: Caches, *, training: bool) -> torch.export.ExportedProgram:
    twin = clone(model, lambda _, t: t.detach()).train(training)  # on the same memory: tracing writes nothing
    emptied(twin, caches)
    forward = twin.forward

    @functools.wraps(forward)
    def told(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        with Gradless():
            return tuple(tensors_of(forward(*args, **kwargs)))

    twin.forward = told
    fast, silent = torch.backends.mha.get_fastpath_enabled(), getattr(fx.config, "do_not_emit_stack_traces", False)
    torch.backends.mha.set_fastpath_enabled(False)
    fx.config.do_not_emit_stack_traces = True  # nobody reads them, and they take a tenth of the time
    try:
        with warnings.catch_warnings(), torch.no_grad(), plain_norms(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            with _without_code():
                return torch.export.export(twin, *arguments, strict=False)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be traced: {first_line(error)}. "
            "Likely causes: example inputs that do not fit the model, or control flow that depends on the data. "
            "Way out: pass inputs the model accepts, trace the traceable submodules on their own, or use masks only."
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        fx.config.do_not_emit_stack_traces = silent


def _without_code() -> contextlib.AbstractContextManager[None]:
    """Return a context where graphs are not written as Python, which nobody runs: a fifth of the time of an export."""
    try:
        from torch.fx._lazy_graph_module import _use_lazy_graph_module
    except ImportError:  # a torch that always writes it, or no longer does
        return contextlib.nullcontext()
    return _use_lazy_graph_module(True)


def _axes(model: nn.Module, ledger: Labels) -> tuple[list[Axis], dict[str, Value]]:
    """Give atoms to every dimension of every floating-point tensor of the model."""
    axes, values = [], {}
    for name, tensor in named_tensors(model).items():
        factors = []
        learned = isinstance(tensor, nn.Parameter)
        for dim, size in enumerate(tensor.shape if tensor.is_floating_point() else ()):
            if size > 1:
                atoms = ledger.atoms(size)
                axes.append(Axis(name, dim, int(atoms[0]), size, learned))
                factors.append(along(atoms, tensor.ndim, dim))
        values[name] = Value(tuple(tensor.shape), tuple(factors), zero=learned, learned=True)
    return axes, values
