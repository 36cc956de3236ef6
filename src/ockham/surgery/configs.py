"""Configurations that describe a model's shapes (transformers), made true for the shrunk model where they can be."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ockham.surgery.planning import Plan

_MOST_FIELDS = 5
_OPEN_WIDTHS = frozenset(["n_inner", "intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"])


def settle_config(model: nn.Module, small: nn.Module, plan: Plan) -> bool:
    """Make ``small.config`` describe the shapes of `small`, so that its own constructor builds it again.

    A configuration has one number for all layers: it can describe a plan that leaves them all alike. Fields whose value
    is the old width of a group take the new one, and the change is kept only if the constructor, run without memory for
    weights, then yields exactly the shapes of `small`. Otherwise the configuration stays that of `model`, which
    together with the plan rebuilds the network (`shrink` on a fresh instance).

    Returns:
        True when the configuration was changed and describes `small` now.
    """
    config = getattr(small, "config", None)
    if config is None or not callable(getattr(config, "to_dict", None)):
        return False
    wanted = _shapes(small)
    for fields in _candidates(config, plan):
        trial = copy.deepcopy(config)
        for name, value in fields.items():
            setattr(trial, name, value)
        if _built(type(model), trial) == wanted:
            for name, value in fields.items():
                setattr(config, name, value)
            return True
    return False


def described(model: nn.Module) -> bool:
    """True when the model's own configuration builds a network of exactly its shapes."""
    return _built(type(model), getattr(model, "config", None)) == _shapes(model)


def _candidates(config: Any, plan: Plan) -> Iterator[dict[str, int]]:
    """Changes to try: all fields with an old width first, then fewer."""
    widths: dict[int, set[int]] = {}
    for key, width in plan.widths.items():
        widths.setdefault(width, set()).add(width - len(plan.removed.get(key, ())))
    uniform = {old: new.copy().pop() for old, new in widths.items() if len(new) == 1 and new != {old}}
    held = {n: v for n, v in config.to_dict().items() if isinstance(v, int) and not isinstance(v, bool)}
    fields = {n: uniform[v] for n, v in held.items() if v in uniform}
    # a width that a configuration leaves open follows from another field (n_inner = 4 n_embd): here it must be said
    open_fields = [n for n, v in config.to_dict().items() if v is None and n in _OPEN_WIDTHS]
    fields |= {n: min(uniform.values()) for n in open_fields if len(set(uniform.values())) == 1}
    names = sorted(fields)[:_MOST_FIELDS]
    for size in range(len(names), 0, -1):
        for chosen in itertools.combinations(names, size):
            yield {n: fields[n] for n in chosen}


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def _built(kind: type[nn.Module], config: Any) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the model that a configuration describes; None where it describes none."""
    try:
        with torch.device("meta"):
            return _shapes(kind(config))
    except Exception:  # a constructor may refuse a trial configuration in any way: then it describes no model
        return None
