"""How large the noise is where: Student's t whose scale a small spike-and-slab network moves, fitted to residuals."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ockham.posterior.posterior import Posterior
from ockham.tabular.likelihoods import Scales, resolution
from ockham.tabular.running import Plan, Run, Table, initial
from ockham.tabular.trimming import median_keep

__all__ = ["Noise", "fit_noise"]

_UNITS = 16
_SHARE = 0.2  # of the steps that the network of the mean may take
_SLAB_VARIANCE = 0.3  # a weight that moves ln scale by one half is large
_NEXT_TO_CONSTANT = 0.1
_FREEDOM = 2.0


@dataclass(frozen=True, slots=True, eq=False)
class Noise:
    r"""e ~ t_f(0, s(x)),   ln s = floor + softplus(base + g(x) - floor),   f = 2 + exp(log_freedom).

    Attributes:
        posterior: over the network g; what the data do not support is gone, as a rule all of it.
        before: the same before anything was removed; what inclusion is read from.
        base: ln scale where g = 0.
        log_freedom: ln(f - 2).
        floor: ln of the least scale.
    """

    posterior: Posterior
    before: Posterior
    base: float
    log_freedom: float
    floor: float


def fit_noise(table: Table, plan: Plan, outputs: Tensor, variance: float) -> Noise:
    """Fit to what a network of the mean leaves.

    Args:
        table: the data, targets [n].
        plan: of the network of the mean; steps, batches and seed are taken from it.
        outputs: [draws, n] of that network.
        variance: of equal noise, where the scale starts.
    """
    residual = torch.stack([table.y - outputs.mean(0), outputs.var(0, correction=0)], 1).to(table.x.dtype)
    data = Table(table.x, residual, table.weight)
    steps = max(5, round(_SHARE * plan.steps))
    own = replace(plan, hidden=(_UNITS,), outputs=1, restarts=1, steps=steps, slab_variance=_SLAB_VARIANCE, left_out=0)
    inference = initial(data, own)
    inference.layout.split(inference.state["mean"])["out.weight"].mul_(_NEXT_TO_CONSTANT)
    scales = Scales(
        base=0.5 * torch.tensor(variance).log(),
        log_freedom=torch.tensor(_FREEDOM),
        floor=resolution(table.y),
        terms=table.terms,
        generator=torch.Generator().manual_seed(plan.seed),
    )
    run = Run(data, own, inference, scales)
    keep = {name: torch.ones(1, *shape, dtype=torch.bool) for name, shape in inference.layout.shapes.items()}
    run.remove(keep | {"out.bias": ~keep["out.bias"]})  # that is what the base is for
    run.go(0.0, 0.5, warm=True, on_step=None)
    run.go(0.5, 0.8, warm=False, on_step=None)
    before = inference.posterior()
    run.remove(median_keep(before))
    run.go(0.8, 1.0, warm=False, on_step=None)
    run.remove(median_keep(inference.posterior()))
    return Noise(inference.posterior(), before, float(scales.base), float(scales.log_freedom), scales.floor)
