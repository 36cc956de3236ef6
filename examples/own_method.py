"""A variational method of your own in thirty lines: natural-gradient steps, checked against the exact answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import ockham
from ockham.fit.memory import RunFacts
from ockham.fit.optimizer import VariationalOptimizer


# --8<-- [start:method]
class NaturalGradient(VariationalOptimizer):
    """Natural-gradient descent on q(w) = N(mean, std^2), whose Fisher information is diag(1 / std^2, 2).

    With L the mean NLL + (T / N) KL, a step goes by lr N std^2 dL/dmean and by lr (N / 2) dL/dln std, where
    dL/dmean = g + (T / N) P0 mean and dL/dln std = g e std + (T / N) (P0 std^2 - 1).
    """

    _vectors = ("log_std",)  # state with one number per living weight: removal compacts it, state_dict saves it

    def __init__(self, params, *, n_data, lr=0.02, prior_variance=1.0, initial_std=0.1, temperature=1.0, seed=0):
        settings = {"n_data": n_data, "lr": lr, "temperature": temperature, "prior_mean": 0.0}  # always there
        own = {"prior_variance": prior_variance, "initial_std": initial_std}
        super().__init__(params, settings | own, seed=seed)

    def _check_options(self, group: Mapping[str, Any]) -> None:
        if not 0 < group["prior_variance"] < math.inf:
            raise ockham.OckhamError(f"NaturalGradient: prior_variance must be positive; got {group['prior_variance']}")

    def _start(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        log_std = parameter.new_full((parameter.numel(),), math.log(group["initial_std"]), requires_grad=False)
        return {"log_std": log_std, "prior_precision": 1.0 / group["prior_variance"]}

    def _std_(self, out: Tensor, vectors: Mapping[str, Tensor], facts: RunFacts, group: dict[str, Any]) -> Tensor:
        return torch.exp(vectors["log_std"], out=out)  # into memory that is kept from step to step

    def _update_(self, mean: Tensor, grad: Tensor, vectors: Mapping[str, Tensor], facts: RunFacts, group: Any) -> None:
        weight, std = group["temperature"] / group["n_data"], vectors["first"]  # "first": what `_std_` wrote
        pull = weight * facts.prior_precision
        std_grad = (grad * vectors["noise"] + pull * std) * std - weight  # noise: the draw these gradients belong to
        rate = group["lr"] * group["n_data"]
        mean.sub_(rate * std.square() * (grad + pull * mean))
        vectors["log_std"].sub_(0.5 * rate * std_grad)


# --8<-- [end:method]
def main() -> None:
    """Bayesian linear regression: the mean-field optimum has the exact mean and the diagonal of the exact precision."""
    torch.manual_seed(0)
    x = torch.randn(400, 5)
    y = x @ torch.tensor([[1.0], [-0.5], [0.3], [0.0], [0.0]]) + 0.5 * torch.randn(400, 1)
    network = torch.nn.Linear(5, 1, bias=False)
    optimizer = NaturalGradient(network.named_parameters(), n_data=400)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2000)
    for _ in range(2000):
        optimizer.zero_grad()
        with optimizer.sampled():
            (2 * (network(x) - y).square().mean()).backward()  # the NLL of noise variance 1/4, less a constant
        optimizer.step()
        scheduler.step()

    found, exact = optimizer.posterior()["weight"], 4 * x.T @ x + torch.eye(5)
    print("mean      ", *(f"{v:8.4f}" for v in found.mean[0]))
    print("exact     ", *(f"{v:8.4f}" for v in torch.linalg.solve(exact, 4 * x.T @ y).squeeze()))
    print("precision ", *(f"{v:8.1f}" for v in found.precision[0]))
    print("exact     ", *(f"{v:8.1f}" for v in exact.diagonal()))
    print("delta_f   ", *(f"{v:8.2f}" for v in ockham.score(optimizer.posterior())["weight"]), "(positive: remove)")


if __name__ == "__main__":
    main()
