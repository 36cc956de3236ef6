"""Torch-Pruning beside Ockham on 22 networks: who runs, who is right, how many parameters are left.

    pip install torch-pruning==1.6.1 timm==1.0.31 einops              # for this benchmark only
    python benchmarks/structures_rivals.py [NETWORK ...] [--share 0.5 0.6] [--limit 300] [--again]
    python benchmarks/structures_rivals.py --table

Both are to remove the same share of the units of every group that they find, those with the smallest L1 norm of the
weights that make them; of n units int(n (1 - share)), and at least one, stay. Networks are untrained, in float64 and in
evaluation mode; biases, norms and their statistics are random.

A pruned network is right where it computes what the *original* one does with zeros for all that was taken out, within
1e-9 of the largest output, on two batches. For Torch-Pruning the positions are read off: before it prunes, every weight
is overwritten by its own position, so that what is left says where it came from, and then given its value back. Where
a norm over units (LayerNorm, GroupNorm, RMSNorm) counts only those that stay, the function is another one, though
nothing is miswired; such a network is compared once more with the original whose norms count the units that stay
("other statistics"). Torch-Pruning has what its README and examples recommend: the head ignored, `num_heads` of
attention (head dimensions and whole heads are both tried, the better is shown), pruners for GPT-2's Conv1D and Swin's
joined patches written by hand (`customized_pruners`), and attributes of attention repaired afterwards as its examples
do it. It ranks channels one by one even where some can only go together (the halves that GhostNet joins), and then
removes more than it was asked for; there the channels that fall together get the same score, and what happens without
that is recorded beside it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.metadata
import itertools
import resource
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ockham
from families import _stop, _TooSlowError, architectures, call, shaken
from harness import Benchmark, Option, Record, section
from ockham.surgery.copies import difference, tensors_of, to_double
from ockham.surgery.groups import plan_masks

TOLERANCE = 1e-9
MEMORY = 12 * 2**30  # bytes of address space: a graph that wants more counts as a crash


# ------------------------------------------------------------------ networks


@dataclass
class Case:
    """A network, batches, and what Torch-Pruning wants to be told.

    Attributes:
        net: network.
        inputs: batches; the first is the example.
        ignored: names of the layers that make the output.
        heads: name of a layer that makes queries, keys or values to the number of its heads.
        tied: whether channels that fall together stand apart in one dimension (halves that GhostNet joins).
        repair: function that sets attributes of the pruned network as the examples of Torch-Pruning do.
    """

    net: nn.Module
    inputs: list[Any]
    ignored: tuple[str, ...]
    heads: dict[str, int] = field(default_factory=dict)
    tied: bool = False
    repair: Callable[[nn.Module, Mapping[nn.Module, int]], None] = lambda net, heads: None


def norm(kind: str, width: int) -> nn.Module:
    return nn.GroupNorm(4, width) if kind == "group" else nn.BatchNorm2d(width)


class Double(nn.Sequential):
    """Two convolutions, each with its norm."""

    def __init__(self, width: int, out: int, kind: str) -> None:
        parts: list[nn.Module] = []
        for a in (width, out):
            parts += [nn.Conv2d(a, out, 3, padding=1, bias=False), norm(kind, out), nn.ReLU()]
        super().__init__(*parts)


class UNet(nn.Module):
    """Three scales; what comes down is joined to what goes up."""

    def __init__(self, kind: str, width: int = 32) -> None:
        super().__init__()
        w = width
        self.down = nn.ModuleList([Double(3, w, kind), Double(w, 2 * w, kind), Double(2 * w, 4 * w, kind)])
        self.raise_ = nn.ModuleList([nn.ConvTranspose2d(4 * w, 2 * w, 2, 2), nn.ConvTranspose2d(2 * w, w, 2, 2)])
        self.up = nn.ModuleList([Double(4 * w, 2 * w, kind), Double(2 * w, w, kind)])
        self.head = nn.Conv2d(w, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, 2, H, W]."""
        a = self.down[0](x)
        b = self.down[1](F.max_pool2d(a, 2))
        h = self.down[2](F.max_pool2d(b, 2))
        for lift, join, skip in zip(self.raise_, self.up, (b, a), strict=True):
            h = join(torch.cat([skip, lift(h)], 1))
        return self.head(h)


class Conv(nn.Sequential):
    """Convolution, norm, SiLU."""

    def __init__(self, width: int, out: int, size: int = 1, stride: int = 1, groups: int = 1) -> None:
        conv = nn.Conv2d(width, out, size, stride, size // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out), nn.SiLU())


class C2f(nn.Module):
    """The block of YOLOv8: half of the channels go on, step by step, and all steps are joined."""

    def __init__(self, width: int, out: int, steps: int = 2) -> None:
        super().__init__()
        self.first, self.last = Conv(width, out), Conv((2 + steps) * out // 2, out)
        self.steps = nn.ModuleList(
            nn.Sequential(Conv(out // 2, out // 2, 3), Conv(out // 2, out // 2, 3)) for _ in range(steps)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, width, H, W] to [N, out, H, W]."""
        parts = list(self.first(x).chunk(2, 1))
        for step in self.steps:
            parts.append(parts[-1] + step(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Yolo(nn.Module):
    """A stem, two C2f blocks and a head with two branches, boxes and classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(Conv(3, 16, 3, 2), C2f(16, 32), Conv(32, 64, 3, 2), C2f(64, 64))
        self.boxes = nn.Sequential(Conv(64, 32, 3), nn.Conv2d(32, 16, 1))
        self.classes = nn.Sequential(Conv(64, 32, 3), nn.Conv2d(32, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, 21, H W / 16]."""
        h = self.body(x)
        return torch.cat([self.boxes(h), self.classes(h)], 1).flatten(2)


class Shuffle(nn.Module):
    """The unit of ShuffleNetV2: half of the channels pass, the others are worked on, then both are shuffled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        bare = nn.Sequential(nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False), nn.BatchNorm2d(half))
        self.branch = nn.Sequential(Conv(half, half), bare, Conv(half, half))

    def forward(self, x: Tensor) -> Tensor:
        """[N, width, H, W] to the same."""
        a, b = x.chunk(2, 1)
        h = torch.cat([a, self.branch(b)], 1)
        n, width, *sides = h.shape
        return h.view(n, 2, width // 2, *sides).transpose(1, 2).reshape(n, width, *sides)


def shufflenet() -> nn.Module:
    units = [Conv(3, 32, 3, 2), Shuffle(32), Shuffle(32), Conv(32, 64, 3, 2), Shuffle(64), Shuffle(64)]
    return nn.Sequential(*units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 7))


class Recurrent(nn.Module):
    """An embedding, an LSTM of two layers, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 24), nn.Linear(32, 7)
        self.first, self.second = nn.LSTM(24, 32, batch_first=True), nn.LSTM(32, 32, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, length] to [N, 7]."""
        h, _ = self.first(self.embed(tokens))
        h, _ = self.second(h)
        return self.head(h[:, -1])


def images(net: nn.Module, *ignored: str, **more: Any) -> Case:
    return Case(net, [torch.randn(n, 3, 32, 32) for n in (2, 3)], ignored, **more)


@functools.cache
def makers() -> dict[str, Callable[[], tuple[nn.Module, list[Any]]]]:
    return dict(architectures())


def timm(name: str, **more: Any) -> Case:
    net, inputs = makers()[f"timm:{name}"]()
    last = {id(m) for m in net.get_classifier().modules()}
    own = [n for n, m in net.named_modules() if id(m) in last and isinstance(m, nn.Linear | nn.Conv2d)]
    return Case(net, [given[0] for given in inputs], tuple(own), **more)


def repaired_timm(net: nn.Module, heads: Mapping[nn.Module, int]) -> None:
    for module in net.modules():
        if hasattr(module, "qkv") and hasattr(module, "num_heads"):
            module.num_heads = heads.get(module.qkv, module.num_heads)
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)
            module.attn_dim = module.head_dim * module.num_heads


def repaired_bert(net: nn.Module, heads: Mapping[nn.Module, int]) -> None:
    for module in net.modules():
        if hasattr(module, "all_head_size"):
            module.num_attention_heads = heads[module.query]
            module.attention_head_size = module.query.out_features // module.num_attention_heads
            module.all_head_size = module.query.out_features


def repaired_llama(net: nn.Module, heads: Mapping[nn.Module, int]) -> None:
    for name, module in net.named_modules():
        if name.endswith("self_attn"):
            module.num_heads = module.q_proj.out_features // module.head_dim
            module.num_key_value_groups = module.q_proj.out_features // module.k_proj.out_features


def with_heads(case: Case, heads: Mapping[str, int]) -> Case:
    for name, _ in case.net.named_modules():
        case.heads |= {name: n for end, n in heads.items() if name.endswith(end)}  # noqa: B035
    return case


def attention(name: str) -> Case:
    case = timm(name, repair=repaired_timm)
    case.heads |= {f"{n}.qkv": m.num_heads for n, m in case.net.named_modules() if hasattr(m, "qkv")}
    return case


def text(kind: str) -> Case:
    net, inputs = makers()[kind]()
    net.config.use_cache = False
    if kind == "decoder:llama":
        ends = {"q_proj": 4, "k_proj": 2, "v_proj": 2}
        return with_heads(Case(net, inputs, ("lm_head",), repair=repaired_llama), ends)
    if kind == "decoder:gpt2":
        return with_heads(Case(net, inputs, ("lm_head",)), {"c_attn": 4})
    ends = {".query": 4, ".key": 4, ".value": 4}
    return with_heads(Case(net, inputs, ("cls.predictions.decoder",), repair=repaired_bert), ends)


NETWORKS: dict[str, Callable[[], Case]] = {
    "ResNet-18": lambda: timm("resnet18"),
    "ResNet-26t, squeeze": lambda: timm("seresnext26ts"),
    "Res2Net-50": lambda: timm("res2net50_14w_8s"),
    "DenseNet-121": lambda: timm("densenet121"),
    "VGG-11": lambda: timm("vgg11_bn"),
    "MobileNetV2": lambda: timm("mobilenetv2_035"),
    "MobileNetV3": lambda: timm("mobilenetv3_small_050"),
    "EfficientNet-B0": lambda: timm("efficientnet_b0"),
    "GhostNet": lambda: timm("ghostnet_050", tied=True),
    "RegNetX": lambda: timm("regnetx_002"),
    "ConvNeXt": lambda: timm("convnext_atto"),
    "ShuffleNetV2 units": lambda: images(shufflenet(), "8", tied=True),
    "UNet, BatchNorm": lambda: images(UNet("batch"), "head"),
    "UNet, GroupNorm": lambda: images(UNet("group"), "head"),
    "YOLO, C2f": lambda: images(Yolo(), "boxes.1", "classes.1"),
    "MLP-Mixer": lambda: timm("mixer_s32_224"),
    "ViT-Ti": lambda: attention("vit_tiny_patch16_224"),
    "Swin-T": lambda: attention("swin_tiny_patch4_window7_224"),
    "BERT": lambda: text("encoder:bert"),
    "GPT-2": lambda: text("decoder:gpt2"),
    "Llama": lambda: text("decoder:llama"),
    "LSTM": lambda: Case(Recurrent(), [torch.randint(50, (n, 9)) for n in (2, 3)], ("head",)),
}


# ------------------------------------------------------------------ what both are told


def norms_of_rows(net: nn.Module) -> dict[str, Tensor]:
    """The L1 norm of the weights that make each output of a linear or convolutional layer, by the layer's name."""
    found = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            weight = module.weight.detach().abs()
            found[name] = (weight.transpose(0, 1) if getattr(module, "transposed", False) else weight).flatten(1).sum(1)
    return found


def staying(count: int, share: float) -> int:
    """How many of some units stay."""
    return max(int(count * (1 - share)), 1)


# ------------------------------------------------------------------ the arms


@dataclass
class Pruned:
    """A smaller network.

    Attributes:
        net: smaller network.
        kept: name of a parameter to a mask of its entries that stay.
        seconds: processor time.
    """

    net: nn.Module
    kept: dict[str, Tensor]
    seconds: float


def ours(case: Case, share: float) -> Pruned:
    """Trace, a plan by the norms, shrink."""
    began, rows = time.process_time(), norms_of_rows(case.net)
    given = case.inputs[0] if isinstance(case.inputs[0], dict) else (case.inputs[0],)
    groups = ockham.trace(case.net, given)
    keep = {}
    for group in groups:
        score = torch.zeros(group.size, dtype=torch.float64)
        for member in group.members:
            layer = member.name.removesuffix(".weight")
            if member.makes and layer in rows and member.dim == int(_transposed(case.net, layer)):
                score += rows[layer][member.index].flatten(1).sum(1)
        keep[group.id] = torch.zeros(group.size, dtype=torch.bool)
        keep[group.id][score.topk(max(staying(group.size, share), group.least)).indices] = True
    plan = plan_masks(groups, keep)
    small = ockham.shrink(case.net, plan)
    seconds = time.process_time() - began
    kept, first = {}, {p: n for n, p in case.net.named_parameters()}
    for name, parameter in case.net.named_parameters(remove_duplicate=False):
        kept[name] = torch.ones_like(parameter, dtype=torch.bool)
        for dim, gone in plan.cuts.get(first[parameter], {}).items():
            kept[name].index_fill_(dim, torch.tensor(gone), False)
    return Pruned(small, kept, seconds)


def _transposed(net: nn.Module, layer: str) -> bool:
    return bool(getattr(net.get_submodule(layer), "transposed", False))


def by_hand(net: nn.Module) -> dict[type, Any]:
    """Pruners for classes that Torch-Pruning does not know: GPT-2's Conv1D and Swin's joined patches."""
    import torch_pruning as tp

    def cut(layer: nn.Module, name: str, dim: int, gone: list[int]) -> None:
        tensor = getattr(layer, name)
        stays = torch.tensor([i for i in range(tensor.shape[dim]) if i not in set(gone)])
        setattr(layer, name, nn.Parameter(tensor.detach().index_select(dim, stays)))

    class Transposed(tp.BasePruningFunc):
        """A linear layer whose weight is (in, out)."""

        def prune_out_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
            cut(layer, "weight", 1, idxs)
            cut(layer, "bias", 0, idxs)
            layer.nf = layer.weight.shape[1]
            return layer

        def prune_in_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
            cut(layer, "weight", 0, idxs)
            layer.nx = layer.weight.shape[0]
            return layer

        def get_out_channels(self, layer: nn.Module) -> int:
            return layer.weight.shape[1]

        def get_in_channels(self, layer: nn.Module) -> int:
            return layer.weight.shape[0]

    class Merging(tp.BasePruningFunc):
        """Four patches side by side, a norm over them, a linear layer."""

        def prune_out_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
            tp.prune_linear_out_channels(layer.reduction, idxs)
            return layer

        def prune_in_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
            gone = [k * self.get_in_channels(layer) + i for k in range(4) for i in idxs]
            tp.prune_layernorm_out_channels(layer.norm, gone)
            tp.prune_linear_in_channels(layer.reduction, gone)
            return layer

        def get_out_channels(self, layer: nn.Module) -> int:
            return layer.reduction.out_features

        def get_in_channels(self, layer: nn.Module) -> int:
            return layer.reduction.in_features // 4

    known = {"Conv1D": Transposed, "PatchMerging": Merging}
    return {type(m): known[type(m).__name__]() for m in net.modules() if type(m).__name__ in known}


class Scores:
    """Scores of the channels of a group of Torch-Pruning: the norms of all rows that make them.

    Attributes:
        graph: dependency graph, once it is there.
    """

    def __init__(self, net: nn.Module, *, tied: bool) -> None:
        self.layers, self.rows, self.tied = {m: n for n, m in net.named_modules()}, norms_of_rows(net), tied
        self.graph: Any = None

    def __call__(self, group: Any) -> Tensor:
        """[channels] of the first layer of a group; a row that is not there (so its indices say) counts nothing."""
        score, first = torch.zeros(len(group[0].idxs), dtype=torch.float64), group[0].dep
        for item in group:
            layer = self.layers.get(item.dep.target.module)
            if self.graph.is_out_channel_pruning_fn(item.dep.handler) and layer in self.rows:
                root, at = torch.tensor(item.root_idxs), torch.tensor(item.idxs)
                there = (at < len(self.rows[layer])) & (root < len(score))
                score.index_add_(0, root[there], self.rows[layer][at[there]])
        for i in range(len(score)) if self.tied else ():
            known = self.graph.get_pruning_group(first.target.module, first.handler, [i])[0].idxs
            if i == min(known):
                score[list(known)] = score[list(known)].sum()
        return score


def theirs(case: Case, share: float, how: str) -> Pruned:
    """`BasePruner`, local, in one step; every weight holds its position while it prunes.

    `how`: "whole heads" or head dimensions go; "tied" channels are scored together, or "random scores".
    """
    import torch_pruning as tp

    began, net = time.process_time(), copy.deepcopy(case.net)
    modules, scores = dict(net.named_modules()), Scores(net, tied=how == "tied")
    heads, hand = how == "whole heads", by_hand(net)
    pruner = tp.pruner.BasePruner(
        net, case.inputs[0], tp.importance.RandomImportance() if how == "random scores" else scores,
        pruning_ratio=share, head_pruning_ratio=share if heads else 0.0, prune_num_heads=heads,
        prune_head_dims=not heads, num_heads={modules[n]: k for n, k in case.heads.items()},
        ignored_layers=[modules[n] for n in case.ignored], in_channel_groups={}, out_channel_groups={},
        output_transform=lambda out: [t for t in tensors_of(out) if t.requires_grad],
        customized_pruners=hand, root_module_types=[nn.modules.conv._ConvNd, nn.Linear, nn.LSTM, *hand],
    )  # fmt: skip
    scores.graph = pruner.DG
    with torch.no_grad():
        for tensor in _state(net).values():
            tensor.copy_(torch.arange(tensor.numel()).view_as(tensor))
    pruner.step()
    seconds, before, kept = time.process_time() - began, _state(case.net), {}
    for name, tensor in _state(net).items():
        kept[name] = torch.zeros(before[name].numel(), dtype=torch.bool)
        kept[name][tensor.long().flatten()] = True
        kept[name] = kept[name].view(before[name].shape)
    with torch.no_grad():
        for name, places in {n: t.long() for n, t in _state(net).items()}.items():
            _state(net)[name].copy_(before[name].flatten()[places])
    case.repair(net, pruner.num_heads)
    return Pruned(net, kept, seconds)


def _state(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and the statistics of BatchNorm; a shared one under each of its names."""
    statistics = {n: b for n, b in net.named_buffers() if n.rpartition(".")[2] in ("running_mean", "running_var")}
    return {n: p.data for n, p in net.named_parameters(remove_duplicate=False)} | statistics


# ------------------------------------------------------------------ what is right


def zeroed(net: nn.Module, kept: Mapping[str, Tensor]) -> nn.Module:
    """The original network with zeros for what does not stay; a shared parameter may lose others at each place."""
    twin = copy.deepcopy(net)
    for name, parameter in list(twin.named_parameters(remove_duplicate=False)):
        path, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(path), leaf, nn.Parameter(parameter.detach() * kept[name]))
    return twin


class Counted(nn.Module):
    """A norm over the features that stay, at full width."""

    def __init__(self, small: nn.Module, stays: Tensor) -> None:
        super().__init__()
        self.small, self.stays = small, stays.nonzero().flatten()

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of x, zero where nothing stays."""
        dim = x.ndim - 1 if x.shape[-1] > int(self.stays.max()) and not isinstance(self.small, nn.GroupNorm) else 1
        if type(self.small).__name__ == "LayerNorm2d":
            dim = 1
        return torch.zeros_like(x).index_copy(dim, self.stays, self.small(x.index_select(dim, self.stays)))


def with_other_statistics(full: nn.Module, pruned: Pruned) -> nn.Module:
    """The zeroed network whose norms over units count only those that stay."""
    twin = copy.deepcopy(full)
    for name, module in list(twin.named_modules()):
        stays = pruned.kept.get(f"{name}.weight")
        named = "Norm" in type(module).__name__ and "Batch" not in type(module).__name__
        if named and stays is not None and not bool(stays.all()):
            twin.set_submodule(name, Counted(copy.deepcopy(pruned.net.get_submodule(name)), stays))
    return twin


def gap(case: Case, one: nn.Module, other: nn.Module) -> float:
    """The largest difference of the outputs, relative to the largest output."""
    pairs = [
        (call(one, given), call(other, given)) for given in ((x if isinstance(x, dict) else (x,)) for x in case.inputs)
    ]
    return max(difference(a, b) for a, b in pairs)


def judged(case: Case, arm: Callable[[], Pruned]) -> Record:
    """What became of a network: verdict, difference, share of the parameters left, seconds."""
    try:
        pruned = arm()
        full = zeroed(case.net, pruned.kept)
        total, left = (sum(p.numel() for p in n.parameters()) for n in (case.net, pruned.net))
        found: Record = {"parameters": left / total, "seconds": round(pruned.seconds, 2)}
        if left == total:
            return {"verdict": "removes nothing", **found}
        found |= {"gap": float(f"{gap(case, full, pruned.net):.2g}"), "kept": pruned.kept}
        if found["gap"] <= TOLERANCE:
            return {"verdict": "right", **found}
        found["gap_other_statistics"] = float(f"{gap(case, with_other_statistics(full, pruned), pruned.net):.2g}")
        same = found["gap_other_statistics"] <= TOLERANCE
        return {"verdict": "other statistics" if same else "wrong", **found}
    except Exception as error:
        kind = "refuses" if isinstance(error, ockham.OckhamError) else "crashes"
        return {"verdict": kind, "why": f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"}


ORDER = ("right", "other statistics", "wrong", "removes nothing", "refuses", "crashes", "too slow")


def examined(name: str, share: float, seed: int, limit: int) -> Record:
    torch.manual_seed(seed)
    case = NETWORKS[name]()
    case.net = shaken(case.net).double().eval()
    with torch.no_grad():
        for parameter in case.net.parameters():  # a head that starts at zero would hide every difference
            parameter.normal_(0, 0.1) if not bool(parameter.any()) else None
    case.inputs = to_double(case.inputs)
    mine = _limited(limit, lambda: judged(case, lambda: ours(case, share)))
    ways = (
        ("head dimensions", "whole heads")
        if case.heads
        else ("tied", "plain", "random scores")
        if case.tied
        else ("plain",)
    )
    tried = {way: _limited(limit, lambda w=way: judged(case, lambda: theirs(case, share, w))) for way in ways}
    best = min(ways, key=lambda w: (ORDER.index(tried[w]["verdict"]), tried[w].get("parameters", 1.0)))
    way = best if case.heads else ways[0]
    own, other = mine.pop("kept", None), [t.pop("kept", None) for t in tried.values()][ways.index(way)]
    found: Record = {
        "network": name,
        "share": share,
        "seed": seed,
        "ockham": mine,
        "torch_pruning": tried[way],
        "way": way,
    }
    if own is not None and other is not None:
        found["same_tensors"] = sum(torch.equal(own[k], other[k]) for k in own) / len(own)
        found["fewer_here"] = [k for k in own if own[k].sum() < other[k].sum()]
        found["fewer_there"] = [k for k in own if own[k].sum() > other[k].sum()]
    packages = ("torch-pruning", "timm", "transformers")
    return found | {"tried": tried, "packages": {p: importlib.metadata.version(p) for p in packages}}


def _limited(seconds: int, make: Callable[[], Record]) -> Record:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return make()
    except _TooSlowError:
        return {"verdict": "too slow", "limit_s": seconds}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def run(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGPROF, _stop)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    for name, share, seed in itertools.product(args.names or NETWORKS, args.share, args.seed):
        make = functools.partial(examined, name, share, seed, args.limit)
        BENCH.record("structures_rivals", make, row=f"{name}, {share}, {seed}", share=share, seed=seed)


NOTES = {
    "right": "the pruned network computes what the original does with zeros for what went, within 1e-9",
    "other statistics": "the same, but only if norms over units count the units that stay",
    "wrong": "neither",
    "Ockham's other statistics on Llama": "1.2e-7, the rounding of its RMSNorm, which computes in float32",
    "crashes": "while pruning, or in the first forward of the pruned network",
}


def pages() -> dict[str, list[str]]:
    rows = BENCH.records("structures_rivals").get("structures_rivals", {}).values()
    if not rows:
        return {}
    said = [
        f"{tool}: {', '.join(f'{n} {v}' for v in ORDER if (n := sum(r[key]['verdict'] == v for r in rows)))}"
        for tool, key in (("Ockham", "ockham"), ("Torch-Pruning", "torch_pruning"))
    ]
    both = [r for r in rows if {r["ockham"]["verdict"], r["torch_pruning"]["verdict"]} == {"right"}]
    near = [abs(r["ockham"]["parameters"] - r["torch_pruning"]["parameters"]) <= 0.01 for r in both]
    far = ", ".join(dict.fromkeys(r["network"] for r, within in zip(both, near, strict=True) if not within)) or "none"
    same = sum(r["same_tensors"] == 1 for r in rows if "same_tensors" in r)
    head = ["network", "share", "Ockham", "left", "s", "Torch-Pruning", "left", "difference", "s", "same tensors"]
    table = [
        [r["network"], f"{r['share']:.0%}", *_cells(r["ockham"])[:3], *_cells(r["torch_pruning"], gap=True),
         f"{r['same_tensors']:.0%}" if "same_tensors" in r else ""]
        for r in rows
    ]  # fmt: skip
    tried = [
        [r["network"], f"{r['share']:.0%}", way, *_cells(t, gap=True), t.get("why", "")[:160].replace("|", "/")]
        for r in rows
        for way, t in r["tried"].items()
        if len(r["tried"]) > 1 or "why" in t
    ]
    last = section(
        "## Torch-Pruning: every way that was tried, and why it stopped",
        "`tied`: channels that fall together are scored together; `plain`: each by itself; `random scores`: its own "
        "`RandomImportance`.",
        ["network", "share", "way", "verdict", "left", "difference", "s", "message"],
        tried,
    )
    return {
        "structures_rivals.md": [
            "# Torch-Pruning beside Ockham", "", f"{BENCH.written()}.", "",
            f"{len(rows)} runs. {'. '.join(said)}.", "",
            f"Both are right in {len(both)} runs; there the shares of parameters left are within a point in "
            f"{sum(near)} (not: {far}). In {same} runs every tensor is cut at the same places.", "",
            *(f"* {verdict}: {meaning}." for verdict, meaning in NOTES.items()), "",
            *section(
                "## Every network",
                "`share`: of the units of each group that go. `left`: share of the parameters. `difference`: of the "
                "outputs from the original network with zeros, relative to the largest. `s`: processor seconds, graph "
                "included. `same tensors`: share of the tensors cut at the same places by both.",
                head,
                table,
            ),
            *last,
        ]
    }  # fmt: skip


def _cells(found: Record, *, gap: bool = False) -> list[str]:
    """Verdict, share left, with `gap` the difference, seconds."""
    left = f"{found['parameters']:.4f}" if "parameters" in found else ""
    verdict = f"{found['verdict']} (> {found['limit_s']} s)" if "limit_s" in found else found["verdict"]
    return [verdict, left, *([f"{found.get('gap', '')}"] if gap else []), f"{found.get('seconds', '')}"]


BENCH = Benchmark(
    __file__, __doc__, run, pages, folder="", names=Option([], "networks", choices=NETWORKS, word=True),
    share=Option([0.5, 0.6], "shares of the units of a group that go"), seed=Option([0], "seeds"),
    limit=Option(300, "seconds of CPU time for one tool on one network"),
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    main()
