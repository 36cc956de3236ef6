"""Ockham: smaller PyTorch networks by model evidence, with no threshold to tune."""

from __future__ import annotations

from ockham.errors import DataError, NonFiniteLossError, OckhamError, OckhamWarning, ResultError, TraceError
from ockham.posterior.adapters import from_ivon, from_laplace, from_moments, from_swag
from ockham.posterior.group_priors import GroupHorseshoe, GroupScale
from ockham.posterior.horseshoe import horseshoe
from ockham.posterior.ivon import IVON
from ockham.posterior.mean_field import MeanField
from ockham.posterior.point import PointEstimate
from ockham.posterior.posterior import Gaussian, Posterior
from ockham.posterior.predict import Prediction, RegressionPrediction, predict, predict_regression
from ockham.posterior.priors import EmpiricalBayes, FixedPrior, LayerScale
from ockham.posterior.slab_priors import FixedSpikeSlab, LearnedSpikeSlab
from ockham.posterior.spike_slab import SpikeSlab
from ockham.posterior.storage import load_posterior
from ockham.reduction.diagnose import diagnose
from ockham.reduction.inclusion import MedianRule, inclusion
from ockham.reduction.prices import FlatPrice, LearnedRate, PerMac, PerMillisecond, PerParameter
from ockham.reduction.rounds import Rounds
from ockham.reduction.rule import BudgetRule, EvidenceRule, LearnedOddsRule
from ockham.reduction.score import by_magnitude, by_random, by_snr, score
from ockham.reduction.structure_rule import Structures
from ockham.reduction.structures import units_of
from ockham.surgery import Plan, export, mask, plan, random_plan, shrink, trace, verify
from ockham.version import __version__
from ockham.workflow.audit import audit
from ockham.workflow.batchnorm import refresh_batchnorm
from ockham.workflow.compression import Compressed, Compression, compress
from ockham.workflow.correlated import Correlated
from ockham.workflow.estimators import Training, defaults_for, point_estimate
from ockham.workflow.gating import Gates, attach_gates
from ockham.workflow.likelihood import Classification, Loss, Regression
from ockham.workflow.one_shot import compensate, laplace, reduce
from ockham.workflow.publish import save_pretrained
from ockham.workflow.result import load

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
