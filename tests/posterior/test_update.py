"""One step against the same step by autograd: the loss with its KL written down, torch's Adam on mean and ln std."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ockham.fit.mean_field import MeanField
from ockham.fit.priors import FixedPrior

F64 = torch.float64


class Target:
    """A non-quadratic loss in one vector, so that mean and draw matter."""

    def __init__(self, n=6):
        g = torch.Generator().manual_seed(5)
        self.start = torch.randn(n, generator=g, dtype=F64)
        self.a = torch.randn(n, n, generator=g, dtype=F64)

    def loss(self, w):
        return (self.a @ w).tanh().square().mean() + 0.1 * w.pow(4).mean()


def reference(target, noise, *, n_data, lr, std, p0, m0=0.0, temperature=1.0, warmup=0, betas=(0.9, 0.999)):
    """Trajectory of (mean, std) for given noise vectors."""
    mean = target.start.clone().requires_grad_()
    log_std = torch.full_like(target.start, math.log(std)).requires_grad_()
    adam = torch.optim.Adam([mean, log_std], lr=lr, betas=betas, eps=1e-8)
    prior = Normal(torch.tensor(m0, dtype=F64), torch.tensor(p0**-0.5, dtype=F64))
    for k, e in enumerate(noise, start=1):
        adam.zero_grad()
        weight = min(1.0, k / warmup) if warmup else 1.0
        kl = kl_divergence(Normal(mean, log_std.exp()), prior).sum()
        (target.loss(mean + e * log_std.exp()) + weight * temperature / n_data * kl).backward()
        adam.step()
    return mean.detach(), log_std.detach().exp()


def run(target, steps, **options):
    """Our optimizer, and the noise it used, read off the draws."""
    w = torch.nn.Parameter(target.start.clone())
    opt = MeanField([("w", w)], **options)
    noise = []
    for _ in range(steps):
        opt.zero_grad()
        mean = w.detach().clone()
        std = opt.posterior()["w"].std if noise else torch.full_like(mean, options["initial_std"])
        with opt.sampled():
            noise.append((w.detach() - mean) / std)
            target.loss(w).backward()
        opt.step()
    return w.detach(), opt.posterior()["w"].std, noise


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"prior_mean": 0.7},
        {"temperature": 0.3},
        {"kl_warmup": 5},
        {"kl_warmup": 40, "temperature": 2.0, "betas": (0.5, 0.9)},
    ],
)
def test_trajectory_equals_autograd_with_adam(extra):
    target = Target()
    w, std, noise = run(target, 12, n_data=9.0, lr=0.03, prior=FixedPrior(0.4), initial_std=0.2, **extra)
    names = {"prior_mean": "m0", "kl_warmup": "warmup"}
    same = {names.get(k, k): v for k, v in extra.items()}
    mean, want = reference(target, noise, n_data=9.0, lr=0.03, std=0.2, p0=2.5, **same)
    torch.testing.assert_close(w, mean, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(std, want, rtol=1e-9, atol=1e-10)


def test_warmup_weight_at_a_given_step_by_hand():
    # betas 0: Adam moves by lr * g / (|g| + eps); a large eps makes that lr * g / eps, the gradient itself
    w = torch.nn.Parameter(torch.tensor([2.0], dtype=F64))
    opt = MeanField(
        [("w", w)], n_data=10, lr=1.0, betas=(0, 0), eps=1e6, kl_warmup=4, prior=FixedPrior(0.5), temperature=3.0
    )
    moved = []
    for _ in range(6):
        opt.zero_grad()
        before = float(w.detach())
        with opt.sampled():
            (0.0 * w).sum().backward()
        opt.step()
        moved.append((before - float(w.detach())) * 1e6)
    want = [min(1, k / 4) * 3.0 / 10 * 2.0 * 2.0 for k in range(1, 7)]  # (k T / N) P0 mean
    assert moved == pytest.approx(want, rel=1e-4)


def test_groups_have_their_own_prior_and_learning_rate():
    one, two = Target(4), Target(6)
    a, b = (torch.nn.Parameter(t.start.clone()) for t in (one, two))
    groups = [
        {"params": [("a", a)], "lr": 0.05, "prior": FixedPrior(4.0), "initial_std": 0.1},
        {"params": [("b", b)], "prior_mean": 0.5},
    ]
    opt = MeanField(groups, n_data=20, lr=0.01, initial_std=0.3)
    before = [p.detach().clone() for p in (a, b)]
    opt.zero_grad()
    with opt.sampled():
        noise = [(a.detach() - before[0]) / 0.1, (b.detach() - before[1]) / 0.3]
        (one.loss(a) + two.loss(b)).backward()
    opt.step()
    wants = [
        reference(one, noise[:1], n_data=20, lr=0.05, std=0.1, p0=0.25),
        reference(two, noise[1:], n_data=20, lr=0.01, std=0.3, p0=1.0, m0=0.5),
    ]
    for p, name, (mean, std) in zip((a, b), "ab", wants, strict=True):
        torch.testing.assert_close(p.detach(), mean, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(opt.posterior()[name].std, std, rtol=1e-9, atol=1e-10)
    assert float(opt.posterior()["a"].prior_precision) == 0.25
    assert float(opt.posterior()["b"].prior_mean) == 0.5


def test_group_added_in_training_joins_with_its_own_count():
    target, late = Target(4), Target(6)
    a, b = (torch.nn.Parameter(t.start.clone()) for t in (target, late))
    opt = MeanField([("a", a)], n_data=20, lr=0.02, initial_std=0.1)
    for k in range(5):
        if k == 3:
            opt.add_param_group({"params": [("b", b)], "lr": 0.05, "kl_warmup": 8})
        opt.zero_grad()
        with opt.sampled():
            if k == 3:
                first = (b.detach() - late.start) / 0.1
            loss = target.loss(a) + (late.loss(b) if k >= 3 else 0)
            loss.backward()
        opt.step()
        if k == 3:
            mean, std = reference(late, [first], n_data=20, lr=0.05, std=0.1, p0=1.0, warmup=8)
            torch.testing.assert_close(b.detach(), mean, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(opt.posterior()["b"].std, std, rtol=1e-9, atol=1e-10)
    assert list(opt.posterior()) == ["a", "b"]


def test_kl_against_torch_distributions(toy64):
    if not toy64.contract.gaussian:
        pytest.skip("its KL has its own test")
    _, opt = toy64.train(4, prior=FixedPrior(0.3), **{k: 0.2 for k in {"prior_mean"} & toy64.contract.options})
    want = 0.0
    for g in opt.posterior().values():
        prior = Normal(g.prior_mean.expand_as(g.mean), g.prior_precision.rsqrt().expand_as(g.mean))
        want += float(kl_divergence(Normal(g.mean, g.std), prior).sum())
    assert opt.kl() == pytest.approx(want, rel=1e-11)


def test_kl_is_a_sum_and_not_a_mean(toy):
    one, many = (toy.over([("w", torch.nn.Parameter(torch.ones(n)))], n_data=10).kl() for n in (1, 1000))
    assert many == pytest.approx(1000 * one, rel=1e-6)
    if toy.contract.gaussian and toy.contract.draws:
        assert one == pytest.approx(0.5 * (0.01 + 1) - 0.5 - math.log(0.1), rel=1e-5)
