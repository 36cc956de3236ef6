"""Proof on every call: the masked network and the shrunk one give the same outputs, or an error names the layer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ockham.errors import OckhamError
from ockham.surgery.tracing import as_arguments

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class MismatchError(OckhamError):
    """The shrunk network computes something else than the masked one; the text names the first layer that differs."""


def verify(
    masked: nn.Module,
    small: nn.Module,
    example_inputs: Any,
    *,
    draws: int = 2,
    tolerance: float = 1e-5,
    generator: torch.Generator | None = None,
) -> float:
    """Compare the outputs of two networks in evaluation mode, in float64 where the model allows it.

    The difference of two outputs is ``max|a - b| / max|a|``. Both models are left as they are.

    Args:
        masked: result of `mask`.
        small: result of `shrink`, for the same plan.
        example_inputs: as for `trace`; used as they are and `draws` times with random values instead (floats of the
            same scale, integers and booleans reshuffled).
        draws: number of random inputs.
        tolerance: largest difference that counts as equal.
        generator: source of the random inputs; a fixed seed when None.

    Returns:
        The largest relative difference found.

    Raises:
        MismatchError: when it exceeds `tolerance`, when outputs are not finite, or when a network does not run.
    """
    generator = generator or torch.Generator().manual_seed(0)
    arguments = as_arguments(example_inputs)
    pair, cast = _doubled(masked, small, arguments)
    inputs = [arguments, *(_random(arguments, generator) for _ in range(draws))]
    worst = 0.0
    for given in inputs:
        difference = _difference(*(_outputs(m, cast(given)) for m in pair))
        if not difference <= tolerance:
            raise MismatchError(_explain(pair, cast(given), difference, tolerance=tolerance))
        worst = max(worst, difference)
    return worst


def _doubled(
    masked: nn.Module, small: nn.Module, arguments: Arguments
) -> tuple[tuple[nn.Module, nn.Module], Callable[[Arguments], Arguments]]:
    """Return copies in float64 and evaluation mode with a cast for inputs; in the models' own dtype if that fails."""
    own = (copy.deepcopy(masked).eval(), copy.deepcopy(small).eval())
    double = (copy.deepcopy(masked).double().eval(), copy.deepcopy(small).double().eval())
    try:
        for model in double:
            _outputs(model, _to_double(arguments))
        return double, _to_double
    except (RuntimeError, TypeError, ValueError):
        return own, lambda given: given


def _to_double(arguments: Arguments) -> Arguments:
    result: Arguments = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, arguments)
    return result


def _random(arguments: Arguments, generator: torch.Generator) -> Arguments:
    def draw(tensor: Tensor) -> Tensor:
        flat = tensor.detach().cpu()
        if flat.is_floating_point():
            scale = float(flat.double().pow(2).mean().sqrt()) if flat.numel() else 1.0
            new = torch.randn(flat.shape, generator=generator, dtype=torch.float64) * (scale or 1.0)
            return new.to(tensor.dtype).to(tensor.device)
        order = torch.randint(flat.numel(), flat.shape, generator=generator) if flat.numel() else flat.long()
        return flat.flatten()[order].to(tensor.device)

    result: Arguments = pytree.tree_map_only(Tensor, draw, arguments)
    return result


def _outputs(model: nn.Module, arguments: Arguments) -> list[Tensor]:
    args, kwargs = arguments
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model(*args, **kwargs)
    return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]


def _difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest ``max|a - b| / max|a|``; infinite for other shapes, NaN for values that are not finite."""
    if [t.shape for t in one] != [t.shape for t in other]:
        return float("inf")
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a.numel():
            gap, scale = (a.double() - b.double()).abs().max(), a.double().abs().max()
            worst = max(worst, float(gap / scale)) if float(gap) != 0.0 else worst
            if not bool(torch.isfinite(gap)):
                return float("nan")
    return worst


def _explain(pair: tuple[nn.Module, nn.Module], arguments: Arguments, difference: float, *, tolerance: float) -> str:
    traces = [_intermediate(model, arguments) for model in pair]
    for name, values in traces[0].items():
        twin = traces[1].get(name)
        if twin is not None and values.shape == twin.shape and not _difference([values], [twin]) <= tolerance:
            gap = _difference([values], [twin])
            return (
                f"masked and shrunk outputs differ by {difference:.2e} (tolerance {tolerance:.0e}); the first layer "
                f"that differs is {name!r} (by {gap:.2e}). Add it to ignore, and please report the model."
            )
    return (
        f"masked and shrunk outputs differ by {difference:.2e} (tolerance {tolerance:.0e}); no single module differs "
        "in a comparable output, so the forward of the root does. Are both from the same plan?"
    )


def _intermediate(model: nn.Module, arguments: Arguments) -> dict[str, Tensor]:
    """Return the first output of every submodule, in the order they ran."""
    found: dict[str, Tensor] = {}
    handles = []

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            first = next((t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)), None)
            if first is not None:
                found.setdefault(name, first)

        return hook

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_hook(keep(name)))
    try:
        _outputs(model, arguments)
    finally:
        for handle in handles:
            handle.remove()
    return found
