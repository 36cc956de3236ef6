"""Ways out of Python: ONNX, `torch.export`, safetensors beside the plan."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ockham.errors import OckhamError
from ockham.surgery.tracing import as_arguments


class ExportError(OckhamError):
    """A network cannot be written in the wanted form; the text says why and what to do."""


def export(model: nn.Module, path: str | Path, example_inputs: Any) -> Path:
    """Write `model` to a file, in evaluation mode: ``.onnx`` (ONNX) or ``.pt2`` (`torch.export`).

    The first dimension of every input tensor is dynamic where the model allows it. `model` is left as it is.

    Args:
        model: any traceable network.
        path: where to; the ending says which format.
        example_inputs: as for `trace`.

    Returns:
        The path.

    Raises:
        ExportError: for another ending, a missing package, or a model which cannot be exported.
    """
    path = Path(path)
    writers = {".onnx": _onnx, ".pt2": _pt2}
    if path.suffix not in writers:
        raise ExportError(f"cannot export to {path.name!r}: expected a path ending in .onnx or .pt2")
    modes = {name: module.training for name, module in model.named_modules()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            writers[path.suffix](_program(model.eval(), example_inputs), path)
    except ImportError as error:
        raise ExportError(
            f"exporting to {path.suffix} needs another package: {error}; pip install onnxscript"
        ) from error
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]
    return path


def _program(model: nn.Module, example_inputs: Any) -> torch.export.ExportedProgram:
    args, kwargs = as_arguments(example_inputs)
    failures = []
    choices: tuple[Any, ...] = (_batch_dims((args, kwargs)), None)
    for dynamic in choices:
        try:
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)
        except Exception as error:
            failures.append(error)
    raise ExportError(f"{type(model).__name__} cannot be exported: {str(failures[-1]).splitlines()[0]}") from failures[
        -1
    ]


def _batch_dims(arguments: Any) -> torch.export.ShapesCollection:
    """Make the first dimension of every input tensor dynamic."""
    shapes = torch.export.ShapesCollection()
    for tensor in pytree.tree_leaves(arguments):
        if isinstance(tensor, torch.Tensor) and tensor.ndim:
            shapes[tensor] = {0: torch.export.Dim.AUTO}
    return shapes


def _onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    written = torch.onnx.export(program, dynamo=True)
    if written is None:
        raise ExportError("the ONNX exporter returned nothing")
    written.save(str(path))


def _pt2(program: torch.export.ExportedProgram, path: Path) -> None:
    torch.export.save(program, path)
