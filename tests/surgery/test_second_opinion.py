"""Torch-Pruning finds the same coupled dimensions on the networks where it is exact."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ockham.surgery import trace

from .nets import ZOO, C, head

tp = pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


class Block(nn.Module):
    def __init__(self, width, out, stride):
        super().__init__()
        self.a, self.n = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.b, self.m = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.s = nn.Conv2d(width, out, 1, stride) if width != out else nn.Identity()

    def forward(self, x):
        return (self.m(self.b(self.n(self.a(x)).relu())) + self.s(x)).relu()


def resnet():
    return nn.Sequential(
        C(3, 8), nn.BatchNorm2d(8), nn.ReLU(), Block(8, 8, 1), Block(8, 16, 2), Block(16, 16, 1), head(16)
    )


NETS = {**{n: ZOO[n] for n in ("depthwise", "dense_cat", "chunk_glu", "conv1d", "upsample", "swiglu")},
        "resnet": (resnet, lambda: torch.randn(2, 3, 8, 8))}  # fmt: skip


def theirs(model, inputs, name):
    """Return the layers whose weight Torch-Pruning would cut together with the outputs of layer `name`."""
    modules = dict(model.named_modules())
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=inputs)
    layer = modules[name]
    prune = tp.prune_linear_out_channels if isinstance(layer, nn.Linear) else tp.prune_conv_out_channels
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        prune = tp.prune_depthwise_conv_out_channels
    group = graph.get_pruning_group(layer, prune, idxs=[0])
    names = {id(m): n for n, m in modules.items()}
    found = set()
    for dependency, _ in group:
        target = dependency.target.module
        if id(target) in names and hasattr(target, "weight"):
            both = isinstance(target, nn.Conv2d) and target.groups > 1
            ends = "in" in dependency.handler.__name__ and not isinstance(target, nn.modules.batchnorm._BatchNorm)
            found.add((names[id(target)], 0 if both or not ends else 1))
    return found


@pytest.mark.parametrize("name", NETS)
def test_the_same_dimensions_go_together(name):
    torch.manual_seed(0)
    make, inputs = NETS[name]
    model, x = make().eval(), inputs()
    groups = trace(model, x)
    assert len(groups)
    for group in groups:
        first = group.id.split(".weight:")[0]
        ours = {(m.name.removesuffix(".weight"), m.dim) for m in group.members if m.name.endswith(".weight")}
        assert ours == theirs(model, x, first), group.id
