"""Which dimensions of a network live and die together: `trace`."""

from __future__ import annotations

import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ockham.errors import TraceError
from ockham.surgery.cloning import canonical_names, clone, named_tensors
from ockham.surgery.groups import Axis, Group, Groups, build, plan_masks
from ockham.surgery.labels import Edit, Ledger, Note, Value, along, settle, settled
from ockham.surgery.ops import ALWAYS, RULES
from ockham.surgery.resizing import refit
from ockham.surgery.walk import Result, Walker, shapes_of

__all__ = []

Ignore = Iterable[str | type[nn.Module]]


def as_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments of a model call: a tensor, a tuple or list, or a mapping of names."""
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def trace(model: nn.Module, example_inputs: Any, *, ignore: Ignore = ()) -> Groups:
    """Find the structures of `model` that can be removed, and say why the others cannot.

    The model is exported with fake tensors (nothing is computed, `model` is left as it is), in evaluation mode; every
    dimension of every parameter is followed through the graph by rules for known ops. An op without a rule freezes
    the dimensions that touch it.

    Args:
        model: any module `torch.export` can trace.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments; only shapes and dtypes matter.
        ignore: what stays whole: names of modules or parameters, ``"re:..."`` patterns on names, or module types.

    Returns:
        The groups; ``.frozen`` maps (tensor, dimension) to a reason.

    Raises:
        TraceError: when the model cannot be exported (control flow that depends on data, inputs that do not fit).
    """
    program = _export(model, example_inputs)
    program.graph.eliminate_dead_code()
    ledger = Ledger()
    axes, placed = _axes(model, ledger)
    known = _placeholders(model, program, placed)
    notes: list[Note] = []
    outputs = Walker(RULES, ALWAYS, ledger, notes).walk(program.graph, known)
    _freeze_ends(outputs, ledger)
    _freeze_ignored(model, axes, ledger, ignore)
    _freeze_strangers(program, axes, ledger, model)
    groups = _grouped(model, axes, ledger, notes)
    return checked(model, groups, as_arguments(example_inputs), expected=_output_shapes(program))


def _grouped(model: nn.Module, axes: list[Axis], ledger: Ledger, notes: list[Note]) -> Groups:
    count = ledger.count[0]
    root = settle(ledger, count)
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
    sites = tuple(settled(notes, root))
    return replace(groups, sites=sites, heads=sites, spared=tuple(names))


def _marked(lists: list[Tensor], count: int) -> Tensor:
    """Return a boolean over atoms, True for those in `lists`."""
    marked = torch.zeros(count, dtype=torch.bool)
    for atoms in lists:
        marked[atoms[atoms >= 0]] = True
    return marked


def _export(model: nn.Module, example_inputs: Any) -> torch.export.ExportedProgram:
    args, kwargs = as_arguments(example_inputs)
    twin = clone(model, lambda _, t: _alias(t)).eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(twin, args, kwargs, strict=False)
    except Exception as error:
        text = str(error).strip().splitlines()
        raise TraceError(
            f"{type(model).__name__} cannot be traced: {text[0] if text else type(error).__name__}. "
            "Likely causes: example inputs that do not fit the model, or control flow that depends on the data. "
            "Way out: pass inputs the model accepts, trace the traceable submodules on their own, or use masks only."
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _alias(tensor: Tensor) -> Tensor:
    """Return a tensor on the same memory (nothing is copied; tracing writes nothing)."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
    return tensor.detach()


def _axes(model: nn.Module, ledger: Ledger) -> tuple[list[Axis], dict[str, Value]]:
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
        values[name] = Value(tuple(tensor.shape), tuple(factors), zero=True, learned=True)
    return axes, values


def _placeholders(
    model: nn.Module, program: torch.export.ExportedProgram, placed: dict[str, Value]
) -> dict[torch.fx.Node, Result]:
    signature = program.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    every = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    names = canonical_names(model)
    known: dict[torch.fx.Node, Result] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            target = held.get(node.name)
            tensor = every.get(target) if target is not None else None
            known[node] = placed[names[id(tensor)]] if tensor is not None else _unlabelled(node)
    return known


def _unlabelled(node: torch.fx.Node) -> Value:
    shape = shapes_of(node.meta.get("val"))
    return Value(shape if isinstance(shape, tuple) else ())


def _output_shapes(program: torch.export.ExportedProgram) -> list[tuple[int, ...]]:
    """Return the shapes of what the model returns."""
    wanted = program.graph_signature.user_outputs
    nodes = {n.name: n for n in program.graph.nodes}
    shapes = [shapes_of(nodes[n].meta.get("val")) for n in wanted if isinstance(n, str) and n in nodes]
    return [s for s in shapes if isinstance(s, tuple)]


def _freeze_ends(outputs: list[Result], ledger: Ledger) -> None:
    for result in outputs:
        for value in result if isinstance(result, list) else [result]:
            ledger.freeze_value(value, "is an output of the network")


def _freeze_ignored(model: nn.Module, axes: list[Axis], ledger: Ledger, ignore: Ignore) -> None:
    wanted = [ignore] if isinstance(ignore, (str, type)) else list(ignore)
    types = tuple(w for w in wanted if isinstance(w, type))
    prefixes = [w for w in wanted if isinstance(w, str) and not w.startswith("re:")]
    prefixes += [name for name, module in model.named_modules() if types and isinstance(module, types)]
    patterns = [re.compile(w[3:]) for w in wanted if isinstance(w, str) and w.startswith("re:")]
    unknown = [p for p in prefixes if p and not any(a.name == p or a.name.startswith(p + ".") for a in axes)]
    known = {name for name, _ in model.named_modules()}
    if any(p not in known for p in unknown):
        raise TraceError(f"ignore names {unknown}, which the model does not have; see model.named_parameters()")
    for axis in axes:
        named = any(axis.name == p or axis.name.startswith(p + ".") or p == "" for p in prefixes)
        if named or any(p.search(axis.name) for p in patterns):
            ledger.freeze(torch.arange(axis.start, axis.start + axis.size), "is named in ignore")


def _freeze_strangers(
    program: torch.export.ExportedProgram, axes: list[Axis], ledger: Ledger, model: nn.Module
) -> None:
    """Freeze tensors which the traced graph never reads: nothing is known of their meaning."""
    signature = program.graph_signature
    used = {n.name for n in program.graph.nodes if n.op == "placeholder" and n.users}
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    every = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    names = canonical_names(model)
    read = {names[id(every[target])] for node, target in held.items() if node in used}
    for axis in axes:
        if axis.name not in read:
            ledger.freeze(torch.arange(axis.start, axis.start + axis.size), "is not used in the traced forward")


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Shapes = list[tuple[int, ...]]


def checked(model: nn.Module, groups: Groups, arguments: Arguments, *, expected: Shapes) -> Groups:
    """Return `groups` without those at whose smaller sizes the forward fails, and only the sites that are needed.

    `expected` holds the shapes of the model's outputs, which no removal may change.
    """
    seen: list[Edit] = []
    if not len(groups):
        return replace(groups, sites=())
    problem = attempt(model, groups, arguments, expected=expected, seen=seen)
    if problem is not None:
        groups = _without_bad(model, groups, arguments, expected=expected)
        seen = []
        problem = attempt(model, groups, arguments, expected=expected, seen=seen)
        if problem is not None:
            groups = _frozen(groups, dict.fromkeys(groups.groups, problem))
    needed = {e.module for e in seen}
    return replace(groups, sites=tuple(s for s in groups.sites if s.module in needed))


def _without_bad(model: nn.Module, groups: Groups, arguments: Arguments, *, expected: Shapes) -> Groups:
    """Try kinds of layers one by one (layers whose names differ by a number together)."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for key in groups.groups:
        kinds[re.sub(r"\d+", "N", key)].append(key)
    bad = {}
    for keys in kinds.values():
        problem = attempt(model, _only(groups, keys), arguments, expected=expected)
        if problem is not None:
            bad.update(dict.fromkeys(keys, problem))
    return _frozen(groups, bad)


def _only(groups: Groups, keys: list[str]) -> Groups:
    return replace(groups, groups={k: groups[k] for k in keys})


def _frozen(groups: Groups, bad: dict[str, str]) -> Groups:
    frozen = dict(groups.frozen)
    for key, problem in bad.items():
        for member in groups[key].members:
            frozen.setdefault(
                (member.name, member.dim), f"cannot shrink: the forward fails at another size ({problem})"
            )
    return replace(groups, groups={k: g for k, g in groups.groups.items() if k not in bad}, frozen=frozen)


def attempt(
    model: nn.Module, groups: Groups, arguments: Arguments, *, expected: Shapes, seen: list[Edit] | None = None
) -> str | None:
    """Remove one unit of each group and run on fake tensors; returns what goes wrong, or None."""
    trial = plan_masks(groups, {g.id: _all_but_one(g) for g in groups})
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = pytree.tree_map_only(Tensor, fake.from_tensor, arguments)
    loud = logging.getLogger("torch._subclasses.fake_tensor")
    quiet, loud.disabled = loud.disabled, True
    try:
        with fake, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            small = clone(model, lambda n, t: _fake(t, trial.shape(n), fake))
            refit(model, small, trial, seen=seen)
            after = _run(small, args, kwargs)
    except Exception as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    finally:
        loud.disabled = quiet
    return None if expected == after else f"the output has sizes {after} instead of {expected}"


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[int, ...]]:
    out = model.eval()(*args, **kwargs)
    return [tuple(t.shape) for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]


def _fake(tensor: Tensor, shape: tuple[int, ...], fake: FakeTensorMode) -> Tensor:
    with fake:
        new = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def _all_but_one(group: Group) -> Tensor:
    keep = torch.ones(group.size, dtype=torch.bool)
    keep[group.size // 2] = False
    return keep
