"""A folder that model hubs and other people's code understand: dense safetensors, configuration, plan, model card."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import nn

from ockham.errors import OckhamError
from ockham.files.tree import write_bytes
from ockham.surgery.groups import Plan

__all__ = ["save_pretrained"]

WEIGHTS, CONFIG, PLAN, CARD = "model.safetensors", "config.json", "plan.json", "README.md"


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
        part = path / f".{WEIGHTS}.{os.getpid()}"
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
