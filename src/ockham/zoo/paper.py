"""The networks of the first paper (arXiv 2309.12095) for 28 x 28 or 32 x 32 images, and a small character transformer.

Grey images of 28 x 28 are padded to 32 x 32 inside the networks, except for the MLP. Attention is written with separate
linear maps for queries, keys and values, so that every head has weights of its own.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ockham.errors import OckhamError

__all__ = [
    "Attention",
    "CharTransformer",
    "Mixer",
    "MixerBlock",
    "PadTo32",
    "TransformerBlock",
    "VisionTransformer",
    "lenet_tanh",
    "lenet_tanh_cifar",
    "mixer",
    "mixer_cifar",
    "mlp_swish",
    "mlp_swish_cifar",
    "vit",
    "vit_cifar",
]

_SIDE = 32


def mlp_swish(channels: int = 1, side: int = 28, classes: int = 10) -> nn.Sequential:
    """Four hidden layers of 500 with swish; 1,149,010 parameters for Fashion-MNIST."""
    sizes = [channels * side * side, 500, 500, 500, 500, classes]
    parts: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i in range(1, len(sizes)):
        parts[f"fc{i}"] = nn.Linear(sizes[i - 1], sizes[i])
        if i < len(sizes) - 1:
            parts[f"act{i}"] = nn.SiLU()
    return nn.Sequential(parts)


def mlp_swish_cifar() -> nn.Sequential:
    """The same for 3 x 32 x 32 images."""
    return mlp_swish(3, 32)


def lenet_tanh(
    channels: int = 1, sizes: tuple[int, int, int, int] = (6, 16, 120, 84), classes: int = 10
) -> nn.Sequential:
    """LeNet-5 as published, 6-16-120-84 with tanh and average pooling; 61,706 parameters for grey images.

    Args:
        channels: channels of the image.
        sizes: channels of the two convolutions, features of the two hidden layers.
        classes: outputs.
    """
    a, b, c, d = sizes
    return nn.Sequential(
        OrderedDict(
            pad=PadTo32(),
            conv1=nn.Conv2d(channels, a, 5),
            act1=nn.Tanh(),
            pool1=nn.AvgPool2d(2),
            conv2=nn.Conv2d(a, b, 5),
            act2=nn.Tanh(),
            pool2=nn.AvgPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(25 * b, c),
            act3=nn.Tanh(),
            fc2=nn.Linear(c, d),
            act4=nn.Tanh(),
            fc3=nn.Linear(d, classes),
        )
    )


def lenet_tanh_cifar() -> nn.Sequential:
    """18-48-360-256 for colour images."""
    return lenet_tanh(3, (18, 48, 360, 256))


class PadTo32(nn.Module):
    """Zero rows and columns around an image up to 32 x 32; larger ones pass unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C, max(H, 32), max(W, 32)]."""
        high, wide = (max(0, _SIDE - size) for size in x.shape[-2:])
        return F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2)) if high or wide else x


class Attention(nn.Module):
    """Multi-head self-attention with a linear map each for queries, keys, values and the output.

    Args:
        dim: features of a token.
        heads: number of heads that share them.
        causal: flag, True: a token sees only itself and those before it.
    """

    def __init__(self, dim: int, heads: int, causal: bool) -> None:
        super().__init__()
        if dim % heads:
            raise OckhamError(f"Attention: dim must be a multiple of heads; got {dim} and {heads}")
        self.size, self.causal = dim // heads, causal
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, dim] to [N, T, dim]."""
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, -1, self.size).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        projected: Tensor = self.out(mixed.transpose(1, 2).reshape(n, t, -1))
        return projected


class TransformerBlock(nn.Module):
    """Pre-norm block: x + attention(norm1(x)), then x + fc2(gelu(fc1(norm2(x))))."""

    def __init__(self, dim: int, heads: int, hidden: int, *, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads, causal)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, dim] to [N, T, dim]."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return out


class VisionTransformer(nn.Module):
    """ViT of the first paper: patches of 4 x 4, mean over tokens, learned positions.

    Args:
        channels: channels of the image.
        dim: features of a token.
        blocks: transformer blocks.
        heads: heads of attention.
        hidden: hidden width of the MLP in a block.
        classes: outputs.
    """

    def __init__(
        self, channels: int = 1, dim: int = 256, blocks: int = 6, heads: int = 8, hidden: int = 512, classes: int = 10
    ) -> None:
        super().__init__()
        self.pad = PadTo32()
        self.embed = nn.Conv2d(channels, dim, 4, stride=4)
        self.position = nn.Parameter(0.02 * torch.randn(1, (_SIDE // 4) ** 2, dim))
        self.blocks = nn.Sequential(*(TransformerBlock(dim, heads, hidden) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to logits [N, classes]."""
        tokens = self.embed(self.pad(x)).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


class MixerBlock(nn.Module):
    """Mixes over tokens, then over channels; an MLP with one hidden layer each."""

    def __init__(self, tokens: int, dim: int, token_hidden: int, channel_hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.token1, self.token2 = nn.Linear(tokens, token_hidden), nn.Linear(token_hidden, tokens)
        self.channel1, self.channel2 = nn.Linear(dim, channel_hidden), nn.Linear(channel_hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, dim] to [N, T, dim]."""
        turned = self.norm1(x).transpose(1, 2)
        x = x + self.token2(F.gelu(self.token1(turned))).transpose(1, 2)
        out: Tensor = x + self.channel2(F.gelu(self.channel1(self.norm2(x))))
        return out


class Mixer(nn.Module):
    """MLP-Mixer of the first paper: patches of 4 x 4.

    Args:
        channels: channels of the image.
        dim: features of a token.
        blocks: mixer blocks.
        token_hidden: hidden features of the MLP over tokens.
        channel_hidden: hidden width of the MLP over channels.
        classes: outputs.
    """

    def __init__(
        self,
        channels: int = 1,
        dim: int = 256,
        blocks: int = 6,
        token_hidden: int = 512,
        channel_hidden: int = 512,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.pad = PadTo32()
        self.embed = nn.Conv2d(channels, dim, 4, stride=4)
        tokens = (_SIDE // 4) ** 2
        self.blocks = nn.Sequential(*(MixerBlock(tokens, dim, token_hidden, channel_hidden) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to logits [N, classes]."""
        tokens = self.embed(self.pad(x)).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


def vit() -> VisionTransformer:
    """For grey images; dim 256, 6 blocks, 8 heads, MLP 512."""
    return VisionTransformer()


def vit_cifar() -> VisionTransformer:
    """For colour images."""
    return VisionTransformer(channels=3)


def mixer() -> Mixer:
    """For grey images; dim 256, 6 blocks, tokens 512, channels 512."""
    return Mixer()


def mixer_cifar() -> Mixer:
    """For colour images."""
    return Mixer(channels=3)


class CharTransformer(nn.Module):
    """A small causal language model over characters (or any small vocabulary).

    Args:
        vocabulary: number of symbols.
        context: most symbols it sees.
        dim: features of a token.
        blocks: transformer blocks.
        heads: heads of attention.
    """

    def __init__(self, vocabulary: int, context: int = 64, dim: int = 128, blocks: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.context = context
        self.embed = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(0.02 * torch.randn(1, context, dim))
        self.blocks = nn.Sequential(*(TransformerBlock(dim, heads, 4 * dim, causal=True) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocabulary)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, symbols: Tensor) -> Tensor:
        """Symbols [N, T] to logits [N, vocabulary, T] of the next one; T at most the context."""
        x = self.embed(symbols) + self.position[:, : symbols.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits.transpose(1, 2)
