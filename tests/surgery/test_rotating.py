"""A rotated network computes the same, and its last coordinates are those that matter least."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ockham
from ockham.surgery import RotationError, mask, rotate, shrink, trace
from ockham.surgery.copies import given_to
from ockham.surgery.groups import plan_masks

from .law import difference, outputs, randomise
from .nets import Fn, L

WORDS = torch.arange(18).reshape(2, 9) % 20


class Stream(nn.Module):
    def __init__(self, norm, tied=False):
        super().__init__()
        self.e, self.p = nn.Embedding(20, 12), nn.Parameter(torch.randn(1, 9, 12))
        self.a, self.b = nn.ModuleList(L(12, 20) for _ in range(2)), nn.ModuleList(L(20, 12) for _ in range(2))
        self.n, self.last, self.o = nn.ModuleList(norm(12) for _ in range(2)), norm(12), L(12, 20, bias=False)
        if tied:
            self.o.weight = self.e.weight

    def forward(self, words):
        x = self.e(words) + self.p
        for n, a, b in zip(self.n, self.a, self.b, strict=True):
            x = x + b(F.gelu(a(n(x))))
        return self.o(self.last(x))


class OnePlusRMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def made(norm, tied=False):
    torch.manual_seed(0)
    net = Stream(norm, tied).eval()
    randomise(net, torch.Generator().manual_seed(1))
    return net


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm, OnePlusRMSNorm])
def test_a_rotation_changes_no_output_and_can_be_cut(norm, tied):
    net = made(norm, tied)
    before = [t.clone() for t in net.state_dict().values()]
    turned = rotate(net, trace(net, WORDS), WORDS)
    assert difference(outputs(net, WORDS), outputs(turned, WORDS)) <= 1e-5
    assert all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values(), strict=True))
    assert turned.o.weight is not turned.e.weight
    groups = trace(turned, WORDS)
    stream = next(g for g in groups if g.id.startswith("p") or "e.weight" in {m.name for m in g.members})
    cut = plan_masks(groups, {stream.id: torch.arange(12) < 7})
    small = shrink(turned, cut)
    assert difference(outputs(mask(turned, cut), WORDS), outputs(small, WORDS)) <= 1e-5


def test_the_last_coordinates_of_the_stream_matter_least():
    """The stream lives in four dimensions out of twelve: eight coordinates go and nothing changes."""
    net = made(nn.RMSNorm)
    basis = torch.linalg.qr(torch.randn(12, 4, generator=torch.Generator().manual_seed(2)))[0]
    with torch.no_grad():
        for tensor, dim in (
            (net.e.weight, 1),
            (net.p, 2),
            *((b.weight, 0) for b in net.b),
            *((b.bias, 0) for b in net.b),
        ):
            tensor.copy_((tensor.movedim(dim, -1) @ basis @ basis.T).movedim(-1, dim))
    turned = rotate(net, trace(net, WORDS), WORDS)
    groups = trace(turned, WORDS)
    stream = next(g for g in groups if "e.weight" in {m.name for m in g.members})
    small = shrink(turned, plan_masks(groups, {stream.id: torch.arange(12) < 4}))
    assert small.e.weight.shape == (20, 4)
    assert difference(outputs(net, WORDS), outputs(small, WORDS)) <= 1e-5


def test_what_cannot_be_rotated_says_why():
    net = nn.Sequential(L(6, 8), nn.ReLU(), L(8, 2))
    x = torch.randn(3, 6)
    with pytest.raises(RotationError, match="no group of this network passes a norm"):
        rotate(net, trace(net, x), x)
    scaled = Fn(lambda self, x: self.o(self.n(self.i(x) * self.s)), i=L(6, 8), o=L(8, 2), n=nn.RMSNorm(8))
    scaled.s = nn.Parameter(torch.rand(8) + 0.5)
    with pytest.raises(RotationError, match="s scales each coordinate"):
        rotate(scaled, trace(scaled, x), x)
    bent = Fn(lambda self, x: self.o(self.n(self.i(x).tanh())), i=L(6, 8), o=L(8, 2), n=nn.RMSNorm(8))
    with pytest.raises(RotationError, match="would change the outputs"):
        rotate(bent, trace(bent, x), x)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm, OnePlusRMSNorm])
def test_a_posterior_says_along_which_directions_the_readers_feel_the_stream(norm, tied):
    net = made(norm, tied)
    words = torch.arange(72).reshape(8, 9) % 20
    posterior = ockham.laplace(net, [(words, words)], structure="kronecker", prior=1.0)
    groups = trace(net, WORDS)
    turned = rotate(net, groups, posterior)
    assert difference(outputs(net, WORDS), outputs(turned, WORDS)) <= 1e-5
    # by hand: what the readers are given in the turned network, weighted as the loss feels it, is diagonal and falls
    paths = ["a.0", "a.1", "o"]
    before, after = (given_to(m, paths, ((words,), {})) for m in (net, turned))
    matrices = {m.weight: m for m in posterior.matrices}
    moment = torch.zeros(12, 12, dtype=torch.float64)
    for path in paths:
        if path == "o" and (tied or norm is nn.LayerNorm):  # no factors that tell z
            continue
        matrix = matrices[f"{path}.weight"]
        x, z = (seen[path][0].double().flatten(0, -2) for seen in (before, after))
        k, weight = matrix.precision, turned.get_submodule(path).weight.detach().double()
        size = float(x.square().sum()) + (len(x) if matrix.bias is not None else 0)
        felt = (k.output_vectors[0] * k.output_values[0]) @ k.output_vectors[0].T
        moment += torch.trace(weight.T @ felt @ weight) * float(k.input_values[0].sum()) / size * (z.T @ z)
    diagonal = moment.diagonal()
    assert float((moment - diagonal.diag()).abs().max() / diagonal.max()) < 1e-4
    assert bool((diagonal[:-1] >= diagonal[1:] * (1 - 1e-4)).all())


def test_a_posterior_without_factors_says_no_direction():
    net = made(nn.RMSNorm)
    words = torch.arange(36).reshape(4, 9) % 20
    posterior = ockham.laplace(net, [(words, words)], structure="diagonal", prior=1.0)
    with pytest.raises(RotationError, match="no Kronecker factors"):
        rotate(net, trace(net, WORDS), posterior)


@pytest.mark.parametrize("bias", [False, True])
def test_a_low_rank_pair_is_put_in_the_order_of_its_singular_values(bias):
    """Six adapter directions whose product has rank two: all but two go and nothing changes."""
    generator = torch.Generator().manual_seed(3)
    net = Fn(
        lambda self, x: self.base(x) + 2.0 * self.up(self.down(x)),
        base=L(12, 10).requires_grad_(False),
        down=L(12, 6, bias=bias),
        up=L(6, 10),
    )
    x = torch.randn(7, 12, generator=generator)
    mixed = torch.randn(6, 6, generator=generator)
    with torch.no_grad():
        net.down.weight.copy_(mixed[:, :2] @ net.down.weight[:2])
        if bias:
            net.down.bias.copy_(mixed[:, :2] @ net.down.bias[:2])
    groups = trace(net, x)
    [pair] = [g for g in groups if g.size == 6]
    first_two = {pair.id: torch.arange(6) < 2}
    assert difference(outputs(net, x), outputs(shrink(net, plan_masks(groups, first_two)), x)) > 1e-3
    turned = rotate(net, groups, x)
    assert difference(outputs(net, x), outputs(turned, x)) <= 1e-5
    sizes = turned.up.weight.detach().norm(dim=0).tolist()
    assert all(a >= b - 1e-6 for a, b in pairwise(sizes))
    again = trace(turned, x)
    [pair] = [g for g in again if g.size == 6]
    small = shrink(turned, plan_masks(again, {pair.id: torch.arange(6) < 2}))
    assert small.up.in_features == 2
    assert difference(outputs(net, x), outputs(small, x)) <= 1e-5


def test_a_pair_with_something_between_is_left_alone():
    net = Fn(lambda self, x: self.up(self.down(x).relu()), down=L(12, 6), up=L(6, 10))
    x = torch.randn(7, 12)
    with pytest.raises(RotationError, match="low-rank pair"):
        rotate(net, trace(net, x), x)
