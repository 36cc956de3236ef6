"""Networks of several searches that predict together."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from ockham.tabular import SparseBNNClassifier, SparseBNNRegressor, fitting
from ockham.tabular.predicting import Draws, interval, log_density, moments

FAST = {"hidden_layer_sizes": (12,), "n_draws": 16, "random_state": 0}


def table(rows: int = 160, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    g = np.random.default_rng(seed)
    x = g.normal(size=(rows, 4))
    return x, np.sin(2 * x[:, 0]) + np.abs(x[:, 1]) * x[:, 0] + 0.2 * g.normal(size=rows)


@pytest.fixture(scope="module")
def model() -> SparseBNNRegressor:
    return SparseBNNRegressor(n_restarts=3, **FAST).fit(*table())


def parts_of(draws: Draws) -> list[Draws]:
    return [replace(draws, others=()), *draws.others]


def test_every_network_says_as_much_as_any_other(model: SparseBNNRegressor) -> None:
    draws, x = model._draws, torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double()
    parts = parts_of(draws)
    assert 2 <= len(parts) == len(model._fitted) <= 3
    assert len({len(p.vectors) for p in parts}) == 1 and len(draws.extras) == sum(len(p.vectors) for p in parts)
    assert len({len(p.vectors[0]) for p in parts}) > 1  # they are different networks
    y = torch.linspace(-1, 1, 9).double()
    each = torch.stack([log_density(p, x, y) for p in parts])
    torch.testing.assert_close(log_density(draws, x, y), each.logsumexp(0) - np.log(len(parts)))
    means, variances = (torch.stack(t) for t in zip(*(moments(p, x) for p in parts), strict=True))
    mean, variance = moments(draws, x)
    torch.testing.assert_close(mean, means.mean(0))
    torch.testing.assert_close(variance, variances.mean(0) + means.var(0, correction=0))
    ends = interval(draws, x, 0.9)
    alone = [interval(p, x, 0.9) for p in parts]
    for side in range(2):
        assert (np.min([a[side] for a in alone], 0) - 1e-6 <= ends[side]).all()
        assert (ends[side] <= np.max([a[side] for a in alone], 0) + 1e-6).all()


def test_what_is_told_is_of_all_networks(model: SparseBNNRegressor) -> None:
    fits = model._fitted
    assert model.inclusion_ == pytest.approx(torch.stack([f.inclusion[0] for f in fits]).mean(0).numpy())
    assert model.n_weights_ == sum(len(net) for f in fits for net in f.state.model.nets) - len(fits)
    assert model.evidence_ == max(f.state.evidence for f in fits) == fits[0].state.evidence
    used = sum(f.state.model.nets[0].used() for f in fits)
    assert model._weights_by_feature().tolist() == used.tolist()
    assert all(len(f.state.model.table.x) == 0 for f in fits)
    x, y = table(seed=1)
    assert pickle.loads(pickle.dumps(model)).predict(x).tolist() == model.predict(x).tolist()
    lower, upper = model.predict_interval(x, 0.95)
    assert np.mean((lower < y) & (y < upper)) > 0.88


def test_a_network_with_far_less_evidence_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = table()
    scores = SparseBNNRegressor(n_restarts=3, **FAST).fit(x, y)._fitted[0].restarts
    gap = (max(scores) - min(scores)) / len(x)
    assert gap > 0
    for far, fewer in ((1.01 * gap, False), (0.99 * gap, True)):
        monkeypatch.setattr(fitting, "_FAR", far)
        assert (len(SparseBNNRegressor(n_restarts=3, **FAST).fit(x, y)._fitted) < 3) == fewer


def test_on_many_rows_the_best_goes_on_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "_FIRST_ROWS", 100)
    found = SparseBNNRegressor(n_restarts=3, **FAST).fit(*table())
    assert len(found._fitted) == 1 and len(found._fitted[0].restarts) == 3


def test_more_rows_go_on_with_all_networks() -> None:
    x, y = table(300)
    model = SparseBNNRegressor(n_restarts=2, **FAST).partial_fit(x[:200], y[:200])
    before = len(model._fitted)
    assert before == 2
    model.partial_fit(x[200:], y[200:])
    assert len(model._fitted) == before and np.corrcoef(model.predict(x), y)[0, 1] > 0.9


def test_classes_and_counts_by_several_networks() -> None:
    x, y = table(240)
    labels = np.digitize(y, [-0.5, 0.5])
    found = SparseBNNClassifier(n_restarts=2, label_noise=True, **FAST).fit(x, labels)
    parts = parts_of(found._draws)
    said = found.predict_proba(x)
    assert len(parts) == 2 and np.allclose(said.sum(1), 1) and (said.argmax(1) == labels).mean() > 0.7
    each = []
    for part in parts:
        found._draws = part
        each.append(found.predict_proba(x))
    assert np.allclose(np.mean(each, 0), said, atol=1e-6) and 0 <= found.label_noise_ < 0.3
    counts = np.random.default_rng(0).poisson(np.exp(0.8 * x[:, 0] + 0.5))
    model = SparseBNNRegressor(loss="poisson", n_restarts=2, **FAST).fit(x, counts)
    parts = parts_of(model._draws)
    whole = model.log_density(x, counts)
    if len(parts) == 2:
        each = []
        for part in parts:
            model._draws = part
            each.append(model.log_density(x, counts))
        assert np.allclose(np.logaddexp(*each) - np.log(2), whole)
