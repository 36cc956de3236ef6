"""Sizes in the user's code, norms that count what is gone, and what else must survive a removal."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ockham import OckhamError, OckhamWarning
from ockham.surgery import Plan, PlanError, mask, random_plan, shrink, trace, verify
from ockham.surgery.groups import plan_masks
from ockham.surgery.labels import Edit
from ockham.surgery.resizing import Resizing, SizeError

from .law import difference, outputs, randomise, size, uneven
from .nets import C, Fn, L
from .test_frozen import quiet


def halves(work):
    def forward(self, x):
        return self.b(work(self.a(x), self))

    return lambda: Fn(forward, a=L(6, 24), b=L(24, 3), c=L(12, 12), half=nn.Identity())


def loop(y, net):
    for number in (1, 2, 3):
        one, two = y.chunk(2, 1)
        y = torch.stack([one * number, torch.tanh(two)], 2).flatten(1)
    return y


def written(y, net):
    z = y.clone()
    z[:, :10] = torch.relu(y[:, :10])
    z[:, 10:].mul_(2.0)
    return z


SIZES = {
    "slices": halves(lambda y, net: torch.cat([y[:, :9].relu(), y[:, 9:].tanh()], 1)),
    "negative slices": halves(lambda y, net: torch.cat([y[:, :-7].relu(), y[:, -7:].tanh()], 1)),
    "slices of half the size": halves(
        lambda y, net: torch.cat([y[:, : y.shape[1] // 2].relu(), y[:, y.shape[1] // 2 :].tanh()], 1)
    ),
    "split by size": halves(lambda y, net: torch.cat([p * i for i, p in enumerate(y.split(8, 1), 1)], 1)),
    "split by sizes": halves(lambda y, net: torch.cat([p * i for i, p in enumerate(y.split([5, 19], 1), 1)], 1)),
    "split by half": halves(lambda y, net: torch.cat([p * i for i, p in enumerate(y.split(y.shape[1] // 2, 1), 1)], 1)),
    "chunk": halves(lambda y, net: torch.cat([p * i for i, p in enumerate(y.chunk(3, 1), 1)], 1)),
    "tensor_split at": halves(
        lambda y, net: torch.cat([p * i for i, p in enumerate(y.tensor_split((7, 13), 1), 1)], 1)
    ),
    "narrow": halves(lambda y, net: torch.cat([y.narrow(1, 0, 11).relu(), y.narrow(1, 11, 13).tanh()], 1)),
    "one half through a layer": halves(lambda y, net: torch.cat([y[:, :12], net.c(y[:, 12:].relu())], 1)),
    "unflatten": halves(lambda y, net: y.unflatten(1, (4, 6)).relu().flatten(1)),
    "view by numbers": halves(lambda y, net: y.view(-1, 4, 6).relu().reshape(-1, 24)),
    "view by what is left": halves(lambda y, net: y.view(y.shape[0], 4, y.shape[1] // 4).relu().reshape(-1, 24)),
    "pad": halves(lambda y, net: y + F.pad(y[:, :20].relu(), (0, 4))),
    "in place": halves(written),
    "split, work and shuffle in a loop": halves(loop),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_in_the_code_follow_uneven_plans(name):
    torch.manual_seed(0)
    net, x = SIZES[name]().eval(), torch.randn(5, 6)
    randomise(net, torch.Generator().manual_seed(1))
    groups = quiet(net, x)
    assert len(groups), groups.frozen
    for seed in range(4):
        cut = uneven(groups, 0.5, seed)
        masked, small = mask(net, cut), shrink(net, Plan.from_json(cut.to_json()))
        for given in (x, torch.randn(2, 6)):
            assert difference(outputs(masked, given), outputs(small, given)) <= 1e-5


def test_places_that_look_alike_are_told_apart_by_their_order_or_refused():
    first, second = (Edit("", "split", 2, ((1, 8, 5),), 1, (4, 4), new) for new in ((2, 3), (3, 2)))
    x = torch.arange(10.0).reshape(2, 5)
    with Resizing([first, second]):
        sizes = [[p.shape[1] for p in x.chunk(2, 1)] for _ in range(2)]
        assert sizes == [[2, 3], [3, 2]]
        with pytest.raises(SizeError, match="more than one size"):
            x.chunk(2, 1)
    again = Edit("", "split", 2, ((1, 8, 5),), 1, (4, 4), (3, 2), call=1)
    with Resizing([first, again]), pytest.raises(SizeError):
        x.chunk(2, 1)


def by_hand(self, x):
    apart = x - x.mean(-1, keepdim=True)
    return apart / (self.square(apart).mean(-1, keepdim=True) + 0.3).sqrt() * self.w.weight[0] + self.w.weight[1]


NORMS = {
    "layer": lambda: nn.LayerNorm(12),
    "layer without affine": lambda: nn.LayerNorm(12, elementwise_affine=False),
    "layer without bias": lambda: nn.LayerNorm(12, bias=False),
    "rms": lambda: nn.RMSNorm(12, eps=0.3),
    "rms by hand": lambda: Fn(
        lambda self, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.3) * self.w.weight[0], w=L(12, 1)
    ),
    "layer by hand": lambda: Fn(by_hand, w=L(12, 2), square=torch.square),
    "layer by hand, a power": lambda: Fn(by_hand, w=L(12, 2), square=lambda t: t**2),
    "layer by hand, a product": lambda: Fn(by_hand, w=L(12, 2), square=lambda t: t * t),
    "group": lambda: Fn(lambda self, x: self.n(x.transpose(1, 2)).transpose(1, 2), n=nn.GroupNorm(3, 12)),
    "one group": lambda: Fn(lambda self, x: self.n(x.transpose(1, 2)).transpose(1, 2), n=nn.GroupNorm(1, 12)),
}


def stream(norm):
    return Fn(
        lambda self, x: self.o(self.n(self.i(x) + self.b(F.gelu(self.a(self.m(self.i(x))))))),
        i=L(6, 12), a=L(12, 20), b=L(20, 12), o=L(12, 3), n=norm(), m=norm(),
    )  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_a_residual_stream_gets_narrower_behind_every_norm(name):
    torch.manual_seed(0)
    net, x = stream(NORMS[name]).eval(), torch.randn(2, 5, 6)
    randomise(net, torch.Generator().manual_seed(1))
    groups = trace(net, x)
    assert groups["i.weight:0"].size == 12
    for seed in range(3):
        cut = uneven(groups, 0.5, seed)
        masked, small = mask(net, cut), shrink(net, cut)
        assert difference(outputs(masked, x), outputs(small, x)) <= 1e-5
        for twin in (masked, small):
            twin.train()
        assert difference(outputs(masked, x), outputs(small, x)) <= 1e-5


@pytest.mark.parametrize("name", NORMS)
def test_two_plans_in_a_row_are_one(name):
    torch.manual_seed(0)
    net, x = stream(NORMS[name]).eval(), torch.randn(2, 5, 6)
    randomise(net, torch.Generator().manual_seed(1))
    first = uneven(trace(net, x), 0.3, 0)
    once = shrink(net, first)
    second = uneven(trace(once, x), 0.3, 1)
    both = Plan.from_json(first.then(second).to_json())
    direct = shrink(net, both)
    assert size(direct) == size(shrink(once, second)) < size(once)
    for small in (direct, shrink(once, second)):
        assert difference(outputs(mask(net, both), x), outputs(small, x)) <= 1e-5
    with pytest.raises(PlanError, match="another network"):
        second.then(first)


def test_joined_plans_keep_the_numbers_in_views_and_attributes():
    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = self.a(x).view(n, t, 3, self.num_heads, 4).permute(2, 0, 3, 1, 4)
        return self.b(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 32))

    net, x = Fn(forward, a=L(6, 96), b=L(32, 3)).eval(), torch.randn(2, 5, 6)
    net.num_heads = 8
    parts = []
    small = net
    for keep in (torch.arange(8) != 2, torch.arange(7) > 2):
        groups = trace(small, x)
        (group,) = groups
        parts.append(plan_masks(groups, {group.id: keep}))
        small = shrink(small, parts[-1])
    both = parts[0].then(parts[1])
    assert both.removed == {"a.weight:0": (0, 1, 2, 3)}
    direct = shrink(net, both)
    assert direct.num_heads == small.num_heads == 4
    assert difference(outputs(mask(net, both), x), outputs(direct, x)) <= 1e-5
    assert difference(outputs(small, x), outputs(direct, x)) == 0


class Picture(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.n, self.o = C(1, 12), nn.LayerNorm(12), L(12 * 16, 3)

    def forward(self, x):
        y = self.n(self.c(x).movedim(1, -1)).movedim(-1, 1)
        return self.o(torch.relu(y).reshape(-1, 12 * 16))


@pytest.fixture(scope="module")
def picture():
    torch.manual_seed(0)
    net, x = Picture().eval(), torch.randn(2, 1, 4, 4)
    return net, shrink(net, uneven(trace(net, x), 0.5, 0)), x


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_resized_network_can_be_copied(picture, copied):
    _, small, x = picture
    again = copied(small)
    assert type(again).__name__ == "Picture" and isinstance(again, Picture)
    assert difference(outputs(small, x), outputs(again, x)) == 0
    again.n.weight.data.zero_()
    assert difference(outputs(small, x), outputs(again, x)) > 0


def test_a_resized_network_can_be_traced_by_jit(picture):
    _, small, x = picture
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(small, x)
    more = torch.cat([x, x, x])
    with torch.no_grad():
        assert difference(outputs(small, more), [scripted(more)]) <= 1e-6


def test_nothing_of_the_original_moves():
    torch.manual_seed(0)
    norm = nn.utils.parametrizations.spectral_norm
    net = nn.Sequential(
        norm(C(3, 8)), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), norm(L(8 * 16, 10)), nn.ReLU(), L(10, 2)
    )
    net.train()
    net[1].eval()
    x = torch.randn(3, 3, 4, 4)
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    cut = random_plan(trace(net, x), 0.5, generator=torch.Generator().manual_seed(0))
    masked, small = mask(net, cut), shrink(net, cut)
    assert [m.training for m in net.modules()] == modes == [m.training for m in small.modules()]
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert verify(masked, small, x) <= 1e-5


def test_a_part_that_runs_in_training_only_is_followed():
    def forward(self, x):
        h = self.a(x).relu()
        return (self.o(h), self.aux(h)) if self.training else self.o(h)

    net, x = Fn(forward, a=L(6, 8), o=L(8, 2), aux=L(8, 5)), torch.randn(4, 6)
    groups = trace(net, x)
    assert {(m.name, m.dim) for m in groups["a.weight:0"].members} >= {("aux.weight", 1), ("o.weight", 1)}
    cut = random_plan(groups, 0.5, generator=torch.Generator().manual_seed(0))
    masked, small = mask(net, cut).train(), shrink(net, cut).train()
    assert difference(outputs(masked, x), outputs(small, x)) <= 1e-5


class Keeps(nn.Module):
    """Keeps a table that was gathered from a parameter."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.bias, self.kept = L(6, 8), L(8, 2), nn.Parameter(torch.randn(3, 8)), {}

    def forward(self, x):
        if "table" not in self.kept:
            self.kept["table"] = self.bias[torch.tensor([0, 2])].sum(0)
        return self.b(self.a(x) + self.kept["table"])


@pytest.mark.parametrize("when", ["before trace", "before shrink", "never"])
def test_tables_of_an_earlier_forward_are_made_anew(when):
    torch.manual_seed(0)
    net, x = Keeps().eval(), torch.randn(4, 6)
    if when == "before trace":
        outputs(net, x)
    groups = trace(net, x)
    if when == "before shrink":
        outputs(net, x)
    cut = random_plan(groups, 0.5, generator=torch.Generator().manual_seed(0))
    small = shrink(net, cut)
    net.kept.clear()
    assert difference(outputs(mask(net, cut), x), outputs(small, x)) <= 1e-5


@pytest.mark.parametrize(
    "more", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}]
)
@pytest.mark.parametrize("weights", [False, True])
def test_attention_with_further_positions(more, weights):
    torch.manual_seed(0)
    net = Fn(
        lambda self, x: self.o(self.a(*[self.i(x)] * 3, need_weights=weights)[0]),
        i=L(6, 12), a=nn.MultiheadAttention(12, 3, batch_first=True, **more), o=L(12, 2),
    ).eval()  # fmt: skip
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 5, 6)
    groups = trace(net, x)
    assert "a.in_proj_weight:0" in groups.groups
    cut = uneven(groups, 0.5, 0)
    assert difference(outputs(mask(net, cut), x), outputs(shrink(net, cut), x)) <= 1e-5


def test_whole_groups_of_a_convolution_go_where_each_makes_one_channel():
    torch.manual_seed(0)
    net = nn.Sequential(C(3, 12), nn.ReLU(), C(12, 4, groups=4), nn.ReLU(), nn.Flatten(), L(4 * 16, 2)).eval()
    x = torch.randn(2, 3, 4, 4)
    groups = trace(net, x)
    cut = uneven(groups, 0.5, 0)
    small = shrink(net, cut)
    assert small[2].groups == small[2].out_channels < 4
    assert difference(outputs(mask(net, cut), x), outputs(small, x)) <= 1e-5


def test_an_optimizer_of_ones_own_and_its_scheduler_follow():
    class Counting(torch.optim.SGD):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.calls = 0

        def step(self, closure=None):
            self.calls += 1
            return super().step(closure)

    net, x = nn.Sequential(L(6, 8), nn.ReLU(), L(8, 2)), torch.randn(4, 6)
    optimizer = Counting(net.parameters(), lr=1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    net(x).sum().backward()
    optimizer.step()
    scheduler.step()
    cut = random_plan(trace(net, x), 0.5)
    small, carried, follower = shrink(net, cut, optimizer=optimizer, scheduler=scheduler)
    assert carried.calls == 1 and follower.optimizer is carried
    small(x).sum().backward()
    carried.step()
    follower.step()
    assert carried.param_groups[0]["lr"] == pytest.approx(0.01) and optimizer.param_groups[0]["lr"] == pytest.approx(
        0.1
    )
    with pytest.raises(OckhamError, match="another optimizer"):
        shrink(net, cut, scheduler=scheduler)


def test_a_norm_by_hand_that_is_called_twice():
    torch.manual_seed(0)
    net = Fn(
        lambda self, x: self.o(self.n(self.i(x) + self.b(self.n(self.i(x))))),
        i=L(6, 12), b=L(12, 12), o=L(12, 3), n=NORMS["layer by hand"](),
    ).eval()  # fmt: skip
    x = torch.randn(2, 5, 6)
    groups = trace(net, x)
    assert groups["i.weight:0"].size == 12
    cut = uneven(groups, 0.5, 0)
    assert difference(outputs(mask(net, cut), x), outputs(shrink(net, cut), x)) <= 1e-5


def folded(self, x):
    """Attention whose heads lie in the dimension of examples, with sizes of all kinds."""
    n, t, _ = x.shape
    q, k, v = (
        f(x).view(n, t, -1, 3).transpose(1, 2).reshape(n * self.num_heads, -1, 3) for f in (self.q, self.k, self.v)
    )
    scores = torch.bmm(q, k.transpose(1, 2)).view(n, self.num_heads, t, t) - self.far[:, :t, :t]
    y = torch.bmm(scores.view(-1, t, t).softmax(-1), v).view(-1, self.num_heads, t, 3)
    return self.o(y.transpose(1, 2).reshape(n, t, self.num_heads * 3))


@pytest.mark.parametrize("shape", [(3, 5), (1, 16), (2, 3), (4, 4), (5, 1)])
def test_heads_folded_into_examples_take_other_batches_and_lengths(shape):
    torch.manual_seed(0)
    net = Fn(folded, q=L(6, 12), k=L(6, 12), v=L(6, 12), o=L(12, 6)).eval()
    net.num_heads = 4
    net.register_buffer("far", (torch.arange(16.0)[:, None] - torch.arange(16.0)).abs() * torch.rand(4, 1, 1))
    groups = trace(net, torch.randn(2, 5, 6))
    assert groups["q.weight:0"].size == 4
    x = torch.randn(*shape, 6)
    for left in (1, 2, 3):
        keep = torch.arange(4) >= 4 - left
        cut = plan_masks(groups, {"q.weight:0": keep})
        assert difference(outputs(mask(net, cut), x), outputs(shrink(net, cut), x)) <= 1e-5


def routed(self, x):
    """Rows of the input go to one of two layers by their sign; it comes back in zeros of a size by number."""
    x = self.i(x)
    first = x.sum(-1) > 0
    order = first.long().argsort()
    parts = x[order].split(torch.stack([(~first).sum(), first.sum()]).tolist())
    done = torch.cat([layer(part) for layer, part in zip((self.a, self.b), parts, strict=True)])
    return self.o(self.n(torch.zeros(len(x), self.width).index_add(0, order, done) + x + 0))


def written_by_mask(self, x):
    y = self.i(x)
    chosen = y.sum(-1) > 0
    out = x.new_zeros(x.shape[0], self.width)
    out[chosen] = self.a(y[chosen]).tanh()
    return self.o(out)


def averaged(self, x):
    """Pairs of positions are averaged by a pooling whose other windows are one element wide."""
    y = self.i(x).reshape(-1, 2, self.width)
    return self.o(self.a(F.avg_pool2d(y[:, None], (2, 1), stride=(2, 1))[:, 0, 0]).relu())


@pytest.mark.parametrize("forward", [routed, written_by_mask, averaged])
def test_a_width_is_free_where_only_rows_move(forward):
    torch.manual_seed(0)
    net = Fn(forward, i=L(6, 12), a=L(12, 12), b=L(12, 12), o=L(12, 3), n=nn.LayerNorm(12)).eval()
    net.width = 12
    groups = trace(net, torch.randn(8, 6))
    assert groups["i.weight:0"].size == 12 and ("a.weight", 0) not in groups.frozen
    for seed in range(3):
        cut = uneven(groups, 0.5, seed)
        assert len(cut.removed["i.weight:0"])
        for x in (torch.randn(8, 6), torch.randn(6, 6)):
            assert difference(outputs(mask(net, cut), x), outputs(shrink(net, cut), x)) <= 1e-5


def test_a_pooling_over_channels_still_keeps_them():
    net = Fn(lambda self, x: self.o(F.avg_pool1d(self.i(x), 3, stride=1, padding=1)), i=L(6, 12), o=L(12, 3))
    with pytest.warns(OckhamWarning, match="pools over this dimension"):
        assert len(trace(net, torch.randn(2, 6))) == 0


def crossed(self, x):
    """Attention that reads the width of its heads off the stream, in three ways."""
    n, t, c = x.shape
    q = self.q(x).reshape(n, t, 3, c // 3).transpose(1, 2)
    k, v = (f(x).view(n, t, 3, -1).transpose(1, 2) for f in (self.k, self.v))
    y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
    y = self.o(y.transpose(1, 2).reshape(n, t, c))
    y = y + self.d(y.transpose(1, 2).reshape(n, c, t, 1)).reshape(n, c, -1).transpose(1, 2)
    return x + y


def test_sizes_read_off_a_stream_are_those_of_the_heads_that_stayed():
    torch.manual_seed(0)
    block = Fn(crossed, q=L(12, 12), k=L(12, 12), v=L(12, 12), o=L(12, 12), d=nn.Conv2d(12, 12, 1))
    net, x = nn.Sequential(L(6, 12), block, nn.LayerNorm(12), L(12, 3)).eval(), torch.randn(2, 5, 6)
    groups = trace(net, x)
    sizes = {g.id: g.size for g in groups}
    assert sizes["0.weight:0"] == 12 and 3 in sizes.values(), groups.frozen
    heads = next(k for k, n in sizes.items() if n == 3)
    for stream in (4, 6, 7, 11):
        for left in (1, 2, 3):
            keep = {"0.weight:0": torch.arange(12) < stream, heads: torch.arange(3) < left}
            plan = plan_masks(groups, keep)
            for given in (x, torch.randn(3, 7, 6)):
                assert difference(outputs(mask(net, plan), given), outputs(shrink(net, plan), given)) <= 1e-5
