"""Several small networks side by side: one tensor a layer, so that restarts cost little more than one network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ockham.posterior.propagation import variance_of_output

__all__ = ["StackedLinear", "StackedMLP"]


class StackedLinear(nn.Module):
    """R affine maps: [B, in] or [R, B, in] to [R, B, out].

    Args:
        stacks: R.
        inputs: of each.
        outputs: of each.
        bias: whether they have one.
    """

    def __init__(self, stacks: int, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(stacks, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(stacks, outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [R, B, out]."""
        return stacked(x, self.weight, self.bias)


def stacked(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The maps, functionally; a shared input is multiplied once."""
    stacks, outputs, _ = weight.shape
    if x.ndim == 2:
        flat = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
        return flat.view(len(x), stacks, outputs).transpose(0, 1)
    product = torch.bmm(x, weight.transpose(1, 2))
    return product if bias is None else product + bias.unsqueeze(1)


@variance_of_output.register
def _(layer: StackedLinear, x: Tensor, variances: dict[Tensor, Tensor]) -> Tensor:
    bias = None if layer.bias is None else variances[layer.bias]
    return stacked(x.square(), variances[layer.weight], bias)


class StackedMLP(nn.Module):
    """R networks: hidden layers of rectifiers, and a linear map from the inputs straight to the outputs.

    Args:
        stacks: R.
        inputs: features.
        hidden: units of each hidden layer; may be empty.
        outputs: of the network.
        generator: of the initial weights.
    """

    def __init__(
        self, stacks: int, inputs: int, hidden: Sequence[int], outputs: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        sizes = [inputs, *hidden]
        self.hidden = nn.ModuleList(StackedLinear(stacks, a, b) for a, b in zip(sizes, hidden, strict=False))
        self.out = StackedLinear(stacks, sizes[-1], outputs)
        self.skip = StackedLinear(stacks, inputs, outputs, bias=False) if hidden else None
        for layer in (*self.hidden, self.out):
            assert isinstance(layer, StackedLinear) and layer.bias is not None
            width = math.sqrt(2.0 / layer.weight.shape[2])
            with torch.no_grad():
                layer.weight.normal_(0.0, width, generator=generator)
                layer.bias.uniform_(-0.5, 0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in] to [R, B, out]."""
        h = x
        for layer in self.hidden:
            h = torch.relu(layer(h))
        out: Tensor = self.out(h)
        return out if self.skip is None else out + self.skip(x)
