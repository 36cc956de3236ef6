"""What a network costs: parameters, multiply-accumulates, and time in PyTorch and in ONNX Runtime."""

from __future__ import annotations

import functools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from ockham.surgery.copies import Valueless, as_arguments, clone, named_tensors, with_rows
from ockham.surgery.exporting import ExportError, export
from ockham.surgery.refitting import adapt

__all__ = []


@dataclass(frozen=True, slots=True)
class Cost:
    """Costs of one forward pass.

    Attributes:
        parameters: number of learnable values, tied ones once.
        bytes: memory of parameters and buffers.
        macs: multiply-accumulates of one forward on the example inputs (half of what FLOP counters say).
    """

    parameters: int
    bytes: int
    macs: int


def cost(model: nn.Module, example_inputs: Any) -> Cost:
    """Count parameters, bytes and multiply-accumulates (`multiply_accumulates`).

    Args:
        model: any network; it runs once, in evaluation mode, and is left as it is.
        example_inputs: inputs as for `trace`; the batch counts.
    """
    args, kwargs = as_arguments(model, example_inputs)
    tensors = named_tensors(model)
    modes = {module: module.training for module in model.modules()}
    try:
        macs = multiply_accumulates(model.eval(), args, kwargs)
    finally:
        for module, training in modes.items():
            module.training = training
    learned = sum(t.numel() for t in tensors.values() if isinstance(t, nn.Parameter))
    held = sum(t.numel() * t.element_size() for t in tensors.values())
    return Cost(learned, held, macs)


Shape = tuple[int, ...]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """FLOPs of an attention kernel: each query with each key, masked or not."""
    return int(2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))


def _grouped(one: Shape, other: Shape, *_: Any, **__: Any) -> int:
    """FLOPs of a matrix product by parts: rows of one, columns of the other, or what is summed are dealt out."""
    rows = math.prod(one[:-1]) if len(other) >= len(one) else one[-2]
    return int(2 * rows * one[-1] * other[-1])


def _recurrent(x: Shape, *weights: Any, **_: Any) -> int:
    """FLOPs of a recurrent layer: all of its matrices at every step of every sequence."""
    flat = (w for w in weights for w in (w if w and isinstance(w[0], tuple | list | torch.Size) else [w]))
    return int(2 * math.prod(x[:-1]) * sum(math.prod(w) for w in flat if len(w) == 2))


def _vector(matrix: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


def _trilinear(one: Shape, two: Shape, three: Shape, *expanded: Any, **_: Any) -> int:
    """FLOPs of a bilinear form: one multiply-accumulate for every product of three."""
    shapes = []
    for shape, dims in zip((one, two, three), expanded[:3], strict=True):
        wide = list(shape)
        for dim in sorted(dims):
            wide.insert(dim, 1)
        shapes.append(wide)
    return int(2 * math.prod(torch.broadcast_shapes(*shapes)))


_ATEN = torch.ops.aten
_UNKNOWN: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_grouped_mm": _grouped,
    "mkldnn_rnn_layer": lambda x, one, two, *_, **__: _recurrent(x, one, two),
    "_cudnn_rnn": lambda x, weights, *_, **__: _recurrent(x, weights),
    "mv": _vector,
    "addmv": lambda _, matrix, *__, **___: _vector(matrix),
    "dot": _vector,
    "vdot": _vector,
    "_trilinear": _trilinear,
}
"""Operators which `torch.utils.flop_counter` takes for nothing (or, with fewer heads of keys, does not take)."""


def multiply_accumulates(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> int:
    """Multiply-accumulates of one call of a network without gradients: products of matrices, convolutions, attention.

    Counted are the operators that `torch.utils.flop_counter` knows, and attention, recurrent layers and products with
    vectors whatever kernel this device has for them. Attention counts every query with every key, masked or not.
    """

    class Untracked:  # what tracks modules for gradients cannot take a parameter as a module's input without them
        parents = frozenset({"Global"})

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    known = {getattr(_ATEN, name): count for name, count in _UNKNOWN.items() if hasattr(_ATEN, name)}
    counter = FlopCounterMode(display=False, custom_mapping=known)
    counter.mod_tracker = Untracked()  # type: ignore[assignment]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole layer, of which nobody counts anything
    try:
        with counter, Valueless(), torch.no_grad():
            model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops() // 2)


def latency(model: nn.Module, example_inputs: Any, *, batch: int = 1, repeats: int = 20, warmup: int = 5) -> float:
    """Measure the median time of a forward pass in seconds, warm.

    Args:
        model: any network; runs in evaluation mode and is left as it is.
        example_inputs: inputs as for `trace`; every tensor is repeated or cut to `batch` rows.
        batch: number of rows.
        repeats: number of timed passes.
        warmup: number of passes before.
    """
    return latencies([model], example_inputs, batch=batch, repeats=repeats, warmup=warmup)[0]


def latencies(
    models: Sequence[nn.Module], example_inputs: Any, *, batch: int = 1, repeats: int = 20, warmup: int = 5
) -> list[float]:
    """Measure several networks in turn, pass by pass, so that a machine that is busy slows all of them alike.

    Arguments and result are those of `latency`, one number per network.
    """
    args, kwargs = as_arguments(models[0], with_rows(example_inputs, batch))
    on_gpu = any(isinstance(t, Tensor) and t.is_cuda for t in pytree.tree_leaves((args, kwargs)))
    modes = {module: module.training for model in models for module in model.modules()}
    times: list[list[float]] = [[] for _ in models]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            for step in range(warmup + repeats):
                for model, own in zip(models, times, strict=True):
                    start = time.perf_counter()
                    model(*args, **kwargs)
                    if on_gpu:  # kernels run behind the caller's back
                        torch.cuda.synchronize()
                    if step >= warmup:
                        own.append(time.perf_counter() - start)
    finally:
        for module, training in modes.items():
            module.training = training
    return [statistics.median(own) for own in times]


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
