"""IVON: its steps written out, its optimum in a conjugate model, and whether it says when its spread means nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ockham import IVON, EmpiricalBayes, FixedPrior, GroupScale, diagnose, laplace
from ockham.errors import OckhamError

F64 = torch.float64


def quadratic(w):
    return (0.5 * torch.tensor([3.0, 0.2, 1.0], dtype=F64) * w.square() + w.sin()).sum()


def test_steps_are_those_of_the_published_algorithm():
    n, temperature, prior, std, lr, b1, b2, m0 = 50.0, 0.7, 4.0, 0.1, 0.05, 0.8, 0.9, 0.3
    w = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=F64))
    opt = IVON(
        [("w", w)],
        n_data=n,
        lr=lr,
        betas=(b1, b2),
        prior=FixedPrior(1 / prior),
        prior_mean=m0,
        initial_std=std,
        temperature=temperature,
    )
    lam, delta = n / temperature, prior * temperature / n  # the paper's lambda and delta
    m, h, g = w.detach().clone(), torch.full((3,), 1 / (lam * std**2) - delta, dtype=F64), torch.zeros(3, dtype=F64)
    scale = float(h[0] + delta)
    for t in range(1, 7):
        opt.zero_grad()
        with opt.sampled():
            theta = w.detach().clone()
            quadratic(w).backward()
        opt.step()
        leaf = theta.clone().requires_grad_()
        (grad,) = torch.autograd.grad(quadratic(leaf), leaf)
        sigma2 = 1 / (lam * (h + delta))
        new = grad * (theta - m) / sigma2
        g = b1 * g + (1 - b1) * grad
        h = b2 * h + (1 - b2) * new + 0.5 * (1 - b2) ** 2 * (h - new) ** 2 / (h + delta)
        m = m - lr * scale * (g / (1 - b1**t) + delta * (m - m0)) / (h + delta)
        torch.testing.assert_close(w.detach(), m, rtol=1e-10, atol=0)
        torch.testing.assert_close(opt.posterior()["w"].precision, lam * (h + delta), rtol=1e-10, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_fit_reaches_the_mean_field_optimum_of_a_linear_model(temperature):
    g = torch.Generator().manual_seed(11)
    x = torch.randn(60, 4, generator=g, dtype=F64)
    x = x + 0.6 * x.roll(1, 1)
    y = x @ torch.tensor([1.0, -0.5, 0.0, 2.0], dtype=F64) + 1.4 * torch.randn(60, generator=g, dtype=F64)
    precision = x.T @ x / 2 / temperature + 10 * torch.eye(4, dtype=F64)
    mean = torch.linalg.solve(precision, x.T @ y / 2 / temperature)
    w = nn.Parameter(torch.zeros(4, dtype=F64))
    steps = 3000
    opt = IVON(
        [("w", w)], n_data=60, lr=0.1, steps=steps, prior=FixedPrior(0.1), initial_std=0.1, temperature=temperature
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1 - k / steps)
    for _ in range(steps):
        opt.zero_grad()
        with opt.sampled():
            (0.25 * (y - x @ w).square()).mean().backward()
        opt.step()
        schedule.step()
    got = opt.posterior()["w"]
    assert float(((got.mean - mean) * precision.diagonal().sqrt()).abs().max()) < 0.06
    assert float((got.precision / precision.diagonal()).log().abs().max()) < 0.15
    assert opt.posterior().temperature == temperature


def test_weights_the_data_never_touch_return_to_the_prior():
    w = nn.Parameter(torch.full((50,), 0.2, dtype=F64))
    opt = IVON(
        [("w", w)], n_data=10, lr=0.5, betas=(0.9, 0.97), prior=FixedPrior(0.09), prior_mean=-0.1, initial_std=0.05
    )
    for _ in range(700):
        opt.zero_grad()
        with opt.sampled():
            (0.0 * w).sum().backward()
        opt.step()
    g = opt.posterior()["w"]
    assert float((g.mean + 0.1).abs().max()) < 1e-3 and float((g.std / 0.3 - 1).abs().max()) < 1e-3
    assert opt.kl() == pytest.approx(0.0, abs=1e-3)


def test_precision_stays_positive_under_any_gradient():
    w = nn.Parameter(torch.zeros(200, dtype=F64))
    opt = IVON([("w", w)], n_data=10, lr=1e-3, betas=(0.9, 0.2), initial_std=0.3)
    g = torch.Generator().manual_seed(0)
    for _ in range(100):
        opt.zero_grad()
        with opt.sampled():
            (w * torch.randn(200, generator=g, dtype=F64) * 30).sum().backward()
        opt.step()
        assert bool((opt.posterior()["w"].precision > 0).all())


def test_the_share_of_the_first_hessian_is_known(toy):
    for options, want in (
        ({"steps": 40}, (1 - 3 / 40) ** 20),
        ({"betas": (0.9, 0.99)}, 0.99**20),
        ({}, 0.99**20),
        ({"betas": (0.9, 0.999999)}, 1.0),
    ):
        net = toy.net()
        opt = IVON(net.named_parameters(), n_data=200, lr=0.01, initial_std=0.1, **options)
        assert opt.health().first_hessian_left == 1.0
        for _ in range(20):
            toy.step(net, opt)
        health = opt.health()
        assert health.first_hessian_left == pytest.approx(want, rel=1e-3) and health.steps == 20
        assert any("first Hessian" in text for text in health.warnings) == (want > 0.25)


def test_a_posterior_that_is_all_initialisation_is_found_out(toy):
    net = toy.net()
    opt = IVON(net.named_parameters(), n_data=200, lr=0.01, betas=(0.9, 0.999999), initial_std=0.1)
    for _ in range(20):
        toy.step(net, opt)
    assert opt.health().spread < 0.02 and len(opt.health().warnings) >= 2
    assert any("hardly varies" in text for text in diagnose(opt.posterior()).warnings)


def test_warm_start_from_a_trained_network(toy):
    net = toy.net()
    source = laplace(net, [(toy.x, toy.y)], structure="diagonal", likelihood="regression", n_data=200, prior=0.5)
    opt = IVON(net.named_parameters(), n_data=200, prior=FixedPrior(1 / 3.0), initial_std=0.1)
    opt.start_from(source)
    opt.zero_grad()
    with opt.sampled():
        (0 * toy.loss(net)).backward()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    opt.param_groups[0]["betas"] = (0.9, 1 - 1e-12)
    opt.param_groups[0]["lr"] = 1e-12
    opt.step()
    for name, g in opt.posterior().items():  # its curvature, under the optimizer's own prior
        torch.testing.assert_close(g.precision, source[name].precision - 0.5 + 3.0, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(g.mean, before[name])
    with pytest.raises(OckhamError, match="does not fit"):
        IVON(nn.Linear(2, 2).named_parameters(), n_data=1).start_from(source)


def test_a_warm_start_keeps_removed_weights_removed(toy):
    _, opt = toy.train(3)
    opt.remove({"0.weight": torch.arange(30).view(6, 5) % 2 == 0})
    again = toy.net()
    other = IVON(again.named_parameters(), n_data=200, initial_std=0.1)
    other.start_from(opt.posterior())
    assert torch.equal(other.keep()["0.weight"], opt.keep()["0.weight"])
    toy.step(again, other)
    assert bool((again[0].weight[~opt.keep()["0.weight"]] == 0).all())


def test_a_learned_prior_settles_at_its_fixed_point():
    w = nn.Parameter(torch.full((4,), 1.0, dtype=F64))
    opt = IVON(
        [("w", w)],
        n_data=100,
        lr=0.05,
        betas=(0.9, 0.99),
        prior=EmpiricalBayes(0.5, smoothing=1.0),
        prior_interval=5,
        kl_warmup=50,
        initial_std=0.1,
    )
    target = torch.tensor([1.0, 2.0, -1.0, -2.0], dtype=F64)
    for _ in range(1500):
        opt.zero_grad()
        with opt.sampled():
            (0.5 * (w - target).square()).sum().backward()
        opt.step()
    g = opt.posterior()["w"]
    want = 4 / float((g.mean.square() + 1 / g.precision).sum())
    assert float(g.prior_precision) == pytest.approx(want, rel=1e-2)
    assert float((g.mean - target * 100 / (100 + want)).abs().max()) < 0.1


@pytest.mark.parametrize(
    "bad",
    [
        {"n_data": 0},
        {"lr": -1.0},
        {"betas": (1.0, None)},
        {"betas": (0.9, 1.0)},
        {"steps": 0},
        {"initial_std": 2.0},
        {"temperature": math.inf},
        {"prior": 1.0},
        {"prior": GroupScale()},
        {"kl_warmup": -1},
    ],
)
def test_settings_out_of_range_are_named(bad):
    with pytest.raises(OckhamError, match=next(iter(bad))):
        IVON(nn.Linear(2, 2).named_parameters(), **{"n_data": 10, **bad})


def test_momentum_is_half_as_wide_and_a_resumed_run_is_the_same_to_the_bit(toy, tmp_path):
    def made(seed):
        net = toy.net(seed)
        return net, IVON(net.named_parameters(), n_data=200, lr=0.1, steps=8)

    straight, opt = made(0)
    for k in range(8):
        toy.step(straight, opt)
        if k == 2:
            opt.remove({"0.weight": torch.arange(30).view(6, 5) % 4 > 0})
        if k == 4:
            torch.save({"net": straight.state_dict(), "opt": opt.state_dict()}, tmp_path / "s.pt")
    net, other = made(5)
    saved = torch.load(tmp_path / "s.pt", weights_only=True)
    net.load_state_dict(saved["net"])
    other.load_state_dict(saved["opt"])
    for _ in range(3):
        toy.step(net, other)
    for p, q in zip(straight.parameters(), net.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(opt.state[p]["hessian"], other.state[q]["hessian"])
        assert opt.state[p]["exp_avg"].dtype == other.state[q]["exp_avg"].dtype == torch.bfloat16
        assert torch.equal(opt.state[p]["exp_avg"], other.state[q]["exp_avg"])


@pytest.mark.parametrize(("beta2", "batch"), [(0.99, 100), (0.99, 500), (0.999, 1000)])
def test_what_noise_does_to_the_hessian_is_known(beta2, batch):
    """20,000 Gaussian means: curvature 1, gradients with the noise of a batch; the retraction makes more of it."""
    torch.manual_seed(0)
    n, w = 100_000, nn.Parameter(torch.zeros(20_000))
    opt = IVON([("w", w)], n_data=n, lr=1e-6, betas=(0.9, beta2), initial_std=n**-0.5)
    for _ in range(round(4 / (1 - beta2))):
        opt.zero_grad()
        with opt.sampled():
            ((w - torch.randn_like(w) * batch**-0.5) ** 2 / 2).sum().backward()
        opt.step()
    health = opt.health()
    found = float(opt.state[w]["hessian"].mean())
    assert found == pytest.approx(1 + (1 - beta2) * n / batch / 2, rel=0.1)
    assert health.inflation == pytest.approx(found, rel=0.15)
    assert any("too large" in text for text in health.warnings) == (found > 1.5)
