"""Rows of correlated matrices against the dense covariance of the whole matrix."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import ockham
from ockham.evidence.kronecker import conditional_precision, covariance, factorised, marginal_variance
from ockham.posterior.matrix import WeightMatrix
from ockham.reduction.rows import score_rows

P0 = 1.7


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def posterior_of(model: nn.Module, seed: int = 0) -> ockham.Posterior:
    g = torch.Generator().manual_seed(seed)
    moments, matrices = {}, []
    for path in ("0", "3"):
        layer = model.get_submodule(path)
        out, width = layer.weight.shape[0], layer.weight.shape[1] + 1
        factors = []
        for n in (width, out):
            root = torch.randn(1, n, n + 2, generator=g)
            factors.append(3 * root @ root.mT)
        matrix = WeightMatrix(f"{path}.weight", f"{path}.bias", factorised(*factors, P0))
        means = {n: torch.randn(model.get_parameter(n).shape, generator=g) for n in matrix.names}
        precision = matrix.unpack(conditional_precision(matrix.precision), means)
        marginal = matrix.unpack(1 / marginal_variance(matrix.precision), means)
        for n in matrix.names:
            keep = torch.ones(means[n].shape, dtype=torch.bool)
            prior = torch.tensor(P0), torch.tensor(0.0)
            moments[n] = ockham.Gaussian(means[n], precision[n], *prior, keep, marginal[n])
        matrices.append(matrix)
    for n in ("1.weight", "1.bias"):
        keep = torch.ones(4, dtype=torch.bool)
        moments[n] = ockham.Gaussian(
            torch.randn(4, generator=g), torch.full((4,), 9.0), torch.tensor(1.0), torch.tensor(0.0), keep
        )
    return ockham.Posterior(moments, 50.0, 1.0, "kronecker", tuple(matrices))


def log_density_at_zero(mean: Tensor, cov: Tensor) -> float:
    normal = torch.distributions.MultivariateNormal(mean.double(), cov)
    return float(normal.log_prob(torch.zeros(len(mean), dtype=torch.float64)))


def test_a_row_with_its_bias_is_scored_by_its_block_of_the_dense_covariance() -> None:
    model = normed()
    posterior = posterior_of(model)
    groups = ockham.trace(model, torch.randn(2, 3))
    found = score_rows(posterior, groups)["0.weight:0"]
    matrix = posterior.matrices[0]
    cov, means = covariance(matrix.precision), matrix.pack({n: posterior[n].mean for n in matrix.names})[0]
    delta = ockham.score(posterior)
    for unit in range(4):
        own = slice(4 * unit, 4 * unit + 4)
        prior = torch.eye(4, dtype=torch.float64) / P0
        row = log_density_at_zero(means[unit], cov[own, own]) - log_density_at_zero(torch.zeros(4), prior)
        affine = sum(math.log(0.5 + 0.5 * math.exp(-float(delta[n][unit]))) for n in ("1.weight", "1.bias"))
        assert float(found[unit]) == pytest.approx(-row + affine, rel=1e-6)


def test_a_matrix_of_which_weights_went_is_scored_weight_by_weight() -> None:
    model = normed()
    posterior = posterior_of(model)
    g = posterior["0.weight"]
    keep = g.keep.clone()
    keep[0, 0] = False
    cut = ockham.Gaussian(
        g.mean * keep, g.precision.masked_fill(~keep, math.inf), g.prior_precision, g.prior_mean, keep,
        g.marginal_precision.masked_fill(~keep, math.inf),
    )  # fmt: skip
    part = ockham.Posterior({**posterior.moments, "0.weight": cut}, 50.0, 1.0, "kronecker", posterior.matrices)
    groups = ockham.trace(model, torch.randn(2, 3))
    from ockham.reduction.structures import incoming

    expected = ockham.score(part).by_group(groups, cut=incoming)["0.weight:0"]
    assert torch.allclose(score_rows(part, groups)["0.weight:0"], expected)


def test_filters_of_convolutions_and_blocks_of_rows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
    x = torch.randn(40, 1, 3, 3)
    y = torch.randint(2, (40,))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=10)
    posterior = ockham.laplace(model, data)
    groups = ockham.trace(model, x[:2])
    found = score_rows(posterior, groups)
    assert found["0.weight:0"].shape == (4,) and bool(torch.isfinite(found["0.weight:0"]).all())
