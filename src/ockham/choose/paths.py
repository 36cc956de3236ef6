"""Inclusion of nodes and inputs of a chain of layers, from the inclusion of its weights: is there a path that lives?

The path rule walks back from the outputs, a = 1 there:

    a_j = 1 - prod_k (1 - pi_jk a_k)

with pi_jk the inclusion of the weight from node j to node k. A node whose only consumers are dead is dead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ockham.core.posterior import Posterior
from ockham.errors import OckhamError

__all__ = [
    "NodeRule",
    "Nodes",
    "by_max",
    "by_path",
    "by_product",
    "chain_weights",
    "living",
    "node_inclusion",
]

NodeRule = Callable[[Tensor, Tensor], Tensor]
"""(pi of the outgoing weights [consumers, nodes], inclusion of the consumers [consumers]) to inclusion [nodes]."""


def by_path(pi: Tensor, consumers: Tensor) -> Tensor:
    """The default: 1 - prod_k (1 - pi_jk a_k), probability of a living path if the weights are independent."""
    return 1 - _log_none(pi * consumers.unsqueeze(1)).sum(0).exp()


def by_product(pi: Tensor, consumers: Tensor) -> Tensor:
    """1 - prod_k (1 - pi_jk), consumers taken as alive. Inflates noise: 400 weights at pi = .035 give 1.0."""
    return 1 - _log_none(pi).sum(0).exp()


def by_max(pi: Tensor, consumers: Tensor) -> Tensor:
    """max_k pi_jk, consumers taken as alive. Does not add up weak weights; counts weights into dead nodes."""
    return pi.amax(0)


@dataclass(frozen=True, slots=True, eq=False)
class Nodes:
    """Inclusion of the nodes of a chain.

    Attributes:
        inputs: of each input, shape [inputs]; the importance of a feature.
        hidden: weight's name to the inclusion of the nodes it *makes* (its outputs), all but the last layer's.
    """

    inputs: Tensor
    hidden: Mapping[str, Tensor]


def node_inclusion(
    weights: Mapping[str, Tensor], order: Sequence[str] | None = None, rule: NodeRule = by_path
) -> Nodes:
    """Inclusion of nodes and inputs of a chain of layers.

    Args:
        weights: weight's name to inclusion probabilities [outputs, inputs] (more dimensions, kernels, are combined by
            1 - prod(1 - pi)); neighbours must fit. Flattened images between a convolution and a linear layer fit where
            the inputs are a multiple of the outputs before.
        order: names from input to output; default the order of ``weights``.
        rule: `by_path` (default), `by_product` or `by_max`.

    Raises:
        OckhamError: no weights, or neighbours that do not fit.

    >>> first = torch.tensor([[0.9, 0.1], [0.9, 0.9]])
    >>> last = torch.tensor([[1.0, 0.0]])
    >>> node_inclusion({"fc1": first, "fc2": last}).inputs
    tensor([0.9000, 0.1000])
    """
    names = list(weights if order is None else order)
    if not names:
        raise OckhamError("node_inclusion needs at least one weight matrix")
    alive = torch.ones(weights[names[-1]].shape[0], dtype=torch.float64, device=weights[names[-1]].device)
    hidden: dict[str, Tensor] = {}
    for name in reversed(names):
        pi = _matrix(name, weights[name], len(alive))
        alive = rule(pi, alive)
        before = names.index(name) - 1
        if before >= 0:
            alive = _folded(alive, weights[names[before]].shape[0], names[before], name)
            hidden[names[before]] = alive
    kind = weights[names[0]].dtype
    return Nodes(alive.to(kind), {n: hidden[n].to(kind) for n in names[:-1]})


def chain_weights(model: nn.Module, posterior: Posterior) -> dict[str, Tensor]:
    """Inclusion of the weights of a chain of Linear and convolution layers, in the order of the network.

    Raises:
        OckhamError: a posterior without inclusion probabilities (make them with `ockham.inclusion`), or a network whose
            layers are not a chain of children (`nn.Sequential` and the like): name the order yourself then.
    """
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            key = f"{name}.weight" if name else "weight"
            if key not in posterior or posterior[key].inclusion is None:
                raise OckhamError(f"the posterior has no inclusion probabilities for {key!r}; see ockham.inclusion")
            value = posterior[key].inclusion
            assert value is not None
            found[key] = value
    return found


def living(keep: Mapping[str, Tensor], order: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Masks without the weights that no path from an input to an output leads through.

    A unit lives where a living weight reads it and one feeds it; the weights of dead units, and their biases, are left
    out. A unit that only a bias feeds is a constant and counts as dead: refit, or fold it, if it mattered.

    Args:
        keep: boolean masks, True = stays: weights [outputs, inputs, ...] of a chain, and biases "....bias" beside them.
        order: names of the weights from input to output; default all of two or more dimensions, in their order.

    Returns:
        New masks by name; a flattened image between two layers counts as one unit per channel.

    Raises:
        OckhamError: neighbours that do not fit.

    >>> first, last = torch.tensor([[True, False], [False, False]]), torch.tensor([[True, True]])
    >>> living({"fc1.weight": first, "fc2.weight": last})["fc2.weight"]
    tensor([[ True, False]])
    """
    names = [n for n, m in keep.items() if m.ndim > 1] if order is None else list(order)
    found = {n: m.clone() for n, m in keep.items()}
    for _ in names:
        for before, after in pairwise(names):
            units = len(found[before])
            if found[after].shape[1] % units:
                raise OckhamError(
                    f"{before!r} makes {units} outputs, {after!r} reads {found[after].shape[1]}: no chain"
                )
            read = found[after].flatten(2).any(-1) if found[after].ndim > 2 else found[after]
            alive = read.any(0).view(units, -1).any(1) & found[before].flatten(1).any(1)
            found[before] &= alive.view(-1, *[1] * (found[before].ndim - 1))
            spread = alive.repeat_interleave(found[after].shape[1] // units)
            found[after] &= spread.view(1, -1, *[1] * (found[after].ndim - 2))
            bias = before.removesuffix("weight") + "bias"
            if bias in found:
                found[bias] &= alive
    return found


def _log_none(pi: Tensor) -> Tensor:
    return torch.log1p(-pi.clamp(0.0, 1.0))


def _matrix(name: str, pi: Tensor, outputs: int) -> Tensor:
    if pi.ndim < 2 or pi.shape[0] != outputs:
        raise OckhamError(f"{name!r}: inclusion of shape [{outputs}, inputs] expected; got {tuple(pi.shape)}")
    kernels = pi.double().flatten(2) if pi.ndim > 2 else pi.double().unsqueeze(2)
    return 1 - _log_none(kernels).sum(2).exp()


def _folded(alive: Tensor, outputs: int, before: str, name: str) -> Tensor:
    """Inclusion of the nodes before, where each of them feeds several inputs (a flattened image)."""
    if len(alive) % outputs:
        raise OckhamError(f"{before!r} makes {outputs} outputs, {name!r} reads {len(alive)} inputs: not a chain")
    return 1 - _log_none(alive.view(outputs, -1)).sum(1).exp()
