"""Evidence of a posterior and the orders of removal."""

from __future__ import annotations

import math

import pytest
import torch

from ockham.choose.rules import by_delta_f, by_magnitude, by_random, by_snr, score
from ockham.core.posterior import Posterior


def test_delta_f_of_living_weights_in_row_major_order(make_gaussian):
    keep = [[True, False], [True, True]]
    g = make_gaussian([[0.1, 9.0], [1.0, -2.0]], [[4.0, 1.0], [9.0, 25.0]], 0.5, keep)
    got = score(Posterior({"w": g}, 10))["w"]
    want = [0.5 * math.log(p / 0.5) - 0.5 * p * m * m for m, p in ((0.1, 4.0), (1.0, 9.0), (-2.0, 25.0))]
    assert got.tolist() == pytest.approx(want, rel=1e-12)


def test_priors_per_weight_and_prior_means_count(make_gaussian):
    means = torch.tensor([0.3, -1.0], dtype=torch.float64)
    g = make_gaussian([0.1, 1.0], [4.0, 9.0], torch.tensor([0.5, 2.0]), prior_mean=means)
    evidence = score(Posterior({"w": g}, 10))
    want = [
        0.5 * math.log(p / p0) - 0.5 * p * m * m + 0.5 * p0 * m0 * m0
        for m, p, p0, m0 in ((0.1, 4.0, 0.5, 0.3), (1.0, 9.0, 2.0, -1.0))
    ]
    assert evidence["w"].tolist() == pytest.approx(want, rel=1e-12)
    cost = sum(0.5 * ((p + p0) * m * m - (1 - p0 / p)) for m, p, p0 in ((0.1, 4.0, 0.5), (1.0, 9.0, 2.0)))
    assert evidence.nll_cost({"w": torch.tensor([False, False])}) == pytest.approx(cost / 10, rel=1e-12)


def test_it_is_a_mapping_in_the_order_of_the_network(evidence):
    assert list(evidence) == ["a", "b", "c"] and len(evidence) == 3
    assert [len(d) for d in evidence.values()] == [36, 4, 10]


def test_gain_sums_what_is_newly_removed(evidence, posterior):
    keep = {n: g.keep.clone() for n, g in posterior.items()}
    assert evidence.gain(keep) == 0.0 and evidence.nll_cost(keep) == 0.0
    keep["b"][0] = keep["a"][0, 1] = False
    want = float(evidence["b"][0] + evidence["a"][1])
    assert evidence.gain(keep) == pytest.approx(want, rel=1e-12)
    assert evidence.gain({"b": keep["b"]}) == pytest.approx(float(evidence["b"][0]), rel=1e-12)


def test_orders_put_the_least_salient_first(make_gaussian):
    g = make_gaussian([0.3, -1.0, 0.5], [100.0, 1.0, 2.0], 1.0)
    evidence = score(Posterior({"w": g}, 10))
    orders = {by_snr: [2, 1, 0], by_magnitude: [0, 2, 1], by_delta_f: [2, 1, 0]}
    for salience, order in orders.items():
        assert torch.argsort(salience(evidence)["w"]).tolist() == order, salience
    assert by_snr(evidence)["w"].tolist() == pytest.approx([9.0, 1.0, 0.5])
    assert torch.equal(by_delta_f(evidence)["w"], -evidence["w"])


def test_random_order_repeats_with_its_seed_and_touches_no_global_state(evidence):
    before = torch.get_rng_state()
    one, same, other = (torch.cat(list(by_random(s)(evidence).values())) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(one.unique()) == len(one)
