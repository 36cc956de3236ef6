"""Noise of weights moved into pre-activations: a ~ N(F(x, E[w]), F(x^2, V)), by forward hooks on layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Propagation",
    "variance_of_output",
    "without_noise",
]

_SMALLEST = 1e-16


@singledispatch
def variance_of_output(layer: nn.Module, x: Tensor, variances: dict[Tensor, Tensor]) -> Tensor | None:
    """Variance of a layer's output, from those of its weight and bias; None for layers that do not allow it."""
    return None


@variance_of_output.register
def _(layer: nn.Linear, x: Tensor, variances: dict[Tensor, Tensor]) -> Tensor:
    return F.linear(x.square(), variances[layer.weight], _bias(layer, variances))


def _conv(layer: Any, x: Tensor, variances: dict[Tensor, Tensor]) -> Tensor:
    variance: Tensor = layer._conv_forward(x.square(), variances[layer.weight], _bias(layer, variances))
    return variance


for _kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    variance_of_output.register(_kind, _conv)


def _bias(layer: Any, variances: dict[Tensor, Tensor]) -> Tensor | None:
    return None if layer.bias is None else variances.get(layer.bias)


class Propagation:
    """Forward hooks that add the noise, and the variances they use while a block lasts."""

    def __init__(self) -> None:
        self.layers: list[nn.Module] = []
        self.parameters: list[Tensor] = []
        self.driven = False
        self.variances: dict[Tensor, Tensor] = {}
        self.probes: dict[Tensor, Tensor] = {}
        self._handles: list[Any] = []

    def attach(self, model: nn.Module, held: set[Tensor], noise: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Hook every layer that allows it and whose weight is ``held`` and used by no other module."""
        self.detach()
        owners: dict[Tensor, list[nn.Module]] = {}
        for module in model.modules():
            for p in module.parameters(recurse=False):
                owners.setdefault(p, []).append(module)

        hook = _Hook(self, noise)
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            allowed = variance_of_output.dispatch(type(module)) is not variance_of_output.dispatch(object)
            if not allowed or not own or any(p not in held or len(owners[p]) > 1 for p in own):
                continue
            if getattr(module, "weight", None) not in held:
                continue  # computed from other parameters, as by torch.nn.utils.prune
            if module in _inside_attention(model):
                continue
            self.layers.append(module)
            self.parameters += own
            self._handles.append(module.register_forward_hook(hook))
        return self.parameters

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self.layers, self.parameters, self._handles = [], [], []


class _Hook:
    """Adds the noise while a block lasts; a copied network shares it."""

    def __init__(self, owner: Propagation, noise: Callable[[Tensor], Tensor]) -> None:
        self.owner, self.noise = owner, noise

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not self.owner.variances:
            return output
        variance = variance_of_output(layer, args[0], self.owner.variances)
        assert variance is not None
        return output + variance.clamp_min(_SMALLEST).sqrt() * self.noise(output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return self


def without_noise(model: nn.Module) -> nn.Module:
    """Take the hooks of every `Propagation` off a network, in place: for copies that are handed out."""
    for module in model.modules():
        for key in [k for k, hook in module._forward_hooks.items() if isinstance(hook, _Hook)]:
            del module._forward_hooks[key]
    return model


def _inside_attention(model: nn.Module) -> set[nn.Module]:
    """Projections whose forward is never called: attention reads their weights."""
    return {m for a in model.modules() if isinstance(a, nn.MultiheadAttention) for m in a.modules() if m is not a}
