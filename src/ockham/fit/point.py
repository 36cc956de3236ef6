"""The maximum a posteriori network, through the same door: no noise, no spread, removal for good. For baselines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from typing_extensions import override

from ockham.errors import OckhamError
from ockham.fit.memory import Divided, RunFacts
from ockham.fit.optimizer import VariationalOptimizer

__all__ = [
    "PointEstimate",
    "adam_",
]


class PointEstimate(VariationalOptimizer):
    """Adam with an optional Gaussian prior, on living weights only.

    It keeps the contract of the variational optimizers (`sampled` changes nothing, `remove` is for good), so that
    magnitude pruning gets the same rounds, budget and refit. Its `posterior` has precision = prior precision: a point
    says nothing about how well the data determine a weight, and `ockham.diagnose` says so.

    Args:
        params: `model.named_parameters()` or named groups.
        n_data: number of summed log-likelihood terms.
        lr: learning rate.
        betas: decay rates of Adam's moments.
        eps: Adam's addition to the root of the second moment.
        prior_variance: prior variance of the weights; ``inf`` (default) is no penalty at all.

    Raises:
        OckhamError: a setting out of range.
    """

    _divisible = True
    _vectors = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        *,
        n_data: float,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        prior_variance: float = math.inf,
    ) -> None:
        own = {"n_data": n_data, "lr": lr, "betas": betas, "eps": eps, "prior_variance": prior_variance}
        super().__init__(params, {**own, "prior_mean": 0.0, "temperature": 1.0}, seed=0)

    @override
    def _check_options(self, group: Mapping[str, Any]) -> None:
        if not (variance := group["prior_variance"]) > 0:
            raise OckhamError(f"{type(self).__name__}: prior_variance must be positive, inf for none; got {variance}")

    @override
    def _start(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        vectors = {name: parameter.new_zeros(parameter.numel(), requires_grad=False) for name in self._vectors}
        finite = group["prior_variance"] < math.inf
        return {**vectors, "prior_precision": 1.0 / group["prior_variance"] if finite else 1.0}

    @override
    def _std_(self, out: Tensor, vectors: Mapping[str, Tensor], facts: RunFacts, group: dict[str, Any]) -> Tensor:
        return out.fill_(facts.prior_precision**-0.5)

    @override
    def _draw_(self, noise: Tensor, divided: Divided | None = None) -> None:
        """No noise: it stays zero."""

    @override
    def _update_(self, mean: Tensor, grad: Tensor, vectors: Mapping[str, Tensor], facts: RunFacts, group: Any) -> None:
        decay = 1.0 / (group["prior_variance"] * group["n_data"])  # 0 for the flat prior
        rest = {"step": facts.step, "lr": float(group["lr"]), "betas": group["betas"], "eps": group["eps"]}
        adam_(mean, grad, vectors["exp_avg"], vectors["exp_avg_sq"], decay=decay, **rest)


_FUSED = {"cpu", "cuda", "mps", "xpu"}


def adam_(
    value: Tensor,
    grad: Tensor,
    average: Tensor,
    square: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> None:
    """One step of Adam in place (Kingma & Ba 2015) on the gradient grad + decay * value.

    Args:
        value: vector to be updated.
        grad: gradient of the loss, left as it is.
        average: first moment.
        square: second moment.
        step: number of this step, from 1.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the root of the second moment.
        decay: precision of a Gaussian pull towards zero, in the units of the gradient.
    """
    fused = value.device.type in _FUSED
    counter = torch.full((), step - 1.0, device=value.device if fused else "cpu")
    adam(
        [value],
        [grad],
        [average],
        [square],
        [],
        [counter],
        fused=fused,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=decay,
        eps=eps,
        maximize=False,
    )
