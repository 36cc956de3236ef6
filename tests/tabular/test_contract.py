"""scikit-learn's own checks."""

from __future__ import annotations

import warnings

import pytest
from sklearn.utils.estimator_checks import estimator_checks_generator

from ockham.errors import OckhamWarning
from ockham.tabular import SparseBNNClassifier, SparseBNNRegressor

SETTINGS = {"max_iter": 60, "n_restarts": 1, "hidden_layer_sizes": (4,), "n_draws": 4, "random_state": 0}
CHECKS = [
    pytest.param(estimator, check, id=f"{type(estimator).__name__}-{getattr(check, 'func', check).__name__}")
    for kind in (SparseBNNRegressor, SparseBNNClassifier)
    for estimator, check in estimator_checks_generator(kind(**SETTINGS))
]


@pytest.mark.parametrize(("estimator", "check"), CHECKS)
def test_scikit_learn(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OckhamWarning)  # few rows
        warnings.filterwarnings("ignore", "No features were selected")  # targets by chance
        check(estimator)
