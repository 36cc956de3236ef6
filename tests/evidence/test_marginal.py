"""The prior precision of the largest Laplace evidence, against a grid and against the exact evidence."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from ockham.errors import OckhamError
from ockham.methods.laplace.posterior import evidence_prior_precision, laplace_evidence, mean_square_prior_precision

F64 = torch.float64


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_the_optimum_beats_every_point_of_a_grid(scale):
    g = torch.Generator().manual_seed(1)
    h, mean = scale * torch.rand(40, generator=g, dtype=F64) ** 6, torch.randn(40, generator=g, dtype=F64)
    best = evidence_prior_precision(h, mean)
    grid = torch.logspace(-9, 9, 4001, dtype=F64)
    values = [laplace_evidence(h, mean, float(d)) for d in grid]
    assert laplace_evidence(h, mean, best) >= max(values) - 1e-9
    assert abs(math.log(best / float(grid[values.index(max(values))]))) < 0.02


def test_evidence_is_that_of_a_linear_model_at_its_mode():
    # y = X w + e: ln p(y | d) - ln p(y | mode), exact
    g = torch.Generator().manual_seed(2)
    x, y, d = torch.randn(12, 3, generator=g, dtype=F64), torch.randn(12, generator=g, dtype=F64), 0.8
    hessian = x.T @ x
    mode = torch.linalg.solve(hessian + d * torch.eye(3, dtype=F64), x.T @ y)
    exact = MultivariateNormal(torch.zeros(12, dtype=F64), torch.eye(12, dtype=F64) + x @ x.T / d).log_prob(y)
    at_mode = -0.5 * (y - x @ mode).square().sum() - 6 * math.log(2 * math.pi)
    assert laplace_evidence(torch.linalg.eigvalsh(hessian), mode, d) == pytest.approx(float(exact - at_mode), rel=1e-9)


def test_layers_without_an_optimum_get_the_mean_square():
    mean = torch.tensor([1.0, -3.0])
    assert evidence_prior_precision(torch.zeros(2), mean) == mean_square_prior_precision(torch.zeros(2), mean) == 0.2
    assert evidence_prior_precision(torch.ones(2), torch.zeros(2)) == 1.0
    with pytest.raises(OckhamError, match="curvature"):
        evidence_prior_precision(torch.tensor([-1.0, 1.0]), mean)


def test_evidence_never_asks_for_a_narrower_prior_than_the_mean_square():
    g = torch.Generator().manual_seed(3)
    for power in (0, 4, 12):
        h, mean = torch.rand(30, generator=g) ** power, torch.randn(30, generator=g)
        assert evidence_prior_precision(h, mean) <= mean_square_prior_precision(h, mean)
