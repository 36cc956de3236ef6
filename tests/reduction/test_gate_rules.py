"""Rules for gates: thresholds, orders, matched compression, what no evidence looks like."""

from __future__ import annotations

import math

import pytest
import torch

from ockham.errors import OckhamError
from ockham.methods.gates import lognormal
from ockham.methods.gates.rules import (
    GateTable,
    bmrs_n,
    bmrs_n_printed,
    bmrs_u,
    by_mean,
    by_norm,
    by_taylor,
    gate_evidence,
    in_random_order,
    snr_below,
)

F64 = torch.float64
# useful, collapsed as trained runs leave them, dead (mass far below any number that counts), untouched
MEAN, STD = torch.tensor([0.0, -1.0, -18.0, -10.0], dtype=F64), torch.tensor([0.01, 30.0, 1.0, 1e4], dtype=F64)
GROUPS = {"a": torch.tensor([0, 1]), "b": torch.tensor([2, 3])}


def table(sensitivity=None):
    layer = torch.tensor([0, 0, 1, 1])
    return GateTable(MEAN, STD, -20.0, 0.0, layer, torch.tensor([1.2, 0.8, 0.5, 1.5], dtype=F64), sensitivity)


def evidence(rule, alive=(True, True, True, True), sensitivity=None):
    return gate_evidence(table(sensitivity), rule, GROUPS, torch.tensor(alive))


def test_the_printed_threshold_keeps_collapsed_gates_and_the_released_one_does_not():
    printed, released = bmrs_n_printed(table()), bmrs_n(table())
    assert (printed >= 0).tolist() == [False, False, True, False]
    assert (released >= 0).tolist() == [False, True, True, True]
    torch.testing.assert_close(released - printed, torch.full((4,), 0.5 * math.log(2 * math.pi), dtype=F64))


def test_every_rule_keeps_the_useful_gate_and_ranks_the_dead_one_out_first():
    for rule in (bmrs_n, bmrs_n_printed, bmrs_u(8), bmrs_u(4), snr_below(1.0), by_mean):
        score = rule(table())
        assert float(score[0]) < 0 and int(score.argmin()) == 0, rule
    assert int(by_mean(table()).argmax()) == 2 == int(bmrs_u(8, -20.0)(table()).argmax())


def test_the_published_uniform_rule_counts_mass_below_its_lower_end_against_removal():
    dead = 2
    assert float(bmrs_u(8)(table())[dead]) < 0 < float(bmrs_u(8, -20.0)(table())[dead])


def test_snr_score_is_zero_at_its_limit():
    exact = lognormal.snr(MEAN, STD)
    for limit in (0.5, 1.0, 3.0):
        torch.testing.assert_close(snr_below(limit)(table()) >= 0, exact <= limit)


def test_orders_never_stop_by_themselves():
    gradients = torch.tensor([3.0, 0.1, 1.0, 2.0], dtype=F64)
    for rule in (by_mean, by_norm, by_taylor, in_random_order(3)):
        score = rule(table(gradients))
        assert bool((score < 0).all())
    assert by_norm(table()).argsort(descending=True).tolist() == [2, 1, 0, 3]
    assert by_taylor(table(gradients)).argsort(descending=True).tolist() == [1, 2, 3, 0]
    assert torch.equal(in_random_order(3)(table()), in_random_order(3)(table()))
    assert not torch.equal(in_random_order(3)(table()), in_random_order(4)(table()))
    with pytest.raises(OckhamError, match="needs gradients"):
        by_taylor(table())


def test_evidence_reports_the_true_delta_f_whatever_the_rule():
    for rule in (bmrs_n, by_norm, in_random_order()):
        found = evidence(rule)
        torch.testing.assert_close(torch.cat([found.delta_f["a"], found.delta_f["b"]]), lognormal.delta_f_n(MEAN, STD))


def test_the_last_structure_of_a_group_stays():
    found = evidence(bmrs_n)
    assert found.keep["a"].tolist() == [True, False]
    assert found.keep["b"].sum() == 1  # both would go; the one with the lower score stays
    assert int(found.keep["b"].nonzero()) == int(found.score["b"].argmin())
    assert evidence(bmrs_n, (True, True, False, True)).keep["b"].tolist() == [False, True]


def test_a_posterior_that_is_the_prior_is_named_no_evidence():
    found = evidence(bmrs_n)
    assert found.no_evidence["b"].tolist() == [False, True]
    assert found.no_evidence["a"].tolist() == [False, True]  # collapsed is nearly the prior, too
    assert "1 with posterior = prior (no evidence)" in str(found)
    assert not bool(evidence(bmrs_n, (True, True, True, False)).no_evidence["b"].any())


def test_matched_compression_goes_by_order_and_leaves_one():
    found = evidence(by_norm)  # out first: 2, 1, 0, 3
    assert {k: v.tolist() for k, v in found.matched(1).items()} == {"a": [True, True], "b": [False, True]}
    assert {k: v.tolist() for k, v in found.matched(2).items()} == {"a": [True, False], "b": [False, True]}
    assert {k: v.tolist() for k, v in found.matched(4).items()} == {"a": [True, False], "b": [False, True]}
    again = evidence(by_norm, (True, True, False, True)).matched(1)
    assert again["b"].tolist() == [False, True] and bool(again["a"].all())


def test_a_rule_must_score_every_gate():
    with pytest.raises(OckhamError, match="one number per gate"):
        evidence(lambda t: t.mean[:2])
    with pytest.raises(OckhamError, match="one number per gate"):
        evidence(lambda t: t.mean * math.nan)
