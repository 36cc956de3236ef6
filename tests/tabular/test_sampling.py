"""Survivors are the network; draws of them are from their joint posterior."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from ockham.tabular.curvature import gauss_newton, of_classes
from ockham.tabular.draws import factorised
from ockham.tabular.joint import ClassJoint, NoiseJoint
from ockham.tabular.noise import Noise
from ockham.tabular.running import Table
from ockham.tabular.survivors import Survivors
from ockham.tabular.trimming import without_input
from scipy import stats

from ockham.core.posterior import Gaussian, Posterior
from ockham.tabular import SparseBNNClassifier, SparseBNNRegressor, fitting
from ockham.tabular.network import Layout, mean_output


def posterior_of(layout, seed, keep_share, *, only=None, prior=2.0):
    g = torch.Generator().manual_seed(seed)
    moments = {}
    for name, shape in layout.shapes.items():
        keep = torch.rand(1, *shape, generator=g) < (keep_share if only is None or name in only else 0.0)
        mean = torch.randn(1, *shape, generator=g) * keep
        precision = torch.where(keep, 50.0, torch.inf)
        moments[name] = Gaussian(mean, precision, torch.tensor(prior), torch.zeros(()), keep, inclusion=0.9 * keep)
    return Posterior(moments, 100)


@pytest.mark.parametrize("hidden", [(6,), (6, 5), ()])
def test_the_compact_network_is_the_network(hidden):
    layout = Layout.of(4, hidden, 2)
    posterior = without_input(posterior_of(layout, 0, 0.4), 3)
    survivors = Survivors.of(posterior)
    assert not hidden or survivors.shapes["out.weight"][1] < hidden[-1]  # a unit is dead
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = mean_output({n: g.mean.double() for n, g in posterior.items()}, x)[0]
    torch.testing.assert_close(survivors.outputs(survivors.mean, x), whole)
    assert len(survivors) == posterior.kept()
    step = 1e-6 * torch.eye(len(survivors), dtype=torch.float64)
    ends = [torch.stack([survivors.outputs(survivors.mean + s * e, x) for e in step], 2) for s in (1, -1)]
    torch.testing.assert_close(survivors.gradients(survivors.mean, x), (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-7)


def test_factorised_draws_are_those_of_the_posterior():
    posterior = posterior_of(Layout.of(3, (4,), 1), 2, 0.6)
    survivors = Survivors.of(posterior)
    drawn = survivors.drawn(posterior, 4000, torch.Generator().manual_seed(0))
    expected = 0.9 * survivors.mean
    assert (drawn.mean(0) - expected).abs().max() < 0.06
    assert float((drawn == 0).double().mean()) == pytest.approx(0.1, abs=0.01)  # the spike


def test_a_linear_regression_with_known_answer():
    """Without hidden layers, with next to Gaussian noise of known size, the posterior of the weights is conjugate."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(400, 3, generator=g, dtype=torch.float64)
    x[:, 2] = x[:, 1] + 0.15 * x[:, 2]  # what a factorised posterior cannot see
    y = x @ torch.tensor([1.0, 0.5, -0.3], dtype=torch.float64) + 0.2
    y = y + 0.3 * torch.randn(400, generator=g, dtype=torch.float64)
    mean = posterior_of(Layout.of(3, (), 1), 6, 1.0)
    nothing = posterior_of(Layout.of(3, (2,), 1), 7, 0.0)
    noise = Noise(nothing, nothing, base=float(np.log(0.3)), log_freedom=5.0, centre=-1.0, floor=-6.0)
    joint = NoiseJoint(mean, noise, Table(x, y, torch.ones(400)))
    mode = joint.mode()
    assert joint.energy(mode) < joint.energy(joint.start)
    draws = joint.sample(100, torch.Generator().manual_seed(8))
    assert draws.acceptance is not None and draws.acceptance > 0.6
    design = torch.cat([x, torch.ones(400, 1, dtype=torch.float64)], 1)
    precision = design.T @ design / 0.3**2 + 2.0 * torch.eye(4, dtype=torch.float64)
    covariance = torch.linalg.inv(precision)
    centre = covariance @ design.T @ y / 0.3**2
    torch.testing.assert_close(mode[:3], centre[:3], rtol=0.02, atol=0.02)
    assert float(joint.precision(mode).mean()) == pytest.approx(1 / 0.3**2, rel=0.15)
    got = torch.cat([draws.network["out.weight"][:, 0], draws.network["out.bias"]], 1)
    scale = covariance.diagonal().sqrt()
    assert ((got.mean(0) - centre) / scale).abs().max() < 0.35
    assert ((got.T.cov() - covariance) / torch.outer(scale, scale)).abs().max() < 0.4
    assert float(covariance[1, 2] / scale[1] / scale[2]) < -0.9  # and the correlation is there to be missed
    assert float(draws.scales.base.exp().mean()) == pytest.approx(0.3, rel=0.1)


def test_weights_of_rows_are_repetitions():
    g = torch.Generator().manual_seed(9)
    x, y = torch.randn(60, 2, generator=g), (torch.rand(60, generator=g) < 0.5).long()
    posterior = posterior_of(Layout.of(2, (3,), 1), 10, 0.8)
    weight = torch.randint(1, 3, (60,), generator=g)
    again = Table(x.repeat_interleave(weight, 0), y.repeat_interleave(weight), torch.ones(int(weight.sum())))
    once, twice = ClassJoint(posterior, Table(x, y, weight.float())), ClassJoint(posterior, again)
    for vector in (once.start, -0.5 * once.start):
        torch.testing.assert_close(once.energy(vector), twice.energy(vector))
        torch.testing.assert_close(once.metric(vector), twice.metric(vector))
    torch.testing.assert_close(once.energy(once.mode()), once.energy(twice.mode()), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("of_mean", "of_noise"), [(0.0, 1.0), (1.0, 0.0)])
def test_one_of_the_two_networks_may_be_empty(of_mean, of_noise):
    layout = Layout.of(2, (3,), 1)
    g = torch.Generator().manual_seed(11)
    table = Table(torch.randn(50, 2, generator=g), torch.randn(50, generator=g), torch.ones(50))
    noise = posterior_of(layout, 12, of_noise)
    joint = NoiseJoint(posterior_of(layout, 11, of_mean), Noise(noise, noise, 0.0, 2.0, 0.0, -5.0), table)
    draws = joint.sample(4, g)
    location, scale, freedom = next(draws.with_scales(torch.zeros(5, 2, dtype=torch.float64)))
    assert location.shape == scale.shape == (4, 5) and freedom.shape == (4, 1)


def test_the_metric_is_the_curvature_that_data_of_the_model_have():
    """Mean of the Hessian, by autograd, over targets drawn from the model; without hidden layers."""
    g, rows, draws = torch.Generator().manual_seed(14), 2000, 20
    layout = Layout.of(2, (), 1)
    mean, scale = posterior_of(layout, 15, 1.0), posterior_of(layout, 16, 1.0)
    noise = Noise(scale, scale, base=-0.5, log_freedom=1.5, centre=-0.5, floor=-4.0)
    x = 0.2 * torch.randn(rows, 2, generator=g, dtype=torch.float64)
    joint = NoiseJoint(mean, noise, Table(x, torch.zeros(rows), torch.ones(rows)))
    location, spread, freedom = next(joint.networks(joint.start.unsqueeze(0), 1.0).with_scales(x))
    errors = stats.t.rvs(float(freedom), size=(draws, rows), random_state=0)
    hessian = torch.zeros_like(joint.metric(joint.start))
    for e in errors:
        y = location[0] + spread[0] * torch.from_numpy(e)
        drawn = NoiseJoint(mean, noise, Table(x, y, torch.ones(rows)))
        hessian += torch.autograd.functional.hessian(drawn.energy, joint.start) / draws
    metric = joint.metric(joint.start)
    size = metric.diagonal().sqrt()
    relative = (hessian - metric) / torch.outer(size, size)
    d = mean.kept()
    assert relative[:d, :d].abs().max() < 0.03 and relative[d:-1, d:-1].abs().max() < 0.03
    assert abs(float(relative[-1, -1])) < 0.1


def test_an_input_goes_with_what_only_it_feeds():
    layout = Layout.of(3, (2,), 1)
    posterior = posterior_of(layout, 17, 1.0)
    keep = posterior["hidden.0.weight"].keep.clone()
    keep[0, 0] = torch.tensor([False, True, False])  # the first unit reads the second input only, and has no bias
    bias = torch.tensor([[False, True]])
    moments = dict(posterior) | {
        "hidden.0.weight": replace(posterior["hidden.0.weight"], keep=keep),
        "hidden.0.bias": replace(posterior["hidden.0.bias"], keep=bias),
    }
    left = without_input(replace(posterior, moments=moments), 1)
    assert not left["skip.weight"].keep[0, 0, 1] and not left["hidden.0.weight"].keep[0, :, 1].any()
    assert left["out.weight"].keep[0, 0].tolist() == [False, True]
    assert (left["out.weight"].mean[~left["out.weight"].keep] == 0).all()


def test_moved_puts_a_vector_where_it_came_from():
    posterior = posterior_of(Layout.of(3, (4,), 1), 18, 0.5)
    survivors = Survivors.of(posterior)
    vector = torch.arange(1.0, len(survivors) + 1, dtype=torch.float64)
    again = Survivors.of(survivors.moved(posterior, vector))
    torch.testing.assert_close(again.mean, vector)


def test_many_rows_are_drawn_weight_by_weight(monkeypatch):
    monkeypatch.setattr(fitting, "_MOST_WORK", 1000)
    x = np.random.default_rng(0).normal(size=(500, 2))
    model = SparseBNNRegressor(max_iter=60, n_restarts=1, hidden_layer_sizes=(4,), n_draws=4, random_state=0)
    assert model.fit(x, x[:, 0]).acceptance_ is None
    assert np.isfinite(model.log_density(x, x[:, 0])).all()
    posterior = posterior_of(Layout.of(2, (3,), 1), 19, 1.0)
    assert factorised(posterior, None, 3, torch.Generator()).acceptance is None


def test_curvature_against_autograd():
    g = torch.Generator().manual_seed(12)
    label = torch.tensor(0)
    for classes in (1, 3):
        logits = torch.randn(4, classes, generator=g, dtype=torch.float64)
        for row, got in zip(logits, of_classes(logits), strict=True):

            def nll(z):
                z = torch.cat([z.new_zeros(1), z]) if len(z) == 1 else z
                return torch.nn.functional.cross_entropy(z, label)

            torch.testing.assert_close(got, torch.autograd.functional.hessian(nll, row))
    j = torch.randn(4, 2, 5, generator=g, dtype=torch.float64)
    lam = torch.eye(2, dtype=torch.float64).repeat(4, 1, 1) * 3
    weight = torch.tensor([1.0, 2.0, 0.0, 1.0], dtype=torch.float64)
    expected = sum(w * 3 * a.T @ a for w, a in zip(weight, j, strict=True))
    torch.testing.assert_close(gauss_newton(j, lam, weight), expected)


def test_classes_are_sampled_too():
    rng = np.random.default_rng(13)
    x = rng.normal(size=(200, 3))
    y = (x[:, 0] + 0.5 * rng.logistic(size=200) > 0).astype(int)
    model = SparseBNNClassifier(max_iter=600, n_restarts=2, hidden_layer_sizes=(8,), n_draws=24, random_state=0)
    assert model.fit(x, y).acceptance_ > 0.6
    new = rng.normal(size=(4000, 3))
    truth = 1 / (1 + np.exp(-new[:, 0] / 0.5))
    assert np.abs(model.predict_proba(new)[:, 1] - truth).mean() < 0.08
