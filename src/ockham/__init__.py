"""Ockham: smaller PyTorch networks by model evidence, with no threshold to tune."""

from __future__ import annotations

from ockham.errors import DataError, NonFiniteLossError, OckhamError, OckhamWarning, ResultError, TraceError
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
from ockham.reduction.rounds import Rounds
from ockham.reduction.rule import BudgetRule, EvidenceRule, LearnedOddsRule
from ockham.reduction.score import by_magnitude, by_random, by_snr, score
from ockham.surgery import Plan, export, mask, plan, random_plan, shrink, trace, verify
from ockham.version import __version__
from ockham.workflow.batchnorm import refresh_batchnorm
from ockham.workflow.compression import Compressed, Compression, compress
from ockham.workflow.estimators import Training, defaults_for, point_estimate
from ockham.workflow.likelihood import Classification, Loss, Regression
from ockham.workflow.result import load

__all__ = [
    "BudgetRule",
    "Classification",
    "Compressed",
    "Compression",
    "DataError",
    "EmpiricalBayes",
    "EvidenceRule",
    "FixedPrior",
    "FixedSpikeSlab",
    "Gaussian",
    "LayerScale",
    "LearnedOddsRule",
    "LearnedSpikeSlab",
    "Loss",
    "MeanField",
    "MedianRule",
    "NonFiniteLossError",
    "OckhamError",
    "OckhamWarning",
    "Plan",
    "PointEstimate",
    "Posterior",
    "Prediction",
    "Regression",
    "RegressionPrediction",
    "ResultError",
    "Rounds",
    "SpikeSlab",
    "TraceError",
    "Training",
    "__version__",
    "by_magnitude",
    "by_random",
    "by_snr",
    "compress",
    "defaults_for",
    "diagnose",
    "export",
    "inclusion",
    "load",
    "load_posterior",
    "mask",
    "plan",
    "point_estimate",
    "predict",
    "predict_regression",
    "random_plan",
    "refresh_batchnorm",
    "score",
    "shrink",
    "trace",
    "verify",
]
