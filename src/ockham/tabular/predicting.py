"""What a fitted network predicts and what it rests on: draws of the reduced network, inclusion of the inputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ockham.posterior.posterior import Posterior
from ockham.posterior.predict import draw_parameters
from ockham.reduction.paths import NodeRule, by_path, node_inclusion
from ockham.tabular.network import affine

__all__ = ["draw_outputs", "input_inclusion", "weights_by_input"]

_ROWS = 8192


def draw_outputs(posterior: Posterior, x: Tensor, draws: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Outputs [draws, rows, outputs], float64, of networks drawn from a posterior over one network.

    Rows come in parts. Only inputs and units on living paths are computed.
    """
    layers = [n.removesuffix(".weight") for n in posterior if n.startswith("hidden") and n.endswith(".weight")]
    many = [draw_parameters(posterior, generator) for _ in range(draws)]
    network = {name: torch.cat([one[name] for one in many]).double() for name in posterior}
    live = {layer: posterior[f"{layer}.weight"].keep[0].any(1) | posterior[f"{layer}.bias"].keep[0] for layer in layers}
    for part in x.split(_ROWS):
        h, columns = part, torch.ones(part.shape[1], dtype=torch.bool)
        for layer in layers:
            weight, bias = network[f"{layer}.weight"], network[f"{layer}.bias"]
            h = torch.relu(affine(h, weight[:, live[layer]][:, :, columns], bias[:, live[layer]]))
            columns = live[layer]
        out = affine(h, network["out.weight"][:, :, columns], network["out.bias"])
        yield out + affine(part, network["skip.weight"], None) if "skip.weight" in network else out


def input_inclusion(posterior: Posterior, rule: NodeRule = by_path) -> Tensor:
    """Inclusion of the inputs of a network by a path rule, the direct weights included; float64."""
    chain = {n: g.inclusion[0] for n, g in posterior.items() if _in_chain(n) and g.inclusion is not None}
    through = node_inclusion(chain, rule=rule).inputs.double()
    if "skip.weight" not in posterior:
        return through
    direct = posterior["skip.weight"].inclusion
    assert direct is not None
    return 1 - (1 - through) * (1 - direct[0].double()).prod(0)


def weights_by_input(posterior: Posterior) -> Tensor:
    """How many living weights read each input of a reduced network."""
    first = next(n for n in posterior if _in_chain(n))
    count = posterior[first].keep[0].sum(0)
    return count + posterior["skip.weight"].keep[0].sum(0) if "skip.weight" in posterior else count


def _in_chain(name: str) -> bool:
    return name.endswith(".weight") and name != "skip.weight"
