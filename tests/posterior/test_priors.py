"""Learned priors: one update against the optimum of the ELBO, when they move, and what they refuse."""

from __future__ import annotations

import math

import pytest
import scipy.optimize
import torch
from scipy.special import digamma, gammaln

from ockham.errors import OckhamError
from ockham.fit.mean_field import MeanField
from ockham.fit.priors import EmpiricalBayes, FixedPrior, LayerScale


def test_fixed_prior_never_moves():
    prior = FixedPrior(0.25)
    assert prior.start_precision == 4.0 and prior.updated(4.0, 10, 99.0) == 4.0


def test_empirical_bayes_step_ends_at_the_maximum_of_the_elbo():
    count, moment = 7, 3.5
    minus = lambda log_p: 0.5 * math.exp(log_p) * moment - 0.5 * count * log_p  # the KL as a function of P0  # noqa: E731
    best = math.exp(scipy.optimize.minimize_scalar(minus, bounds=(-5, 5), options={"xatol": 1e-10}).x)
    assert EmpiricalBayes(1.0, smoothing=1.0).updated(1.0, count, moment) == pytest.approx(best, rel=1e-6)


def test_empirical_bayes_smooths_the_variance():
    got = EmpiricalBayes(2.0, smoothing=0.3).updated(0.5, 4, 4.0)
    assert 1 / got == pytest.approx(0.7 * 2.0 + 0.3 * 1.0, rel=1e-12)
    p = 0.5
    for _ in range(200):
        p = EmpiricalBayes(2.0).updated(p, 4, 4.0)
    assert p == pytest.approx(1.0, rel=1e-12)


def test_empirical_bayes_without_weights_stays():
    assert EmpiricalBayes().updated(3.0, 0, 0.0) == 3.0


def test_layer_scale_update_maximises_the_elbo_of_its_gamma_factor():
    # E_q[ln p(w | t) + ln p(t)] + H[q(t)] over Gamma(a, b) factors of t = c^-2, numerically
    scale, shape, rate, count, moment = 0.5, 2.0, 3.0, 9, 1.7

    def minus(logs):
        a, b = (math.exp(v) for v in logs)
        mean, log_mean = a / b, digamma(a) - math.log(b)
        fit = 0.5 * count * log_mean - 0.5 * mean * moment / scale**2 + (shape - 1) * log_mean - rate * mean
        return -(fit + a - math.log(b) + gammaln(a) + (1 - a) * digamma(a))

    best = scipy.optimize.minimize(minus, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13})
    a, b = (math.exp(v) for v in best.x)
    got = LayerScale(scale, shape, rate).updated(1.0, count, moment)
    assert got == pytest.approx(a / b / scale**2, rel=1e-5)


def test_layer_scale_starts_at_its_prior_mean_and_returns_there_without_weights():
    prior = LayerScale(0.1, 2.0, 2.0)
    assert prior.start_precision == pytest.approx(100.0)
    assert prior.updated(5.0, 0, 0.0) == pytest.approx(prior.start_precision)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FixedPrior(0.0),
        lambda: FixedPrior(math.inf),
        lambda: EmpiricalBayes(-1.0),
        lambda: EmpiricalBayes(1.0, smoothing=0.0),
        lambda: EmpiricalBayes(1.0, smoothing=1.5),
        lambda: LayerScale(0.0),
        lambda: LayerScale(1.0, shape=math.nan),
        lambda: LayerScale(1.0, rate=-2.0),
    ],
)
def test_priors_refuse_impossible_values(make):
    with pytest.raises(OckhamError, match=r"must be positive and finite|is a share"):
        make()


def test_learned_priors_wait_for_the_warmup_and_keep_their_interval(toy):
    net, opt = toy.make(prior=EmpiricalBayes(0.5), kl_warmup=7, prior_interval=3)
    seen = []
    for _ in range(13):
        toy.step(net, opt)
        seen.append(float(opt.posterior()["0.weight"].prior_precision))
    moved = [k + 1 for k in range(1, 13) if seen[k] != seen[k - 1]]
    assert seen[0] == 2.0 and moved == [9, 12]


@pytest.mark.parametrize("toy", [MeanField], indirect=True)
def test_each_parameter_learns_its_own_prior_from_its_living_weights(toy):
    net, opt = toy.make(prior=EmpiricalBayes(0.5, smoothing=1.0), prior_interval=4, prior_mean=0.1)
    keep = {"0.weight": torch.arange(30).view(6, 5) % 3 > 0}
    opt.remove(keep)
    for _ in range(4):
        toy.step(net, opt)
    for name, g in opt.posterior().items():
        mean, std = g.mean[g.keep].double(), g.std[g.keep].double()
        want = 1 / float((std.square() + (mean - 0.1).square()).mean())
        assert float(g.prior_precision) == pytest.approx(want, rel=1e-5), name
    assert len({float(g.prior_precision) for g in opt.posterior().values()}) == 4
