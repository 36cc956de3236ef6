"""The one law all of surgery is held to, and what the tests share to state it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ockham.core.posterior import Posterior
from ockham.run.engine import Compressed
from ockham.surgery import Groups, Plan, mask, shrink
from ockham.surgery.groups import plan_masks


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Give BatchNorm statistics, biases and scales values which no shortcut survives."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            shape = module.running_mean.shape
            module.running_mean.copy_(torch.randn(shape, generator=generator))
            module.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 + float(parameter.ndim == 1)


def outputs(model: nn.Module, inputs: object) -> list[Tensor]:
    with torch.no_grad():
        out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    out = out.to_tuple() if hasattr(out, "to_tuple") else out
    return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    assert [t.shape for t in one] == [t.shape for t in other]
    assert all(bool(torch.isfinite(t).all()) for t in (*one, *other))
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)) for a, b in zip(one, other, strict=True))


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def uneven(groups: Groups, ratio: float, seed: int) -> Plan:
    """A plan in which every group loses a share of its own, `ratio` on average."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in groups:
        share = ratio * (0.25 + 1.5 * float(torch.rand((), generator=generator)))
        stays = torch.ones(group.size, dtype=torch.bool)
        count = min(max(round(share * group.size), 1), group.size - 1)
        stays[torch.randperm(group.size, generator=generator)[:count]] = False
        keep[group.id] = stays
    return plan_masks(groups, keep)


def worst_difference(
    model: nn.Module, groups: Groups, inputs: object, *, ratio: float, seed: int
) -> tuple[float, float]:
    """Return the difference of masked and shrunk outputs and the share of units that went; every group has its own."""
    plan = uneven(groups, ratio, seed)
    plan = Plan.from_json(plan.to_json())
    masked, small = mask(model, plan), shrink(model, plan)
    assert size(small) < size(model) or not plan.removed
    gone = sum(map(len, plan.removed.values())) / max(1, sum(plan.widths.values()))
    return difference(outputs(masked, inputs), outputs(small, inputs)), gone


FRESH = """
import sys, importlib, torch, ockham
from pathlib import Path
from safetensors.torch import load_file, save_file
module, maker, folder = sys.argv[1:]
small = ockham.load(Path(folder) / "result", model=getattr(importlib.import_module(module), maker)()).eval()
batches = load_file(Path(folder) / "inputs.safetensors")
name = next(iter(batches)).split()[0]
example = {name: batches[f"{name} 0"]} if name != "x" else batches["x 0"]
file = ockham.export(small, Path(folder) / "network.onnx", example)
told = {}
with torch.no_grad():
    for key, x in batches.items():
        out = small(**{name: x}).logits if name != "x" else small(x)
        told[key.replace(name, "torch")] = out.contiguous()
try:
    import onnxruntime
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for key, x in batches.items():
        given = {session.get_inputs()[0].name: x.numpy()}
        told[key.replace(name, "onnx")] = torch.from_numpy(session.run(None, given)[0])
except ImportError:
    pass
save_file(told, Path(folder) / "told.safetensors")
"""


def saved_and_loaded(
    small: nn.Module, plan: Plan, maker: tuple[str, str], batches: dict[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """Save a shrunk network as a result; what a fresh process loads of it says, in torch and as ONNX.

    `maker` is module and name of the function that builds the network, `batches` have names such as "x 0" and "x 1".
    """
    Compressed(small, Posterior({}, 1.0), (), (), None, None, plan=plan).save(folder / "result")
    save_file(batches, folder / "inputs.safetensors")
    root = Path(__file__).parents[1]
    where = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FRESH, *maker, str(folder)]
    done = subprocess.run(command, env=where, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "told.safetensors")
