r"""The regularised horseshoe as a prior *during* training, in non-centred form: the expensive baseline.

    w = g v,   v ~ N(0, 1),   g^2 = c^2 t^2 / (c^2 + t^2),   t = scale * e * tau_row * lambda_weight
    e, tau, lambda ~ C+(0, 1),    c^2 ~ InvGamma(2, 6);    the last matrix has the single scale g = e

The network's weights are replaced by v and by the logarithms of the scales, all ordinary parameters; with Gaussian
factors on all of them (`ockham.MeanField`) the scales have log-normal factors. Their densities are not Gaussian, so
what the optimizer's Gaussian prior gets wrong is added to the loss at every draw (`HorseshoeNetwork.energy`).

Reference: Ghosh, Yao & Doshi-Velez 2018, arXiv 1806.05975; Piironen & Vehtari 2017, arXiv 1707.01694; the baseline of
Markovic, Friston & Kiebel 2023, arXiv 2309.12095 ("Tiered").
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ockham.errors import OckhamError
from ockham.evidence.horseshoe import log_half_cauchy, log_inverse_gamma, log_scale
from ockham.posterior.priors import FixedPrior

__all__ = ["HorseshoeNetwork", "horseshoe"]

_WIDE = 100.0  # variance of the optimizer's own prior on log scales; `energy` takes it back
_SLAB = math.log(3.0)


def horseshoe(model: nn.Module, *, scale: float = 0.01) -> HorseshoeNetwork:
    """A copy of a network whose weight matrices carry the regularised horseshoe prior.

    Args:
        model: trained or not; it is not changed. Its weights are the starting point.
        scale: global scale, small where few weights are expected to matter.

    Returns:
        The network to train:

            net = ockham.horseshoe(model)
            optimizer = ockham.MeanField(net.groups(), n_data=N, lr=5e-3)
            with optimizer.sampled():
                (criterion(net(x), y) + net.energy() / N).backward()

    Raises:
        OckhamError: there is no weight matrix, or the scale is not positive.

    >>> net = horseshoe(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    >>> net(torch.zeros(5, 3)).shape, len(net.groups())
    (torch.Size([5, 2]), 2)
    """
    if not 0 < scale < math.inf:
        raise OckhamError(f"horseshoe: scale must be positive and finite; got {scale}")
    return HorseshoeNetwork(copy.deepcopy(model), scale)


class HorseshoeNetwork(nn.Module):
    """A network whose weight matrices are products of scales and standard normals; see `horseshoe`.

    Args:
        model: becomes part of this module; its weight matrices are no parameters of their own any more.
        scale: global scale.
    """

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        named = {n: p for n, p in model.named_parameters() if p.ndim > 1 and p.requires_grad}
        if not named:
            raise OckhamError("horseshoe: the model has no weight matrix that requires a gradient")
        self.log_global = math.log(scale)
        self._keys = {name: name.replace(".", "-") for name in named}
        self._last = list(named)[-1]
        self.base = nn.ParameterDict()
        self.scales = nn.ParameterDict()
        for name, weight in named.items():
            self._add(self._keys[name], weight.detach(), last=name == self._last)
            weight.requires_grad_(False)
        self.model = model

    def forward(self, *inputs: Any) -> Any:
        """The network with the weights that the current scales and normals make."""
        return functional_call(self.model, self.weights(), inputs)

    def weights(self) -> dict[str, Tensor]:
        """Weight matrices by their name in the plain network, differentiable."""
        return {name: self.base[key] * self.log_g(name).exp() for name, key in self._keys.items()}

    def log_g(self, name: str) -> Tensor:
        """Ln g of every weight of a matrix, broadcastable to it."""
        x = self._of(name)
        if name == self._last:
            return x["all"]
        return log_scale(self.log_global + x["all"] + x["row"] + x["weight"], x["slab"])

    def energy(self) -> Tensor:
        """Minus the log density of the scales, less what the optimizer's wide Gaussian prior counts; nats, a scalar."""
        total = torch.zeros((), device=self.base[self._keys[self._last]].device)
        for name in self._keys:
            for kind, x in self._of(name).items():
                density = log_inverse_gamma(x) if kind == "slab" else log_half_cauchy(x)
                total = total - (density + x.square() / (2 * _WIDE)).sum()
        return total

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for `ockham.MeanField`: normals and vector parameters, and the logarithms of the scales."""
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        scales = [(n, p) for n, p in named if n.startswith("scales.")]
        rest = [(n, p) for n, p in named if not n.startswith("scales.")]
        return [
            {"params": rest, "prior": FixedPrior(1.0)},
            {"params": scales, "prior": FixedPrior(_WIDE), "initial_std": 0.1},
        ]

    @torch.no_grad()
    def plain(self) -> nn.Module:
        """A copy of the network with ordinary weights, at the current values of scales and normals."""
        new = copy.deepcopy(self.model)
        weights: Mapping[str, Tensor] = self.weights()
        for name, p in new.named_parameters():
            if name in weights:
                p.copy_(weights[name]).requires_grad_()
        return new

    def _add(self, key: str, weight: Tensor, *, last: bool) -> None:
        row, one = [weight.shape[0], *[1] * (weight.ndim - 1)], [1] * weight.ndim
        size = weight.square().mean().sqrt().clamp_min(1e-3)
        if last:
            shapes = {"all": one}
            start = {"all": size.log()}
        else:  # the three scales share what it takes to make the weights as large as they are
            shapes = {"all": one, "row": row, "weight": list(weight.shape), "slab": one}
            third = (size.log() - self.log_global) / 3
            start = {"all": third, "row": third, "weight": third, "slab": weight.new_tensor(_SLAB)}
        for kind, shape in shapes.items():
            self.scales[f"{key}:{kind}"] = nn.Parameter(start[kind].expand(shape).clone())
        made = size if last else log_scale(size.log(), weight.new_tensor(_SLAB)).exp()
        self.base[key] = nn.Parameter(weight / made)

    def _of(self, name: str) -> dict[str, Tensor]:
        prefix = f"{self._keys[name]}:"
        return {key.removeprefix(prefix): p for key, p in self.scales.items() if key.startswith(prefix)}
