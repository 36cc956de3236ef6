"""Learned log-odds: direction, fixed point, the published scheme step by step."""

from __future__ import annotations

import pytest
import torch
from scipy.special import digamma, expit

from ockham.errors import OckhamError
from ockham.evidence.gaussian import beta_log_odds, beta_log_odds_published, remove_by_log_odds

DELTA = torch.tensor([3.0, 1.0, 0.2, -0.5, -4.0, -30.0])


def all_alive(delta):
    return torch.ones_like(delta, dtype=torch.bool)


def test_removal_needs_more_evidence_than_the_odds():
    assert remove_by_log_odds(torch.tensor([-1.0, 0.0, 1e-6])).tolist() == [True, True, False]
    assert remove_by_log_odds(torch.tensor([1.0, 2.0, 3.0]), 2.0).tolist() == [True, True, False]
    assert remove_by_log_odds(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 2.0])).tolist() == [False, True]


def test_published_scheme_is_four_iterations_from_zero_with_a_flat_prior():
    zeta = 0.0
    for _ in range(4):
        q = expit(zeta - DELTA.double().numpy())
        zeta = digamma(1 + q.sum()) - digamma(1 + (1 - q).sum())
    got = beta_log_odds_published(DELTA.view(2, 3))
    assert got.dtype is torch.float64 and float(got) == pytest.approx(zeta, abs=1e-12)


def test_published_scheme_counts_removed_weights_and_drags_the_odds():
    with_removed = beta_log_odds_published(torch.cat([DELTA, torch.zeros(200)]))
    assert abs(float(with_removed)) < abs(float(beta_log_odds_published(torch.full((6,), -3.0))))
    assert float(with_removed) != pytest.approx(float(beta_log_odds_published(DELTA)), abs=1e-3)


def test_default_scheme_is_a_fixed_point_over_living_weights_only():
    alive = torch.tensor([True, True, True, True, True, False])
    zeta = float(beta_log_odds(DELTA, alive, keep_count=4.0, remove_count=6.0))
    q = expit(zeta - DELTA[:5].double().numpy())
    assert zeta == pytest.approx(digamma(4 + q.sum()) - digamma(6 + (1 - q).sum()), abs=1e-9)
    changed = DELTA.clone()
    changed[5] = 12.0
    assert float(beta_log_odds(changed, alive, keep_count=4.0, remove_count=6.0)) == zeta


def test_more_pseudo_counts_of_kept_weights_protect():
    odds = [float(beta_log_odds(DELTA, all_alive(DELTA), keep_count=k, remove_count=5.0)) for k in (1.0, 5.0, 50.0)]
    assert odds == sorted(odds) and odds[0] < odds[-1]


def test_nothing_alive_leaves_the_prior_odds():
    none = torch.zeros(6, dtype=torch.bool)
    got = float(beta_log_odds(DELTA, none, keep_count=3.0, remove_count=2.0))
    assert got == pytest.approx(digamma(3.0) - digamma(2.0), abs=1e-12)


def test_a_strong_even_prior_keeps_the_odds_near_zero():
    delta = torch.full((1000,), 2.0)
    assert abs(float(beta_log_odds(delta, all_alive(delta), keep_count=1e6, remove_count=1e6))) < 1e-2


@pytest.mark.parametrize(("keep", "remove"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (float("nan"), 1.0)])
def test_pseudo_counts_must_be_positive(keep, remove):
    with pytest.raises(OckhamError, match="pseudo-counts must be positive"):
        beta_log_odds(DELTA, all_alive(DELTA), keep_count=keep, remove_count=remove)
