"""What a network costs: parameters, bytes, multiply-accumulates, measured latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from ockham.surgery.cloning import named_tensors
from ockham.surgery.comparing import as_arguments


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
    """Count parameters, bytes and multiply-accumulates (matrix products, convolutions, attention).

    Args:
        model: any network; it runs once, in evaluation mode, and is left as it is.
        example_inputs: as for `trace`; the batch counts.
    """
    args, kwargs = as_arguments(example_inputs)
    tensors = named_tensors(model)
    counter = FlopCounterMode(display=False)
    modes = {module: module.training for module in model.modules()}
    try:
        with counter, torch.no_grad():
            model.eval()(*args, **kwargs)
    finally:
        for module, training in modes.items():
            module.training = training
    learned = sum(t.numel() for t in tensors.values() if isinstance(t, nn.Parameter))
    held = sum(t.numel() * t.element_size() for t in tensors.values())
    return Cost(learned, held, counter.get_total_flops() // 2)


def latency(model: nn.Module, example_inputs: Any, *, batch: int = 1, repeats: int = 20, warmup: int = 5) -> float:
    """Measure the median time of a forward pass in seconds, warm.

    Args:
        model: any network; runs in evaluation mode and is left as it is.
        example_inputs: as for `trace`; every tensor is repeated or cut to `batch` rows.
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
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: _rows(t, batch), as_arguments(example_inputs))
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
                    _wait(args, kwargs)
                    if step >= warmup:
                        own.append(time.perf_counter() - start)
    finally:
        for module, training in modes.items():
            module.training = training
    return [statistics.median(own) for own in times]


def _rows(tensor: Tensor, batch: int) -> Tensor:
    if tensor.ndim == 0:
        return tensor
    index = torch.arange(batch, device=tensor.device) % tensor.shape[0]
    return tensor.index_select(0, index)


def _wait(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Wait for the device: kernels on a GPU run behind the caller's back."""
    if any(isinstance(t, Tensor) and t.is_cuda for t in pytree.tree_leaves((args, kwargs))):
        torch.cuda.synchronize()
