"""Columns of correlated matrices against the dense covariance, and plans in rounds against doing it by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import ockham
from ockham.choose.correlated import narrowed, removed_together, score_columns
from ockham.choose.units import structures_from
from ockham.evidence.kronecker import (
    compensated_columns,
    conditional_mean,
    covariance,
    delta_f_columns,
    factorised,
    removal_cost,
    without_columns,
)

P0 = 1.7


def matrix(outputs: int = 3, inputs: int = 5, parts: int = 1, seed: int = 0) -> tuple[Tensor, object]:
    g = torch.Generator().manual_seed(seed)
    factors = []
    for n in (inputs, outputs):
        root = torch.randn(parts, n, n + 2, generator=g, dtype=torch.float64)
        factors.append(3 * root @ root.mT)
    return torch.randn(parts, outputs, inputs, generator=g, dtype=torch.float64), factorised(*factors, P0)


def normal_at_zero(mean: Tensor, cov: Tensor) -> float:
    normal = torch.distributions.MultivariateNormal(mean, cov)
    return float(normal.log_prob(torch.zeros(len(mean), dtype=mean.dtype)))


@pytest.mark.parametrize("columns", [[0], [4], [1, 3], [0, 1, 2]])
def test_columns_are_scored_by_their_block_of_the_dense_covariance(columns: list[int]) -> None:
    mean, k = matrix()
    at = torch.tensor([5 * row + c for row in range(3) for c in columns])
    cov, m = covariance(k)[at][:, at], mean[0].reshape(-1)[at]
    expected = normal_at_zero(m, cov) - normal_at_zero(torch.zeros_like(m), torch.eye(len(at)).double() / P0)
    cost, delta = delta_f_columns(mean[0], k, torch.tensor([columns]))
    assert float(delta) == pytest.approx(expected, rel=1e-10)
    assert float(cost) == pytest.approx(float(0.5 * m @ torch.linalg.solve(cov, m)), rel=1e-10)
    keep = torch.ones(1, 3, 5, dtype=torch.bool)
    keep[:, :, columns] = False
    assert float(cost) == pytest.approx(removal_cost(mean, k, keep), rel=1e-6)


def test_many_sets_at_once_are_as_one_by_one(monkeypatch) -> None:
    mean, k = matrix(4, 12)
    sets = torch.arange(12).view(6, 2)
    together = delta_f_columns(mean[0], k, sets)
    monkeypatch.setattr("ockham.evidence.kronecker._COLUMNS_AT_ONCE", 1)
    for whole, alone in zip(together, delta_f_columns(mean[0], k, sets), strict=True):
        assert torch.allclose(whole, alone, rtol=1e-12)


def test_evidence_is_a_chain_when_the_posterior_is_conditioned_exactly() -> None:
    mean, k = matrix(3, 5)
    alive = torch.tensor([True, False, True, True, False])
    gone = torch.tensor([[1, 4]])
    keep = alive.expand(1, 3, 5)
    left = conditional_mean(mean, k, keep, tolerance=1e-14)[0]
    inner = without_columns(k, 0, alive)
    first = delta_f_columns(mean[0], k, gone)[1]
    second = delta_f_columns(left[:, alive], inner, torch.tensor([[0, 2]]))[1]
    both = delta_f_columns(mean[0], k, torch.tensor([[1, 4, 0, 3]]))[1]
    assert float(first + second) == pytest.approx(float(both), rel=1e-9)


def test_survivors_move_as_the_iteration_moves_them() -> None:
    mean, k = matrix(3, 6, parts=2)
    alive = torch.tensor([True, True, True, False, True, True])
    gone = torch.tensor([False, True, False, False, True, False])
    mean = mean * alive
    for g in range(2):
        found = compensated_columns(mean[g], k, g, alive, gone, 1e-9)
        inner = without_columns(k, g, alive)
        whole = conditional_mean(mean[g][None][..., alive], inner, ~gone[alive].expand(1, 3, 5), 1e-9, tolerance=1e-13)[
            0
        ]
        assert torch.allclose(found[:, alive], whole, rtol=1e-5, atol=1e-7)
        assert bool((found[:, gone] == 0).all())


def network() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2), nn.ReLU(),
        nn.Conv2d(8, 5, 1), nn.ReLU(), nn.Flatten(), nn.Linear(80, 7), nn.ReLU(), nn.Linear(7, 3),
    ).eval()  # fmt: skip
    return model, torch.randn(60, 1, 8, 8), torch.randint(3, (60,))


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, ockham.Posterior, ockham.surgery.Groups]:
    model, x, y = network()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    posterior = ockham.laplace(model, [(x, y)], n_data=600)
    return model, x, posterior, ockham.trace(model, x[:2])


def test_units_of_every_kind_of_reader_are_scored_jointly(trained) -> None:
    _, _, posterior, groups = trained
    found = score_columns(posterior, groups)
    assert torch.equal(structures_from(posterior, groups)["8.weight:0"], found["8.weight:0"])
    matrices = {m.weight: m for m in posterior.matrices}
    mean = matrices["10.weight"].pack({n: posterior[n].mean for n in ("10.weight", "10.bias")})[0]
    _, delta = delta_f_columns(mean, matrices["10.weight"].precision, torch.arange(7)[:, None])
    assert torch.allclose(found["8.weight:0"], -delta)
    mean = matrices["8.weight"].pack({n: posterior[n].mean for n in ("8.weight", "8.bias")})[0]
    cost, delta = delta_f_columns(mean, matrices["8.weight"].precision, torch.arange(80).view(5, 16))
    assert torch.allclose(found["5.weight:0"], -delta) and torch.allclose(found.cost["5.weight:0"], cost)
    assert all(bool((c >= 0).all()) and bool(c.isfinite().all()) for c in found.cost.values())


def test_narrowed_is_the_conditional_mean_and_twice_is_once(trained) -> None:
    _, _, posterior, groups = trained
    stay = {"8.weight:0": torch.tensor([True, False, True, True, False, True, True])}
    less = {"8.weight:0": torch.tensor([True, False, True, False, False, True, True])}
    once, twice = narrowed(posterior, groups, less), narrowed(narrowed(posterior, groups, stay), groups, less)
    assert torch.allclose(once["10.weight"].mean, twice["10.weight"].mean, rtol=1e-2, atol=1e-3)
    assert bool((once["10.weight"].mean[:, [1, 3, 4]] == 0).all())
    assert not torch.equal(once["10.bias"].mean, posterior["10.bias"].mean)
    assert torch.equal(once["8.weight"].mean, posterior["8.weight"].mean)
    again = score_columns(once, groups)
    assert again.held["8.weight:0"].tolist() == [3, 0, 3, 0, 0, 3, 3]


def test_weights_outside_of_matrices_add_up_where_units_go_together(trained) -> None:
    """Without matrices the units' own evidence adds; with one, only that of what lies outside of it."""
    _, _, posterior, groups = trained
    plain = replace(posterior, matrices=())
    keep = {"8.weight:0": torch.tensor([True, False, True, True, False, True, True])}
    keep |= {"5.weight:0": torch.arange(5) > 1}
    each = ockham.score(plain).by_group(groups)
    outside = -float(each["5.weight:0"][:2].sum())
    assert removed_together(plain, groups, keep) == pytest.approx(outside - float(each["8.weight:0"][[1, 4]].sum()))
    mixed = replace(posterior, matrices=tuple(m for m in posterior.matrices if m.weight != "8.weight"))
    joint = removed_together(mixed, groups, {"8.weight:0": keep["8.weight:0"]})
    assert removed_together(mixed, groups, keep) == pytest.approx(joint + outside, rel=1e-9)


def test_units_removed_together_cost_more_than_the_sum_where_they_stand_in_for_each_other() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight[1] = model[0].weight[0]
        model[0].weight.abs_()
        model[2].weight.copy_(torch.tensor([[1.0, 2.0], [-1.0, -1.5]]))
    x, y = torch.rand(200, 3), torch.randint(2, (200,))
    posterior, groups = ockham.laplace(model, [(x, y)], prior=1.0, n_data=5000), ockham.trace(model, x[:2])
    each = score_columns(posterior, groups)["0.weight:0"]
    both = removed_together(posterior, groups, {"0.weight:0": torch.tensor([False, False])})
    assert both < -100 - float(each.sum()) and float(each.max()) < 10
    left = narrowed(posterior, groups, {"0.weight:0": torch.tensor([True, False])})
    moved = ockham.Posterior(left.moments, left.n_data)
    assert torch.allclose(moved["2.weight"].mean[:, 0], posterior["2.weight"].mean.sum(1), rtol=1e-2)


def test_a_budget_is_met_and_the_compensated_copy_loses_less(trained) -> None:
    model, x, posterior, groups = trained
    plan = ockham.plan(groups, posterior, budget={"macs": "50%"}, model=model, example_inputs=x[:2])
    moved = ockham.compensate(model, posterior, groups, plan)
    small = ockham.shrink(moved, plan)
    ockham.verify(ockham.mask(moved, plan), small, x[:2])
    from ockham.surgery.costs import cost

    assert cost(small, x[:1]).macs <= 0.5 * cost(model, x[:1]).macs
    plain = ockham.shrink(model, plan)
    with torch.no_grad():
        whole = model(x)
        assert float((small(x) - whole).square().mean()) < float((plain(x) - whole).square().mean())
    assert set(plan.nats) == set(plan.removed)
    assert all(math.isfinite(v) and v != 0 for values in plan.nats.values() for v in values)
    with pytest.warns(ockham.OckhamWarning, match="the best of each stays"):  # four of six is all that is even
        even = ockham.plan(groups, posterior, budget={"macs": "95%"}, model=model, example_inputs=x[:2], round_to=4)
    left = {key: width - len(even.removed.get(key, ())) for key, width in even.widths.items()}
    assert all(n % 4 == 0 or n == even.widths[key] for key, n in left.items())


def test_without_a_budget_units_go_while_that_pays(trained) -> None:
    model, x, posterior, groups = trained
    plan = ockham.plan(groups, posterior, price=ockham.FlatPrice(0.0))
    dear = ockham.plan(groups, posterior, price=ockham.FlatPrice(50.0))
    gone = {name: sum(len(v) for v in p.removed.values()) for name, p in (("free", plan), ("dear", dear))}
    assert 0 <= gone["free"] < gone["dear"]
    widths = ockham.plan(groups, posterior, price=ockham.FlatPrice(50.0), round_to=2)
    left = {key: width - len(widths.removed.get(key, ())) for key, width in widths.widths.items()}
    assert all(n % 2 == 0 or n == widths.widths[key] for key, n in left.items())
    ockham.shrink(ockham.compensate(model, posterior, groups, dear), dear)(x[:2])


def test_a_round_that_does_not_pay_as_a_whole_is_taken_back(trained, monkeypatch) -> None:
    _, _, posterior, groups = trained
    assert ockham.plan(groups, posterior, price=ockham.FlatPrice(50.0)).removed
    monkeypatch.setattr("ockham.choose.planning.removed_together", lambda *a: -1e6)
    assert not ockham.plan(groups, posterior, price=ockham.FlatPrice(50.0)).removed


def test_a_unit_read_by_single_weights_is_scored_weight_by_weight(trained) -> None:
    _, _, posterior, groups = trained
    keep = posterior["10.weight"].keep.clone()
    keep[0, 2] = False
    from ockham.choose.correlated import reduced

    part = reduced(posterior, {"10.weight": keep})
    found = score_columns(part, groups)
    assert torch.allclose(found["8.weight:0"], ockham.score(part).by_group(groups)["8.weight:0"])
    small = narrowed(part, groups, {"8.weight:0": torch.tensor([True] * 6 + [False])})
    assert not bool(small["10.weight"].keep[:, 6].any())


def test_compensate_refuses_what_does_not_fit(trained) -> None:
    model, _x, posterior, groups = trained
    plan = ockham.plan(groups, {"8.weight:0": torch.tensor([True] * 6 + [False])})
    other, _, _ = network()
    other[10] = nn.Linear(7, 4)
    with pytest.raises(ockham.OckhamError, match="another model"):
        ockham.compensate(other, posterior, groups, plan)
    part = ockham.Posterior({"nothing": posterior["10.bias"]}, 10.0)
    with pytest.raises(ockham.OckhamError, match="do not fit"):
        ockham.compensate(model, part, groups, plan)
