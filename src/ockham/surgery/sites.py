"""Places in the model's own code where a size may be written as a constant: views, splits, slices.

After a removal ``x.view(-1, 800)`` or ``x[:, 32:]`` must say other numbers. Tracing notes every such op that touches
labels (`Site`), a plan turns it into numbers (`Edit`), and `resizing.py` applies the numbers while the forward runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ockham.surgery.labels import Value, compress, varying

SPLITS = dict.fromkeys(["split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"], "split")
KINDS: dict[str, str] = {
    "view": "view", "reshape": "view", "_unsafe_view": "view", "unflatten": "unflatten", "expand": "expand",
    "pad": "pad", "constant_pad_nd": "pad", "slice": "slice", "narrow": "slice",
    "batch_norm": "norm", "instance_norm": "norm", **SPLITS,
}  # fmt: skip
"""Name of an op in the exported graph to the kind of place it is; other ops hold no sizes."""


@dataclass(frozen=True, slots=True, eq=False)
class Note:
    """One op which moves labelled elements, as tracing meets it."""

    module: str
    name: str
    before: Value
    after: Value | list[Value]
    node: fx.Node


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A settled note: which component stands at each position of each labelled dimension.

    Attributes:
        module: path of the module in whose forward the op stands.
        op: "view", "unflatten", "expand", "slice", "split", "pad", or "norm" (changes no number, only `num_features`).
        shape: input shape.
        before: input dimension to the components along it, shape ``(size,)``.
        old: the numbers in the code: sizes of the result, (start, stop), or sizes of the parts.
        after: index into `old` to the components along that result dimension (views only).
        fixed: indices into `old` which are known not to change (views only).
        dim: the dimension cut (slices and splits), else -1.
    """

    module: str
    op: str
    shape: tuple[int, ...]
    before: Mapping[int, Tensor]
    old: tuple[int, ...]
    after: Mapping[int, Tensor]
    dim: int
    fixed: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Edit:
    """Numbers that replace others in one module's forward.

    Attributes:
        module: path of the module.
        op: as in `Site`.
        rank: number of dimensions of the input.
        sizes: (dimension, size before, size after) of the input's labelled dimensions.
        dim: the dimension cut, or -1.
        old: numbers in the code; None where anything goes.
        new: numbers instead.
    """

    module: str
    op: str
    rank: int
    sizes: tuple[tuple[int, int, int], ...]
    dim: int
    old: tuple[int | None, ...]
    new: tuple[int | None, ...]

    def to_data(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> Edit:
        """Read what `to_data` wrote."""
        sizes = tuple((int(a), int(b), int(c)) for a, b, c in data["sizes"])
        old, new = (tuple(None if n is None else int(n) for n in data[k]) for k in ("old", "new"))
        return Edit(str(data["module"]), str(data["op"]), int(data["rank"]), sizes, int(data["dim"]), old, new)


def settled(notes: list[Note], root: Tensor) -> list[Site]:
    """Return the notes with components instead of atoms; notes that touch no component twice are left out."""
    sites = (_settle(note, root) for note in notes)
    return [site for site in sites if site is not None and (site.before or site.after)]


def _settle(note: Note, root: Tensor) -> Site | None:
    makers = {
        "norm": _norm, "view": _view, "expand": _view, "unflatten": _unflatten,
        "split": _split, "pad": _pad, "slice": _slice,
    }  # fmt: skip
    kind = KINDS.get(note.name)
    return makers[kind](note, _dims(note.before, root), root) if kind is not None else None


def _norm(note: Note, before: dict[int, Tensor], root: Tensor) -> Site:
    return Site(note.module, "norm", note.before.shape, before, (), {}, -1)


def _result(note: Note) -> Value:
    assert isinstance(note.after, Value)
    return note.after


def _view(note: Note, before: dict[int, Tensor], root: Tensor) -> Site:
    after, old, op = _dims(_result(note), root), _result(note).shape, KINDS[note.name]
    fixed = _fixed(note.before.shape, set(before), old) - set(after) if op == "view" else frozenset()
    return Site(note.module, op, note.before.shape, before, old, after, -1, fixed)


def _unflatten(note: Note, before: dict[int, Tensor], root: Tensor) -> Site:
    rank = len(note.before.shape)
    dim, count = int(note.node.args[1]) % rank, len(note.node.args[2])  # type: ignore[arg-type]
    old = _result(note).shape[dim : dim + count]
    after = {d - dim: v for d, v in _dims(_result(note), root).items() if dim <= d < dim + count}
    return Site(note.module, "unflatten", note.before.shape, before, old, after, dim)


def _split(note: Note, before: dict[int, Tensor], root: Tensor) -> Site | None:
    assert isinstance(note.after, list)
    dim = int(_argument(note.node, 2, "dim", 0)) % len(note.before.shape)
    return _cut(note, before, "split", dim, tuple(v.shape[dim] for v in note.after))


def _slice(note: Note, before: dict[int, Tensor], root: Tensor) -> Site | None:
    dim = int(_argument(note.node, 1, "dim", 0)) % len(note.before.shape)
    size = note.before.shape[dim]
    start = int(_argument(note.node, 2, "start", 0) or 0)
    start = max(0, start + size) if start < 0 else min(start, size)
    return _cut(note, before, "slice", dim, (start, start + _result(note).shape[dim]))


def _pad(note: Note, before: dict[int, Tensor], root: Tensor) -> Site | None:
    """Return the site of a padding of one labelled dimension."""
    assert isinstance(note.after, Value)
    pads = list(note.node.args[1])  # type: ignore[arg-type]
    for dim, roots in _dims(note.after, root).items():
        i = 2 * (len(note.before.shape) - 1 - dim)
        if i < len(pads) and dim in before and (pads[i] or pads[i + 1]):
            left, right = int(pads[i]), int(pads[i + 1])
            ends = {k: v for k, v in ((0, roots[:left]), (1, roots[roots.numel() - right :])) if v.numel()}
            return Site(note.module, "pad", note.before.shape, before, (left, right), ends, dim)
    return None


def _fixed(shape: tuple[int, ...], labelled: set[int], out: tuple[int, ...]) -> frozenset[int]:
    """Return the result dimensions made of labelled input dimensions only: no batch is folded into them."""
    found: set[int] = set()
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
        if all(d in labelled or shape[d] == 1 for d in ins) and any(d in labelled for d in ins):
            found.update(outs)
    return frozenset(found)


def _cut(note: Note, before: dict[int, Tensor], op: str, dim: int, old: tuple[int, ...]) -> Site | None:
    return Site(note.module, op, note.before.shape, before, old, {}, dim) if dim in before else None


def _argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def _dims(value: Value, root: Tensor) -> dict[int, Tensor]:
    """Return the components along each dimension on which the (settled) labels of a value depend."""
    found: dict[int, Tensor] = {}
    for factor in value.factors:
        mapped = compress(torch.where(factor >= 0, root[factor.clamp(min=0)], factor))
        if len(varying(mapped)) == 1:
            found[varying(mapped)[0]] = mapped.flatten()
    return found


def edits_of(sites: tuple[Site, ...], gone: Tensor) -> tuple[Edit, ...]:
    """Return the numbers that change at `sites` when the components in `gone` are removed, each once."""
    edits = (_edit(site, gone) for site in sites)
    return tuple(dict.fromkeys(e for e in edits if e is not None and (e.old != e.new or e.sizes)))


def _edit(site: Site, gone: Tensor) -> Edit | None:
    stays = {d: ~torch.isin(v, gone) for d, v in site.before.items()}
    sizes = tuple((d, site.shape[d], int(k.sum())) for d, k in sorted(stays.items()) if not bool(k.all()))
    if site.op in ("slice", "split"):
        return _edit_cut(site, stays[site.dim], sizes) if sizes else None
    new: list[int | None] = [None] * len(site.old)
    old: list[int | None] = [None] * len(site.old)
    for dim, roots in site.after.items():
        old[dim], new[dim] = site.old[dim], int((~torch.isin(roots, gone)).sum())
    if old == new:
        return None
    for dim in site.fixed:
        old[dim] = new[dim] = site.old[dim]
    return Edit(site.module, site.op, len(site.shape), sizes, site.dim, tuple(old), tuple(new))


def _edit_cut(site: Site, stays: Tensor, sizes: tuple[tuple[int, int, int], ...]) -> Edit:
    below = torch.cat([torch.zeros(1, dtype=torch.long), stays.long().cumsum(0)])
    if site.op == "slice":
        new = tuple(int(below[i]) for i in site.old)
    else:
        ends = torch.tensor(site.old).cumsum(0)
        new = tuple(int(below[end] - below[end - n]) for end, n in zip(ends.tolist(), site.old, strict=True))
    return Edit(site.module, site.op, len(site.shape), sizes, site.dim, site.old, new)


COUNTS = frozenset(
    [
        "num_heads",
        "n_heads",
        "n_head",
        "nheads",
        "nhead",
        "heads",
        "num_attention_heads",
        "num_key_value_heads",
        "num_kv_heads",
        "n_kv_heads",
        "num_features",
        "all_head_size",
        "inner_dim",
        "split_size",
        "attn_dim",
        "attention_dim",
    ]
)
"""Attributes of modules which hold a number of heads, the width of all of them, or of a norm without tensors."""


def counts_of(sites: tuple[Site, ...], gone: Tensor) -> dict[str, dict[int, int]]:
    """Return, for each module, sizes of labelled dimensions before and after; sizes with two meanings are left out."""
    found: dict[str, dict[int, set[int]]] = {}
    for site in sites:
        for roots in (*site.before.values(), *site.after.values()):
            left = int((~torch.isin(roots, gone)).sum())
            found.setdefault(site.module, {}).setdefault(roots.numel(), set()).add(left)
    clear = {m: {old: new.pop() for old, new in sizes.items() if len(new) == 1} for m, sizes in found.items()}
    return {m: changed for m, sizes in clear.items() if (changed := {o: n for o, n in sizes.items() if o != n})}
