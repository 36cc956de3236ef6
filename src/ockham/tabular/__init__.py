"""scikit-learn estimators: sparse Bayesian networks for tables. Needs the optional extra `ockham[tabular]`."""

from __future__ import annotations

from ockham.tabular.estimators import SparseBNNClassifier, SparseBNNRegressor

__all__ = ["SparseBNNClassifier", "SparseBNNRegressor"]
