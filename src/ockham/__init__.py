"""Ockham: smaller PyTorch networks by model evidence, with no threshold to tune."""

from __future__ import annotations

from ockham.choose.planning import plan
from ockham.choose.prices import FlatPrice, LearnedRate, PerMac, PerMillisecond, PerParameter, Structures
from ockham.choose.rules import BudgetRule, EvidenceRule, LearnedOddsRule, Rounds
from ockham.choose.score import by_magnitude, by_random, by_snr, diagnose, score
from ockham.choose.units import units_of
from ockham.core.likelihood import Classification, Loss, Regression
from ockham.core.posterior import Gaussian, Posterior, load_posterior
from ockham.errors import DataError, NonFiniteLossError, OckhamError, OckhamWarning, ResultError, TraceError
from ockham.fit.ivon import IVON
from ockham.fit.mean_field import MeanField
from ockham.fit.point import PointEstimate
from ockham.fit.predict import Prediction, RegressionPrediction, predict, predict_regression, refresh_batchnorm
from ockham.fit.priors import EmpiricalBayes, FixedPrior, GroupHorseshoe, GroupScale, LayerScale
from ockham.methods.adapters import from_ivon, from_laplace, from_moments, from_swag
from ockham.methods.gates.attach import Gates, attach_gates
from ockham.methods.horseshoe import horseshoe
from ockham.methods.laplace.full import Correlated
from ockham.methods.laplace.one_shot import compensate, laplace, reduce
from ockham.methods.spike_slab.audit import audit
from ockham.methods.spike_slab.inclusion import MedianRule, inclusion
from ockham.methods.spike_slab.optimizer import SpikeSlab
from ockham.methods.spike_slab.priors import FixedSpikeSlab, LearnedSpikeSlab
from ockham.moved import install as _install_moved
from ockham.run.compression import Compression, compress
from ockham.run.engine import Compressed
from ockham.run.estimators import Training, defaults_for, point_estimate
from ockham.run.result import load, save_pretrained
from ockham.surgery import Plan, export, mask, random_plan, shrink, trace, verify
from ockham.version import __version__

__all__ = [
    "IVON",
    "BudgetRule",
    "Classification",
    "Compressed",
    "Compression",
    "Correlated",
    "DataError",
    "EmpiricalBayes",
    "EvidenceRule",
    "FixedPrior",
    "FixedSpikeSlab",
    "FlatPrice",
    "Gates",
    "Gaussian",
    "GroupHorseshoe",
    "GroupScale",
    "LayerScale",
    "LearnedOddsRule",
    "LearnedRate",
    "LearnedSpikeSlab",
    "Loss",
    "MeanField",
    "MedianRule",
    "NonFiniteLossError",
    "OckhamError",
    "OckhamWarning",
    "PerMac",
    "PerMillisecond",
    "PerParameter",
    "Plan",
    "PointEstimate",
    "Posterior",
    "Prediction",
    "Regression",
    "RegressionPrediction",
    "ResultError",
    "Rounds",
    "SpikeSlab",
    "Structures",
    "TraceError",
    "Training",
    "__version__",
    "attach_gates",
    "audit",
    "by_magnitude",
    "by_random",
    "by_snr",
    "compensate",
    "compress",
    "defaults_for",
    "diagnose",
    "export",
    "from_ivon",
    "from_laplace",
    "from_moments",
    "from_swag",
    "horseshoe",
    "inclusion",
    "laplace",
    "load",
    "load_posterior",
    "mask",
    "plan",
    "point_estimate",
    "predict",
    "predict_regression",
    "random_plan",
    "reduce",
    "refresh_batchnorm",
    "save_pretrained",
    "score",
    "shrink",
    "trace",
    "units_of",
    "verify",
]

_install_moved()
