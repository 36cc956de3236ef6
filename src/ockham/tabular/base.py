"""What the two estimators share: settings, checks, screening, fitting, and what can be asked afterwards."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator
from sklearn.feature_selection import SelectorMixin
from sklearn.utils import check_X_y
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, check_random_state, validate_data
from torch import Tensor

from ockham.errors import OckhamError, OckhamWarning
from ockham.tabular.data import Encoding, Floats, Scaling, columns_of, counts_for, dense, duplicates, in_order, screen
from ockham.tabular.explaining import Effect, Facts, bars, effect, paint, progress, strongest_pair, table_of, write_page
from ockham.tabular.fitting import FitPlan, Fitted, drawn, fit, residual_trees
from ockham.tabular.model import Table
from ockham.tabular.predicting import Draws
from ockham.tabular.targets import target_for

__all__ = ["SparseBNN"]

_RESERVOIR = 10_000
_FEW = 20
_OF = ("of the network that predicts", "of the networks that predict")
_SAMPLE = 128  # rows that effects are averaged over
_ANEW = 2.0  # rows so far over those of the last fit from scratch, from where going on is worse than starting again


class SparseBNN(SelectorMixin, BaseEstimator):  # type: ignore[misc]
    """Base of `SparseBNNRegressor` and `SparseBNNClassifier`."""

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "hidden_layer_sizes": ["array-like", Interval(Integral, 1, None, closed="left")],
        "n_restarts": [Interval(Integral, 1, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left"), StrOptions({"deprecated"})],
        "learning_rate": [Interval(Real, 0, None, closed="neither"), StrOptions({"deprecated"})],
        "slab_variance": [Interval(Real, 0, None, closed="neither")],
        "max_inputs": [Interval(Integral, 1, None, closed="left")],
        "early_stopping": ["boolean"],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "n_effective": [Interval(Real, 0, None, closed="neither"), None],
        "n_draws": [Interval(Integral, 1, None, closed="left")],
        "residual_trees": ["boolean"],
        "warm_start": ["boolean"],
        "verbose": ["verbose"],
        "random_state": ["random_state"],
    }
    _classify: ClassVar[bool]
    _fitted: tuple[Fitted, ...]
    _draws: Draws
    _kept_rows: tuple[Floats, Floats, Floats]

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
        warm_start: bool = False,
        verbose: bool = False,
        random_state: Any = None,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.n_restarts = n_restarts
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.slab_variance = slab_variance
        self.max_inputs = max_inputs
        self.early_stopping = early_stopping
        self.n_iter_no_change = n_iter_no_change
        self.n_draws = n_draws
        self.n_effective = n_effective
        self.residual_trees = residual_trees
        self.warm_start = warm_start
        self.verbose = verbose
        self.random_state = random_state

    # ------------------------------------------------------------------ what the two supply
    @abstractmethod
    def _coverage(self, X: Any, y: Any) -> tuple[Floats, Floats]:  # noqa: N803
        """Nominal and observed shares of rows inside what the model says."""

    # ------------------------------------------------------------------ fitting
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:  # noqa: N803
        """Fit to a table as it comes.

        A data frame may hold numbers, truth values, times and categories, and entries may be missing. Categories get a
        column a level, or with more than ten levels columns of their levels' target means; `inclusion_` is one number
        per column of the table, the largest of its columns of numbers.

        Args:
            X: features [n, p]: array, data frame or sparse matrix.
            y: targets [n].
            sample_weight: weights of the rows, not negative. Whole numbers of mean ten at most are repetitions, as are
                weights whose mean is between one half and two; others are relative and count for Kish's number of rows
                in all, or for ``n_effective``.

        Raises:
            ValueError: infinity, wrong shapes, a single class, settings out of range.

        Warns:
            OckhamWarning: fewer than 20 rows; columns that duplicate each other; weights that are taken as relative;
                targets that look corrupt, with their rows.
        """
        first = not (self.warm_start and hasattr(self, "_fitted"))
        self.__dict__.pop("_kept_rows", None)  # of partial_fit; this is another table
        x, target, weight = self._checked(X, y, sample_weight, None, first=first)
        return self._fit(x, target, weight, first=first)

    def _partial_fit(self, X: Any, y: Any, sample_weight: Any, classes: Any) -> Self:  # noqa: N803
        first = not hasattr(self, "_fitted")
        x, target, weight = self._checked(X, y, sample_weight, classes, first=first)
        seen = weight.sum()
        if not first and hasattr(self, "_kept_rows"):
            old_x, old_target, old_weight = self._kept_rows
            x, target = np.concatenate([old_x, x]), np.concatenate([old_target, target])
            weight, seen = np.concatenate([old_weight, weight]), seen + old_weight.sum()
        if len(x) > _RESERVOIR:
            chance = np.random.default_rng(len(x)).random(len(x))
            rows = np.argsort(chance)[:_RESERVOIR]
            x, target, weight = x[rows], target[rows], weight[rows] * (seen / weight[rows].sum())
        self._kept_rows = (x, target, weight)
        first = first or seen >= _ANEW * self._fitted_on
        return self._fit(x, target, weight, first=first)

    def _checked(
        self,
        X: Any,  # noqa: N803
        y: Any,
        sample_weight: Any,
        classes: Any,
        *,
        first: bool,
    ) -> tuple[Floats, Floats, Floats]:
        self._validate_params()
        parts = self._parts(X, reset=first)
        x, y = check_X_y(
            np.zeros((len(parts[0]), 1)), y, dtype=np.float64, y_numeric=not self._classify, ensure_min_samples=2
        )
        weight = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
        if not weight.sum() > 0:
            raise OckhamError("sample_weight is zero for every row: nothing to fit")
        if first:
            loss, mistakes = getattr(self, "loss", None), getattr(self, "label_noise", False)
            self._target = target_for(y, classes, loss=loss, mistakes=mistakes)
        target = self._target.numbers(y)
        counted, effective = counts_for(weight, self.n_effective)
        if effective is not None and self.n_effective is None:
            warnings.warn(
                f"sample_weight sums to {weight.sum():.6g} over {int((weight > 0).sum())} rows: weights are taken as "
                f"relative and count for {effective:.6g} rows in all; say n_effective= for another number",
                OckhamWarning,
                stacklevel=4,
            )
        of_class = getattr(self, "class_weight", None)
        weight = counted if of_class is None else counted * compute_sample_weight(of_class, y)
        weight = weight * (counted.sum() / weight.sum())
        if first:
            self._encoding, x = Encoding.of(parts, self._names(), self._target.coded(target, weight), weight)
        else:
            x = self._encoding.apply(parts, self._names())
        for name in ("batch_size", "learning_rate"):
            if getattr(self, name) != "deprecated":
                warnings.warn(
                    f"{name} no longer does anything: second-order steps need none; leave it out",
                    FutureWarning,
                    stacklevel=4,
                )
        if len(x) < _FEW:
            warnings.warn(
                f"{len(x)} rows are few: inclusion probabilities will be close to what was believed before the data",
                OckhamWarning,
                stacklevel=4,
            )
        return x, target, weight

    def _parts(self, X: Any, *, reset: bool) -> list[Any]:  # noqa: N803
        """Columns of a table as it comes, checked."""
        parts = columns_of(X)
        if parts:
            validate_data(self, X, skip_check_array=True, reset=reset)
            infinite = [j for j, part in enumerate(parts) if part.dtype != object and np.isinf(part).any()]
            if infinite:
                raise OckhamError(f"Input X contains infinity in column {self._names()[infinite[0]]!r}")
            return parts
        plain = validate_data(
            self, dense(X), dtype=np.float64, ensure_all_finite="allow-nan", accept_sparse=False, reset=reset
        )
        return list(plain.T)

    def _fit(self, x: Floats, target: Floats, weight: Floats, *, first: bool) -> Self:
        if first:
            self._sample = x[np.random.default_rng(0).permutation(len(x))[:_SAMPLE]]
        x, target, weight = in_order(x, target, weight)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        if first:
            self._seed, self._fitted_on = seed, float(weight.sum())
            self._scaling = Scaling.of(x, weight)
        inputs, weights = self._scaling.apply(x), torch.from_numpy(weight.astype(np.float32))
        if first:
            self._target = self._target.fitted(target, weight)
        y = self._target.scaled(target)
        if first:
            self._choose_inputs(inputs, self._target.screened(y), weights)
        hidden = self.hidden_layer_sizes
        plan = FitPlan(
            hidden=tuple(int(h) for h in (hidden if np.iterable(hidden) else (hidden,))),
            outputs=self._target.outputs,
            restarts=self.n_restarts,
            steps=self.max_iter,
            slab_variance=self.slab_variance,
            left_out=len(self._scaling.constant) - len(self._active),
            patience=self.n_iter_no_change if self.early_stopping else self.max_iter,
            seed=seed,
        )
        table = Table(inputs[:, self._active].double(), y, weights.double())
        with progress(bool(self.verbose)) as on_step:
            before = () if first else self._fitted
            found = fit(table, self._target.likelihood(y), plan, start=before, on_step=on_step)
        # as many draws of each network as of any other: a mixture of equals
        each = -(-self.n_draws // len(found))
        drawings = [drawn(f.state, each, torch.Generator().manual_seed(seed + k)) for k, f in enumerate(found)]
        self._draws = replace(drawings[0], others=tuple(drawings[1:]))
        trees = residual_trees(self._draws, table, seed) if self.residual_trees else None
        self._draws = replace(self._draws, trees=trees)
        self.n_leaves_, self.residual_gain_ = (0, 0.0) if trees is None else (len(trees.trees), trees.gain)
        self._fitted = tuple(
            replace(f, state=replace(f.state, model=d.model)) for f, d in zip(found, drawings, strict=True)
        )
        inside = self._mean_inclusion(0)
        inside = inside if trees is None else np.maximum(inside, trees.inclusion.numpy())
        self.inclusion_ = self._by_feature(inside, self._outside)
        models = [d.model for d in drawings]
        self.n_weights_ = sum(len(net) for m in models for net in m.nets) - sum(len(m.nets[1:]) for m in models)
        moved = [d.acceptance for d in drawings if d.acceptance is not None]
        self.acceptance_ = sum(moved) / len(moved) if moved else None
        state = found[0].state
        self.evidence_curve_ = np.array(found[0].curve)
        self.evidence_, self.n_iter_ = state.evidence, max(f.state.steps for f in found)
        self._remarks: list[str] = []
        if trees is not None:
            self._remarks.append(
                f"trees of {len(trees.trees)} leaves for what networks leave: {trees.gain:.1f} nats on held-out rows"
            )
        return self

    def _mean_inclusion(self, net: int) -> Floats:
        """Inclusion of the inputs that entered in the location (0) or the noise (1), mean of the networks."""
        found: Floats = torch.stack([f.inclusion[net] for f in self._fitted]).mean(0).numpy()
        return found

    def _choose_inputs(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Columns that enter: no constants, no duplicates, not more than screening lets through."""
        self._same_as = duplicates(x)
        own = (self._same_as == np.arange(x.shape[1])) & ~self._scaling.constant
        same = [j for j in range(x.shape[1]) if self._same_as[j] != j and not self._scaling.constant[j]]
        if same:
            names = self._encoding.names
            pairs = ", ".join(f"{names[j]} = {names[self._same_as[j]]}" for j in same[:4])
            warnings.warn(
                f"{len(same)} columns say the same as others ({pairs}): one of each stays, they share its inclusion",
                OckhamWarning,
                stacklevel=5,
            )
        candidates = torch.from_numpy(own.nonzero()[0])
        if not len(candidates):
            raise OckhamError("no column of X varies among rows of positive weight: there is nothing to learn from")
        self._outside = np.zeros(x.shape[1])
        if len(candidates) > self.max_inputs:
            found = screen(x[:, candidates], y.to(x.dtype), weight, most=self.max_inputs)
            self._outside[candidates.numpy()] = torch.sigmoid(found.evidence).numpy()
            candidates = candidates[found.active]
        self._active = candidates

    def _by_feature(self, inside: Floats, outside: Floats) -> Floats:
        """One number per feature: of its numbers that entered and those that did not, the largest; constants 0."""
        found = outside.copy()
        found[self._active.numpy()] = inside
        found = np.where(self._scaling.constant, 0.0, found[self._same_as])
        result = np.zeros(self.n_features_in_)
        np.maximum.at(result, self._encoding.origin, found)
        return result

    # ------------------------------------------------------------------ afterwards
    @property
    def feature_importances_(self) -> Floats:
        """Inclusion probability of each feature: `inclusion_` under scikit-learn's name."""
        check_is_fitted(self)
        return self.inclusion_

    def summary(self, top: int = 10) -> str:
        """Features by inclusion, as a table; all that are used and the ``top`` likeliest of those that are not."""
        check_is_fitted(self)
        table = table_of(self._names(), self.inclusion_, self._weights_by_feature(), self._read(), top)
        return "\n".join([table, f"{self.n_weights_} weights, evidence {self.evidence_:.1f} nats", *self._remarks])

    def plot_inclusion(self, *, top: int = 20, ax: Any = None) -> Any:
        """Bars of the ``top`` likeliest features; returns the matplotlib axes."""
        check_is_fitted(self)
        return bars(self._names(), self.inclusion_, top, ax)

    def _get_support_mask(self) -> npt.NDArray[np.bool_]:
        """Features with inclusion above one half: what `transform`, `get_support` and `get_feature_names_out` give."""
        check_is_fitted(self)
        mask: npt.NDArray[np.bool_] = self.inclusion_ > 0.5
        return mask

    def effect(self, feature: Any) -> Effect:
        """Mean prediction while one feature takes each value and the others are as they come, with 90 % intervals.

        Args:
            feature: name or index.
        """
        check_is_fitted(self)
        names = self._names()
        j = names.index(feature) if feature in names else feature
        if not isinstance(j, Integral) or not 0 <= int(j) < len(names):
            raise OckhamError(f"effect: no feature {feature!r}; there are {', '.join(names[:8])}")
        return effect(self._shown, self._sample, self._encoding, int(j), names[int(j)])

    def plot_effects(self, *, top: int = 6, ax: Any = None) -> Any:
        """Effect curves of the ``top`` likeliest features that are used, side by side; returns the matplotlib axes."""
        from matplotlib import pyplot

        chosen = self._used()[:top]
        if ax is None:
            count = max(1, len(chosen))
            ax = pyplot.subplots(1, count, figsize=(3.2 * count, 2.8), sharey=True, layout="constrained")[1]
        for axes, j in zip(np.atleast_1d(ax), chosen, strict=False):
            paint(axes, self.effect(j), "#2f5fd0")
        return ax

    def report(self, path: Any, X: Any = None, y: Any = None) -> Path:  # noqa: N803
        """Write a page about the model: inputs and how sure, effects, noise, calibration, what was left out and why.

        Args:
            path: where to write the HTML file.
            X: rows that the model was not fitted to, for the calibration of its intervals.
            y: their targets.

        Returns:
            The path.

        Raises:
            OckhamError: the folder does not exist.
        """
        check_is_fitted(self)
        used, names = self._used(), self._names()
        why, active = [], set(self._active.tolist())
        for mine in ((self._encoding.origin == j).nonzero()[0] for j in range(len(names))):
            if self._scaling.constant[mine].all():
                why.append("it is constant")
            elif all(self._same_as[i] != i for i in mine):
                why.append(f"it says the same as {self._encoding.names[self._same_as[mine[0]]]}")
            elif active.isdisjoint(mine.tolist()):
                why.append("screening found no evidence for a term of it")
            else:
                why.append("without it the evidence is higher")
        moving = (getattr(self, "noise_inclusion_", np.zeros(0)) > 0.5).nonzero()[0].tolist()

        def noise(rows: Floats) -> Floats:
            parts = [s * (f / (f - 2)).sqrt() for _, s, f in self._draws.with_scales(self._numbers(rows))]
            return torch.cat(parts, 1).numpy() * self._target.units[1]

        facts = Facts(
            title=f"{type(self).__name__}: what it found",
            names=names,
            inclusion=self.inclusion_,
            weights=self._weights_by_feature(),
            read=self._read(),
            why=why,
            tiles=[
                ("inputs used", str(len(used)), f"of {len(names)}"),
                ("weights", str(self.n_weights_), _OF[len(self._fitted) > 1]),
                *([("leaves", str(self.n_leaves_), "of trees for what networks leave")] if self.n_leaves_ else []),
                ("evidence", f"{self.evidence_:.1f}", "nats"),
            ],
            effects=[self.effect(j) for j in used],
            pair=strongest_pair(self._shown, self._sample, self._encoding, used, names),
            noise=[effect(noise, self._sample, self._encoding, j, names[j]) for j in moving],
            target=self._target.shown_as,
            coverage=None if X is None else self._coverage(X, y),
            remarks=self._remarks,
        )
        return write_page(facts, path)

    def _used(self) -> list[int]:
        """Features that are used, the likeliest first."""
        check_is_fitted(self)
        read = self._read()
        return [int(j) for j in np.argsort(-self.inclusion_, kind="stable") if read[j]]

    def _read(self) -> npt.NDArray[np.bool_]:
        """Whether networks or trees read a feature."""
        found: npt.NDArray[np.bool_] = self._weights_by_feature() > 0
        if self._draws.trees is not None:
            found[self._encoding.origin[self._active.numpy()[self._draws.trees.columns.numpy()]]] = True
        return found

    def _weights_by_feature(self) -> Floats:
        weights = np.zeros(len(self.inclusion_))
        for f in self._fitted:
            np.add.at(weights, self._encoding.origin[self._active.numpy()], f.state.model.nets[0].used().numpy())
        return weights

    def _shown(self, rows: Floats) -> Floats:
        """What each draw says of rows of numbers [n, q], [D, n], in what effects are shown in."""
        centre, std = self._target.units
        said: Floats = torch.cat(list(self._draws.means(self._numbers(rows))), 1).numpy() * std + centre
        return said

    def _numbers(self, rows: Floats) -> Tensor:
        """Rows of numbers [n, q] as the networks read them."""
        return self._scaling.apply(rows, self._active.numpy()).double()

    def _names(self) -> list[str]:
        given = getattr(self, "feature_names_in_", None)
        return [str(n) for n in given] if given is not None else [f"x{j}" for j in range(self.n_features_in_)]

    def _inputs(self, X: Any) -> Tensor:  # noqa: N803
        check_is_fitted(self)
        return self._numbers(self._encoding.apply(self._parts(X, reset=False), self._names(), self._active.numpy()))

    def __sklearn_tags__(self) -> Any:
        """Missing entries, categories and sparse matrices are taken as they come."""
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.sparse = True
        tags.input_tags.categorical = True
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_fitted")
