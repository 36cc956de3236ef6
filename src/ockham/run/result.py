"""The result folder: a reduced network as bitmask and values, its posterior, and what was measured."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from ockham.core.files import inside, pack, printable, read_text, read_tree, unpack, write_bytes, write_tree
from ockham.core.posterior import POSTERIOR, Posterior
from ockham.core.seal import sealed
from ockham.errors import OckhamError, ResultError
from ockham.surgery.groups import Plan, PlanError
from ockham.surgery.shrinking import shrink
from ockham.zoo.networks import NETWORKS

__all__ = [
    "NETWORK",
    "PLAN",
    "POSTERIOR",
    "finite_error",
    "fit_error",
    "layer_rows",
    "load",
    "load_state",
    "save_network",
    "save_plan",
    "save_pretrained",
    "stored_values",
]

NETWORK = "network.safetensors"
PLAN = "plan.json"


def save_network(model: nn.Module, path: Path, *, builder: str) -> int:
    """Write a network, zeros as bits, tied tensors once.

    Args:
        model: any module with finite parameters.
        path: the file.
        builder: "zoo:name", or a label such as "package.module:function" for people; only zoo names are rebuilt.

    Returns:
        Bytes on disk.

    Raises:
        OckhamError: a parameter is not finite, or the folder cannot be written.
    """
    state: dict[str, Any] = {}
    tied: dict[str, str] = {}
    seen: dict[Any, str] = {}
    found = model.state_dict()
    problem = finite_error(found, {name for name, _ in model.named_parameters(remove_duplicate=False)})
    if problem:
        raise OckhamError(f"{printable(path)}: the network is not saved, {problem}")
    for name, tensor in found.items():
        place = (tensor.data_ptr(), tensor.shape) if tensor.numel() else (name, tensor.shape)
        if place in seen:
            tied[name] = seen[place]
        else:
            seen[place] = name
            state[name] = pack(tensor)
    write_tree(path, {"builder": builder, "state": state, "tied": tied}, kind="network")
    return path.stat().st_size


def save_plan(plan: Plan | None, path: Path) -> None:
    """Write what was taken out as a whole; a result without a plan takes an older plan away.

    Raises:
        OckhamError: the folder cannot be written.
    """
    if plan is not None and plan.removed:
        write_bytes(path, plan.to_json().encode())
    else:
        path.unlink(missing_ok=True)


def load_state(path: Path, *, verify: bool = True) -> tuple[str, dict[str, Tensor]]:
    """Builder label and dense state dict of a saved network.

    Args:
        path: the file.
        verify: whether its content is compared with the SHA-256 in it.

    Raises:
        ResultError: the file is missing, damaged, foreign or newer.
    """
    tree = read_tree(path, kind="network", verify=verify)
    try:
        state = {name: unpack(node) for name, node in tree["state"].items()}
        state |= {name: state[source] for name, source in tree["tied"].items()}
        return str(tree["builder"]), state
    except (KeyError, TypeError, AttributeError, RuntimeError, OckhamError) as error:
        raise ResultError(f"{printable(path)}: its network is damaged ({printable(error)})") from error


def load(folder: str | Path, model: nn.Module | None = None, *, verify: bool = True) -> nn.Module:
    """The reduced network of a result folder, in evaluation mode. Nothing in the folder is ever executed.

    Args:
        folder: what `ockham compress` or `Compressed.save` wrote, or a network file alone.
        model: an instance from your own constructor; it gets the weights. Networks of the zoo are built by name. A
            plan in the folder is replayed on it (a copy is returned then); an instance of the small sizes will do, too.
        verify: whether content is compared with the folder's seal; without, presence and sizes are.

    Returns:
        The network; removed weights are exactly zero.

    Raises:
        ResultError: a file is missing, damaged, foreign or newer, or the network is not of the zoo and no model given.
        OckhamError: the weights do not fit the model; names and shapes are listed.
    """
    path, plan, seal = Path(folder), None, None
    if path.is_dir():
        seal = sealed(path, NETWORK, PLAN, verify=verify)
        plan, path = _plan_in(path), inside(path, NETWORK)
    builder, state = load_state(path, verify=verify and seal is None)
    if model is None:
        name = builder.removeprefix("zoo:")
        if name == builder or name not in NETWORKS:
            raise ResultError(
                f"{printable(path)}: this network was built by {printable(repr(builder))}, which is your code and is "
                "not run from a file; pass an instance: ockham.load(folder, model=your_constructor())"
            )
        model = NETWORKS[name]()
    small = model if plan is None or not fit_error(model, state) else shrink(model, plan)
    names = {name for name, _ in small.named_parameters(remove_duplicate=False)}
    problem = fit_error(small, state) or finite_error(state, names)
    if problem:
        raise OckhamError(f"{printable(path)} does not fit the model: {problem}")
    small.load_state_dict(state)
    evaluated: nn.Module = small.eval()
    return evaluated


def _plan_in(folder: Path) -> Plan | None:
    if not os.path.lexists(folder / PLAN):
        return None
    try:
        return Plan.from_json(read_text(inside(folder, PLAN)))
    except (PlanError, RecursionError) as error:
        raise ResultError(f"{printable(folder / PLAN)}: its plan is damaged or foreign ({printable(error)})") from error


def fit_error(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """What keeps a state dict from fitting a model: names, shapes, dtypes that would lose digits; empty if it fits."""
    own = model.state_dict()
    missing, extra = [n for n in own if n not in state], [n for n in state if n not in own]
    both = [n for n in own if n in state]
    shapes = [f"{n}: {tuple(state[n].shape)} for {tuple(own[n].shape)}" for n in both if state[n].shape != own[n].shape]
    kinds = [
        f"{n}: {state[n].dtype} for {own[n].dtype}"
        for n in both
        if state[n].is_floating_point() is not own[n].is_floating_point()
        or torch.promote_types(state[n].dtype, own[n].dtype) is not own[n].dtype
    ]
    parts = [("missing", missing), ("unknown", extra), ("other shapes", shapes), ("other dtypes", kinds)]
    shown = ((what, [printable(n) for n in names]) for what, names in parts if names)
    return "; ".join(f"{what} {', '.join(names[:6])}{' ...' * (len(names) > 6)}" for what, names in shown)


def finite_error(state: Mapping[str, Tensor], parameters: Collection[str]) -> str:
    """Which tensors hold NaN, or, among the parameters, infinities; empty if none does.

    Args:
        state: tensors by name.
        parameters: names of those that must be finite; buffers may hold infinities (masks of attention do).
    """
    wrong = []
    for name, tensor in state.items():
        if tensor.is_floating_point() or tensor.is_complex():
            total = tensor.sum(dtype=None if tensor.is_complex() else torch.float64)
            if not bool(total.isfinite()):  # one pass without a second tensor; the exact look only where it is needed
                bad = ~tensor.isfinite() if name in parameters else tensor.isnan()
                if bool(bad.any()):
                    wrong.append(f"{printable(name)} ({int(bad.sum())} of {tensor.numel()})")
    return f"NaN or infinite numbers in {', '.join(wrong[:6])}: a finite network was expected" if wrong else ""


def stored_values(model: nn.Module) -> int:
    """Nonzero learnable values of a network, tied ones once."""
    return sum(int((p != 0).sum()) for p in model.parameters())


def layer_rows(posterior: Posterior, plan: Plan | None = None) -> list[dict[str, Any]]:
    """Per parameter tensor: name, shape and total as they were before the plan, weights kept.

    Where the posterior has inclusion probabilities, also ``expected``: their sum, the expected number of weights.
    """
    shapes = {n: tuple(g.mean.shape) for n, g in posterior.items()} | dict(plan.shapes if plan else {})
    return [
        {"name": n, "shape": list(shapes[n]), "total": math.prod(shapes[n]), "kept": int(g.keep.sum())}
        | ({} if g.inclusion is None else {"expected": float(g.inclusion.double().sum())})
        for n, g in posterior.items()
    ]


WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def save_pretrained(
    model: nn.Module, folder: str | Path, *, plan: Plan | None = None, facts: Mapping[str, Any] | None = None
) -> Path:
    """Write a folder that can be uploaded as it is, ``huggingface_hub.upload_folder(folder_path=folder, ...)``.

    ``model.safetensors`` holds the weights under their own names, dense, tied ones once; ``config.json`` the model's
    configuration, if it has one; ``plan.json`` what was taken out; ``README.md`` a model card.

    A transformers model whose configuration describes its shapes (see `shrink`) loads by its class's
    ``from_pretrained``; every other by its own constructor, ``ockham.shrink(model, ockham.Plan.from_json(text))`` and
    ``safetensors.torch.load_model``.

    Args:
        model: usually a shrunk one.
        folder: made where it is missing.
        plan: the plan it was shrunk by.
        facts: lines of the model card, such as accuracy before and after.

    Returns:
        The folder.

    Raises:
        OckhamError: it cannot be written.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        part = path / f".{WEIGHTS}.{secrets.token_hex(8)}.part"
        save_model(model, str(part), metadata={"format": "pt"})
        part.replace(path / WEIGHTS)
    except OSError as error:
        raise OckhamError(f"cannot write to {path}: {error}") from error
    config = getattr(model, "config", None)
    if config is not None and callable(getattr(config, "to_dict", None)):
        text = json.dumps(config.to_dict(), indent=2, default=str)
        write_bytes(path / CONFIG, text.encode())
    if plan is not None:
        write_bytes(path / PLAN, plan.to_json().encode())
    write_bytes(path / CARD, _card(model, plan, facts or {}).encode())
    return path


def _card(model: nn.Module, plan: Plan | None, facts: Mapping[str, Any]) -> str:
    values = sum(p.numel() for p in model.parameters())
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    lines = ["---", "library_name: ockham", "tags:", "- pruning", "- model-compression", "---", ""]
    lines += [f"# {type(model).__name__}, reduced by evidence", ""]
    lines += [f"* parameters: {values:,}, {zeros / max(1, values):.1%} of them zero"]
    lines += [f"* {name}: {value}" for name, value in facts.items()]
    if plan is not None:
        lines += ["", f"Taken out of the original network (`{PLAN}` replays it):", "", "```", str(plan), "```"]
    return "\n".join(lines) + "\n"
