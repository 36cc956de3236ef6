"""Measures against torchmetrics, scikit-learn, scipy, quadrature and hand-computed cases."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats
import sklearn.metrics
import torch
import torchmetrics.functional as tm

from ockham.errors import DataError
from ockham.run import measure

PROBABILITY_MEASURES = (measure.accuracy, measure.brier, measure.ece, measure.ece_equal_mass)


def classifier(n=700, classes=5, seed=0, sharpness=1.5):
    g = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(n, classes, generator=g)
    labels = torch.where(torch.rand(n, generator=g) < 0.5, logits.argmax(1), torch.randint(classes, (n,), generator=g))
    return logits.log_softmax(1), labels


def regressor(draws=4, n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    means, target = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((draws, n), (n,)))
    return means, target, 0.1 + torch.rand(draws, n, generator=g, dtype=torch.float64)


def mixture_cdf(x, means, variance):
    return scipy.stats.norm.cdf(x, np.asarray(means), np.sqrt(np.asarray(variance))).mean()


@pytest.mark.parametrize("classes", [2, 5, 40])
def test_classification_against_torchmetrics_and_sklearn(classes):
    logp, labels = classifier(classes=classes)
    p, kw = logp.double().exp(), {"task": "multiclass", "num_classes": classes}
    expected_ece = tm.calibration_error(p, labels, n_bins=15, norm="l1", **kw)
    rows = p / p.sum(1, keepdim=True)
    assert measure.accuracy(p, labels) == pytest.approx(float((p.argmax(1) == labels).double().mean()), abs=1e-12)
    assert measure.accuracy(p, labels) == pytest.approx(float(tm.accuracy(p, labels, average="micro", **kw)), abs=1e-6)
    assert measure.ece(p, labels) == pytest.approx(float(expected_ece), abs=1e-6)  # float32 there
    assert measure.nll(logp, labels) == pytest.approx(
        sklearn.metrics.log_loss(labels, rows.numpy(), labels=range(classes)), rel=1e-6
    )
    brier = sklearn.metrics.brier_score_loss(labels, rows.numpy(), labels=range(classes), scale_by_half=False)
    assert measure.brier(p, labels) == pytest.approx(brier, rel=1e-6)


def test_hand_computed_classification():
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 1])
    assert measure.accuracy(p, labels) == 0.5
    assert measure.nll(p.log(), labels) == pytest.approx(-(math.log(0.9 * 0.4 * 0.8 * 0.5)) / 4)
    assert measure.brier(p, labels) == pytest.approx((0.02 + 0.72 + 0.08 + 0.5) / 4)
    # two bins: (0, .5] holds one example of confidence .5, wrong; (.5, 1] holds .9 right, .6 wrong, .8 right
    assert measure.ece(p, labels, bins=2) == pytest.approx((0.5 + 3 * abs(2 / 3 - 2.3 / 3)) / 4)
    # equal mass: {.5 wrong, .6 wrong}, {.8 right, .9 right}
    assert measure.ece_equal_mass(p, labels, bins=2) == pytest.approx((0.55 + 0.15) / 2)
    assert measure.ece_equal_mass(p, labels, bins=1) == pytest.approx(abs(0.5 - 0.7))


def test_perfect_and_impossible_predictions():
    p, labels = torch.eye(3), torch.arange(3)
    for m in (measure.brier, measure.ece, measure.ece_equal_mass):
        assert m(p, labels) == 0.0
    assert measure.accuracy(p, labels) == 1.0
    assert measure.nll(p.log(), labels) == 0.0
    assert measure.nll(p.log(), labels.roll(1)) == math.inf
    assert measure.brier(p, labels.roll(1)) == 2.0
    assert measure.ece(p, labels.roll(1)) == 1.0


def test_reliability_data():
    logp, labels = classifier()
    p = logp.double().exp()
    r = measure.reliability(p, labels, bins=20)
    assert r.edges.tolist() == pytest.approx(np.linspace(0, 1, 21).tolist())
    assert int(r.count.sum()) == 700
    assert float((r.accuracy.nan_to_num() * r.count).sum() / 700) == pytest.approx(measure.accuracy(p, labels))
    filled, c = r.count > 0, r.confidence
    assert bool(((c > r.edges[:-1]) & (c <= r.edges[1:]))[filled].all())
    assert bool(r.accuracy[~filled].isnan().all()) and int((~filled).sum()) >= 4  # below 1 / classes nothing


def test_equal_mass_bins_are_equal_and_rise():
    logp, labels = classifier(n=700)
    p = logp.double().exp()
    r = measure.reliability_equal_mass(p, labels, bins=15)
    assert set(r.count.tolist()) == {46, 47}
    top = p.max(1).values.sort().values
    assert r.edges[0] == top[0] and r.edges[-1] == top[-1] and bool((r.edges.diff() > 0).all())
    assert bool((r.confidence >= r.edges[:-1]).all() and (r.confidence <= r.edges[1:]).all())
    parts = np.array_split(np.arange(700), 15)  # numpy's parts differ in where the longer bins sit
    right = (p.argmax(1) == labels).double()[p.max(1).values.argsort()]
    numpy_ece = sum(len(i) / 700 * abs(float(top[i].mean() - right[i].mean())) for i in parts)
    assert r.ece == pytest.approx(numpy_ece, abs=0.01)


def test_fewer_examples_than_bins():
    logp, labels = classifier(n=3)
    r = measure.reliability_equal_mass(logp.exp(), labels, bins=15)
    right, top = (logp.argmax(1) == labels).double(), logp.double().exp().max(1).values
    assert int(r.count.sum()) == 3 and r.ece == pytest.approx(float((right - top).abs().mean()), abs=1e-6)


@pytest.mark.parametrize("measured", PROBABILITY_MEASURES)
def test_order_of_the_data_does_not_matter(measured):
    logp, labels = classifier(sharpness=3)
    p = ((logp.double().exp() * 4).round() + 1e-3).to(torch.float64)  # many ties
    p = p / p.sum(1, keepdim=True)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(1))
    assert measured(p[order], labels[order]) == pytest.approx(measured(p, labels), abs=1e-12)


def test_sequences_are_flattened():
    logp, labels = classifier(n=700, classes=4)
    as_sequence = logp.reshape(7, 10, 10, 4).movedim(-1, 1)
    flat = measure.classification_summary(logp, labels)
    assert measure.classification_summary(as_sequence, labels.reshape(7, 10, 10)).to_dict() == pytest.approx(
        flat.to_dict()
    )


def test_classification_summary_is_its_parts_and_json():
    logp, labels = classifier()
    p = logp.double().softmax(1)
    got = measure.classification_summary(logp, labels).to_dict()
    parts = {m.__name__: m(p, labels) for m in PROBABILITY_MEASURES} | {"nll": measure.nll(logp, labels)}
    assert got == pytest.approx(parts)
    assert json.loads(json.dumps(got)) == got and all(type(v) is float for v in got.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_gradients_are_accepted(dtype):
    logp, labels = classifier(classes=40)
    half = logp.to(dtype).requires_grad_()
    assert measure.classification_summary(half, labels).nll == pytest.approx(measure.nll(logp, labels), rel=0.01)
    assert measure.ece(half.exp(), labels) == pytest.approx(measure.ece(logp.exp(), labels), abs=0.02)


def test_auroc():
    g = torch.Generator().manual_seed(0)
    inside = torch.randn(300, generator=g).mul(4).round()  # ties
    outside = torch.randn(200, generator=g).add(0.5).mul(4).round()
    truth = torch.cat([torch.zeros(300), torch.ones(200)]).long()
    scores = torch.cat([inside, outside])
    got = measure.auroc(inside, outside)
    assert got == pytest.approx(sklearn.metrics.roc_auc_score(truth, scores.numpy()), abs=1e-12)
    squashed = torch.sigmoid(scores.double() / 10)  # torchmetrics expects probabilities
    assert got == pytest.approx(float(tm.auroc(squashed, truth, task="binary")), abs=1e-6)
    assert measure.auroc(outside, inside) == pytest.approx(1 - got, abs=1e-12)
    assert measure.auroc(torch.zeros(3), torch.tensor([1.0, math.inf])) == 1.0
    assert measure.auroc(torch.ones(3), torch.ones(7)) == 0.5


def test_rmse_and_gaussian_nll():
    means, target, variance = regressor()
    assert measure.rmse(means[0], target) == pytest.approx(math.sqrt(((means[0] - target) ** 2).mean()))
    log_density = scipy.stats.norm.logpdf(target.numpy(), means[0].numpy(), variance[0].sqrt().numpy())
    assert measure.gaussian_nll(means[0], target, variance=variance[0]) == pytest.approx(-log_density.mean())
    density = scipy.stats.norm.pdf(target.numpy(), means.numpy(), variance.sqrt().numpy()).mean(0)
    assert measure.mixture_nll(means, target, variance=variance) == pytest.approx(-np.log(density).mean())


def test_mixture_nll_far_away_does_not_underflow():
    got = measure.mixture_nll(torch.zeros(3, 1), torch.full((1,), 1e4), variance=1.0)
    assert got == pytest.approx(0.5e8 + 0.5 * math.log(2 * math.pi))


def test_crps_of_a_mixture_is_the_integral():
    means, target, variance = regressor(draws=3, n=4)
    total = 0.0
    for i, y in enumerate(target.tolist()):
        cdf = lambda x, m=means[:, i], v=variance[:, i]: mixture_cdf(x, m, v)  # noqa: E731
        total += scipy.integrate.quad(lambda x, f=cdf: f(x) ** 2, -15, y)[0]
        total += scipy.integrate.quad(lambda x, f=cdf: (1 - f(x)) ** 2, y, 15)[0]
    assert measure.crps_mixture(means, target, variance=variance) == pytest.approx(total / 4, rel=1e-7)


def test_crps_of_draws_against_torchmetrics():
    means, target, _ = regressor(draws=9, n=20)
    expected = tm.regression.continuous_ranked_probability_score(means.T, target)
    assert measure.crps_mixture(means, target, variance=0.0) == pytest.approx(float(expected), rel=1e-9)
    assert measure.crps_mixture(target[None], target, variance=0.0) == 0.0


def test_crps_of_one_gaussian_closed_form():
    means, target, variance = regressor()
    s = variance[0].sqrt()
    z = ((target - means[0]) / s).numpy()
    closed = s.numpy() * (z * (2 * scipy.stats.norm.cdf(z) - 1) + 2 * scipy.stats.norm.pdf(z) - 1 / math.sqrt(math.pi))
    assert measure.crps_gaussian(means[0], target, variance=variance[0]) == pytest.approx(closed.mean())


def test_interval_coverage_of_one_gaussian():
    target = torch.tensor([0.0, 1.6, 1.7, -1.6, -1.7, 5.0])
    assert measure.interval_coverage(torch.zeros(1, 6), target, variance=1.0, level=0.9) == pytest.approx(3 / 6)


def test_interval_coverage_uses_quantiles_of_the_mixture():
    means, variance = torch.tensor([[-2.0], [3.0]]), 0.25
    half = scipy.optimize.brentq(lambda x: mixture_cdf(x, np.array([-2.0, 3.0]), 0.25) - 0.75, -9, 9)
    for offset, expected in ((-0.01, 1.0), (0.01, 0.0)):
        target = torch.tensor([half + offset])
        assert measure.interval_coverage(means, target, variance=variance, level=0.5) == expected


def test_interval_coverage_of_draws_alone():
    draws = torch.arange(1, 101, dtype=torch.float64)[:, None].expand(100, 4)
    target = torch.tensor([0.0, 50.0, 99.9, 6.0], dtype=torch.float64)
    assert measure.interval_coverage(draws, target, variance=0.0, level=0.9) == 0.5


def test_calibrated_mixture_covers_its_level():
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(20_000, generator=g)
    target = mean + 2 * torch.randn(20_000, generator=g)
    got = measure.regression_summary(mean[None].expand(3, -1), target, noise_variance=4.0).to_dict()
    expected = {"rmse": 2.0, "nll": 0.5 * math.log(2 * math.pi * math.e * 4), "crps": 2 / math.sqrt(math.pi)}
    assert got == pytest.approx(expected | {f"coverage_{c}": c / 100 for c in (50, 90, 95)}, abs=0.03)
    assert json.loads(json.dumps(got)) == got


def test_regression_summary_is_its_parts_for_several_outputs():
    means, target, variance = regressor(n=6)
    flat = measure.regression_summary(means, target, noise_variance=variance)
    folded = measure.regression_summary(
        means.reshape(4, 3, 2), target.reshape(3, 2), noise_variance=variance.reshape(4, 3, 2)
    )
    assert folded == flat
    assert flat.rmse == pytest.approx(measure.rmse(means.mean(0), target))
    assert flat.nll == measure.mixture_nll(means, target, variance=variance)
    assert flat.crps == measure.crps_mixture(means, target, variance=variance)
    assert flat.coverage_95 == measure.interval_coverage(means, target, variance=variance, level=0.95)


def test_jaccard():
    a = {"w": torch.tensor([[True, True], [False, False]]), "b": torch.tensor([True])}
    b = {"w": torch.tensor([[True, False], [True, False]]), "b": torch.tensor([True])}
    assert measure.jaccard(a, b) == measure.jaccard(b, a) == 0.5
    assert measure.jaccard(a, a) == 1.0
    nothing = {k: torch.zeros_like(v) for k, v in a.items()}
    assert measure.jaccard(nothing, nothing) == 1.0 and measure.jaccard(a, nothing) == 0.0


THREE = torch.full((2, 3), 1 / 3)
MISTAKES = {
    "label too large": (lambda: measure.accuracy(THREE, torch.tensor([0, 3])), r"0 to 3.*3 classes \(0\.\.2\)"),
    "padding label": (lambda: measure.nll(THREE.log(), torch.tensor([0, -100])), "padding"),
    "float labels": (lambda: measure.ece(THREE, torch.zeros(2)), "integers"),
    "one-hot labels": (lambda: measure.brier(THREE, torch.zeros(2, 3).long()), "not one-hot"),
    "column labels": (lambda: measure.accuracy(THREE, torch.zeros(2, 1).long()), r"\(2, 1\)"),
    "no class dimension": (lambda: measure.accuracy(torch.zeros(2), torch.zeros(2).long()), "do not fit"),
    "integer predictions": (lambda: measure.accuracy(THREE.long(), torch.zeros(2).long()), "floating point"),
    "empty": (lambda: measure.accuracy(torch.zeros(0, 3), torch.zeros(0).long()), "empty"),
    "NaN": (lambda: measure.brier(THREE * math.nan, torch.zeros(2).long()), "6 of 6 values are NaN"),
    "logits": (lambda: measure.nll(2 * torch.eye(3)[:2], torch.zeros(2).long()), "log_softmax"),
    "unnormalised": (lambda: measure.ece(THREE * 2, torch.zeros(2).long()), "probability 2"),
    "negative": (lambda: measure.ece_equal_mass(THREE - 1, torch.zeros(2).long()), "negative"),
    "no bins": (lambda: measure.reliability(THREE, torch.zeros(2).long(), bins=0), "at least 1"),
    "impossible row": (lambda: measure.classification_summary(THREE - math.inf, torch.zeros(2).long()), "normalised"),
    "no scores": (lambda: measure.auroc(torch.ones(3), torch.ones(0)), "scores_out is empty"),
    "column target": (lambda: measure.rmse(torch.zeros(4), torch.zeros(4, 1)), "nothing is broadcast"),
    "draws missing": (lambda: measure.crps_mixture(torch.zeros(4), torch.zeros(4), variance=1.0), "do not fit"),
    "negative variance": (lambda: measure.gaussian_nll(torch.zeros(4), torch.zeros(4), variance=-1.0), "log-variance"),
    "zero variance": (lambda: measure.gaussian_nll(torch.zeros(4), torch.zeros(4), variance=0.0), "positive"),
    "shape of variance": (
        lambda: measure.gaussian_nll(torch.zeros(4), torch.zeros(4), variance=torch.ones(4, 1)), "does not broadcast",
    ),
    "infinite mean": (lambda: measure.rmse(torch.full((4,), math.inf), torch.zeros(4)), "infinite"),
    "level": (
        lambda: measure.interval_coverage(torch.zeros(1, 4), torch.zeros(4), variance=1.0, level=90), "between 0 and 1",
    ),
    "other names": (lambda: measure.jaccard({"a": THREE > 0}, {"b": THREE > 0}), "different parameters"),
    "float mask": (lambda: measure.jaccard({"a": THREE}, {"a": THREE > 0}), "booleans"),
    "no masks": (lambda: measure.jaccard({}, {}), "empty"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(DataError, match=message):
        call()


@pytest.mark.parametrize("sharpness", [0.2, 1.5, 30.0])
def test_the_temperature_of_least_nll(sharpness):
    logs, labels = classifier(sharpness=sharpness)
    found = measure.fit_temperature(logs, labels)
    want = scipy.optimize.minimize_scalar(
        lambda t: measure.nll((logs.double() / math.exp(t)).log_softmax(1), labels), bounds=(-4, 4), method="bounded",
        options={"xatol": 1e-9},
    )  # fmt: skip
    assert math.log(found) == pytest.approx(want.x, abs=1e-5)
    calibrated = measure.tempered(lambda x: logs.double(), found)(None)
    assert measure.nll(calibrated, labels) == pytest.approx(want.fun, rel=1e-12)
    assert torch.equal(calibrated.argmax(1), logs.argmax(1))
    assert measure.fit_temperature(logs * 0.5, labels) == pytest.approx(0.5 * found)  # units of the logits


def test_the_temperature_of_a_classifier_that_is_never_wrong_has_a_bound():
    logs = torch.tensor([[0.0, -1.0], [-1.0, 0.0]]).log_softmax(1)
    assert measure.fit_temperature(logs, torch.tensor([0, 1])) == pytest.approx(0.01)
    assert measure.fit_temperature(logs, torch.tensor([1, 0])) == pytest.approx(100.0)
