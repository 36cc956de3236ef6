"""Trees for what networks leave unexplained: when they come, what they read, and that densities stay densities."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.ensemble import HistGradientBoostingRegressor

from ockham.tabular import SparseBNNClassifier, SparseBNNRegressor
from ockham.tabular.fitting import _weighed, _working, _worth, residual_trees
from ockham.tabular.likelihoods import Classes, Counts, Student
from ockham.tabular.model import Model, Table
from ockham.tabular.network import Net
from ockham.tabular.predicting import Draws, Trees, _limits

FAST = {"hidden_layer_sizes": (8,), "n_draws": 16, "random_state": 0, "n_restarts": 1}


def steps(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A linear term and a step function of two inputs that no few smooth units follow; x3 to x5 do nothing."""
    g = np.random.default_rng(seed)
    heights = np.random.default_rng(7).normal(size=(9, 9))
    x = g.uniform(-1, 1, size=(rows, 6))
    cell = np.floor((x[:, :2] + 1) * 4.5).astype(int)
    return x, 2 * x[:, 2] + x[:, 0] + x[:, 1] + heights[cell[:, 0], cell[:, 1]] + 0.1 * g.normal(size=rows)


@pytest.fixture(scope="module")
def rough() -> SparseBNNRegressor:
    return SparseBNNRegressor(**FAST).fit(*steps(900, 0))


def without(model: SparseBNNRegressor) -> SparseBNNRegressor:
    """The same model, its networks alone."""
    other = pickle.loads(pickle.dumps(model))
    other._draws = replace(other._draws, trees=None)
    return other


def test_they_come_where_networks_cannot_follow_and_rows_not_seen_gain(rough: SparseBNNRegressor) -> None:
    assert rough.n_leaves_ > 500 and rough.residual_gain_ > 100
    x, y = steps(400, 1)
    alone = without(rough)
    assert rough.log_density(x, y).mean() > alone.log_density(x, y).mean() + 0.3
    assert np.mean((y - rough.predict(x)) ** 2) < 0.6 * np.mean((y - alone.predict(x)) ** 2)
    lower, upper = rough.predict_interval(x, 0.9)
    assert 0.82 < np.mean((lower < y) & (y < upper)) < 0.97
    assert f"{rough.n_leaves_} leaves" in rough.summary()


def test_they_read_only_what_networks_use(rough: SparseBNNRegressor) -> None:
    used = {j for j in range(6) if rough.inclusion_[j] > 0.5}
    assert {0, 1, 2} <= used < set(range(6))
    idle = sorted(set(range(6)) - used)
    x, _ = steps(50, 2)
    moved = x.copy()
    moved[:, idle] = np.random.default_rng(3).normal(size=(50, len(idle)))
    np.testing.assert_array_equal(rough.predict(x), rough.predict(moved))


def test_an_input_that_only_trees_read_is_named(tmp_path: Path) -> None:
    g = np.random.default_rng(5)
    x = g.uniform(-1, 1, size=(900, 5))
    y = x[:, 0] + np.sign(np.sin(14 * np.pi * x[:, 3])) + 0.2 * g.normal(size=900)
    model = SparseBNNRegressor(**FAST).fit(x, y)
    trees = model._draws.trees
    assert trees is not None
    only = (trees.inclusion > 0).nonzero()[:, 0].tolist()
    assert only == [3] and model._weights_by_feature()[3] == 0
    assert model.inclusion_[3] > 0.99 and model.get_support()[[0, 3]].all()
    assert set(trees.columns.tolist()) == {j for j in range(5) if model._read()[j]}
    moved = x.copy()
    moved[:, 3] = -x[:, 3]
    assert np.std(model.predict(x) - model.predict(moved)) > 0.5
    idle = [j for j in range(5) if not model._read()[j]]
    assert idle and all(model.inclusion_[j] < 0.5 for j in idle)
    moved = x.copy()
    moved[:, idle] = 0
    np.testing.assert_array_equal(model.predict(x), model.predict(moved))
    assert "x3" in model.summary(top=0)
    page = model.report(tmp_path / "x3.html").read_text()
    assert page.index("x3") < page.index("Effects") and np.ptp(model.effect(3).mean) > 0.5
    off = SparseBNNRegressor(**FAST, residual_trees=False).fit(x, y)
    assert off.inclusion_[3] < 0.5


def test_they_stay_away_where_networks_follow_and_where_nobody_wants_them(rough: SparseBNNRegressor) -> None:
    g = np.random.default_rng(0)
    x = g.normal(size=(500, 5))
    smooth = SparseBNNRegressor(**FAST).fit(x, np.sin(x[:, 0]) + x[:, 1] + 0.3 * g.normal(size=500))
    assert smooth.n_leaves_ == 0 and smooth.residual_gain_ == 0 and smooth._draws.trees is None
    assert "leaves" not in smooth.summary()
    few = SparseBNNRegressor(**FAST).fit(*(part[:80] for part in steps(900, 0)))
    assert few.n_leaves_ == 0
    off = SparseBNNRegressor(**FAST, residual_trees=False).fit(*steps(900, 0))
    assert off.n_leaves_ == 0 and off.inclusion_ == pytest.approx(rough.inclusion_)
    assert off.n_weights_ == rough.n_weights_
    x, y = steps(60, 4)
    np.testing.assert_allclose(off.log_density(x, y), without(rough).log_density(x, y), rtol=1e-9)


def test_the_density_with_trees_is_one(rough: SparseBNNRegressor) -> None:
    x, _ = steps(5, 5)
    grid = np.linspace(-12, 12, 6001)
    for row in x:
        density = np.exp(rough.log_density(np.repeat(row[None], len(grid), 0), grid))
        assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-3)
        assert np.trapezoid(density * grid, grid) == pytest.approx(rough.predict(row[None])[0], abs=2e-3)
        lower, upper = rough.predict_interval(row[None], 0.8)
        inside = (grid > lower) & (grid < upper)
        assert np.trapezoid(density[inside], grid[inside]) == pytest.approx(0.8, abs=5e-3)


def test_what_is_told_is_with_trees(rough: SparseBNNRegressor, tmp_path: Path) -> None:
    assert rough._draws.trees is not None and rough._draws.trees.log_shrink < -0.1
    x, y = steps(500, 6)
    assert rough.noise_std_ == pytest.approx(np.std(y - rough.predict(x)), rel=0.35)
    page = rough.report(tmp_path / "rough.html").read_text()
    assert f">{rough.n_leaves_}<" in page and "of trees for what networks leave" in page
    copy = pickle.loads(pickle.dumps(rough))
    np.testing.assert_array_equal(copy.predict(x), rough.predict(x))


def constant(likelihood: Student | Classes | Counts, outputs: torch.Tensor, extra: float | None = None) -> Draws:
    """One network whose outputs are the same for every row of a table of two inputs."""
    nets = [Net.linear(2, len(outputs), 0, reads=False)]
    parts = [outputs]
    if isinstance(likelihood, Student):
        nets.append(Net.linear(2, 1, 1, reads=False))
        parts = [outputs[:1], outputs[1:]]
        nets[0] = Net.linear(2, 1, 0, reads=False)
    empty = Table(torch.zeros(0, 2).double(), torch.zeros(0).double(), torch.zeros(0).double())
    precision = tuple(dict.fromkeys(net.keep, 1.0) for net in nets)
    model = Model(tuple(nets), likelihood, empty, 1.0, precision, 0.0, 0)
    vector = torch.cat([*parts, torch.tensor([] if extra is None else [extra])]).double()
    return Draws(model, vector.unsqueeze(0), None)


def test_share_and_scale_against_least_squares() -> None:
    """One network, nearly Gaussian noise of scale s: share = <r, t> / <t, t>, scale by the root mean square."""
    g = torch.Generator().manual_seed(0)
    shift = torch.randn(700, 1, generator=g).double()
    y = 0.6 * shift[:, 0] + 0.5 * torch.randn(700, generator=g).double()
    draws = constant(Student(-6.0), torch.tensor([0.0, 0.1]), 12.0)
    rows = Table(torch.zeros(700, 2).double(), y, torch.ones(700).double())
    share, log_shrink, gain = _weighed(draws, rows, shift)
    expected = float(y @ shift[:, 0] / (shift**2).sum())
    before = y.square().mean().sqrt()
    rest = (y - expected * shift[:, 0]).square().mean().sqrt()
    assert share == pytest.approx(expected, abs=2e-3)
    assert log_shrink == pytest.approx(float((rest / before).log()), abs=2e-3)
    assert gain == pytest.approx(-float((rest / before).log()), abs=1e-3)  # nats a row of a Gaussian
    none = _weighed(draws, rows, torch.randn(700, 1, generator=g).double() * 3)
    assert none[0] < 0.05 and none[2] < 0.005


def test_the_share_of_logits_against_a_logistic_regression() -> None:
    g = torch.Generator().manual_seed(1)
    shift = torch.randn(900, 1, generator=g).double()
    y = (torch.rand(900, generator=g) < torch.sigmoid(0.3 + 0.8 * shift[:, 0])).long()
    rows = Table(torch.zeros(900, 2).double(), y, torch.ones(900).double())
    share, log_shrink, gain = _weighed(constant(Classes(), torch.tensor([0.3])), rows, shift)

    def nll(s: float) -> float:
        p = 1 / (1 + np.exp(-0.3 - s * shift[:, 0].numpy()))
        return -float(np.mean(np.where(y.numpy() == 1, np.log(p), np.log(1 - p))))

    grid = np.linspace(0, 1.5, 3001)
    losses = [nll(s) for s in grid]
    assert share == pytest.approx(grid[int(np.argmin(losses))], abs=2e-3) and log_shrink == 0
    assert gain == pytest.approx(losses[0] - min(losses), abs=1e-5)


def test_working_responses() -> None:
    """Residuals, 1 / s^2; of a logit (y - p) / p (1 - p), p (1 - p); of a log rate (y - rate) / rate, rate."""
    weight = torch.tensor([1.0, 2.0, 1.0]).double()
    x = torch.zeros(3, 2).double()
    response, w = _working(constant(Student(-6.0), torch.tensor([0.2, 0.1]), 12.0), Table(x, weight * 0.3, weight))
    np.testing.assert_allclose(response[:, 0], (0.3 * weight - 0.2).numpy(), rtol=1e-6)
    np.testing.assert_allclose(w[:, 0] / w[0, 0], weight.numpy())
    y = torch.tensor([0, 1, 1])
    response, w = _working(constant(Classes(), torch.tensor([0.4])), Table(x, y, weight))
    p = 1 / (1 + np.exp(-0.4))
    np.testing.assert_allclose(response[:, 0], (y.numpy() - p) / (p * (1 - p)), rtol=1e-6)
    response, w = _working(constant(Counts(0.5), torch.tensor([0.1])), Table(x, weight, weight))
    rate = np.exp(0.6)
    np.testing.assert_allclose(response[:, 0], (weight.numpy() - rate) / rate, rtol=1e-6)
    np.testing.assert_allclose(w[:, 0], rate * weight.numpy(), rtol=1e-6)


def test_limits_of_bins() -> None:
    """Each value its own bin where they are few; else bins hold the same number of rows."""
    g = np.random.default_rng(0)
    few, many = g.integers(0, 9, size=400).astype(float) ** 2, g.normal(size=400)
    np.testing.assert_array_equal(_limits(few, 9), np.arange(8.0) ** 2)
    limits = _limits(many, 8)
    assert len(limits) == 7 and set(limits) < set(many)
    counts = np.bincount(np.searchsorted(limits, many), minlength=8)
    assert counts.sum() == 400 and 49 <= counts.min() <= counts.max() <= 51
    assert len(_limits(np.ones(5), 8)) == 0


def test_trees_of_bins_are_scikit_learns() -> None:
    """Rows of equal weight and few values: what scikit-learn says of the raw inputs, between its own limits as well."""
    g = np.random.default_rng(0)
    x = g.integers(-5, 6, size=(300, 3)) / 4.0
    z = np.stack([np.sin(x[:, 0]) + x[:, 1], x[:, 2] ** 2], 1) + 0.1 * g.normal(size=(300, 2))
    settings = {"max_iter": 20, "min_samples_leaf": 5, "early_stopping": False, "random_state": 3}
    trees = Trees.fit(x, z, np.ones_like(z), **settings)
    theirs = np.stack([HistGradientBoostingRegressor(**settings).fit(x, v).predict(x) for v in z.T], 1)
    np.testing.assert_allclose(trees.predict(x), theirs, rtol=1e-12)
    np.testing.assert_array_equal(trees.predict(x - 0.01), trees.predict(x))
    assert trees.predict(x[:0]).shape == (0, 2) and len(trees) > 40


def test_weights_of_trees_count_rows() -> None:
    """A row of weight two is two rows, to what a tree says of it."""
    g = np.random.default_rng(1)
    x = g.integers(0, 12, size=(200, 2)).astype(float)
    z, weight = (np.cos(x[:, 0]) * x[:, 1])[:, None], g.integers(1, 4, size=(200, 1))
    settings = {"max_iter": 15, "early_stopping": False, "min_samples_leaf": 1, "max_leaf_nodes": 6}
    twice = np.repeat(np.arange(200), weight[:, 0])
    weighed = Trees.fit(x, z, weight.astype(float), **settings).predict(x)
    repeated = Trees.fit(x[twice], z[twice], np.ones((len(twice), 1)), **settings).predict(x)
    np.testing.assert_allclose(weighed, repeated, rtol=1e-6)


def test_worth_of_hasty_trees() -> None:
    """Nothing for noise; of a step half of the squares it explains over the noise's, each row unseen by its trees."""
    g = np.random.default_rng(2)
    x = g.uniform(-1, 1, size=(1000, 2))
    noise, weight = g.normal(size=(1000, 1)), np.full((1000, 1), 4.0)
    assert _worth(0.5 * noise, weight, x, 0) < 2
    against = (np.arange(1000) % 5 == 0)[:, None] - 0.2  # a fold of its own: what the others say has the wrong sign
    assert _worth(against, weight, x, 0) == 0
    found = _worth(0.5 * np.sign(x[:, :1]) + 0.5 * noise, weight, x, 0)
    assert 0.75 * 500 < found < 500
    wrong = np.stack([np.sign(x[:, 0]), np.zeros(1000)], 1) * 0.5 + 0.5 * g.normal(size=(1000, 2))
    assert _worth(wrong, np.full((1000, 2), 4.0), x, 0) == pytest.approx(found, rel=0.1)  # outputs add up


def test_classes_and_counts() -> None:
    g = np.random.default_rng(0)
    x = g.uniform(-1, 1, size=(900, 3))
    cell = np.floor((x[:, :2] + 1) * 2).astype(int)
    odd = (cell.sum(1) % 2).astype(float)
    kind = (g.random(900) < np.where(odd > 0, 0.95, 0.05)).astype(int)
    label = np.array(["no", "yes"])[kind]
    settings = {**FAST, "hidden_layer_sizes": (2,)}
    classes = SparseBNNClassifier(**settings).fit(x[:700], label[:700])
    assert classes.n_leaves_ > 0
    alone = without(classes)
    inputs, trees = classes._inputs(x[700:]), classes._draws.trees
    assert trees is not None
    logits = torch.cat(list(alone._draws.outputs(inputs)), 1) + trees.shift(inputs)
    np.testing.assert_allclose(classes.predict_proba(x[700:])[:, 1], torch.sigmoid(logits).mean(0)[:, 0], rtol=1e-6)
    assert np.mean(classes.predict(x[700:]) == label[700:]) > np.mean(alone.predict(x[700:]) == label[700:]) + 0.03
    counts = g.poisson(np.exp(0.5 + 1.5 * odd))
    rates = SparseBNNRegressor(**settings, loss="poisson").fit(x[:700], counts[:700])
    assert rates.n_leaves_ > 0
    assert rates.log_density(x[700:], counts[700:]).mean() > without(rates).log_density(x[700:], counts[700:]).mean()
    assert (rates.predict(x[:50]) > 0).all()


def test_noise_alone_brings_no_trees() -> None:
    g = torch.Generator().manual_seed(0)
    rows = Table(
        torch.randn(300, 2, generator=g).double(), torch.randn(300, generator=g).double(), torch.ones(300).double()
    )
    draws = constant(Student(-6.0), torch.tensor([0.0, 0.1]), 3.0)
    assert residual_trees(draws, rows, 0) is None


def test_other_words_are_refused() -> None:
    with pytest.raises(ValueError, match="residual_trees"):
        SparseBNNRegressor(residual_trees="some").fit(*steps(50, 0))


def test_scores_are_of_a_student(rough: SparseBNNRegressor) -> None:
    """One draw: the density is Student's t about network and trees, its scale shrunk."""
    x, y = steps(6, 8)
    draws = rough._draws
    one = replace(draws, vectors=draws.vectors[:1], others=())
    location, scale, freedom = (t.numpy() for t in next(iter(one.with_scales(rough._inputs(x)))))
    plain = next(iter(replace(one, trees=None).with_scales(rough._inputs(x))))
    assert draws.trees is not None and draws.trees.share != 1
    said = draws.trees.trees.predict(rough._inputs(x)[:, draws.trees.columns].numpy())[:, 0]
    np.testing.assert_allclose(location, plain[0].numpy() + draws.trees.share * said, rtol=1e-6)
    np.testing.assert_allclose(scale, plain[1] * np.exp(draws.trees.log_shrink), rtol=1e-9)
    centre, std = rough._target.units
    expected = stats.t.logpdf((y - centre) / std, freedom[0, 0], location[0], scale[0]) - np.log(std)
    other = pickle.loads(pickle.dumps(rough))
    other._draws = one
    np.testing.assert_allclose(other.log_density(x, y), expected, rtol=1e-8)
