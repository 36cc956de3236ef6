"""Effects against the function that made the data; a page that holds what it should, opened in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess

import matplotlib
import numpy as np
import pytest

from ockham.errors import OckhamError
from ockham.tabular import SparseBNNClassifier, SparseBNNRegressor

pandas = pytest.importorskip("pandas")
FAST = {"max_iter": 300, "n_restarts": 1, "hidden_layer_sizes": (8,), "n_draws": 16, "random_state": 0}


@pytest.fixture(scope="module")
def frame():
    rng = np.random.default_rng(0)
    n = 300
    table = pandas.DataFrame(
        {
            "slope": rng.normal(size=n),
            "kind": rng.choice(["p", "q", "r"], n),
            "holes": np.where(rng.random(n) < 0.2, np.nan, rng.normal(size=n)),
            "noise": rng.normal(size=n),
            "same": 1.0,
        }
    )
    spread = 0.2 * np.exp(0.7 * table.noise)
    return table, 2 * table.slope * (table["kind"] == "p") + 1.5 * table.holes.isna() + spread * rng.normal(size=n)


@pytest.fixture(scope="module")
def model(frame):
    return SparseBNNRegressor(**FAST).fit(*frame)


def test_effects_are_those_of_the_function(frame, model):
    table, _ = frame
    slope = model.effect("slope")
    share = float((table["kind"] == "p").mean())
    rise = np.polyfit(slope.values, slope.mean, 1)[0]
    assert rise == pytest.approx(2 * share, rel=0.2)
    assert (slope.lower <= slope.mean).all() and (slope.mean <= slope.upper).all()
    kind = model.effect("kind")
    assert sorted(kind.values) == ["p", "q", "r"] and len(kind.mean) == 3
    holes = model.effect(2)
    assert np.isnan(holes.values[-1]) and holes.mean[-1] - holes.mean[:-1].mean() == pytest.approx(1.5, abs=0.3)
    with pytest.raises(OckhamError, match="no feature 'other'; there are slope"):
        model.effect("other")


def test_the_page_says_it_all(frame, model, tmp_path):
    table, y = frame
    path = model.report(tmp_path / "table.html", table, y)
    text = path.read_text()
    for wanted in (
        "Which inputs",
        "Calibration on held-out rows",
        "Effects",
        "The strongest pair",
        "Where the noise grows",
        "it is constant",
        "95 %",
    ):
        assert wanted in text
    assert len(re.findall("<svg", text)) >= 5 and "kind" in text
    assert "No held-out rows" in model.report(tmp_path / "short.html").read_text()
    with pytest.raises(OckhamError, match="does not exist"):
        model.report(tmp_path / "nowhere" / "table.html")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        return
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.count("<svg") == text.count("<svg") and "What was left out" in done.stdout


def test_classifiers_have_pages_and_plots(frame, tmp_path):
    table, y = frame
    model = SparseBNNClassifier(**FAST).fit(table, np.where(y > 0.5, "high", "low"))
    assert (
        "probability of low" in model.report(tmp_path / "c.html", table, np.where(y > 0.5, "high", "low")).read_text()
    )
    matplotlib.use("Agg")
    axes = np.atleast_1d(model.plot_effects(top=2))
    assert 1 <= len(axes) <= 2 and axes[0].lines
    matplotlib.pyplot.close("all")


def test_a_selector_as_scikit_learn_has_them(frame, model):
    table, _ = frame
    used = table.columns[model.inclusion_ > 0.5].tolist()
    assert model.get_feature_names_out().tolist() == used
    assert model.get_support().tolist() == (model.inclusion_ > 0.5).tolist()
    chosen = model.set_output(transform="pandas").transform(table)
    assert chosen.columns.tolist() == used
    assert "SparseBNNRegressor" in model._repr_html_()
