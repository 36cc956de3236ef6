"""How large the noise is where: Student's t whose scale a small spike-and-slab network moves, fitted to residuals."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ockham.core.posterior import Posterior
from ockham.tabular.likelihoods import FREEDOM, Scales, resolution
from ockham.tabular.running import Plan, Run, Table, initial
from ockham.tabular.trimming import reduced

__all__ = ["Noise", "fit_noise"]

_UNITS = 16
_SHARE = 0.2  # of the steps that the network of the mean may take, but no fewer than settle
_SLAB_VARIANCE = 0.3  # a weight that moves ln scale by one half is large
_LEAST_STEPS = 400


@dataclass(frozen=True, slots=True, eq=False)
class Noise:
    r"""e ~ t_f(0, s(x)),   ln s = floor + softplus(base + g(x) - floor),   f = 2 + exp(log_freedom).

    Attributes:
        posterior: over the network g; what the data do not support is gone, as a rule all of it.
        before: the same before anything was removed; what inclusion is read from.
        base: ln scale where g = 0.
        log_freedom: ln(f - 2).
        centre: of the base's prior, ln scale of an equal noise.
        floor: ln of the least scale.
    """

    posterior: Posterior
    before: Posterior
    base: float
    log_freedom: float
    centre: float
    floor: float


def fit_noise(table: Table, plan: Plan, outputs: Tensor, variance: float) -> Noise:
    """Fit to what a network of the mean leaves.

    Args:
        table: the data, targets [n].
        plan: of the network of the mean; restarts, steps, batches and seed are taken from it.
        outputs: [draws, n] of that network.
        variance: of equal noise, where the scale starts.
    """
    residual = torch.stack([table.y - outputs.mean(0), outputs.var(0, correction=0)], 1).to(table.x.dtype)
    data = Table(table.x, residual, table.weight)
    steps = max(_LEAST_STEPS, round(_SHARE * plan.steps))
    own = replace(plan, hidden=(_UNITS,), outputs=1, steps=steps, slab_variance=_SLAB_VARIANCE, left_out=0)
    inference = initial(data, own)
    scales = Scales(
        base=torch.full((own.restarts, 1), 0.5 * math.log(variance)),
        log_freedom=torch.full((own.restarts, 1), FREEDOM),
        centre=0.5 * math.log(variance),
        floor=resolution(table.y),
        terms=table.terms,
        generator=torch.Generator().manual_seed(plan.seed),
    )
    crowd = Run(data, own, inference, scales)
    keep = {n: torch.ones(own.restarts, *shape, dtype=torch.bool) for n, shape in inference.layout.shapes.items()}
    crowd.remove(keep | {"out.bias": ~keep["out.bias"]})  # that is what the base is for
    return max((_finished(run) for run in crowd.finalists(None)), key=lambda found: found[0])[1]


def _finished(run: Run) -> tuple[float, Noise]:
    """Evidence and noise of one network on its own."""
    run.go(0.5, 0.8, warm=False, on_step=None)
    before, _ = reduced(run, None)
    scales = run.likelihood
    assert isinstance(scales, Scales)
    base, log_freedom = float(scales.base), float(scales.log_freedom)
    noise = Noise(run.inference.posterior(), before, base, log_freedom, scales.centre, scales.floor)
    return run.evidence(), noise
