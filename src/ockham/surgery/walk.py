"""Walking an exported graph: one `Call` per node, one rule per op, freezing where there is no rule."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ockham.surgery.labels import Ledger, Note, Value

Result = Value | list[Value]
UNKNOWN = "an op whose meaning for channels is not known"
Rule = Callable[["Call"], Result]


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One op of the graph: its arguments, what is known of its inputs, and where it stands."""

    name: str
    node: fx.Node
    known: Mapping[fx.Node, Result]
    ledger: Ledger
    sites: list[Note]

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of the op."""
        return self.node.args

    def arg(self, index: int, name: str, default: Any) -> Any:
        """Return an argument by position or name."""
        if index < len(self.node.args):
            return self.node.args[index]
        return self.node.kwargs.get(name, default)

    def optional(self, index: int, name: str) -> Value | None:
        """Return a tensor argument that may be None."""
        found = self.arg(index, name, None)
        return self._value_of(found) if isinstance(found, fx.Node) else None

    def value(self, index: int) -> Value:
        """Return a tensor argument."""
        return self._value_of(self.node.args[index])

    def values(self, index: int) -> list[Value]:
        """Return a list of tensors."""
        return [self._value_of(n) for n in self.node.args[index]]  # type: ignore[union-attr]

    def _value_of(self, node: Any) -> Value:
        found = self.known.get(node) if isinstance(node, fx.Node) else None
        return found if isinstance(found, Value) else Value(())

    def tensors(self) -> list[Value]:
        """Return all tensors among the arguments, in order, repeated ones repeatedly."""
        nodes = [n for n in pytree.arg_tree_leaves(*self.node.args, **self.node.kwargs) if isinstance(n, fx.Node)]
        found = [self.known.get(n) for n in nodes]
        return [v for f in found if f is not None for v in (f if isinstance(f, list) else [f])]

    def operands(self) -> int:
        """Return the number of positional arguments."""
        return len(self.node.args)

    def floor_above_zero(self) -> bool:
        """Is this a clamp whose bounds exclude zero?"""
        return self.name == "clamp_min" and float(self.arg(1, "min", 0) or 0) > 0

    def reason(self, text: str) -> str:
        """Say what this op does to the dimensions it touches, and where."""
        return f"{self.name} in {place(self.node) or 'the model'} {text}"

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
        return tuple(int(n) for n in node.meta["val"].shape)

    def is_mask(self, node: Any) -> bool:
        """Is this argument a tensor of booleans?"""
        return node.meta["val"].dtype in (torch.bool, torch.uint8)

    def like_outputs(self, make: Callable[[tuple[int, ...]], Value]) -> Result:
        """Return `make(shape)` for each result."""
        shapes = self.shapes()
        return [make(s) for s in shapes] if isinstance(shapes, list) else make(shapes)

    def run(self, labels: Tensor) -> Any:
        """Run the op itself with its first tensor argument replaced by `labels`."""
        if self.name in ("view", "_unsafe_view", "reshape", "reshape_as", "view_as"):
            return labels.reshape(self.shape())
        args = [labels if i == 0 else _plain(a) for i, a in enumerate(self.node.args)]
        return self.node.target(*args, **{k: _plain(v) for k, v in self.node.kwargs.items()})  # type: ignore[operator]

    def note(self, before: Value, after: Result) -> None:
        """Remember an op whose sizes may be written in the model's code."""
        if before.factors:
            self.sites.append(Note(place(self.node), self.name, before, after, self.node))

    def freeze_all(self, why: str) -> Result:
        """Freeze whatever the inputs are made of; the results carry no labels."""
        for value in self.tensors():
            self.ledger.freeze_value(value, self.reason(f"is {why}"))
        return self.like_outputs(Value)


def _plain(arg: Any) -> Any:
    if isinstance(arg, fx.Node):
        return torch.zeros(tuple(int(n) for n in arg.meta["val"].shape)) if _is_tensor(arg) else int(arg.meta["val"])
    return [_plain(a) for a in arg] if isinstance(arg, (list, tuple)) else arg


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def shapes_of(val: Any) -> Any:
    """Return the shape(s) of a node's example value."""
    if isinstance(val, Tensor):
        return tuple(int(n) for n in val.shape)
    if isinstance(val, (list, tuple)):
        return [shapes_of(v) for v in val if isinstance(v, Tensor)]
    return ()


def place(node: fx.Node) -> str:
    """Return the path of the innermost module in whose forward this op stands ("" for the root)."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return "" if path.startswith("_empty") else path.split("@")[0]


@dataclass(frozen=True, slots=True, eq=False)
class Walker:
    """The table of rules and what walking with it writes down."""

    rules: Mapping[str, Rule]
    always: frozenset[str]
    ledger: Ledger
    sites: list[Note]

    def walk(self, graph: fx.Graph, known: dict[fx.Node, Result]) -> list[Result]:
        """Apply the rule of every node in order; returns the values of the outputs.

        `known` maps placeholders to values and is filled; an op without a rule freezes what it touches.
        """
        for node in graph.nodes:
            if node.op == "call_function":
                known[node] = self._step(node, known)
        ends = pytree.arg_tree_leaves(*next(n for n in graph.nodes if n.op == "output").args)
        return [known.get(n, Value(())) for n in ends if isinstance(n, fx.Node)]

    def _step(self, node: fx.Node, known: dict[fx.Node, Result]) -> Result:
        if node.target is operator.getitem:
            return _item(node, known)
        call = Call(op_name(node.target), node, known, self.ledger, self.sites)
        inner = _subgraph(node)
        if inner is not None:
            return self._inline(call, inner)
        if call.name not in self.always and not any(value.factors for value in call.tensors()):
            return call.like_outputs(Value)
        if call.name.startswith(("_assert", "sym_", "_check")):
            return Value(())
        rule = self.rules.get(call.name, self.rules.get(call.name.rstrip("_")))
        if rule is None:
            return call.freeze_all(UNKNOWN)
        result = _applied(rule, call)
        made_of_weights = all(value.learned for value in call.tensors())
        return _learned(result) if made_of_weights and call.tensors() else result

    def _inline(self, call: Call, inner: fx.Graph) -> Result:
        """Walk a subgraph (autocast and no_grad regions) with the arguments of the call."""
        holes = [n for n in inner.nodes if n.op == "placeholder"]
        tensors = [n for n in call.node.args if isinstance(n, fx.Node) and n.op != "get_attr"]
        if len(holes) != len(tensors):
            return call.freeze_all("a region whose arguments are not known")
        known = {hole: call.known[n] for hole, n in zip(holes, tensors, strict=True) if n in call.known}
        return [v if isinstance(v, Value) else v[0] for v in self.walk(inner, known)]


def _item(node: fx.Node, known: Mapping[fx.Node, Result]) -> Result:
    """Return one of several results."""
    source, index = node.args
    found = known.get(source) if isinstance(source, fx.Node) else None
    if isinstance(found, list) and isinstance(index, int) and index < len(found):
        return found[index]
    return Value(shapes_of(node.meta.get("val")))


def _learned(result: Result) -> Result:
    if isinstance(result, list):
        return [replace(value, learned=True) for value in result]
    return replace(result, learned=True)


def _applied(rule: Rule, call: Call) -> Result:
    """Apply a rule; a result that does not fit the op's true shapes means it was not understood: frozen."""
    try:
        result = rule(call)
    except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:
        return call.freeze_all(f"a use of this op that could not be followed ({str(error).splitlines()[0]})")
    values = result if isinstance(result, list) else [result]
    shapes = call.shapes() if isinstance(call.shapes(), list) else [call.shapes()]
    if all(_fits(value, shape) for value, shape in zip(values, shapes, strict=False)):
        return result
    return call.freeze_all("a use of this op that could not be followed")


def _fits(value: Value, shape: tuple[int, ...]) -> bool:
    return value.shape == shape and all(
        f.ndim == len(shape) and all(a in (1, b) for a, b in zip(f.shape, shape, strict=True)) for f in value.factors
    )


def op_name(target: Any) -> str:
    """Return the bare name of an op: ``aten::conv2d`` is "conv2d"; other callables their own name."""
    schema = getattr(target, "_schema", None)
    return schema.name.split("::")[1] if schema is not None else str(getattr(target, "__name__", target))


def _subgraph(node: fx.Node) -> fx.Graph | None:
    """Return the graph of a region (``wrap_with_autocast``, ``wrap_with_set_grad_enabled``), or None."""
    if not op_name(node.target).startswith("wrap_with"):
        return None
    attr = next((n for n in node.args if isinstance(n, fx.Node) and n.op == "get_attr"), None)
    owner = node.graph.owning_module
    if attr is None or owner is None:
        return None
    return owner.get_submodule(str(attr.target)).graph  # type: ignore[return-value]
