"""`prune`: a trained network made sparse or smaller in one sitting, on some thousand tokens or a few hundred images."""

from __future__ import annotations

import copy
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ockham.errors import OckhamError, OckhamWarning
from ockham.methods.blocks.allocation import shares_for
from ockham.methods.blocks.cases import Case, Objective, cases_from, objective_for
from ockham.methods.blocks.damping import Trial
from ockham.methods.blocks.reduction import MatrixEvidence, Orders, reduce_blocks_
from ockham.methods.blocks.solve import Damping, NofM
from ockham.methods.blocks.stream import prepared
from ockham.methods.blocks.study import Study, study, study_damping
from ockham.core.likelihood import Likelihood

__all__ = ["BlockEvidence", "PruneProgress", "PruneSettings", "Pruned", "prune"]


@dataclass(frozen=True, slots=True)
class PruneSettings:
    """What a reduction can be told besides its target.

    Attributes:
        n_data: log-likelihood terms that the network was trained on. None: 20 for each weight that may go, the ratio
            at which a network of its size is trained at the least cost (Hoffmann et al. 2022, arXiv 2203.15556).
        damping: setting of every matrix; None chooses it by kind of matrix on data held out.
        uniform: True takes the same share from every matrix instead of one threshold over all.
        rounds: of removal.
        seed: of drawn targets.
        folder: where the work of finished blocks is kept, so that a job that was stopped goes on there.
    """

    n_data: float | None = None
    damping: Damping | None = None
    uniform: bool = False
    rounds: int = 4
    seed: int = 0
    folder: Path | None = None


def prune(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    keep_share: float | None = None,
    pattern: str | None = None,
    structure: str | None = None,
    budget: Mapping[str, Any] | None = None,
    likelihood: str | Likelihood = "auto",
    batch: Callable[[Any], Any] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    progress: Any = None,
    settings: PruneSettings | None = None,
) -> Any:
    settings = settings or PruneSettings()
    small = copy.deepcopy(model)
    with prepared(small) as device, tempfile.TemporaryDirectory() as scratch:
        cases = cases_from(calibration, batch, small, device)
        objective = objective_for(small, cases[0], likelihood, output)
        t=time.process_time()
        found = study(small, cases, objective, folder=Path(scratch), seed=settings.seed, spared=(), on_case=lambda i,n: None)
        print('study', time.process_time()-t, flush=True)
        keep = shares_for(found.samples, keep_share) if not settings.uniform else dict.fromkeys(found.samples, keep_share)
        t=time.process_time()
        if settings.damping is None:
            damping, trials = study_damping(found, keep, lambda i,n: None)
            for x in trials: print(x)
        else:
            from ockham.methods.blocks.damping import kind_of
            damping = {kind_of(k): settings.damping for k in keep}
        print('damping', time.process_time()-t, damping, flush=True)
        t=time.process_time()
        orders = Orders(keep, damping, settings.n_data or 20*found.weights, settings.rounds)
        ev = reduce_blocks_(small, cases, found.dense, orders, on_block=lambda j,s: print(j,s,flush=True))
        print('reduce', time.process_time()-t, flush=True)
    return small, ev, found, keep
