"""Ways out of Python: ONNX, `torch.export`, safetensors beside the plan."""

from __future__ import annotations

import copy
import functools
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import prune
from torch.utils import _pytree as pytree

from ockham.errors import OckhamError
from ockham.surgery.copies import as_arguments, clone, configured, given_to, with_rows
from ockham.surgery.refitting import adapt

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
        said = str(error.__cause__ or error).splitlines()[0]
        raise ExportError(
            f"{type(model).__name__} cannot be written as ONNX: {said}. Way out: a path ending in .pt2, or the parts "
            "around that operator on their own"
        ) from error
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]
    return path


def onnx_latency(model: nn.Module, example_inputs: Any, *, batch: int = 1, repeats: int = 20, warmup: int = 5) -> float:
    """Measure the median time of a forward pass in ONNX Runtime on the CPU in seconds, warm.

    Args:
        model: any network that `export` can write as ONNX; left as it is.
        example_inputs: inputs as for `trace`; every tensor is repeated or cut to `batch` rows.
        batch: number of rows.
        repeats: number of timed passes.
        warmup: number of passes before.

    Raises:
        ExportError: when the network cannot be written, or ONNX Runtime is missing or takes other inputs.
    """
    return onnx_latencies([model], example_inputs, batch=batch, repeats=repeats, warmup=warmup)[0]


def onnx_latencies(
    models: Sequence[nn.Module], example_inputs: Any, *, batch: int = 1, repeats: int = 20, warmup: int = 5
) -> list[float]:
    """Measure several networks in ONNX Runtime in turn, pass by pass, so that a busy machine slows all of them alike.

    Arguments and errors are those of `onnx_latency`; the result is one number per network.
    """
    try:
        import onnxruntime  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise ExportError(f"timing in ONNX Runtime needs another package: {error}; pip install onnxruntime") from error
    given = with_rows(example_inputs, batch)
    values = [t.detach().numpy() for t in pytree.tree_leaves(given) if isinstance(t, Tensor)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    calls = []
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            file = export(model, Path(folder) / "network.onnx", given)
            session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        names = [held.name for held in session.get_inputs()]
        if len(names) != len(values):
            raise ExportError(
                f"the ONNX network takes {len(names)} inputs ({', '.join(names)}); got {len(values)} tensors"
            )
        calls.append(functools.partial(session.run, None, dict(zip(names, values, strict=True))))
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(warmup + repeats):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
    return [statistics.median(own[warmup:]) for own in times]


def layer_times(layers: Sequence[tuple[nn.Module, Tensor]], runtime: str, *, repeats: int = 10) -> list[float]:
    """Measure Linear layers or convolutions side by side: seconds of the fastest of `repeats` passes of each, warm.

    Args:
        layers: pairs of a layer and its input.
        runtime: "torch" or "onnxruntime"; the latter runs float32 on the CPU.
        repeats: number of timed passes of each, all in turn.

    Raises:
        ImportError: ONNX Runtime or onnx is not installed.
    """
    calls = [functools.partial(layer, x) if runtime == "torch" else _onnx_call(layer, x) for layer, x in layers]
    on_gpu = runtime == "torch" and any(x.is_cuda for _, x in layers)
    times = [math.inf] * len(calls)
    with torch.no_grad():
        for step in range(repeats + 2):
            for i, call in enumerate(calls):
                start = time.perf_counter()
                call()
                if on_gpu:
                    torch.cuda.synchronize()
                times[i] = min(times[i], time.perf_counter() - start) if step >= 2 else math.inf
    return times


_MACS = 5e7
"""Multiply-accumulates of a timed layer, about: a few milliseconds."""
_TIMES: dict[tuple[Any, ...], list[float]] = {}
"""Seconds of layers by all that they depend on: measured once in a process."""


def width_times(
    layer: nn.Module,
    cuts: Mapping[tuple[str, int], int],
    x: Tensor,
    widths: Sequence[int],
    times: float,
    runtime: str,
) -> list[float]:
    """Measure a Linear layer or a convolution at several widths of a group, once in a process for each shape.

    Args:
        layer: the layer as it is.
        cuts: (name of its tensor, dimension) that shrinks to indices a unit.
        x: input of the layer.
        widths: numbers of units.
        times: how often its rows are wanted; fewer where that takes long.
        runtime: "torch" or "onnxruntime".

    Returns:
        Seconds, one a width.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    channels = 1 - weight.ndim
    reads = 1 if isinstance(layer, (nn.Linear, _ConvNd)) else 0  # the other way round in transformers' Conv1D
    macs = x.numel() // max(1, x.shape[channels]) * weight.numel() / max(1, x.shape[0])
    rows = max(1, min(int(times * x.shape[0]), int(_MACS / macs)))
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    how = (type(layer), tuple(weight.shape), layer.bias is None, *(str(getattr(layer, n, "")) for n in names))
    on = (runtime, torch.get_num_threads(), x.device.type, x.dtype)
    key = (on, how, tuple(sorted(cuts.items())), rows, tuple(x.shape[1:]), tuple(widths))
    if key not in _TIMES:
        whole, pairs = with_rows(x, rows), []
        for width in widths:
            sizes = {which: width * k for which, k in cuts.items()}

            def narrow(name: str, t: Tensor, sizes: Mapping[tuple[str, int], int] = sizes) -> Tensor:
                for (leaf, dim), size in sizes.items():
                    t = t.narrow(dim, 0, size) if leaf == name else t
                return t.detach().float().clone() if runtime == "onnxruntime" else t.detach().clone()

            small = clone(layer, narrow).eval()
            adapt(small, layer)
            part = whole.narrow(channels, 0, sizes.get(("weight", reads), whole.shape[channels])).contiguous()
            pairs.append((small, part.float().cpu() if runtime == "onnxruntime" else part))
        _TIMES[key] = layer_times(pairs, runtime)
    return _TIMES[key]


def _onnx_call(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Return a call of ONNX Runtime that runs this layer alone on `x`."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weight, bias = (t.detach() if isinstance(t, Tensor) else None for t in (layer.weight, layer.bias))
    assert weight is not None
    if isinstance(layer, _ConvNd):
        padding = (0,) * (weight.ndim - 2) if isinstance(layer.padding, str) else layer.padding
        how: dict[str, Any] = {"strides": layer.stride, "dilations": layer.dilation, "pads": (*padding, *padding)}
        nodes = [helper.make_node("Conv", ["x", "w"] if bias is None else ["x", "w", "b"], ["y"], **how)]
    else:
        weight = weight.T if isinstance(layer, nn.Linear) else weight
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y" if bias is None else "m"])]
        nodes += [] if bias is None else [helper.make_node("Add", ["m", "b"], ["y"])]
    held = {"w": weight, **({} if bias is None else {"b": bias})}
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * x.ndim)],
        [numpy_helper.from_array(t.contiguous().numpy(), name) for name, t in held.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return functools.partial(session.run, None, {"x": x.detach().numpy()})


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
    raise ExportError(f"{type(model).__name__} cannot be exported: {str(failures[-1]).splitlines()[0]}") from failures[
        -1
    ]


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
