"""A posterior on disk: survivors' means and precisions, masks as bits, priors, n_data, temperature."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ockham.errors import OckhamError, ResultError
from ockham.evidence.kronecker import KroneckerPrecision
from ockham.files.sparse import pack_mask, unpack_mask
from ockham.files.tree import read_tree, write_tree
from ockham.posterior.matrix import WeightMatrix
from ockham.posterior.posterior import Gaussian, Posterior

_FACTORS = ("input_values", "input_vectors", "output_values", "output_vectors")

__all__ = ["load_posterior", "save_posterior"]


def save_posterior(posterior: Posterior, path: Path) -> None:
    """Write one safetensors file, atomically.

    Raises:
        OckhamError: the folder cannot be written.
    """
    tree = {
        "n_data": posterior.n_data,
        "temperature": posterior.temperature,
        "source": posterior.source,
        "moments": {name: _pack(g) for name, g in posterior.items()},
        "matrices": [_pack_matrix(m) for m in posterior.matrices],
    }
    write_tree(path, tree, kind="posterior")


def load_posterior(path: str | Path) -> Posterior:
    """Read a posterior; a result folder may be named instead of the file in it.

    Raises:
        ResultError: missing, truncated, tampered with, foreign or newer; says which file and why.
    """
    file = Path(path) / "posterior.safetensors" if Path(path).is_dir() else Path(path)
    tree = read_tree(file, kind="posterior")
    try:
        moments = {name: _unpack(node) for name, node in tree["moments"].items()}
        matrices = tuple(_unpack_matrix(node) for node in tree.get("matrices", []))
        return Posterior(moments, float(tree["n_data"]), float(tree["temperature"]), str(tree["source"]), matrices)
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, OckhamError) as error:
        raise ResultError(f"{file}: its posterior is damaged ({error})") from error


def _pack(g: Gaussian) -> dict[str, Any]:
    node: dict[str, Any] = {"shape": list(g.mean.shape), "mean": g.mean[g.keep], "precision": g.precision[g.keep]}
    if not bool(g.keep.all()):
        node["keep"] = pack_mask(g.keep)
    for name in ("prior_precision", "prior_mean"):
        node[name] = _compact(getattr(g, name))
    for name in ("marginal_precision", "inclusion"):
        if getattr(g, name) is not None:
            node[name] = getattr(g, name)[g.keep]
    return node


def _compact(values: Tensor) -> Tensor:
    """The same values, each dimension along which they do not change cut to one: priors of rows, of whole layers."""
    for dim in range(values.ndim):
        first = values.narrow(dim, 0, 1)
        if bool((values == first).all()):
            values = first
    return values.contiguous()


def _expanded(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return values.expand(shape) if values.ndim else values


def _unpack(node: Mapping[str, Any]) -> Gaussian:
    shape = tuple(node["shape"])
    keep = unpack_mask(node["keep"], shape) if "keep" in node else torch.ones(shape, dtype=torch.bool)
    marginal, inclusion = node.get("marginal_precision"), node.get("inclusion")
    return Gaussian(
        _spread(node["mean"], keep, 0.0),
        _spread(node["precision"], keep, torch.inf),
        _expanded(node["prior_precision"], shape),
        _expanded(node["prior_mean"], shape),
        keep,
        None if marginal is None else _spread(marginal, keep, torch.inf),
        None if inclusion is None else _spread(inclusion, keep, 0.0),
    )


def _pack_matrix(block: WeightMatrix) -> dict[str, Any]:
    p = block.precision
    parts = {name: getattr(p, name) for name in _FACTORS}
    return {"weight": block.weight, "bias": block.bias, "prior_precision": p.prior_precision, **parts}


def _unpack_matrix(node: Mapping[str, Any]) -> WeightMatrix:
    precision = KroneckerPrecision(**{name: node[name] for name in (*_FACTORS, "prior_precision")})
    return WeightMatrix(str(node["weight"]), node["bias"], precision)


def _spread(values: Tensor, keep: Tensor, fill: float) -> Tensor:
    if values.numel() != int(keep.sum()):
        raise ResultError(f"the mask keeps {int(keep.sum())} weights, the file holds {values.numel()}")
    result = torch.full(keep.shape, fill, dtype=values.dtype)
    result[keep] = values.reshape(-1)
    return result
