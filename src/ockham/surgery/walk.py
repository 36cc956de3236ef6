"""Walking an exported graph: one `Call` per node, one rule per op, freezing where there is no rule."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ockham.surgery.labels import KINDS, VIEWS, Labels, Note, Unread, Value, argument, op_name

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
        schema = getattr(self.node.target, "_schema", None)
        names = [a.name for a in schema.arguments] if schema is not None else []
        given = sorted(self.node.kwargs, key=lambda n: names.index(n) if n in names else len(names))
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
        own = self.ledger.touched.setdefault(place(node)[0], [])  # labels met in the forward of this module
        for value in (*call.tensors(), *(result if isinstance(result, list) else [result])):
            own.extend(f.flatten() for f in value.factors)
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
        return call.freeze_all(f"a use of this op that could not be followed ({str(error).splitlines()[0]})")
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
