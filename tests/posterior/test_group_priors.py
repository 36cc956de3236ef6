"""One scale per structure: updates against the optimum of the ELBO, layouts, what the optimizer does with them."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import scipy.optimize
import torch
from scipy.special import digamma, gammaln

import ockham
from ockham.errors import OckhamError
from ockham.fit.mean_field import MeanField
from ockham.fit.priors import EmpiricalBayes, GroupHorseshoe, GroupScale, rows


def one(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([v], dtype=torch.float64) for v in values]


def test_the_scale_goes_to_the_maximum_of_the_elbo() -> None:
    count, moment = 7.0, 3.5
    minus = lambda log_v: 0.5 * moment / math.exp(log_v) + 0.5 * count * log_v  # KL as a function of v  # noqa: E731
    best = math.exp(scipy.optimize.minimize_scalar(minus, bounds=(-5, 5), options={"xatol": 1e-10}).x)
    got = GroupScale(1.0, smoothing=1.0).updated_each(*one(1.0, count, moment))
    assert 1 / float(got) == pytest.approx(best, rel=1e-6)
    smoothed = GroupScale(1.0, smoothing=0.3).updated_each(*one(0.5, count, moment))
    assert 1 / float(smoothed) == pytest.approx(0.7 * 2.0 + 0.3 * best, rel=1e-6)


def test_structures_without_weights_stay_and_the_floor_holds() -> None:
    for prior in (GroupScale(), GroupHorseshoe()):
        got = prior.updated_each(torch.tensor([3.0, 3.0]), torch.tensor([0.0, 4.0]), torch.tensor([0.0, 0.0]))
        assert float(got[0]) == 3.0 and torch.isfinite(got).all()
    assert float(GroupScale(smoothing=1.0, floor=1e-4).updated_each(*one(1.0, 4.0, 0.0))) == pytest.approx(1e4)


def test_the_horseshoe_update_maximises_the_elbo_of_its_inverse_gamma_factors() -> None:
    scale, count, moment = 0.5, 9.0, 1.7

    def minus(logs: list[float]) -> float:
        # q(l2) = IG(a, b), q(s) = IG(c, d) for the auxiliary s; E_q of all log-densities plus entropies
        a, b, c, d = (math.exp(v) for v in logs)
        inv, log = a / b, math.log(b) - digamma(a)
        inv_s, log_s = c / d, math.log(d) - digamma(c)
        weights = -0.5 * count * log - 0.5 * inv * moment / scale**2
        local = -0.5 * log_s - 1.5 * log - inv_s * inv  # IG(l2; 1/2, 1/s), up to constants
        mixing = -1.5 * log_s - inv_s  # IG(s; 1/2, 1)
        entropy = sum(p + math.log(r) + gammaln(p) - (1 + p) * digamma(p) for p, r in ((a, b), (c, d)))
        return -(weights + local + mixing + entropy)

    options = {"xatol": 1e-10, "fatol": 1e-14, "maxiter": 20_000, "maxfev": 20_000}
    best = scipy.optimize.minimize(minus, [0.0] * 4, method="Nelder-Mead", options=options)
    a, b = (math.exp(v) for v in best.x[:2])
    got = GroupHorseshoe(scale, sweeps=200).updated_each(*one(1.0, count, moment))
    assert float(got) == pytest.approx(a / b / scale**2, rel=1e-4)


def test_rows_number_weight_and_bias_of_a_module_together() -> None:
    found = rows({"a.weight": (2, 5), "a.bias": (2,), "b.weight": (3, 2), "scale": ()})
    assert found["a.weight"][1].tolist() == found["a.bias"][1].tolist() == [0, 1]
    assert found["b.weight"][1].tolist() == [2, 3, 4] and found["scale"][1].tolist() == [5]


def test_given_units_are_followed_and_the_rest_is_divided_by_row() -> None:
    prior = GroupScale(units={"a.weight": (1, torch.tensor([0, 0, 1]))})
    layout = prior.layout({"a.weight": (2, 3), "b.weight": (2, 2)})
    assert layout["a.weight"][0] == 1 and layout["a.weight"][1].tolist() == [0, 0, 1]
    assert layout["b.weight"][1].tolist() == [2, 3]
    with pytest.raises(OckhamError, match="numbers 3 indices"):
        prior.layout({"a.weight": (2, 4)})


@pytest.mark.parametrize("toy", [MeanField], indirect=True)
def test_a_single_row_learns_what_empirical_bayes_learns(toy) -> None:
    made = []
    for prior in (EmpiricalBayes(0.5, 0.3), GroupScale(0.5, 0.3)):
        net = torch.nn.Linear(5, 1, bias=False)
        with torch.no_grad():
            net.weight.fill_(0.3)
        opt = ockham.MeanField(net.named_parameters(), n_data=200, lr=0.01, prior=prior, kl_warmup=10, prior_interval=5)
        for _ in range(43):
            opt.zero_grad()
            with opt.sampled():
                (net(toy.x) - toy.y[:, :1]).square().mean().backward()
            opt.step()
        made.append(opt.posterior()["weight"])
    assert float(made[0].prior_precision) != 2.0
    assert torch.allclose(made[0].prior_precision.expand(1, 5), made[1].prior_precision, rtol=1e-5)
    assert torch.allclose(made[0].mean, made[1].mean, rtol=1e-5)


@pytest.mark.parametrize("prior", [GroupScale(0.5), GroupHorseshoe(0.5)])
@pytest.mark.parametrize("toy64", [MeanField], indirect=True)
def test_kl_and_the_reported_prior_are_per_weight(toy64, prior) -> None:
    _net, opt = toy64.train(60, prior=prior, prior_interval=7)
    total = torch.zeros((), dtype=torch.float64)
    for g in opt.posterior().values():
        assert g.prior_precision.shape == g.mean.shape
        q = torch.distributions.Normal(g.mean, g.precision.rsqrt())
        p = torch.distributions.Normal(torch.zeros_like(g.mean), g.prior_precision.rsqrt())
        total += torch.distributions.kl_divergence(q, p).sum()
    assert opt.kl() == pytest.approx(float(total), rel=1e-10)
    first = opt.posterior()["0.weight"].prior_precision
    assert (first == first[:, :1]).all() and len(first[:, 0].unique()) == 6
    assert torch.equal(first[:, 0], opt.posterior()["0.bias"].prior_precision)


@pytest.mark.parametrize("toy", [MeanField], indirect=True)
def test_scales_move_only_after_the_warm_up(toy) -> None:
    _net, opt = toy.train(20, prior=GroupScale(0.5), kl_warmup=21, prior_interval=1)
    assert (opt.posterior()["0.weight"].prior_precision == 2.0).all()


@pytest.mark.parametrize("toy64", [MeanField], indirect=True)
def test_one_step_equals_the_same_step_with_autograd(toy64) -> None:
    net, opt = toy64.train(30, prior=GroupScale(0.5), prior_interval=7)
    g = opt.posterior()["0.weight"]
    state = opt.state[net[0].weight]
    mean, log_std = (t.detach().clone().requires_grad_() for t in (g.mean, state["log_std"].view(6, 5)))
    toy64.step(net, opt)
    noise = state["noise"].view(6, 5).double()
    drawn = mean + log_std.exp() * noise
    with torch.no_grad():  # the loss at the draw needs the other parameters' draws as well: take its gradient from p
        gradient = net[0].weight.grad
    kl = (0.5 * g.prior_precision * (log_std.exp().square() + mean.square()) - log_std).sum() / 200
    ((drawn * gradient).sum() + kl).backward()
    beta = 0.9
    before = (state["exp_avg"].view(6, 5) - (1 - beta) * mean.grad) / beta
    assert torch.allclose(before * beta + (1 - beta) * mean.grad, state["exp_avg"].view(6, 5))
    expected = gradient + g.prior_precision * g.mean / 200
    assert torch.allclose(mean.grad, expected, rtol=1e-10)


def test_a_unit_without_use_loses_its_scale() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, 4, generator=g)
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 1))
    settings = {"n_data": 256, "lr": 1e-2, "kl_warmup": 200, "prior_interval": 20}
    opt = ockham.MeanField(net.named_parameters(), prior=GroupScale(), **settings)
    for _ in range(1200):
        opt.zero_grad()
        with opt.sampled():
            (0.5 * (net(x) - 2 * x[:, :1]).square().mean()).backward()
        opt.step()
    variance = 1 / opt.posterior()["0.weight"].prior_precision[:, 0]
    assert int((variance < 0.1).sum()) >= 2 and int((variance > 0.3).sum()) >= 1


@pytest.mark.parametrize("toy", [MeanField], indirect=True)
def test_resumed_equals_never_stopped(toy) -> None:
    options = {"prior": GroupHorseshoe(0.5), "kl_warmup": 5, "prior_interval": 3}
    net, opt = toy.train(20, **options)
    again, other = toy.make(**options)
    again.load_state_dict(net.state_dict())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(10):
        toy.step(net, opt)
        toy.step(again, other)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    for name, g in opt.posterior().items():
        assert torch.equal(g.prior_precision, other.posterior()[name].prior_precision)


@pytest.mark.parametrize("toy", [MeanField], indirect=True)
def test_a_posterior_with_scales_is_saved_small_and_comes_back(toy, tmp_path: Path) -> None:
    _net, opt = toy.train(30, prior=GroupScale(0.5), prior_interval=7)
    posterior = opt.posterior()
    posterior.save(tmp_path / "p.safetensors")
    back = ockham.load_posterior(tmp_path / "p.safetensors")
    for name, g in posterior.items():
        assert torch.equal(back[name].prior_precision, g.prior_precision)


@pytest.mark.parametrize("toy", [MeanField], indirect=True)
def test_a_group_prior_cannot_join_later(toy) -> None:
    _, opt = toy.make()
    with pytest.raises(OckhamError, match="from the start"):
        opt.add_param_group({"params": [("extra", torch.nn.Parameter(torch.ones(2)))], "prior": GroupScale()})


@pytest.mark.parametrize("wrong", [{"variance": 0}, {"smoothing": 1.5}, {"floor": -1}])
def test_settings_are_checked(wrong) -> None:
    with pytest.raises(OckhamError):
        GroupScale(**wrong)


@pytest.mark.parametrize("prior", [ockham.FixedPrior(1.0), GroupScale(), "units"])
def test_a_sliced_optimizer_goes_on_as_the_masked_one(prior) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2)).double()
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)).double()
    stays = torch.tensor([0, 2, 3, 5])
    if prior == "units":
        prior = GroupScale(units={"0.weight": (0, torch.arange(6)), "2.weight": (1, torch.arange(6) + 6)})
    settings = {"n_data": 99, "lr": 1e-2, "prior": prior, "kl_warmup": 5, "prior_interval": 4}
    opt = ockham.MeanField(net.named_parameters(), **settings)

    def step(model, optimizer) -> None:
        optimizer.zero_grad()
        with optimizer.sampled():
            (model(x) - x[:, :2]).square().mean().backward()
        optimizer.step()

    def take(name: str, tensor: torch.Tensor) -> torch.Tensor:
        dim = {"0.weight": 0, "0.bias": 0, "2.weight": 1}.get(name)
        return tensor.clone() if dim is None else tensor.index_select(dim, stays)

    for _ in range(13):
        step(net, opt)
    gone = torch.ones(6, dtype=torch.bool)
    gone[stays] = False
    keep = {"0.weight": torch.ones(6, 4, dtype=torch.bool), "0.bias": ~gone, "2.weight": (~gone).expand(2, 6).clone()}
    keep["0.weight"][gone] = False
    keep["0.weight"].view(-1)[::5] = False
    opt.remove(keep)
    small = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    small.load_state_dict({name: take(name, p.detach()) for name, p in net.named_parameters()})
    cut = opt.sliced(dict(small.named_parameters()), take)
    for _ in range(21):
        step(net, opt)
        step(small, cut)
    for name, g in cut.posterior().items():
        full = opt.posterior()[name]
        assert torch.equal(g.keep, take(name, full.keep))
        for field in ("mean", "precision", "prior_precision"):
            a, b = getattr(g, field), getattr(full, field)
            b = b if b.ndim == 0 else take(name, b.contiguous())
            alive = g.keep if b.ndim else ...
            assert torch.allclose(a[alive], b[alive], rtol=1e-9), (name, field)
