"""Published methods that take weights out of a trained network without training it, one matrix at a time.

Magnitude; Wanda (Sun et al. 2023, arXiv 2306.11695: |w| |x|, equal shares in every row); SparseGPT (Frantar & Alistarh
2023, arXiv 2301.00774: Algorithm 1 with the released code's mask per 128 columns); ALPS (Meng et al. 2024, arXiv
2406.07831: ADMM with the released code's steps of the penalty, ten conjugate gradients); the score of FLAP (An et al.
2024, arXiv 2312.11983: variance of the input times squared norm of the column); SliceGPT (Ashkboos et al. 2024, arXiv
2401.15024: directions of the residual stream, by PCA before every attention and every MLP).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ockham.methods.blocks.cases import Case
from ockham.methods.blocks.curvature import Stream, floating_output, weights_of
from ockham.methods.blocks.reduction import Study, inputs_of_stage
from ockham.methods.blocks.solve import NofM

Solver = Callable[[Tensor, Tensor, float, "NofM | None"], Tensor]
"""(weight ``[outputs, inputs]``, A of its inputs, share that stays, pattern) to the weight that is left."""


def kept_mask(score: Tensor, keep: float, pattern: NofM | None, *, by_row: bool) -> Tensor:
    """True for the highest: of every run, of every row, or of the whole matrix."""
    if pattern is not None:
        runs = score.reshape(-1, pattern.m)
        return (
            torch.zeros_like(runs, dtype=torch.bool).scatter_(1, runs.topk(pattern.n, 1).indices, True).view_as(score)
        )
    rows = score if by_row else score.reshape(1, -1)
    best = rows.topk(round(keep * rows.shape[1]), 1).indices
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, best, True).view_as(score)


def magnitude(weight: Tensor, inputs: Tensor, keep: float, pattern: NofM | None) -> Tensor:
    return weight * kept_mask(weight.square(), keep, pattern, by_row=False)


def wanda(weight: Tensor, inputs: Tensor, keep: float, pattern: NofM | None) -> Tensor:
    return weight * kept_mask(weight.square() * inputs.diagonal(), keep, pattern, by_row=True)


def sparsegpt(damping: float, block: int = 128) -> Solver:
    """Columns from left to right; what goes is made good by those to the right."""

    def solve(weight: Tensor, inputs: Tensor, keep: float, pattern: NofM | None) -> Tensor:
        w, h = weight.clone(), inputs.double()
        h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
        u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).to(w.dtype)
        for first in range(0, w.shape[1], block):
            last = min(first + block, w.shape[1])
            part, root = w[:, first:last].clone(), u[first:last, first:last]
            error = torch.zeros_like(part)
            stays = torch.ones_like(part, dtype=torch.bool)
            if pattern is None:
                stays = kept_mask(part.square() / root.diagonal().square(), keep, None, by_row=False)
            for j in range(last - first):
                if pattern is not None and j % pattern.m == 0:
                    run = slice(j, j + pattern.m)
                    score = part[:, run].square() / root.diagonal()[run].square()
                    stays[:, run] = kept_mask(score, keep, pattern, by_row=True)
                after = part[:, j] * stays[:, j]
                error[:, j] = (part[:, j] - after) / root[j, j]
                part[:, j:] -= error[:, j, None] * root[j, j:]
                part[:, j] = after
            w[:, first:last] = part
            w[:, last:] -= error @ u[first:last, last:]
        return w

    return solve


def alps(damping: float, most: int = 300, early: int = 30) -> Solver:
    """ADMM between the quadratic and the support, then conjugate gradients on the support."""

    def solve(weight: Tensor, inputs: Tensor, keep: float, pattern: NofM | None) -> Tensor:
        h = inputs.double() + damping * inputs.diagonal().double().mean() * torch.eye(len(inputs), dtype=torch.double)
        scale = h.diagonal().sqrt() + 1e-8
        h = h / scale / scale[:, None]
        values, vectors = torch.linalg.eigh(h)
        scale, h, dense = scale.float(), h.float(), weight * scale.float()
        target, rho, grown = dense @ h, 0.1, False

        def supported(w: Tensor) -> Tensor:
            return kept_mask(w.square(), keep, pattern, by_row=False)

        def inverse() -> Tensor:
            return ((vectors / (values + rho)) @ vectors.mT).float()

        first = before = supported(dense)
        free, sparse, dual, solver = dense, dense * first, torch.zeros_like(dense), inverse()
        for i in range(1, most + 1):
            free = (target - dual + rho * sparse) @ solver
            stays = supported(free + dual / rho)
            sparse = (free + dual / rho) * stays
            dual = dual + rho * (free - sparse)
            if i % 3:
                continue
            moved, count = int((stays != before).sum()), int(first.sum())
            factor = 1.3 if moved > 0.1 * count else 1.2 if moved > 0.005 * count else 1.1 if moved else 1.0
            if factor > 1.1 or (grown and moved):
                grown, rho = True, min(rho * factor, 1e6)
            elif grown:
                break
            else:  # the penalty was so high from the start that nothing moves
                rho /= 5
                free, sparse, dual, stays = dense, dense * first, torch.zeros_like(dense), first
            before, solver = stays, inverse()
            if i >= early and moved < 0.0003 * count:
                break
        stays = supported(free)
        w = free * stays
        left = (target - w @ h) * stays
        step, size = left.clone(), left.square().sum()
        for _ in range(10):
            along = (step @ h) * stays
            rate = size / (step * along).sum().clamp_min(1e-30)
            w, left = w + rate * step, left - rate * along
            size, old = left.square().sum(), size
            step = left + size / old.clamp_min(1e-30) * step
        return w / scale

    return solve


@torch.no_grad()
def layerwise_(
    model: nn.Module, cases: Sequence[Case], found: Study, solve: Solver, keep: Mapping[str, float | NofM], blocks: int
) -> None:
    """A rival in our stream: each matrix on what the reduced ones before it make of the calibration windows."""
    stream = Stream(model, cases, found.dense.blocks)
    for j, block_map in enumerate(found.dense.maps[:blocks]):
        calls, block = stream.calls(), found.dense.blocks[j]
        parameters = weights_of(block, block_map.name)
        for stage in block_map.stages:
            sums = inputs_of_stage(block, block_map, stage, calls, cases)
            for key in stage:
                matrix, wanted = block_map.matrices[key], keep[key]
                pattern = wanted if isinstance(wanted, NofM) else None
                share = wanted.n / wanted.m if isinstance(wanted, NofM) else wanted
                small = solve(matrix.read(parameters)[0], sums[block_map.source[key]][0], share, pattern)
                matrix.write(parameters, small[None])
        stream.advance(calls)


@torch.no_grad()
def flap_(readers: Sequence[nn.Linear], gone: int, cases: Sequence[Case], run: Callable[[Case], object]) -> list[int]:
    """Zero the columns of so many units over all layers; what went answers with its mean, as a bias.

    Args:
        readers: the layer that reads the units of each block.
        gone: units that go.
        cases: calibration data.
        run: runs the network on a case.

    Returns:
        Units that stay, by layer.
    """
    sums = [torch.zeros(2, m.in_features, dtype=torch.float64) for m in readers]
    rows = [0] * len(readers)

    def note(at: int, case: Case, x: Tensor) -> None:
        flat = x.flatten(0, -2).double()
        flat = flat if case.mask is None or case.mask.numel() != len(flat) else flat[case.mask.flatten()]
        sums[at] += torch.stack([flat.sum(0), flat.square().sum(0)])
        rows[at] += len(flat)

    for case in cases:
        handles = [
            m.register_forward_pre_hook(lambda _, a, i=i, case=case: note(i, case, a[0])) for i, m in enumerate(readers)
        ]
        run(case)
        for handle in handles:
            handle.remove()
    means = [s[0] / n for s, n in zip(sums, rows, strict=True)]
    scores = [
        (s[1] / n - mean.square()) * m.weight.double().square().sum(0)
        for s, n, mean, m in zip(sums, rows, means, readers, strict=True)
    ]
    alike = torch.cat([(v - v.mean()) / v.std() for v in scores])
    lost = torch.zeros_like(alike, dtype=torch.bool)
    lost[alike.argsort()[:gone]] = True
    parts = lost.split([len(v) for v in scores])
    for m, mean, mine in zip(readers, means, parts, strict=True):
        moved = (m.weight.double()[:, mine] @ mean[mine]).to(m.weight.dtype)
        m.bias = nn.Parameter(moved if m.bias is None else m.bias + moved, requires_grad=False)
        m.weight[:, mine] = 0
    return [int((~p).sum()) for p in parts]


def sliced_width(width: int, parameters: int, share: float) -> int:
    """Directions that SliceGPT can keep of a stream, where a block may have a share of its parameters.

    All matrices of a block read or write the stream, so they shrink with its width k; two k x k matrices that turn
    the shortcuts come on top: parameters k / width + 2 k^2 = share parameters.
    """
    each = parameters / width
    return int((math.sqrt(each**2 + 8 * share * parameters) - each) / 4)


@torch.no_grad()
def slicegpt_(
    embedding: nn.Module, blocks: Sequence[Any], cases: Sequence[Case], model: nn.Module, kept: int, *, normed: bool
) -> list[Any]:
    """Leave so many directions of a Llama's residual stream between all its branches; the head reads all of the last.

    The network is not made narrower: the stream is projected where it would be cut, which gives the same answers, since
    their root mean square is of the old width, as in the released code.

    Args:
        embedding: what makes the stream.
        blocks: transformer blocks with ``self_attn`` and ``mlp``.
        cases: calibration data.
        model: the network.
        kept: directions that stay.
        normed: True takes the covariance of rows of length one, as the paper has it; False of the rows as they are.

    Returns:
        Hooks to remove.
    """
    handles: list[Any] = []
    seen: list[Tensor] = []
    at: dict[str, Tensor] = {}

    def projection() -> Tensor:
        flat = torch.cat([x.flatten(0, -2) for x in seen]).double()
        seen.clear()
        flat = flat / flat.norm(dim=1, keepdim=True) if normed else flat
        vectors = torch.linalg.eigh(flat.mT @ flat)[1][:, -kept:].float()
        return vectors @ vectors.mT

    def note(m: nn.Module, a: Any, out: Any) -> None:
        seen.append(at["x"] + out[0])

    def after_attention(m: nn.Module, a: Any, out: Any, p: Tensor) -> Any:
        at["middle"] = (at["x"] + out[0]) @ p
        return (at["middle"] - at["x"], *out[1:])

    stream = Stream(model, cases, blocks)
    for i, block in enumerate(blocks):
        if i == 0:
            seen += [call[0][0] for call in stream.calls()]
            first = projection()
            handles.append(embedding.register_forward_hook(lambda m, a, x, p=first: x @ p))
        calls = stream.calls()
        handles.append(block.register_forward_pre_hook(lambda m, a: at.update(x=a[0])))
        look = block.self_attn.register_forward_hook(note)
        for args, kwargs in calls:
            block(*args, **kwargs)
        look.remove()

        middle = projection()
        handles.append(
            block.self_attn.register_forward_hook(lambda m, a, o, p=middle, f=after_attention: f(m, a, o, p))
        )
        if i + 1 < len(blocks):
            seen += [floating_output(block(*args, **kwargs)) for args, kwargs in calls]
            last = projection()
            handles.append(
                block.mlp.register_forward_hook(lambda m, a, o, p=last: (at["middle"] + o) @ p - at["middle"])
            )
        stream.advance(calls)
    return handles
