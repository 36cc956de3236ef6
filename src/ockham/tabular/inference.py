"""Paired spike-and-slab inference of stacked networks: what `ockham.SpikeSlab` does, on one vector per network.

The same updates (E4, noise in the pre-activations, learned Beta and inverse-gamma priors) with the least possible
overhead for networks of a few hundred weights, where a step of the general optimizer is all bookkeeping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ockham.core.posterior import Gaussian, Posterior
from ockham.fit.adam import adam_
from ockham.methods.spike_slab.formulas import slab_kl, spike_slab_kl, weight_variance
from ockham.methods.spike_slab.optimizer import Run
from ockham.methods.spike_slab.priors import LearnedSpikeSlab
from ockham.tabular.network import Layout

__all__ = ["Inference"]

_LOGIT_LIMIT = 14.0
_INCLUSION_RATE = 0.02
_INTERVAL = 25
_NAMES = ("mean", "log_std", "logit", "mean_avg", "mean_avg_sq", "std_avg", "std_avg_sq")

Loss = Callable[[Tensor], Tensor]
"""Outputs [R, B, outputs] to the sum over networks of their mean negative log-likelihood."""


class Inference:
    """R posteriors over networks of one layout, trained side by side.

    Args:
        layout: of the networks.
        priors: by tensor name; their hyper-parameters are learned from all networks together.
        n_data: log-likelihood terms.
        start: initial means [R, size].
        kl_warmup: steps over which the KL gets its weight.
        seed: of the noise.
    """

    def __init__(
        self,
        layout: Layout,
        priors: Mapping[str, LearnedSpikeSlab],
        *,
        n_data: float,
        start: Tensor,
        kl_warmup: int = 0,
        seed: int = 0,
    ) -> None:
        self.layout, self.priors, self.n_data, self.kl_warmup = layout, priors, n_data, kl_warmup
        self.generator = torch.Generator().manual_seed(seed)
        self.state = {n: torch.zeros_like(start) for n in _NAMES}
        inclusion = 0.95
        self.state["mean"].copy_(start / inclusion)
        self.state["log_std"].fill_(math.log(0.02))
        self.state["logit"].fill_(math.log(inclusion / (1 - inclusion)))
        self.keep = torch.ones_like(start)
        self.steps = 0
        self._since = 0
        self.rates = {n: p.start_rates for n, p in priors.items()}
        self.precision = {n: p.start_precision for n, p in priors.items()}
        self.log_variance = {n: -math.log(p.start_precision) for n, p in priors.items()}
        self._spread()

    def step(self, x: Tensor, loss: Loss, lr: float) -> tuple[Tensor, Tensor]:
        """One update from a batch; returns the loss and the outputs, detached."""
        mean, variance, pi = self._moments()
        expected = (pi * mean * self.keep).requires_grad_()
        spread = (weight_variance(mean, variance, pi) * self.keep).requires_grad_()
        output = self.layout.noisy_output(expected, spread, x, self.generator)
        value = loss(output)
        mean_grad, variance_grad = torch.autograd.grad(value, (expected, spread))
        self.steps += 1
        self._since += 1
        warm = min(1.0, self._since / self.kl_warmup) if self.kl_warmup else 1.0
        of_mean, of_std = Run(mean, variance, pi, mean_grad, variance_grad).gradients(warm / self.n_data, self._prec)
        towards = self._base + self.state["log_std"] + 0.5 * mean.square() / variance
        self._adam("mean", of_mean, "mean", lr)
        self._adam("log_std", of_std, "std", lr)
        self.state["logit"].lerp_(towards, _INCLUSION_RATE).clamp_(-_LOGIT_LIMIT, _LOGIT_LIMIT)
        if self.steps % _INTERVAL == 0 and self._since >= self.kl_warmup:
            self._learn()
        return value.detach(), output.detach()

    def noisy(self, x: Tensor) -> Tensor:
        """Outputs [R, B, outputs] with fresh noise."""
        mean, variance, pi = self._moments()
        moments = pi * mean * self.keep, weight_variance(mean, variance, pi) * self.keep
        return self.layout.noisy_output(*moments, x, self.generator)

    def kl(self) -> Tensor:
        """KL of each network, nats, float64 [R]; removed weights count as excluded."""
        mean, variance, pi = (t.double() for t in self._moments())
        cost = slab_kl(mean, variance, self._prec.double(), self._logv.double())
        log_rate, log_rest = (self.layout.spread({n: r[i] for n, r in self.rates.items()}).double() for i in (0, 1))
        each = spike_slab_kl(pi, cost, log_rate, log_rest)
        return torch.where(self.keep > 0, each, -log_rest).sum(1)

    def remove(self, keep: Mapping[str, Tensor]) -> None:
        """Remove weights for good; masks [R, ...] by name, True = stays."""
        masks = [keep[n].flatten(1) for n in self.layout.shapes]
        self.keep *= torch.cat(masks, 1).to(self.keep.dtype)

    def log_odds(self) -> dict[str, float]:
        """Prior log-odds of inclusion by tensor name."""
        return {n: rate - rest for n, (rate, rest) in self.rates.items()}

    def posterior(self, index: int = 0) -> Posterior:
        """Of one network; tensors [1, ...]."""
        row = slice(index, index + 1)
        mean, variance, pi = (self.layout.split(t[row].clone()) for t in self._moments())
        keep = self.layout.split(self.keep[row].clone() > 0)
        moments = {}
        for n in self.layout.shapes:
            k, prior = keep[n], torch.tensor(self.precision[n])
            precision = torch.where(k, 1 / variance[n], torch.inf)
            moments[n] = Gaussian(mean[n] * k, precision, prior, torch.zeros(()), k, inclusion=pi[n] * k)
        return Posterior(moments, self.n_data, source="Inference")

    def only(self, index: int) -> Inference:
        """A copy that goes on with one of the networks, its moments of Adam and hyper-parameters included."""
        start = self.state["mean"][index : index + 1]
        twin = Inference(self.layout, self.priors, n_data=self.n_data, start=start)
        twin.state = {n: v[index : index + 1].clone() for n, v in self.state.items()}
        twin.keep = self.keep[index : index + 1].clone()
        twin.generator = self.generator.clone_state()
        twin.steps = self.steps
        twin.rates, twin.precision, twin.log_variance = dict(self.rates), dict(self.precision), dict(self.log_variance)
        twin._spread()
        return twin

    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.state["mean"], (2 * self.state["log_std"]).exp(), torch.sigmoid(self.state["logit"])

    def _adam(self, name: str, grad: Tensor, moments: str, lr: float) -> None:
        averages = self.state[f"{moments}_avg"], self.state[f"{moments}_avg_sq"]
        settings = {"step": self.steps, "lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "decay": 0.0}
        adam_(self.state[name], grad, *averages, **settings)  # type: ignore[arg-type]

    def _learn(self) -> None:
        mean, variance, pi = self._moments()
        pi = pi * self.keep
        moments = self.layout.split(pi * (mean.square() + variance))
        for name, part in self.layout.split(pi).items():
            prior, included = self.priors[name], float(part.sum())
            self.rates[name] = prior.updated_rates(self.rates[name], included, part.numel() - included)
            self.precision[name] = prior.updated(self.precision[name], included, float(moments[name].sum()))
            self.log_variance[name] = prior.log_slab_variance(self.precision[name], included)
        self._spread()

    def _spread(self) -> None:
        self._prec = self.layout.spread(self.precision)
        self._logv = self.layout.spread(self.log_variance)
        self._base = self.layout.spread(self.log_odds()) - 0.5 * self._logv
