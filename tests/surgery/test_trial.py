"""What the trial and the small network must bear: empty tensors, halves of an odd rest, LSTMs with few hidden units."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ockham.surgery import mask, shrink, trace, tracing
from ockham.surgery.copies import as_arguments
from ockham.surgery.groups import plan_masks

from .law import difference, outputs, uneven


class EmptyPart(nn.Module):
    """A head made of two parts, one of which has no rows (the embedding is as wide as the stream)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 10)
        self.head, self.rest = nn.Linear(10, 7, bias=False), nn.Parameter(torch.zeros(0, 7))

    def forward(self, x):
        y = self.b(self.a(x).relu()).relu()
        return y @ torch.cat([self.head.weight.t(), self.rest], 0)


def test_a_parameter_without_elements_is_no_trouble() -> None:
    torch.manual_seed(0)
    net, x = EmptyPart(), torch.randn(3, 6)
    groups = trace(net, x)
    assert {g.id: g.size for g in groups}["a.weight:0"] == 12
    for seed in range(3):
        plan = uneven(groups, 0.5, seed)
        assert difference(outputs(mask(net, plan), x), outputs(shrink(net, plan), x)) <= 1e-5


class Halves(nn.Module):
    """The number that divides a width comes from the width itself: it is another one at every size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        y = self.a(x)
        n = y.shape[-1] // 2
        return self.b(torch.cat([y[..., :n].relu(), y[..., n:].tanh()], -1))


@pytest.mark.parametrize("left", [[0], [3], [4], [7], [0, 4], [1, 2, 3], [5, 6, 7], [0, 5, 6, 7], [0, 1, 2, 7]])
def test_halves_stay_the_halves_of_the_network_before(left) -> None:
    torch.manual_seed(0)
    net, x = Halves(), torch.randn(3, 6)
    groups = trace(net, x)
    keep, at = {}, 0
    for group in groups:
        own = torch.cat([m.index.flatten() for m in group.members if m.name == "a.weight"])
        keep[group.id] = torch.isin(own, torch.tensor(left))
        at += group.size
        if not bool(keep[group.id].any()):
            keep[group.id][0] = True
    assert at == 8
    plan = plan_masks(groups, keep)
    assert difference(outputs(mask(net, plan), x), outputs(shrink(net, plan), x)) <= 1e-5


class Projected(nn.Module):
    def __init__(self, *, bias: bool, two: bool) -> None:
        super().__init__()
        self.i = nn.Linear(5, 6)
        self.l = nn.LSTM(6, 8, 2, bias=bias, bidirectional=two, proj_size=4, batch_first=True)
        self.o = nn.Linear(4 * (1 + two), 3)

    def forward(self, x):
        y, (h, _) = self.l(self.i(x))
        return self.o(y), h.square().sum()


@pytest.mark.parametrize(("bias", "two"), [(True, False), (False, True)])
@pytest.mark.parametrize(("hidden", "projected"), [(1, 1), (3, 3), (1, 4), (2, 3)])
def test_a_projected_lstm_runs_with_fewer_hidden_units_than_projected_ones(bias, two, hidden, projected) -> None:
    torch.manual_seed(0)
    net, x = Projected(bias=bias, two=two), torch.randn(2, 4, 5)
    groups = trace(net, x)
    sizes = {"l.weight_ih_l0:0": hidden, "l.weight_hr_l0:0": projected}
    assert sizes.keys() <= groups.groups.keys()
    plan = plan_masks(groups, {k: torch.arange(groups[k].size) < n for k, n in sizes.items()})
    small = shrink(net, plan)
    assert difference(outputs(mask(net, plan), x), outputs(small, x)) <= 1e-5
    packed = nn.utils.rnn.pack_padded_sequence(small.i(x), [4, 2], batch_first=True)
    (whole, _), (parts, _) = small.l(small.i(x)), small.l(packed)
    assert torch.allclose(nn.utils.rnn.pad_packed_sequence(parts, batch_first=True)[0][0], whole[0], atol=1e-6) or two
    start = (torch.zeros(2 * (1 + two), 2, projected), torch.zeros(2 * (1 + two), 2, hidden))
    assert torch.allclose(small.l(small.i(x), start)[0], whole, atol=1e-6)
    small(x)[0].sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


def test_a_deep_network_whose_training_mode_blows_rounding_up_loses_no_group():
    """240 batch norms that use the batch's statistics make 0.01 of 1e-16: there is nothing to compare there."""
    layers = [m for _ in range(240) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())]
    groups = trace(nn.Sequential(nn.Conv2d(3, 4, 1), *layers, nn.Conv2d(4, 3, 1)), torch.randn(4, 3, 4, 4))
    assert len(groups) == 241 and all(group.size == 4 for group in groups)


@pytest.mark.parametrize(
    ("evaluation", "training", "tolerance", "modes"),
    [
        (1e-6, 1e-6, 3e-5, (False, True)),  # rounds to float32 inside: no reason to look less closely
        (1e-15, 1e-6, 3e-5, (False,)),  # training mode alone blows rounding up
        (1e-15, None, 3e-5, (False,)),  # it does not run in training mode
        (1e-5, 1e-5, 1e-3, (False, True)),  # too much for the tolerance of float64
    ],
)
def test_how_rounding_moves_the_outputs_decides_what_is_compared(monkeypatch, evaluation, training, tolerance, modes):
    net, x = Halves(), torch.randn(3, 6)
    groups = trace(net, x)
    noise = {False: evaluation, True: training}
    monkeypatch.setattr(tracing, "_noise", lambda *given, training=False: noise[training])
    trial = tracing.prepared(net, groups, as_arguments(net, x), [(3, 5)])
    assert isinstance(trial, tracing.ByValues) and (trial.tolerance, trial.modes) == (tolerance, modes)


def test_two_groups_of_two_that_are_right_only_together_are_not_offered_apart() -> None:
    """ConvBERT's kernels are as many as its heads; without that a reshape fails, but not at every batch size."""
    from transformers import ConvBertConfig, ConvBertModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "embedding_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    net = ConvBertModel(ConvBertConfig(vocab_size=50, intermediate_size=48, **shape)).eval()
    ids = torch.randint(0, 50, (7, 16))
    groups = trace(net, {"input_ids": ids[:2]})
    assert {g.size for g in groups} >= {2, 48}
    for group in groups:
        keep = torch.ones(group.size, dtype=torch.bool)
        keep[0] = False
        plan = plan_masks(groups, {group.id: keep})
        masked, small = mask(net, plan), shrink(net, plan)
        for count in (1, 2, 3, 5):
            given = {"input_ids": ids[:count]}
            assert difference(outputs(masked, given), outputs(small, given)) <= 1e-5, group.id
