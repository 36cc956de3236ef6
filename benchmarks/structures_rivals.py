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
attention (head dimensions and whole heads are both tried, the better is shown), `out_channel_groups` of halves that
are multiplied, and the attributes of attention repaired afterwards as its examples do it. Its one facility that is not
used are pruners written by hand for single classes of modules (`customized_pruners`).
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.metadata
import importlib.util
import itertools
import resource
import signal
import sys
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
        halves: name of a layer to the number of equal parts of its output that are multiplied.
        repair: function that sets attributes of the pruned network as the examples of Torch-Pruning do.
    """

    net: nn.Module
    inputs: list[Any]
    ignored: tuple[str, ...]
    heads: dict[str, int] = field(default_factory=dict)
    halves: dict[str, int] = field(default_factory=dict)
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


def with_heads(case: Case, endings: Mapping[str, int] | Callable[[nn.Module], int]) -> Case:
    for name, module in case.net.named_modules():
        if callable(endings):
            if hasattr(module, "qkv"):
                case.heads[f"{name}.qkv"] = endings(module)
        else:
            case.heads |= {name: n for end, n in endings.items() if name.endswith(end)}
    return case


def attention(name: str) -> Case:
    return with_heads(timm(name, repair=repaired_timm), lambda m: m.num_heads)


def text(kind: str) -> Case:
    net, inputs = makers()[kind]()
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
    "GhostNet": lambda: timm("ghostnet_050"),
    "RegNetX": lambda: timm("regnetx_002"),
    "ConvNeXt": lambda: timm("convnext_atto"),
    "ShuffleNetV2 units": lambda: images(shufflenet(), "8"),
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
    kept = {name: torch.ones_like(p, dtype=torch.bool) for name, p in case.net.named_parameters(remove_duplicate=False)}
    for name, mask in kept.items():
        for dim, gone in plan.cuts.get(name, {}).items():
            mask.index_fill_(dim, torch.tensor(gone), False)
    return Pruned(small, kept, seconds)


def _transposed(net: nn.Module, layer: str) -> bool:
    return bool(getattr(net.get_submodule(layer), "transposed", False))


def theirs(case: Case, share: float, *, whole_heads: bool) -> Pruned:
    """`BasePruner`, local, in one step; every weight holds its position while it prunes."""
    import torch_pruning as tp

    began, net = time.process_time(), copy.deepcopy(case.net)
    layers, modules = {m: n for n, m in net.named_modules()}, dict(net.named_modules())
    rows = norms_of_rows(case.net)

    def importance(group: Any) -> Tensor:
        score = torch.zeros(len(group[0].idxs), dtype=torch.float64)
        for item in group:
            layer, makes = layers.get(item.dep.target.module), "out" in item.dep.handler.__name__
            if makes and layer in rows:
                score.index_add_(0, torch.tensor(item.root_idxs), rows[layer][torch.tensor(item.idxs)])
        return score

    example = case.inputs[0]
    pruner = tp.pruner.BasePruner(
        net, example, importance, pruning_ratio=share, head_pruning_ratio=share if whole_heads else 0.0,
        ignored_layers=[modules[n] for n in case.ignored], num_heads={modules[n]: k for n, k in case.heads.items()},
        prune_num_heads=whole_heads, prune_head_dims=not whole_heads, in_channel_groups={},
        out_channel_groups={modules[n]: k for n, k in case.halves.items()},
        output_transform=lambda out: [t for t in tensors_of(out) if t.requires_grad],
    )  # fmt: skip
    with torch.no_grad():
        for tensor in (*net.parameters(), *_statistics(net).values()):
            tensor.copy_(torch.arange(tensor.numel()).view_as(tensor))
    pruner.step()
    seconds = time.process_time() - began
    kept, before = {}, dict(case.net.named_parameters(remove_duplicate=False)) | _statistics(case.net)
    with torch.no_grad():
        for name, tensor in {**dict(net.named_parameters(remove_duplicate=False)), **_statistics(net)}.items():
            places = tensor.long().flatten()
            kept[name] = torch.zeros_like(before[name], dtype=torch.bool)
            kept[name].view(-1)[places] = True
        values = {p: p.long() for p in (*net.parameters(), *_statistics(net).values())}
        names = {p: n for n, p in {**dict(net.named_parameters()), **_statistics(net)}.items()}
        for tensor, places in values.items():
            tensor.copy_(before[names[tensor]].flatten()[places])
    case.repair(net, pruner.num_heads)
    return Pruned(net, {n: k for n, k in kept.items() if n not in _statistics(case.net)}, seconds)


def _statistics(net: nn.Module) -> dict[str, Tensor]:
    return {n: b for n, b in net.named_buffers() if n.rpartition(".")[2] in ("running_mean", "running_var")}


# ------------------------------------------------------------------ what is right


def zeroed(net: nn.Module, kept: Mapping[str, Tensor]) -> nn.Module:
    """The original network with zeros for the entries that do not stay."""
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for name, parameter in twin.named_parameters(remove_duplicate=False):
            parameter.mul_(kept[name])
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
        if "Norm" in type(module).__name__ and "Batch" not in type(module).__name__ and stays is not None:
            if not bool(stays.all()):
                twin.set_submodule(name, Counted(copy.deepcopy(pruned.net.get_submodule(name)), stays))
    return twin


def gap(case: Case, one: nn.Module, other: nn.Module) -> float:
    """The largest difference of the outputs, relative to the largest output."""
    pairs = [(call(one, given), call(other, given)) for given in ((x if isinstance(x, dict) else (x,)) for x in case.inputs)]
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
    except _TooSlowError:
        return {"verdict": "too slow"}
    except Exception as error:
        kind = "refuses" if isinstance(error, ockham.OckhamError) else "crashes"
        return {"verdict": kind, "why": f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"}


ORDER = ("right", "other statistics", "wrong", "removes nothing", "refuses", "crashes", "too slow")


def examined(name: str, share: float, seed: int, limit: int) -> Record:
    torch.manual_seed(seed)
    case = NETWORKS[name]()
    case.net = shaken(case.net).double().eval()
    case.inputs = to_double(case.inputs)
    mine = _limited(limit, lambda: judged(case, lambda: ours(case, share)))
    tries = {"head dimensions": False, "whole heads": True} if case.heads else {"": False}
    both = {how: _limited(limit, lambda w=w: judged(case, lambda: theirs(case, share, whole_heads=w))) for how, w in tries.items()}
    how = min(both, key=lambda k: (ORDER.index(both[k]["verdict"]), both[k].get("parameters", 1.0)))
    rival = {**both[how], **({"heads": how} if how else {})}
    rows = {"network": name, "share": share, "seed": seed, "ockham": mine, "torch_pruning": rival}
    own, other = (r.pop("kept", None) for r in (mine, rival))
    if own is not None and other is not None:
        count = {k: (int(own[k].sum()), int(other[k].sum())) for k in own}
        rows["same_tensors"] = sum(bool(torch.equal(own[k], other[k])) for k in own) / len(own)
        rows["fewer_here"] = [k for k, (a, b) in count.items() if a < b]
        rows["fewer_there"] = [k for k, (a, b) in count.items() if b < a]
    for tried in both.values():
        tried.pop("kept", None)
    if case.heads:
        rows["tried"] = both
    packages = ("torch-pruning", "timm", "transformers")
    return rows | {"packages": {p: importlib.metadata.version(p) for p in packages}}


def _limited(seconds: int, make: Callable[[], Record]) -> Record:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return make()
    except _TooSlowError:
        return {"verdict": "too slow"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def run(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGPROF, _stop)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    for name, share, seed in itertools.product(args.names or NETWORKS, args.share, args.seed):
        make = functools.partial(examined, name, share, seed, args.limit)
        BENCH.record("structures_rivals", make, row=f"{name}, {share}, {seed}", share=share, seed=seed)


def pages() -> dict[str, list[str]]:
    return {}


BENCH = Benchmark(
    __file__, __doc__, run, pages, folder="", names=Option([], "networks", choices=NETWORKS, word=True),
    share=Option([0.5, 0.6], "shares of the units of a group that go"), seed=Option([0], "seeds"),
    limit=Option(300, "seconds of CPU time for one tool on one network"),
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    main()
