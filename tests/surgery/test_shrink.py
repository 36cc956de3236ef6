"""What a shrunk model keeps of the old one, and what is carried along: optimizer state, posterior."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from ockham.surgery import PlanError, mask, random_plan, shrink, slice_tensor, trace

from .nets import C, head


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(C(3, 8), nn.BatchNorm2d(8), nn.ReLU(), C(8, 8, groups=8), nn.ReLU(), C(8, 6), head(6))


def planned(model, x, ratio=0.5):
    return random_plan(trace(model, x), ratio, generator=torch.Generator().manual_seed(0))


IMAGE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).cos().reshape(2, 3, 8, 8)


def test_attributes_follow_the_shapes(net):
    small = shrink(net, planned(net, IMAGE))
    assert (small[0].out_channels, small[1].num_features) == (4, 4)
    assert (small[3].in_channels, small[3].out_channels, small[3].groups) == (4, 4, 4)
    assert (small[5].in_channels, small[5].out_channels) == (4, 3)


def test_mode_grad_dtype_and_memory_format_are_kept(net):
    net = net.double().to(memory_format=torch.channels_last)
    net[0].weight.requires_grad_(False)
    net.train()
    net[1].eval()
    small = shrink(net, planned(net, IMAGE.double()))
    assert not small[0].weight.requires_grad and small[5].weight.requires_grad
    assert small.training and not small[1].training and net.training and not net[1].training
    assert small[5].weight.dtype == torch.float64
    assert small[5].weight.is_contiguous(memory_format=torch.channels_last)
    assert small[1].num_batches_tracked.dtype == torch.int64


def test_tracing_leaves_the_model_alone(net):
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    ids = [id(p) for p in net.parameters()]
    trace(net, IMAGE)
    assert net.training and ids == [id(p) for p in net.parameters()]
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert not any(isinstance(p.grad, Tensor) for p in net.parameters())


def test_nothing_of_the_small_model_shares_memory(net):
    small = shrink(net, planned(net, IMAGE, 0.0))
    old = {p.data_ptr() for p in net.parameters()}
    assert not old & {p.data_ptr() for p in small.parameters()}


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_as_if_the_structures_had_never_been(kind):
    """A step of the shrunk model is the step of the masked one, sliced: state and all."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)

    def steps(model, optimizer, number):
        for _ in range(number):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()

    optimizer = OPTIMIZERS[kind](net.parameters())
    steps(net, optimizer, 3)
    plan = planned(net, x)
    masked = mask(net, plan)
    twin = OPTIMIZERS[kind](masked.parameters())
    twin.load_state_dict(optimizer.state_dict())
    small, other = shrink(net, plan, optimizer=optimizer)
    assert type(other) is type(optimizer)
    steps(masked, twin, 1)
    steps(small, other, 1)
    for (name, have), want in zip(small.named_parameters(), masked.parameters(), strict=True):
        assert torch.allclose(have, slice_tensor(plan, name, want), rtol=1e-9, atol=1e-12), name
    steps(small, other, 3)


def test_optimizers_that_do_not_fit_are_refused():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    plan = planned(net, torch.zeros(2, 4))
    with pytest.raises(PlanError, match="not one of this model"):
        shrink(net, plan, optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1))
    lbfgs = torch.optim.LBFGS(net.parameters())

    def closure():
        lbfgs.zero_grad()
        loss = net(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    lbfgs.step(closure)
    with pytest.raises(PlanError, match="state"):
        shrink(net, plan, optimizer=lbfgs)


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    mean: Tensor
    precision: Tensor
    n_data: int


def test_a_posterior_is_sliced_with_the_model():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    plan = planned(net, torch.zeros(2, 4))
    posterior = {n: Moments(p.detach().clone(), p.detach().square(), 7) for n, p in net.named_parameters()}
    small, less = shrink(net, plan, posterior=posterior)
    for name, parameter in small.named_parameters():
        assert torch.equal(less[name].mean, parameter)
        assert torch.equal(less[name].precision, parameter.square())
        assert less[name].n_data == 7
    assert posterior["0.weight"].mean.shape == (8, 4)


def test_reduced_attention_agrees_with_torch_in_all_its_arguments():
    """All heads kept, `ReducedAttention` is `nn.MultiheadAttention`: masks, weights, layouts."""
    from ockham.surgery.refitting import ReducedAttention

    torch.manual_seed(0)
    for first in (True, False):
        full = nn.MultiheadAttention(16, 4, batch_first=first).eval()
        ours = nn.MultiheadAttention(16, 4, batch_first=first).eval()
        ours.load_state_dict(full.state_dict())
        ours.__class__ = ReducedAttention
        x = torch.randn(3, 5, 16) if first else torch.randn(5, 3, 16)
        padding = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()
        causal = torch.ones(5, 5).triu(1).bool()
        for arguments in (
            {},
            {"key_padding_mask": padding},
            {"attn_mask": causal},
            {"attn_mask": torch.randn(12, 5, 5)},
            {"need_weights": False, "attn_mask": causal, "is_causal": True},
            {"average_attn_weights": False},
        ):
            with torch.no_grad():
                want, have = full(x, x, x, **arguments), ours(x, x, x, **arguments)
            assert torch.allclose(want[0], have[0], atol=1e-6), arguments
            assert (want[1] is None) == (have[1] is None)
            assert want[1] is None or torch.allclose(want[1], have[1], atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(full(x[:, 0], x[:, 0], x[:, 0])[0], ours(x[:, 0], x[:, 0], x[:, 0])[0], atol=1e-6)
