"""Bayesian linear regression: the fit, the ELBO and the learned priors against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from ockham.fit.mean_field import MeanField
from ockham.fit.priors import EmpiricalBayes, FixedPrior, LayerScale

F64 = torch.float64


class Regression:
    """y = X w + noise of known variance, correlated inputs."""

    def __init__(self, n=60, p=5, noise_variance=2.0, p0=10.0):
        g = torch.Generator().manual_seed(11)
        z = torch.randn(n, p, generator=g, dtype=F64)
        self.x = z + 0.6 * z.roll(1, 1)
        self.w = torch.tensor([1.0, -0.5, 0.0, 0.3, 2.0], dtype=F64)
        self.y = self.x @ self.w + noise_variance**0.5 * torch.randn(n, generator=g, dtype=F64)
        self.n, self.s2, self.p0 = n, noise_variance, p0

    def nll(self, w):
        return (0.5 * (self.y - self.x @ w).square() / self.s2 + 0.5 * math.log(2 * math.pi * self.s2)).mean()

    def exact(self, p0=None, temperature=1.0):
        p0 = self.p0 if p0 is None else p0
        lam = self.x.T @ self.x / self.s2 / temperature + p0 * torch.eye(5, dtype=F64)
        mean = torch.linalg.solve(lam, self.x.T @ self.y / self.s2 / temperature)
        return MultivariateNormal(mean, precision_matrix=lam)

    def log_evidence(self):
        covariance = self.s2 * torch.eye(self.n, dtype=F64) + self.x @ self.x.T / self.p0
        return float(MultivariateNormal(torch.zeros(self.n, dtype=F64), covariance).log_prob(self.y))

    def fit(self, steps=1600, **options):
        w = torch.nn.Parameter(torch.zeros(5, dtype=F64))
        settings = {
            "n_data": self.n,
            "lr": 0.03,
            "initial_std": 0.1,
            "betas": (0.9, 0.99),
            "prior": FixedPrior(1 / self.p0),
            **options,
        }
        opt = MeanField([("w", w)], **settings)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: min(1.0, 4 * (1 - k / steps)) * 0.05 ** (k / steps))
        logs = []
        for k in range(steps):
            opt.zero_grad()
            with opt.sampled():
                self.nll(w).backward()
            opt.step()
            schedule.step()
            if k > steps // 2 and k % 4 == 0:  # averaged, the noise of the gradients goes away
                logs.append(opt.posterior()["w"].precision.log())
        return w, opt, torch.stack(logs).mean(0).exp()


def assert_optimal(w, precision, exact):
    want = exact.precision_matrix.diagonal()
    assert float(((w.detach() - exact.mean) * want.sqrt()).abs().max()) < 0.03  # in posterior standard deviations
    off = (precision / want).log()  # Monte Carlo error: .05 each
    assert float(off.abs().max()) < 0.15 and abs(float(off.mean())) < 0.06


@pytest.fixture(scope="module")
def task():
    return Regression()


@pytest.fixture(scope="module")
def fitted(task):
    return task.fit()


def test_fit_reaches_the_mean_field_optimum(task, fitted):
    # the optimum: mean of the full posterior, precision = diagonal of the full precision
    w, _, precision = fitted
    assert_optimal(w, precision, task.exact())


def test_tempered_fit_reaches_the_tempered_optimum(task):
    w, opt, precision = task.fit(temperature=0.25)
    assert_optimal(w, precision, task.exact(temperature=0.25))
    assert opt.posterior().temperature == 0.25


def test_elbo_equals_the_closed_form(task, fitted):
    # log evidence - KL(q || exact posterior), each from torch.distributions; ours from draws and kl()
    w, opt, _ = fitted
    g = opt.posterior()["w"]
    q = MultivariateNormal(g.mean, precision_matrix=torch.diag(g.precision))
    want = task.log_evidence() - float(kl_divergence(q, task.exact()))
    nll = []
    for _ in range(1000):
        with opt.sampled():
            nll.append(float(task.nll(w.detach())) * task.n)
        opt.zero_grad()
    pairs = torch.tensor(nll).view(-1, 2).mean(1)  # the two draws of a mirrored pair are not independent
    got, error = -float(pairs.mean()) - opt.kl(), float(pairs.std()) / len(pairs) ** 0.5
    assert abs(got - want) < 4 * error and error < 0.2


def test_elbo_is_below_the_evidence_by_the_correlation_only(task, fitted):
    # the best factorised q loses 1/2 ln(prod diag / det) of the exact precision
    w, opt, _ = fitted
    lam = task.exact().precision_matrix
    best = task.log_evidence() - 0.5 * float(lam.diagonal().log().sum() - torch.logdet(lam))
    std = opt.posterior()["w"].std
    curvature = (task.x.square().sum(0) / task.s2 * std.square()).sum() / 2
    elbo = -float(task.nll(w.detach()) * task.n + curvature) - opt.kl()
    assert best - 0.05 < elbo <= best + 1e-9


def optimal_precision(task, update):
    """Fixed point of a prior update on the exact factorised posterior."""
    p0 = task.p0
    for _ in range(500):
        exact = task.exact(p0)
        moment = float((exact.mean.square() + 1 / exact.precision_matrix.diagonal()).sum())
        p0 = update(p0, moment)
    return p0


@pytest.mark.parametrize(
    ("prior", "update"),
    [
        (EmpiricalBayes(0.5), lambda p0, moment: 5 / moment),
        (LayerScale(scale=0.5, shape=2.0, rate=2.0), lambda p0, m: (2 + 2.5) / (2 + 0.5 * m / 0.25) / 0.25),
    ],
)
def test_learned_priors_reach_their_closed_form_optimum(task, prior, update):
    w, opt, precision = task.fit(prior=prior, prior_interval=10, kl_warmup=50)
    want = optimal_precision(task, update)
    assert float(opt.posterior()["w"].prior_precision) == pytest.approx(want, rel=0.03)
    assert_optimal(w, precision, task.exact(want))


def test_weights_the_data_never_touch_return_to_the_prior():
    w = torch.nn.Parameter(torch.full((50,), 0.2, dtype=F64))
    opt = MeanField([("w", w)], n_data=10, lr=0.05, initial_std=0.05, prior=FixedPrior(0.09), prior_mean=-0.1)
    for k in range(1200):
        opt.param_groups[0]["lr"] = 0.05 * (1 - k / 1200)
        opt.zero_grad()
        with opt.sampled():
            (0.0 * w).sum().backward()
        opt.step()
    g = opt.posterior()["w"]
    assert float((g.mean + 0.1).abs().max()) < 1e-3 and float((g.std / 0.3 - 1).abs().max()) < 1e-3
    assert opt.kl() == pytest.approx(0.0, abs=1e-3)
    assert float(kl_divergence(Normal(g.mean, g.std), Normal(-0.1, 0.3)).sum()) == pytest.approx(opt.kl(), abs=1e-9)
