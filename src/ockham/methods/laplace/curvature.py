"""Curvature of a likelihood at every layer, tapped while batches pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ockham.core.batch import Batch, Substituted, is_packed
from ockham.core.likelihood import TermLikelihood
from ockham.core.objective import Objective, blame
from ockham.errors import DataError, OckhamError

__all__ = [
    "DRAWS",
    "ExampleGradients",
    "MatrixSums",
    "Score",
    "fisher_noise",
    "gradient_factors_",
    "matrices_of",
    "signs",
    "tapped",
]

DRAWS = 2
"""Sums of `fisher_noise`, a power of two; with four a pass over SmolLM2-135M takes 1.7 times as long as with two."""


_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_LARGEST = 8192


@dataclass(slots=True, eq=False)
class MatrixSums:
    """Running sums for one weight matrix.

    Attributes:
        weight: name of the parameter.
        bias: name of the bias that is its last input, or None.
        groups: independent blocks of rows.
        inputs: sum of a a', [groups, inputs, inputs].
        outputs: sum of g g', [groups, outputs, outputs].
        rows: what the product is divided by.
    """

    weight: str
    bias: str | None
    groups: int
    inputs: Tensor
    outputs: Tensor
    rows: float = 0.0
    module: nn.Module | None = field(default=None, repr=False)


def matrices_of(model: nn.Module, names: frozenset[str]) -> dict[str, MatrixSums]:
    """Empty sums for every weight among ``names`` that can have Kronecker factors, by its name.

    Linear and convolution weights used by one module, recurrent weights and packed attention projections. A weight
    that several modules share, or one side of which exceeds 8192, is left out: it gets a diagonal.
    """
    found: dict[str, MatrixSums] = {}
    first = {p: n for n, p in model.named_parameters()}
    owners = [p for m in model.modules() for p in m._parameters.values() if p is not None]
    for module in model.modules():
        for local, p in module._parameters.items():
            if p is None or p.ndim < 2 or first.get(p) not in names or sum(q is p for q in owners) > 1:
                continue
            layout = _layout(module, local, p)
            if layout is None or max(layout[1:]) > _LARGEST:
                continue
            groups, outputs, inputs = layout
            packed = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
            hooked = isinstance(module, nn.Linear | _Conv) and not packed
            bias = first.get(getattr(module, "bias", None)) if hooked else None  # type: ignore[arg-type]
            bias = bias if bias in names else None
            wide = inputs + (bias is not None)
            options: dict[str, Any] = {"dtype": torch.float64, "device": p.device}
            a, g = torch.zeros(groups, wide, wide, **options), torch.zeros(groups, outputs, outputs, **options)
            found[first[p]] = MatrixSums(first[p], bias, groups, a, g, module=module if hooked else None)
    return found


@contextmanager
def tapped(sums: Mapping[str, MatrixSums], weight: float = 1.0) -> Iterator[None]:
    """Add what passes the modules in this block, forward and backward, to their sums.

    Args:
        sums: sums of `matrices_of`; those without a module are left to `gradient_factors_`.
        weight: weight of a row of gradients; 1 where the loss is a sum.
    """
    handles = [s.module.register_forward_hook(_hook(s, weight)) for s in sums.values() if s.module is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gradient_factors_(sums: MatrixSums, gradients: Tensor) -> None:
    """Add gradients of single examples, [examples, *shape of the weight], to the sums of one matrix."""
    d = gradients.reshape(gradients.shape[0], sums.groups, -1, sums.inputs.shape[-1]).to(sums.inputs.dtype)
    sums.inputs += torch.einsum("ngoi,ngoj->gij", d, d)
    sums.outputs += torch.einsum("ngoi,ngpi->gop", d, d)
    sums.rows += float(d.square().sum()) / sums.groups


def _layout(module: nn.Module, local: str, p: Tensor) -> tuple[int, int, int] | None:
    """(groups, outputs, inputs) of a weight, without bias."""
    if isinstance(module, nn.Linear) and local == "weight":
        return 1, p.shape[0], p.shape[1]
    if isinstance(module, _Conv) and local == "weight" and module.padding_mode == "zeros":
        return module.groups, p.shape[0] // module.groups, p[0].numel()
    if isinstance(module, nn.RNNBase) and local.startswith("weight"):
        return 1, p.shape[0], p.shape[1]
    if isinstance(module, nn.MultiheadAttention) and local == "in_proj_weight":
        return 3, p.shape[0] // 3, p.shape[1]
    return None


def _hook(sums: MatrixSums, weight: float) -> Any:
    def forward(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        columns = _columns(module, args[0].detach())
        if sums.bias is not None:
            columns = torch.cat([columns, columns.new_ones(columns.shape[0], 1, columns.shape[2])], 1)
        sums.inputs += (columns @ columns.mT).double()
        sums.rows += columns.shape[2]
        if output.requires_grad:
            output.register_hook(backward)

    def backward(gradient: Tensor) -> None:
        g = gradient.detach()
        if isinstance(sums.module, nn.Linear):
            g = g.reshape(1, -1, g.shape[-1])
        else:
            assert isinstance(sums.module, _Conv)
            g = g if g.ndim == len(sums.module.kernel_size) + 2 else g.unsqueeze(0)
            n, c = g.shape[:2]
            g = g.reshape(n, sums.groups, c // sums.groups, -1).permute(1, 0, 3, 2)
            g = g.reshape(sums.groups, -1, c // sums.groups)
        sums.outputs += weight * (g.mT @ g).double()

    return forward


def _columns(module: nn.Module, x: Tensor) -> Tensor:
    """Everything the weight is multiplied with, [groups, inputs, rows]."""
    if isinstance(module, nn.Linear):
        return x.reshape(1, -1, x.shape[-1]).mT
    assert isinstance(module, _Conv)
    d, groups = len(module.kernel_size), module.groups
    x = x if x.ndim == d + 2 else x.unsqueeze(0)
    for axis in range(d):
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1)
        if module.padding == "same":
            ends = (reach // 2, reach - reach // 2)
        else:
            ends = (0, 0) if module.padding == "valid" else (int(module.padding[axis]),) * 2
        x = F.pad(x.movedim(axis + 2, -1), ends).movedim(-1, axis + 2)
        x = x.unfold(axis + 2, reach + 1, module.stride[axis])[..., :: module.dilation[axis]]  # a view
    x = x.unflatten(1, (groups, -1))  # [N, groups, channels, *positions, *kernel]; positions last copies fastest
    order = [1, 2, *range(3 + d, 3 + 2 * d), 0, *range(3, 3 + d)]
    return x.permute(order).flatten(2 + d).flatten(1, 1 + d)


_CHUNK_NUMBERS = 1 << 24


@dataclass(frozen=True, slots=True)
class Score:
    """Which gradients a curvature is made of.

    Attributes:
        objective: how the network is called, and the likelihood.
        empirical: whether gradients are taken at the data's own targets, or at targets drawn from the network.

    Raises:
        OckhamError: targets should be drawn, and the likelihood is a loss of one's own.
    """

    objective: Objective
    empirical: bool = False

    def __post_init__(self) -> None:
        if not self.empirical and not isinstance(self.objective.likelihood, TermLikelihood):
            raise OckhamError(
                f"a Monte Carlo GGN needs a likelihood to draw targets from, such as classification or regression; got "
                f"{type(self.objective.likelihood).__name__}. Pass fisher='empirical' for a loss of your own"
            )

    def drawn(self, output: Any, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with the targets that gradients are taken at, and roots of the weights of its terms.

        Raises:
            DataError: inputs or outputs are not finite, or there are weights and the likelihood is a loss of one's own.
        """
        likelihood = self.objective.likelihood
        if isinstance(output, Tensor) and bool(output.isnan().any()):
            raise DataError(blame(batch, output))
        if not isinstance(likelihood, TermLikelihood):
            if batch.weight is not None:
                raise DataError("a curvature takes no sample weights with ockham.Loss: put them into the likelihood")
            return batch
        weights = likelihood.term_weights(batch.target, batch.weight)
        target = batch.target if self.empirical else likelihood.drawn(output, batch.target, generator)
        return replace(batch, target=target, weight=None if weights is None else weights.sqrt())

    def nll(self, output: Any, batch: Batch) -> Tensor:
        """Summed negative log-likelihood of a drawn batch, nats."""
        likelihood = self.objective.likelihood
        if isinstance(likelihood, TermLikelihood):
            return likelihood.total(output, batch.target, batch.weight)
        return self.objective.nll(output, batch) * self.objective.terms(batch)


class ExampleGradients:
    """Gradients of single examples with respect to some parameters of a network, by vmap or, failing that, one by one.

    Args:
        model: network in evaluation mode; it is not changed.
        names: parameters to differentiate; all others are constants.
        score: which gradients.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], score: Score) -> None:
        every = dict(model.named_parameters())
        self._model, self._score = model, score
        self.parameters = {name: every[name].detach() for name in names}
        self._rest = {n: p.detach() for n, p in every.items() if n not in self.parameters}
        self._rest |= {n: b.detach() for n, b in model.named_buffers()}
        self._one_by_one = False
        size = max(1, sum(p.numel() for p in self.parameters.values()))
        self.chunk = max(1, min(64, _CHUNK_NUMBERS // size))

    def chunks(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """Gradients [examples, *shape of the parameter] by name, for some examples of a drawn batch at a time."""
        step = 1 if batch.packed else self.chunk
        for start in range(0, batch.size, step):
            yield self._of(batch.part(slice(start, start + step)))

    def _of(self, batch: Batch) -> dict[str, Tensor]:
        size = batch.size
        whole = (batch.args, dict(batch.kwargs), batch.target, batch.weight)
        leaves, spec = pytree.tree_flatten(whole, is_leaf=is_packed)
        each = [isinstance(v, Tensor) and v.ndim > 0 and len(v) == size for v in leaves]
        moving = [v for v, moves in zip(leaves, each, strict=True) if moves]

        def loss(parameters: Mapping[str, Tensor], *parts: Tensor) -> Tensor:
            rest = iter(parts)
            found = [next(rest).unsqueeze(0) if moves else v for v, moves in zip(leaves, each, strict=True)]
            one = Batch(*pytree.tree_unflatten(found, spec))
            tensors = {**self._rest, **parameters}
            return self._score.nll(self._score.objective.answer(Substituted(self._model, tensors), one), one)

        if not self._one_by_one and not batch.packed:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a missing batching rule costs time, nothing else
                    return vmap(grad(loss), in_dims=(None, *[0] * len(moving)))(self.parameters, *moving)  # type: ignore[no-any-return]
            except (RuntimeError, DataError):
                self._one_by_one = True
        leaf = {name: p.clone().requires_grad_() for name, p in self.parameters.items()}
        with torch.enable_grad():
            losses = [loss(leaf, *(v[i] for v in moving)) for i in range(size)]
            options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
            examples = [torch.autograd.grad(value, list(leaf.values()), **options) for value in losses]
        return {name: torch.stack(each) for name, each in zip(leaf, zip(*examples, strict=True), strict=True)}


def fisher_noise(logits: Tensor, counted: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    r"""Sums whose gradients in each row's logits have the softmax's Fisher information as covariance.

        d = u - p sum(u),    u_k = sqrt(p_k) z_k,    z = +1 or -1:    E d d' = diag(p) - p p'

    Labels drawn from the softmax have the same, and where the network is sure nearly all of them say nothing; Gaussian
    z have more scatter. Signs of the likeliest classes are orthogonal over the draws: together, not each by itself,
    these have the covariance, without scatter where there are no other classes. Every row has one more sign, so that
    rows know nothing of each other.

    Args:
        logits: logits, ``[rows, classes]``.
        counted: boolean ``[rows]``.
        generator: generator of the draws.
    """
    root = logits.detach().float().softmax(-1).sqrt_()
    top = root.topk(min(DRAWS, root.shape[-1]), -1).indices
    for own in _orthogonal(root):
        z = _signs(root.shape, generator, root)
        z.scatter_(-1, top, own[: top.shape[-1]] * _signs((len(root), 1), generator, root))
        z.addcmul_(root, torch.einsum("rc,rc->r", z, root)[:, None], value=-1).mul_(root).mul_(counted[:, None])
        yield logits.reshape(-1) @ z.reshape(-1).to(logits.dtype)  # a product of the two would take their room again


def signs(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Iterator[Tensor]:
    """Numbers +1 and -1, ``[rows..., numbers]``, in draws; those of `DRAWS` neighbours in a row are orthogonal."""
    for own in _orthogonal(like):
        drawn = _signs((*shape[:-1], -(-shape[-1] // DRAWS)), generator, like)
        yield (drawn.unsqueeze(-1) * own).flatten(-2)[..., : shape[-1]]


def _orthogonal(like: Tensor) -> Tensor:
    """A Hadamard matrix ``[DRAWS, DRAWS]``."""
    found = like.new_ones(1, 1)
    while len(found) < DRAWS:
        found = torch.kron(like.new_tensor([[1, 1], [1, -1]]), found)
    return found


def _signs(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator, device=like.device, dtype=like.dtype).mul_(2).sub_(1)
