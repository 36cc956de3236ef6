"""Which dimensions of a network live and die together: `trace`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ockham.core.names import Ignore, ignored
from ockham.errors import OckhamWarning, TraceError
from ockham.surgery.cloning import caches_of, canonical_names, clone, named_tensors
from ockham.surgery.comparing import Arguments, as_arguments, difference, outputs, still, tensors_of
from ockham.surgery.groups import Axis, Groups, build
from ockham.surgery.labels import Ledger, Note, Value, along, settle, settled
from ockham.surgery.ops import ALWAYS, RULES
from ockham.surgery.resizing import plain_norms
from ockham.surgery.trial import prepared, tried
from ockham.surgery.walk import Result, Walker, shapes_of

Caches = Mapping[str, tuple[str, ...]]


def trace(model: nn.Module, example_inputs: Any, *, ignore: Ignore = ()) -> Groups:
    """Find the structures of `model` that can be removed, and say why the others cannot.

    The model is exported with fake tensors in evaluation mode (and in training mode where parts of it run only there);
    every dimension of every parameter is followed through the graph by rules for known ops. An op without a rule
    freezes the dimensions that touch it. Then copies with random weights lose some units of every group, and what
    would not compute the masked network is frozen, too. `model` is left as it is.

    Args:
        model: any module `torch.export` can trace.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments; the trial runs on them.
        ignore: what stays whole: names of modules or parameters, ``"re:..."`` patterns on names of parameters, module
            types, modules, or parameters.

    Returns:
        The groups; ``.frozen`` maps (tensor, dimension) to a reason.

    Raises:
        TraceError: when the model cannot be exported (control flow that depends on data, inputs that do not fit).
        OckhamError: when an entry of `ignore` matches nothing.
    """
    arguments = as_arguments(example_inputs)
    held = ignored(model, ignore, buffers=True)
    caches = _refilled(model, arguments)
    ledger = Ledger()
    axes, placed = _axes(model, ledger)
    notes: list[Note] = []
    program = _export(model, arguments, caches, training=False)
    read = _walk(model, program, ledger, notes, placed)
    if any(axis.name not in read for axis in axes):
        read |= _also_training(model, arguments, caches, ledger, notes, placed)
    for axis in axes:
        atoms = torch.arange(axis.start, axis.start + axis.size)
        if axis.name in held:
            ledger.freeze(atoms, "is named in ignore")
        elif axis.name not in read:
            ledger.freeze(atoms, "is not used in the traced forward")
    groups, touching = _grouped(model, axes, ledger, notes)
    groups = replace(groups, caches=caches)
    groups = tried(groups, prepared(model, groups, arguments), touching) if len(groups) else groups
    if not len(groups):
        first = next((f"{name}, dimension {dim}: {why}" for (name, dim), why in groups.frozen.items()), "no parameters")
        warnings.warn(f"nothing of this network can be removed; {first}", OckhamWarning, stacklevel=2)
    return groups


def _walk(
    model: nn.Module,
    program: torch.export.ExportedProgram,
    ledger: Ledger,
    notes: list[Note],
    placed: dict[str, Value],
) -> set[str]:
    """Follow the labels through one graph; returns the tensors it reads."""
    signature = program.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    every = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    names = canonical_names(model)
    known: dict[fx.Node, Result] = {}
    read = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            target = held.get(node.name)
            tensor = every.get(target) if target is not None else None
            known[node] = placed[names[id(tensor)]] if tensor is not None else _unlabelled(node)
            if tensor is not None and node.users:
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


def _also_training(
    model: nn.Module,
    arguments: Arguments,
    caches: Caches,
    ledger: Ledger,
    notes: list[Note],
    placed: dict[str, Value],
) -> set[str]:
    """Follow the graph in training mode, too: some parameters are used only there."""
    try:
        program = _export(model, arguments, caches, training=True)
    except TraceError:
        return set()
    return _walk(model, program, ledger, notes, placed)


def _grouped(
    model: nn.Module, axes: list[Axis], ledger: Ledger, notes: list[Note]
) -> tuple[Groups, dict[str, set[str]]]:
    """Return the groups, and for each module those whose units occur in its forward."""
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
    number = torch.full((count,), -1)
    keys = list(groups.groups)
    for i, key in enumerate(keys):
        number[groups.units[key]] = i
    touching = {}
    for path, found in ledger.touched.items():
        atoms = torch.cat(found) if found else torch.empty(0, dtype=torch.long)
        touching[path] = {keys[i] for i in torch.unique(number[root[atoms[atoms >= 0]]]).tolist() if i >= 0}
    return replace(groups, sites=sites, heads=sites, spared=tuple(names)), touching


def _marked(lists: list[Tensor], count: int) -> Tensor:
    """Return a boolean over atoms, True for those in `lists`."""
    marked = torch.zeros(count, dtype=torch.bool)
    for atoms in lists:
        marked[atoms[atoms >= 0]] = True
    return marked


def _refilled(model: nn.Module, arguments: Arguments) -> Caches:
    """Return the attributes with tensors of a forward which the network fills again when they are empty."""
    if any(p.is_meta for p in model.parameters()):
        return {}
    held = caches_of(model)

    def run(empty: bool) -> tuple[list[Tensor], nn.Module]:
        twin = clone(model, lambda _, t: t.detach().clone()).eval()
        if empty:
            _emptied(twin, held)
        with still(twin):
            return outputs(twin, arguments), twin

    try:
        out, after = run(True)
        if not held or difference(out, run(False)[0]) <= 1e-4:
            return {
                path: tuple(dict.fromkeys([*held.get(path, ()), *names])) for path, names in caches_of(after).items()
            }
    except Exception:  # it does not run without them: they are no caches
        return {}
    return {}


def _emptied(model: nn.Module, caches: Caches) -> None:
    for path, names in caches.items():
        for name in names:
            getattr(model.get_submodule(path), name).clear()


def _export(model: nn.Module, arguments: Arguments, caches: Caches, *, training: bool) -> torch.export.ExportedProgram:
    twin = clone(model, lambda _, t: _alias(t)).train(training)
    _emptied(twin, caches)
    forward = twin.forward
    twin.forward = functools.wraps(forward)(lambda *args, **kwargs: tuple(tensors_of(forward(*args, **kwargs))))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.no_grad(), plain_norms(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            return torch.export.export(twin, *arguments, strict=False)
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


def _unlabelled(node: fx.Node) -> Value:
    shape = shapes_of(node.meta.get("val"))
    return Value(shape if isinstance(shape, tuple) else ())
