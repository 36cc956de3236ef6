"""Ockham: smaller PyTorch networks by model evidence, with no threshold to tune.

What a user types is here. Priors, rules, prices and errors for those who extend live in their rooms (docs: API) and
are also found as attributes of this package.
"""

from __future__ import annotations

import importlib
from typing import Any

from ockham.choose.planning import plan
from ockham.choose.prices import Structures
from ockham.choose.rules import BudgetRule, EvidenceRule, Rounds, diagnose, score
from ockham.core import __version__
from ockham.core.batch import Batch
from ockham.core.likelihood import Classification, Loss, Regression
from ockham.core.posterior import Posterior, load_posterior
from ockham.errors import DataError, OckhamError, OckhamWarning, TraceError
from ockham.fit.ivon import IVON
from ockham.fit.mean_field import MeanField
from ockham.fit.predict import Prediction, predict, predict_regression, refresh_batchnorm
from ockham.fit.priors import FixedPrior
from ockham.methods.adapters import from_ivon, from_laplace, from_moments, from_swag
from ockham.methods.blocks.prune import prune
from ockham.methods.gates.attach import Gates, attach_gates
from ockham.methods.laplace.one_shot import compensate, laplace, reduce
from ockham.methods.spike_slab.audit import audit
from ockham.methods.spike_slab.optimizer import SpikeSlab
from ockham.methods.spike_slab.priors import inclusion
from ockham.moved import install as _install_moved
from ockham.run.compression import Compression, Training, compress
from ockham.run.engine import Compressed
from ockham.run.folder import load, save_pretrained
from ockham.surgery import Plan, export, mask, rotate, shrink, trace, verify

__all__ = [
    "IVON",
    "Batch",
    "BudgetRule",
    "Classification",
    "Compressed",
    "Compression",
    "DataError",
    "EvidenceRule",
    "FixedPrior",
    "Gates",
    "Loss",
    "MeanField",
    "OckhamError",
    "OckhamWarning",
    "Plan",
    "Posterior",
    "Prediction",
    "Regression",
    "Rounds",
    "SpikeSlab",
    "Structures",
    "TraceError",
    "Training",
    "__version__",
    "attach_gates",
    "audit",
    "compensate",
    "compress",
    "diagnose",
    "export",
    "from_ivon",
    "from_laplace",
    "from_moments",
    "from_swag",
    "inclusion",
    "laplace",
    "load",
    "load_posterior",
    "mask",
    "plan",
    "predict",
    "predict_regression",
    "prune",
    "reduce",
    "refresh_batchnorm",
    "rotate",
    "save_pretrained",
    "score",
    "shrink",
    "trace",
    "verify",
]

_ROOMS = {
    "FixedSpikeSlab": "methods.spike_slab.priors",
    "MedianRule": "methods.spike_slab.priors",
    "PerMac": "choose.prices",
    "random_plan": "surgery",
    "Gaussian": "core.posterior",
    "FlatPrice": "choose.prices",
    "LearnedRate": "choose.prices",
    "PerMillisecond": "choose.prices",
    "PerParameter": "choose.prices",
    "UnitShare": "choose.prices",
    "LearnedOddsRule": "choose.rules",
    "by_magnitude": "choose.rules",
    "by_random": "choose.rules",
    "by_snr": "choose.rules",
    "decide_files": "choose.stored",
    "units_of": "choose.units",
    "NonFiniteLossError": "errors",
    "ResultError": "errors",
    "PointEstimate": "fit.mean_field",
    "RegressionPrediction": "fit.predict",
    "EmpiricalBayes": "fit.priors",
    "GroupHorseshoe": "fit.priors",
    "GroupScale": "fit.priors",
    "LayerScale": "fit.priors",
    "horseshoe": "methods.horseshoe",
    "Correlated": "methods.laplace.posterior",
    "LearnedSpikeSlab": "methods.spike_slab.priors",
    "defaults_for": "run.compression",
    "point_estimate": "run.compression",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'ockham' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ockham.{_ROOMS[name]}"), name)


_install_moved()
