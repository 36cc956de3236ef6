"""Several small networks side by side as one flat vector each, and the moments of their outputs.

Hidden layers of rectifiers, and a linear map from the inputs straight to the outputs. With weights of mean E and
variance V a layer's pre-activation has mean F(x, E) and variance F(x^2, V); noise enters there, per example.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Layout", "affine", "mean_output"]

_SMALLEST = 1e-12
_NEXT_TO_NOTHING = 0.1


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tensors of a network lie in its flat vector.

    Attributes:
        shapes: tensor name to shape, in order: hidden.0.weight, hidden.0.bias, ..., out.weight, out.bias, skip.weight.
    """

    shapes: Mapping[str, tuple[int, ...]]

    @staticmethod
    def of(inputs: int, hidden: Sequence[int], outputs: int) -> Layout:
        """Of a network with these sizes; without hidden layers there is no map past them."""
        shapes: dict[str, tuple[int, ...]] = {}
        before = inputs
        for i, units in enumerate(hidden):
            shapes |= {f"hidden.{i}.weight": (units, before), f"hidden.{i}.bias": (units,)}
            before = units
        shapes |= {"out.weight": (outputs, before), "out.bias": (outputs,)}
        return Layout(shapes | ({"skip.weight": (outputs, inputs)} if hidden else {}))

    @property
    def size(self) -> int:
        """Weights of one network."""
        return sum(math.prod(s) for s in self.shapes.values())

    @property
    def depth(self) -> int:
        """Hidden layers."""
        return sum(n.startswith("hidden") for n in self.shapes) // 2

    @property
    def readers(self) -> tuple[str, ...]:
        """Weights that read the inputs."""
        return ("hidden.0.weight", "skip.weight") if self.depth else ("out.weight",)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of [R, size] as [R, *shape] by name."""
        parts = flat.split([math.prod(s) for s in self.shapes.values()], 1)
        return {n: part.view(-1, *s) for (n, s), part in zip(self.shapes.items(), parts, strict=True)}

    def spread(self, values: Mapping[str, float]) -> Tensor:
        """One number per tensor to one per weight, [size]."""
        return torch.cat([torch.full((math.prod(s),), float(values[n])) for n, s in self.shapes.items()])

    def start(self, stacks: int, generator: torch.Generator) -> Tensor:
        """Initial weights [R, size]: He's for weights, small biases, nothing past the hidden layers.

        The last of several networks starts next to linear: its hidden layers matter only if the data make them.
        """
        flat = torch.zeros(stacks, self.size)
        for name, part in self.split(flat).items():
            if name.endswith("bias"):
                part.uniform_(-0.5, 0.5, generator=generator)
            elif name != "skip.weight":
                part.normal_(0.0, math.sqrt(2.0 / part.shape[2]), generator=generator)
        if stacks > 1:
            self.split(flat)["out.weight"][-1] *= _NEXT_TO_NOTHING
        return flat

    def noisy_output(self, mean: Tensor, variance: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
        """Outputs [R, B, outputs] with the noise that weights of these moments [R, size] give."""
        e, v = self.split(mean), self.split(variance)
        h = x
        for i in range(self.depth):
            weight, bias = f"hidden.{i}.weight", f"hidden.{i}.bias"
            h = torch.relu(_noisy(affine(h, e[weight], e[bias]), affine(h.square(), v[weight], v[bias]), generator))
        centre, spread = (affine(h, e["out.weight"], e["out.bias"]), affine(h.square(), v["out.weight"], v["out.bias"]))
        if "skip.weight" in e:
            centre = centre + affine(x, e["skip.weight"], None)
            spread = spread + affine(x.square(), v["skip.weight"], None)
        return _noisy(centre, spread, generator)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """R affine maps: [B, in] or [R, B, in] to [R, B, out]; a shared input is multiplied once."""
    stacks, outputs, _ = weight.shape
    if x.ndim == 2:
        flat = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
        return flat.view(len(x), stacks, outputs).transpose(0, 1)
    if bias is None:
        return torch.bmm(x, weight.transpose(1, 2))
    return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))


def mean_output(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Outputs [R, B, outputs] of networks with these weights [R, ...], without noise."""
    h = x
    for i in range(sum(n.startswith("hidden") for n in tensors) // 2):
        h = torch.relu(affine(h, tensors[f"hidden.{i}.weight"], tensors[f"hidden.{i}.bias"]))
    out = affine(h, tensors["out.weight"], tensors["out.bias"])
    return out + affine(x, tensors["skip.weight"], None) if "skip.weight" in tensors else out


def _noisy(mean: Tensor, variance: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
    return torch.addcmul(mean, variance.clamp_min(_SMALLEST).sqrt(), noise)
