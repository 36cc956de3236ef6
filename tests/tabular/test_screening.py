"""Screening: what nobody sees alone is found, and extremes of chance terms are not."""

from __future__ import annotations

import torch

from ockham.tabular.data import screen


def screened(x, y):
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    return screen(x, y.unsqueeze(1), torch.ones(len(x)))


def test_a_product_that_shows_only_when_the_rest_is_explained():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(800, 600, generator=g)  # more than 512: products are not all searched on the way
    y = 5 * x[:, 0] + x[:, 11] * x[:, 12] + 0.3 * torch.randn(800, generator=g)
    found = screened(x, y)
    assert {0, 11, 12} <= set(found.active.tolist()) and len(found.active) <= 5


def test_noise_that_grows_with_an_input_makes_no_products():
    g = torch.Generator().manual_seed(1)
    chance = []
    for _ in range(5):
        x = torch.randn(1000, 100, generator=g)
        y = x[:, 0] + (1.2 * x[:, 0]).exp() * torch.randn(1000, generator=g)
        found = screened(x, y)
        chance.append(len(found.active) - 4)  # four enter in any case
    assert sum(chance) <= 1, chance
