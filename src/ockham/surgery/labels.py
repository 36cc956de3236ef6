"""Labels: which unit each element of a tensor belongs to, what must go together, and where code holds sizes.

Every dimension of every parameter and buffer gets one *atom* (an integer) per index. A traced value carries *factors*:
integer tensors of the rank of the value, size 1 along the dimensions on which the membership does not depend. An
element whose atom is removed is removed with it; atom ``FIXED`` marks elements which always stay. Ops add edges between
atoms (they live and die together) or freeze them (with a reason); nothing else is ever decided while walking the graph.

After a removal ``x.view(-1, 800)`` or ``x[:, 32:]`` in the model's own code must say other numbers, and the mean over
24 of 32 channels must still divide by 32. Tracing notes every such op (`Note`); settled notes are a `Site`; a plan
turns them into numbers (`Edit`), and `resizing.py` applies the numbers while the forward runs.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

FIXED = -1
VIEWS = frozenset(
    {
        "view", "slice", "select", "narrow", "split", "chunk", "unbind", "transpose", "permute", "t", "expand",
        "detach", "squeeze", "unsqueeze", "reshape", "flatten", "unflatten", "diagonal", "alias", "movedim", "swapaxes",
        "split_with_sizes", "tensor_split", "unfold",
    }
)  # fmt: skip
"""Ops whose result may lie on the memory of their input."""


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """What tracing knows of one tensor.

    Attributes:
        shape: concrete shape under the example inputs.
        factors: label tensors of rank ``len(shape)``; each dimension has size 1 or that of ``shape``.
        zero: True when elements of removed units are exactly zero in a masked model.
        learned: True for parameters, buffers and what is made of them alone.
    """

    shape: tuple[int, ...]
    factors: tuple[Tensor, ...] = ()
    zero: bool = False
    learned: bool = False

    def factor_at(self, dim: int) -> Tensor | None:
        """Return the one factor varying along `dim`, or None."""
        dim %= max(len(self.shape), 1)
        return next((f for f in self.factors if f.shape[dim] > 1), None)


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """What walking the graph writes down; the lists grow, nothing is ever taken back.

    Attributes:
        edges: pairs of atoms which live and die together.
        frozen: atoms which stay, with the reason.
        grids: labels after a view, which must settle to a product of rows and columns.
        held: (labels, dimension, reason): dimensions addressed by position, along which no unit may vary.
        spared: atoms of tensors which `mask` must not zero.
        consumed: atoms on the reading side of a weight.
        made: atoms on the making side of a weight that may also be read (tied embeddings).
        loose: ranges of atoms which belong to no tensor of the model.
        touched: path of a module to the labels of the tensors in its forward, by place in memory, each once.
        count: one element, the number of atoms given out.
    """

    edges: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    grids: list[Tensor] = field(default_factory=list)
    held: list[tuple[Tensor, int, str]] = field(default_factory=list)
    spared: list[Tensor] = field(default_factory=list)
    consumed: list[Tensor] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)
    loose: list[tuple[int, int]] = field(default_factory=list)
    touched: dict[str, dict[tuple[int, ...], Tensor]] = field(default_factory=dict)
    count: list[int] = field(default_factory=lambda: [0])

    def atoms(self, size: int) -> Tensor:
        """Give out `size` fresh atoms, shape ``(size,)``."""
        start = self.count[0]
        self.count[0] += size
        return torch.arange(start, start + size)

    def loose_atoms(self, size: int) -> Tensor:
        """Give out `size` atoms that belong to no tensor of the model (expanded dimensions, constants)."""
        found = self.atoms(size)
        self.loose.append((int(found[0]), int(found[-1])))
        return found

    def is_loose(self, factor: Tensor) -> bool:
        """Does `factor` consist of loose atoms?"""
        top = int(factor.max())
        return any(start <= top <= end for start, end in self.loose)

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Say that none of the atoms in `labels` may ever be removed, because of `reason`."""
        found = labels[labels >= 0]
        if found.numel():
            self.frozen.append((found, reason))

    def unify(self, one: Tensor, other: Tensor, reason: str) -> None:
        """Tie `one` and `other` element by element (broadcast); an atom which meets a fixed element is frozen."""
        if one is other:
            return
        a, b = torch.broadcast_tensors(one, other)
        both = (a >= 0) & (b >= 0)
        self.edges.append((a[both], b[both]))
        self.freeze(a[(a >= 0) & (b < 0)], reason)
        self.freeze(b[(b >= 0) & (a < 0)], reason)

    def collapse(self, factor: Tensor, dims: tuple[int, ...] | list[int], reason: str) -> Tensor:
        """Tie all atoms along `dims`; returns the factor with size 1 there. Nothing left to vary: frozen."""
        for dim in dims:
            if factor.shape[dim] > 1:
                head = factor.narrow(dim, 0, 1)
                self.unify(factor.narrow(dim, 1, factor.shape[dim] - 1), head, reason)
                factor = head
        if factor.numel() == 1:
            self.freeze(factor, reason)
        return factor

    def freeze_value(self, value: Value, reason: str) -> Value:
        """Freeze all labels of a value; returns it without labels."""
        for factor in value.factors:
            self.freeze(factor, reason)
        return Value(value.shape)


class Unread(Labels):
    """A ledger for what is computed and never used: it must run at other sizes, but its values matter to nobody."""

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Do nothing."""

    def collapse(self, factor: Tensor, dims: tuple[int, ...] | list[int], reason: str) -> Tensor:
        """Return the factor with size 1 along `dims`; nothing is tied."""
        for dim in dims:
            factor = factor.narrow(dim, 0, min(1, factor.shape[dim]))
        return factor


def varying(factor: Tensor) -> tuple[int, ...]:
    """Return the dimensions along which a compressed factor varies."""
    return tuple(d for d, n in enumerate(factor.shape) if n > 1)


def along(atoms: Tensor, rank: int, dim: int) -> Tensor:
    """Return 1-D `atoms` as a factor of `rank` dimensions which varies along `dim`."""
    shape = [1] * rank
    shape[dim % rank] = atoms.numel()
    return atoms.reshape(shape)


def compressed(labels: Tensor) -> Tensor:
    """Return `labels` with size 1 along every dimension on which they do not depend."""
    for dim, size in enumerate(labels.shape):
        if size > 1:
            head = labels.narrow(dim, 0, 1)
            if labels.stride(dim) == 0 or bool((labels == head).all()):
                labels = head
    return labels.clone() if labels.nbytes < labels.untyped_storage().nbytes() else labels


def tidy(shape: tuple[int, ...], labels: list[Tensor], zero: bool, ledger: Labels, reason: str) -> Value:
    """Return the value of moved `labels`; two factors meeting in one dimension are frozen."""
    factors = [f for f in map(compressed, labels) if f.numel() > 1]
    if _clash(factors):
        for factor in filter(ledger.is_loose, factors):
            ledger.freeze(factor, reason)
        factors = [f for f in factors if not ledger.is_loose(f)]
    clash = _clash(factors)
    for factor in factors:
        if clash & set(varying(factor)):
            ledger.freeze(factor, reason)
    return Value(shape, tuple(f for f in factors if not clash & set(varying(f))), zero)


def _clash(factors: list[Tensor]) -> set[int]:
    """Return the dimensions along which more than one factor varies."""
    return {d for i, f in enumerate(factors) for g in factors[:i] for d in set(varying(f)) & set(varying(g))}


def chunks(shape: tuple[int, ...], out: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Return which dimensions of `shape` become which dimensions of `out` in a view: (input, output) dimensions."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(shape) and j < len(out):
        ins, outs, have, want = [i], [j], shape[i], out[j]
        i, j = i + 1, j + 1
        while have != want:
            if have < want:
                ins.append(i)
                have, i = have * shape[i], i + 1
            else:
                outs.append(j)
                want, j = want * out[j], j + 1
        found.append((ins, outs))
    return [*found, *(([d], []) for d in range(i, len(shape))), *(([], [d]) for d in range(j, len(out)))]


def reshaped(factor: Tensor, shape: tuple[int, ...], out: tuple[int, ...]) -> Tensor:
    """Return the labels of a view from `shape` to `out`, without making anything of the size of the tensor."""
    if 0 in shape:
        return factor.expand(shape).reshape(out)
    full, sizes = [1] * len(shape), [1] * len(out)
    for ins, outs in chunks(shape, out):
        if any(factor.shape[d] > 1 for d in ins):
            for d in ins:
                full[d] = shape[d]
            for d in outs:
                sizes[d] = out[d]
    return factor.expand(full).reshape(sizes)


def drop_leading(factor: Tensor, rank: int) -> Tensor:
    """Return `factor` with leading size-1 dimensions added up to `rank`."""
    return factor.reshape((1,) * (rank - factor.ndim) + tuple(factor.shape))


def match(left: Value, right: Value, ledger: Labels, *, reason: str) -> tuple[list[Tensor], tuple[int, ...]]:
    """Return the joint factors of two values broadcast together, tying what lies on top of each other.

    A factor which meets a dimension of real size without labels is collapsed along it; factors of one value which vary
    over several dimensions and meet a narrower one are first collapsed to their first dimension (whole heads).
    """
    rank = max(len(left.shape), len(right.shape))
    sizes = [(1,) * (rank - len(v.shape)) + v.shape for v in (left, right)]
    sides = [[drop_leading(f, rank) for f in v.factors] for v in (left, right)]
    for i, j in itertools.product(range(len(sides[0])), range(len(sides[1]))):
        dims = [varying(f) for f in (sides[0][i], sides[1][j])]
        if set(dims[0]) & set(dims[1]) and dims[0] != dims[1]:
            for side, k, own in zip(sides, (i, j), dims, strict=True):
                side[k] = ledger.collapse(side[k], own[1:], reason)
    ours, theirs = ([f for f in side if f.numel() > 1] for side in sides)
    joint = []
    for f in ours:
        twin = next((g for g in theirs if varying(g) == varying(f)), None)
        if twin is None:
            joint.append(ledger.collapse(f, [d for d in varying(f) if sizes[1][d] > 1], reason))
        else:
            ledger.unify(f, twin, reason)
            theirs = [g for g in theirs if g is not twin]
            joint.append(twin if ledger.is_loose(f) else f)
    joint += [ledger.collapse(g, [d for d in varying(g) if sizes[0][d] > 1], reason) for g in theirs]
    shape = tuple(max(a, b) if 0 not in (a, b) else 0 for a, b in zip(*sizes, strict=True))
    return [f for f in joint if f.numel() > 1], shape


BLOCK = 2**17
"""Number of edges that are joined at once: what that takes of memory does not grow with the network."""


def components(count: int, edges: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the smallest atom of each atom's component, shape ``(count,)``: pointer jumping, vectorised."""
    parent = torch.arange(count)
    sizes = torch.tensor([0, *(one.numel() for one, _ in edges)]).cumsum(0)
    blocks = itertools.groupby(range(len(edges)), key=lambda i: int(sizes[i]) // BLOCK)
    for _, block in blocks:
        one, other = (torch.cat(side) for side in zip(*(edges[i] for i in block), strict=True))
        while one.numel():
            low, high = torch.minimum(parent[one], parent[other]), torch.maximum(parent[one], parent[other])
            open_ = low != high
            one, other = low[open_], high[open_]
            parent.scatter_reduce_(0, other, one, "amin")
            while not torch.equal(parent, further := parent[parent]):
                parent = further
    return parent


def settle_labels(ledger: Labels, count: int) -> Tensor:
    """Return the component of each atom once every grid is a product (kept rows times kept columns)."""
    edges = list(ledger.edges)
    while True:
        root = components(count, edges)
        extra = Labels(count=ledger.count)
        for factor, dim, reason in ledger.held:
            mapped = compressed(torch.where(factor >= 0, root[factor.clamp(min=0)], factor))
            extra.collapse(mapped, [dim], reason)
        for grid in ledger.grids:
            mapped = compressed(torch.where(grid >= 0, root[grid.clamp(min=0)], grid))
            if len(varying(mapped)) > 1:
                extra.collapse(mapped, varying(mapped)[:-1], "a view splits these channels in two dimensions")
        ledger.frozen.extend(extra.frozen)
        if not any(a.numel() for a, _ in extra.edges):
            return root
        edges += extra.edges


FACTORIES = (
    "zeros",
    "empty",
    "new_zeros",
    "new_empty",
)  # first states and sums; numbers of another kind are the code's own
SPLITS = dict.fromkeys(["split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"], "split")
KINDS: dict[str, str] = {
    "view": "view", "reshape": "view", "_unsafe_view": "view", "unflatten": "unflatten", "expand": "expand",
    "pad": "pad", "constant_pad_nd": "pad", "slice": "slice", "narrow": "slice", **SPLITS,
    **dict.fromkeys(FACTORIES, "factory"),
    "batch_norm": "norm", "instance_norm": "norm", "var": "var", "std": "var",
    "mean": "mean", "centred_mean": "centred",
    "_grouped_mm": "grouped", "grouped_mm": "grouped", "grouped_mm_fallback": "grouped",
    "layer_norm": "layer_norm", "rms_norm": "rms_norm", "group_norm": "group_norm", "uneven_norm": "group_norm",
}  # fmt: skip
"""Name of an op in the exported graph to the kind of place it is; other ops hold no sizes."""


@dataclass(frozen=True, slots=True, eq=False)
class Note:
    """One op whose sizes may stand in the model's code, as tracing meets it.

    Attributes:
        module: path of the module in whose forward the op stands.
        name: bare name of the op.
        before: its input.
        after: its result or results.
        node: the op in the graph.
        call: number of the call of that module, from 0.
    """

    module: str
    name: str
    before: Value
    after: Value | list[Value]
    node: fx.Node
    call: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A settled note: which component stands at each position of each labelled dimension.

    Attributes:
        module: path of the module in whose forward the op stands.
        op: a value of `KINDS`; "norm" changes no number, only the attribute `num_features`.
        shape: input shape.
        before: input dimension to the components along it, shape ``(size,)``.
        old: the numbers in the code: sizes of the result, (start, stop), sizes of the parts, of norm groups.
        after: index into `old` to the components along that result dimension (views only).
        fixed: indices into `old` which are known not to change (views only).
        dim: the dimension cut (slices and splits), else -1.
        call: number of the call of the module.
    """

    module: str
    op: str
    shape: tuple[int, ...]
    before: dict[int, Tensor]
    old: tuple[int, ...]
    after: dict[int, Tensor]
    dim: int
    fixed: frozenset[int] = frozenset()
    call: int = 0


@dataclass(frozen=True, slots=True)
class Edit:
    """Numbers that replace others in one module's forward.

    Attributes:
        module: path of the module.
        op: operation, as in `Site`.
        rank: number of dimensions of the input.
        sizes: (dimension, size before, size after) of the input's labelled dimensions.
        dim: the dimension cut, or -1.
        old: numbers in the code; None where anything goes.
        new: numbers instead.
        call: number of the call of the module, from 0.
    """

    module: str
    op: str
    rank: int
    sizes: tuple[tuple[int, int, int], ...]
    dim: int
    old: tuple[int | None, ...]
    new: tuple[int | None, ...]
    call: int = 0

    def to_data(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> Edit:
        """Read what `to_data` wrote."""
        sizes = tuple((int(a), int(b), int(c)) for a, b, c in data["sizes"])
        old, new = (tuple(None if n is None else int(n) for n in data[k]) for k in ("old", "new"))
        return Edit(
            str(data["module"]), str(data["op"]), int(data["rank"]), sizes, int(data["dim"]), old, new,
            int(data.get("call", 0)),
        )  # fmt: skip

    @property
    def changes(self) -> bool:
        """Does anything differ from what the code says?"""
        return self.old != self.new or any(old != new for _, old, new in self.sizes)


@functools.cache
def parameters(target: Any) -> dict[str, tuple[Any, ...]]:
    """Return the arguments of an op by its schema: name to (place, only by name?) and the default if there is one."""
    schema = getattr(target, "_schema", None)
    return {
        a.name: (i, a.kwarg_only, *([a.default_value] if a.has_default_value() else []))
        for i, a in enumerate(schema.arguments if schema is not None else ())
    }


def argument(node: fx.Node, name: str, *otherwise: Any) -> Any:
    """Return the argument `name` of an op by its schema: the one given, its default, or `otherwise`.

    Raises:
        LookupError: when the op has no argument of that name, or none was given.
    """
    index, only_named, *default = parameters(node.target).get(name, (None, False))
    if index is not None:
        if not only_named and index < len(node.args):
            return node.args[index]
        if name in node.kwargs or default:
            return node.kwargs.get(name, *default)
    if otherwise:
        return otherwise[0]
    raise LookupError(f"{node.target} was given no argument {name!r}")


@functools.cache
def op_name(target: Any) -> str:
    """Return the bare name of an op: ``aten::conv2d`` is "conv2d"; other callables their own name."""
    schema = getattr(target, "_schema", None)
    return schema.name.split("::")[1] if schema is not None else str(getattr(target, "__name__", target))


def reduced_axes(node: fx.Node, rank: int) -> list[int]:
    """Return the dimensions an op such as ``sum`` reduces; none given means all."""
    dim = argument(node, "dim", None)
    if dim is None or dim == []:
        return list(range(rank))
    return [d % max(rank, 1) for d in ([dim] if isinstance(dim, int) else dim)]


def edits_of(sites: tuple[Site, ...], gone: Tensor, widths: Mapping[int, set[int]]) -> tuple[Edit, ...]:
    """Return the numbers that change at `sites` when the components in `gone` are removed.

    Places which keep their numbers come along where their input could be mistaken for one of another place, or where
    the code may have computed them from a size that changes elsewhere (`x.shape[-1]` of a stream that gets narrower).

    Args:
        sites: places which hold sizes.
        gone: components that are removed.
        widths: every size of a dimension that changes to what it becomes.
    """
    alive = _Alive(gone)
    made = [(site, _edit(site, alive)) for site in sites]
    changed: dict[str, list[Edit]] = {}
    for _, edit in made:
        if edit is not None and edit.changes:
            changed.setdefault(edit.module, []).append(edit)
    found: dict[str, list[Edit]] = {}
    for site, edit in made:
        own = edit if edit is not None and edit.changes else _rival(site, changed.get(site.module, []))
        if own is not None:
            found.setdefault(site.module, []).append(own)
    result: list[Edit] = []
    for edits in found.values():  # each once, unless two of them are about inputs alike: then their order tells
        distinct = list(dict.fromkeys(edits))
        looks = {(e.op, e.rank, e.dim, tuple((d, n) for d, _, n in e.sizes)) for e in distinct}
        result += distinct if len(looks) == len(distinct) else edits
    ordered = {edit.module for edit, times in Counter(result).items() if times > 1}  # none may come in between there
    for site in sites:
        if site.op in ("view", "unflatten") and site.module not in ordered:
            result += _computed(site, alive, widths)
    return tuple(result if ordered else dict.fromkeys(result))


def _computed(site: Site, alive: _Alive, widths: Mapping[int, set[int]]) -> list[Edit]:
    """Return the numbers of `site` for code that computes them from a size which changes elsewhere.

    Where it asks for what a dimension of as many elements has become, that is wrong; a share of such a size, as of the
    width of a stream among its heads, is so when nothing else fits (`resizing.py`).
    """
    stays = {d: int(alive.of(v).sum()) for d, v in site.before.items()}
    sizes = tuple((d, site.shape[d], n) for d, n in sorted(stays.items()))
    right = {d: int(alive.of(v).sum()) for d, v in site.after.items()}
    new = tuple(right.get(d, n if d in site.fixed else None) for d, n in enumerate(site.old))
    told = [n for n in new if n is not None and n > 1]
    shares = bool(right) and any(width % n == 0 for width in widths for n in told)
    asked = [(*new[:d], n, *new[d + 1 :]) for d in right for n in sorted(widths.get(site.old[d], set()) - {right[d]})]
    return [
        Edit(site.module, site.op, len(site.shape), sizes, site.dim, old, new)
        for old in (*asked, *([new] if shares else []))
    ]


def _rival(site: Site, edits: list[Edit]) -> Edit | None:
    """Return the unchanged numbers of `site` if its input looks as that of one of `edits` will."""
    shape = site.shape
    alike = [
        e for e in edits
        if (e.op, e.rank) == (site.op, len(shape)) and e.dim in (site.dim, -1)
        and all(shape[d] == n for d, _, n in e.sizes)
    ]  # fmt: skip
    if not alike:
        return None
    sizes = tuple((d, shape[d], shape[d]) for d in sorted({d for e in alike for d, _, _ in e.sizes}))
    free = site.op in ("view", "expand", "unflatten")
    old: tuple[int | None, ...] = (None,) * len(site.old) if free else site.old
    return Edit(site.module, site.op, len(shape), sizes, site.dim, old, old, site.call)


class _Alive(dict[int, Tensor]):
    """Which of some components stay, asked once for every tensor of them.

    Args:
        gone: components that are removed.
    """

    def __init__(self, gone: Tensor) -> None:
        super().__init__()
        gone = gone[gone >= 0]  # experts are units without labels
        self.top = int(gone.max()) + 1 if gone.numel() else 0
        self.stays = torch.ones(self.top + 1, dtype=torch.bool)
        self.stays[gone] = False

    def of(self, roots: Tensor) -> Tensor:
        """Return a boolean for each of `roots`; what is fixed, and what lies above all that is gone, stays."""
        if id(roots) not in self:
            self[id(roots)] = self.stays[roots.clamp(max=self.top)]
        return self[id(roots)]


def _edit(site: Site, alive: _Alive) -> Edit | None:
    if site.op == "norm":
        return None
    stays = {d: alive.of(v) for d, v in site.before.items()}
    sizes = tuple((d, site.shape[d], int(k.sum())) for d, k in sorted(stays.items()) if not bool(k.all()))
    if site.op in ("slice", "split", "group_norm"):
        if site.dim not in stays or bool(stays[site.dim].all()):  # its numbers stay, whatever goes beside it
            return None
        below = torch.cat([torch.zeros(1, dtype=torch.long), stays[site.dim].long().cumsum(0)])
        ends = torch.tensor(site.old if site.op == "slice" else (0, *site.old))
        left = below[ends if site.op == "slice" else ends.cumsum(0)]
        bounds = tuple((left if site.op == "slice" else left.diff()).tolist())
        return Edit(site.module, site.op, len(site.shape), sizes, site.dim, site.old, bounds, site.call)
    new: list[int | None] = [None] * len(site.old)
    old: list[int | None] = [None] * len(site.old)
    for dim, roots in site.after.items():
        size = int(alive.of(roots).sum())
        if site.op != "factory" or size < site.old[dim]:  # of new tensors, numbers of examples and positions, too
            old[dim], new[dim] = site.old[dim], size
    if old == new and site.old:
        return None
    for dim in site.fixed:
        old[dim] = new[dim] = site.old[dim]
    return Edit(site.module, site.op, len(site.shape), sizes, site.dim, tuple(old), tuple(new), site.call)


COUNTS = frozenset(
    {
        "num_heads", "n_heads", "n_head", "nheads", "nhead", "heads", "num_attention_heads", "num_key_value_heads",
        "num_kv_heads", "n_kv_heads", "num_features", "all_head_size", "inner_dim", "split_size", "attn_dim",
        "attention_dim",
    }
)  # fmt: skip
"""Attributes of modules which hold a number of heads, the width of all of them, or of a norm without tensors."""


def counts_of(sites: tuple[Site, ...], gone: Tensor) -> dict[str, dict[int, int]]:
    """Return, for each module, sizes of labelled dimensions before and after; sizes with two meanings are left out."""
    alive, found = _Alive(gone), dict[str, dict[int, set[int]]]()
    for site in sites:
        for roots in (*site.before.values(), *site.after.values()):
            left = int(alive.of(roots).sum())
            found.setdefault(site.module, {}).setdefault(roots.numel(), set()).add(left)
    clear = {m: {old: new.pop() for old, new in sizes.items() if len(new) == 1} for m, sizes in found.items()}
    return {m: changed for m, sizes in clear.items() if (changed := {o: n for o, n in sizes.items() if o != n})}
