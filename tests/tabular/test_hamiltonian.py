"""Draws against known moments and quadrature; what must not be accepted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate

from ockham.errors import OckhamError
from ockham.tabular.predicting import hamiltonian


def gaussian(seed, d):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(d, 2 * d, generator=g, dtype=torch.float64)
    return a @ a.T / d, torch.randn(d, generator=g, dtype=torch.float64), g


def quadratic(precision, mean):
    def slopes(q):
        away = q - mean
        return 0.5 * (away @ precision * away).sum(1), away @ precision

    return slopes


def by_autograd(energy):
    def slopes(q):
        q = q.detach().requires_grad_()
        value = energy(q)
        return value.detach(), torch.autograd.grad(value.sum(), q)[0]

    return slopes


@pytest.mark.parametrize("exact_metric", [True, False])
def test_a_correlated_gaussian(exact_metric):
    precision, mean, g = gaussian(0, 5)
    metric = precision if exact_metric else torch.diag(precision.diagonal())
    start = (mean + 3).expand(30, -1)
    chains = hamiltonian(quadratic(precision, mean), start, metric, rounds=60, warmup=40, generator=g)
    draws = chains.draws.flatten(0, 1)
    covariance = torch.linalg.inv(precision)
    scale = covariance.diagonal().sqrt()
    assert ((draws.mean(0) - mean) / scale).abs().max() < 0.15
    assert ((draws.T.cov() - covariance) / torch.outer(scale, scale)).abs().max() < 0.15
    assert chains.acceptance == pytest.approx(0.8, abs=0.15)
    between = chains.draws.mean(0)  # every chain finds the same place
    assert ((between - mean) / scale).abs().max() < 0.5


def test_a_skewed_posterior_against_quadrature():
    """Scale of five numbers: ln s, half-normal likelihood, t prior; far from Gaussian."""
    data = torch.tensor([0.3, -0.2, 0.9, 0.05, -0.4], dtype=torch.float64)

    def energy(q):
        s = q[:, :1]
        return (0.5 * data.square() * (-2 * s).exp() + s).sum(1) + 2.0 * torch.log1p(s[:, 0].square() / 3)

    def density(s):
        return math.exp(-float(energy(torch.tensor([[s]], dtype=torch.float64))))

    total = integrate.quad(density, -8, 8)[0]
    moments = [integrate.quad(lambda s, k=k: s**k * density(s), -8, 8)[0] / total for k in (1, 2, 3)]
    chains = hamiltonian(
        by_autograd(energy),
        torch.zeros(40, 1, dtype=torch.float64),
        torch.full((1, 1), 10.0, dtype=torch.float64),
        rounds=60,
        warmup=40,
        generator=torch.Generator().manual_seed(1),
    )
    got = [float((chains.draws**k).mean()) for k in (1, 2, 3)]
    np.testing.assert_allclose(got, moments, rtol=0.08, atol=0.02)


def test_a_wall_is_not_crossed():
    def energy(q):
        return torch.where(q[:, 0] > 0, q[:, 0], math.nan)

    one, eye = torch.ones(40, 1, dtype=torch.float64), torch.eye(1, dtype=torch.float64)
    g = torch.Generator().manual_seed(2)
    chains = hamiltonian(by_autograd(energy), one, eye, rounds=80, warmup=40, generator=g)
    assert chains.draws.min() > 0
    assert float(chains.draws.mean()) == pytest.approx(1.0, abs=0.1)  # the exponential distribution
    with pytest.raises(OckhamError, match="energy of a start is"):
        hamiltonian(by_autograd(energy), -one, eye, rounds=1, warmup=0, generator=torch.Generator())


def test_same_generator_same_draws_and_global_state_untouched():
    precision, mean, _ = gaussian(3, 2)
    before = torch.get_rng_state()
    first, second = (
        hamiltonian(
            quadratic(precision, mean),
            mean.expand(2, -1),
            precision,
            rounds=5,
            warmup=5,
            generator=torch.Generator().manual_seed(4),
        ).draws
        for _ in range(2)
    )
    assert torch.equal(first, second) and torch.equal(before, torch.get_rng_state())
    assert first.shape == (5, 2, 2)


def test_what_does_not_fit_is_said():
    g, slopes = torch.Generator(), quadratic(torch.eye(2), torch.zeros(2))
    with pytest.raises(OckhamError, match=r"\[d, d\]; got \(1, 2\) and \(3, 3\)"):
        hamiltonian(slopes, torch.zeros(1, 2), torch.eye(3), rounds=1, warmup=0, generator=g)
    with pytest.raises(OckhamError, match="positive definite"):
        hamiltonian(slopes, torch.zeros(1, 2), -torch.eye(2), rounds=1, warmup=0, generator=g)
