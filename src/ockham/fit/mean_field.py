"""Mean-field Gaussian variational inference, and the point estimate, in the shape of optimizers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.adam import adam
from typing_extensions import override

from ockham.core.posterior import Gaussian, Posterior
from ockham.core.processes import holders, rows_here
from ockham.errors import OckhamError
from ockham.fit.memory import Divided, RunFacts, Schedule, schedule_of
from ockham.fit.optimizer import VariationalOptimizer
from ockham.fit.priors import VECTOR, FixedPrior, GroupPrior, Prior, learn_scales, prior_of, start_scales

__all__ = [
    "MeanField",
    "PointEstimate",
    "adam_",
]


class MeanField(VariationalOptimizer):
    r"""q(w) = prod_i N(mean_i, std_i^2), trained by Adam on the mean and on ln std.

    The loss of the block is the *mean* negative log-likelihood of the batch; the optimizer adds the KL in closed form,

        L = mean NLL + (k T / N) KL,   KL = sum_i [ (P0/2) (std_i^2 + (mean_i - m0)^2) - 1/2 - ln std_i - 1/2 ln P0 ]

    with N = n_data, T = temperature, P0 the prior precision and k rising linearly from 0 to 1 over ``kl_warmup`` steps:

        dL/dmean = g + (k T / N) P0 (mean - m0),    dL/dln std = g e std + (k T / N) (P0 std^2 - 1)

    where g is the final gradient at the draw mean + e std (after unscaling, clipping, all-reduce).

    Args:
        params: `model.named_parameters()`, or dicts of parameter groups with named ``params`` and any of the options
            below. Frozen parameters may be among them and are left alone. float32 or float64.
        n_data: N, the number of summed log-likelihood terms: training examples (after padding and weights; tokens for
            a language model).
        lr: learning rate of the mean.
        betas: decay rates of Adam's moments.
        eps: Adam's addition to the root of the second moment.
        prior: width that a weight may have; see `ockham.FixedPrior`, `ockham.LayerScale`, `ockham.EmpiricalBayes`; with
            one scale per structure `ockham.GroupScale`, `ockham.GroupHorseshoe`.
        prior_mean: m0.
        initial_std: starting standard deviation of every weight.
        std_rate: learning rate of ln std as a multiple of ``lr``.
        temperature: T; below 1 the posterior is colder, and evidence from it is tempered evidence.
        kl_warmup: steps over which the KL gets its weight; learned priors move only after them.
        prior_interval: steps between two updates of a learned prior.
        seed: number that starts the optimizer's own noise; global random state is never touched.

    Raises:
        OckhamError: a setting out of range, parameters without names or of another dtype.

    Memory: 8.5 floats per weight at the peak of a block, gradient and parameter included (one more with a scale per
    structure); removed weights cost one.

    Reference: Graves 2011; Blundell et al. 2015, arXiv 1505.05424; arXiv 2309.12095 eqs 4-6.

    >>> net = torch.nn.Linear(3, 1)
    >>> opt = MeanField(net.named_parameters(), n_data=100)
    >>> with opt.sampled():
    ...     net(torch.ones(8, 3)).square().mean().backward()
    >>> opt.step()
    >>> sorted(opt.posterior())
    ['bias', 'weight']
    """

    _divisible = True
    _vectors: tuple[str, ...] = ("log_std", "exp_avg", "exp_avg_sq", "std_avg", "std_avg_sq")

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        *,
        n_data: float,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        prior: Prior | None = None,
        prior_mean: float = 0.0,
        initial_std: float = 1e-2,
        std_rate: float = 1.0,
        seed: int = 0,
        **schedule: Unpack[Schedule],
    ) -> None:
        settings = {
            "n_data": n_data,
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "prior": FixedPrior() if prior is None else prior,
            "prior_mean": prior_mean,
            "initial_std": initial_std,
            "std_rate": std_rate,
            **schedule_of("MeanField", schedule),
        }
        entries: Any = (
            params if inspect.isgenerator(params) or not isinstance(params, Iterable) else list(params)
        )  # a generator knows its network
        groups = [] if entries is params else [g for g in entries if isinstance(g, dict)]
        given = [settings["prior"], *(g.get("prior") for g in groups)]
        if any(isinstance(prior, GroupPrior) for prior in given):
            self._vectors = (*type(self)._vectors, VECTOR)
        super().__init__(entries, settings, seed=seed)

    # ------------------------------------------------------------------ the method
    @override
    def _check_options(self, group: Mapping[str, Any]) -> None:
        if isinstance(group["prior"], GroupPrior) and VECTOR not in self._vectors:
            raise OckhamError("a prior with a scale per structure must be there from the start: build a new MeanField")

    @override
    def _take_over(self, given: Mapping[Tensor, Gaussian], posterior: Posterior, group: dict[str, Any]) -> None:
        for p, g in given.items():
            self.state[p]["log_std"].copy_(g.std[g.keep].log())

    @override
    def _start(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        vectors = {name: parameter.new_zeros(parameter.numel(), requires_grad=False) for name in self._vectors}
        vectors["log_std"].fill_(math.log(group["initial_std"]))
        start = group["prior"].start_precision
        if VECTOR in vectors:
            vectors |= start_scales(parameter, group, vectors[VECTOR].fill_(start))
        return {**vectors, "prior_precision": start}

    @override
    def _prior_of(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        if isinstance(group["prior"], GroupPrior):
            return prior_of(p, group, self.state[p])
        return super()._prior_of(p, group)

    @override
    def _std_(self, out: Tensor, vectors: Mapping[str, Tensor], facts: RunFacts, group: dict[str, Any]) -> Tensor:
        return torch.exp(vectors["log_std"], out=out)

    @override
    def _update_(self, mean: Tensor, grad: Tensor, vectors: Mapping[str, Tensor], facts: RunFacts, group: Any) -> None:
        warm = min(1.0, facts.step / group["kl_warmup"]) if group["kl_warmup"] else 1.0
        weight = float(warm * group["temperature"] / group["n_data"])
        pull = vectors.get(VECTOR, facts.prior_precision) * weight
        std = vectors["first"]
        std_grad = vectors["second"].copy_(vectors["noise"]).mul_(grad)
        std_grad = std_grad.addcmul_(std, pull) if isinstance(pull, Tensor) else std_grad.add_(std, alpha=pull)
        torch.addcmul(std.new_full((), -weight), std_grad, std, out=std_grad)
        if group["prior_mean"] != 0.0:
            grad = grad - pull * group["prior_mean"]
        if isinstance(pull, Tensor):
            grad, pull = torch.addcmul(grad, mean, pull), 0.0
        rate = float(group["lr"])
        rest: dict[str, Any] = {"step": facts.step, "betas": group["betas"], "eps": group["eps"]}
        adam_(mean, grad, vectors["exp_avg"], vectors["exp_avg_sq"], lr=rate, decay=pull, **rest)
        rate *= group["std_rate"]
        adam_(vectors["log_std"], std_grad, vectors["std_avg"], vectors["std_avg_sq"], lr=rate, decay=0.0, **rest)

    @override
    def _after_step(self, group: dict[str, Any]) -> None:
        if isinstance(group["prior"], FixedPrior):
            return
        ready = [p for p in group["params"] if p.grad is not None and p.requires_grad]
        if isinstance(group["prior"], GroupPrior):
            step = max((self.state[p]["step"] for p in ready), default=0)
            if ready and step >= group["kl_warmup"] and step % group["prior_interval"] == 0:
                moments = {p: self._moments(p, group) for p in self._arena(group).parameters}
                learn_scales(group, moments, self._index, self.state)
            return
        for p in ready:
            state = self.state[p]
            if state["step"] >= group["kl_warmup"] and state["step"] % group["prior_interval"] == 0:
                each = self._moments(p, group)
                moment, count = holders(p).summed(torch.stack([each.sum(), each.new_tensor(len(each))])).tolist()
                state["prior_precision"] = group["prior"].updated(state["prior_precision"], int(count), moment)
                if VECTOR in state:
                    state[VECTOR].fill_(state["prior_precision"])

    def _moments(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """E[(w - m0)^2] of the living weights, float64."""
        index = self._index.get(p)
        mean = rows_here(p).detach().reshape(-1)
        mean = mean if index is None else mean[index]
        variance = (2 * self.state[p]["log_std"].double()).exp()
        moments: Tensor = variance + (mean.double() - group["prior_mean"]).square()
        return moments

    @override
    def _kl_of(self, p: Tensor, group: dict[str, Any]) -> float:
        state = self.state[p]
        p0 = state.get(VECTOR, torch.tensor(state["prior_precision"], dtype=torch.float64)).double()
        logs = float(state["log_std"].double().sum())
        fit = float((p0 * self._moments(p, group)).sum())
        found = 0.5 * fit - logs - 0.5 * float((1 + p0.log()).expand(state["log_std"].shape).sum())
        return float(holders(p).summed(torch.tensor(found, dtype=torch.float64)))


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
