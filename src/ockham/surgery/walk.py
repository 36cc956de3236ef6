"""Walking an exported graph: one `Call` per node, one rule per op, freezing where there is no rule."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ockham.errors import first_line
from ockham.surgery.labels import (
    KINDS,
    VIEWS,
    Labels,
    Note,
    Site,
    Unread,
    Value,
    argument,
    chunks,
    compressed,
    op_name,
    parameters,
    reduced_axes,
    varying,
)

Values = Value | list[Value]
UNKNOWN = "an op whose meaning for channels is not known"
OperatorRule = Callable[["Call"], Values]


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One op of the graph: its arguments, what is known of its inputs, and where it stands."""

    name: str
    node: fx.Node
    known: Mapping[fx.Node, Values]
    ledger: Labels
    sites: list[Note]

    def get(self, name: str, *otherwise: Any) -> Any:
        """Return an argument by its name in the op's schema: as given, its default, or `otherwise`."""
        return argument(self.node, name, *otherwise)

    def tensor(self, name: str) -> Value | None:
        """Return what is known of a tensor argument, by its name in the schema; None where it was not given."""
        found = self.get(name, None)
        return self._value_of(found) if isinstance(found, fx.Node) else None

    def need(self, *names: str) -> Value:
        """Return what is known of the tensor argument which goes by one of `names`."""
        for name in names:
            found = self.tensor(name)
            if found is not None:
                return found
        raise LookupError(f"no argument {' or '.join(names)}")

    def listed(self, name: str) -> list[Value]:
        """Return what is known of a list of tensors."""
        return [self._value_of(n) for n in self.get(name)]

    def _value_of(self, node: Any) -> Value:
        found = self.known.get(node) if isinstance(node, fx.Node) else None
        return found if isinstance(found, Value) else Value(shapes_of(node.meta["val"]) if _is_tensor(node) else ())

    def tensors(self) -> list[Value]:
        """Return all tensors among the arguments, in the order of the schema, repeated ones repeatedly."""
        names = parameters(self.node.target)
        given = sorted(self.node.kwargs, key=lambda n: names[n][0] if n in names else len(names))
        leaves = pytree.arg_tree_leaves(*self.node.args, *(self.node.kwargs[n] for n in given))
        found = [self.known.get(n) for n in leaves if isinstance(n, fx.Node)]
        return [v for f in found if f is not None for v in (f if isinstance(f, list) else [f])]

    def first(self) -> Value:
        """Return the first tensor among the arguments."""
        return self.tensors()[0]

    def reason(self, text: str) -> str:
        """Say what this op does to the dimensions it touches, and where."""
        return f"{self.name} in {place(self.node)[0] or 'the model'} {text}"

    def shapes(self) -> Any:
        """Return the shape of the result, or a list of shapes for several results."""
        return shapes_of(self.node.meta.get("val"))

    def shape(self) -> tuple[int, ...]:
        """Return the shape of the (first) result."""
        shapes = self.shapes()
        found: tuple[int, ...] = shapes[0] if isinstance(shapes, list) else shapes
        return found

    def shape_of(self, node: Any) -> tuple[int, ...]:
        """Return the shape of an argument."""
        found: tuple[int, ...] = shapes_of(node.meta["val"])
        return found

    def is_mask(self, node: Any) -> bool:
        """Is this argument a tensor of booleans?"""
        return node.meta["val"].dtype in (torch.bool, torch.uint8)

    def like_outputs(self, make: Callable[[tuple[int, ...]], Value]) -> Values:
        """Return `make(shape)` for each result."""
        shapes = self.shapes()
        return [make(s) for s in shapes] if isinstance(shapes, list) else make(shapes)

    def run(self, labels: Tensor) -> Any:
        """Run the op itself with its first tensor argument replaced by `labels`."""
        args = [labels if i == 0 else _plain(a) for i, a in enumerate(self.node.args)]
        return self.node.target(*args, **{k: _plain(v) for k, v in self.node.kwargs.items()})  # type: ignore[operator]

    def note(self, before: Value, after: Values, name: str = "") -> None:
        """Remember an op whose sizes may be written in the model's code, by `name` where it is a special one."""
        path, call = place(self.node)
        self.sites.append(Note(path, name or self.name, before, after, self.node, call))

    def freeze_all(self, why: str) -> Values:
        """Freeze whatever the inputs are made of; the results carry no labels."""
        for value in self.tensors():
            self.ledger.freeze_value(value, self.reason(f"is {why}"))
        return self.like_outputs(Value)


def _plain(arg: Any) -> Any:
    if isinstance(arg, fx.Node):
        return torch.zeros(shapes_of(arg.meta["val"])) if _is_tensor(arg) else _size(arg.meta["val"])
    return [_plain(a) for a in arg] if isinstance(arg, (list, tuple)) else arg


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _size(number: Any) -> int:
    """Return a size; one that depends on the data gets a number of its own, which no other dimension should have."""
    expression = getattr(getattr(number, "node", None), "expr", None)
    unknown = sorted(getattr(expression, "free_symbols", ()), key=str)
    if not unknown:
        return int(number)
    assert expression is not None
    return max(2, int(expression.subs({s: 1009 + 2 * i for i, s in enumerate(unknown)})))


def shapes_of(val: Any) -> Any:
    """Return the shape(s) of a node's example value."""
    if isinstance(val, Tensor):
        return tuple(map(_size, val.shape))
    if isinstance(val, (list, tuple)):
        return [shapes_of(v) for v in val if isinstance(v, Tensor)]
    return ()


def place(node: fx.Node) -> tuple[str, int]:
    """Return the innermost module in whose forward this op stands ("" for the root), and the number of its call."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, _, call = str(stack[-1][0]).partition("@") if stack else ("", "", "")
    return "" if path.startswith("_empty") else path, int(call) if call.isdigit() else 0


@dataclass(frozen=True, slots=True, eq=False)
class Walker:
    """The table of rules and what walking with it writes down."""

    rules: Mapping[str, OperatorRule]
    always: frozenset[str]
    ledger: Labels
    sites: list[Note]

    def walk(self, graph: fx.Graph, known: dict[fx.Node, Values]) -> list[Values]:
        """Apply the rule of every node in order; returns the values of the outputs.

        `known` maps placeholders to values and is filled; an op without a rule freezes what it touches.
        """
        live = _live(graph)
        led = self.ledger
        unread = Unread(led.edges, [], [], [], [], led.consumed, led.made, led.loose, led.touched, led.count)
        for node in graph.nodes:
            if node.op == "call_function":
                known[node] = self._step(node, known, led if node in live else unread)
        ends = pytree.arg_tree_leaves(*next(n for n in graph.nodes if n.op == "output").args)
        return [known.get(n, Value(())) for n in ends if isinstance(n, fx.Node)]

    def _step(self, node: fx.Node, known: dict[fx.Node, Values], ledger: Labels) -> Values:
        if node.target is operator.getitem:
            source, index = node.args
            found = known.get(source) if isinstance(source, fx.Node) else None
            listed = isinstance(found, list) and isinstance(index, int) and index < len(found)
            return found[index] if listed else Value(shapes_of(node.meta.get("val")))  # type: ignore[index]
        call = Call(op_name(node.target), node, known, ledger, self.sites)
        inner = _subgraph(node)
        if inner is not None:
            return self._inline(call, inner)
        bare = call.name.rstrip("_")
        if bare.startswith(("_assert", "sym_", "_check")):
            return Value(())
        if call.name not in self.always and not any(value.factors for value in call.tensors()):
            result = call.like_outputs(Value)
            if bare in KINDS:
                call.note(call.first() if call.tensors() else Value(()), result)
            return result
        rule = self.rules.get(call.name, self.rules.get(bare))
        result = call.freeze_all(UNKNOWN) if rule is None else _applied(rule, call)
        if call.tensors() and all(value.learned for value in call.tensors()):
            values = [replace(v, learned=True) for v in (result if isinstance(result, list) else [result])]
            result = values if isinstance(result, list) else values[0]
        own = self.ledger.touched.setdefault(place(node)[0], {})  # labels met in the forward of this module
        for value in (*call.tensors(), *(result if isinstance(result, list) else [result])):
            own.update({(f.data_ptr(), f.numel(), *f.stride()): f for f in map(torch.flatten, value.factors)})
        if call.name.endswith("_") and not call.name.endswith("__"):
            _taint(node, result, known)
        return result

    def _inline(self, call: Call, inner: fx.Graph) -> Values:
        """Walk a subgraph (autocast and no_grad regions) with the arguments of the call."""
        holes = [n for n in inner.nodes if n.op == "placeholder"]
        tensors = [n for n in call.node.args if isinstance(n, fx.Node) and n.op != "get_attr"]
        if len(holes) != len(tensors):
            return call.freeze_all("a region whose arguments are not known")
        known = {hole: call.known[n] for hole, n in zip(holes, tensors, strict=True) if n in call.known}
        return [v if isinstance(v, Value) else v[0] for v in self.walk(inner, known)]


def _live(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes on which an output depends, or an op that changes a tensor in place."""
    changes = (n for n in graph.nodes if n.op == "call_function" and op_name(n.target).endswith("_"))
    waiting = [next(n for n in graph.nodes if n.op == "output"), *changes]
    found: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def _taint(node: fx.Node, result: Values, known: dict[fx.Node, Values]) -> None:
    """An op in place changed a tensor and what it is a view of: zeros of removed units may be gone there."""
    value = result[0] if isinstance(result, list) else result
    if value.zero:
        return
    source: Any = node.args[0] if node.args else None
    while isinstance(source, fx.Node):
        found = known.get(source)
        if isinstance(found, Value):
            known[source] = replace(found, zero=False)
        inputs = [n for n in pytree.arg_tree_leaves(*source.args) if isinstance(n, fx.Node)]
        viewed = source.op == "call_function" and (op_name(source.target) in VIEWS or source.target is operator.getitem)
        source = inputs[0] if viewed and inputs else None


def _applied(rule: OperatorRule, call: Call) -> Values:
    """Apply a rule; a result that does not fit the op's true shapes means it was not understood: frozen."""
    try:
        result = rule(call)
    except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:
        return call.freeze_all(f"a use of this op that could not be followed ({first_line(error)})")
    values = result if isinstance(result, list) else [result]
    shapes = call.shapes() if isinstance(call.shapes(), list) else [call.shapes()]
    for value, shape in zip(values, shapes, strict=False):
        ranks = all(f.ndim == len(shape) for f in value.factors)
        sized = ranks and all(a in (1, b) for f in value.factors for a, b in zip(f.shape, shape, strict=True))
        if value.shape != shape or not sized:
            return call.freeze_all("a use of this op that could not be followed")
    return result


def _subgraph(node: fx.Node) -> fx.Graph | None:
    """Return the graph of a region (``wrap_with_autocast``, ``wrap_with_set_grad_enabled``), or None."""
    if not op_name(node.target).startswith("wrap_with"):
        return None
    attr = next((n for n in node.args if isinstance(n, fx.Node) and n.op == "get_attr"), None)
    owner = node.graph.owning_module
    if attr is None or owner is None:
        return None
    return owner.get_submodule(str(attr.target)).graph  # type: ignore[return-value]


Maker = Callable[[Note, dict[int, Tensor], Tensor], Site | None]
MAKERS: dict[str, Maker] = {}
"""Kind of a place to what makes its site from a note, the components along its input, and those of all atoms."""


def _makes(*kinds: str) -> Callable[[Maker], Maker]:
    """Enter a function in `MAKERS` for some kinds of places."""

    def enter(maker: Maker) -> Maker:
        MAKERS.update(dict.fromkeys(kinds, maker))
        return maker

    return enter


def settled(notes: list[Note], root: Tensor) -> list[Site]:
    """Return the notes with components instead of atoms, in the order of the graph."""
    found = (MAKERS[KINDS[n.name]](n, _dims(n.before, root), root) for n in notes if n.name in KINDS)
    sites = [site for site in found if site is not None]
    once: dict[bytes, Tensor] = {}  # equal components are one tensor, so that a plan looks at each once
    for labels in (labels for site in sites for labels in (site.before, site.after)):
        labels.update({d: once.setdefault(v.numpy().tobytes(), v) for d, v in labels.items()})
    return sites


@_makes("norm", "grouped", "mean", "centred", "var", "layer_norm", "rms_norm")
def _whole(note: Note, before: dict[int, Tensor], root: Tensor) -> Site:
    """Return the site of an op that counts the elements along some dimensions: only those matter."""
    kind, rank = KINDS[note.name], len(note.before.shape)
    if kind in ("mean", "centred", "var"):
        before = {d: v for d, v in before.items() if d in reduced_axes(note.node, rank)}
    elif kind in ("layer_norm", "rms_norm"):
        before = {d: v for d, v in before.items() if d >= rank - len(argument(note.node, "normalized_shape"))}
    return Site(note.module, kind, note.before.shape, before, (), {}, -1, call=note.call)


@_makes("group_norm")
def _grouped(note: Note, before: dict[int, Tensor], root: Tensor) -> Site:
    shape, sizes = note.before.shape, argument(note.node, "sizes", None)
    groups = int(argument(note.node, "num_groups", 1))
    old = (shape[1] // groups,) * groups if sizes is None else tuple(sizes)
    return Site(note.module, "group_norm", shape, before, old, {}, 1, call=note.call)


@_makes("view", "expand")
def _view(note: Note, before: dict[int, Tensor], root: Tensor) -> Site:
    result, op, shape = _result(note), KINDS[note.name], note.before.shape
    after = _dims(result, root)
    fixed: set[int] = set()
    for ins, outs in chunks(shape, result.shape) if op == "view" and 0 not in shape else ():
        if any(d in before for d in ins) and all(d in before or shape[d] == 1 for d in ins):
            fixed.update(outs)  # no batch is folded into these, so they are known not to change
        elif ins and ins[0] == 0 and 0 not in before and shape[0] > 1 and len(outs) == 1:
            after.pop(outs[0], None)  # a batch is folded into it: its size is no number of the code
    return Site(note.module, op, shape, before, result.shape, after, -1, frozenset(fixed - set(after)), note.call)


def _result(note: Note) -> Value:
    assert isinstance(note.after, Value)
    return note.after


@_makes("factory")
def _factory(note: Note, before: dict[int, Tensor], root: Tensor) -> Site:
    result = _result(note)
    return Site(note.module, "factory", (), {}, result.shape, _dims(result, root), -1, call=note.call)


@_makes("unflatten")
def _unflatten(note: Note, before: dict[int, Tensor], root: Tensor) -> Site:
    rank = len(note.before.shape)
    dim, count = int(argument(note.node, "dim")) % rank, len(argument(note.node, "sizes"))
    old = _result(note).shape[dim : dim + count]
    after = {d - dim: v for d, v in _dims(_result(note), root).items() if dim <= d < dim + count}
    return Site(note.module, "unflatten", note.before.shape, before, old, after, dim, call=note.call)


@_makes("split")
def _split(note: Note, before: dict[int, Tensor], root: Tensor) -> Site | None:
    assert isinstance(note.after, list)
    dim = int(argument(note.node, "dim")) % len(note.before.shape)
    parts = tuple(v.shape[dim] for v in note.after)
    return Site(note.module, "split", note.before.shape, before, parts, {}, dim, call=note.call)


@_makes("slice")
def _slice(note: Note, before: dict[int, Tensor], root: Tensor) -> Site | None:
    shape = note.before.shape
    dim = int(argument(note.node, "dim")) % len(shape)
    start = argument(note.node, "start", 0) or 0
    if argument(note.node, "step", 1) != 1 or not isinstance(start, int):
        return None
    start = max(0, start + shape[dim]) if start < 0 else min(start, shape[dim])
    bounds = (start, start + _result(note).shape[dim])
    return Site(note.module, "slice", shape, before, bounds, {}, dim, call=note.call)


@_makes("pad")
def _pad(note: Note, before: dict[int, Tensor], root: Tensor) -> Site | None:
    """Return the site of a padding of one labelled dimension."""
    pads, shape = list(argument(note.node, "pad")), note.before.shape
    for dim, roots in _dims(_result(note), root).items():
        i = 2 * (len(shape) - 1 - dim)
        if i < len(pads) and dim in before and (pads[i] or pads[i + 1]):
            left, right = int(pads[i]), int(pads[i + 1])
            ends = {k: v for k, v in ((0, roots[:left]), (1, roots[roots.numel() - right :])) if v.numel()}
            return Site(note.module, "pad", shape, before, (left, right), ends, dim, call=note.call)
    return None


def _dims(value: Value, root: Tensor) -> dict[int, Tensor]:
    """Return the components along each dimension on which the (settled) labels of a value depend."""
    found: dict[int, Tensor] = {}
    for factor in value.factors:
        mapped = compressed(torch.where(factor >= 0, root[factor.clamp(min=0)], factor))
        if len(varying(mapped)) == 1:
            found[varying(mapped)[0]] = mapped.flatten()
    return found
