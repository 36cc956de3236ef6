"""Posteriors with known numbers, and their evidence."""

from __future__ import annotations

import pytest
import torch

from ockham.choose.rules import score
from ockham.core.posterior import Gaussian, Posterior


def gaussian(mean, precision, prior_precision=1.0, keep=None, prior_mean=0.0):
    mean = torch.as_tensor(mean, dtype=torch.float64)
    keep = torch.ones_like(mean, dtype=torch.bool) if keep is None else torch.as_tensor(keep)
    precision = torch.as_tensor(precision, dtype=torch.float64).expand_as(mean).clone().masked_fill(~keep, torch.inf)
    priors = (torch.as_tensor(v, dtype=torch.float64) for v in (prior_precision, prior_mean))
    return Gaussian(mean.masked_fill(~keep, 0.0), precision, *priors, keep)


@pytest.fixture
def make_gaussian():
    return gaussian


@pytest.fixture
def posterior():
    """Two layers of random numbers, one weight in seven already removed."""
    g = torch.Generator().manual_seed(4)
    moments = {}
    for name, shape in (("a", (6, 7)), ("b", (5,)), ("c", (4, 3))):
        mean = torch.randn(shape, generator=g, dtype=torch.float64)
        precision = torch.exp(4 * torch.rand(shape, generator=g, dtype=torch.float64))
        keep = torch.arange(mean.numel()).view(shape) % 7 != 3
        moments[name] = gaussian(mean, precision, 0.5, keep)
    return Posterior(moments, 1000)


@pytest.fixture
def evidence(posterior):
    return score(posterior)
