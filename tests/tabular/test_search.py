"""Modes, removals, growth and inclusion against least squares, enumeration and known truth."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ockham.errors import NonFiniteLossError
from ockham.tabular import SparseBNNRegressor
from ockham.tabular.fitting import FitPlan, drawn, fit
from ockham.tabular.inclusion import (
    Effort,
    believed,
    decide,
    drop_idle,
    grow,
    inclusion_of,
    input_removals,
    likely_products,
    product_factors,
    search,
    with_products,
    without_inputs,
)
from ockham.tabular.likelihoods import Classes, GaussianNoise
from ockham.tabular.model import Model, Table
from ockham.tabular.network import Net
from ockham.tabular.predicting import Draws

PLAN = FitPlan(hidden=(8,), outputs=1, restarts=1, steps=400, slab_variance=1.0, left_out=0, patience=1, seed=0)


def linear(x, y, sigma=0.3, mask=None):
    """Linear model of known noise with some inputs, as a state at its mode."""
    net = Net.linear(x.shape[1], 1, 0)
    if mask is not None:
        net = Net(net.keep | {"skip.weight": torch.tensor([mask])}, ())
    scale = Net.linear(x.shape[1], 1, 0, reads=False)
    precision = tuple(dict.fromkeys(n.keep, 1.0) for n in (net, scale))
    table = Table(x, y, torch.ones(len(x), dtype=torch.float64))
    model = Model((net, scale), GaussianNoise(-20.0), table, 1.0, precision, math.log(sigma), 0)
    vector = torch.zeros(len(net) + 1, dtype=torch.float64)
    vector[-1] = math.log(sigma)
    return decide(model, vector, 30, learn=0, tolerance=1e-9)


def columns(seed, rows, count, correlation=0.0):
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(rows, 1, generator=g, dtype=torch.float64)
    own = torch.randn(rows, count, generator=g, dtype=torch.float64)
    return math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own, g


def test_a_mode_is_where_the_gradient_ends():
    x, g = columns(0, 200, 3)
    y = x[:, 0].tanh() - x[:, 1] + 0.2 * torch.randn(200, generator=g, dtype=torch.float64)
    state = linear(x, y)
    slope, metric = state.model.expand(state.model.passed(state.vector))
    assert float((slope / metric.diagonal().sqrt()).abs().max()) < 1e-3
    design = torch.cat([torch.ones(200, 1, dtype=torch.float64), x], 1)
    noise = math.exp(2 * float(state.vector[-1]))
    ridge = torch.linalg.solve(design.T @ design + noise * torch.eye(4, dtype=torch.float64), design.T @ y)
    torch.testing.assert_close(state.vector[:4], ridge, rtol=1e-4, atol=1e-5)
    with pytest.raises(NonFiniteLossError, match="huge targets"):
        decide(replace(state.model, table=replace(state.model.table, y=y * 1e300)), state.vector, 3)


def test_removing_one_of_two_dependent_columns_changes_nothing():
    """Together the two say what one says: after either went, the other makes up for it, and only one may go."""
    x, g = columns(1, 150, 3)
    x[:, 2] = x[:, 0]
    y = x[:, 0] + 0.3 * torch.randn(150, generator=g, dtype=torch.float64)
    state = linear(x, y)
    removals = input_removals(state, 0)
    assert removals[0].score > 0 and removals[2].score > 0
    once = without_inputs(state, 0, [removals[0]])
    assert once.evidence - once.model.belief() > state.evidence - state.model.belief()
    twice = input_removals(once, 0)[-1]
    assert twice.score < -100  # the other one is now indispensable
    torch.testing.assert_close(
        once.model.outputs(once.vector[None], x)[..., 0],
        state.model.outputs(state.vector[None], x)[..., 0],
        atol=0.02,
        rtol=0,
    )
    assert drop_idle(state, (0,)).model.nets[0].used()[[0, 2]].sum() >= 1


def test_a_removal_is_the_difference_of_exact_evidences():
    """Linear, noise held: Savage-Dickey, the whole evidence, and the marginal likelihood of the data agree."""
    x, g = columns(2, 80, 3, 0.5)
    y = 0.4 * x[:, 0] + 0.15 * x[:, 1] + 0.3 * torch.randn(80, generator=g, dtype=torch.float64)

    def exact(mask, sigma):
        design = torch.cat([torch.ones(80, 1, dtype=torch.float64), x[:, mask]], 1)
        covariance = sigma**2 * torch.eye(80, dtype=torch.float64) + design @ design.T
        return float(torch.distributions.MultivariateNormal(torch.zeros(80).double(), covariance).log_prob(y))

    state = linear(x, y)
    sigma = math.exp(float(state.vector[-1]))
    for j, removal in enumerate(input_removals(state, 0)):
        mask = torch.ones(3, dtype=torch.bool)
        mask[j] = False
        expected = exact(mask, sigma) - exact(torch.ones(3, dtype=torch.bool), sigma)
        assert removal.score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_inclusion_against_enumeration(correlation):
    """Four columns, linear truth: all sixteen models weighed exactly, and the neighbours of the best alone."""
    x, g = columns(3, 60, 4, correlation)
    y = 0.5 * x[:, 0] + 0.12 * x[:, 1] + 0.3 * torch.randn(60, generator=g, dtype=torch.float64)
    states = {m: linear(x, y, mask=list(m)) for m in itertools.product([False, True], repeat=4)}
    evidence = torch.tensor([s.evidence for s in states.values()], dtype=torch.float64)
    weight = evidence.softmax(0)
    exact = torch.stack([sum(w for w, m in zip(weight, states, strict=True) if m[j]) for j in range(4)])
    best = max(states.values(), key=lambda s: s.evidence)
    _, found = believed(best, 0, torch.Generator().manual_seed(0))
    assert float((found - exact).abs().max()) < 0.25
    assert float((found - exact).abs().mean()) < 0.1


def test_inclusion_of_neighbours_by_hand():
    used = torch.tensor([True, True, False, False])
    found = inclusion_of(0.0, {0: -1.0}, {(0, 2): -0.5}, used, torch.full((4,), -3.0))
    out = math.exp(-1.0) + math.exp(-0.5)
    assert float(found[0]) == pytest.approx(1 / (1 + out))
    assert float(found[1]) == 1.0  # not asked: out of the question
    into = math.exp(-3.0) + math.exp(-0.5)
    assert float(found[2]) == pytest.approx(into / (1 + into))
    assert float(found[3]) == pytest.approx(math.exp(-3) / (1 + math.exp(-3)))


def test_the_better_stand_in_takes_the_place():
    x, g = columns(4, 120, 2)
    x[:, 1] = x[:, 0] + 0.3 * x[:, 1]
    y = x[:, 0] + 0.2 * torch.randn(120, generator=g, dtype=torch.float64)
    wrong = linear(x, y, mask=[False, True])
    state, found = believed(wrong, 0, torch.Generator().manual_seed(0))
    assert state.evidence > wrong.evidence and (found > 0.5).tolist() == [True, False]


def test_units_come_where_the_data_bend_and_go_where_they_do_not():
    x, g = columns(5, 300, 4)
    noise = 0.1 * torch.randn(300, generator=g, dtype=torch.float64)
    on = []
    effort = Effort(1, 300, g, 1.0, on.append)
    bent = search(linear_start(x, (3 * x[:, 0]).tanh() + noise), 0, 8, effort)
    assert bent.model.nets[0].units[0] >= 1
    assert (bent.model.nets[0].used() > 0).tolist() == [True, False, False, False]
    residual = (bent.model.table.y - bent.model.outputs(bent.vector[None], x)[0, :, 0]).std()
    assert float(residual) < 0.13
    assert [s.evidence for s in on] == sorted(s.evidence for s in on)  # a search never goes down
    straight = search(linear_start(x, 0.5 * x[:, 1] + noise), 0, 8, effort)
    assert straight.model.nets[0].units == (0,)
    assert (straight.model.nets[0].used() > 0).tolist() == [False, True, False, False]


def linear_start(x, y):
    plan = replace(PLAN, steps=0, restarts=1)
    table = Table(x, y, torch.ones(len(x), dtype=torch.float64))
    net, scale = Net.linear(4, 1, 1), Net.linear(4, 1, 1, reads=False)
    precision = tuple(dict.fromkeys(n.keep, 1.0) for n in (net, scale))
    model = Model((net, scale), GaussianNoise(-20.0), table, plan.slab_variance, precision, 0.0, 0)
    return decide(model, torch.zeros(len(net) + 1, dtype=torch.float64), 20)


def test_growth_never_raises_the_energy_before_anything_moves():
    x, g = columns(6, 200, 4)
    state = linear_start(x, x[:, 0] * x[:, 1])
    grown = grow(state, 0, 3, g, 0.5)
    assert grown.model.nets[0].units == (3,)
    assert grown.model.passed(grown.vector).energy < state.model.passed(state.vector).energy


@pytest.mark.parametrize("hidden", [(), (4,), (4, 3)])
@pytest.mark.parametrize("outputs", [1, 3])
def test_classifiers_of_any_depth(hidden, outputs):
    x, g = columns(7, 200, 3)
    y = (x[:, 0] + 0.3 * torch.randn(200, generator=g, dtype=torch.float64) > 0).long() + (outputs > 1) * (x[:, 0] > 1)
    table = Table(x, y, torch.ones(200, dtype=torch.float64))
    every = fit(table, Classes(), replace(PLAN, hidden=hidden, outputs=outputs, steps=80))
    found = every[0]
    used = found.state.model.nets[0].used() > 0
    assert bool(used[0]) and float(found.inclusion[0][0]) > 0.99 and float(found.inclusion[0][2]) < 0.5
    assert len(found.state.model.nets) == len(found.inclusion) == 1
    again = fit(table, Classes(), replace(PLAN, hidden=hidden, outputs=outputs, steps=80), start=every)
    assert len(again) == len(every) and again[0].state.steps > found.state.steps


@pytest.mark.parametrize("many", [False, True])
def test_draws_have_the_moments_of_a_conjugate_posterior(many, monkeypatch):
    """Next to Gaussian noise of known size; by chains, and by the Gaussian that large tables get."""
    x, g = columns(8, 400, 3)
    x[:, 2] = x[:, 1] + 0.5 * x[:, 2]
    y = x @ torch.tensor([1.0, 0.5, -0.3], dtype=torch.float64) + 0.3 * torch.randn(
        400, generator=g, dtype=torch.float64
    )
    state = linear(x, y)
    if many:
        monkeypatch.setattr("ockham.tabular.fitting._MOST_DRAWN", 1)
    found = drawn(state, 1600, g)
    vectors = found.vectors
    assert vectors.shape == (1600, 5) and (found.acceptance is None) == many and len(found.model.table.x) == 0
    assert (found.mode is None) != many
    design = torch.cat([torch.ones(400, 1, dtype=torch.float64), x], 1)
    precision = design.T @ design * math.exp(-2 * float(state.vector[-1])) + torch.eye(4, dtype=torch.float64)
    scale = torch.linalg.inv(precision).diagonal().sqrt()
    assert float(((vectors[:, :4].mean(0) - state.vector[:4]) / scale).abs().max()) < 0.2
    ratio = vectors[:, :4].std(0) / scale
    assert float(ratio.min()) > 0.5 and float(ratio.max()) < 1.25
    assert drawn(state, 3, g).vectors.shape == (3, 5)


@pytest.mark.parametrize("outputs", [1, 3])
def test_gaussian_draws_predict_by_the_tangent(outputs):
    """Mean and covariance of the outputs are those of the mode and of J covariance J', however far the draws are."""
    g = torch.Generator().manual_seed(11)
    nets = [Net.linear(2, outputs, 1)]
    weight, bias = torch.randn(3, 2, generator=g, dtype=torch.float64), torch.randn(3, generator=g, dtype=torch.float64)
    new = {"weight": weight, "bias": bias, "smooth": torch.tensor([True, False, True])}
    net, vector = nets[0].grown(
        torch.randn(len(nets[0]), generator=g, dtype=torch.float64),
        [new | {"out": torch.randn(outputs, 3, generator=g, dtype=torch.float64)}],
    )
    x = torch.randn(5, 2, generator=g, dtype=torch.float64)
    table = Table(x[:0], x[:0, 0].long(), x[:0, 0])
    model = Model((net,), Classes(), table, 1.0, (dict.fromkeys(net.keep, 1.0),), 0.0, 0)
    away = 2 * torch.randn(20_000, len(vector), generator=g, dtype=torch.float64)
    away -= away.mean(0)
    draws = Draws(model, vector + away, None, vector)
    got = torch.cat(list(draws.outputs(x)), 1)
    mode = model.outputs(vector.unsqueeze(0), x)[0]
    jacobian = torch.func.jacrev(lambda v: model.outputs(v.unsqueeze(0), x)[0])(vector)
    torch.testing.assert_close(got.mean(0), mode, rtol=1e-3, atol=1e-3)
    expected = torch.einsum("nkd,de,nke->nk", jacobian, torch.cov(away.T, correction=0), jacobian)
    torch.testing.assert_close(got.var(0, correction=0), expected, rtol=1e-3, atol=1e-3)
    plain = torch.cat(list(replace(draws, mode=None).outputs(x)), 1)
    assert float((plain.var(0) / got.var(0) - 1).abs().max()) > 0.2


def test_correlated_inputs_that_do_nothing_do_not_all_stay():
    """Twenty columns correlated .9, two that matter: a set of all of them was once as likely as all sets of ten."""
    g = np.random.default_rng(4)
    x = math.sqrt(0.9) * g.normal(size=(200, 1)) + math.sqrt(0.1) * g.normal(size=(200, 20))
    y = 2 * x[:, 3] - 1.5 * x[:, 7] + 0.7 * g.normal(size=200)
    model = SparseBNNRegressor(n_restarts=1, hidden_layer_sizes=(8,), n_draws=1, random_state=0).fit(x, y)
    assert (model.inclusion_ > 0.5).nonzero()[0].tolist() == [3, 7]


@pytest.mark.parametrize("size", [0.0, 0.05, 0.5])
def test_a_product_is_weighed_as_the_exact_evidence_weighs_it(size):
    """On a grid a product is orthogonal to what is there, so that its promise is a difference of evidences."""
    g = torch.Generator().manual_seed(9)
    line = torch.linspace(-1.5, 1.5, 11, dtype=torch.float64)
    x = torch.cartesian_prod(line, line)
    y = x[:, 0] + size * x[:, 0] * x[:, 1] + 0.3 * torch.randn(121, generator=g, dtype=torch.float64)
    state = linear(x, y)
    sigma = math.exp(float(state.vector[-1]))

    def exact(*more):
        design = torch.stack([torch.ones(121, dtype=torch.float64), x[:, 0], x[:, 1], *more], 1)
        covariance = sigma**2 * torch.eye(121, dtype=torch.float64) + design @ design.T
        return float(torch.distributions.MultivariateNormal(torch.zeros(121).double(), covariance).log_prob(y))

    inputs, promised = product_factors(state, 0)
    assert inputs.tolist() == [0, 1]
    assert float(promised[0, 1]) == pytest.approx(exact(x[:, 0] * x[:, 1]) - exact(), abs=2e-3)
    assert likely_products(state, 0) == ([(0, 1)] if float(promised[0, 1]) > -3 else [])


def test_products_come_where_inputs_act_together_and_not_where_they_add():
    x, g = columns(10, 200, 5)
    noise = 0.2 * torch.randn(200, generator=g, dtype=torch.float64)
    effort = Effort(1, 400, g, 1.0, lambda s: None)
    start = linear_start(torch.cat([x[:, :4]], 1), x[:, 0] * x[:, 2] + noise)
    found = search(start, 0, 4, effort).model.nets[0]
    assert (
        found.pairs == ((0, 2),) and found.units == (0,) and (found.used() > 0).tolist() == [True, False, True, False]
    )
    added = search(linear_start(x[:, :4], x[:, 0] - x[:, 2] + noise), 0, 4, effort).model.nets[0]
    assert added.pairs == () and (added.used() > 0).tolist() == [True, False, True, False]


def test_the_price_of_a_product_counts_the_products_of_the_inputs_that_are_used():
    """Of two outputs and four inputs of six that are used there are 2 x 6; a slab at its centre has its density."""
    keep = Net.linear(6, 2, 0).keep | {"skip.weight": torch.tensor([[True, True, True, True, False, False]] * 2)}
    table = Table(torch.zeros(5, 6).double(), torch.zeros(5).long(), torch.ones(5).double())
    before = Model((Net(keep, ()),), Classes(), table, 1.0, (dict.fromkeys(keep, 1.0),), 0.0, 0)
    net, _ = before.nets[0].paired(torch.zeros(len(before.nets[0])).double(), [(0, 2)])
    after = replace(before.with_net(0, net), precision=({**before.precision[0], "pair.weight": 1.0},))
    choice = -math.log(13) - math.log(math.comb(12, 2))  # how many of twelve, and then which two
    density = 2 * math.log(2) - 2 + 0.5 * math.log(2 * math.pi / 3)
    assert after.belief() - before.belief() == pytest.approx(choice + density)


def test_inputs_that_are_nearly_the_same_have_no_product():
    x, g = columns(13, 200, 3)
    x[:, 1] = x[:, 0] + 0.3 * x[:, 1]
    y = x[:, 0].square() + 0.3 * torch.randn(200, generator=g, dtype=torch.float64)
    state = linear(x, y, sigma=1.5)
    _, promised = product_factors(state, 0)
    assert float(promised[0, 1]) == -math.inf and (0, 1) not in likely_products(state, 0)
    assert float(promised[0, 2]) > -math.inf


def test_products_are_looked_for_among_what_does_most_where_columns_are_many():
    x, g = columns(11, 300, 600)
    y = x[:, 5] + x[:, 590] + 1.5 * x[:, 5] * x[:, 590] + 0.3 * torch.randn(300, generator=g, dtype=torch.float64)
    state = linear(x, y, sigma=1.5, mask=[j in (5, 590) for j in range(600)])
    inputs, promised = product_factors(state, 0)
    assert len(inputs) <= 402 and {5, 590}.issubset(inputs.tolist()) and promised.shape == (len(inputs),) * 2
    assert likely_products(state, 0)[0] == (5, 590)


def test_what_stands_in_for_an_input_stands_in_for_it_in_products_too():
    x, g = columns(12, 200, 3)
    x[:, 2] = x[:, 0] + 0.05 * x[:, 2]
    y = x[:, 1] + x[:, 0] * x[:, 1] + 0.2 * torch.randn(200, generator=g, dtype=torch.float64)
    wrong = decide(*_with_product(linear(x, y, mask=[False, True, False]), (1, 2)), 20)
    assert wrong.model.nets[0].pairs == ((1, 2),)
    state, found = believed(wrong, 0, torch.Generator().manual_seed(0))
    assert state.model.nets[0].pairs == ((1, 0),) and state.evidence > wrong.evidence
    assert float(found[1]) > 0.99 and float(found[0]) > 0.5 and float(found[2]) < 0.5


def _with_product(state, pair):
    grown = with_products(state, 0, [pair])
    return grown.model, grown.vector


def test_evidence_for_products_is_of_all_rows_and_not_of_a_part_scaled_up():
    """Of a part times how many parts there are, chance is taken for evidence: unused columns had inclusion 1."""
    x, g = columns(13, 10_000, 4)
    y = x[:, 0] + 0.5 * torch.randn(10_000, generator=g, dtype=torch.float64)
    state = linear(x, y)
    some, factors = product_factors(state, 0)
    assert some.tolist() == [0, 1, 2, 3]
    information, wanted = state.model.pseudo_residuals(state.vector, state.model.table, 0)
    clamped = x.clamp(-4, 4)
    for i, j in ((0, 1), (1, 3), (2, 3)):
        z = clamped[:, i] * clamped[:, j]
        z = z - z.mean()
        a, size = float(wanted[:, 0] @ z), float(information[:, 0, 0] @ z.square())
        prior = state.model.precision[0].get("pair.weight", 1 / state.model.slab(0))
        assert float(factors[i, j]) == pytest.approx(
            0.5 * a**2 / (size + prior) - 0.5 * math.log1p(size / prior), rel=1e-6
        )
    model = SparseBNNRegressor(n_restarts=1, hidden_layer_sizes=(4,), n_draws=1, random_state=0, max_iter=60)
    assert float(model.fit(x.numpy(), y.numpy()).inclusion_[1:].max()) < 0.2
