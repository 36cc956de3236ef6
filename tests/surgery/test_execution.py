"""CSR, 2:4, masks of torch.nn.utils.prune, and the counts of a network."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from ockham.surgery.costs import cost, latency
from ockham.surgery.exporting import CsrLinear, ExecutionError, as_pruned, keep_two_of_four, sparse_linear


@pytest.mark.parametrize("bias", [True, False])
def test_csr_computes_the_same(bias):
    torch.manual_seed(0)
    layer = nn.Linear(12, 7, bias=bias)
    with torch.no_grad():
        layer.weight *= torch.rand(7, 12) < 0.2
        layer.weight[3] = 0
    sparse = CsrLinear(layer)
    for shape in ((12,), (1, 12), (5, 12), (2, 3, 12)):
        x = torch.randn(shape)
        assert torch.allclose(sparse(x), layer(x), atol=1e-6)
    again = CsrLinear(layer)
    again.load_state_dict(sparse.state_dict())


def test_csr_is_used_only_where_it_is_faster_and_never_for_dense_or_tied_layers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 8), nn.ReLU(), nn.Linear(8, 8))
    with torch.no_grad():
        net[0].weight *= torch.rand(1024, 1024) < 0.002
    x = torch.randn(1, 1024)
    fast, times = sparse_linear(net, x)
    assert list(times) == ["0"] and times["0"].zeros > 0.99
    assert isinstance(fast[0], CsrLinear) == (times["0"].csr < 0.9 * times["0"].dense)
    assert isinstance(net[0], nn.Linear) and isinstance(fast[2], nn.Linear)
    assert torch.allclose(fast(x), net(x), atol=1e-5)
    never, _ = sparse_linear(net, x, margin=0.0)
    assert isinstance(never[0], nn.Linear)


def test_two_of_four_is_the_best_of_the_six_patterns():
    delta_f = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    keep = keep_two_of_four(delta_f)
    for row, mask in zip(delta_f.reshape(-1, 4), keep.reshape(-1, 4), strict=True):
        best = min(float(row[list(p)].sum()) for p in itertools.combinations(range(4), 2))
        assert int(mask.sum()) == 2 and float(row[mask].sum()) == pytest.approx(best)
    for wrong in (torch.randn(4, 6), torch.randn(8), torch.full((1, 4), float("nan"))):
        with pytest.raises(ExecutionError):
            keep_two_of_four(wrong)


def test_masks_in_the_form_of_torch():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    keep = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    twin = as_pruned(net, {"0.weight": keep})
    assert prune.is_pruned(twin) and not prune.is_pruned(net)
    assert torch.equal(twin[0].weight_mask.bool(), keep)
    assert torch.equal(twin[0].weight, net[0].weight * keep)
    prune.remove(twin[0], "weight")
    assert torch.equal(twin[0].weight != 0, keep)
    for wrong in ({"9.weight": keep}, {"0.weight": keep.float()}, {"0.weight": keep.T}):
        with pytest.raises(ExecutionError, match=r"expected torch\.bool"):
            as_pruned(net, wrong)


def test_counts_of_a_network_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(16, 2)).train()
    found = cost(net, torch.zeros(1, 3, 4, 4))
    assert (found.parameters, found.bytes) == (108 + 34, 4 * 142)
    assert found.macs == 4 * 27 * 4 + 32
    assert net.training


def test_latency_is_a_positive_time_and_leaves_the_mode():
    net = nn.Linear(4, 2).train()
    assert 0 < latency(net, torch.zeros(3, 4), batch=64) < 1
    assert net.training
