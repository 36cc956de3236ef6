"""Configurations that describe a model's shapes (transformers), made true for the shrunk model where they can be."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ockham.surgery.cloning import clone, named_tensors
from ockham.surgery.comparing import difference, outputs
from ockham.surgery.groups import Plan

HEADS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads", "num_kv_heads", "n_head_kv",
    "multi_query_group_num", "encoder_attention_heads", "decoder_attention_heads",
)  # fmt: skip
"""Fields that count heads, of queries or of keys and values."""
WIDTHS = (
    "intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim", "dff",
    "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size", "d_inner",
)  # fmt: skip
"""Fields that hold the inner width of feed-forward layers or experts."""
LARGEST = 2**28
"""Number of parameters up to which a model is built from a configuration to see what it computes."""


def settle_config(model: nn.Module, small: nn.Module, plan: Plan) -> bool:
    """Make ``small.config`` describe the shapes of `small`, so that its own constructor builds it again.

    A configuration has one number for all layers: it can describe a plan that leaves them all alike. Only fields whose
    role it is to hold a number of heads or an inner width are changed, as few as suffice. It is kept only if the
    constructor then yields exactly the shapes of `small`, and the network it builds computes the same on random inputs
    with random weights. Otherwise the configuration stays that of `model`, which together with the plan rebuilds the
    network (`shrink` on a fresh instance).

    Returns:
        True when the configuration was changed and describes `small` now.
    """
    config = getattr(small, "config", None)
    if config is None or not callable(getattr(config, "to_dict", None)) or not plan.removed:
        return False
    wanted = _shapes(small)
    if sum(t.numel() for t in named_tensors(small).values()) > LARGEST:
        return False
    hollow = any(p.is_meta for p in small.parameters())  # shapes alone: nothing can be computed
    for fields in _candidates(config, plan):
        trial = copy.deepcopy(config)
        for name, value in fields.items():
            setattr(trial, name, value)
        if _built(type(model), trial) == wanted and (hollow or _same(type(model), trial, small, fields)):
            for name, value in fields.items():
                setattr(config, name, value)
            return True
    return False


def described(model: nn.Module) -> bool:
    """True when the model's own configuration builds a network of exactly its shapes."""
    return _built(type(model), getattr(model, "config", None)) == _shapes(model)


def _candidates(config: Any, plan: Plan) -> Iterator[dict[str, int]]:
    """Changes to try by the role of a field, the smallest sets first."""
    widths: dict[int, set[int]] = {}
    for key, width in plan.widths.items():
        widths.setdefault(width, set()).add(width - len(plan.removed.get(key, ())))
    uniform = {old: new.copy().pop() for old, new in widths.items() if len(new) == 1 and new != {old}}
    held = {n: v for n, v in config.to_dict().items() if isinstance(v, int) and not isinstance(v, bool)}
    changes: list[tuple[str, int]] = []
    for name in HEADS:
        if name in held:
            kept = {held[name] * new // old for old, new in uniform.items() if held[name] * new % old == 0}
            changes += [(name, n) for n in sorted(kept) if 0 < n < held[name]]
    changes += [(name, uniform[held[name]]) for name in WIDTHS if held.get(name) in uniform]
    if getattr(config, "n_inner", 0) is None and 4 * config.n_embd in uniform:
        changes.append(("n_inner", uniform[4 * config.n_embd]))
    heads, hidden = held.get("num_attention_heads"), held.get("hidden_size")
    if heads and hidden and hasattr(config, "head_dim") and config.head_dim is None:
        changes.append(("head_dim", hidden // heads))
    for size in range(1, 5):
        for chosen in itertools.combinations(changes, size):
            if len({name for name, _ in chosen}) == size:
                yield dict(chosen)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def _built(kind: type[nn.Module], config: Any) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the model that a configuration describes; None where it describes none."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _shapes(kind(copy.deepcopy(config)))
    except Exception:  # a constructor may refuse a trial configuration in any way: then it describes no model
        return None


def _same(kind: type[nn.Module], config: Any, small: nn.Module, fields: dict[str, int]) -> bool:
    """Does the model built from `config` compute what `small` does, before and after its own configuration changes?"""
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin = clone(small, lambda _, t: _noisy(t, generator)).eval()
            fresh = kind(copy.deepcopy(config)).to(next(small.parameters())).eval()
            fresh.load_state_dict(twin.state_dict())
        inputs = _inputs(small)
        if inputs is None:
            return False
        expected = outputs(twin, ((), inputs))
        for name, value in fields.items():
            setattr(twin.config, name, value)
        return max(difference(expected, outputs(m, ((), inputs))) for m in (twin, fresh)) < 1e-4
    except Exception:  # whatever keeps the comparison from being made: the configuration stays as it is
        return False


def _noisy(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
        return tensor.detach().clone()
    noise = torch.randn(tensor.shape, generator=generator).to(tensor)
    if tensor.ndim < 2:
        return 1 + 0.2 * noise
    scaled: Tensor = noise * (1.3 / tensor[0].numel() ** 0.5)
    return scaled


def _inputs(small: Any) -> dict[str, Tensor] | None:
    """Return random inputs by what the model says it takes: longer than any window of its attention, or None."""
    config, generator = small.config, torch.Generator().manual_seed(1)
    device, dtype = next(small.parameters()).device, next(small.parameters()).dtype
    kind = getattr(small, "main_input_name", None)
    if kind == "input_ids":
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        window = getattr(text, "sliding_window", None) or 0
        longest = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 64
        length = max(2, min(max(48, 3 * window), longest - 4, 512))
        ids = torch.randint(min(3, text.vocab_size - 1), text.vocab_size, (2, length), generator=generator).to(device)
        decoder = (
            {"decoder_input_ids": ids[:, : length // 2 + 1]} if getattr(config, "is_encoder_decoder", False) else {}
        )
        return {"input_ids": ids, **decoder}
    if kind == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2
        shape = (2, getattr(config, "num_channels", 3), *size)
        return {"pixel_values": torch.randn(shape, generator=generator).to(device, dtype)}
    return None
