"""Tables as they come: what columns become, what weights count for, which targets are far away."""

from __future__ import annotations

import datetime
import warnings

import numpy as np
import pytest
from scipy import sparse

from ockham.errors import OckhamError, OckhamWarning
from ockham.tabular import SparseBNNClassifier, SparseBNNRegressor
from ockham.tabular.data import Encoding, columns_of, counts_for, dense, outlying

pandas = pytest.importorskip("pandas")
pyarrow = pytest.importorskip("pyarrow")
FAST = {"max_iter": 150, "n_restarts": 1, "hidden_layer_sizes": (4,), "n_draws": 8, "random_state": 0}


def encoded(frame, target=None):
    target = np.zeros((len(frame), 1)) if target is None else target
    return Encoding.of(columns_of(frame), [str(c) for c in frame.columns], target, np.ones(len(frame)))


def test_each_kind_of_column_becomes_numbers():
    frame = pandas.DataFrame(
        {
            "number": [1.5, np.nan, 2.5],
            "truth": [True, False, True],
            "time": pandas.to_datetime(["1970-01-02", "1970-01-01", "1970-01-03 12:00"], format="ISO8601"),
            "zone": pandas.to_datetime(["1970-01-02", "1970-01-01", None]).tz_localize("UTC"),
            "level": pandas.Categorical(["b", "a", "b"]),
            "code": pandas.Categorical([3, 1, 1]),
            "text": ["u", None, "v"],
        }
    )
    encoding, numbers = encoded(frame)
    found = dict(zip(encoding.names, numbers.T.tolist(), strict=True))
    assert found["number"] == [1.5, 2.0, 2.5] and found["number=missing"] == [0, 1, 0]
    assert found["truth"] == [1, 0, 1] and found["time"] == [1, 0, 2.5]
    assert found["zone"] == [1, 0, 0.5] and found["zone=missing"] == [0, 0, 1]
    assert found["level=a"] == [0, 1, 0] and "level=b" not in found  # the most frequent one is the rest
    assert found["code=3"] == [1, 0, 0]
    assert sum(n.startswith("text=") for n in encoding.names) == 2  # of three levels, a missing one among them
    names = [str(c) for c in frame.columns]
    np.testing.assert_array_equal(encoding.apply(columns_of(frame), names), numbers)
    assert [names[j] for j in encoding.origin] == [n.split("=")[0] for n in encoding.names]


def test_many_levels_are_ordered_by_the_target_of_other_rows():
    rng = np.random.default_rng(0)
    level = rng.integers(30, size=3000)
    target = np.sin(level)[:, None] + 0.1 * rng.normal(size=(3000, 1))
    frame = pandas.DataFrame({"level": [f"l{k}" for k in level]})
    encoding, numbers = encoded(frame, target)
    assert numbers.shape == (3000, 1) and np.corrcoef(numbers[:, 0], np.sin(level))[0, 1] > 0.99
    pure = rng.normal(size=(3000, 1))
    few = pandas.DataFrame({"level": [f"l{k}" for k in rng.integers(1000, size=3000)]})
    _, chance = encoded(few, pure)
    assert abs(np.corrcoef(chance[:, 0], pure[:, 0])[0, 1]) < 0.1  # a level's mean with the row itself has .3 and more
    with pytest.warns(OckhamWarning, match="'level' has levels that were not there .*new.* as the mean of all"):
        assert encoding.apply([np.array(["new", "l3"], dtype=object)], ["level"])[0, 0] == 0.0


def test_what_was_not_there_is_said():
    encoding, _ = encoded(pandas.DataFrame({"n": [1.0, 3.0], "c": ["a", "b"]}))
    with pytest.warns(OckhamWarning, match="'n' has 1 missing"):
        assert encoding.apply([np.array([np.nan]), np.array(["a"], dtype=object)], ["n", "c"])[0, 0] == 2.0
    with pytest.warns(OckhamWarning, match="not there when the model was fitted .z."):
        encoding.apply([np.array([1.0]), np.array(["z"], dtype=object)], ["n", "c"])
    with pytest.raises(OckhamError, match="'n' had numbers"):
        encoding.apply([np.array(["x"], dtype=object), np.array(["a"], dtype=object)], ["n", "c"])


def test_a_frame_with_everything_is_fitted_and_named():
    rng = np.random.default_rng(1)
    n = 200
    frame = pandas.DataFrame(
        {
            "a": rng.normal(size=n),
            "b": rng.choice(["x", "y", "z"], n),
            "c": rng.random(n) < 0.5,
            "m": np.where(rng.random(n) < 0.2, np.nan, rng.normal(size=n)),
        }
    )
    y = frame.a + 2.0 * (frame.b == "x") + 1.0 * frame.m.isna() + 0.3 * rng.normal(size=n)
    model = SparseBNNRegressor(**FAST).fit(frame, y)
    assert (model.inclusion_ > 0.5).tolist() == [True, True, False, True]
    assert len(model.inclusion_) == 4 and "b " in model.summary()
    assert model.score(frame, y) > 0.85
    objects = frame.astype(object).to_numpy()
    np.testing.assert_allclose(SparseBNNRegressor(**FAST).fit(objects, y).inclusion_, model.inclusion_, atol=0.02)
    with pytest.raises(ValueError, match="infinity in column 'a'"):
        SparseBNNRegressor(**FAST).fit(frame.assign(a=np.inf), y)


def test_missing_entries_and_sparse_matrices():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(150, 3))
    gone = rng.random(150) < 0.3
    y = np.where(gone, 2.0, x[:, 1]) + 0.1 * rng.normal(size=150)
    holes = x.copy()
    holes[gone, 1] = np.nan
    model = SparseBNNRegressor(**FAST).fit(holes, y)
    assert (model.inclusion_ > 0.5).tolist() == [False, True, False] and model.score(holes, y) > 0.97
    thin = sparse.random_array((150, 3), density=0.5, rng=rng, format="csr")
    target = thin.toarray() @ [1.0, 0.0, -1.0]
    one, other = (SparseBNNRegressor(**FAST).fit(t, target) for t in (thin, thin.toarray()))
    np.testing.assert_array_equal(one.predict(thin), other.predict(thin.toarray()))
    with pytest.raises(OckhamError, match="select columns first"):
        dense(sparse.csr_array((1_000_000, 1_000_000)))


@pytest.mark.parametrize(
    ("weight", "counts"),
    [
        (np.full(100, 0.01), 100.0),  # relative: Kish's number of equal weights is that of the rows
        (np.full(100, 1e4), 100.0),
        (np.repeat([1e-3, 3e-3], 50), 100 * 0.8),
        (np.repeat([1.0, 2.0], 50), None),  # repetitions
        (np.repeat([0.8, 1.4], 50), None),
        (np.repeat([0.0, 1.0], 50), None),
    ],
)
def test_what_weights_count_for(weight, counts):
    found, effective = counts_for(weight, None)
    assert effective == (None if counts is None else pytest.approx(counts))
    assert found.sum() == pytest.approx(weight.sum() if counts is None else counts)
    assert counts_for(weight, 30.0)[0].sum() == pytest.approx(30.0)


def test_weights_of_any_sum_give_the_model_of_their_ratios(table):
    x, y = table
    plain = SparseBNNClassifier(**FAST).fit(x, y > 0)
    for factor in (1 / 150, 1e4):
        with pytest.warns(OckhamWarning, match=r"150 rows.*n_effective"):
            model = SparseBNNClassifier(**FAST).fit(x, y > 0, sample_weight=np.full(150, factor))
        np.testing.assert_allclose(model.inclusion_, plain.inclusion_, atol=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        few = SparseBNNClassifier(**FAST, n_effective=4).fit(x, y > 0, sample_weight=np.full(150, 1e4))
    assert few.inclusion_.max() < 0.9 < plain.inclusion_.max()


def test_one_corrupt_target_is_named_and_switches_nothing_off(table):
    x, y = table
    wrong = y.copy()
    wrong[17] = 1000.0
    with pytest.warns(OckhamWarning, match=r"row 17 \(target 1000\)"):
        model = SparseBNNRegressor(**FAST).fit(x, wrong)
    assert (model.inclusion_ > 0.5).nonzero()[0].tolist() == [0, 3]
    assert np.sqrt(np.mean((model.predict(x) - 2 * x[:, 0] + x[:, 3]) ** 2)) < 0.15


def test_far_targets_are_few_and_far():
    y = np.linspace(-1, 1, 101)
    assert not outlying(y, np.ones(101)).any()
    y[[0, 50]] = 40.0
    assert outlying(y, np.ones(101)).nonzero()[0].tolist() == [0, 50]
    y[:10] = 40.0  # a tenth is no accident
    assert not outlying(y, np.ones(101)).any()
    assert not outlying(np.r_[np.zeros(90), np.ones(10)], np.ones(100)).any()  # no quartiles to speak of


def test_class_weights_move_the_threshold_and_not_the_evidence(table):
    x, y = table
    rare = y > 2.2
    plain, equal = (SparseBNNClassifier(**FAST, class_weight=w).fit(x, rare) for w in (None, "balanced"))
    assert equal.predict(x).mean() > plain.predict(x).mean()
    assert plain.predict_proba(x)[:, 1].mean() == pytest.approx(rare.mean(), abs=0.05)


def test_several_targets_are_fitted_side_by_side(table):
    x, y = table
    both = np.column_stack([y, x[:, 1] + 0.1 * np.random.default_rng(0).normal(size=len(x))])
    model = SparseBNNRegressor(**FAST).fit(x, both)
    assert [(row > 0.5).nonzero()[0].tolist() for row in model.inclusion_by_target_] == [[0, 3], [1]]
    assert (model.inclusion_ > 0.5).nonzero()[0].tolist() == [0, 1, 3]
    mean, std = model.predict(x, return_std=True)
    lower, upper = model.predict_interval(x, 0.9)
    assert mean.shape == std.shape == lower.shape == upper.shape == (150, 2) and model.score(x, both) > 0.95
    one = model.estimators_[0].log_density(x, both[:, 0]) + model.estimators_[1].log_density(x, both[:, 1])
    np.testing.assert_allclose(model.log_density(x, both), one)
    assert "target 1" in model.summary()


DAYS = [datetime.date(2020, 1, 1 + i) for i in range(4)]


@pytest.mark.parametrize(
    "values",
    [
        DAYS,
        [datetime.datetime(2020, 1, 1 + i, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=2))) for i in range(4)],
        pandas.period_range("2020-01-01", periods=4, freq="D"),
        pandas.date_range("2020-01-01", periods=4, tz="Europe/London"),
        pandas.Series(pandas.date_range("2020-01-01", periods=4)).astype("timestamp[ns][pyarrow]"),
        pandas.Series(DAYS).astype("date32[pyarrow]"),
    ],
)
def test_times_of_any_make_are_days(values):
    (found,) = columns_of(pandas.DataFrame({"when": values}))
    assert found.tolist() == [18262.0, 18263.0, 18264.0, 18265.0]


def test_a_missing_time_is_missing():
    (found,) = columns_of(pandas.DataFrame({"when": [None, *DAYS[:2], None]}))
    assert np.isnan(found).tolist() == [True, False, False, True] and found[1] == 18262.0


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        (pandas.cut([0.5, 1.5, 0.5, np.nan], [0, 1, 2]), ["(0, 1]", "(1, 2]", "(0, 1]", None]),
        (pandas.arrays.IntervalArray.from_breaks([0, 1, 2]), ["(0, 1]", "(1, 2]"]),
        (pandas.Categorical([3, 4, 3]), ["3", "4", "3"]),
        (pandas.Categorical([3, None, 4]), ["3", None, "4"]),
        ([1, "a", None], ["1", "a", None]),
        (
            pandas.Series(["a", None]).astype(pandas.ArrowDtype(pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))),
            ["a", None],
        ),
    ],
)
def test_levels_of_any_make(values, levels):
    (found,) = columns_of(pandas.DataFrame({"kind": values}))
    assert found.tolist() == levels


@pytest.mark.parametrize("values", [[[1], [2]], ["a", [2]], [1j, 2j], [{}, {}], [10**400, 1]])
def test_a_column_of_anything_else_is_named(values):
    with pytest.raises(OckhamError, match=r"column 'odd' of type .* neither numbers nor .*leave it out"):
        columns_of(pandas.DataFrame({"odd": values}))


def test_two_columns_of_one_name_are_refused():
    with pytest.raises(OckhamError, match="several columns are called 'a': rename"):
        columns_of(pandas.DataFrame(np.zeros((2, 3)), columns=["b", "a", "a"]))
