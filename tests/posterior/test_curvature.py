"""Laplace posteriors: exact where the model is conjugate, and factors of every kind of layer against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ockham import laplace, predict
from ockham.core.batch import Batch
from ockham.core.likelihood import Classification
from ockham.core.objective import Objective
from ockham.errors import DataError, OckhamError, OckhamWarning
from ockham.evidence.gaussian import delta_f_dense
from ockham.evidence.kronecker import covariance, delta_f_kronecker_rows
from ockham.methods.laplace import curvature as taps
from ockham.methods.laplace.curvature import ExampleGradients, Score

F64 = torch.float64
P0, NOISE = 2.0, 0.5


@pytest.fixture(scope="module")
def linear():
    """Conjugate linear regression with correlated inputs, the network at its exact mode."""
    g = torch.Generator().manual_seed(4)
    x = torch.randn(40, 3, generator=g, dtype=F64)
    x[:, 1] += x[:, 0]
    y = x @ torch.tensor([1.0, 0.0, -0.5], dtype=F64) + 0.3 + NOISE**0.5 * torch.randn(40, generator=g, dtype=F64)
    wide = torch.cat([x, torch.ones(40, 1, dtype=F64)], 1)
    precision = wide.T @ wide / NOISE + P0 * torch.eye(4, dtype=F64)
    mode = torch.linalg.solve(precision, wide.T @ y / NOISE)
    net = nn.Linear(3, 1).double()
    with torch.no_grad():
        net.weight.copy_(mode[None, :3])
        net.bias.copy_(mode[3:])
    return net, [(x[:25], y[:25, None]), (x[25:], y[25:, None])], precision, mode


def of(linear, structure, **more):
    return laplace(
        linear[0], linear[1], structure=structure, likelihood="regression", prior=P0, noise_variance=NOISE, **more
    )


def test_kronecker_is_the_exact_posterior_of_linear_regression(linear):
    _, _, precision, mode = linear
    posterior = of(linear, "kronecker")
    (block,) = posterior.matrices
    torch.testing.assert_close(covariance(block.precision), precision.inverse(), rtol=1e-9, atol=1e-12)
    marginal = torch.cat([posterior["weight"].marginal_precision[0], posterior["bias"].marginal_precision])
    torch.testing.assert_close(marginal, 1 / precision.inverse().diagonal())
    packed = block.pack({n: g.mean for n, g in posterior.items()})
    want = delta_f_dense(mode, precision.inverse(), 1 / P0, range(4))
    assert float(delta_f_kronecker_rows(packed, block.precision)) == pytest.approx(float(want), rel=1e-9)


def test_diagonal_is_the_diagonal_of_the_exact_precision(linear):
    posterior = of(linear, "diagonal")
    got = torch.cat([posterior["weight"].precision[0], posterior["bias"].precision])
    torch.testing.assert_close(got, linear[2].diagonal())
    assert posterior.matrices == () and posterior["weight"].marginal_precision is None


def test_part_of_the_data_stands_for_all_of_it(linear):
    net, batches, *_ = linear
    posterior = laplace(
        net, batches, structure="diagonal", likelihood="regression", prior=P0, noise_variance=NOISE, n_data=400
    )
    got = torch.cat([posterior["weight"].precision[0], posterior["bias"].precision])
    torch.testing.assert_close(got - P0, 10 * (linear[2].diagonal() - P0))


def test_the_noise_is_estimated_and_an_exact_fit_refused(linear):
    net, batches, *_ = linear
    posterior = laplace(net, batches, structure="diagonal", likelihood="regression", prior=P0)
    residual = sum(float((y - net(x).detach()).square().sum()) for x, y in batches) / 40
    got = torch.cat([posterior["weight"].precision[0], posterior["bias"].precision])
    torch.testing.assert_close((got - P0) * residual, (linear[2].diagonal() - P0) * NOISE)
    exact = [(x, net(x).detach()) for x, _ in batches]
    with pytest.raises(OckhamError, match="noise variance"):
        laplace(net, exact, structure="diagonal", likelihood="regression", prior=P0)


def test_empirical_fisher_of_a_regression(linear):
    net, batches, *_ = linear
    posterior = of(linear, "diagonal", fisher="empirical")
    want = sum(((y - net(x)) * x / NOISE).square().sum(0) for x, y in batches)
    torch.testing.assert_close(posterior["weight"].precision[0] - P0, want.detach())


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def test_monte_carlo_ggn_of_a_classifier_is_the_exact_one_on_average():
    net = classifier()
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    exact = torch.zeros(3, 5, dtype=F64)
    for row in x:
        h = net[1](net[0](row)).detach()
        p = net(row[None])[0].softmax(0).detach()
        exact += (p * (1 - p))[:, None] * h.square()  # diagonal of (diag p - p p') (x) h h'
    many = [(x.repeat(2000, 1), torch.zeros(12000, dtype=torch.long))]
    posterior = laplace(net, many, structure="diagonal", prior=1e-9, n_data=6)
    torch.testing.assert_close(posterior["2.weight"].precision, exact, rtol=0.06, atol=1e-3)


def test_vmap_and_single_examples_agree():
    net, score = classifier(), Score(Objective(Classification()))
    x, y = torch.randn(7, 4, dtype=F64), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    fast = ExampleGradients(net, ["0.weight", "2.bias"], score)
    slow = ExampleGradients(net, ["0.weight", "2.bias"], score)
    slow._one_by_one = True
    for a, b in zip(fast.chunks(Batch((x,), {}, y)), slow.chunks(Batch((x,), {}, y)), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name])


def gradient_sums(net, name, x, backward):
    """Sum over examples of the gradient's outer products, by plain autograd."""
    total = 0
    for i in range(len(x)):
        net.zero_grad()
        backward(net(x[i : i + 1])).backward()
        d = dict(net.named_parameters())[name].grad.reshape(-1)
        total = total + torch.outer(d, d)
    return total


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 3), (4,)),
        (nn.Conv2d(2, 3, (2, 3)), (2, 2, 3)),  # one position each: Kronecker is exact for one example
        (nn.Conv1d(4, 6, 3, groups=2), (4, 3)),
        (nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=2), (2, 3, 3)),
    ],
)
def test_factors_of_one_example_and_position_are_its_gradient(layer, shape):
    layer = layer.double()
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    weigh = torch.randn(layer(x).shape, generator=torch.Generator().manual_seed(3), dtype=F64)
    sums = taps.matrices_of(layer, frozenset(["weight", "bias"]))["weight"]
    with taps.tapped({"weight": sums}):
        (layer(x) * weigh).sum().backward()
    assert sums.bias == "bias" and sums.rows == (math.prod(layer(x).shape[2:]) if x.ndim > 2 else 1)
    outer = gradient_sums(layer, "weight", x, lambda y: (y * weigh).sum())
    a = sums.inputs[:, :-1, :-1]
    if sums.rows == 1:
        got = torch.block_diag(*[torch.kron(sums.outputs[i], a[i]) for i in range(sums.groups)])
        same = torch.block_diag(*[torch.ones(got.shape[0] // sums.groups, got.shape[0] // sums.groups)] * sums.groups)
        torch.testing.assert_close(got, outer * same)


def test_convolution_columns_reproduce_the_convolution():
    x = torch.randn(3, 4, 9, 8)
    for layer in (
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
        nn.Conv2d(4, 2, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding="valid", groups=4),
    ):
        columns = taps._columns(layer, x)
        out = layer.weight.reshape(layer.groups, -1, columns.shape[1]) @ columns
        want = layer(x) - layer.bias.view(1, -1, 1, 1)
        rows = torch.stack([w.movedim(1, -1).flatten(0, -2) for w in want.chunk(layer.groups, 1)])
        torch.testing.assert_close(out.mT, rows, rtol=1e-4, atol=1e-5)


class Last(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, 2)

    def forward(self, x):
        out = (
            self.layer(x, x, x, need_weights=False) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        )
        return self.head(out[0][:, -1])


@pytest.mark.parametrize(
    "layer",
    [nn.LSTM(3, 4, batch_first=True), nn.GRU(3, 4, batch_first=True), nn.MultiheadAttention(4, 2, batch_first=True)],
)
def test_recurrent_and_attention_weights_have_factors(layer):
    net = Last(layer).eval()
    width = 3 if isinstance(layer, nn.RNNBase) else 4
    x, y = torch.randn(6, 5, width), torch.tensor([0, 1, 0, 1, 0, 1])
    posterior = laplace(net, [(x, y)], structure="kronecker", prior=1.0)
    found = {block.weight: block.precision.shape for block in posterior.matrices}
    if isinstance(layer, nn.MultiheadAttention):
        assert found["layer.in_proj_weight"] == (3, 4, 4) and found["layer.out_proj.weight"] == (1, 4, 4)
    else:
        gates = layer.weight_ih_l0.shape[0]
        assert found["layer.weight_ih_l0"] == (1, gates, 3) and found["layer.weight_hh_l0"] == (1, gates, 4)
    assert set(posterior) == {n for n, _ in net.named_parameters()}
    for g in posterior.values():  # a marginal never knows more than a conditional
        assert g.marginal_precision is None or bool((g.marginal_precision <= g.precision * 1.0001).all())


def test_gradient_factors_of_one_example_are_exact():
    sums = taps.MatrixSums("w", None, 1, torch.zeros(1, 3, 3, dtype=F64), torch.zeros(1, 2, 2, dtype=F64))
    u, v = torch.randn(2, dtype=F64), torch.randn(3, dtype=F64)
    taps.gradient_factors_(sums, torch.outer(u, v)[None])
    want = torch.outer(torch.outer(u, v).reshape(-1), torch.outer(u, v).reshape(-1))
    torch.testing.assert_close(torch.kron(sums.outputs[0], sums.inputs[0]) / sums.rows, want)


def test_frozen_shared_and_unused_parameters():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    net[1].weight = net[0].weight
    net[2].bias.requires_grad_(False)
    net.spare = nn.Parameter(torch.ones(2))
    data = [(torch.randn(8, 3), torch.tensor([0, 1] * 4))]
    with pytest.warns(OckhamWarning, match="spare"):
        posterior = laplace(net, data, structure="kronecker", prior=1.0)
    assert set(posterior) == {"0.weight", "0.bias", "1.bias", "2.weight"}
    assert [b.names for b in posterior.matrices] == [("2.weight",)]  # the shared weight has a diagonal


def test_nothing_about_the_network_or_the_world_changes(linear):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    laplace(net, [(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1] * 4))])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net.training
    assert torch.equal(state, torch.get_rng_state()) and not net[0]._forward_hooks
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
def test_packed_sequences_have_the_curvature_of_their_padded_twin(structure):
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x, last=None):
            if last is None:
                return self.out(self.rnn(x)[1][0][-1])
            return self.out(self.rnn(x)[0][torch.arange(len(x)), last])

    series = [torch.randn(length, 3) for length in (2, 5, 1, 4, 3)]
    net, y = Read(), torch.tensor([0, 1, 1, 0, 1])
    packed, last = nn.utils.rnn.pack_sequence(series, enforce_sorted=False), torch.tensor([1, 4, 0, 3, 2])
    given = {"structure": structure, "fisher": "empirical", "prior": 1.0}
    found = laplace(net, [(packed, y)], **given)
    twin = laplace(net, [((nn.utils.rnn.pad_sequence(series, batch_first=True), last), y)], **given)
    for name, g in twin.items():
        torch.testing.assert_close(found[name].precision, g.precision, rtol=1e-4, atol=1e-6)
    assert predict(net, found, packed, draws=2).probabilities.shape == (5, 2)


def test_padding_and_tokens_are_terms():
    net = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2)))  # [N, K = 2, T = 2]
    x, y = torch.randn(5, 3), torch.tensor([[0, 1], [1, -100], [0, 0], [-100, -100], [1, 1]])
    half = laplace(net, [(x, y)], structure="diagonal", prior=1e-6, n_data=7)
    full = laplace(net, [(x, y)], structure="diagonal", prior=1e-6)
    torch.testing.assert_close(half["0.weight"].precision, full["0.weight"].precision)
    assert full.n_data == 7


def test_bad_input_is_named():
    net, good = nn.Linear(3, 2), [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
    with pytest.raises(DataError, match="empty"):
        laplace(net, [])
    with pytest.raises(DataError, match="labels must lie"):
        laplace(net, [(torch.randn(1, 3), torch.tensor([5]))])
    with pytest.raises(DataError, match="inputs"):
        laplace(net, [(torch.randn(1, 4), torch.tensor([0]))])
    for bad in ({"structure": "full"}, {"prior": "flat"}, {"fisher": "true"}, {"prior": -1.0}, {"n_data": 0}):
        with pytest.raises(OckhamError, match=next(iter(bad)) + "|prior"):
            laplace(net, good, **bad)
    with pytest.raises(OckhamError, match="no parameters"):
        laplace(nn.Flatten(), good)
