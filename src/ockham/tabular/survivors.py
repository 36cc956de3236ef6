"""The weights that a reduced network still has, as one vector: compact tensors, outputs, gradients of the outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from ockham.core.posterior import Posterior
from ockham.fit.predict import draw_parameters
from ockham.tabular.network import mean_output

__all__ = ["Survivors"]


@dataclass(frozen=True, slots=True, eq=False)
class Survivors:
    """Where living weights lie in the tensors of the network without its dead units.

    Attributes:
        shapes: tensor name to compact shape.
        places: tensor name to the indices of living weights in the flattened compact tensor.
        mean: [d], posterior means; float64.
        prior_precision: [d].
    """

    shapes: dict[str, tuple[int, ...]]
    places: dict[str, Tensor]
    mean: Tensor
    prior_precision: Tensor

    @staticmethod
    def of(posterior: Posterior) -> Survivors:
        """From a posterior over one network, tensors [1, ...], removed weights marked."""
        compact = _compact({n: g.keep[0] for n, g in posterior.items()})
        mean = [g.mean[g.keep].double() for g in posterior.values()]
        prior = [torch.full_like(m, float(g.prior_precision)) for m, g in zip(mean, posterior.values(), strict=True)]
        shapes = {n: tuple(k.shape) for n, k in compact.items()}
        places = {n: k.flatten().nonzero()[:, 0] for n, k in compact.items()}
        return Survivors(shapes, places, torch.cat(mean), torch.cat(prior))

    def __len__(self) -> int:
        """Living weights."""
        return len(self.mean)

    def tensors(self, vectors: Tensor) -> dict[str, Tensor]:
        """Compact tensors [D, ...] of the networks with these weights [D, d]."""
        found = {}
        parts = vectors.split([len(p) for p in self.places.values()], 1)
        for (name, place), part in zip(self.places.items(), parts, strict=True):
            size = math.prod(self.shapes[name])
            flat = vectors.new_zeros(len(vectors), size).index_copy(1, place, part)
            found[name] = flat.view(len(vectors), *self.shapes[name])
        return found

    def outputs(self, vector: Tensor, x: Tensor) -> Tensor:
        """[n, outputs] of the network with weights [d]."""
        return mean_output(self.tensors(vector.unsqueeze(0)), x)[0]

    def gradients(self, vector: Tensor, x: Tensor) -> Tensor:
        """[n, outputs, d]: d outputs / d weights at ``vector``."""

        def output(weights: Tensor, row: Tensor) -> Tensor:
            return self.outputs(weights, row.unsqueeze(0))[0]

        return vmap(jacrev(output), in_dims=(None, 0))(vector, x)  # type: ignore[no-any-return]

    def moved(self, posterior: Posterior, vector: Tensor) -> Posterior:
        """The posterior that these are the survivors of, with its means at ``vector`` [d]."""
        moments, parts = {}, vector.split([len(p) for p in self.places.values()])
        for (name, g), part in zip(posterior.items(), parts, strict=True):
            moments[name] = replace(g, mean=g.mean.masked_scatter(g.keep, part.to(g.mean.dtype)))
        return replace(posterior, moments=moments)

    def drawn(self, posterior: Posterior, draws: int, generator: torch.Generator) -> Tensor:
        """[draws, d] from the factorised posterior that these are the survivors of."""
        rows = []
        for _ in range(draws):
            one = draw_parameters(posterior, generator)
            rows.append(torch.cat([one[n][g.keep] for n, g in posterior.items()]).double())
        return torch.stack(rows)


def _compact(keep: dict[str, Tensor]) -> dict[str, Tensor]:
    """Masks without the rows of dead units and the columns that read them."""
    found: dict[str, Tensor] = {}
    read: Tensor | None = None
    for name, mask in keep.items():
        if name.startswith("hidden") and name.endswith(".weight"):
            bias = name.removesuffix("weight") + "bias"
            live = mask.any(1) | keep[bias]
            found[name] = (mask if read is None else mask[:, read])[live]
            found[bias] = keep[bias][live]
            read = live
        elif name == "out.weight" and read is not None:
            found[name] = mask[:, read]
        elif name not in found:
            found[name] = mask
    return found
