"""A trial on fake tensors: does the model's own code run at smaller sizes? What does not is frozen, with the reason."""

from __future__ import annotations

import logging
import re
import warnings
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ockham.surgery.attributes import refit
from ockham.surgery.cloning import clone
from ockham.surgery.grouping import Group, Groups
from ockham.surgery.planning import plan_masks
from ockham.surgery.sites import Edit

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
