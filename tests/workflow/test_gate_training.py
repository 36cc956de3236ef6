"""Training with gates: what is removed goes for good, resumed is never stopped, presets weigh what they say."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import ockham
from ockham.core.likelihood import Classification
from ockham.errors import OckhamError
from ockham.methods.gates import lognormal
from ockham.methods.gates.attach import GATE_RULES, Gates
from ockham.methods.gates.report import compression_curve, gated_without, parameters_left
from ockham.methods.gates.rules import bmrs_n, bmrs_n_printed, bmrs_u, by_norm, by_taylor, snr_below
from ockham.methods.gates.training import (
    GateCompression,
    GateTraining,
    ParametersLeft,
    Tempered,
    gate_sensitivity,
    mean_mean,
    true_elbo,
)
from ockham.run.job import Batches
from ockham.run.measure import mean_predictor, measures
from ockham.surgery import Plan, shrink
from ockham.zoo.data import digits

QUICK = {"epochs": 12, "fine_tune": 2, "learning_rate": 5e-3, "gate_rate": 20.0}


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 10))


def loader():
    data = digits()
    return Batches(data.train_x[:600], data.train_y[:600], 50, shuffle=True)


def job(seed=0, *, rule=bmrs_n, decide=None, **settings):
    torch.manual_seed(seed)
    given = {"decide": decide} if decide is not None else {}
    training = GateTraining(**{**QUICK, **settings})
    return GateCompression(network(), torch.zeros(2, 1, 8, 8), loader(), training=training, rule=rule, **given)


def accuracy(model):
    data = digits()
    predictor = mean_predictor(model, likelihood="classification")
    return measures(predictor, data.test_x, data.test_y, noise_variance=None)["accuracy"]


def size(model):
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def finished():
    run = job(epochs=40, kl_weight=Tempered(5.0))
    list(run)
    return run


def test_the_network_shrinks_on_the_way_and_still_works(finished):
    sizes = [h.parameters for h in finished.history]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.5 * size(network())
    small = finished.result()
    assert size(small) == sizes[-1] and not any("ockham" in n for n in small.state_dict())
    assert [small[1].out_features, small[3].out_features] == list(finished.history[-1].widths.values())
    assert accuracy(small) > 0.85


def test_the_plans_rebuild_the_small_network_from_a_fresh_one(finished):
    fresh = network()
    for plan in finished.plain_plans:
        fresh = shrink(fresh, Plan.from_json(plan.to_json()))
    small = finished.result()
    at_once = shrink(network(), Plan.from_json(finished.plan.to_json()))
    x = torch.randn(3, 1, 8, 8)
    for model in (fresh, at_once):
        model.load_state_dict(small.state_dict())
        torch.testing.assert_close(model.eval()(x), small(x))
    # the same units, not only as many of them
    torch.manual_seed(4)
    marked = network()
    chain = marked
    for plan in finished.plain_plans:
        chain = shrink(chain, plan)
    once = shrink(marked, finished.plan).state_dict()
    assert all(torch.equal(once[k], v) for k, v in chain.state_dict().items())


def test_facts_of_the_last_decision_are_plain_and_complete(finished):
    json.dumps(finished.layers)
    widths = {layer["id"]: sum(layer["keep"]) for layer in finished.layers}
    assert widths == dict(finished.history[-1].widths)
    assert all(len(v) == len(layer["keep"]) for layer in finished.layers for v in layer.values() if isinstance(v, list))


@pytest.mark.parametrize("shrink_every", [0, 2])
def test_shrinking_on_the_way_changes_no_decision(shrink_every):
    """Physically gone or held at zero, the survivors are trained the same; only the noise is drawn in another order."""
    run = job(shrink_every=shrink_every, kl_weight=Tempered(10.0))
    list(run)
    small = run.result()
    assert size(small) < size(network()) and accuracy(small) > 0.6


def test_resumed_is_never_stopped():
    whole = job(kl_weight=Tempered(10.0))
    infos = list(whole)
    for stop in (5, 9, 12, 13):
        first = job(kl_weight=Tempered(10.0))
        for info in first:
            if info.epoch == stop:
                break
        state = first.state()
        state["plans"], state["history"] = json.loads(json.dumps((state["plans"], state["history"])))
        second = job(kl_weight=Tempered(10.0))
        second.load(state)
        rest = list(second)
        assert [i.widths for i in rest] == [i.widths for i in infos[stop:]]
        assert second.plan.to_json() == whole.plan.to_json()
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, second.model.state_dict()[name]), (stop, name)


def test_global_randomness_is_left_alone():
    run = job(epochs=2, fine_tune=1)
    state = torch.get_rng_state()
    list(run)
    assert torch.equal(state, torch.get_rng_state())


def test_a_budget_is_met_by_any_order():
    full = size(network())
    for rule in (by_norm, by_taylor):
        run = job(rule=rule, decide=ParametersLeft(full // 2, full), epochs=6)
        list(run)
        found = size(run.result())
        assert 0.42 * full < found <= full // 2
        assert run.history[0].parameters > found


def test_after_training_nothing_goes_before_the_end():
    run = job(every=0, rule=bmrs_u(4), kl_weight=Tempered(10.0))
    seen = []
    run.on_trained = lambda gates: seen.append(gates.evidence("n"))
    list(run)
    sizes = [h.parameters for h in run.history]
    assert sizes[:11] == [size(network())] * 11 and sizes[-1] < sizes[0] and len(seen) == 1
    small = run.result()
    assert list(run.history[11].widths.values()) == [small[1].out_features, small[3].out_features] < [40, 20]


@pytest.mark.parametrize("weight", [true_elbo, mean_mean])
def test_training_goes_on_with_one_structure_left_in_every_layer(weight):
    run = job(rule=lambda table: table.mean + 100.0, epochs=3, fine_tune=1, kl_weight=weight)
    infos = list(run)
    small = run.result()
    assert [small[1].out_features, small[3].out_features] == [1, 1] and all(math.isfinite(i.loss) for i in infos)
    assert size(shrink(network(), run.plan)) == size(small) == infos[-1].parameters


# ------------------------------------------------------------------ weights of the KL


def test_the_weights_of_the_kl():
    torch.manual_seed(0)
    gates = ockham.attach_gates(network(), torch.zeros(2, 1, 8, 8))
    with torch.no_grad():
        gates.noise.mean.uniform_(-3, 0)
        gates.noise.log_std.uniform_(-3, 1)
    each = lognormal.kl(gates.noise.mean, gates.noise.std).detach()
    torch.testing.assert_close(true_elbo(gates, 500.0).detach(), each.sum() / 500)
    torch.testing.assert_close(Tempered(7.0)(gates, 500.0).detach(), 7 * each.sum() / 500)
    mean = 0.5 * (each[:40].mean() + each[40:].mean())
    torch.testing.assert_close(mean_mean(gates, 500.0).detach(), mean)


@pytest.mark.parametrize(
    "bad",
    [{"epochs": 0}, {"learning_rate": 0.0}, {"gate_rate": math.nan}, {"start": 2.0}, {"every": -1}, {"fine_tune": -1}],
)
def test_bad_settings_are_named(bad):
    with pytest.raises(OckhamError, match="GateTraining"):
        GateTraining(**bad)
    with pytest.raises(OckhamError, match="temperature"):
        Tempered(0.0)


# ------------------------------------------------------------------ digits: both thresholds


@pytest.mark.slow
def test_on_digits_the_printed_threshold_removes_nothing_and_the_released_one_most():
    found = {}
    for name, rule in (("printed", bmrs_n_printed), ("released", bmrs_n), ("snr", snr_below(1.0))):
        run = job(rule=rule, epochs=200, fine_tune=10, learning_rate=3e-3, gate_rate=10.0)
        list(run)
        found[name] = size(run.result()) / size(network()), accuracy(run.result())
    assert found["printed"][0] == 1.0
    assert found["released"][0] < 0.5 and found["released"][1] > 0.85
    assert found["snr"][0] < 0.5 and found["snr"][1] > 0.85


# ------------------------------------------------------------------ curves


def test_curves_go_by_each_rules_order_and_leave_everything_as_it_was():
    run = job(epochs=6, fine_tune=0, every=0, rule=by_norm)
    list(run)
    gates = Gates.of(run.model, torch.zeros(2, 1, 8, 8))
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    seen = gate_sensitivity(gates, loader(), Classification(), batches=3)
    rules = {k: GATE_RULES[k] for k in ("n", "l2", "taylor", "random")}
    curves = compression_curve(gates, rules, lambda m: {"accuracy": accuracy(m)}, points=5, sensitivity=seen)
    assert all(torch.equal(before[k], v) for k, v in run.model.state_dict().items())
    for name, curve in curves.items():
        removed = [p.removed for p in curve.points]
        assert removed == sorted(removed) and removed[0] == 0.0 and removed[-1] > 0.9, name
        assert curve.points[0].measures["accuracy"] == curves["n"].points[0].measures["accuracy"]
    assert curves["l2"].stop.structures == 0 and curves["random"].stop.structures == 0


def test_parameters_left_are_those_of_surgery():
    torch.manual_seed(0)
    model = network()
    gates = ockham.attach_gates(model, torch.zeros(2, 1, 8, 8))
    keep = {k: torch.arange(len(p)) % 3 > 0 for k, p in gates.places.items()}
    with gated_without(gates, keep):
        assert int(gates.noise.keep.sum()) == sum(int(m.sum()) for m in keep.values())
    assert bool(gates.noise.keep.all())
    left = parameters_left(gates, keep)
    gates.remove(keep)
    gates.fold()
    assert left == size(shrink(model, ockham.plan(gates.groups, keep)))
