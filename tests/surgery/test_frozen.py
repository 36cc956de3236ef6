"""What cannot go stays, and says why; bad input says what to do."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from ockham.errors import OckhamError, OckhamWarning, TraceError
from ockham.surgery import MismatchError, mask, random_plan, shrink, trace, verify

from .law import difference, outputs, uneven
from .nets import C, Fn, L

X = torch.linspace(-1, 1, 24).reshape(4, 6)


def quiet(model, inputs, **more):
    """Trace a network of which perhaps nothing can be removed, which is worth a warning otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OckhamWarning)
        return trace(model, inputs, **more)


def reason(model, inputs, name, dim):
    groups = quiet(model.eval(), inputs)
    assert not any(m.name == name and m.dim == dim for g in groups for m in g.members)
    return groups.frozen[(name, dim)]


def test_layer_norm_of_units_that_are_never_zero_keeps_its_width():
    net = nn.Sequential(L(6, 8), nn.Sigmoid(), nn.LayerNorm(8), L(8, 2))
    assert "layer_norm in 2 normalises" in reason(net, X, "0.weight", 0)


def test_inputs_and_outputs_keep_theirs():
    net = nn.Sequential(L(6, 8), nn.ReLU(), L(8, 2))
    assert "fixed size" in reason(net, X, "0.weight", 1)
    assert "output of the network" in reason(net, X, "2.weight", 0)


@pytest.mark.parametrize(
    ("op", "said"),
    [
        (lambda y: torch.fft.fft(y).real, "fft"),
        (lambda y: y.sort(dim=1)[0], "sort"),
        (lambda y: torch.cdist(y + 0.3, y.flip(0)) @ y, "cdist"),
        (lambda y: y.softmax(1), "softmax"),
        (lambda y: y.cumsum(1), "cumsum"),
        (lambda y: y - y.sigmoid().mean(1, keepdim=True), "mean"),
        (lambda y: y.roll(1, 1), "roll"),
        (lambda y: y * torch.arange(8.0), "fixed size"),
        (lambda y: y[:, torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])], "index"),
    ],
)
def test_ops_that_mix_or_address_channels_freeze_them(op, said):
    net = Fn(lambda self, x: self.b(op(self.a(x))), a=L(6, 8), b=L(8, 2))
    assert said in reason(net, X, "a.weight", 0)


def test_a_size_that_the_code_insists_on_freezes_only_its_layer():
    def forward(self, x):
        y = self.l(self.a(x).relu()[:, None])[0]
        if y.shape[-1] != 8:
            raise ValueError("eight are expected")
        return self.b(y)

    net = Fn(forward, a=L(6, 7), l=nn.LSTM(7, 8, batch_first=True), b=L(8, 2))
    groups = trace(net, X)
    assert [(g.id, g.size) for g in groups] == [("a.weight:0", 7)]
    assert "cannot shrink: the forward fails at another size (eight" in groups.frozen[("l.weight_hh_l0", 1)]


def test_a_first_state_of_a_size_by_number_follows():
    def forward(self, x):
        state = torch.zeros(1, x.shape[0], 8)
        return self.b(self.l(self.a(x).relu()[:, None], (state, state))[0])

    net = Fn(forward, a=L(6, 7), l=nn.LSTM(7, 8, batch_first=True), b=L(8, 2))
    groups = trace(net, X)
    assert [(g.id, g.size) for g in groups] == [("a.weight:0", 7), ("l.weight_ih_l0:0", 8)]
    for seed in range(3):
        plan = uneven(groups, 0.5, seed)
        for x in (X, torch.cat([X, X])):
            assert difference(outputs(mask(net, plan), x), outputs(shrink(net, plan), x)) <= 1e-5


@pytest.mark.parametrize("swap", [False, True])
def test_channels_that_lie_on_inputs_stay_and_the_others_go(swap):
    def forward(self, x):
        y, z = torch.cat([self.a(x), x], 1), self.b(x)
        return self.c(z + y if swap else y + z)

    net = Fn(forward, a=L(6, 8), b=L(6, 14), c=L(14, 2))
    groups = trace(net, X)
    assert [(g.id, g.size) for g in groups] == [("a.weight:0", 8)]
    assert "add in the model meets" in groups.frozen[("b.weight", 0)]


def test_an_unknown_custom_op_freezes_what_it_touches_and_only_that():
    net = Fn(lambda self, x: self.c(torch.special.bessel_j0(self.b(self.a(x).relu()))), a=L(6, 8), b=L(8, 5), c=L(5, 2))
    groups = trace(net, X)
    assert [g.id for g in groups] == ["a.weight:0"]
    assert "meaning" in groups.frozen[("b.weight", 0)] and "bessel" in groups.frozen[("b.weight", 0)]


def test_a_constant_of_the_channel_count_is_caught_by_the_trial():
    net = Fn(lambda self, x: self.b(self.a(x) / self.a(x).shape[1]), a=L(6, 8), b=L(8, 2)).eval()
    assert "computes something else" in reason(net, X, "a.weight", 0)


def test_unused_parameters_stay():
    net = nn.Sequential(L(6, 8), nn.ReLU(), L(8, 2))
    net.register_parameter("spare", nn.Parameter(torch.ones(5)))
    assert "not used" in reason(net, X, "spare", 0)


def test_ignore_by_name_pattern_and_type():
    net = nn.Sequential(L(6, 8), nn.ReLU(), L(8, 7), nn.ReLU(), L(7, 2))
    assert [g.id for g in trace(net, X, ignore=["0"])] == ["2.weight:0"]
    assert [g.id for g in quiet(net, X, ignore=["re:^2"])] == []
    assert [g.id for g in trace(net, X, ignore="0.bias")] == ["2.weight:0"]
    for one in (net[0], net[0].weight):
        assert [g.id for g in trace(net, X, ignore=[one])] == ["2.weight:0"]
    assert len(quiet(net, X, ignore=[nn.Linear])) == 0
    assert "ignore" in trace(net, X, ignore=["0"]).frozen[("0.weight", 0)]
    for entry in ("nobody", "re:nobody", nn.Conv2d, L(2, 2), "re:("):
        with pytest.raises(OckhamError, match=r"nobody|Conv2d|Linear|re:\("):
            trace(net, X, ignore=[entry])


def test_data_dependent_control_flow_says_the_way_out():
    net = Fn(lambda self, x: self.a(x) if x.sum() > 0 else self.a(-x), a=L(6, 2))
    with pytest.raises(TraceError, match="Way out"):
        trace(net, X)


def test_inputs_that_do_not_fit():
    with pytest.raises(TraceError, match="inputs that do not fit"):
        trace(nn.Linear(5, 2), X)
    with pytest.raises(OckhamError):
        trace(nn.Linear(6, 2), (X, X))


def test_a_network_with_nothing_to_remove():
    with pytest.warns(OckhamWarning, match="0: is an output of the network"):
        groups = trace(nn.Linear(6, 2), X)
    plan = random_plan(groups, 0.5)
    assert len(groups) == 0 and not plan.removed
    net = nn.Linear(6, 2)
    assert verify(mask(net, plan), shrink(net, plan), X) == 0.0


def test_a_single_unit_is_not_a_group():
    net = nn.Sequential(L(6, 1), nn.ReLU(), L(1, 2))
    assert len(quiet(net, X)) == 0


def test_verify_names_the_layer_that_differs():
    net = nn.Sequential(L(6, 8), nn.ReLU(), L(8, 7), nn.ReLU(), L(7, 2))
    plan = random_plan(trace(net, X, ignore=["2.bias"]), 0.5, generator=torch.Generator().manual_seed(0))
    small = shrink(net, plan)
    with torch.no_grad():
        small[2].bias[0] += 1
    with pytest.raises(MismatchError, match="first layer that differs is '2'"):
        verify(mask(net, plan), small, X)


def test_verify_accepts_nan_at_the_same_places_only():
    net = nn.Sequential(L(6, 8), nn.ReLU(), L(8, 2))
    broken = nn.Sequential(L(6, 8), nn.ReLU(), L(8, 2))
    with torch.no_grad():
        broken[2].bias[0] = float("nan")
    assert verify(broken, broken, X) == 0.0
    with pytest.raises(MismatchError):
        verify(net, broken, X)


def test_pruned_modules_of_torch_are_frozen_or_right():
    from torch.nn.utils import prune

    net = nn.Sequential(L(6, 8), nn.ReLU(), L(8, 2))
    prune.l1_unstructured(net[0], "weight", 0.5)
    groups = trace(net, X)
    plan = random_plan(groups, 0.5, generator=torch.Generator().manual_seed(0))
    assert verify(mask(net, plan), shrink(net, plan), X) <= 1e-5


def test_in_place_writes_are_followed_or_frozen():
    def forward(self, x):
        y = self.a(x)
        y[:, 2] = 1.0
        y.relu_()
        return self.b(y)

    net = Fn(forward, a=L(6, 8), b=L(8, 2))
    groups = quiet(net, X)
    plan = random_plan(groups, 0.5, generator=torch.Generator().manual_seed(0))
    assert verify(mask(net, plan), shrink(net, plan), X) <= 1e-5


def test_convolution_kernels_stay():
    net = nn.Sequential(C(3, 4), nn.Flatten(), L(4 * 16, 2))
    groups = trace(net, torch.zeros(1, 3, 4, 4))
    assert "slides" in groups.frozen[("0.weight", 2)]
