"""Language models in folders: text to windows of tokens, perplexity before and after, a folder to load again."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ockham.core.files import write_json
from ockham.core.modes import device_of
from ockham.errors import DataError, OckhamError
from ockham.methods.blocks.cases import cases_from, objective_for
from ockham.methods.blocks.job import PruneProgress, PruneSettings
from ockham.methods.blocks.prune import Pruned, prune
from ockham.methods.blocks.stream import prepared
from ockham.methods.blocks.study import loss_of

__all__ = ["perplexity", "prune_folder", "read_text", "token_windows"]

_WINDOW = 512
_CALIBRATION, _JUDGING = 32, 8


def read_text(path: str | Path) -> str:
    """A text file, or all ``*.txt`` files of a folder one after the other, in the order of their names.

    Raises:
        DataError: there is no such file, or no text in it.
    """
    place = Path(path)
    files = sorted(place.rglob("*.txt")) if place.is_dir() else [place]
    try:
        text = "\n\n".join(f.read_text(encoding="utf-8") for f in files)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read text from {place}: {error}. Pass a UTF-8 text file or a folder of .txt files") from error
    if not text.strip():
        raise DataError(f"{place} holds no text: pass a UTF-8 text file or a folder with .txt files")
    return text


def token_windows(ids: Tensor, *, length: int, count: int, seed: int = 0) -> Tensor:
    """Some of the windows that text falls into, drawn without repetition, ``[count, length]`` or fewer.

    Args:
        ids: tokens of the text, ``[tokens]``.
        length: tokens of a window.
        count: windows wanted.
        seed: seed of the draw.

    Raises:
        DataError: the text is shorter than two windows.
    """
    whole = len(ids) // length
    if whole < 2:
        raise DataError(f"the text has {len(ids)} tokens, less than two windows of {length}: pass more text")
    chosen = torch.randperm(whole, generator=torch.Generator().manual_seed(seed))[:count]
    return ids[: whole * length].view(whole, length)[chosen]


def perplexity(model: nn.Module, windows: Tensor) -> float:
    """exp of the mean NLL of each token given those before it in its window.

    Args:
        model: causal language model; left as it is.
        windows: token ids ``[windows, length]``.
    """
    with prepared(model):
        cases = cases_from(windows, None, model, device_of(model))
        nll, terms = loss_of(model, cases, objective_for(model, cases[0], "next-token", None))
    return math.exp(float(nll.sum() / terms.sum()))


def prune_folder(
    source: str | Path,
    text: str | Path,
    out: str | Path,
    *,
    target: Mapping[str, Any] | None = None,
    windows: tuple[int, int] = (_CALIBRATION, _WINDOW),
    progress: Callable[[PruneProgress], None] | None = None,
    settings: PruneSettings | None = None,
) -> dict[str, Any]:
    """Reduce the causal language model in a transformers folder on a text, and write a folder that loads as it did.

    Args:
        source: folder of the model with its tokenizer.
        text: calibration text, a file or a folder of .txt files. A part of it is not calibrated on and judges.
        out: folder to write: the model, its tokenizer, ``metrics.json``, ``report.html``, ``plan.json``,
            ``prune.json``. Work is kept in ``out/work`` until the end, and a job that was stopped goes on there.
        target: arguments of `prune` that say how far to go, such as ``{"keep_share": 0.5}``; none lets the evidence
            decide.
        windows: number of calibration windows, and tokens in each.
        progress: called with a `PruneProgress`.
        settings: the finer ones; its ``folder`` is ``out/work`` unless it is given.

    Returns:
        What ``metrics.json`` holds: ``before`` and ``after`` with ``nll``, ``perplexity``, ``ece``, ``parameters``,
        ``nonzero``; ``kept``, ``seconds``, ``peak_bytes``.

    Raises:
        OckhamError: transformers is missing, or the folder holds no causal language model.
        DataError: the text is missing or too short.
    """
    began = time.perf_counter()
    model, tokenizer = _loaded(Path(source))
    count, length = windows
    ids = tokenizer(read_text(text), return_tensors="pt", verbose=False).input_ids[0]
    length = min(length, int(getattr(model.config, "max_position_embeddings", length) or length), len(ids) // 4)
    every = token_windows(ids, length=max(2, length), count=count + max(1, min(_JUDGING, count // 4)), seed=0)
    judges = max(1, min(_JUDGING, len(every) // 5))
    path = Path(out)
    path.mkdir(parents=True, exist_ok=True)
    settings = settings or PruneSettings(folder=path / "work")
    found = prune(model, every[judges:], **dict(target or {}), progress=progress, settings=settings)
    metrics = _metrics(model, found, every[:judges]) | {
        "seconds": time.perf_counter() - began,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "calibration_tokens": int(every[judges:].numel()),
    }
    found.save(path)
    tokenizer.save_pretrained(str(path))
    write_json(path / "metrics.json", metrics)
    found.report(path / "report.html")
    _cleared(path / "work")
    return metrics


def _loaded(source: Path) -> tuple[Any, Any]:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise OckhamError("reading a model folder needs transformers: pip install transformers") from error
    if not (source / "config.json").is_file():
        raise OckhamError(f"{source} is no model folder: it has no config.json. Pass a folder of save_pretrained")
    try:
        model = AutoModelForCausalLM.from_pretrained(str(source), local_files_only=True)
        return model, AutoTokenizer.from_pretrained(str(source), local_files_only=True)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise OckhamError(f"{source} cannot be read as a causal language model with its tokenizer: {error}") from error


@torch.no_grad()
def _metrics(model: nn.Module, found: Pruned, windows: Tensor) -> dict[str, Any]:
    def side(network: nn.Module) -> dict[str, float]:
        value = perplexity(network, windows)
        parameters = list(network.parameters())
        return {
            "nll": math.log(value),
            "perplexity": value,
            "parameters": sum(p.numel() for p in parameters),
            "nonzero": sum(int(p.count_nonzero()) for p in parameters),
        }

    return {"before": side(model), "after": side(found.model), "kept": found.keep_share, "judged_on": "text held out"}


def _cleared(folder: Path) -> None:
    """Work that is done with; only files that a reduction writes are taken away."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    if folder.is_dir():
        folder.rmdir()
