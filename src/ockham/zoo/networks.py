"""The papers' networks, by name. Each is plain PyTorch with named parts; nothing in them knows of pruning."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ockham.errors import DataError, OckhamError
from ockham.zoo.data import Dataset

__all__ = [
    "NETWORKS",
    "Attention",
    "CharTransformer",
    "Mixer",
    "MixerBlock",
    "PadShortcut",
    "PadTo32",
    "ResNet",
    "ResidualBlock",
    "TransformerBlock",
    "VisionTransformer",
    "constructor",
    "digits_mlp",
    "lenet5_caffe",
    "lenet_300_100",
    "lenet_tanh",
    "lenet_tanh_cifar",
    "mixer",
    "mixer_cifar",
    "mlp",
    "mlp_swish",
    "mlp_swish_cifar",
    "resnet20",
    "resnet32",
    "resnet56",
    "resnet110",
    "suggest",
    "vgg16",
    "vgg16_quarter",
    "vit",
    "vit_cifar",
]


def mlp(sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers `fc1`, `fc2`, ... with an activation between each two; the input is flattened.

    Args:
        sizes: features of the input, of each hidden layer, of the output.
        activation: class or function that makes the module between two layers.

    Raises:
        OckhamError: fewer than two sizes, or one below 1.

    >>> mlp([4, 3, 2])(torch.zeros(5, 2, 2)).shape
    torch.Size([5, 2])
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise OckhamError(f"mlp: sizes must be two or more positive numbers, input to output; got {list(sizes)}")
    parts: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i in range(1, len(sizes)):
        parts[f"fc{i}"] = nn.Linear(sizes[i - 1], sizes[i])
        if i < len(sizes) - 1:
            parts[f"act{i}"] = activation()
    return nn.Sequential(parts)


def digits_mlp() -> nn.Sequential:
    """64-256-128-10 for the 8 x 8 digits; 50,826 parameters."""
    return mlp([64, 256, 128, 10])


def lenet_300_100() -> nn.Sequential:
    """784-300-100-10 for 28 x 28 grey images; 266,610 parameters (LeCun et al. 1998)."""
    return mlp([784, 300, 100, 10])


def lenet5_caffe() -> nn.Sequential:
    """Caffe's LeNet-5, 20-50-500-10, for [N, 1, 28, 28]; 431,080 parameters."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 20, 5),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(800, 500),
            act1=nn.ReLU(),
            fc2=nn.Linear(500, 10),
        )
    )


class PadShortcut(nn.Module):
    """Option A of He et al. (2016): every `stride`-th pixel, zero channels before and after; no parameters.

    Args:
        before: zero channels put before the input's.
        after: zero channels put after them.
        stride: pixels a step.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.before, self.after, self.stride = before, after, stride

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, before + C + after, ceil(H / stride), ceil(W / stride)]."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"before={self.before}, after={self.after}, stride={self.stride}"


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm around a shortcut: relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x))))).

    Args:
        inputs: channels in.
        outputs: channels out, `inputs` or more.
        stride: stride of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        before = (outputs - inputs) // 2
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else PadShortcut(before, outputs - inputs - before, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """CIFAR ResNet of He et al. (2016), section 4.2: three stages of 16, 32, 64 channels, option-A shortcuts.

    Args:
        blocks: residual blocks a stage; 6 * blocks + 2 layers in all.
        classes: outputs.
    """

    def __init__(self, blocks: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to logits [N, classes]."""
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = ResidualBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(ResidualBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


def resnet20(classes: int = 10) -> ResNet:
    """269,722 parameters for 10 classes."""
    return ResNet(3, classes)


def resnet32(classes: int = 10) -> ResNet:
    """464,154 parameters for 10 classes."""
    return ResNet(5, classes)


def resnet56(classes: int = 10) -> ResNet:
    """853,018 parameters for 10 classes."""
    return ResNet(9, classes)


def resnet110(classes: int = 10) -> ResNet:
    """1,727,962 parameters for 10 classes."""
    return ResNet(18, classes)


def _vgg(width: int, classes: int) -> nn.Sequential:
    """Thirteen 3 x 3 convolutions with batch norm, halved five times, and one linear layer."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = 3
    for stage, (factor, depth) in enumerate(((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)), 1):
        for i in range(1, depth + 1):
            parts[f"conv{stage}_{i}"] = nn.Conv2d(inputs, factor * width, 3, padding=1, bias=False)
            parts[f"norm{stage}_{i}"] = nn.BatchNorm2d(factor * width)
            parts[f"act{stage}_{i}"] = nn.ReLU()
            inputs = factor * width
        parts[f"pool{stage}"] = nn.MaxPool2d(2)
    return nn.Sequential(parts | OrderedDict(flatten=nn.Flatten(), fc=nn.Linear(inputs, classes)))


def vgg16(classes: int = 10) -> nn.Sequential:
    """The VGG-like network of the pruning papers, for [N, 3, 32, 32]; 14,724,042 parameters for 10 classes."""
    return _vgg(64, classes)


def vgg16_quarter(classes: int = 10) -> nn.Sequential:
    """`vgg16` with a quarter of the channels, for machines without an accelerator."""
    return _vgg(16, classes)


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


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "digits_mlp": digits_mlp,
    "lenet_300_100": lenet_300_100,
    "lenet5_caffe": lenet5_caffe,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "vgg16": vgg16,
    "vgg16_quarter": vgg16_quarter,
    "mlp_swish": mlp_swish,
    "mlp_swish_cifar": mlp_swish_cifar,
    "lenet_tanh": lenet_tanh,
    "lenet_tanh_cifar": lenet_tanh_cifar,
    "vit": vit,
    "vit_cifar": vit_cifar,
    "mixer": mixer,
    "mixer_cifar": mixer_cifar,
}

_DEFAULTS = {
    ((1, 8, 8), 10): "digits_mlp",
    ((1, 28, 28), 10): "lenet_300_100",
    ((3, 32, 32), 10): "resnet20",
}


def constructor(name: str) -> Callable[..., nn.Module] | None:
    """What builds the network of a name: one of `NETWORKS`, or `mlp` of the sizes in its name; None for other names.

    >>> constructor("mlp_13_50_1")().fc2
    Linear(in_features=50, out_features=1, bias=True)
    """
    start, *sizes = name.split("_")
    if start == "mlp" and len(sizes) > 1 and all(s.isdecimal() and 0 < int(s) <= _WIDEST for s in sizes):
        return functools.partial(mlp, [int(s) for s in sizes])
    return NETWORKS.get(name)


_WIDEST = 65536


def suggest(dataset: Dataset, *, single: bool = False) -> str:
    """The name that fits these data when nobody chose one: of images by their size, of tables ``mlp_F_50_50_K``.

    Args:
        dataset: data set to be learned.
        single: flag, True: one output, whatever the classes (a logit, the logarithm of a rate).

    Raises:
        DataError: none does.
    """
    classes = len(dataset.classes or ())
    if dataset.image_shape is not None and (dataset.image_shape, classes) in _DEFAULTS and not single:
        return _DEFAULTS[dataset.image_shape, classes]
    if dataset.train_x.ndim == 2:
        outputs = 1 if single else classes or math.prod(dataset.train_y.shape[1:])
        return f"mlp_{dataset.train_x.shape[1]}_50_50_{outputs}"
    targets = f"{classes} classes" if classes else "regression targets"
    raise DataError(
        f"{dataset.name}: no default network for inputs {tuple(dataset.train_x.shape[1:])} and {targets}; "
        "pass --model package.module:function, mlp_64_32_10 (sizes from input to output) or one of "
        f"{', '.join(NETWORKS)}"
    )
