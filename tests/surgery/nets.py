"""Small networks, one per rule of tracing, with the structures that must be prunable in each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

L = nn.Linear


class Fn(nn.Module):
    """A network whose forward is the function `f(self, *inputs)`."""

    def __init__(self, f, **mods):
        super().__init__()
        self._f = f
        for k, v in mods.items():
            setattr(self, k, v)

    def forward(self, *a):
        return self._f(self, *a)


def C(i, o, k=3, **kw):
    return nn.Conv2d(i, o, k, padding=k // 2, **kw)


class NanoAttn(nn.Module):
    def __init__(self, d=16, h=4):
        super().__init__()
        self.n_head = h
        self.c_attn = L(d, 3 * d)
        self.c_proj = L(d, d)
        self.n_embd = d

    def forward(self, x):
        B, T, Cc = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (t.view(B, T, self.n_head, Cc // self.n_head).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, Cc))


class TimmAttn(nn.Module):
    def __init__(self, d=16, h=4):
        super().__init__()
        self.num_heads = h
        self.head_dim = d // h
        self.scale = self.head_dim**-0.5
        self.qkv = L(d, 3 * d)
        self.proj = L(d, d)

    def forward(self, x):
        B, N, Cc = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        a = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((a @ v).transpose(1, 2).reshape(B, N, Cc))


class GQA(nn.Module):
    def __init__(self, d=16, h=4, kv=2):
        super().__init__()
        self.h, self.kv, self.hd = h, kv, d // h
        self.q = L(d, d)
        self.k = L(d, kv * self.hd)
        self.v = L(d, kv * self.hd)
        self.o = L(d, d)

    def forward(self, x):
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.h, self.hd).transpose(1, 2)
        k = self.k(x).view(B, T, self.kv, self.hd).transpose(1, 2)
        v = self.v(x).view(B, T, self.kv, self.hd).transpose(1, 2)
        k = k.repeat_interleave(self.h // self.kv, 1)
        v = v.repeat_interleave(self.h // self.kv, 1)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, -1))


def tx(att):
    return lambda: nn.Sequential(L(6, 16), nn.LayerNorm(16), att(), L(16, 5))


def seq():
    return torch.randn(2, 7, 6)


def img():
    return torch.randn(2, 3, 8, 8)


def head(c):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), L(c, 4))


class SE(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.a = nn.Conv2d(c, 4, 1)
        self.b = nn.Conv2d(4, c, 1)

    def forward(self, x):
        return x * self.b(self.a(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def shuffle(x, g):
    B, Cc, H, W = x.shape
    return x.view(B, g, Cc // g, H, W).transpose(1, 2).contiguous().view(B, Cc, H, W)


def cs(self, x):
    x = self.a(x)
    return self.h(self.b(shuffle(x, 2)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(20, 12)
        self.m = L(12, 12)
        self.o = L(12, 20, bias=False)
        self.o.weight = self.e.weight

    def forward(self, x):
        return self.o(self.m(self.e(x)).tanh() + self.e(x))


def ids():
    return torch.randint(0, 20, (3, 5))


def dense_cat(self, x):
    y = self.n(self.a(x))
    return self.h(torch.cat([y, self.b(y).relu()], 1))


def chunk_glu(self, x):
    a, b = self.a(x).chunk(2, 1)
    return self.h(a * b.sigmoid())


def split_parts(self, x):
    a, b = self.a(x).split([6, 10], 1)
    return torch.cat([self.b(a.relu()), self.c(b.tanh())], 1).flatten(1)


def slice_parts(self, x):
    y = self.a(x)
    return self.b(y[:, :6].relu()) + self.c(y[:, 6:])


def chunk_three(self, x):
    a, b, c = self.a(x).chunk(3, 1)
    return self.b(a.relu()) + self.c(b) + self.d(c)


def pad_shortcut(self, x):
    y = self.a(x)
    return self.h((self.c(y.relu()) + F.pad(y, (0, 0, 0, 0, 2, 2))).relu())


def two_steps(self, x):
    return self.o(self.l(x[:, 1], self.l(x[:, 0]))[0])


def with_attention(self, x):
    y = self.i(x)
    return self.o(self.n(y + self.m(y, y, y)[0]))


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "mlp": (lambda: nn.Sequential(L(6, 16), nn.ReLU(), L(16, 12), nn.GELU(), L(12, 3)), lambda: torch.randn(4, 6)),
    "conv1d": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 6, 3), nn.Flatten(), L(24, 3)
        ),
        lambda: torch.randn(2, 3, 8),
    ),
    "conv3d": (
        lambda: nn.Sequential(
            nn.Conv3d(2, 8, 3),
            nn.BatchNorm3d(8),
            nn.ReLU(),
            nn.Conv3d(8, 6, 2),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
            L(6, 3),
        ),
        lambda: torch.randn(2, 2, 6, 6, 6),
    ),
    "grouped": (
        lambda: nn.Sequential(C(3, 16), C(16, 24, groups=4), nn.BatchNorm2d(24), nn.ReLU(), C(24, 8), head(8)),
        img,
    ),
    "depthwise": (
        lambda: nn.Sequential(
            C(3, 12, 1),
            nn.BatchNorm2d(12),
            nn.ReLU6(),
            C(12, 12, groups=12),
            nn.BatchNorm2d(12),
            nn.ReLU6(),
            C(12, 8, 1),
            head(8),
        ),
        img,
    ),
    "depthwise_mult": (lambda: nn.Sequential(C(3, 6, 1), C(6, 18, groups=6), nn.ReLU(), C(18, 8, 1), head(8)), img),
    "deconv": (
        lambda: nn.Sequential(
            C(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2), nn.BatchNorm2d(6), nn.ReLU(), C(6, 3)
        ),
        img,
    ),
    "deconv_grouped": (
        lambda: nn.Sequential(C(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 12, 2, 2, groups=4), nn.ReLU(), C(12, 3)),
        img,
    ),
    "deconv_depthwise": (
        lambda: nn.Sequential(C(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, 2, groups=8), nn.ReLU(), C(8, 3)),
        img,
    ),
    "groupnorm": (
        lambda: nn.Sequential(
            C(3, 16), nn.GroupNorm(8, 16), nn.SiLU(), C(16, 12), nn.GroupNorm(12, 12), nn.ReLU(), head(12)
        ),
        img,
    ),
    "instancenorm": (
        lambda: nn.Sequential(
            C(3, 16),
            nn.InstanceNorm2d(16, affine=True, track_running_stats=True),
            nn.ReLU(),
            C(16, 8),
            nn.InstanceNorm2d(8),
            nn.ReLU(),
            head(8),
        ),
        img,
    ),
    "cat": (
        lambda: Fn(
            lambda self, x: self.h(self.c(torch.cat([self.a(x).relu(), self.b(x).relu(), x], 1))),
            a=C(3, 8),
            b=C(3, 6),
            c=C(17, 10),
            h=head(10),
        ),
        img,
    ),
    "dense_cat": (
        lambda: Fn(
            dense_cat,
            a=C(3, 8),
            n=nn.BatchNorm2d(8),
            b=C(8, 6),
            h=head(14),
        ),
        img,
    ),
    "chunk_glu": (
        lambda: Fn(chunk_glu, a=C(3, 16), h=head(8)),
        img,
    ),
    "f_glu": (
        lambda: Fn(lambda self, x: self.b(F.glu(self.a(x), -1)), a=L(6, 16), b=L(8, 3)),
        lambda: torch.randn(4, 6),
    ),
    "swiglu": (
        lambda: Fn(lambda self, x: self.d(F.silu(self.g(x)) * self.u(x)), g=L(6, 16), u=L(6, 16), d=L(16, 3)),
        lambda: torch.randn(4, 6),
    ),
    "split_parts": (
        lambda: Fn(
            split_parts,
            a=C(3, 16),
            b=C(6, 2),
            c=C(10, 2),
        ),
        img,
    ),
    "slice_parts": (
        lambda: Fn(
            slice_parts,
            a=C(3, 16),
            b=C(6, 2),
            c=C(10, 2),
        ),
        img,
    ),
    "chunk3": (
        lambda: Fn(
            chunk_three,
            a=C(3, 18),
            b=C(6, 2),
            c=C(6, 2),
            d=C(6, 2),
        ),
        img,
    ),
    "se": (lambda: nn.Sequential(C(3, 12), nn.ReLU(), SE(12), C(12, 8), nn.ReLU(), head(8)), img),
    "pixel_shuffle": (lambda: nn.Sequential(C(3, 16), nn.PixelShuffle(2), nn.ReLU(), C(4, 3)), img),
    "pixel_unshuffle": (lambda: nn.Sequential(C(3, 6), nn.PixelUnshuffle(2), nn.ReLU(), C(24, 3)), img),
    "chan_shuffle": (lambda: Fn(cs, a=C(3, 12), b=C(12, 8, groups=2), h=head(8)), img),
    "chan_shuffle_mod": (lambda: nn.Sequential(C(3, 12), nn.ChannelShuffle(2), C(12, 8, groups=2), head(8)), img),
    "perchannel": (
        lambda: Fn(
            lambda self, x: self.h(self.a(x).relu() * self.g + self.b),
            a=C(3, 8),
            g=nn.Parameter(torch.randn(1, 8, 1, 1)),
            b=nn.Parameter(torch.randn(8, 1, 1)),
            h=head(8),
        ),
        img,
    ),
    "prelu": (lambda: nn.Sequential(C(3, 8), nn.PReLU(8), C(8, 6), nn.PReLU(), head(6)), img),
    "lstm": (
        lambda: Fn(
            lambda self, x: self.o(self.l(self.i(x).tanh())[0][:, -1]),
            i=L(6, 10),
            l=nn.LSTM(10, 8, 2, batch_first=True, bidirectional=True),
            o=L(16, 3),
        ),
        seq,
    ),
    "lstm_proj": (
        lambda: Fn(
            lambda self, x: self.o(self.l(self.i(x).tanh())[0]),
            i=L(6, 10),
            l=nn.LSTM(10, 8, 2, batch_first=True, proj_size=5),
            o=L(5, 3),
        ),
        seq,
    ),
    "lstm_hn": (
        lambda: Fn(lambda self, x: self.o(self.l(x)[1][0][-1]), l=nn.LSTM(6, 8, 1, batch_first=True), o=L(8, 3)),
        seq,
    ),
    "gru": (
        lambda: Fn(
            lambda self, x: self.o(self.l(x)[0]), l=nn.GRU(6, 8, 2, batch_first=True, bidirectional=True), o=L(16, 3)
        ),
        seq,
    ),
    "rnn": (lambda: Fn(lambda self, x: self.o(self.l(x)[0]), l=nn.RNN(6, 8, 2, batch_first=True), o=L(8, 3)), seq),
    "mha": (
        lambda: Fn(
            with_attention,
            i=L(6, 16),
            m=nn.MultiheadAttention(16, 4, batch_first=True),
            n=nn.LayerNorm(16),
            o=L(16, 3),
        ),
        seq,
    ),
    "mha_kdim": (
        lambda: Fn(
            lambda self, x: self.m(self.i(x), x, x)[0],
            i=L(6, 16),
            m=nn.MultiheadAttention(16, 4, kdim=6, vdim=6, batch_first=True),
        ),
        seq,
    ),
    "encoder": (
        lambda: nn.Sequential(
            L(6, 16), nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2), L(16, 3)
        ),
        seq,
    ),
    "nano": (tx(NanoAttn), seq),
    "timm": (tx(TimmAttn), seq),
    "gqa": (tx(GQA), seq),
    "tied": (Tied, ids),
    "einsum": (
        lambda: Fn(
            lambda self, x: self.o(torch.einsum("bti,io->bto", self.i(x).relu(), self.w).relu()),
            i=L(6, 10),
            w=nn.Parameter(torch.randn(10, 8)),
            o=L(8, 3),
        ),
        seq,
    ),
    "vae": (
        lambda: nn.Sequential(
            L(6, 128), nn.ReLU(), nn.Unflatten(1, (8, 4, 4)), nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(), C(6, 3)
        ),
        lambda: torch.randn(2, 6),
    ),
    "permute": (
        lambda: Fn(
            lambda self, x: self.o(self.n(self.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).flatten(1)),
            a=C(3, 8),
            n=L(8, 10),
            o=L(640, 3),
        ),
        img,
    ),
    "weight_norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(L(6, 12)), nn.ReLU(), L(12, 3)),
        lambda: torch.randn(4, 6),
    ),
    "bag": (
        lambda: nn.Sequential(nn.EmbeddingBag(9, 10, mode="max"), nn.ReLU(), L(10, 7), nn.ReLU(), L(7, 3)),
        lambda: torch.randint(0, 9, (4, 6)),
    ),
    "tensordot": (
        lambda: Fn(
            lambda self, x: torch.tensordot(self.w, self.a(x).relu().view(-1, 5, 8), ([0, 2], [2, 1])).T,
            a=L(6, 40),
            w=nn.Parameter(torch.randn(8, 3, 5)),
        ),
        lambda: torch.randn(4, 6),
    ),
    "twice": (
        lambda: Fn(
            lambda self, x: self.o(self.m(self.m(self.i(x)).relu()).relu()), i=L(6, 12), m=L(12, 12), o=L(12, 3)
        ),
        lambda: torch.randn(4, 6),
    ),
    "pad_shortcut": (
        lambda: Fn(
            pad_shortcut,
            a=C(3, 8),
            c=C(8, 12),
            h=head(12),
        ),
        img,
    ),
    "zero_pad": (
        lambda: nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 8, 3), nn.ZeroPad2d((1, 0, 2, 1)), C(8, 4), nn.ReLU()),
        img,
    ),
    "lstmcell": (
        lambda: Fn(two_steps, l=nn.LSTMCell(6, 8), o=L(8, 3)),
        seq,
    ),
    "upsample": (
        lambda: nn.Sequential(C(3, 8), nn.Upsample(scale_factor=2, mode="bilinear"), C(8, 6), nn.MaxPool2d(2), head(6)),
        img,
    ),
}

MUST: dict[str, dict[str, int]] = {
    "mlp": {"0.weight:0": 16, "2.weight:0": 12},
    "conv1d": {"0.weight:0": 8, "3.weight:0": 6},
    "conv3d": {"0.weight:0": 8, "3.weight:0": 6},
    "grouped": {"0.weight:0": 4, "1.weight:0": 6, "4.weight:0": 8},
    "depthwise": {"0.weight:0": 12, "6.weight:0": 8},
    "depthwise_mult": {"0.weight:0": 6, "3.weight:0": 8},
    "deconv": {"0.weight:0": 8, "2.weight:1": 6},
    "deconv_grouped": {"0.weight:0": 2, "2.weight:1": 3},
    "deconv_depthwise": {"0.weight:0": 8},
    "groupnorm": {"0.weight:0": 16, "3.weight:0": 12},
    "instancenorm": {"0.weight:0": 16, "3.weight:0": 8},
    "cat": {"a.weight:0": 8, "b.weight:0": 6, "c.weight:0": 10},
    "dense_cat": {"a.weight:0": 8, "b.weight:0": 6},
    "chunk_glu": {"a.weight:0": 8},
    "f_glu": {"a.weight:0": 8},
    "swiglu": {"g.weight:0": 16},
    "split_parts": {"a.weight:0": 6, "a.weight:0#2": 10},
    "slice_parts": {"a.weight:0": 6, "a.weight:0#2": 10},
    "chunk3": {"a.weight:0": 6, "a.weight:0#2": 6, "a.weight:0#3": 6},
    "se": {"0.weight:0": 12, "2.a.weight:0": 4, "3.weight:0": 8},
    "pixel_shuffle": {"0.weight:0": 4},
    "pixel_unshuffle": {"0.weight:0": 6},
    "chan_shuffle": {"a.weight:0": 3, "b.weight:0": 4},
    "chan_shuffle_mod": {"0.weight:0": 3, "2.weight:0": 4},
    "perchannel": {"g:1": 8},
    "prelu": {"0.weight:0": 8, "2.weight:0": 6},
    "lstm": {"i.weight:0": 10, "l.weight_ih_l0:0": 8},
    "lstm_proj": {"i.weight:0": 10, "l.weight_ih_l0:0": 8, "l.weight_hr_l0:0": 5},
    "lstm_hn": {"l.weight_ih_l0:0": 8},
    "gru": {"l.weight_ih_l0:0": 8},
    "rnn": {"l.weight_ih_l0:0": 8},
    "mha": {"i.weight:0": 16, "m.in_proj_weight:0": 4},
    "mha_kdim": {"i.weight:0": 16, "m.q_proj_weight:0": 4},
    "encoder": {
        "0.weight:0": 16,
        "1.layers.0.self_attn.in_proj_weight:0": 4,
        "1.layers.0.linear1.weight:0": 32,
        "1.layers.1.self_attn.in_proj_weight:0": 4,
        "1.layers.1.linear1.weight:0": 32,
    },
    "nano": {"0.weight:0": 16, "2.c_attn.weight:0": 4, "2.c_proj.weight:0": 16},
    "timm": {"0.weight:0": 16, "2.qkv.weight:0": 4, "2.proj.weight:0": 16},
    "gqa": {"0.weight:0": 16, "2.q.weight:0": 2, "2.o.weight:0": 16},
    "tied": {"e.weight:1": 12},
    "einsum": {"i.weight:0": 10, "w:1": 8},
    "vae": {"0.weight:0": 8, "3.weight:1": 6},
    "permute": {"a.weight:0": 8, "n.weight:0": 10},
    "weight_norm": {"0.bias:0": 12},
    "bag": {"0.weight:1": 10, "2.weight:0": 7},
    "tensordot": {"a.weight:0": 8},
    "twice": {"i.weight:0": 12},
    "pad_shortcut": {"a.weight:0": 8, "c.weight:0": 4},
    "zero_pad": {"1.weight:0": 8},
    "lstmcell": {"l.weight_ih:0": 8},
    "upsample": {"0.weight:0": 8, "2.weight:0": 6},
}
"""Groups and their numbers of units, found by hand: fewer is a refusal, more a wrong split."""
