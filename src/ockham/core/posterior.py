"""The seam of the house: a posterior is a frozen mapping from parameter name to Gaussian moments with their prior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ockham.core.files import (
    StoredTensor,
    afford,
    checked_shape,
    inside,
    printable,
    read_tree,
    write_tree,
)
from ockham.core.network import mapped, release
from ockham.core.seal import sealed
from ockham.errors import OckhamError, ResultError
from ockham.evidence.kronecker import KroneckerPrecision

__all__ = [
    "POSTERIOR",
    "Gaussian",
    "Posterior",
    "PosteriorPiece",
    "WeightMatrix",
    "domain_error",
    "gaussian_kl",
    "load_posterior",
    "pack",
    "pack_mask",
    "posterior_pieces",
    "save_posterior",
    "unpack",
    "unpack_mask",
]

POSTERIOR = "posterior.safetensors"
"""Name of a posterior's file in a result folder."""

POINT = "PointEstimate"
"""Source of a posterior whose spread is no statement of the data."""


@dataclass(frozen=True, slots=True, eq=False)
class Gaussian:
    """Independent Gaussian posterior and prior of one parameter tensor.

    Attributes:
        mean: posterior mean, shape of the parameter; exactly 0 where removed, the value itself where the network
            holds a weight fixed (`ockham.core.network`).
        precision: posterior (conditional) precision, same shape; ``inf`` where removed or fixed.
        prior_precision: precision of the full prior, broadcastable to ``mean``.
        prior_mean: mean of the full prior, broadcastable.
        keep: boolean, True = stays, False = removed or fixed; same shape.
        marginal_precision: precision of the marginal where the source knows correlations, else None (= precision).
        inclusion: probability that the weight is not zero, same shape, 0 where removed, 1 where fixed at something
            else; None where the source has no spike. Mean and precision are then those of the slab: of the weight
            given that it is included.
    """

    mean: Tensor
    precision: Tensor
    prior_precision: Tensor
    prior_mean: Tensor
    keep: Tensor
    marginal_precision: Tensor | None = None
    inclusion: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.mean.shape
        for name in ("precision", "keep", "marginal_precision", "inclusion"):
            got = getattr(self, name)
            if got is not None and got.shape != shape:
                raise OckhamError(f"Gaussian: {name} has shape {tuple(got.shape)}, mean has {tuple(shape)}")
        for name in ("prior_precision", "prior_mean"):
            got = getattr(self, name).shape
            if len(got) > len(shape) or any(a not in (1, b) for a, b in zip(got[::-1], shape[::-1], strict=False)):
                raise OckhamError(f"Gaussian: {name} of shape {tuple(got)} does not broadcast to mean {tuple(shape)}")
        if self.keep.dtype is not torch.bool:
            raise OckhamError(f"Gaussian: keep must be boolean (True = stays); got {self.keep.dtype}")
        if self.mean.numel() and not self.mean.is_meta:
            self._check_values()

    def _check_values(self) -> None:
        """One pass over each tensor, without a copy of it."""
        tiny, huge = 5e-324, 1.7976931348623157e308  # the smallest number above 0, the largest
        for name, least, most, what in (
            ("mean", -huge, huge, "finite"),
            ("precision", tiny, math.inf, "positive"),
            ("marginal_precision", tiny, math.inf, "positive"),
            ("inclusion", 0.0, 1.0, "a probability"),
        ):
            if (values := getattr(self, name)) is not None:
                low, high = (float(v) for v in values.detach().aminmax())  # NaN wherever one is
                if not (least <= low and high <= most):
                    raise OckhamError(f"Gaussian: {name} must be {what} everywhere; it lies between {low} and {high}")

    def map(self, change: Callable[[Tensor], Tensor]) -> Gaussian:
        """The same moments, every tensor put through a function."""
        optional = (self.marginal_precision, self.inclusion)
        marginal, inclusion = (None if t is None else change(t) for t in optional)
        prior = change(self.prior_precision), change(self.prior_mean)
        return Gaussian(change(self.mean), change(self.precision), *prior, change(self.keep), marginal, inclusion)

    def to(self, device: torch.device | str) -> Gaussian:
        """The same moments on a device."""
        return self.map(lambda t: t.to(device))

    @property
    def scored_precision(self) -> Tensor:
        """Precision of a weight with the others integrated out where that is known, else the conditional one."""
        return self.precision if self.marginal_precision is None else self.marginal_precision

    @property
    def std(self) -> Tensor:
        """Standard deviation 1/sqrt(precision); 0 where removed or fixed."""
        return self.precision.rsqrt()

    @property
    def expected(self) -> Tensor:
        """E[w]: the mean, times the inclusion probability where there is one."""
        return self.mean if self.inclusion is None else self.inclusion * self.mean


def gaussian_kl(g: Gaussian) -> float:
    r"""KL(q || prior) of the living weights of one tensor, a sum in nats, as if they were independent.

    KL = sum 1/2 [ P0 / P + P0 (m - m0)^2 - 1 + ln(P / P0) ]
    """
    p0, p = g.prior_precision.expand(g.mean.shape)[g.keep].double(), g.precision[g.keep].double()
    away = (g.mean - g.prior_mean)[g.keep].double()
    return float((0.5 * p0 * (1 / p + away.square()) - 0.5 + 0.5 * (p / p0).log()).sum())


@dataclass(frozen=True, slots=True, eq=False)
class Posterior(Mapping[str, Gaussian]):
    """Posterior over the parameters of a network.

    Attributes:
        moments: parameter name to `Gaussian`.
        n_data: number of summed log-likelihood terms (examples; tokens for language models).
        temperature: tempering of the posterior; at values other than 1 evidence from it is *tempered* evidence.
        source: name of the method that made it, for people.
        matrices: weight matrices whose posterior is correlated; empty where all weights are independent.
        noise_variance: noise of a regression, one number an output (broadcastable to the outputs), in the targets'
            unit squared; None for everything else.
        likelihood: name of the likelihood it was fitted under, such as "classification"; None where that is not known.
    """

    moments: Mapping[str, Gaussian]
    n_data: float
    temperature: float = 1.0
    source: str = "unknown"
    matrices: tuple[WeightMatrix, ...] = ()
    noise_variance: Tensor | None = None
    likelihood: str | None = None

    def __post_init__(self) -> None:
        for name in ("n_data", "temperature"):
            value = getattr(self, name)
            if not (isinstance(value, Real) and 0 < float(value) < math.inf):
                raise OckhamError(f"Posterior: {name} must be a number, positive and finite; got {value!r}")

    def __getitem__(self, name: str) -> Gaussian:
        """Moments of the parameter called ``name``."""
        try:
            return self.moments[name]
        except KeyError:
            known = ", ".join(list(self.moments)[:6])
            raise KeyError(f"no parameter {name!r} in this posterior; it has {known}, ...") from None

    def __iter__(self) -> Iterator[str]:
        """Names in the order of the network."""
        return iter(self.moments)

    def __len__(self) -> int:
        """Number of parameter tensors."""
        return len(self.moments)

    def __repr__(self) -> str:
        """One line, no tensors."""
        return f"Posterior({self.source}, {len(self)} tensors, {self.kept():,} of {self.size():,} weights kept)"

    def kept(self) -> int:
        """Number of weights that stay."""
        return sum(int(g.keep.sum()) for g in self.moments.values())

    def size(self) -> int:
        """Number of weights of the full network that this posterior speaks of."""
        return sum(g.keep.numel() for g in self.moments.values())

    @property
    def is_point(self) -> bool:
        """Whether the source knew a point only (`PointEstimate`): its draws are the mean, its spread is the prior's."""
        return self.source == POINT

    def to(self, device: torch.device | str) -> Posterior:
        """The same posterior with its tensors on a device."""
        moments, matrices = {n: g.to(device) for n, g in self.items()}, tuple(m.to(device) for m in self.matrices)
        return replace(self, moments=moments, matrices=matrices)

    def save(self, path: str | Path) -> None:
        """Write the survivors to one safetensors file (bitmask + values), atomically.

        Raises:
            OckhamError: the folder cannot be written.
        """
        save_posterior(self, Path(path))


@dataclass(frozen=True, slots=True, eq=False)
class WeightMatrix:
    """A weight [outputs, ...] and, where it has one, its bias as last column, with their joint posterior precision.

    Attributes:
        weight: parameter name.
        bias: parameter name, or None.
        precision: joint precision of the matrix [groups, outputs / groups, inputs (+ 1 with a bias)].
    """

    weight: str
    bias: str | None
    precision: KroneckerPrecision

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that the matrix holds."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Tensors of the parameters' shapes as one [groups, outputs, inputs] tensor."""
        groups, outputs, inputs = self.precision.shape
        matrix = tensors[self.weight].reshape(groups, outputs, inputs - (self.bias is not None))
        if self.bias is None:
            return matrix
        return torch.cat([matrix, tensors[self.bias].reshape(groups, outputs, 1).to(matrix.dtype)], -1)

    def unpack(self, matrix: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The reverse of `pack`, in shape and dtype of ``like``."""
        width = matrix.shape[-1] - (self.bias is not None)
        found = {self.weight: matrix[..., :width].reshape(like[self.weight].shape).to(like[self.weight].dtype)}
        if self.bias is not None:
            found[self.bias] = matrix[..., width].reshape(like[self.bias].shape).to(like[self.bias].dtype)
        return found

    def to(self, device: torch.device | str) -> WeightMatrix:
        """The same block on a device."""
        return WeightMatrix(self.weight, self.bias, self.precision.to(device))


_DAMAGE = (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError, OverflowError, OckhamError)
_FACTORS = ("prior_precision", "input_values", "input_vectors", "output_values", "output_vectors")


def save_posterior(posterior: Posterior, path: Path) -> None:
    """Write one safetensors file, atomically.

    Raises:
        OckhamError: a number that is no moment of a Gaussian, or the folder cannot be written.
    """
    problem = domain_error(posterior)
    if problem:
        raise OckhamError(f"{printable(path)}: the posterior is not saved, {problem}")
    tree = {
        "n_data": posterior.n_data,
        "temperature": posterior.temperature,
        "source": posterior.source,
        "moments": {name: _pack(g, path.parent) for name, g in posterior.items()},
        "matrices": [
            {"weight": m.weight, "bias": m.bias} | {name: getattr(m.precision, name) for name in _FACTORS}
            for m in posterior.matrices
        ],
    }
    optional = {"noise_variance": posterior.noise_variance, "likelihood": posterior.likelihood}
    tree |= {name: value for name, value in optional.items() if value is not None}
    write_tree(path, tree, kind="posterior")


def load_posterior(path: str | Path, *, verify: bool = True) -> Posterior:
    """Read a posterior; a result folder may be named instead of the file in it.

    Args:
        path: result folder, or the file.
        verify: whether the content is compared with the SHA-256 in the folder's seal, or in the file.

    Raises:
        ResultError: missing, truncated, tampered with, foreign or newer, or numbers that are no posterior; says which
            file and why.
    """
    file, seal = Path(path), None
    if file.is_dir():
        seal = sealed(file, POSTERIOR, verify=verify)
        file = inside(file, POSTERIOR)
    tree = read_tree(file, kind="posterior", verify=verify and seal is None)
    try:
        moments = {name: _unpack(node) for name, node in tree["moments"].items()}
        matrices = tuple(
            WeightMatrix(
                str(node["weight"]), node["bias"], KroneckerPrecision(**{name: node[name] for name in _FACTORS})
            )
            for node in tree.get("matrices", [])
        )
        facts = float(tree["n_data"]), float(tree["temperature"]), str(tree["source"]), matrices
        found = Posterior(moments, *facts, tree.get("noise_variance"), tree.get("likelihood"))
    except _DAMAGE as error:
        raise ResultError(f"{printable(file)}: its posterior is damaged ({printable(error)})") from error
    problem = domain_error(found)
    if problem:
        raise ResultError(f"{printable(file)}: its posterior is damaged ({problem})")
    network = file.with_name("network.safetensors")
    if Path(path).is_dir() and seal is None and network.exists():
        try:
            problem = _stranger(found, read_tree(network, kind="network", verify=verify))
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            problem = f"which is damaged: {printable(error)}"
        if problem:
            raise ResultError(f"{printable(file)}: is not the posterior of the network beside it ({problem})")
    return found


def posterior_pieces(path: str | Path, *, verify: bool = True, size: int = 1 << 20) -> Iterator[PosteriorPiece]:
    """A posterior's file a piece at a time, so that it need not fit into memory.

    Args:
        path: file of a posterior whose weights are independent, or result folder.
        verify: whether the content is compared with its SHA-256 first.
        size: weights of a piece; a multiple of eight.

    Raises:
        ResultError: as `load_posterior`; or the weights are correlated, which pieces cannot say.
    """
    file, seal = Path(path), None
    if file.is_dir():
        seal = sealed(file, POSTERIOR, verify=verify)
        file = inside(file, POSTERIOR)
    tree = read_tree(file, kind="posterior", verify=verify and seal is None, stored=True)
    if tree.get("matrices"):
        raise ResultError(
            f"{printable(file)}: weights of {printable(tree['matrices'][0].get('weight'))} are correlated there, and "
            "what goes moves the others; read it as a whole (`load_posterior`, `reduce`)"
        )
    try:
        facts = float(tree["n_data"]), float(tree["temperature"]), str(tree["source"])
        for name, node in tree["moments"].items():
            shape = checked_shape(node["shape"])
            for start, g in _pieces(node, shape, size):
                piece = Posterior({name: g}, *facts, likelihood=tree.get("likelihood"))
                problem = domain_error(piece)
                if problem:
                    raise ResultError(problem)
                yield PosteriorPiece(name, shape, start, piece)
    except _DAMAGE as error:
        raise ResultError(f"{printable(file)}: its posterior is damaged ({printable(error)})") from error


@dataclass(frozen=True, slots=True, eq=False)
class PosteriorPiece:
    """Part of one parameter.

    Attributes:
        name: the parameter.
        shape: its shape.
        start: first place of the piece in row-major order.
        posterior: the piece, one-dimensional, under the parameter's name.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    posterior: Posterior


def _pieces(node: Mapping[str, Any], shape: tuple[int, ...], size: int) -> Iterator[tuple[int, Gaussian]]:
    count, living, bits = math.prod(shape), 0, node.get("keep")
    if bits is not None and bits.shape != (-(-count // 8),):
        raise ResultError(f"a mask of shape {shape} needs {-(-count // 8)} bytes; the file has {bits.shape}")
    for start in range(0, max(count, 1), size):  # a parameter of no weights is one, too
        n = min(size, count - start)
        keep = torch.ones(n, dtype=torch.bool)
        if bits is not None:
            keep = unpack_mask(bits.flat(start // 8, -(-(start + n) // 8)), (n,))
        first, living = living, living + int(keep.sum())

        def part(name: str, fill: float, first: int = first, keep: Tensor = keep, last: int = living) -> Tensor | None:
            return _spread(node[name].flat(first, last), keep, fill) if name in node else None

        mean, precision = part("mean", 0.0), part("precision", torch.inf)
        assert mean is not None
        assert precision is not None
        prior = _places(node["prior_precision"], shape, start, n), _places(node["prior_mean"], shape, start, n)
        yield (
            start,
            Gaussian(mean, precision, *prior, keep, part("marginal_precision", torch.inf), part("inclusion", 0.0)),
        )
    if living != node["mean"].numel():
        raise ResultError(f"the mask keeps {living} weights, the file holds {node['mean'].numel()}")


def _places(values: StoredTensor, shape: tuple[int, ...], start: int, count: int) -> Tensor:
    """Values that broadcast to a shape, at places of it in row-major order, [count]; one for all stays one."""
    if values.numel() == 1:
        return values.flat().reshape(())
    if values.shape == shape:
        return values.flat(start, start + count)
    place, index, step = torch.arange(start, start + count), torch.zeros(count, dtype=torch.int64), 1
    for size, own in zip(shape[::-1], (values.shape[::-1] + (1,) * len(shape))[: len(shape)], strict=True):
        index += place % size % own * step
        place, step = place // size, step * own
    return values.flat()[index]


def _stranger(posterior: Posterior, network: Mapping[str, Any]) -> str:
    """Why a posterior cannot be that of a saved network: other shapes, or weights where it removed them; else empty."""
    for name, g in posterior.items():
        node = network["state"].get(network["tied"].get(name, name))
        if node is None:
            return f"it speaks of {printable(name)}, which the network does not have"
        weight = unpack(node)
        if weight.shape != g.mean.shape:
            return f"{printable(name)} is {tuple(weight.shape)} there and {tuple(g.mean.shape)} here"
        if bool((weight[~g.keep & (g.mean == 0)] != 0).any()):
            return f"{printable(name)} has weights where the posterior removed them"
    return ""


def domain_error(posterior: Posterior) -> str:
    """What in a posterior is no moment of a Gaussian (tensors can be changed in place); empty if nothing is."""
    for name, g in posterior.items():
        kept = {"mean": g.mean[g.keep], "prior_mean": g.prior_mean}
        positive = {"precision": g.precision[g.keep], "prior_precision": g.prior_precision}
        if g.marginal_precision is not None:
            positive["marginal_precision"] = g.marginal_precision[g.keep]
        if g.inclusion is not None and not bool(((g.inclusion >= 0) & (g.inclusion <= 1)).all()):
            return f"{printable(name)}: an inclusion probability outside of 0 to 1"
        for what, values in (kept | positive).items():
            wrong = ~values.isfinite() | (values <= 0) if what in positive else ~values.isfinite()
            if bool(wrong.any()):
                kind = "positive and finite" if what in positive else "finite"
                return f"{printable(name)}: {what} must be {kind}; got {float(values[wrong][0]):g}"
        _release(g)
    return ""


def _release(g: Gaussian) -> None:
    for values in (g.mean, g.precision, g.keep):
        release(values)


def _pack(g: Gaussian, folder: Path) -> dict[str, Any]:
    """What is written of one parameter; of moments that lie in mapped files it lies in such files too."""
    lay: Callable[[Tensor], Tensor] = lambda t: mapped(t, folder) if g.mean.untyped_storage().filename else t  # noqa: E731
    node: dict[str, Any] = {"shape": list(g.mean.shape)}
    node |= {"mean": lay(g.mean[g.keep]), "precision": lay(g.precision[g.keep])}
    if not bool(g.keep.all()):
        node["keep"] = pack_mask(g.keep)
        fixed = g.mean.masked_fill(g.keep, 0.0).reshape(-1)
        if bool((at := fixed.nonzero().squeeze(1)).numel()):
            node |= {"fixed_at": at, "fixed": fixed[at]}
    for name in ("prior_precision", "prior_mean"):
        values = getattr(g, name)
        for dim in range(values.ndim):  # cut to one where they do not change: priors of rows, of whole layers
            first = values.narrow(dim, 0, 1)
            if bool((values == first).all()):
                values = first
        node[name] = values.contiguous()
    for name in ("marginal_precision", "inclusion"):
        if getattr(g, name) is not None:
            node[name] = lay(getattr(g, name)[g.keep])
    _release(g)
    return node


def _expanded(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return values.expand(shape) if values.ndim else values


def _unpack(node: Mapping[str, Any]) -> Gaussian:
    shape = checked_shape(node["shape"])
    if "keep" not in node and node["mean"].numel() != math.prod(shape):
        raise ResultError(f"the file holds {node['mean'].numel()} means for a parameter of shape {shape}")
    keep = unpack_mask(node["keep"], shape) if "keep" in node else torch.ones(shape, dtype=torch.bool)
    marginal, inclusion = node.get("marginal_precision"), node.get("inclusion")
    mean = _spread(node["mean"], keep, 0.0)
    inclusion = None if inclusion is None else _spread(inclusion, keep, 0.0)
    if "fixed_at" in node:
        at = node["fixed_at"]
        if not bool(((at >= 0) & (at < mean.numel())).all()) or bool(keep.reshape(-1)[at].any()):
            raise ResultError("fixed weights lie outside of the parameter, or among those that stay")
        mean.view(-1)[at] = node["fixed"]
        if inclusion is not None:
            inclusion.view(-1)[at] = 1.0
    return Gaussian(
        mean,
        _spread(node["precision"], keep, torch.inf),
        _expanded(node["prior_precision"], shape),
        _expanded(node["prior_mean"], shape),
        keep,
        None if marginal is None else _spread(marginal, keep, torch.inf),
        inclusion,
    )


def _spread(values: Tensor, keep: Tensor, fill: float) -> Tensor:
    if values.numel() != int(keep.sum()):
        raise ResultError(f"the mask keeps {int(keep.sum())} weights, the file holds {values.numel()}")
    afford(keep.numel() * values.element_size(), "a tensor of the posterior")
    result = torch.full(keep.shape, fill, dtype=values.dtype)
    result[keep] = values.reshape(-1)
    return result


def pack_mask(keep: Tensor) -> Tensor:
    """Boolean tensor to uint8 bits, row-major, most significant bit first, padded with zeros."""
    return torch.from_numpy(np.packbits(keep.detach().cpu().contiguous().reshape(-1).numpy()))


def unpack_mask(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The boolean tensor of the given shape.

    Raises:
        ResultError: the number of bits does not fit the shape.
    """
    count = math.prod(shape)
    if bits.dtype is not torch.uint8 or bits.numel() != -(-count // 8):
        raise ResultError(f"a mask of shape {shape} needs {-(-count // 8)} bytes; the file has {bits.numel()}")
    flags = np.unpackbits(bits.reshape(-1).numpy(), count=count).view(np.bool_)
    return torch.from_numpy(flags).view(shape)


def pack(tensor: Tensor, keep: Tensor | None = None) -> dict[str, Any]:
    """Plain tree of a tensor: dense, or shape, bits and values, whichever is smaller.

    Args:
        tensor: any floating tensor.
        keep: which elements to store; default: those that are not zero (a negative zero counts as a value).
    """
    dense = tensor.detach().cpu().contiguous()
    keep = (dense != 0) | torch.signbit(dense) if keep is None and dense.is_floating_point() else keep
    if keep is None:
        return {"dense": dense}
    keep = keep.cpu()
    kept, whole = int(torch.count_nonzero(keep)) * dense.element_size(), dense.numel() * dense.element_size()
    if kept + -(-dense.numel() // 8) >= whole:
        return {"dense": dense}
    return {"shape": list(dense.shape), "bits": pack_mask(keep), "values": dense[keep]}


def unpack(node: Mapping[str, Any]) -> Tensor:
    """The dense tensor, zero where nothing was stored.

    Raises:
        ResultError: bits and values do not fit.
    """
    if "dense" in node:
        tensor = node["dense"]
        if not isinstance(tensor, Tensor):
            raise ResultError("a dense entry holds no tensor")
        return tensor
    shape, values = checked_shape(node["shape"]), node["values"]
    keep = unpack_mask(node["bits"], shape)
    if int(keep.sum()) != values.numel():
        raise ResultError(f"the bitmask marks {int(keep.sum())} values, the file holds {values.numel()}")
    afford(keep.numel() * values.element_size(), "a tensor of the network")
    result = torch.zeros(shape, dtype=values.dtype)
    result[keep] = values.reshape(-1)
    return result
