"""Draws against known moments and quadrature; what must not be accepted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate

from ockham.errors import OckhamError
from ockham.tabular.hamiltonian import hamiltonian


def gaussian(seed, d):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(d, 2 * d, generator=g, dtype=torch.float64)
    return a @ a.T / d, torch.randn(d, generator=g, dtype=torch.float64), g


@pytest.mark.parametrize("exact_metric", [True, False])
def test_a_correlated_gaussian(exact_metric):
    precision, mean, g = gaussian(0, 5)
    metric = precision if exact_metric else torch.diag(precision.diagonal())
    chain = hamiltonian(
        lambda q: 0.5 * (q - mean) @ precision @ (q - mean),
        mean + 3,
        metric,
        draws=1200,
        warmup=100,
        thin=1,
        generator=g,
    )
    covariance = torch.linalg.inv(precision)
    scale = covariance.diagonal().sqrt()
    assert ((chain.draws.mean(0) - mean) / scale).abs().max() < 0.15
    assert ((chain.draws.T.cov() - covariance) / torch.outer(scale, scale)).abs().max() < 0.15
    assert chain.acceptance == pytest.approx(0.8, abs=0.15)


def test_a_skewed_posterior_against_quadrature():
    """Scale of five numbers: ln s, half-normal likelihood, t prior; far from Gaussian."""
    data = torch.tensor([0.3, -0.2, 0.9, 0.05, -0.4], dtype=torch.float64)

    def energy(q):
        s = q[0]
        return (0.5 * data.square() * (-2 * s).exp() + s).sum() + 2.0 * torch.log1p(s.square() / 3)

    def density(s):
        return math.exp(-float(energy(torch.tensor([s], dtype=torch.float64))))

    total = integrate.quad(density, -8, 8)[0]
    moments = [integrate.quad(lambda s, k=k: s**k * density(s), -8, 8)[0] / total for k in (1, 2, 3)]
    chain = hamiltonian(
        energy,
        torch.zeros(1, dtype=torch.float64),
        torch.full((1, 1), 10.0, dtype=torch.float64),
        draws=1500,
        warmup=100,
        thin=1,
        generator=torch.Generator().manual_seed(1),
    )
    got = [float((chain.draws**k).mean()) for k in (1, 2, 3)]
    np.testing.assert_allclose(got, moments, rtol=0.08, atol=0.02)


def test_a_wall_is_not_crossed():
    def energy(q):
        return torch.where(q[0] > 0, q[0], torch.full_like(q[0], math.nan))

    one = torch.ones(1, dtype=torch.float64)
    chain = hamiltonian(
        energy,
        one,
        torch.eye(1, dtype=torch.float64),
        draws=1500,
        warmup=100,
        thin=1,
        generator=torch.Generator().manual_seed(2),
    )
    assert chain.draws.min() > 0
    assert float(chain.draws.mean()) == pytest.approx(1.0, abs=0.1)  # the exponential distribution
    with pytest.raises(OckhamError, match="energy of the start is nan"):
        hamiltonian(energy, -one, torch.eye(1, dtype=torch.float64), draws=1, warmup=0, generator=torch.Generator())


def test_same_generator_same_draws_and_global_state_untouched():
    precision, mean, _ = gaussian(3, 2)
    before = torch.get_rng_state()
    first, second = (
        hamiltonian(
            lambda q: 0.5 * (q - mean) @ precision @ (q - mean),
            mean,
            precision,
            draws=5,
            warmup=5,
            generator=torch.Generator().manual_seed(4),
        ).draws
        for _ in range(2)
    )
    assert torch.equal(first, second) and torch.equal(before, torch.get_rng_state())


def test_what_does_not_fit_is_said():
    g = torch.Generator()
    with pytest.raises(OckhamError, match=r"\[d, d\]; got \(2,\) and \(3, 3\)"):
        hamiltonian(lambda q: q.sum(), torch.zeros(2), torch.eye(3), draws=1, warmup=0, generator=g)
    with pytest.raises(OckhamError, match="positive definite"):
        hamiltonian(lambda q: q.square().sum(), torch.zeros(2), -torch.eye(2), draws=1, warmup=0, generator=g)
