"""Language models in folders: text to windows of tokens, perplexity before and after, a folder to load again."""

from __future__ import annotations

import copy
import json
import math
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ockham.core.files import write_json
from ockham.errors import DataError, OckhamError
from ockham.methods.blocks.cases import cases_from, tensor_of
from ockham.methods.blocks.job import PruneProgress, PruneSettings
from ockham.methods.blocks.prune import Pruned, prune
from ockham.methods.blocks.stream import prepared

__all__ = ["prune_folder", "read_text", "token_measures", "token_windows"]

_WINDOW = 512
_BINS = 15
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
        raise DataError(
            f"cannot read text from {place}: {error}. Pass a UTF-8 text file or a folder of .txt files"
        ) from error
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


@torch.no_grad()
def token_measures(model: nn.Module, windows: Tensor) -> dict[str, float]:
    """How well each token is foreseen from those before it in its window.

    Args:
        model: causal language model; left as it is.
        windows: token ids ``[windows, length]``.

    Returns:
        ``nll`` (nats a token), ``perplexity`` (its exp), ``accuracy`` and ``ece`` (of the likeliest token, 15 bins).
    """
    nll, chance, hit = [], [], []
    with prepared(model) as device:
        for case in cases_from(windows, None, model, device):
            logits = case.answer(model, tensor_of)[:, :-1].flatten(0, 1).float()
            target = case.args[0][:, 1:].flatten()
            log_p = logits.log_softmax(-1)
            best = log_p.max(-1)
            nll.append(-log_p.gather(1, target[:, None]).squeeze(1).double())
            chance.append(best.values.exp().double())
            hit.append((best.indices == target).double())
    p, right = torch.cat(chance), torch.cat(hit)
    bins = (p * _BINS).long().clamp(0, _BINS - 1)
    gaps = torch.zeros(_BINS, dtype=torch.float64, device=p.device).index_add_(0, bins, p - right)
    mean = float(torch.cat(nll).mean())
    ece = float(gaps.abs().sum()) / len(p)
    return {"nll": mean, "perplexity": math.exp(mean), "accuracy": float(right.mean()), "ece": ece}


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
        What ``metrics.json`` holds: ``before`` and ``after`` with ``nll``, ``perplexity``, ``accuracy``, ``ece``,
        ``parameters``, ``nonzero``; ``kept``, ``seconds``, ``peak_bytes``.

    Raises:
        OckhamError: transformers is missing, or the folder holds no causal language model.
        DataError: the text is missing or too short.
    """
    began = time.perf_counter()
    model, tokenizer, stored = _loaded(Path(source))
    count, length = windows
    ids = tokenizer(read_text(text), return_tensors="pt", verbose=False).input_ids[0]
    length = min(length, int(getattr(model.config, "max_position_embeddings", length) or length), len(ids) // 4)
    every = token_windows(ids, length=max(2, length), count=count + max(1, min(_JUDGING, count // 4)), seed=0)
    judges = max(1, min(_JUDGING, len(every) // 5))
    path = Path(out)
    path.mkdir(parents=True, exist_ok=True)
    settings = settings or PruneSettings()
    if settings.folder is None:
        settings = replace(settings, folder=path / "work")
    found = prune(model, every[judges:], **dict(target or {}), progress=progress, settings=settings)
    found.model.to(stored)  # the numbers are those of the weights that are written
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


def _loaded(source: Path) -> tuple[Any, Any, torch.dtype]:
    """The model in float32, its tokenizer, and the dtype of its files."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise OckhamError("reading a model folder needs transformers: pip install transformers") from error
    if not (source / "config.json").is_file():
        raise OckhamError(f"{source} is no model folder: it has no config.json. Pass a folder of save_pretrained")
    try:
        config = AutoConfig.from_pretrained(str(source), local_files_only=True)
        stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        model = AutoModelForCausalLM.from_pretrained(str(source), local_files_only=True, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(str(source), local_files_only=True), stored
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise OckhamError(f"{source} cannot be read as a causal language model with its tokenizer: {error}") from error


def _metrics(model: nn.Module, found: Pruned, windows: Tensor) -> dict[str, Any]:
    def side(network: nn.Module) -> dict[str, float]:
        parameters = list(network.parameters())
        counts = {"parameters": sum(p.numel() for p in parameters)}
        counts["nonzero"] = sum(int(p.count_nonzero()) for p in parameters)
        return token_measures(copy.deepcopy(network).float(), windows) | counts

    return {"before": side(model), "after": side(found.model), "kept": found.keep_share, "judged_on": "text held out"}


def _cleared(folder: Path) -> None:
    """Work that is done with; only files that a reduction writes are taken away."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    if folder.is_dir():
        folder.rmdir()
