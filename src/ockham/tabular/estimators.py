"""`SparseBNNRegressor` and `SparseBNNClassifier`: scikit-learn's contract over spike-and-slab networks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import ClassifierMixin, RegressorMixin, clone
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.validation import check_array, check_consistent_length, check_is_fitted

from ockham.errors import OckhamError, OckhamWarning
from ockham.tabular.base import SparseBNN
from ockham.tabular.data import Floats, outlying
from ockham.tabular.likelihoods import Classes
from ockham.tabular.predicting import interval, log_density, moments, noise_std
from ockham.tabular.targets import ClassTarget, CountTarget, NumberTarget

__all__ = ["SparseBNNClassifier", "SparseBNNRegressor"]

_HEAVY = 3.0  # degrees of freedom
_CORRUPT = 15.0


class SparseBNNRegressor(RegressorMixin, SparseBNN):  # type: ignore[misc]
    """Sparse Bayesian network for a number, with its uncertainty and the inclusion probability of every feature.

    Works without tuning from a hundred to a hundred thousand rows and up to thousands of columns, and takes tables as
    they come (`fit`): columns are screened by evidence, units come and weights go as long as the evidence of the whole
    network rises, and predictions average networks drawn from the posterior of what is left.

    PARAMETERS
    Attributes:
        inclusion_: probability that a feature is used, shape [n_features_in_]: evidences of the network with and
            without it, and with its stand-ins; of one that only trees read, what held-out rows lose without it.
        feature_importances_: the same, under scikit-learn's name.
        n_weights_: number of weights of the networks that predict, those of their noise included.
        n_leaves_: number of leaves of the trees for what networks leave; 0 where held-out rows gain nothing by them.
        residual_gain_: nats by which the log density of held-out rows rose by the trees, for all rows; 0 without.
        n_noise_weights_: number of weights that move the size of the noise.
        evidence_: Laplace ln evidence of the best network and its structure, nats; `evidence_curve_` its course.
        inclusion_by_target_: `inclusion_` of each of several targets, shape [k, n_features_in_].
        noise_std_: standard deviation of the noise (root mean square over rows), in units of the target.
        noise_inclusion_: probability that a feature moves the size of the noise, shape [n_features_in_].
        noise_freedom_: degrees of freedom of the noise (Student's t), mean over draws; large means Gaussian, and
            infinity stands for counts.
        acceptance_: mean acceptance of the chains that drew the networks; None where draws are Gaussian about the mode
            (rows times weights exceed 400,000).
        n_iter_: number of second-order steps taken.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(200, 6)); y = 2 * X[:, 0] - X[:, 3] + 0.1 * rng.normal(size=200)
    >>> model = SparseBNNRegressor(max_iter=600, n_draws=16, random_state=0).fit(X, y)
    >>> (model.inclusion_ > 0.5).nonzero()[0].tolist()
    [0, 3]
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **SparseBNN._parameter_constraints,
        "loss": [StrOptions({"student_t", "poisson"})],
    }
    _classify = False

    def __init__(  # noqa: PLR0913 - scikit-learn: every setting is a keyword of the constructor
        self,
        hidden_layer_sizes: Any = (64,),
        *,
        loss: str = "student_t",
        n_restarts: int = 2,
        max_iter: int = 3000,
        batch_size: Any = "deprecated",
        learning_rate: Any = "deprecated",
        slab_variance: float = 1.0,
        max_inputs: int = 24,
        early_stopping: bool = True,
        n_iter_no_change: int = 2,
        n_draws: int = 64,
        n_effective: float | None = None,
        residual_trees: bool = True,
        warm_start: bool = False,
        verbose: bool = False,
        random_state: Any = None,
    ) -> None:
        super().__init__(
            hidden_layer_sizes,
            n_restarts=n_restarts,
            max_iter=max_iter,
            batch_size=batch_size,
            learning_rate=learning_rate,
            slab_variance=slab_variance,
            max_inputs=max_inputs,
            early_stopping=early_stopping,
            n_iter_no_change=n_iter_no_change,
            n_draws=n_draws,
            n_effective=n_effective,
            residual_trees=residual_trees,
            warm_start=warm_start,
            verbose=verbose,
            random_state=random_state,
        )
        self.loss = loss

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:  # noqa: N803
        """As `SparseBNN.fit`; with targets [n, k] a network is fitted to each, and predictions have k columns."""
        self.__dict__.pop("estimators_", None)
        if getattr(y, "ndim", 1) != 2 or np.shape(y)[1] < 2:
            return super().fit(X, y, sample_weight)
        targets = np.asarray(y)
        self.estimators_ = [clone(self).fit(X, targets[:, k], sample_weight) for k in range(targets.shape[1])]
        parts = self.estimators_
        self.inclusion_by_target_ = np.stack([part.inclusion_ for part in parts])
        self.inclusion_ = self.inclusion_by_target_.max(0)
        self.n_weights_, self.evidence_ = sum(p.n_weights_ for p in parts), sum(p.evidence_ for p in parts)
        self.n_iter_, self.n_features_in_ = max(p.n_iter_ for p in parts), parts[0].n_features_in_
        if hasattr(parts[0], "feature_names_in_"):
            self.feature_names_in_ = parts[0].feature_names_in_
        return self

    def _stacked(self, ask: Callable[[SparseBNNRegressor], Any]) -> Any:
        """Answers of the networks of several targets side by side, [n, k]."""
        answers = [ask(part) for part in self.estimators_]
        if isinstance(answers[0], tuple):
            return tuple(np.stack(each, 1) for each in zip(*answers, strict=True))
        return np.stack(answers, 1)

    def predict(self, X: Any, return_std: bool = False) -> Any:  # noqa: N803
        """Posterior predictive mean, in units of the target.

        Args:
            X: features [n, p].
            return_std: also return the predictive standard deviation: disagreement of networks and noise together.
        """
        if hasattr(self, "estimators_"):
            return self._stacked(lambda part: part.predict(X, return_std))
        inputs = self._inputs(X)
        mean, variance = moments(self._draws, inputs)
        centre, std = self._target.units
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
        if hasattr(self, "estimators_"):
            return self._stacked(lambda part: part.predict_interval(X, coverage))  # type: ignore[no-any-return]
        inputs = self._inputs(X)
        lower, upper = interval(self._draws, inputs, coverage)
        centre, std = self._target.units
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
        if hasattr(self, "estimators_"):  # given the inputs the networks take the targets as independent
            each = [part.log_density(X, column) for part, column in zip(self.estimators_, np.asarray(y).T, strict=True)]
            return np.sum(each, 0)  # type: ignore[no-any-return]
        inputs = self._inputs(X)
        target = check_array(y, ensure_2d=False, dtype=np.float64)
        check_consistent_length(inputs, target)
        centre, std = self._target.units
        scaled = torch.from_numpy((self._target.numbers(target) - centre) / std)
        found: Floats = log_density(self._draws, inputs, scaled).numpy() - math.log(std)
        return found

    @property
    def noise_std_(self) -> float:
        """Root mean square of the noise's standard deviation over the rows of the fit, in units of the target."""
        check_is_fitted(self)
        return self._noise_std * self._target.units[1]

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> SparseBNNRegressor:  # noqa: N803
        """Go on with more rows. A sample of at most 10,000 of all rows so far is kept and counts for all of them.

        Whenever the rows have doubled the fit starts again: scales and inputs chosen on a few rows are no good start.
        """
        return self._partial_fit(X, y, sample_weight, None)

    def summary(self, top: int = 10) -> str:
        """As `SparseBNN.summary`; one table for each target."""
        if not hasattr(self, "estimators_"):
            return super().summary(top)
        return "\n\n".join(f"target {k}\n{part.summary(top)}" for k, part in enumerate(self.estimators_))

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "estimators_") or super().__sklearn_is_fitted__()

    def __sklearn_tags__(self) -> Any:
        """Several targets are allowed."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _fit(self, x: Floats, target: Floats, weight: Floats, *, first: bool) -> Self:
        super()._fit(x, target, weight, first=first)
        if isinstance(self._target, CountTarget):
            self.noise_inclusion_, self.noise_freedom_ = np.zeros(self.n_features_in_), math.inf
            self.n_noise_weights_ = 0
            self._noise_std = float(np.sqrt(np.average(self._shown(x).mean(0), weights=weight)))
            self._remarks.append("counts: Poisson, whose variance is its mean")
            return self
        self.noise_inclusion_ = self._by_feature(self._mean_inclusion(1), np.zeros(len(self._outside)))
        self.noise_freedom_ = float((2 + self._draws.extras[:, -1].exp()).mean())
        self.n_noise_weights_ = sum(len(f.state.model.nets[1]) - 1 for f in self._fitted)
        self._noise_std = noise_std(self._draws, self._numbers(x), torch.from_numpy(weight))
        names = self._names()
        moving = ", ".join(names[j] for j in (self.noise_inclusion_ > 0.5).nonzero()[0]) or "nothing"
        self._remarks.append(
            f"noise of standard deviation {self.noise_std_:.3g}, {self.noise_freedom_:.0f} degrees of freedom, "
            f"moved by {moving}"
        )
        if self.noise_freedom_ < _HEAVY:
            self._remarks.append("tails are very heavy: look at rows of low log_density; the mean may give them up")
        far = outlying(target, np.ones(len(target))).nonzero()[0]
        assert isinstance(self._target, NumberTarget)
        if not self._target.heavy or not len(far):
            return self
        centre, std = self._target.units
        places, scales = [], []
        for location, scale, _ in self._draws.with_scales(self._numbers(x[far])):
            places.append(location.mean(0))
            scales.append(scale.mean(0))
        away = np.abs((target[far] - centre) / std - torch.cat(places).numpy()) / torch.cat(scales).numpy()
        worst = far[away > _CORRUPT][np.argsort(-away[away > _CORRUPT])]
        if len(worst):
            rows = ", ".join(f"row {i} (target {target[i]:.6g})" for i in worst[:4])
            more = f" and {len(worst) - 4} more" if len(worst) > 4 else ""
            warnings.warn(
                f"targets that are more than {_CORRUPT:.0f} scales of the noise from what inputs say: {rows}{more}; "
                "heavy tails answer for them, but look whether they are right",
                OckhamWarning,
                stacklevel=4,
            )
        return self

    def _coverage(self, X: Any, y: Any) -> tuple[Floats, Floats]:  # noqa: N803
        nominal, inside = np.array([0.5, 0.8, 0.9, 0.95, 0.99]), []
        for share in nominal:
            lower, upper = self.predict_interval(X, float(share))
            inside.append(float(np.mean((lower <= np.asarray(y)) & (np.asarray(y) <= upper))))
        return nominal, np.array(inside)


class SparseBNNClassifier(ClassifierMixin, SparseBNN):  # type: ignore[misc]
    """Sparse Bayesian network for classes; everything else as `SparseBNNRegressor`.

    PARAMETERS
    Attributes:
        inclusion_: probability that a feature is used, shape [n_features_in_]; as there.
        feature_importances_: the same, under scikit-learn's name.
        n_weights_: weights of the networks that predict.
        n_leaves_: leaves of trees, and `residual_gain_` what they brought, as there.
        evidence_: ln of the evidence of the best network and its structure, nats; `evidence_curve_` its course.
        acceptance_: mean acceptance of the chains that drew the networks, as there.
        n_iter_: number of second-order steps taken.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **SparseBNN._parameter_constraints,
        "class_weight": [dict, StrOptions({"balanced"}), None],
        "label_noise": ["boolean"],
    }
    _classify = True

    def __init__(  # noqa: PLR0913 - scikit-learn: every setting is a keyword of the constructor
        self,
        hidden_layer_sizes: Any = (64,),
        *,
        n_restarts: int = 2,
        max_iter: int = 3000,
        batch_size: Any = "deprecated",
        learning_rate: Any = "deprecated",
        slab_variance: float = 1.0,
        max_inputs: int = 24,
        early_stopping: bool = True,
        n_iter_no_change: int = 2,
        n_draws: int = 64,
        n_effective: float | None = None,
        residual_trees: bool = True,
        class_weight: Any = None,
        label_noise: bool = False,
        warm_start: bool = False,
        verbose: bool = False,
        random_state: Any = None,
    ) -> None:
        super().__init__(
            hidden_layer_sizes,
            n_restarts=n_restarts,
            max_iter=max_iter,
            batch_size=batch_size,
            learning_rate=learning_rate,
            slab_variance=slab_variance,
            max_inputs=max_inputs,
            early_stopping=early_stopping,
            n_iter_no_change=n_iter_no_change,
            n_draws=n_draws,
            n_effective=n_effective,
            residual_trees=residual_trees,
            warm_start=warm_start,
            verbose=verbose,
            random_state=random_state,
        )
        self.class_weight = class_weight
        self.label_noise = label_noise

    def predict_proba(self, X: Any) -> npt.NDArray[np.float64]:  # noqa: N803
        """Posterior predictive probabilities [n, classes] of labels as they are recorded, averaged over networks."""
        inputs, model = self._inputs(X), self._draws.model
        assert isinstance(model.likelihood, Classes)
        parts = [model.likelihood.probabilities(out, self._draws.extras).mean(0) for out in self._draws.outputs(inputs)]
        return torch.cat(parts).numpy()

    def predict(self, X: Any) -> Any:  # noqa: N803
        """The likeliest class."""
        check_is_fitted(self)
        return self.classes_[self.predict_proba(X).argmax(1)]

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> SparseBNNClassifier:  # noqa: N803
        """Go on with more rows; the first call needs all ``classes`` that will ever come."""
        return self._partial_fit(X, y, sample_weight, classes)

    @property
    def classes_(self) -> npt.NDArray[Any]:
        """Labels, sorted."""
        assert isinstance(self._target, ClassTarget)
        return self._target.classes

    @property
    def label_noise_(self) -> float:
        """Share of the labels that are wrong, mean over draws; 0 unless ``label_noise`` asks for it."""
        check_is_fitted(self)
        if not self._draws.model.likelihood.extras:
            return 0.0
        hat = torch.sigmoid(self._draws.extras[:, -1]).mean()
        return float(hat) * (1 - 1 / len(self.classes_))

    def _coverage(self, X: Any, y: Any) -> tuple[Floats, Floats]:  # noqa: N803
        """Mean probability of the predicted class in bins of it, and how often it is right."""
        said, right = self.predict_proba(X).max(1), self.predict(X) == np.asarray(y)
        place = np.minimum((said * 10).astype(int), 9)
        bins = [place == k for k in range(10) if (place == k).any()]
        return np.array([said[b].mean() for b in bins]), np.array([right[b].mean() for b in bins])


_PARAMETERS = """Args:
        hidden_layer_sizes: most units of each hidden layer; the evidence decides how many come, and a straight path is
            always there.
        n_restarts: searches from different random units. On up to 1,500 rows the networks of all predict together,
            but those whose evidence is more than a tenth of a nat a row below the best; on more rows the best does.
        max_iter: second-order steps at most.
        batch_size: without effect since second-order steps take all rows; deprecated.
        learning_rate: without effect likewise; deprecated.
        slab_variance: prior variance of a weight that is there (learned from there).
        max_inputs: columns that may enter by evidence; wider tables are screened first.
        early_stopping: whether a search ends when more units bring no evidence.
        n_iter_no_change: attempts with more units, without success, that this takes.
        n_draws: networks that are drawn and that a prediction averages.
        n_effective: number of independent observations that the weights of all rows stand for; None: see `fit`.
        residual_trees: whether boosted trees may add what networks leave unexplained; they come only where the log
            density of held-out rows rises by more than 1/2 ln n nats, and so does every input that networks do not
            use but trees do. False: networks alone.
CLASS        warm_start: `fit` goes on from the last one instead of starting again.
        verbose: whether to show a progress bar.
        random_state: seed of random units, rows and draws.
"""
_NUMBER = """        loss: "student_t" for numbers with noise of any tails, "poisson" for counts 0, 1, 2, ...
"""
_CLASS = """        class_weight: factors of the classes, "balanced" for equal shares, or None; the sum of all weights
            stays, and probabilities are those of the reweighted table.
        label_noise: whether some labels may be wrong: a share of them, learned, is then drawn from a hat
            (`label_noise_` is the share that is wrong), and single impossible labels no longer bend the network.
"""
for _estimator in (SparseBNNRegressor, SparseBNNClassifier):
    _own = _CLASS if _estimator is SparseBNNClassifier else _NUMBER
    _estimator.__doc__ = (_estimator.__doc__ or "").replace("PARAMETERS\n", _PARAMETERS.replace("CLASS", _own))
