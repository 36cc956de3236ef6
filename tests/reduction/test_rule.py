"""Rules: what goes, what must not, how many exactly, and the same each time."""

from __future__ import annotations

import pytest
import torch

from ockham.choose.rules import (
    BudgetRule,
    EvidenceRule,
    LearnedOddsRule,
    budget_count,
    by_delta_f,
    by_magnitude,
    by_random,
    by_snr,
    score,
)
from ockham.core.posterior import Gaussian, Posterior
from ockham.errors import OckhamError
from ockham.evidence.gaussian import beta_log_odds

RULES = [
    EvidenceRule(),
    EvidenceRule(log_odds=1.0, cap=0.2),
    LearnedOddsRule(),
    BudgetRule(0.3),
    BudgetRule(0.3, by_random(1), gradual=3.0),
]


def kept(keep, posterior):
    return sum(int(keep[n].sum()) if n in keep else int(g.keep.sum()) for n, g in posterior.items())


@pytest.mark.parametrize("rule", RULES)
def test_removed_stays_removed_and_protected_stays(rule, evidence, posterior):
    before = {n: g.keep.clone() for n, g in posterior.items()}
    keep = rule.decide(evidence, {"b"}, 0.5)
    for name, mask in keep.items():
        assert mask.dtype is torch.bool and mask.shape == posterior[name].mean.shape
        assert not bool((mask & ~before[name]).any())
    assert "b" not in keep or torch.equal(keep["b"], before["b"])
    assert all(torch.equal(g.keep, before[n]) for n, g in posterior.items())  # arguments unchanged
    again = rule.decide(evidence, {"b"}, 0.5)
    assert all(torch.equal(keep[n], again[n]) for n in keep)


@pytest.mark.parametrize("rule", RULES)
def test_everything_protected_removes_nothing(rule, evidence, posterior):
    keep = rule.decide(evidence, list(posterior), 1.0)
    assert kept(keep, posterior) == posterior.kept()


@pytest.mark.parametrize("odds", [-1.0, 0.0, 2.0])
def test_evidence_rule_removes_exactly_where_the_evidence_exceeds_the_odds(evidence, posterior, odds):
    keep = EvidenceRule(log_odds=odds).decide(evidence, (), 1.0)
    for name, g in posterior.items():
        assert torch.equal(~keep[name][g.keep], evidence[name] > odds)


@pytest.mark.parametrize("cap", [0.02, 0.1, 0.25, 1.0])
def test_cap_takes_the_least_salient_of_those_with_evidence(evidence, posterior, cap):
    candidates = sum(int((d > 0).sum()) for d in evidence.values())
    keep = EvidenceRule(cap=cap).decide(evidence, (), 1.0)
    gone = posterior.kept() - kept(keep, posterior)
    assert gone == min(candidates, int(cap * posterior.kept())) and candidates > 0.1 * posterior.kept()
    snr, d = (torch.cat(list(v.values())) for v in (by_snr(evidence), evidence))
    removed = torch.cat([~keep[n][g.keep] for n, g in posterior.items()])
    assert bool((d[removed] > 0).all())
    if gone < candidates:
        assert float(snr[removed].max()) <= float(snr[~removed & (d > 0)].min())


def test_no_order_takes_a_weight_without_evidence(evidence, posterior):
    for seed in range(5):
        keep = EvidenceRule(log_odds=0.5, cap=0.3, salience=by_random(seed)).decide(evidence, (), 1.0)
        removed = torch.cat([evidence[n][~keep[n][g.keep]] for n, g in posterior.items()])
        assert len(removed) == int(0.3 * posterior.kept()) and bool((removed > 0.5).all())


def test_learned_odds_use_their_own_tensor_and_an_even_prior(evidence, posterior):
    keep = LearnedOddsRule(strength=0.5, cap=1.0).decide(evidence, (), 1.0)
    for name, delta in evidence.items():
        half = max(0.25 * posterior[name].keep.numel(), 1.0)
        odds = beta_log_odds(delta, torch.ones_like(delta, dtype=torch.bool), keep_count=half, remove_count=half)
        assert torch.equal(~keep[name][posterior[name].keep], delta > odds)


def test_learned_odds_survive_an_emptied_tensor(make_gaussian):
    empty = make_gaussian([1.0, 2.0], 4.0, 1.0, [False, False])
    posterior = Posterior({"gone": empty, "w": make_gaussian([0.0, 3.0], 9.0)}, 10)
    keep = LearnedOddsRule(cap=1.0).decide(score(posterior), (), 1.0)
    assert keep["w"].tolist() == [False, True] and ("gone" not in keep or keep["gone"].tolist() == [False, False])


@pytest.mark.parametrize("salience", [by_snr, by_magnitude, by_delta_f, by_random(5)])
@pytest.mark.parametrize("budget", [0.05, 0.5, 17, 50])
def test_budget_is_met_exactly_by_the_most_salient(evidence, posterior, salience, budget):
    target = budget_count(budget, posterior.size())
    keep = BudgetRule(budget, salience).decide(evidence, (), 1.0)
    assert kept(keep, posterior) == min(target, posterior.kept())
    order = torch.cat(list(salience(evidence).values()))
    stays = torch.cat([keep[n][g.keep] for n, g in posterior.items()])
    if 0 < int(stays.sum()) < len(stays):
        assert float(order[~stays].max()) <= float(order[stays].min())


def test_budget_counts_protected_weights(evidence, posterior):
    keep = BudgetRule(20).decide(evidence, {"c"}, 1.0)
    assert kept(keep, posterior) == 20 and ("c" not in keep or torch.equal(keep["c"], posterior["c"].keep))


def test_gradual_path_is_the_published_cubic_and_ends_at_the_budget(evidence, posterior):
    rule, total = BudgetRule(0.1, gradual=3.0), posterior.size()
    target = budget_count(0.1, total)
    path = [kept(rule.decide(evidence, (), k / 10), posterior) for k in range(11)]
    want = [min(posterior.kept(), round(target + (total - target) * (1 - k / 10) ** 3)) for k in range(11)]
    assert path == want and path[-1] == target and path == sorted(path, reverse=True)
    assert kept(BudgetRule(0.1).decide(evidence, (), 0.0), posterior) == target  # at once


def test_ties_are_broken_by_position(make_gaussian):
    posterior = Posterior({n: make_gaussian([0.5] * 6, 4.0) for n in "ab"}, 10)
    keep = BudgetRule(8, by_magnitude).decide(score(posterior), (), 1.0)
    assert keep["a"].tolist() == [False] * 4 + [True] * 2 and keep["b"].tolist() == [True] * 6
    capped = EvidenceRule(cap=0.25).decide(score(posterior), (), 1.0)
    assert capped["a"].tolist() == [False] * 3 + [True] * 3 and capped["b"].tolist() == [True] * 6


def test_budget_above_what_lives_removes_nothing(evidence, posterior):
    assert kept(BudgetRule(1.0).decide(evidence, (), 1.0), posterior) == posterior.kept()


@pytest.mark.parametrize(("keep", "count"), [(0.25, 25), (1.0, 100), (1, 100), (7, 7), (100, 100), (0.004, None)])
def test_budget_is_a_share_or_a_number(keep, count):
    if count is None:
        with pytest.raises(OckhamError, match="between 1 and 100 weights"):
            budget_count(keep, 100)
    else:
        assert budget_count(keep, 100) == count


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EvidenceRule(cap=0.0), "EvidenceRule: cap"),
        (lambda: EvidenceRule(cap=1.5), "EvidenceRule: cap"),
        (lambda: LearnedOddsRule(cap=-0.1), "LearnedOddsRule: cap"),
        (lambda: LearnedOddsRule(strength=-1.0), "strength"),
        (lambda: BudgetRule(0.0), "BudgetRule: keep"),
        (lambda: BudgetRule(float("nan")), "BudgetRule: keep"),
        (lambda: budget_count(101, 100), "between 1 and 100"),
        (lambda: budget_count(1.5, 100), "between 1 and 100"),
    ],
)
def test_impossible_requests_are_named(make, message):
    with pytest.raises(OckhamError, match=message):
        make()


def test_a_budget_below_the_protected_weights_is_refused() -> None:
    ones = torch.ones(10)
    gaussian = Gaussian(ones, ones, torch.tensor(1.0), torch.tensor(0.0), torch.ones(10, dtype=torch.bool))
    evidence = score(Posterior({"a": gaussian, "b": gaussian}, 10.0))
    with pytest.raises(OckhamError, match="budget of 4 weights cannot be met: protected parameters alone hold 10"):
        BudgetRule(4).decide(evidence, {"a"}, 1.0)


def test_budget_that_only_what_is_gone_could_meet() -> None:
    """What is not protected has no weight left: the budget is not met in silence."""
    gone = torch.zeros(4, dtype=torch.bool)
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    moments = {
        "gone": Gaussian(torch.zeros(4), torch.full((4,), torch.inf), one, zero, gone),
        "held": Gaussian(torch.ones(4), torch.full((4,), 3.0), one, zero, ~gone),
    }
    evidence = score(Posterior(moments, 10.0))
    with pytest.raises(OckhamError, match="protected parameters alone hold 4"):
        BudgetRule(0.25).decide(evidence, protected=["held"])
