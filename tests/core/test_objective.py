"""The first batch, the one pass before training, and the way back into the user's units."""

from __future__ import annotations

import copy
import math
import time
import warnings

import pytest
import torch
from torch import nn

import ockham
from ockham.core.batch import Batch
from ockham.core.likelihood import Classification, Loss, Regression
from ockham.core.network import train_
from ockham.core.objective import blame, objective_of
from ockham.core.scaling import TargetStatistics, find_head, rescale_, rescaled
from ockham.errors import DataError, NonFiniteLossError, OckhamError, OckhamWarning


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def mlp(outputs=1, **last):
    return seeded(lambda: nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, outputs, **last)))


X = torch.randn(200, 3, generator=g())
Y = 2 * X[:, :1] - X[:, 1:2] + 0.2 * torch.randn(200, 1, generator=g(1))


def batches(*tensors, size=50):
    return list(zip(*(t.split(size) for t in tensors), strict=True))


# ------------------------------------------------------------------ the first batch
class Noisy(nn.Module):
    """Everything that a look must leave alone: statistics, a counter, dropout's randomness, modes."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
        self.net[1].eval()

    def forward(self, x):
        return self.net(x)


def test_looking_at_the_data_leaves_network_and_randomness_as_they_were():
    net, y = seeded(Noisy), (X[:, 0] > 0).long()
    before, modes, state = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()], torch.get_rng_state()
    assert objective_of(net).prepare(net, batches(X, y)) == 200
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ((X[:8], (X[:8, 0] > 0).float()), "integer labels"),
        ((X[:8, :2], (X[:8, 0] > 0).long()), r"cannot take the data's inputs, float32 \(8, 2\)"),
        ((X[0], torch.tensor(1)), "no batch axis"),
        ((X[:8], None), "None"),
        ((X[:8], torch.full((8,), 5)), r"0\.\.1 .*got 5\.\.5"),
        ((X[:8], torch.zeros(8).long(), -torch.ones(8)), "not negative"),
        ((X[:8], torch.zeros(8).long(), torch.ones(5)), r"\(5,\) for \(8,\)"),
        ((X[:8], torch.zeros(8).long(), torch.zeros(8)), "weights are zero"),
        ((X[0], 1), "single examples"),
        ((X[:8], [0, 1] * 4), r"got list of 8.*torch\.as_tensor"),
        ((X[:8], ["cat", "dog"] * 4), "Number the classes"),
        ((X[:2], torch.eye(2).long()), r"argmax\(1\)"),
    ],
)
def test_a_first_batch_that_cannot_work_is_refused_at_once_by_every_verb(raw, text):
    net, start = mlp(2), time.monotonic()
    jobs = [lambda: ockham.compress(net, [raw]), lambda: ockham.laplace(net, [raw])]
    for job in jobs[: 1 if "zero" in text else 2]:
        with pytest.raises(OckhamError, match=text) as found:
            job()
        assert len(str(found.value)) < 360 and str(found.value).count("\n") == 0
    assert time.monotonic() - start < 10  # seconds on a busy machine; milliseconds elsewhere


def test_what_is_not_finite_is_named_with_its_example():
    x, y = X.clone(), Y.clone()
    x[3, 1], y[130] = math.nan, math.inf
    net = mlp()
    with pytest.raises(NonFiniteLossError, match="input 0 is not finite: nan in example 3 "):
        objective_of(net, "regression").prepare(net, batches(x, Y))
    with pytest.raises(DataError, match=r"batch 2 .*the target is not finite: inf in example 30 "):
        objective_of(net, "regression").prepare(net, batches(X, y))
    later = x.roll(100, 0)
    with pytest.raises(DataError, match="input 0 is not finite: nan in example 3 "):
        ockham.laplace(mlp(2), batches(later, (Y[:, 0] > 0).long()))
    assert blame(Batch((X,), {}, Y)) == ""


def test_faults_of_later_batches_are_found_before_any_epoch():
    x, y = X.clone(), (X[:, 0] > 0).long()
    x[130, 1] = math.nan
    seen = []
    for job in (ockham.compress, lambda net, data, **_: objective_of(net).prepare(net, data)):
        with pytest.raises(NonFiniteLossError, match=r"batch 2 .*input 0 is not finite: nan in example 30 "):
            job(mlp(2), batches(x, y), on_progress=seen.append)
    norm = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with pytest.raises(DataError, match=r"batch 4 .*drop_last=True"):
        ockham.compress(norm, [*batches(X, y), (X[:1], y[:1])], on_progress=seen.append)
    assert not seen
    assert objective_of(mlp(2)).prepare(mlp(2), [*batches(X, y), (X[:1], y[:1])]) == 201


class TimeFirst(nn.Module):
    """Outputs [T, N], which have the targets' shape [N, T] where there are as many examples as steps."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(3, 1)

    def forward(self, x):
        return self.last(x)[..., 0].t()


def test_outputs_of_the_targets_shape_by_accident_are_refused():
    x = torch.randn(6, 6, 3, generator=g())
    with pytest.raises(DataError, match=r"must count the examples; with 5 examples instead of 6 .*\(6, 5\)"):
        ockham.compress(TimeFirst(), [(x, x[..., 0])], likelihood="regression")
    net = TimeFirst()
    objective_of(net, "regression", output=lambda found: found.t()).prepare(net, [(x, x[..., 0])])
    square = seeded(lambda: nn.Linear(3, 8))
    objective_of(square).prepare(square, [(X[:8], torch.arange(8))])  # eight classes, eight examples


def test_missing_inputs_that_the_network_handles_are_no_fault():
    class Filled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x.nan_to_num(0.0))

    x = X.clone()
    x[::7, 0] = math.nan
    net = Filled()
    assert objective_of(net, "regression").prepare(net, batches(x, Y)) == 200


def test_labels_that_fit_at_first_and_not_later_are_explained():
    y = (X[:, 0] > 0).long()
    y[150] = 9
    objective = objective_of(mlp(2))
    with pytest.raises(DataError, match=r"0\.\.1 .*got 0\.\.9"):
        objective.loss(mlp(2), Batch((X,), {}, y))


def test_a_sum_declared_as_a_mean_is_announced():
    loss = ockham.Loss(lambda o, t: (o - t).square().sum(), reduction="mean")
    net = mlp()
    with pytest.warns(OckhamWarning, match="it is a sum"):
        objective_of(net, loss).prepare(net, batches(X, Y))


# ------------------------------------------------------------------ counting
def test_n_data_is_the_sum_of_the_weights_and_far_sums_are_announced():
    y, weight = (X[:, 0] > 0).long(), torch.rand(200, generator=g(3)) + 0.5
    net = mlp(2)
    objective = objective_of(net)
    assert objective.prepare(net, batches(X, y, weight)) == pytest.approx(float(weight.sum()), rel=1e-6)
    assert objective.likelihood.mean_weight == pytest.approx(float(weight.mean()), rel=1e-5)
    losses = [objective.loss(net, b)[0] for b in objective.batches(batches(X, y, weight), torch.device("cpu"))]
    each = nn.functional.cross_entropy(net(X), y, reduction="none")
    torch.testing.assert_close(torch.stack(losses).mean(), (weight * each).sum() / weight.sum())
    with pytest.warns(OckhamWarning, match="add up to 20 for 200 terms"):
        objective_of(net).prepare(net, batches(X, y, torch.full((200,), 0.1)))


def test_own_losses_with_weights_may_be_means():
    def squares(output, target, weight):
        return (weight[:, None] * (output - target).square()).mean()

    net, weight = mlp(), torch.rand(200, generator=g(3)) + 0.5
    objective = objective_of(net, ockham.Loss(squares, reduction="mean"))
    assert objective.prepare(net, batches(X, Y, weight)) == pytest.approx(float(weight.sum()), rel=1e-6)
    summed = ockham.Loss(lambda o, t, w: (w[:, None] * (o - t).square()).sum(), reduction="mean")
    with pytest.warns(OckhamWarning, match="it is a sum"):
        objective_of(net, summed).prepare(net, batches(X, Y, weight))


@pytest.mark.parametrize("answer", [lambda f: f, lambda f: {"logits": f}, lambda f: (f, None)])
def test_a_loss_that_is_cut_off_from_the_network_is_refused(answer):
    class Net(nn.Linear):
        def forward(self, x):
            return answer(super().forward(x))

    net, logits = Net(4, 2), lambda f: f["logits"] if isinstance(f, dict) else f[0] if isinstance(f, tuple) else f
    good = Loss(lambda f, y: torch.nn.functional.cross_entropy(logits(f), y), reduction="mean")
    cut = Loss(lambda f, y: torch.nn.functional.cross_entropy(logits(f).detach(), y), reduction="mean")
    batch = Batch((torch.randn(6, 4),), target=torch.arange(6) % 2)
    objective_of(net, good).check(net, batch)
    with pytest.raises(DataError, match=r"does not depend on the network's output.*\.detach\(\)"):
        objective_of(net, cut).check(net, batch)


def test_a_given_n_data_is_taken_and_checked():
    net, y = mlp(2), (X[:, 0] > 0).long()
    endless = batches(X, y)
    read = []

    class Counted(list):
        def __iter__(self):
            for raw in endless:
                read.append(1)
                yield raw

    assert objective_of(net).prepare(net, Counted(endless), 1000) == 1000 and len(read) == 1
    for n_data, text in (
        (10, "smaller than one batch"),
        (0, "must be positive"),
        (math.nan, "must be positive"),
        ("9", "got str"),
    ):
        with pytest.raises(DataError, match=text):
            objective_of(net).prepare(net, batches(X, y), n_data)
    with pytest.raises(DataError, match="empty"):
        objective_of(net).prepare(net, [])


def test_functions_are_functions_and_the_users_likelihood_is_left_alone():
    mine = Regression()
    net = mlp()
    objective = objective_of(net, mine)
    objective.prepare(net, batches(X, 100 * Y))
    assert float(mine.scale) == 1 and objective.likelihood is not mine
    with pytest.raises(OckhamError, match="output= must be a function; got int"):
        objective_of(net, output=3)
    with pytest.raises(OckhamError, match="no parameters"):
        objective_of(nn.ReLU())


# ------------------------------------------------------------------ units
@pytest.mark.parametrize("axis", [1, -1])
def test_statistics_are_those_of_the_whole(axis):
    y = torch.randn(60, 4, 3, generator=g()) * torch.arange(1.0, 5)[:, None] + 1e4
    weight = torch.rand(60, generator=g(2))
    statistics = TargetStatistics(axis)
    for part, w in zip(y.split(7), weight.split(7), strict=True):
        statistics.add(part, w[:, None, None])
    columns = y.movedim(axis, -1).flatten(0, -2).double()
    w = weight[:, None, None].expand(y.shape).movedim(axis, -1).flatten(0, -2).double()
    mean = (w * columns).sum(0) / w.sum(0)
    std = ((w * (columns - mean).square()).sum(0) / w.sum(0)).sqrt()
    torch.testing.assert_close(statistics.each(), (mean, std))
    assert statistics.shaped(mean).shape == ((4, 1) if axis == 1 else (3,))
    pooled = (w * columns).sum() / w.sum()
    torch.testing.assert_close(statistics.pooled()[0][0], pooled)


class Shaped(nn.Module):
    """A network whose last layer is followed by something."""

    def __init__(self, after, outputs=2, bias=True):
        super().__init__()
        self.net, self.after = mlp(outputs, bias=bias), after

    def forward(self, x):
        return self.after(self.net(x))


@pytest.mark.parametrize(
    ("after", "rows"),
    [
        (lambda f: f, True),
        (lambda f: f.flatten().view(-1, 2), True),
        (lambda f: f[:, None], False),  # one row and two columns: outputs are counted on axis 1
        (lambda f: f.relu(), None),
        (lambda f: f.flip(1), False),
        (lambda f: f.sum(1, keepdim=True).expand(-1, 2), None),
        (lambda f: f * 2, None),
    ],
)
def test_the_head_is_found_by_trying(after, rows):
    net = Shaped(after).eval()
    found = find_head(net, lambda: net(X), outputs=2, axis=1)
    assert (None if found is None else found.rows) == rows
    if found is not None:
        before, factor, shift = net(X).detach(), torch.tensor([3.0]), torch.tensor([-7.0])
        rescale_(net, found, factor, shift)
        torch.testing.assert_close(net(X), 3 * before - 7)


def test_tied_and_frozen_heads_are_left_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).tanh())

    net = Tied().eval()
    assert find_head(net, lambda: net(X), outputs=3, axis=1) is None
    frozen = mlp(2).eval()
    frozen[2].requires_grad_(False)
    assert find_head(frozen, lambda: frozen(X), outputs=2, axis=1) is None


def test_convolutions_are_heads_of_dense_regressions():
    net = seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 1)))
    x = torch.randn(20, 1, 5, 5, generator=g())
    y = torch.cat([1000 * x + 3, x.abs() / 1000], 1)
    objective = objective_of(net, "regression")
    assert objective.prepare(net, batches(x, y, size=10)) == y.numel() and objective.head.rows
    assert objective.likelihood.scale.shape == (2, 1, 1)
    torch.testing.assert_close(
        objective.likelihood.standard(y).std((0, 2, 3)), torch.ones(2).double(), rtol=0.01, atol=0
    )


def test_a_pretrained_network_is_put_into_standard_units_and_back():
    scale, shift = 1e4, 3e5
    net = nn.Linear(3, 1)
    with torch.no_grad():
        net.weight.copy_(scale * torch.tensor([[2.0, -1.0, 0.0]]))
        net.bias.fill_(shift)
    target, before = scale * Y + shift, net(X).detach()
    objective = objective_of(net, "regression")
    objective.prepare(net, batches(X, target))
    spread = float(target.std(correction=0))
    assert float(net.weight.detach().abs().max()) < 2
    torch.testing.assert_close(net(X) * spread + target.mean(), before, rtol=1e-5, atol=1)
    noise = float(objective.likelihood.noise_variance)
    assert noise == pytest.approx(float((target - before).square().mean()), rel=1e-3)
    back, _ = objective.finished(copy.deepcopy(net), ockham.Posterior({}, 1.0))
    torch.testing.assert_close(back(X), before, rtol=1e-5, atol=1)


def test_a_fresh_network_is_not_touched_by_the_look():
    net = mlp()
    before = copy.deepcopy(net.state_dict())
    objective_of(net, "regression").prepare(net, batches(X, 1e3 * Y + 50))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_networks_without_a_head_keep_their_unit_and_say_so_when_it_is_far():
    net = Shaped(torch.relu, outputs=1)
    objective = objective_of(net, "regression")
    with pytest.warns(OckhamWarning, match="far from the unit scale.*standardise"):
        objective.prepare(net, batches(X, 1e4 * Y.abs()))
    assert objective.head is None and float(objective.likelihood.scale) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective_of(net, "regression").prepare(net, batches(X, Y.abs()))


def test_a_head_without_bias_has_no_location():
    net = mlp(bias=False)
    objective = objective_of(net, "regression")
    objective.prepare(net, batches(X, 10 * Y + 40))
    assert float(objective.likelihood.location) == 0
    assert float(objective.likelihood.scale) == pytest.approx(float((10 * Y + 40).square().mean().sqrt()), rel=1e-5)


def test_the_posterior_goes_along_with_its_network():
    net = mlp(2).eval()
    moments = {}
    for name, p in net.named_parameters():
        keep = torch.rand(p.shape, generator=g(4)) > 0.3
        mean = p.detach() * keep
        p.data.copy_(mean)
        precision = (10 + 90 * torch.rand(p.shape, generator=g(5))).masked_fill(~keep, math.inf)
        moments[name] = ockham.Gaussian(mean, precision, torch.tensor(4.0), torch.tensor(0.0), keep)
    posterior = ockham.Posterior(moments, 100)
    head = find_head(net, lambda: net(X), outputs=2, axis=1)
    factor, shift = torch.tensor([1e3, 1e-3], dtype=torch.float64), torch.tensor([5e4, -2.0], dtype=torch.float64)
    other = copy.deepcopy(net)
    rescale_(other, head, factor, shift)
    changed = rescaled(posterior, head, factor, shift)
    for name, p in other.named_parameters():
        torch.testing.assert_close(p.detach(), changed[name].mean)
        assert torch.equal(changed[name].keep, posterior[name].keep)
    one, two = (ockham.score(p) for p in (posterior, changed))
    torch.testing.assert_close(one["2.weight"], two["2.weight"], rtol=1e-4, atol=1e-4)
    draws = {}
    for label, model, source in (("before", net, posterior), ("after", other, changed)):
        found = ockham.predict_regression(model, source, X, noise_variance=1.0, draws=4)
        draws[label] = found.mean
    torch.testing.assert_close(factor.float() * draws["before"] + shift.float(), draws["after"], rtol=1e-4, atol=1e-2)


def test_a_bias_that_may_be_absent_keeps_its_mean_and_variance():
    net = nn.Linear(3, 1)
    inclusion = torch.tensor([0.3])
    bias = ockham.Gaussian(torch.tensor([2.0]), torch.tensor([4.0]), torch.tensor(1.0), torch.tensor(0.0),
                           torch.tensor([True]), inclusion=inclusion)  # fmt: skip
    head = find_head(net, lambda: net(X), outputs=1, axis=1)
    got = rescaled(ockham.Posterior({"bias": bias}, 1.0), head, torch.tensor([10.0]), torch.tensor([7.0]))["bias"]
    variance = 0.3 * 0.25 + 0.3 * 0.7 * 4
    assert float(got.mean) == pytest.approx(10 * 0.6 + 7) and float(got.inclusion) == 1
    assert float(got.precision) == pytest.approx(1 / (100 * variance), rel=1e-5)


@pytest.mark.filterwarnings("ignore::ockham.errors.OckhamWarning")
def test_wholly_frozen_modules_stay_in_evaluation_mode():
    net = nn.Sequential(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)),
        nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)),
        nn.Dropout(0.5),
    )
    net[0].requires_grad_(False)
    net[1][0].bias.requires_grad_(False)
    train_(net)
    assert [m.training for m in net[0].modules()] == [False] * 4
    assert all(m.training for m in (net, net[1], net[1][0], net[1][1], net[2]))
    loader = batches(X + 5, (X[:, 0] > 0).long())
    before = net[0][1].running_mean.clone()
    assert ockham.refresh_batchnorm(net, loader) == 0 and torch.equal(net[0][1].running_mean, before)
    result = ockham.compress(nn.Sequential(net, nn.Linear(4, 2)), loader, training=ockham.Training(epochs=2))
    assert torch.equal(result.model[0][0][1].running_mean, before)


# ------------------------------------------------------------------ the law of units
@pytest.mark.filterwarnings("ignore::ockham.errors.OckhamWarning")
def test_units_change_no_mask_and_scale_every_number():
    """Scaled by 10^+-6 and shifted by 10^4 spreads: the same masks, the same R2, intervals and noise that scale."""
    x = torch.randn(160, 4, generator=g())
    y = (torch.stack([2 * x[:, 0] - x[:, 1], x[:, 2].tanh()], 1) + 0.2 * torch.randn(160, 2, generator=g(1))).double()
    training = ockham.Training(epochs=30, learning_rate=1e-2)
    found = []
    for scale, shift in ((1.0, 0.0), (1e6, 0.0), (1e-6, 0.0), (1.0, 1e4), (1e6, -1e10)):
        net = seeded(lambda: nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 2)))
        data = batches(x, scale * y + shift, size=40)
        result = ockham.compress(net, data, likelihood="regression", training=training)
        p = result.predict(x)
        r2 = 1 - ((p.mean - (scale * y + shift)) / scale).square().sum() / (y - y.mean(0)).square().sum()
        found.append((result.keep, float(r2), p.std / scale, result.noise_variance / scale**2))
        torch.testing.assert_close(
            result.model(x) / scale, p.mean / scale, rtol=0.2, atol=0.2 + abs(shift) / scale * 1e-6
        )
    keep, r2, std, noise = found[0]
    assert r2 > 0.8 and sum(int((~k).sum()) for k in keep.values()) > 10
    for other in found[1:]:
        assert all(torch.equal(k, other[0][n]) for n, k in keep.items())
        assert other[1] == pytest.approx(r2, abs=2e-3)
        torch.testing.assert_close(other[2].double(), std.double(), rtol=0.02, atol=1e-3)
        torch.testing.assert_close(other[3], noise, rtol=0.02, atol=0)


def test_gates_and_the_adam_yardstick_learn_in_any_unit_too():
    from ockham.methods.gates.training import GateCompression, GateTraining

    y = 1e5 * Y + 1e6
    job = GateCompression(mlp(), X[:2], batches(X, y), likelihood="regression",
                          training=GateTraining(epochs=40, fine_tune=5, learning_rate=1e-2))  # fmt: skip
    for _ in job.engine:
        pass
    result = job.engine.result()
    error = (result.model(X) - y).square().mean() / y.var()
    assert float(error.detach()) < 0.1
    spread = (result.model(X) - y).square().mean().item()
    assert 0.3 < float(result.noise_variance) / spread < 5  # the noise of the gates is in it, too


def test_classes_are_untouched_by_all_this():
    net = mlp(2)
    model, posterior = objective_of(net, Classification()).finished(net, ockham.Posterior({}, 1.0))
    assert model is net and posterior.likelihood == "classification" and posterior.noise_variance is None
