"""What the estimators promise beyond scikit-learn's contract: truth found, scales, weights, odd tables."""

from __future__ import annotations

import warnings

import matplotlib
import numpy as np
import pytest
import torch
from sklearn.compose import TransformedTargetRegressor
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ockham.errors import OckhamWarning
from ockham.tabular import SparseBNNClassifier, SparseBNNRegressor
from ockham.tabular.data import duplicates

FAST = {"max_iter": 300, "n_restarts": 1, "hidden_layer_sizes": (8,), "n_draws": 4, "random_state": 0}


@pytest.fixture(scope="module")
def fitted(table):
    return SparseBNNRegressor(**{**FAST, "max_iter": 700}).fit(*table)


def test_the_inputs_that_matter_are_found(table, fitted):
    assert (fitted.inclusion_ > 0.5).nonzero()[0].tolist() == [0, 3]
    assert fitted.n_weights_ <= 12
    assert fitted.score(*table) > 0.97
    assert fitted.noise_std_ == pytest.approx(0.3, rel=0.3)
    np.testing.assert_array_equal(fitted.feature_importances_, fitted.inclusion_)


def test_the_predictive_interval_covers(table, fitted):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(400, 6))
    y = 2 * x[:, 0] - x[:, 3] + 0.3 * rng.normal(size=400)
    mean, std = fitted.predict(x, return_std=True)
    assert 0.9 < np.mean(np.abs(y - mean) < 1.96 * std) < 0.99
    np.testing.assert_array_equal(mean, fitted.predict(x))


@pytest.mark.parametrize("scale", [1e-9, 256.0, 1e8])
def test_units_of_target_and_inputs_do_not_matter(table, scale):
    x, y = table
    one = SparseBNNRegressor(**FAST).fit(x, y)
    other = SparseBNNRegressor(**FAST).fit(x * scale, y * scale)
    np.testing.assert_allclose(other.predict(x * scale) / scale, one.predict(x), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(other.inclusion_, one.inclusion_, atol=1e-2)


def test_weights_are_repetitions_and_order_does_not_matter(table):
    x, y = table
    weight = np.random.default_rng(1).integers(0, 3, len(x))
    one = SparseBNNRegressor(**FAST).fit(x, y, sample_weight=weight)
    other = SparseBNNRegressor(**FAST).fit(np.repeat(x, weight, 0)[::-1], np.repeat(y, weight)[::-1])
    np.testing.assert_array_equal(one.predict(x), other.predict(x))


def test_a_hundred_noise_inputs_and_a_product_nobody_sees_alone():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(600, 100))
    y = 2 * x[:, 7] * x[:, 60] + x[:, 33] + 0.3 * rng.normal(size=600)
    model = SparseBNNRegressor(**{**FAST, "max_iter": 900, "hidden_layer_sizes": (16,)}).fit(x, y)
    assert set((model.inclusion_ > 0.5).nonzero()[0]) >= {7, 33, 60}
    assert (model.inclusion_ > 0.5).sum() <= 4


def test_constant_and_duplicated_columns(table):
    x, y = table
    odd = np.column_stack([x, np.full(len(x), 7.0), x[:, 0] * 3 + 1, np.zeros(len(x))])
    with pytest.warns(OckhamWarning, match="x7 = x0"):
        model = SparseBNNRegressor(**FAST).fit(odd, y)
    assert model.inclusion_[6] == 0 and model.inclusion_[8] == 0
    assert model.inclusion_[7] == model.inclusion_[0] > 0.5


def test_balanced_columns_that_differ_in_two_rows_are_no_duplicates():
    """Standardised both are -1 and 1: their absolute values agree everywhere."""
    a = torch.tensor([1.0, -1.0]).repeat(100)
    b = a.clone()
    b[50], b[51] = -a[50], -a[51]
    assert duplicates(torch.stack([a, b, -b], 1)).tolist() == [0, 1, 1]


@pytest.mark.parametrize("kind", [SparseBNNRegressor, SparseBNNClassifier])
def test_no_column_that_varies(kind):
    with pytest.raises(ValueError, match="no column of X varies"):
        kind(**FAST).fit(np.ones((30, 2)), np.arange(30) % 2)


def test_a_fit_forgets_the_rows_of_partial_fits(table):
    x, y = table
    model = SparseBNNRegressor(**FAST).partial_fit(x, y)
    model.fit(x[:, :3], y).partial_fit(x[:, :3], y)
    assert len(model.inclusion_) == 3 and len(model._kept_rows[0]) == 150


def test_more_features_than_rows_and_few_rows():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(30, 60))
    y = 3 * x[:, 4] + 0.1 * rng.normal(size=30)
    assert SparseBNNRegressor(**FAST).fit(x, y).inclusion_.argmax() == 4
    with pytest.warns(OckhamWarning, match="10 rows"):
        SparseBNNRegressor(**FAST).fit(x[:10], y[:10])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_missing_is_taken_and_infinity_is_named(table, bad):
    x, y = table[0].copy(), table[1]
    x[3, 2] = bad
    if np.isnan(bad):  # a missing entry is taken as it comes
        assert (SparseBNNRegressor(**FAST).fit(x, y).inclusion_ > 0.5).nonzero()[0].tolist() == [0, 3]
        return
    with pytest.raises(ValueError, match="infinity"):
        SparseBNNRegressor(**FAST).fit(x, y)


def test_classes(table):
    x, y = table
    with pytest.raises(ValueError, match="one class"):
        SparseBNNClassifier(**FAST).fit(x, np.zeros(len(x)))
    three = np.array(["low", "mid", "high"])[np.digitize(y, [-1, 1])]
    model = SparseBNNClassifier(**{**FAST, "max_iter": 600}).fit(x, three)
    probabilities = model.predict_proba(x)
    assert list(model.classes_) == ["high", "low", "mid"] and probabilities.shape == (150, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1.0)
    assert model.score(x, three) > 0.85
    assert model.inclusion_[[0, 3]].min() > 0.5


def test_warm_start_and_partial_fit_go_on(table):
    x, y = table
    model = SparseBNNRegressor(**FAST, warm_start=True).fit(x, y)
    steps = model.n_iter_
    assert model.fit(x, y).n_iter_ > steps
    parts = SparseBNNRegressor(**FAST)
    for rows in np.array_split(np.arange(150), 3):
        parts.partial_fit(x[rows], y[rows])
    assert parts.score(x, y) > 0.9
    classifier = SparseBNNClassifier(**FAST)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OckhamWarning)
        classifier.partial_fit(x[:10], np.zeros(10, dtype=int), classes=[0, 1])
    assert classifier.partial_fit(x, (y > 0).astype(int)).score(x, y > 0) > 0.8
    with pytest.raises(ValueError, match="not among the classes"):
        classifier.partial_fit(x, np.full(len(x), 5))


def test_tables_and_pictures(table, fitted):
    text = fitted.summary()
    assert "x0" in text.splitlines()[2] + text.splitlines()[3] and f"{fitted.n_weights_} weights" in text
    matplotlib.use("Agg")
    axes = fitted.plot_inclusion(top=3)
    assert len(axes.patches) == 3
    matplotlib.pyplot.close(axes.figure)


def test_pipelines_searches_and_early_stopping(table):
    x, y = table
    steps = make_pipeline(StandardScaler(), SparseBNNRegressor(**{**FAST, "max_iter": 60}))
    search = GridSearchCV(steps, {"sparsebnnregressor__hidden_layer_sizes": [(4,), (4, 4)]}, cv=2).fit(x, y)
    assert search.best_estimator_[-1].n_weights_ >= 0
    assert TransformedTargetRegressor(steps[-1]).fit(x, y).predict(x).shape == (150,)
    long = SparseBNNRegressor(**{**FAST, "max_iter": 4000, "n_iter_no_change": 2}).fit(x, y)
    assert long.n_iter_ < 4000 and len(long.evidence_curve_) > 2


def test_column_names_of_data_frames(table):
    pandas = pytest.importorskip("pandas")
    x, y = table
    frame = pandas.DataFrame(x, columns=[f"f{j}" for j in range(6)])
    model = SparseBNNRegressor(**FAST).fit(frame, y)
    assert "f0" in model.summary() and list(model.feature_names_in_) == list(frame.columns)
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame.rename(columns={"f0": "other"}))


@pytest.mark.parametrize("name", ["learning_rate", "batch_size"])
def test_settings_without_effect_say_so(table, name):
    with pytest.warns(FutureWarning, match=f"{name} no longer does anything"):
        SparseBNNRegressor(**FAST, **{name: 1}).fit(*table)


@pytest.mark.parametrize("bad", [{"learning_rate": 0.0}, {"n_restarts": 0}, {"slab_variance": -1.0}])
def test_settings_out_of_range_are_named(table, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SparseBNNRegressor(**bad).fit(*table)


def test_an_odd_run_of_verbose(table, capsys):
    SparseBNNRegressor(**{**FAST, "max_iter": 60}, verbose=True).fit(*table)
    assert capsys.readouterr().err == ""
