"""`SparseBNNRegressor` and `SparseBNNClassifier`: scikit-learn's contract over spike-and-slab networks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from ockham.errors import OckhamError
from ockham.tabular.base import SparseBNN
from ockham.tabular.data import Floats, Scaling
from ockham.tabular.likelihoods import Classes, Gaussian, Likelihood, resolution
from ockham.tabular.model import Table
from ockham.tabular.predicting import interval, log_density, moments, noise_std

__all__ = ["SparseBNNClassifier", "SparseBNNRegressor"]

_HEAVY = 3.0  # degrees of freedom


class SparseBNNRegressor(RegressorMixin, SparseBNN):  # type: ignore[misc]
    """Sparse Bayesian network for a number, with its uncertainty and the inclusion probability of every feature.

    Works without tuning from a hundred to a hundred thousand rows and up to thousands of columns: inputs and target are
    standardised inside, columns are screened by evidence, several spike-and-slab networks are fitted side by side, the
    best by evidence goes on, and what is likelier out than in is removed.

    PARAMETERS
    Attributes:
        inclusion_: probability that a feature is used, shape [n_features_in_]: the path rule through the network.
        feature_importances_: the same, under scikit-learn's name.
        n_weights_: weights of the network that predicts.
        evidence_: ELBO of the fit with equal noise, nats; `evidence_curve_` its course.
        noise_std_: standard deviation of the noise (root mean square over rows), in units of the target.
        noise_inclusion_: probability that a feature moves the size of the noise, shape [n_features_in_].
        noise_freedom_: degrees of freedom of the noise (Student's t), mean over draws; large means Gaussian.
        acceptance_: of the chain that drew the networks; None where weights are drawn independently (none or more than
            1500 live, or rows times (50 + weights) exceed four million).
        n_iter_: steps taken.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(200, 6)); y = 2 * X[:, 0] - X[:, 3] + 0.1 * rng.normal(size=200)
    >>> model = SparseBNNRegressor(max_iter=600, n_draws=16, random_state=0).fit(X, y)
    >>> (model.inclusion_ > 0.5).nonzero()[0].tolist()
    [0, 3]
    """

    _classify = False

    def predict(self, X: Any, return_std: bool = False) -> Any:  # noqa: N803
        """Posterior predictive mean, in units of the target.

        Args:
            X: features [n, p].
            return_std: also return the predictive standard deviation: disagreement of networks and noise together.
        """
        inputs = self._inputs(X)
        mean, variance = moments(self._draws, inputs)
        centre, std = self._units()
        located = mean.numpy() * std + centre
        return (located, variance.sqrt().numpy() * std) if return_std else located

    def predict_interval(self, X: Any, coverage: float = 0.95) -> tuple[Floats, Floats]:  # noqa: N803
        """Lower and upper end of the central predictive interval, in units of the target.

        Args:
            X: features [n, p].
            coverage: probability inside, in (0, 1).

        Raises:
            OckhamError: coverage is no probability in (0, 1).
        """
        if not 0 < coverage < 1:
            raise OckhamError(f"predict_interval: coverage is a probability in (0, 1), such as 0.95; got {coverage}")
        inputs = self._inputs(X)
        lower, upper = interval(self._draws, inputs, coverage)
        centre, std = self._units()
        return lower * std + centre, upper * std + centre

    def log_density(self, X: Any, y: Any) -> Floats:  # noqa: N803
        r"""Log predictive density of each row, nats, for the target in its units; minus its mean is the NLL.

            ln 1/D sum_d t_f(y; m_d(x), s_d(x))

        over networks d from the joint posterior of all that lives.

        Args:
            X: features [n, p].
            y: targets [n].
        """
        check_is_fitted(self)
        _, target = validate_data(self, X, y, dtype=np.float64, y_numeric=True, reset=False)
        centre, std = self._units()
        scaled = torch.from_numpy((np.asarray(target, dtype=np.float64) - centre) / std)
        found: Floats = log_density(self._draws, self._inputs(X), scaled).numpy() - math.log(std)
        return found

    @property
    def noise_std_(self) -> float:
        """Root mean square of the noise's standard deviation over the rows of the fit, in units of the target."""
        check_is_fitted(self)
        return self._noise_std * self._units()[1]

    def _units(self) -> tuple[float, float]:
        scale: Scaling = self._target_scaling
        return float(scale.mean[0]), float(scale.std[0])

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> SparseBNNRegressor:  # noqa: N803
        """Go on with more rows. A sample of at most 10,000 of all rows so far is kept and counts for all of them.

        Whenever the rows have doubled the fit starts again: scales and inputs chosen on a few rows are no good start.
        """
        return self._partial_fit(X, y, sample_weight, None)

    def _targets(self, y: Any, classes: Any, first: bool) -> Floats:
        return np.asarray(y, dtype=np.float64)

    def _scaled_target(self, y: Floats, weight: Floats, first: bool) -> torch.Tensor:
        if first:
            self._target_scaling = Scaling.of(y[:, None], weight)
        return self._target_scaling.apply(y[:, None])[:, 0].double()

    def _likelihood(self, y: torch.Tensor) -> Likelihood:
        return Gaussian(resolution(y))

    def _outputs(self) -> int:
        return 1

    def _more_stock(self, table: Table) -> None:
        self.noise_inclusion_ = self._by_feature(self._fitted.inclusion[1].numpy(), np.zeros(len(self.inclusion_)))
        self.noise_freedom_ = float((2 + self._draws.vectors[:, -1].exp()).mean())
        self.n_noise_weights_ = len(self._fitted.state.model.nets[1]) - 1
        self._noise_std = noise_std(self._draws, table.x, table.weight)
        names = self._names()
        moving = ", ".join(names[j] for j in (self.noise_inclusion_ > 0.5).nonzero()[0]) or "nothing"
        self._remarks.append(
            f"noise of standard deviation {self.noise_std_:.3g}, {self.noise_freedom_:.0f} degrees of freedom, "
            f"moved by {moving}"
        )
        if self.noise_freedom_ < _HEAVY:
            self._remarks.append("tails are very heavy: look at rows of low log_density; the mean may give them up")

    def _screened_target(self, y: torch.Tensor) -> torch.Tensor:
        return y.unsqueeze(1)


class SparseBNNClassifier(ClassifierMixin, SparseBNN):  # type: ignore[misc]
    """Sparse Bayesian network for classes; everything else as `SparseBNNRegressor`.

    PARAMETERS
    Attributes:
        classes_: labels, sorted.
        inclusion_: probability that a feature is used, shape [n_features_in_]: the path rule through the network.
        feature_importances_: the same, under scikit-learn's name.
        n_weights_: weights of the network that predicts.
        evidence_: its ELBO, nats; `evidence_curve_` its course.
        acceptance_: of the chain that drew the networks, as there.
        n_iter_: steps taken.
    """

    _classify = True

    def predict_proba(self, X: Any) -> npt.NDArray[np.float64]:  # noqa: N803
        """Posterior predictive probabilities [n, classes], averaged over networks."""
        inputs, parts = self._inputs(X), []
        for out in self._draws.outputs(inputs):
            if out.shape[2] == 1:
                one = torch.sigmoid(out[..., 0]).mean(0)
                parts.append(torch.stack([1 - one, one], 1))
            else:
                parts.append(out.softmax(2).mean(0))
        return torch.cat(parts).numpy()

    def predict(self, X: Any) -> Any:  # noqa: N803
        """The likeliest class."""
        check_is_fitted(self)
        return self.classes_[self.predict_proba(X).argmax(1)]

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> SparseBNNClassifier:  # noqa: N803
        """Go on with more rows; the first call needs all ``classes`` that will ever come."""
        return self._partial_fit(X, y, sample_weight, classes)

    def _targets(self, y: Any, classes: Any, first: bool) -> Floats:
        check_classification_targets(y)
        if first:
            found = np.unique(y if classes is None else classes)
            if len(found) < 2:
                raise OckhamError(
                    f"{type(self).__name__} needs samples of at least 2 classes in the data, but the data "
                    f"contains only one class: {found[0]!r}"
                )
            self.classes_ = found
        index = np.searchsorted(self.classes_, y).clip(0, len(self.classes_) - 1)
        strange = self.classes_[index] != y
        if strange.any():
            raise OckhamError(f"label {np.asarray(y)[strange][0]!r} is not among the classes {list(self.classes_)}")
        result: Floats = index.astype(np.float64)
        return result

    def _scaled_target(self, y: Floats, weight: Floats, first: bool) -> torch.Tensor:
        return torch.from_numpy(y).long()

    def _likelihood(self, y: torch.Tensor) -> Likelihood:
        return Classes()

    def _outputs(self) -> int:
        return 1 if len(self.classes_) == 2 else len(self.classes_)

    def _more_stock(self, table: Table) -> None:
        """Nothing that all have not."""

    def _screened_target(self, y: torch.Tensor) -> torch.Tensor:
        onehot = torch.nn.functional.one_hot(y, len(self.classes_)).float()
        return onehot[:, 1:] if len(self.classes_) == 2 else onehot


_PARAMETERS = """Args:
        hidden_layer_sizes: units of each hidden layer, most of which will go; a straight path is always there.
        n_restarts: networks fitted side by side, of which the best by evidence goes on.
        max_iter: steps at most.
        batch_size: rows a step.
        learning_rate: of the weights.
        slab_variance: prior variance of an included weight (learned from there).
        max_inputs: tables with more columns are screened first; at most so many enter by evidence.
        early_stopping: stop a phase when the evidence has not risen.
        n_iter_no_change: checks (every 50 steps) that this takes.
        n_draws: networks that are drawn and that a prediction averages.
        warm_start: `fit` goes on from the last one instead of starting again.
        verbose: show a progress bar.
        random_state: of initial weights, batches and noise.
"""
for _estimator in (SparseBNNRegressor, SparseBNNClassifier):
    _estimator.__doc__ = (_estimator.__doc__ or "").replace("PARAMETERS\n", _PARAMETERS)
