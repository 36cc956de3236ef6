"""Networks, energies, metrics and evidences against autograd, scipy, draws and conjugate answers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from ockham.tabular.likelihoods import (
    Classes,
    Counts,
    GaussianNoise,
    NoisyClasses,
    Student,
    log_scale,
    resolution,
    student_nll,
)
from ockham.tabular.model import Model, Table, which_inputs
from ockham.tabular.network import Net


def net_of(inputs, hidden, outputs, seed=0, share=0.6, pairs=()):
    g = torch.Generator().manual_seed(seed)
    keep, before, smooth = {}, inputs, []
    for i, units in enumerate(hidden):
        keep |= {f"hidden.{i}.weight": (units, before), f"hidden.{i}.bias": (units,)}
        smooth.append(torch.rand(units, generator=g) < 0.5)
        before = units
    keep |= {"out.weight": (outputs, before if hidden else 0), "out.bias": (outputs,), "skip.weight": (outputs, inputs)}
    if pairs:
        keep["pair.weight"] = (outputs, len(pairs))
    masks = {n: torch.rand(shape, generator=g) < share for n, shape in keep.items()}
    masks["out.bias"][:] = True
    return Net(masks, tuple(smooth), pairs)


def plain(net, vector, x):
    """The network written down a second time, one vector, for autograd."""
    dense, begin = {}, 0
    for name, mask in net.keep.items():
        size = int(mask.sum())
        dense[name] = torch.zeros(mask.shape, dtype=x.dtype).masked_scatter(mask, vector[begin : begin + size])
        begin += size
    h = x
    for i, smooth in enumerate(net.smooth):
        z = h @ dense[f"hidden.{i}.weight"].T + dense[f"hidden.{i}.bias"]
        h = torch.where(smooth, z.tanh(), z.relu())
    out = x @ dense["skip.weight"].T + dense["out.bias"]
    for i, (a, b) in enumerate(net.pairs):
        out = out + (x[:, a].clamp(-4, 4) * x[:, b].clamp(-4, 4)).unsqueeze(1) * dense["pair.weight"][:, i]
    return out + h @ dense["out.weight"].T if net.smooth else out


@pytest.mark.parametrize("hidden", [(6,), (5, 4), ()])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("pairs", [(), ((0, 2), (1, 3), (2, 3))])
def test_outputs_and_derivatives_are_those_of_the_network(hidden, outputs, pairs):
    net = net_of(4, hidden, outputs, pairs=pairs)
    g = torch.Generator().manual_seed(1)
    vectors = torch.randn(2, len(net), generator=g, dtype=torch.float64)
    x = torch.randn(7, 4, generator=g, dtype=torch.float64)
    x[0, 2] = 9.0
    done = net.run(vectors, x)
    for c in range(2):
        torch.testing.assert_close(done.output[c], plain(net, vectors[c], x))
    jacobian = torch.autograd.functional.jacobian(lambda v: plain(net, v, x), vectors[0])
    torch.testing.assert_close(net.jacobian(net.run(vectors[:1], x), x), jacobian)
    slope = torch.randn(2, 7, outputs, generator=g, dtype=torch.float64)
    for c in range(2):
        expected = torch.autograd.functional.vjp(lambda v: plain(net, v, x), vectors[c], slope[c])[1]
        torch.testing.assert_close(net.pullback(done, slope, x)[c], expected)


@pytest.mark.parametrize("pairs", [(), ((0, 2), (1, 3), (2, 3))])
def test_what_reads_an_input_is_counted(pairs):
    net = net_of(5, (4,), 1, pairs=pairs)
    expected = net.keep["hidden.0.weight"].sum(0) + net.keep["skip.weight"].sum(0)
    for pair, lives in zip(pairs, net.keep["pair.weight"][0] if pairs else (), strict=True):
        expected[list(pair)] += lives
    torch.testing.assert_close(net.used(), expected)
    for j in range(5):
        assert int((net.reads == j).any(1).sum()) == int(expected[j])


@pytest.mark.parametrize("hidden", [(6,), (6, 5)])
@pytest.mark.parametrize("pairs", [(), ((0, 1),), ((0, 2), (1, 3), (2, 3))])
def test_without_weights_the_rest_computes_the_same(hidden, pairs):
    """What is removed beside the asked-for weights is on no path, or a constant."""
    net = net_of(4, hidden, 2, seed=3, pairs=pairs)
    vector = torch.randn(len(net), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gone = torch.zeros(len(net), dtype=torch.bool)
    gone[(net.reads == 1).any(1)] = True
    smaller, stays = net.without(gone)
    assert not bool(gone[stays].any()) and int(smaller.used()[1]) == 0 and len(stays) == len(smaller)
    g = torch.Generator().manual_seed(4)
    x = torch.randn(9, 4, generator=g, dtype=torch.float64)
    zeroed = torch.where(gone, 0.0, vector)
    difference = plain(net, zeroed, x) - plain(smaller, vector[stays], x)
    assert float((difference - difference[0]).abs().max()) < 1e-12  # the same up to a constant
    for i, s in enumerate(smaller.smooth):
        assert bool(smaller.keep[f"hidden.{i}.weight"].any(1).all()) and len(s) == smaller.units[i]
    assert bool(smaller.keep["out.weight"].any(0).all())
    assert not any(1 in pair for pair in smaller.pairs) and ("pair.weight" in smaller.keep) == bool(smaller.pairs)


def test_products_come_with_weights_of_zero_and_what_was_there_stays():
    net = net_of(4, (5,), 2, pairs=((0, 1),))
    vector = torch.randn(len(net), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = torch.randn(9, 4, dtype=torch.float64)
    bigger, weights = net.paired(vector, [(1, 3), (0, 2)])
    torch.testing.assert_close(plain(bigger, weights, x), plain(net, vector, x))
    assert bigger.pairs == ((0, 1), (1, 3), (0, 2)) and len(bigger) == len(net) + 4
    first, _ = net_of(4, (), 1).paired(vector[:0].new_zeros(len(net_of(4, (), 1))), [(2, 3)])
    assert first.pairs == ((2, 3),)


@pytest.mark.parametrize("depth", [1, 2])
def test_growth_changes_nothing_while_output_weights_are_zero(depth):
    g = torch.Generator().manual_seed(5)
    net = net_of(3, (4, 2)[:depth], 1, seed=6)
    vector = torch.randn(len(net), generator=g, dtype=torch.float64)
    fresh, before = [], 3
    for i in range(depth):
        read = before if i == 0 else net.units[0] + 2
        fresh.append(
            {
                "weight": torch.randn(2, read, generator=g, dtype=torch.float64),
                "bias": torch.randn(2, generator=g, dtype=torch.float64),
                "smooth": torch.tensor([True, False]),
            }
        )
    fresh[-1]["out"] = torch.zeros(1, 2, dtype=torch.float64)
    bigger, more = net.grown(vector, fresh)
    x = torch.randn(5, 3, generator=g, dtype=torch.float64)
    torch.testing.assert_close(plain(bigger, more, x), plain(net, vector, x))
    assert bigger.units[-1] == net.units[-1] + 2 and len(more) == len(bigger) > len(net)
    linear = Net.linear(3, 1, depth)
    assert linear.units == (0,) * depth and len(linear) == 4 and len(Net.linear(3, 1, depth, reads=False)) == 1


LIKELIHOODS = [
    (Classes(), 1),
    (Classes(), 3),
    (NoisyClasses(), 1),
    (NoisyClasses(), 3),
    (Counts(0.7), 1),
    (GaussianNoise(-4.0), 1),
    (Student(-4.0), 1),
]


def model_of(likelihood, outputs, rows=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    nets = [net_of(3, (4,), outputs, seed=seed)]
    x = torch.randn(rows, 3, generator=g, dtype=torch.float64)
    y = torch.randn(rows, generator=g, dtype=torch.float64)
    if isinstance(likelihood, (GaussianNoise, Student)):
        nets.append(net_of(3, (2,), 1, seed=seed + 1))
    elif isinstance(likelihood, Classes):
        y = torch.randint(max(2, outputs), (rows,), generator=g)
    else:
        y = y.exp().round()
    precision = tuple({n: 0.5 + i for i, n in enumerate(net.keep)} for net in nets)
    weight = 0.5 + torch.rand(rows, generator=g, dtype=torch.float64)
    model = Model(tuple(nets), likelihood, Table(x, y, weight), 1.0, precision, -0.3, 2)
    vector = 0.5 * torch.randn(sum(map(len, nets)) + likelihood.extras, generator=g, dtype=torch.float64)
    return model, vector


@pytest.mark.parametrize(("likelihood", "outputs"), LIKELIHOODS)
def test_gradients_are_those_of_the_energy(likelihood, outputs):
    model, vector = model_of(likelihood, outputs)
    vectors = torch.stack([vector, -vector])
    energy, slope = model.slopes(vectors)
    torch.testing.assert_close(energy, model.energy(vectors))
    step = 1e-6 * torch.eye(len(vector), dtype=torch.float64)
    for c in range(2):
        ends = [model.energy(vectors[c] + s * step) for s in (1, -1)]
        torch.testing.assert_close(slope[c], (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-5)
    here = model.passed(vector)
    assert here.energy == pytest.approx(float(energy[0]))
    torch.testing.assert_close(model.expand(here)[0], slope[0])


@pytest.mark.parametrize(("likelihood", "outputs"), LIKELIHOODS)
def test_fisher_information_is_the_mean_square_of_slopes(likelihood, outputs):
    """By draws from the model itself."""
    g, draws = np.random.default_rng(0), 200_000
    output = torch.tensor([0.3, -0.7, 0.4][: 2 if isinstance(likelihood, (GaussianNoise, Student)) else outputs])
    output, extra = output.double(), torch.full((likelihood.extras,), 1.5, dtype=torch.float64)
    scale = math.exp(float(log_scale(output[-1], -4.0)))
    if isinstance(likelihood, Student):
        y = 0.3 + scale * stats.t.rvs(2 + math.exp(1.5), size=draws, random_state=0)
    elif isinstance(likelihood, GaussianNoise):
        y = 0.3 + scale * g.normal(size=draws)
    elif isinstance(likelihood, Counts):
        y = g.poisson(math.exp(0.3 + 0.7), size=draws).astype(float)
    else:
        p = torch.sigmoid(output) if outputs == 1 else output.softmax(0)
        p = [1 - float(p), float(p)] if outputs == 1 else p.tolist()
        y = g.choice(len(p), p=p, size=draws)
        if likelihood.extras:  # labels out of a hat
            y = np.where(g.random(draws) < 1 / (1 + math.exp(-1.5)), g.integers(len(p), size=draws), y)
    slope, of_extra = likelihood.slopes(output.expand(1, draws, -1), extra.expand(1, -1), torch.as_tensor(y))
    got, own = likelihood.information(output.unsqueeze(0), extra)
    torch.testing.assert_close(got[0], slope[0].T @ slope[0] / draws, rtol=0.03, atol=0.02)
    if likelihood.extras:
        torch.testing.assert_close(own[0], of_extra[0].T @ of_extra[0] / draws, rtol=0.05, atol=1e-4)


@pytest.mark.parametrize(("likelihood", "outputs"), LIKELIHOODS)
def test_weights_of_rows_are_repetitions(likelihood, outputs):
    model, vector = model_of(likelihood, outputs)
    twice = torch.arange(40).repeat_interleave(torch.arange(40) % 2 + 1)
    table = replace(model.table, weight=(torch.arange(40) % 2 + 1.0).double())
    repeated = table.rows(twice)
    one, two = replace(model, table=table), replace(model, table=replace(repeated, weight=torch.ones(60).double()))
    for a, b in zip(one.expand(one.passed(vector)), two.expand(two.passed(vector)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_evidence_of_a_linear_model_is_the_exact_one():
    """Known noise, no units: y ~ N(0, s^2 I + X P^-1 X'), up to what is believed of the structure."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(60, 3, generator=g, dtype=torch.float64)
    x[:, 2] = 2 * x[:, 0] - x[:, 1]  # linearly dependent
    y = x @ torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64) + 0.3 * torch.randn(60, generator=g).double()
    net, scale = Net.linear(3, 1, 1), Net.linear(3, 1, 1, reads=False)
    precision = tuple(dict.fromkeys(n.keep, 0.7) for n in (net, scale))
    model = Model(
        (net, scale), GaussianNoise(-30.0), Table(x, y, torch.ones(60).double()), 1.0, precision, math.log(0.3), 0
    )
    scale_at = torch.tensor([math.log(0.3)], dtype=torch.float64)
    metric = model.expand(model.passed(torch.cat([torch.zeros(4).double(), scale_at])))[1]
    design = torch.cat([torch.ones(60, 1).double(), x], 1)
    weights = torch.linalg.solve(metric[:4, :4], design.T @ y / 0.09)
    vector = torch.cat([weights, scale_at])
    passed = model.passed(vector)
    slope, metric = model.expand(passed)
    assert float(slope[:4].abs().max()) < 1e-8
    covariance = (
        0.09 * torch.eye(60).double() + design @ torch.diag(torch.tensor([1.0, *[1 / 0.7] * 3]).double()) @ design.T
    )
    exact = float(torch.distributions.MultivariateNormal(torch.zeros(60).double(), covariance).log_prob(y))
    of_scale = 0.5 * math.log(0.25) - 0.5 * math.log(float(metric[4, 4]))
    got = model.evidence(passed.energy, metric) - model.belief() - of_scale
    assert got == pytest.approx(exact, abs=1e-6)


def test_the_prior_of_inputs_is_the_mean_over_a_shared_chance():
    """Against the integral over a chance that is Beta(1, inputs); all sets together have probability one."""
    chance = stats.beta(1, 6)
    sets = [chance.expect(lambda c, k=k: c**k * (1 - c) ** (6 - k)) for k in range(7)]
    np.testing.assert_allclose([math.exp(which_inputs(k, 6)) for k in range(7)], sets, rtol=1e-7)
    assert sum(math.comb(6, k) * s for k, s in enumerate(sets)) == pytest.approx(1.0)
    assert which_inputs(0, 0) == 0.0 and which_inputs(6, 6) <= which_inputs(5, 6)  # a full set is no refuge


def test_beliefs_of_structures_add_up_to_one():
    """All sets of inputs together have probability one."""
    slab = dict.fromkeys(Net.linear(3, 1, 0).keep, 1.0)
    table = Table(torch.zeros(1, 3).double(), torch.zeros(1).long(), torch.ones(1).double())
    total = 0.0
    for code in range(8):
        mask = torch.tensor([[bool(code >> j & 1) for j in range(3)]])
        net = Net(Net.linear(3, 1, 0).keep | {"skip.weight": mask}, ())
        model = Model((net,), Classes(), table, 1.0, (slab,), 0.0, 0)
        active = int(mask.sum())
        own = -math.log(active + 1)  # direct weights among the inputs that are used: all of them
        nothing = -math.log(1)  # of a tensor without places
        total += math.exp(model.belief() - own - nothing - 3 * 0 - _slabs(model))
    assert total == pytest.approx(1.0)


def _slabs(model):
    """Inverse gamma of shape and rate 2 at a variance of 1, by the width of its posterior in ln v."""
    living = [int(k.sum()) for n, k in model.nets[0].keep.items() if n != "out.bias"]
    return sum(math.log(4) - 2 + 0.5 * math.log(2 * math.pi / (2 + 0.5 * m)) for m in living)


def test_a_slab_variance_fits_its_weights():
    model, vector = model_of(Classes(), 1)
    fitted = model.learned(vector, torch.full_like(vector, 0.1))
    span = model.nets[0].spans["hidden.0.weight"]
    part = vector[span]
    expected = (2 + 0.5 * len(part)) / (2 + 0.5 * float((part.square() + 0.1).sum()))
    assert fitted.precision[0]["hidden.0.weight"] == pytest.approx(expected)


def test_student_against_scipy():
    r, f = np.array([0.0, 0.3, -7.0, 1e4]), np.array([2.1, 5.0, 30.0, 1e4])
    got = student_nll(torch.tensor(r), torch.tensor(0.7, dtype=torch.float64), torch.tensor(f))
    np.testing.assert_allclose(got, -stats.t.logpdf(r, f, scale=math.exp(0.7)), rtol=1e-9)
    assert float(log_scale(torch.tensor(-50.0), -2.0)) == pytest.approx(-2.0)
    assert float(log_scale(torch.tensor(30.0), -2.0)) == pytest.approx(30.0)
    counts = torch.tensor([0.0, 3.0], dtype=torch.float64)
    output = torch.full((1, 2, 1), 0.4, dtype=torch.float64)
    got = Counts(0.7).nll(output, torch.zeros(1, 0), counts)[0]
    np.testing.assert_allclose(got, -stats.poisson.logpmf([0, 3], math.exp(1.1)), rtol=1e-12)


def test_resolution_is_that_of_rounding():
    g = torch.Generator().manual_seed(6)
    rounded = torch.rand(2000, generator=g, dtype=torch.float64).mul(40).round().div(4)
    rounded[0] = 300.0  # one wide gap
    exact = torch.rand(200_000, generator=g, dtype=torch.float64) * 10
    assert math.exp(resolution(rounded)) == pytest.approx(float((exact - (exact * 4).round() / 4).std()), rel=0.02)
    assert math.exp(resolution(torch.tensor([1.0, 1.0]))) == pytest.approx(1e-3)  # a constant has no gap
