"""The optimizer inside everybody's loop: closures, accumulation, clipping, schedulers, mixed precision, bad input."""

from __future__ import annotations

import math

import pytest
import torch

import ockham
from ockham.errors import OckhamError
from ockham.fit.mean_field import MeanField
from ockham.fit.priors import FixedPrior


def values(net, opt):
    return [p.detach().clone() for p in net.parameters()] + [g.precision for g in opt.posterior().values()]


def assert_same(a, b, **tolerance):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **(tolerance or {"rtol": 0, "atol": 0}))


def test_it_is_a_torch_optimizer_and_learns(toy):
    net, opt = toy.make(lr=0.02)
    assert isinstance(opt, torch.optim.Optimizer)
    losses = [float(toy.step(net, opt)) for _ in range(150)]
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])


def test_closure_equals_the_explicit_loop(toy):
    net, opt = toy.make()
    for _ in range(5):

        def closure():
            opt.zero_grad()
            loss = toy.loss(net)
            loss.backward()
            return loss

        returned = opt.step(closure)
        assert returned.requires_grad and math.isfinite(returned.item())
    assert_same(values(net, opt), values(*toy.train(5)))


def test_step_without_a_closure_returns_nothing(toy):
    net, opt = toy.make()
    with opt.sampled():
        toy.loss(net).backward()
    assert opt.step() is None


def test_microbatches_share_a_draw_and_equal_one_big_batch(toy64):
    net, opt = toy64.make()
    for _ in range(4):
        opt.zero_grad()
        for part in range(4):
            with opt.sampled():
                (toy64.loss(net, slice(4 * part, 4 * part + 4)) / 4).backward()
        opt.step()
    assert_same(values(net, opt), values(*toy64.train(4)), rtol=1e-9, atol=1e-11)


def test_step_needs_a_draw(toy):
    net, opt = toy.make()
    toy.loss(net).backward()
    with pytest.raises(OckhamError, match="step\\(\\) without a draw"):
        opt.step()
    with opt.sampled():
        toy.loss(net).backward()
    opt.step()
    with pytest.raises(OckhamError, match="without a draw"):
        opt.step()  # a second time on the same draw
    with opt.sampled():
        toy.loss(net).backward()
    opt.zero_grad()
    with pytest.raises(OckhamError, match="without a draw"):
        opt.step()  # zero_grad ended it


def test_zero_grad_inside_the_block_keeps_the_draw(toy):
    net, opt = toy.make()
    with opt.sampled():
        inside = net[0].weight.detach().clone()
        opt.zero_grad()
        toy.loss(net).backward()
    with opt.sampled():
        assert torch.equal(inside, net[0].weight)
    opt.step()


def test_zero_grad_keeps_its_torch_meaning(toy):
    net, opt = toy.make()
    with opt.sampled():
        toy.loss(net).backward()
    opt.zero_grad(set_to_none=False)
    assert all(bool((p.grad == 0).all()) for p in net.parameters())
    opt.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_gradients_are_left_as_they_were_by_the_step(toy):
    net, opt = toy.make()
    with opt.sampled():
        toy.loss(net).backward()
    before = [p.grad.clone() for p in net.parameters()]
    opt.step()
    assert_same([p.grad for p in net.parameters()], before)


def test_clipping_reaches_the_spread_too(toy64):
    # the gradient of ln std is formed in step() from the final gradient: halving the gradient equals halving the loss
    def run(scale_loss, scale_grad):
        net, opt = toy64.make()
        for _ in range(3):
            opt.zero_grad()
            with opt.sampled():
                (toy64.loss(net) * scale_loss).backward()
            for p in net.parameters():
                p.grad.mul_(scale_grad)
            opt.step()
        return values(net, opt)

    assert_same(run(0.5, 1.0), run(1.0, 0.5), rtol=1e-12, atol=1e-14)
    net, opt = toy64.make()
    with opt.sampled():
        toy64.loss(net).backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    opt.step()
    assert all(bool(torch.isfinite(v).all()) for v in values(net, opt))


def test_schedulers_set_the_learning_rate(toy, snapshot):
    net, opt = toy.make(lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(opt, milestones=[2], gamma=1e-12)
    for _ in range(2):
        toy.step(net, opt)
        schedule.step()
    before, std = snapshot(net), opt.posterior()["0.bias"].std
    toy.step(net, opt)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p, before[name], rtol=1e-6, atol=1e-9)
    if toy.contract.spread_is_stepped:  # that of IVON is an average
        torch.testing.assert_close(opt.posterior()["0.bias"].std, std, rtol=1e-6, atol=0)


def test_bfloat16_autocast_keeps_float32_weights(toy):
    net, opt = toy.make(lr=0.02)
    losses = []
    for _ in range(60):
        opt.zero_grad()
        with opt.sampled(), torch.autocast("cpu", dtype=torch.bfloat16):
            loss = toy.loss(net)
        loss.backward()  # after the block, as the autocast recipe has it: the graph remembers the draw
        opt.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert all(p.dtype is torch.float32 for p in net.parameters())


def scaled_step(toy, net, opt, scaler, spoil=False):
    opt.zero_grad()
    with opt.sampled():
        scaler.scale(toy.loss(net)).backward()
    if spoil:
        net[0].weight.grad[0, 0] = math.inf
    scaler.unscale_(opt)
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1e6)
    scaler.step(opt)
    scaler.update()


def test_grad_scaler_changes_nothing_but_the_scale(toy64):
    net, opt = toy64.make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for _ in range(4):
        scaled_step(toy64, net, opt, scaler)
    assert_same(values(net, opt), values(*toy64.train(4)), rtol=1e-10, atol=1e-12)


def test_a_step_skipped_by_the_scaler_changes_nothing_and_the_next_one_works(toy, snapshot):
    net, opt = toy.train(2)
    before, precision = snapshot(net), opt.posterior()["0.weight"].precision
    scaler = torch.amp.GradScaler("cpu")
    scaled_step(toy, net, opt, scaler, spoil=True)
    assert snapshot.same(net, before) and torch.equal(opt.posterior()["0.weight"].precision, precision)
    scaled_step(toy, net, opt, scaler)
    assert not snapshot.same(net, before)
    assert all(bool(torch.isfinite(v).all()) for v in values(net, opt))


def test_deepcopied_or_compiled_callers_see_ordinary_parameters(toy):
    net, opt = toy.make()
    identities = [id(p) for p in net.parameters()]
    storage = [p.data_ptr() for p in net.parameters()]
    toy.step(net, opt)
    assert identities == [id(p) for p in net.parameters()] and storage == [p.data_ptr() for p in net.parameters()]


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("option", "bad"),
    [
        ("n_data", 0),
        ("n_data", -5),
        ("n_data", math.nan),
        ("n_data", "many"),
        ("prior_mean", torch.zeros(2)),
        ("prior_mean", math.nan),
        ("prior_variance", -1.0),
        ("lr", 0.0),
        ("eps", -1e-8),
        ("initial_std", 0.0),
        ("initial_std", math.inf),
        ("temperature", 0.0),
        ("kl_warmup", -1),
        ("prior_interval", 0),
        ("betas", (0.9, 1.0)),
        ("prior", 1.0),
    ],
)
def test_settings_out_of_range_are_named(toy, option, bad):
    net = toy.net()
    if option not in toy.contract.options:
        pytest.skip("no such option")
    with pytest.raises(OckhamError, match=rf"{toy.method.__name__}: {option}"):
        toy.method(net.named_parameters(), **{"n_data": 10, option: bad})
    if option != "n_data":
        with pytest.raises(OckhamError, match=rf"{toy.method.__name__}: {option}"):
            toy.method([{"params": list(net.named_parameters()), option: bad}], n_data=10)


def test_a_bad_group_is_not_added(toy):
    net, opt = toy.train(1)
    extra = torch.nn.Parameter(torch.ones(2))
    for group, message in (
        ({"params": [("extra", extra)], "lr": -1.0}, "lr"),
        ({"params": [("0.weight", extra)]}, "names must differ"),
        ({"params": [("extra", torch.nn.Parameter(torch.ones(2, dtype=torch.half)))]}, "torch.float16"),
    ):
        with pytest.raises(OckhamError, match=message):
            opt.add_param_group(group)
    assert len(opt.param_groups) == 1
    toy.step(net, opt)
    opt.add_param_group({"params": [("extra", extra)]})


def test_parameters_need_names(toy):
    with pytest.raises(OckhamError, match="named_parameters"):
        toy.over(toy.net().parameters())


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.complex64])
def test_parameters_too_short_for_noise_are_refused_with_a_way_out(dtype):
    p = torch.nn.Parameter(torch.ones(2, dtype=dtype))
    with pytest.raises(OckhamError, match=r"'w' is torch\.\w+.*autocast"):
        MeanField([("w", p)], n_data=10)


def test_sparse_gradients_are_refused_before_anything_moves(toy, snapshot):
    net = torch.nn.ModuleDict({"lin": torch.nn.Linear(3, 1), "emb": torch.nn.Embedding(4, 3, sparse=True)})
    opt = toy.over(net.named_parameters())
    with opt.sampled():
        net["lin"](net["emb"](torch.tensor([1, 2]))).sum().backward()
    before = snapshot(net)
    with pytest.raises(OckhamError, match=r"'emb\.weight' has a sparse gradient.*sparse=False"):
        opt.step()
    assert snapshot.same(net, before) and len(opt.posterior()) == 0  # not half a step


def test_embeddings_attention_and_recurrence_train(toy):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(6, 8)
            self.attend = torch.nn.MultiheadAttention(8, 2, batch_first=True)
            self.recur = torch.nn.LSTM(8, 8, batch_first=True)

        def forward(self, x):
            h = self.embed(x)
            return self.recur(self.attend(h, h, h, need_weights=False)[0])[0] @ self.embed.weight.T

    net = Net()
    opt = toy.over(net.named_parameters(), prior=FixedPrior(0.5))
    for _ in range(2):
        opt.zero_grad()
        with opt.sampled():
            net(torch.tensor([[0, 3, 5]])).logsumexp(-1).mean().backward()
        opt.step()
    assert set(opt.posterior()) == {n for n, _ in net.named_parameters()}


@pytest.mark.parametrize("method", [ockham.MeanField, ockham.IVON, ockham.SpikeSlab])
def test_an_unknown_keyword_is_refused_with_the_nearest_one(method):
    with pytest.raises(TypeError, match=rf"{method.__name__}\(\) got .* 'temprature'; did you mean 'temperature"):
        method(torch.nn.Linear(2, 1).named_parameters(), n_data=10, temprature=0.5)
    optimizer = method(torch.nn.Linear(2, 1).named_parameters(), n_data=10, temperature=0.5, kl_warmup=7)
    assert [optimizer.defaults[k] for k in ("temperature", "kl_warmup", "prior_interval")] == [0.5, 7, 100]
