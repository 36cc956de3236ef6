"""Ways out of Python: ONNX, `torch.export`, safetensors beside the plan."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils import _pytree as pytree

from ockham.errors import OckhamError, first_line
from ockham.surgery.copies import as_arguments, configured, given_to

__all__ = []


class ExportError(OckhamError):
    """A network cannot be written in the wanted form; the text says why and what to do."""


def export(model: nn.Module, path: str | Path, example_inputs: Any) -> Path:
    """Write `model` to a file, in evaluation mode: ``.onnx`` (ONNX) or ``.pt2`` (`torch.export`).

    The first dimension of every input tensor is dynamic where the model allows it. `model` is left as it is. A language
    model is written without its cache of past tokens, and in ONNX its experts as batched matrix products.

    Args:
        model: any traceable network.
        path: where to; the ending says which format.
        example_inputs: inputs as for `trace`.

    Returns:
        The path.

    Raises:
        ExportError: for another ending, a missing package, or a model which cannot be exported.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise ExportError(f"cannot export to {path.name!r}: expected a path ending in .onnx or .pt2")
    modes = {name: module.training for name, module in model.named_modules()}
    try:
        experts = {"_experts_implementation_internal": "batched_mm"} if path.suffix == ".onnx" else {}
        with warnings.catch_warnings(), configured(model, use_cache=False, **experts):
            warnings.simplefilter("ignore")
            program = _program(model.eval(), example_inputs)
            if path.suffix == ".pt2":
                torch.export.save(program, path)
                return path
            written = torch.onnx.export(program, dynamo=True)
            if written is None:
                raise ExportError("the ONNX exporter returned nothing")
            written.save(str(path))
    except ImportError as error:
        raise ExportError(
            f"exporting to {path.suffix} needs another package: {error}; pip install onnxscript"
        ) from error
    except torch.onnx.OnnxExporterError as error:
        said = first_line(error.__cause__ or error)
        raise ExportError(
            f"{type(model).__name__} cannot be written as ONNX: {said}. Way out: a path ending in .pt2, or the parts "
            "around that operator on their own"
        ) from error
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]
    return path


def _program(model: nn.Module, example_inputs: Any) -> torch.export.ExportedProgram:
    args, kwargs = as_arguments(model, example_inputs)
    failures = []
    batches = torch.export.ShapesCollection()  # the first dimension of every input tensor is dynamic
    for tensor in pytree.tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor) and tensor.ndim:
            batches[tensor] = {0: torch.export.Dim.AUTO}
    choices: tuple[Any, ...] = (batches, None)
    for dynamic in choices:
        try:
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)
        except Exception as error:
            failures.append(error)
    raise ExportError(f"{type(model).__name__} cannot be exported: {first_line(failures[-1])}") from failures[-1]


class ExecutionError(OckhamError):
    """A mask or a score does not fit the weight it is for."""


class CsrLinear(nn.Module):
    """A Linear layer whose weight is held and multiplied in compressed sparse rows, for inference on CPU.

    Args:
        layer: the layer with zeros in its weight.
    """

    crow: Tensor
    col: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        rows = _quietly(layer.weight.detach().to_sparse_csr)
        self.register_buffer("crow", rows.crow_indices())
        self.register_buffer("col", rows.col_indices())
        self.register_buffer("values", rows.values())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T + b`` for x of shape ``(..., in)``."""
        flat = x.reshape(-1, self.in_features)
        shape = (self.out_features, self.in_features)
        weight = _quietly(lambda: torch.sparse_csr_tensor(self.crow, self.col, self.values, shape))
        out = (weight @ flat.T).T
        out = out if self.bias is None else out + self.bias
        return out.reshape(*x.shape[:-1], self.out_features)


def _quietly(make: Callable[[], Tensor]) -> Tensor:
    """Run without torch's notice that CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Measured seconds of one layer, dense and in CSR, and which of them is used."""

    zeros: float
    dense: float
    csr: float
    used: str


def sparse_linear(
    model: nn.Module, example_inputs: Any, *, margin: float = 0.9, repeats: int = 15
) -> tuple[Any, dict[str, LayerTime]]:
    """Return a copy of `model` in which Linear layers run in CSR where that is measured to be faster, and the times.

    Every Linear layer on the CPU with at least half zeros is timed on the inputs it gets from `example_inputs`; CSR is
    used where its median is below `margin` times the dense one. Layers whose weight is tied stay dense.

    Args:
        model: network with zeros in its weights; left as it is.
        example_inputs: inputs as for `trace`; the batch size is the one to be fast at.
        margin: how much faster CSR must be.
        repeats: timed passes per layer and form.
    """
    small = copy.deepcopy(model).eval()
    layers = [n for n, m in small.named_modules() if type(m) is nn.Linear and m.weight.device.type == "cpu"]
    inputs = given_to(small, layers, as_arguments(small, example_inputs))
    held = [id(p) for m in small.modules() for p in m.parameters(recurse=False)]
    times: dict[str, LayerTime] = {}
    for name, (x, *_) in inputs.items():
        layer = small.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        zeros = float((layer.weight == 0).float().mean())
        if zeros < 0.5 or held.count(id(layer.weight)) > 1 or not name:
            continue
        sparse = CsrLinear(layer)
        dense_time, csr_time = _median(layer, x, repeats), _median(sparse, x, repeats)
        faster = csr_time < margin * dense_time
        times[name] = LayerTime(zeros, dense_time, csr_time, "csr" if faster else "dense")
        if faster:
            parent, _, leaf = name.rpartition(".")
            setattr(small.get_submodule(parent), leaf, sparse)
    small.train(model.training)
    return small, times


def _median(layer: nn.Module, x: Tensor, repeats: int) -> float:
    times = []
    with torch.no_grad():
        for step in range(repeats + 3):
            start = time.perf_counter()
            layer(x)
            if step >= 3:
                times.append(time.perf_counter() - start)
    return statistics.median(times)


def keep_two_of_four(delta_f: Tensor) -> Tensor:
    """Return the 2:4 mask which keeps most evidence: of every four weights in a row the two with the smallest ΔF.

    Args:
        delta_f: ``(out, in)``, evidence of each weight in nats (positive favours removal); `in` a multiple of four.

    Returns:
        Boolean ``(out, in)``, True = stays: exactly two in each block of four.

    Raises:
        ExecutionError: when the shape has no blocks of four, or a value is NaN.
    """
    if delta_f.ndim != 2 or delta_f.shape[1] % 4 or bool(delta_f.isnan().any()):
        raise ExecutionError(
            f"2:4 needs finite scores of shape (out, 4 k), got {tuple(delta_f.shape)}; pad or skip this layer"
        )
    blocks = delta_f.reshape(delta_f.shape[0], -1, 4)
    best = blocks.argsort(dim=-1, stable=True)[..., :2]
    return torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, best, True).reshape(delta_f.shape)


def as_pruned(model: nn.Module, keep: Mapping[str, Tensor]) -> Any:
    """Return a copy of `model` with masks as `torch.nn.utils.prune` writes them: ``weight_orig`` and ``weight_mask``.

    `prune.is_pruned` is True for it, `prune.remove` makes the zeros final.

    Args:
        model: any network; left as it is.
        keep: parameter name to a boolean mask of its shape, True = stays.

    Raises:
        ExecutionError: for an unknown parameter or a mask of another shape or dtype.
    """
    held = dict(model.named_parameters())
    twin = copy.deepcopy(model)
    for name, mask in keep.items():
        if name not in held or mask.dtype != torch.bool or mask.shape != held[name].shape:
            expected = tuple(held[name].shape) if name in held else "no such parameter"
            raise ExecutionError(f"keep[{name!r}] is {mask.dtype} {tuple(mask.shape)}; expected torch.bool {expected}")
        path, _, leaf = name.rpartition(".")
        prune.custom_from_mask(twin.get_submodule(path), leaf, mask)
    return twin
