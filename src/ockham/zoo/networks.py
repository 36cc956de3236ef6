"""The papers' networks, by name. Each is plain PyTorch with named parts; nothing in them knows of pruning."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ockham.errors import DataError, OckhamError
from ockham.zoo import paper
from ockham.zoo.data import Dataset

__all__ = [
    "NETWORKS",
    "PadShortcut",
    "ResNet",
    "ResidualBlock",
    "digits_mlp",
    "lenet5_caffe",
    "lenet_300_100",
    "mlp",
    "resnet20",
    "resnet32",
    "resnet56",
    "resnet110",
    "suggest",
    "vgg16",
    "vgg16_quarter",
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
    "mlp_swish": paper.mlp_swish,
    "mlp_swish_cifar": paper.mlp_swish_cifar,
    "lenet_tanh": paper.lenet_tanh,
    "lenet_tanh_cifar": paper.lenet_tanh_cifar,
    "vit": paper.vit,
    "vit_cifar": paper.vit_cifar,
    "mixer": paper.mixer,
    "mixer_cifar": paper.mixer_cifar,
}

_DEFAULTS = {
    ((1, 8, 8), 10): "digits_mlp",
    ((1, 28, 28), 10): "lenet_300_100",
    ((3, 32, 32), 10): "resnet20",
}


def suggest(dataset: Dataset) -> str:
    """The name in `NETWORKS` that fits these images and classes when nobody chose one.

    Raises:
        DataError: none does.
    """
    classes = len(dataset.classes or ())
    if dataset.image_shape is not None and (dataset.image_shape, classes) in _DEFAULTS:
        return _DEFAULTS[dataset.image_shape, classes]
    targets = f"{classes} classes" if classes else "regression targets"
    raise DataError(
        f"{dataset.name}: no default network for inputs {tuple(dataset.train_x.shape[1:])} and {targets}; "
        f"pass --model package.module:function, or one of {', '.join(NETWORKS)}"
    )
