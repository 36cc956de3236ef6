"""Natural-gradient Gaussian variational inference at the price of Adam (IVON), in the shape of an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor
from typing_extensions import override

from ockham.core.posterior import Gaussian, Posterior
from ockham.core.processes import ALONE, holders
from ockham.errors import OckhamError
from ockham.fit.memory import RunFacts, Schedule, schedule_of
from ockham.fit.optimizer import VariationalOptimizer
from ockham.fit.priors import FixedPrior, GroupPrior, Prior

__all__ = [
    "IVON",
    "Health",
]

_TURNOVER = 3.0  # c of beta2 = 1 - c / T: e^-3 = 5 % of the first Hessian is left at the end
_MOMENTUM = {torch.float32: torch.bfloat16}  # its rounding is far below the noise of a gradient (decisions)
_NOISY_STEPS = 300  # without T, beta2 = 1 - c / max(t, 300)


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the spread of an IVON posterior comes from the data.

    Attributes:
        steps: number of steps taken by the parameter that took the most.
        first_hessian_left: weight of the initial Hessian in the running average, 1 at the start; where it is large,
            the posterior's spread is initialisation.
        spread: coefficient of variation of the precision inside a parameter tensor, averaged over living weights.
        negative: share of living weights whose estimated curvature is below zero (noise, or a saddle).
        inflation: factor by which noise makes h + d, so the precision and all evidence, too large; 1 is none.
        warnings: sentences for people; empty when all is well.
    """

    steps: int
    first_hessian_left: float
    spread: float
    negative: float
    inflation: float
    warnings: tuple[str, ...]


class IVON(VariationalOptimizer):
    r"""q(w) = prod_i N(mean_i, 1 / P_i) with P = (N / T) h + P0 and a running diagonal Hessian h of the mean NLL.

    At a draw w = mean + e / sqrt(P) with gradient g of the *mean* NLL, and d = T P0 / N the prior as weight decay,

        g_avg <- b1 g_avg + (1 - b1) g                          h_new = g e sqrt(P)
        h     <- b2 h + (1 - b2) h_new + 1/2 (1 - b2)^2 (h - h_new)^2 / (h + d)
        mean  <- mean - lr s (g_avg / (1 - b1^t) + d (mean - m0)) / (h + d)

    The last term of h is the retraction that keeps h + d, so P, positive. s is the initial h + d averaged over the
    group: a first step is lr times the gradient, as that of SGD.

    b2 decides how much of the posterior's spread is data: of the first Hessian a share b2^T stays. By default
    b2 = 1 - 3 / ``steps``; without ``steps`` it is 1 - 3 / max(t, 300) at step t, which forgets the start as well.

    Args:
        params: `model.named_parameters()`, or dicts of named groups with any of the options below.
        n_data: N, the number of summed log-likelihood terms.
        lr: learning rate; .03 to .3 is usual.
        betas: (b1, b2); b2 None chooses as above.
        steps: planned steps T of the run, for b2.
        prior: width that a weight may have; one scale per tensor.
        prior_mean: m0.
        initial_std: starting standard deviation of every weight; it must be below that of the prior.
        temperature: T; below 1 the posterior is colder, and evidence from it is tempered evidence.
        kl_warmup: steps over which the prior's pull on the mean gets its weight; learned priors move only after them.
            The spread needs none: it starts at ``initial_std``.
        prior_interval: steps between two updates of a learned prior.
        seed: number that starts the optimizer's own noise; global random state is never touched.

    Raises:
        OckhamError: a setting out of range, parameters without names or of another dtype.

    Memory: 5.1 floats per weight at the peak, gradient and parameter included; removed weights cost one. Momentum is
    kept in bfloat16.

    Reference: Shen et al. 2024, Variational learning is effective for large deep networks, arXiv 2402.17641,
    algorithm 1; the retraction: Lin, Schmidt & Khan 2020, arXiv 2002.10060.

    >>> net = torch.nn.Linear(3, 1)
    >>> opt = IVON(net.named_parameters(), n_data=100, steps=500)
    >>> with opt.sampled():
    ...     net(torch.ones(8, 3)).square().mean().backward()
    >>> opt.step()
    >>> round(opt.health().first_hessian_left, 3)
    0.994
    """

    _divisible = True
    _vectors = ("hessian", "exp_avg")

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        *,
        n_data: float,
        lr: float = 0.1,
        betas: tuple[float, float | None] = (0.9, None),
        steps: int | None = None,
        prior: Prior | None = None,
        prior_mean: float = 0.0,
        initial_std: float = 1e-2,
        seed: int = 0,
        **schedule: Unpack[Schedule],
    ) -> None:
        settings = {
            "n_data": n_data,
            "lr": lr,
            "betas": betas,
            "steps": steps,
            "prior": FixedPrior() if prior is None else prior,
            "prior_mean": prior_mean,
            "initial_std": initial_std,
            **schedule_of("IVON", schedule),
        }
        super().__init__(params, settings, seed=seed)

    def health(self) -> Health:
        """How much of the spread is data, and what noise does to it; best asked right after a step.

        The retraction adds 1/2 (1 - b2)^2 (h - h_new)^2 / (h + d), which noise in h_new never cancels. At equilibrium

            inflation = 1 / (1 - 1/2 (1 - b2) q),    q = sum (h_new - h)^2 / (h + d)  /  sum (h + d),

        about 1 + 1/2 (1 - b2) N / (T B) with B terms a batch: small batches of large data, a cold posterior and a
        fast b2 inflate. q is that of the last gradient; without one the inflation is 1.
        """
        if any(holders(p) is not ALONE for p in self._names):
            raise OckhamError(
                "health() of parameters that are sharded over processes is not known: look at the precisions of "
                "posterior(), which gathers them"
            )
        states = [self.state[p] for p in self._names if self.state.get(p, {}).get("step", 0) > 0]
        steps = max((s["step"] for s in states), default=0)
        left = max((s["left"] for s in states), default=1.0)
        count = max(1, sum(s["hessian"].numel() for s in states))
        precisions = [p for s in states if (p := s["hessian"].double() + s["decay"]).numel() > 1]
        spread = sum(float(p.std() / p.mean()) * p.numel() for p in precisions) / count
        negative = sum(float((s["hessian"] < 0).sum()) for s in states) / count
        inflation = self._inflation()
        return Health(steps, left, spread, negative, inflation, _warnings(left, spread, negative, inflation))

    @torch.no_grad()
    def _inflation(self) -> float:
        extra, whole = 0.0, 0.0
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None and self.state.get(p, {}).get("step", 0) > 0):
                state, index = self.state[p], self._index.get(p)
                assert p.grad is not None
                grad = p.grad.reshape(-1) if index is None else p.grad.reshape(-1)[index]
                std = self._std_(torch.empty_like(state["hessian"]), state, self._facts_of(state), group)
                change, total = (
                    state["noise"].float() * grad / std - state["hessian"],
                    state["hessian"] + state["decay"],
                )
                extra += 0.5 * (1 - _beta2(state["step"], group)) * float((change.double().square() / total).sum())
                whole += float(total.double().sum())
        return 1 / max(1 - extra / whole, 0.01) if whole else 1.0

    # ------------------------------------------------------------------ the method
    @override
    def _check_options(self, group: Mapping[str, Any]) -> None:
        name = type(self).__name__
        if group["steps"] is not None and group["steps"] < 1:
            raise OckhamError(f"{name}: steps counts steps, at least 1; got {group['steps']}")
        if group["betas"][0] is None:
            raise OckhamError(f"{name}: betas must lie in [0, 1), the second may be None; got {group['betas']}")
        if isinstance(group["prior"], GroupPrior):
            raise OckhamError(
                f"{name}: prior must be one scale per tensor, such as ockham.FixedPrior(1.0); got {group['prior']!r}"
            )
        widest = group["prior"].start_precision ** -0.5
        if not group["initial_std"] < widest:
            raise OckhamError(
                f"{name}: initial_std must be below the prior's standard deviation; got {group['initial_std']} and "
                f"{widest:g}"
            )

    @override
    def _take_over(self, given: Mapping[Tensor, Gaussian], posterior: Posterior, group: dict[str, Any]) -> None:
        """The curvature is what the posterior knows beyond *its* prior, as it was at temperature 1.

        This optimizer's own prior is put under it.
        """
        for p, g in given.items():
            prior = torch.broadcast_to(g.prior_precision, g.mean.shape)
            curvature = (g.precision - prior)[g.keep] * (posterior.temperature / group["n_data"])
            self.state[p]["hessian"].copy_(curvature.clamp_min(0))
        sums = torch.zeros(2, dtype=torch.float64)
        for state in (self.state[p] for p in given):
            precision = state["hessian"].double() + state["decay"]
            sums += torch.stack([precision.sum(), precision.new_tensor(len(precision))]).cpu()
        total, count = holders(next(iter(given))).summed(sums).tolist()
        group["scale"] = total / max(1, count)

    @override
    def _start(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        prior = group["prior"].start_precision
        decay = _decay(prior, group)
        hessian = group["temperature"] / (group["n_data"] * group["initial_std"] ** 2) - decay
        group.setdefault("scale", hessian + decay)
        return {
            "hessian": parameter.new_full((parameter.numel(),), hessian, requires_grad=False),
            "exp_avg": parameter.new_zeros(
                parameter.numel(), dtype=_MOMENTUM.get(parameter.dtype), requires_grad=False
            ),
            "prior_precision": prior,
            "decay": decay,
            "left": 1.0,
        }

    @override
    def _std_(self, out: Tensor, vectors: Mapping[str, Tensor], facts: RunFacts, group: dict[str, Any]) -> Tensor:
        torch.add(vectors["hessian"], _decay(facts.prior_precision, group), out=out)
        return out.mul_(group["n_data"] / group["temperature"]).rsqrt_()

    @override
    def _update_(self, mean: Tensor, grad: Tensor, vectors: Mapping[str, Tensor], facts: RunFacts, group: Any) -> None:
        decay, gain = _decay(facts.prior_precision, group), 1 - _beta2(facts.step, group)
        hessian, average, work = vectors["hessian"], vectors["exp_avg"], vectors["second"]
        change = work.copy_(vectors["noise"]).mul_(grad).div_(vectors["first"])  # h_new
        total = torch.add(hessian, decay, out=vectors["first"])
        change.sub_(hessian).mul_(gain).div_(total)  # u, relative
        hessian.addcmul_(total, change.addcmul_(change, change, value=0.5))  # h + d <- (h + d)(1 + u + u^2 / 2)
        beta1 = group["betas"][0]
        pull = work.copy_(average).lerp_(grad, 1 - beta1)
        average.copy_(pull)
        torch.add(hessian, decay, out=total)
        warm = decay * min(1.0, facts.step / group["kl_warmup"]) if group["kl_warmup"] else decay
        pull.mul_(1 / (1 - beta1**facts.step)).add_(mean, alpha=warm)
        if group["prior_mean"] != 0.0:
            pull.sub_(warm * group["prior_mean"])
        mean.addcdiv_(pull, total, value=-float(group["lr"]) * group["scale"])

    @override
    def _after_step(self, group: dict[str, Any]) -> None:
        for p in (p for p in group["params"] if p.grad is not None and p.requires_grad):
            state = self.state[p]
            state["left"] *= _beta2(state["step"], group)
            if isinstance(group["prior"], FixedPrior) or state["step"] < max(1, group["kl_warmup"]):
                continue
            if state["step"] % group["prior_interval"] != 0:
                continue
            g = self._gaussian(p, group)
            mean = (g.mean - group["prior_mean"])[g.keep].double()
            moment = float((1 / g.precision[g.keep].double() + mean**2).sum())
            state["prior_precision"] = group["prior"].updated(state["prior_precision"], int(g.keep.sum()), moment)
            decay = _decay(state["prior_precision"], group)
            # where the curvature estimate is below zero a wider prior must not make the precision negative
            state["hessian"].clamp_min_(-0.5 * decay)
            state["decay"] = decay


def _decay(prior_precision: float, group: Mapping[str, Any]) -> float:
    return float(prior_precision * group["temperature"] / group["n_data"])


def _beta2(step: int, group: Mapping[str, Any]) -> float:
    if group["betas"][1] is not None:
        return float(group["betas"][1])
    span = max(step, _NOISY_STEPS) if group["steps"] is None else max(group["steps"], 10)
    return 1 - _TURNOVER / span


def _warnings(left: float, spread: float, negative: float, inflation: float) -> tuple[str, ...]:
    found = []
    if left > 0.25:
        found.append(
            f"{left:.0%} of the first Hessian is left: the spread is largely initialisation. Train longer, give "
            "steps=, or warm-start by start_from(ockham.laplace(...))."
        )
    if spread < 0.02:
        found.append(f"the precision hardly varies inside a layer ({spread:.1%}): evidence is magnitude pruning here.")
    if negative > 0.2:
        found.append(f"{negative:.0%} of the weights have a negative curvature estimate: a larger b2 averages longer.")
    if inflation > 1.5:
        found.append(
            f"gradient noise makes the precision, and evidence from it, about {inflation:.1f} times too large: "
            "take a larger b2 (betas), larger batches or more steps; "
            "after start_from(ockham.laplace(...)) b2 = 0.9999 will do."
        )
    return tuple(found)
