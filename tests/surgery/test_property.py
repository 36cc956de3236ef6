"""Random networks from the vocabulary of layers: the law holds for all of them, and most of each can go."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from ockham import OckhamWarning
from ockham.surgery import trace

from .law import randomise, worst_difference

CONV = ("conv", "norm", "act", "residual", "branch", "depthwise", "grouped", "gate", "pool", "glu", "shuffle", "slice",
        "groupnorm", "prelu", "deconv", "twice", "parts", "chunks", "numbers", "layernorm", "table")  # fmt: skip
SEQ = (
    "linear",
    "act",
    "residual",
    "lstm",
    "gru",
    "mha",
    "layernorm",
    "swiglu",
    "heads",
    "branch",
    "twice",
    "rmsnorm",
    "parts",
    "numbers",
)


class Layer(nn.Module):
    """One word of the vocabulary on `width` channels; `out` is the width it leaves."""

    def __init__(self, kind: str, width: int, other: int):
        super().__init__()
        self.kind, self.out = kind, width
        getattr(self, f"make_{kind}")(width, other)

    def forward(self, x):
        return getattr(self, f"run_{self.kind}")(x)

    def make_act(self, width, other):
        self.f = [F.relu, F.gelu, torch.sigmoid, F.silu][other % 4]

    def run_act(self, x):
        return self.f(x)


class ConvLayer(Layer):
    def make_conv(self, width, other):
        self.out, self.a = other, nn.Conv2d(width, other, 3, padding=1)

    def make_deconv(self, width, other):
        self.out, self.a = other, nn.ConvTranspose2d(width, other, 3, padding=1)

    def make_norm(self, width, other):
        self.a = nn.BatchNorm2d(width)

    def make_prelu(self, width, other):
        self.a = nn.PReLU(width)

    def make_groupnorm(self, width, other):
        self.a = nn.GroupNorm(width // 2, width)

    def make_depthwise(self, width, other):
        self.a = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def make_grouped(self, width, other):
        self.out, self.a = 2 * other, nn.Conv2d(width, 2 * other, 1, groups=2)

    def make_pool(self, width, other):
        self.a = nn.MaxPool2d(2, 1, 1)

    def run_plain(self, x):
        return self.a(x)

    run_conv = run_deconv = run_norm = run_prelu = run_groupnorm = run_depthwise = run_grouped = run_pool = run_plain

    def make_residual(self, width, other):
        self.a, self.b, self.n = nn.Conv2d(width, other, 1), nn.Conv2d(other, width, 1), nn.BatchNorm2d(width)

    def run_residual(self, x):
        return x + self.n(self.b(self.a(x).relu()))

    make_twice = make_residual

    def run_twice(self, x):
        return self.b(self.a(self.b(self.a(x).relu())).sigmoid())

    def make_branch(self, width, other):
        self.out, self.a = width + other, nn.Conv2d(width, other, 1)

    def run_branch(self, x):
        return torch.cat([x, self.a(x)], 1)

    def make_gate(self, width, other):
        self.a, self.b = nn.Conv2d(width, other, 1), nn.Conv2d(other, width, 1)

    def run_gate(self, x):
        return x * self.b(self.a(x.mean((2, 3), keepdim=True)).relu()).sigmoid()

    def make_glu(self, width, other):
        self.out, self.a = other, nn.Conv2d(width, 2 * other, 1)

    def run_glu(self, x):
        return F.glu(self.a(x), 1)

    def make_shuffle(self, width, other):
        self.out, self.a = 2 * other, nn.Conv2d(width, 2 * other, 1)

    def run_shuffle(self, x):
        x = self.a(x)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)

    def make_slice(self, width, other):
        self.a, self.b, self.cut = nn.Conv2d(width, width, 1), nn.Conv2d(width - 2, width, 1), 2

    def run_slice(self, x):
        y = self.a(x)
        return self.b(y[:, self.cut :]) + y[:, :1]

    def make_parts(self, width, other):
        self.a, self.cut = nn.Conv2d(width, width, 1), 1 + other % max(1, width - 1)

    def run_parts(self, x):
        y = self.a(x)
        return torch.cat([y[:, : self.cut].relu(), y[:, self.cut :].tanh()], 1)

    def make_chunks(self, width, other):
        self.a, self.b = nn.Conv2d(width, 3 * other, 1), nn.Conv2d(other, other, 1)
        self.out = 3 * other

    def run_chunks(self, x):
        one, two, three = self.a(x).chunk(3, 1)
        return torch.cat([two, self.b(one.relu()) + one, three.sigmoid()], 1)

    def make_numbers(self, width, other):
        self.a, self.out, self.each = nn.Conv2d(width, 2 * other, 1), 2 * other, other

    def run_numbers(self, x):
        y = self.a(x)
        return y.view(-1, 2, self.each, y.shape[2], y.shape[3]).relu().flatten(1, 2)

    def make_layernorm(self, width, other):
        self.a, self.n = nn.Conv2d(width, width, 1), nn.LayerNorm(width)

    def run_layernorm(self, x):
        return self.n(self.a(x).movedim(1, -1)).movedim(-1, 1)

    def make_table(self, width, other):
        self.a, self.bias, self.kept = nn.Conv2d(width, width, 1), nn.Parameter(torch.randn(3, width)), {}

    def run_table(self, x):
        if "sum" not in self.kept:
            self.kept["sum"] = self.bias[torch.tensor([0, 2])].sum(0)
        return self.a(x) + self.kept["sum"][:, None, None]


class SeqLayer(Layer):
    def make_rmsnorm(self, width, other):
        self.a = nn.RMSNorm(width)

    def run_rmsnorm(self, x):
        return self.a(x)

    def make_parts(self, width, other):
        self.a, self.cut = nn.Linear(width, width), 1 + other % max(1, width - 1)

    def run_parts(self, x):
        one, two = self.a(x).split([self.cut, self.a.weight.shape[0] - self.cut], -1)
        return torch.cat([one.relu(), two.tanh()], -1)

    def make_numbers(self, width, other):
        self.a, self.out, self.each = nn.Linear(width, 3 * other), 3 * other, other

    def run_numbers(self, x):
        return self.a(x).unflatten(-1, (3, self.each)).relu().reshape(*x.shape[:2], 3 * self.each)

    def make_linear(self, width, other):
        self.out, self.a = other, nn.Linear(width, other)

    def run_linear(self, x):
        return self.a(x)

    def make_layernorm(self, width, other):
        self.a = nn.LayerNorm(width)

    run_layernorm = run_linear

    def make_residual(self, width, other):
        self.a, self.b = nn.Linear(width, other), nn.Linear(other, width)

    def run_residual(self, x):
        return x + self.b(self.a(x).tanh())

    make_twice = make_residual

    def run_twice(self, x):
        return self.b(self.a(self.b(self.a(x).relu())).sigmoid())

    def make_branch(self, width, other):
        self.out, self.a = width + other, nn.Linear(width, other)

    def run_branch(self, x):
        return torch.cat([self.a(x), x], -1)

    def make_lstm(self, width, other):
        self.out, self.a = 2 * other, nn.LSTM(width, other, batch_first=True, bidirectional=True)

    def make_gru(self, width, other):
        self.out, self.a = other, nn.GRU(width, other, 2, batch_first=True)

    def run_lstm(self, x):
        return self.a(x)[0]

    run_gru = run_lstm

    def make_mha(self, width, other):
        self.out, self.b = 12, nn.Linear(width, 12)
        self.a = nn.MultiheadAttention(12, 3, batch_first=True)

    def run_mha(self, x):
        x = self.b(x)
        return x + self.a(x, x, x)[0]

    def make_swiglu(self, width, other):
        self.a, self.b, self.c = nn.Linear(width, other), nn.Linear(width, other), nn.Linear(other, width)

    def run_swiglu(self, x):
        return self.c(F.silu(self.a(x)) * self.b(x))

    def make_heads(self, width, other):
        self.a, self.b, self.num_heads = nn.Linear(width, 24), nn.Linear(8, width), 4

    def run_heads(self, x):
        n, t, _ = x.shape
        q, k, v = self.a(x).view(n, t, 3, self.num_heads, 2).permute(2, 0, 3, 1, 4)
        return self.b(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 8))


def words(kinds):
    return st.lists(st.tuples(st.sampled_from(kinds), st.integers(2, 7)), min_size=1, max_size=6)


def stack(kind, names, width):
    layers = []
    for name, other in names:
        if (name in ("grouped", "groupnorm") and width % 2) or (name in ("slice", "parts") and width < 4):
            continue
        layers.append(kind(name, width, other))
        width = layers[-1].out
    return layers, width


def largest_gap(model, x, ratio, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / max(parameter[0].numel(), 1) ** 0.5
    randomise(model, generator)
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OckhamWarning)
        groups = trace(model, x)
    return worst_difference(model, groups, x, ratio=ratio, seed=seed)[0]


def conv_net(names):
    layers, width = stack(ConvLayer, names, 6)
    return nn.Sequential(nn.Conv2d(3, 6, 3), *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 3))


def seq_net(names):
    layers, width = stack(SeqLayer, names, 6)
    return nn.Sequential(nn.Linear(3, 6), *layers, nn.Linear(width, 3))


def few(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


RATIOS = st.sampled_from([0.2, 0.5, 0.8])
IMAGE = torch.linspace(-3, 3, 2 * 3 * 7 * 7).sin().reshape(2, 3, 7, 7)
TOKENS = torch.linspace(-3, 3, 2 * 5 * 3).sin().reshape(2, 5, 3)


@few(60)
@given(words(CONV), RATIOS, st.integers(0, 99))
def test_random_convolutional_networks(names, ratio, seed):
    assert largest_gap(conv_net(names), IMAGE, ratio, seed) <= 1e-5


@few(40)
@given(words(SEQ), RATIOS, st.integers(0, 99))
def test_random_sequence_networks(names, ratio, seed):
    assert largest_gap(seq_net(names), TOKENS, ratio, seed) <= 1e-5


@pytest.mark.slow
@few(1200)
@given(words(CONV), RATIOS, st.integers(0, 10**6))
def test_many_random_convolutional_networks(names, ratio, seed):
    assert largest_gap(conv_net(names), IMAGE, ratio, seed) <= 1e-5


@pytest.mark.slow
@few(800)
@given(words(SEQ), RATIOS, st.integers(0, 10**6))
def test_many_random_sequence_networks(names, ratio, seed):
    assert largest_gap(seq_net(names), TOKENS, ratio, seed) <= 1e-5
