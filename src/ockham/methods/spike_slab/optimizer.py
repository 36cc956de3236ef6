"""SpikeSlab: training by draws, or by moments carried through the layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ockham.core.posterior import Gaussian, Posterior
from ockham.errors import OckhamError
from ockham.fit.mean_field import adam_
from ockham.fit.memory import Schedule, Span, cache_chunks, schedule_of, sliced
from ockham.fit.optimizer import VariationalOptimizer
from ockham.methods.spike_slab.formulas import (
    gaussian_spike_log_odds,
    inclusion_slope,
    slab_kl,
    spike_slab_kl,
    weight_variance,
)
from ockham.methods.spike_slab.priors import FixedSpikeSlab, SlabPrior
from ockham.run.compression import Training

__all__ = [
    "InclusionUpdate",
    "Propagation",
    "Run",
    "SlabFacts",
    "SpikeSlab",
    "by_gradient",
    "by_moments",
    "kl_share",
    "spike_slab",
    "variance_of_output",
    "without_noise",
]


_SMALLEST = 1e-16


@singledispatch
def variance_of_output(layer: nn.Module, x: Tensor, variances: dict[Tensor, Tensor]) -> Tensor | None:
    """Variance of a layer's output, from those of its weight and bias; None for layers that do not allow it."""
    return None


@variance_of_output.register
def _(layer: nn.Linear, x: Tensor, variances: dict[Tensor, Tensor]) -> Tensor:
    return F.linear(x.square(), variances[layer.weight], _bias(layer, variances))


@variance_of_output.register(nn.Conv1d)
@variance_of_output.register(nn.Conv2d)
@variance_of_output.register(nn.Conv3d)
def _(layer: Any, x: Tensor, variances: dict[Tensor, Tensor]) -> Tensor:
    variance: Tensor = layer._conv_forward(x.square(), variances[layer.weight], _bias(layer, variances))
    return variance


def _bias(layer: Any, variances: dict[Tensor, Tensor]) -> Tensor | None:
    return None if layer.bias is None else variances.get(layer.bias)


class Propagation:
    """Forward hooks that add the noise, and the variances they use while a block lasts."""

    def __init__(self) -> None:
        self.layers: list[nn.Module] = []
        self.parameters: list[Tensor] = []
        self.driven = False
        self.variances: dict[Tensor, Tensor] = {}
        self.probes: dict[Tensor, Tensor] = {}
        self._handles: list[Any] = []

    def attach(self, model: nn.Module, held: set[Tensor], noise: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Hook every layer that allows it and whose weight is ``held`` and used by no other module."""
        self.detach()
        owners: dict[Tensor, list[nn.Module]] = {}
        for module in model.modules():
            for p in module.parameters(recurse=False):
                owners.setdefault(p, []).append(module)

        # Attention reads the weights of its projections; their forward is never called.
        attention = (m for m in model.modules() if isinstance(m, nn.MultiheadAttention))
        inside = {m for a in attention for m in a.modules() if m is not a}
        hook = _Hook(self, noise)
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            allowed = variance_of_output.dispatch(type(module)) is not variance_of_output.dispatch(object)
            if not allowed or not own or any(p not in held or len(owners[p]) > 1 for p in own):
                continue
            if getattr(module, "weight", None) not in held:
                continue  # computed from other parameters, as by torch.nn.utils.prune
            if module in inside:
                continue
            self.layers.append(module)
            self.parameters += own
            self._handles.append(module.register_forward_hook(hook))
        return self.parameters

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self.layers, self.parameters, self._handles = [], [], []


class _Hook:
    """Adds the noise while a block lasts; a copied network shares it."""

    def __init__(self, owner: Propagation, noise: Callable[[Tensor], Tensor]) -> None:
        self.owner, self.noise = owner, noise

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not self.owner.variances:
            return output
        variance = variance_of_output(layer, args[0], self.owner.variances)
        assert variance is not None
        return output + variance.clamp_min(_SMALLEST).sqrt() * self.noise(output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return self


def without_noise(model: nn.Module) -> nn.Module:
    """Take the hooks of every `Propagation` off a network, in place: for copies that are handed out."""
    for module in model.modules():
        for key in [k for k, hook in module._forward_hooks.items() if isinstance(hook, _Hook)]:
            del module._forward_hooks[key]
    return model


@dataclass(frozen=True, slots=True)
class SlabFacts:
    """What all weights of a run share.

    Attributes:
        step: steps taken, the current one included.
        prior_precision: E[1/v1].
        log_slab_variance: E[ln v1].
        log_rate: E ln p0.
        log_rest: E ln(1 - p0).
        propagated: flag, True where the noise enters through pre-activations.
        driven: flag, True where inclusion follows the gradient instead of the running moments.
    """

    step: int
    prior_precision: float
    log_slab_variance: float
    log_rate: float
    log_rest: float
    propagated: bool
    driven: bool


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Moments of a run of weights, and the gradients of the mean NLL with respect to E[w] and Var[w]."""

    mean: Tensor
    variance: Tensor
    inclusion: Tensor
    mean_grad: Tensor
    variance_grad: Tensor

    def gradients(self, pull: float, precision: Tensor | float) -> tuple[Tensor, Tensor]:
        """(dL/dm, dL/dln s), both divided by pi."""
        of_mean = self.mean_grad + 2 * (1 - self.inclusion) * self.mean * self.variance_grad
        of_log_std = 2 * self.variance * self.variance_grad + pull * (precision * self.variance - 1)
        return of_mean.add_(self.mean * (pull * precision)), of_log_std


InclusionUpdate = Callable[[Run, Tensor, SlabFacts, Mapping[str, Any]], Tensor]
"""(run, logit, facts, group) to the direction in which the logit of the inclusion moves, nats."""


def by_gradient(here: Run, logit: Tensor, facts: SlabFacts, group: Mapping[str, Any]) -> Tensor:
    """Natural gradient of the ELBO, k (log_odds - K - logit) + D; for gradients of little noise."""
    cost = slab_kl(here.mean, here.variance, facts.prior_precision, facts.log_slab_variance)
    spike = group["prior"].spike_variance
    slope = inclusion_slope(here.mean_grad, here.variance_grad, here.mean, here.variance, here.inclusion, spike)
    drive = slope.mul_(-group["n_data"] / group["temperature"])
    return drive.add_(facts.log_rate - facts.log_rest - cost - logit, alpha=kl_share(facts.step, group))


def by_moments(here: Run, logit: Tensor, facts: SlabFacts, group: Mapping[str, Any]) -> Tensor:
    """Target minus logit; the target is `inclusion_log_odds` of the running mean and std, or that of a wide spike."""
    log_odds, spike = facts.log_rate - facts.log_rest, group["prior"].spike_variance
    if spike > 0:
        slab_variance, log_variance = 1 / facts.prior_precision, facts.log_slab_variance
        within = here.variance.clamp_max(slab_variance)  # on its way a component may be wider than its prior
        odds = gaussian_spike_log_odds(
            here.mean, within, log_odds, slab_variance, spike, log_slab_variance=log_variance
        )
        return odds - logit
    occam = 0.5 * (here.variance.log() - facts.log_slab_variance)  # `inclusion_log_odds`, without its checks
    return occam + log_odds + 0.5 * here.mean.square() / here.variance - logit


def kl_share(step: int, group: Mapping[str, Any]) -> float:
    """Weight of the KL at a step of the warm-up, 0..1."""
    return float(min(1.0, step / group["kl_warmup"])) if group["kl_warmup"] else 1.0


_LOGIT_LIMIT = 14.0


class SpikeSlab(VariationalOptimizer):
    r"""q(w_i) = pi_i N(m_i, s_i^2) + (1 - pi_i) spike, trained with the same verbs as `ockham.MeanField`.

    Outside `sampled` the parameters hold E[w] = pi m. Inside, they hold a draw of the Gaussian with the same mean and
    variance, V = pi s^2 + pi (1 - pi) m^2 + (1 - pi) v0, which a pre-activation summed over many inputs cannot tell
    from the mixture. With g_E and g_V the gradients of the mean negative log-likelihood with respect to E[w] and V,
    and a = k T / N (N = n_data, T = temperature, k the warm-up),

        dL/dm    = g_E + 2 (1 - pi) m g_V + a m E[1/v1]          (divided by pi, which changes no optimum)
        dL/dln s = 2 s^2 g_V + a (s^2 E[1/v1] - 1)
        by gradient:  logit pi <- logit pi + rate [ k (log_odds - K - logit pi) + D ],   D = -(N / T) dNLL/dpi
        by moments:   logit pi <- logit pi + rate [ log_odds - delta_f - logit pi ]

    The first is a natural-gradient step of the ELBO and needs gradients of little noise: `propagate` offers it where
    the noise can enter through the moments of pre-activations (Linear and convolutions). All other parameters take the
    second from their running mean and variance. `updates` says which is which.

    Args:
        params: `model.named_parameters()`, or dicts of parameter groups. Frozen parameters are left alone.
        n_data: N, the number of summed log-likelihood terms (tokens for a language model).
        lr: learning rate of m.
        betas: decay rates of Adam's moments.
        eps: Adam's addition to the root of the second moment.
        prior: `ockham.FixedSpikeSlab` or `ockham.LearnedSpikeSlab`.
        initial_inclusion: probability pi at the start.
        initial_std: standard deviation s at the start.
        std_rate: learning rate of ln s as a multiple of ``lr``.
        inclusion_rate: rate of the logit at the largest learning rate so far, in (0, 1]; it falls with the learning
            rate, so that all comes to rest together.
        temperature: T; below 1 the posterior is colder, and its inclusion probabilities are tempered.
        kl_warmup: steps over which the KL gets its weight; learned priors move only after them.
        prior_interval: steps between two updates of a learned prior.
        seed: number that starts the optimizer's own noise; global random state is never touched.

    Raises:
        OckhamError: a setting out of range, parameters without names or of another dtype.

    Memory: 10 floats per weight at the peak, gradient and parameter included; 11 where propagated (benchmarks).

    Reference: paired form, Titsias & Lazaro-Gredilla 2011; Saha, Liu & Liang. Moments of pre-activations: Wang &
    Manning 2013; Kingma, Salimans & Welling 2015.

    >>> net = torch.nn.Linear(3, 1)
    >>> opt = SpikeSlab(net.named_parameters(), n_data=100)
    >>> with opt.sampled():
    ...     net(torch.ones(8, 3)).square().mean().backward()
    >>> opt.step()
    >>> opt.posterior()["weight"].inclusion.shape
    torch.Size([1, 3])
    """

    _prior_kind = (SlabPrior, "FixedSpikeSlab(0.1)")
    _vectors: tuple[str, ...] = ("log_std", "logit", "exp_avg", "exp_avg_sq", "std_avg", "std_avg_sq")

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        *,
        n_data: float,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        prior: SlabPrior | None = None,
        initial_inclusion: float = 0.9,
        initial_std: float = 1e-2,
        std_rate: float = 1.0,
        inclusion_rate: float = 0.02,
        seed: int = 0,
        **schedule: Unpack[Schedule],
    ) -> None:
        settings = {
            "n_data": n_data,
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "prior": FixedSpikeSlab() if prior is None else prior,
            "prior_mean": 0.0,
            "initial_inclusion": initial_inclusion,
            "initial_std": initial_std,
            "std_rate": std_rate,
            "inclusion_rate": inclusion_rate,
            **schedule_of("SpikeSlab", schedule),
        }
        self._propagation, self._awaits = Propagation(), False
        super().__init__(params, settings, seed=seed)

    def propagate(self, model: nn.Module, *, update: InclusionUpdate = by_moments) -> dict[str, str]:
        """Let the noise of Linear and convolution layers enter through the moments of their pre-activations.

        Their weights stay at E[w] inside `sampled`; each layer's output gets its own Gaussian noise per example, of
        variance F(x^2, V). Gradients are far less noisy; other parameters go on as before.

        Args:
            model: network of this optimizer's parameters; its forward hooks stay until `release`.
            update: rule for the inclusion in these layers, `by_moments` or `by_gradient` of
                `ockham.methods.spike_slab.optimizer`.
                The gradient is exact and needs batches large enough that N
                times a gradient's noise stays below the evidence; moments are robust (measured: docs/decisions.md).

        Returns:
            `updates` after it.

        Raises:
            OckhamError: called inside `sampled`, or another update.
        """
        self._outside("propagate")
        self._awaits, held = False, {p: self._group_of(p) for p in self._names if p.requires_grad}
        if update not in (by_gradient, by_moments):
            raise OckhamError(
                "propagate: update must be by_moments or by_gradient of ockham.methods.spike_slab.optimizer"
            )
        self._propagation.driven = update is by_gradient
        for p in self._propagation.attach(model, set(held), self._noise_like):
            self._ensure(p, held[p]).update(propagated=True, driven=update is by_gradient)
        if "variance_grad" not in self._vectors:
            self._vectors = (*self._vectors, "variance_grad")
            for state in self.state.values():
                state["variance_grad"] = torch.zeros_like(state["logit"])
        self._arenas.clear()
        return self.updates()

    def release(self) -> None:
        """Take the hooks of `propagate` off the model again."""
        self._propagation.detach()
        for state in self.state.values():
            state.update(propagated=False, driven=False)

    def updates(self) -> dict[str, str]:
        """How the inclusion of each parameter is found (by gradient or by moments), and where its noise enters."""
        rules = {True: "by gradient", False: "by moments"}
        places = {True: "noise in pre-activations", False: "noise in weights"}
        held = {n: self.state.get(p, {}) for p, n in self._names.items() if p.requires_grad}
        return {n: f"{rules[bool(s.get('driven'))]}; {places[bool(s.get('propagated'))]}" for n, s in held.items()}

    def plain(self, model: nn.Module) -> nn.Module:
        """Take the hooks of `propagate` off a network, in place."""
        return without_noise(model)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly where the saved optimizer was.

        Raises:
            OckhamError: as for every optimizer of this family; also when the saved one had its noise propagated and
                this one has not: call `propagate` first.
        """
        super().load_state_dict(state_dict)
        held = set(self._propagation.parameters)
        driven = self._propagation.driven
        for p, state in self.state.items():
            if state["propagated"] and p not in held:
                raise OckhamError(
                    f"the saved optimizer had the noise of {self._names[p]!r} propagated: call propagate(model) before "
                    "load_state_dict()"
                )
            state["propagated"] = p in held
            state["driven"] = p in held and driven
            if "variance_grad" in self._vectors and "variance_grad" not in state:
                state["variance_grad"] = torch.zeros_like(state["logit"])

    def sliced(self, parameters: Mapping[str, Tensor], take: Callable[[str, Tensor], Tensor]) -> SpikeSlab:
        """A copy over the parameters of a smaller network; `follow` puts the noise where it was in this one."""
        twin = sliced(self, parameters, take)
        assert isinstance(twin, SpikeSlab)
        for state in twin.state.values():
            state.update(propagated=False, driven=False)
        return twin

    def follow(self, network: nn.Module) -> None:
        """Propagate in the smaller network as in the one before, if its noise was propagated."""
        if self._awaits:
            self.propagate(without_noise(network), update=by_gradient if self._propagation.driven else by_moments)

    def __getstate__(self) -> dict[str, Any]:
        """Hooks stay with the network they are on: a copy of an optimizer that propagates awaits `follow`."""
        fresh, awaits = Propagation(), self._awaits or bool(self._propagation.parameters)
        fresh.driven = self._propagation.driven
        return {**super().__getstate__(), "_propagation": fresh, "_awaits": awaits}

    # ------------------------------------------------------------------ the method
    def _check_options(self, group: Mapping[str, Any]) -> None:
        name = type(self).__name__
        if not 0 < group["initial_inclusion"] < 1:
            raise OckhamError(f"{name}: initial_inclusion is a probability in (0, 1); got {group['initial_inclusion']}")
        if not 0 < group["inclusion_rate"] <= 1:
            raise OckhamError(f"{name}: inclusion_rate must lie in (0, 1]; got {group['inclusion_rate']}")

    def _take_over(self, given: Mapping[Tensor, Gaussian], posterior: Posterior, group: dict[str, Any]) -> None:
        for p, g in given.items():
            state = self.state[p]
            state["log_std"].copy_(g.std[g.keep].log())
            if g.inclusion is not None:
                state["logit"].copy_(g.inclusion[g.keep].logit().clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT))
            p[g.keep] = g.mean[g.keep] * torch.sigmoid(state["logit"])

    def _kl_of(self, p: Tensor, group: dict[str, Any]) -> float:
        facts = self._facts_of(self.state[p])
        mean, variance, pi = self._moments(p)
        cost = slab_kl(mean, variance, facts.prior_precision, facts.log_slab_variance)
        return float(spike_slab_kl(pi, cost, facts.log_rate, facts.log_rest).sum())

    def _start(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        vectors = {name: parameter.new_zeros(parameter.numel(), requires_grad=False) for name in self._vectors}
        vectors["log_std"].fill_(math.log(group["initial_std"]))
        vectors["logit"].fill_(math.log(group["initial_inclusion"] / (1 - group["initial_inclusion"])))
        prior: SlabPrior = group["prior"]
        precision = prior.start_precision
        rates = dict(zip(("log_rate", "log_rest"), prior.start_rates, strict=True))
        log_variance = -math.log(precision)
        return {
            **vectors,
            "prior_precision": precision,
            "log_slab_variance": log_variance,
            **rates,
            "propagated": False,
            "driven": False,
        }

    def _facts_of(self, state: Mapping[str, Any]) -> SlabFacts:  # type: ignore[override]
        names = ("step", "prior_precision", "log_slab_variance", "log_rate", "log_rest", "propagated", "driven")
        return SlabFacts(*(state[n] for n in names))

    def _std_(self, out: Tensor, vectors: Mapping[str, Tensor], facts: Any, group: dict[str, Any]) -> Tensor:
        if facts.propagated:
            return out.zero_()
        for o, mean, logit, log_std in cache_chunks(out, vectors["mean"], vectors["logit"], vectors["log_std"]):
            pi, variance = torch.sigmoid(logit), (2 * log_std).exp_()
            torch.sqrt(weight_variance(mean / pi, variance, pi, group["prior"].spike_variance), out=o)
        return out

    def _update_(self, mean: Tensor, grad: Tensor, vectors: Mapping[str, Tensor], facts: Any, group: Any) -> None:
        names = (*self._vectors, "noise", "first", "second")
        for m, g, *rest in cache_chunks(mean, grad, *(vectors[n] for n in names)):
            v = dict(zip(names, rest, strict=True))
            pi, variance = torch.sigmoid(v["logit"]), (2 * v["log_std"]).exp()
            slab = m / pi
            if facts.propagated:
                variance_grad = v["variance_grad"]
            else:
                noise = v["second"].copy_(v["noise"])
                variance_grad = noise.mul_(g).div_(v["first"].mul_(2).clamp_min_(1e-30))
            here = Run(slab, variance, pi, g, variance_grad)
            pull = kl_share(facts.step, group) * group["temperature"] / group["n_data"]
            mean_grad, std_grad = here.gradients(pull, facts.prior_precision)
            towards = (by_gradient if facts.driven else by_moments)(here, v["logit"], facts, group)
            adam: dict[str, Any] = {"step": facts.step, "betas": group["betas"], "eps": group["eps"], "decay": 0.0}
            rate = float(group["lr"])
            adam_(slab, mean_grad, v["exp_avg"], v["exp_avg_sq"], lr=rate, **adam)
            adam_(v["log_std"], std_grad, v["std_avg"], v["std_avg_sq"], lr=rate * group["std_rate"], **adam)
            rate = group["inclusion_rate"] * rate / group["peak_lr"]
            logit = v["logit"].add_(towards, alpha=rate).clamp_(-_LOGIT_LIMIT, _LOGIT_LIMIT)
            torch.mul(slab, torch.sigmoid(logit), out=m)

    @torch.no_grad()
    def _after_step(self, group: dict[str, Any]) -> None:
        prior: SlabPrior = group["prior"]
        if isinstance(prior, FixedSpikeSlab):
            return
        for p in (p for p in group["params"] if p.grad is not None and p.requires_grad):
            if (state := self.state[p])["step"] >= group["kl_warmup"] and state["step"] % group["prior_interval"] == 0:
                mean, variance, pi = self._moments(p)
                included, moment = float(pi.sum()), float((pi * (mean.square() + variance)).sum())
                rates = state["log_rate"], state["log_rest"]
                state["log_rate"], state["log_rest"] = prior.updated_rates(rates, included, p.numel() - included)
                state["prior_precision"] = prior.updated(state["prior_precision"], included, moment)
                state["log_slab_variance"] = prior.log_slab_variance(state["prior_precision"], included)

    def _moments(self, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slab mean, slab variance and inclusion of the living weights, float64."""
        state, index = self.state[p], self._index.get(p)
        flat = p.detach().reshape(-1)
        mean = (flat if index is None else flat[index]).double()
        pi = torch.sigmoid(state["logit"].double())
        return mean / pi, (2 * state["log_std"].double()).exp(), pi

    @torch.no_grad()
    def _gaussian(self, p: Tensor, group: dict[str, Any]) -> Gaussian:
        state, keep = self.state[p], self._keep_of(p)
        mean, variance, pi = self._moments(p)

        def spread(values: Tensor, elsewhere: Tensor) -> Tensor:
            full = elsewhere.clone(memory_format=torch.contiguous_format)
            full[keep] = values.to(p.dtype)
            return full

        prior, zero = (torch.tensor(x, dtype=p.dtype, device=p.device) for x in (state["prior_precision"], 0.0))
        nothing = torch.zeros_like(p.detach())
        moments = spread(mean, p.detach()), spread(1 / variance, nothing + torch.inf)
        fixed = (p.detach() != 0).to(p.dtype)
        return Gaussian(*moments, prior, zero, keep, inclusion=spread(pi, fixed))

    # ------------------------------------------------------------------ noise in the pre-activations
    def _block_began(self, new: bool) -> None:
        if not self._propagation.parameters:
            return
        for group in self.param_groups if new else ():
            if (vector := self._arena(group).vectors.get("variance_grad")) is not None:
                vector.zero_()
        for p in self._propagation.parameters:
            self._propagation.variances[p] = self._variance_of(p, self._arena(self._group_of(p)).lent(p))

    def _perturbs(self, run: Span) -> bool:
        if self._awaits:
            raise OckhamError("the noise of this copy went through the layers of another network: call follow(network)")
        return not self._facts(run).propagated  # type: ignore[attr-defined]

    def _variance_of(self, p: Tensor, alive: Tensor) -> Tensor:
        """V of a parameter, shaped like it, in lent memory; its gradient is added to the state in the backward pass."""
        state, index, spike = self.state[p], self._index.get(p), self._group_of(p)["prior"].spike_variance
        flat = p.detach().reshape(-1)
        parts = (alive, flat if index is None else flat[index], state["logit"], state["log_std"])
        for out, mean, logit, log_std in cache_chunks(*parts):
            pi = torch.sigmoid(logit)
            out.copy_(weight_variance(mean / pi, (2 * log_std).exp(), pi, spike))
        leaf = alive if index is None else torch.zeros_like(flat).index_copy_(0, index, alive)
        leaf = leaf.detach().view(p.shape).requires_grad_()

        def collect(v: Tensor) -> None:
            assert v.grad is not None
            grad = v.grad.reshape(-1)
            state["variance_grad"].add_(grad if index is None else grad[index])
            v.grad = None

        leaf.register_post_accumulate_grad_hook(collect)
        return leaf

    def _block_ended(self) -> None:
        self._propagation.variances.clear()
        for p in self._propagation.parameters:
            if p.grad is not None:
                self._propagation.probes[p] = torch.linalg.vector_norm(p.grad.detach(), 1)

    @torch.no_grad()
    def _before_step(self) -> None:
        """What unscaling and clipping did to a gradient since the block, done to that of its variance."""
        for p, before in self._propagation.probes.items():
            if p.grad is not None:
                now = torch.linalg.vector_norm(p.grad, 1)
                self.state[p]["variance_grad"].mul_(torch.where(before > 0, now / before, torch.ones_like(now)))
        self._propagation.probes.clear()
        for group in self.param_groups:
            group["peak_lr"] = max(group.get("peak_lr", 0.0), float(group["lr"]))

    def _noise_like(self, t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=self._generator(t.device), device=t.device, dtype=t.dtype)


def spike_slab(model: nn.Module, training: Training, *, n_data: float, steps: int) -> VariationalOptimizer:
    """`ockham.SpikeSlab` with the settings of the run, noise in pre-activations where the layers allow it.

    A prior that is no `ockham.FixedSpikeSlab` or `ockham.LearnedSpikeSlab` gives the slab of one with inclusion 0.1.
    """
    prior = training.prior
    optimizer = SpikeSlab(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad],
        n_data=n_data,
        lr=training.learning_rate,
        prior=prior if isinstance(prior, SlabPrior) else FixedSpikeSlab(0.1, 1 / prior.start_precision),
        initial_std=training.initial_std,
        temperature=training.temperature,
        kl_warmup=round(training.kl_warmup * steps),
        prior_interval=max(1, min(100, steps // training.epochs)),
        seed=training.seed,
    )
    optimizer.hold(model)
    optimizer.propagate(model)
    return optimizer
