"""CIFAR-10 as the given weights of `pretrained/` expect it, and those networks: shared by the benchmarks."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ockham.zoo.files import sheet_folder
from ockham.zoo.networks import NETWORKS

MEAN, STD = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
Part = tuple[Tensor, Tensor]


def parts(data: Path, train: int | None = None, test: int | None = None) -> tuple[Part, Part]:
    """The first images and labels of the training and of the test part."""
    found = sheet_folder(data / "cifar10", None)
    assert found is not None
    assert found.test is not None
    return _images(found.train, train), _images(found.test, test)


def _images(part: object, n: int | None) -> Part:
    x = torch.from_numpy(part.x[:n]).permute(0, 3, 1, 2) / 255  # type: ignore[attr-defined]
    x = (x - MEAN[:, None, None]) / STD[:, None, None]
    return x.contiguous(), torch.from_numpy(part.y[:n]).long()  # type: ignore[attr-defined]


def given(data: Path, network: str) -> nn.Module:
    """A network of the zoo with its given weights, in evaluation mode."""
    model = NETWORKS[network]().eval()
    model.load_state_dict(load_file(data / "pretrained" / f"{network}-cifar10.safetensors"))
    return model


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    """Per cent."""
    x, y = part
    right = torch.cat([model.eval()(some).argmax(1) for some in x.split(500)]).eq(y)
    return 100 * float(right.double().mean())
