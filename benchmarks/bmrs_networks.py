"""Networks of the second paper's table: MLP, LeNet-5, and the two large ones, whose weights come from a file.

The large ones carry the parameter names of timm and torchvision (`resnet50`, `vit_base_patch16_224`), so that a
safetensors file published for those loads as it is; the classifier for other classes is left at its first values.
They take 32 x 32 images and enlarge them inside, a batch at a time: 50,000 images of 224 x 224 fit no memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def mlp(hidden: int, width: int, inputs: int) -> nn.Module:
    """N x width has n + 1 hidden layers, as in the paper."""
    inner = itertools.chain(*((nn.Linear(width, width), nn.Tanh()) for _ in range(hidden)))
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.Tanh(), *inner, nn.Linear(width, 10))


def lenet5(scale: int = 1) -> nn.Module:
    """LeNet-5 with ReLU on 32 x 32 images: 32, 28, 14, 10, 5; the CIFAR-10 one is three times as wide."""
    c = scale
    return nn.Sequential(
        nn.Conv2d(c, 6 * c, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6 * c, 16 * c, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400 * c, 120 * c), nn.ReLU(), nn.Linear(120 * c, 84 * c), nn.ReLU(),
        nn.Linear(84 * c, 10),
    )  # fmt: skip


# ------------------------------------------------------------------ vision transformer


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, dim] to the same."""
        n, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, dim))


class Mlp(nn.Module):
    """The two layers of a block."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, dim] to the same."""
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim, ratio * dim)

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, dim] to the same."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Patches(nn.Module):
    """Images to tokens."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 3, side, side] to [n, tokens, dim]."""
        return self.proj(x).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """A vision transformer with a class token."""

    def __init__(
        self, *, image: int = 32, patch: int = 4, dim: int = 256, depth: int = 6, heads: int = 8, ratio: int = 2
    ):
        super().__init__()
        self.patch_embed = Patches(dim, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (image // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, ratio) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        tokens = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(tokens))[:, 0])


# ------------------------------------------------------------------ ResNet-50


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions; the stride is in the middle one."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """A batch of maps to the next."""
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn3(self.conv3(self.bn2(self.conv2(y)).relu()))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet50(nn.Module):
    """ResNet-50 of torchvision and timm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = 64
        for i, (width, depth) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
            parts = []
            for k in range(depth):
                parts.append(Bottleneck(inputs, width, 2 if i and not k else 1))
                inputs = 4 * width
            setattr(self, f"layer{i + 1}", nn.Sequential(*parts))
        self.fc = nn.Linear(2048, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))


# ------------------------------------------------------------------ enlarged, with weights


class Enlarged(nn.Module):
    """A network for 224 x 224 images, fed smaller ones."""

    def __init__(self, network: nn.Module, side: int = 224) -> None:
        super().__init__()
        self.network, self.side = network, side

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        large = nn.functional.interpolate(x, (self.side, self.side), mode="bilinear", align_corners=False)
        return self.network(large)


def resnet50() -> nn.Module:
    """ResNet-50, ten classes."""
    return Enlarged(ResNet50())


def vit_b16() -> nn.Module:
    """ViT-B/16, ten classes."""
    return Enlarged(ViT(image=224, patch=16, dim=768, depth=12, heads=12, ratio=4))


def load_weights(model: nn.Module, file: Path) -> list[str]:
    """Load a safetensors file in the names of timm; returns the names that stayed as they were (the classifier)."""
    found: Mapping[str, Tensor] = load_file(file)
    inner = model.network if isinstance(model, Enlarged) else model
    own = inner.state_dict()
    fits = {k: v for k, v in found.items() if k in own and own[k].shape == v.shape}
    left = sorted(k for k in own if k not in fits and not k.endswith("num_batches_tracked"))
    if any(not k.startswith(("fc.", "head.")) for k in left):
        raise SystemExit(f"{file} does not fit: it lacks {', '.join(left[:5])} ({len(left)} in all)")
    inner.load_state_dict({**own, **fits})
    return left
