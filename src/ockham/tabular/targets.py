"""What a target is: numbers or classes, how a network is fitted to it, and what inputs are screened against."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor

from ockham.errors import OckhamError
from ockham.tabular.data import Floats, Scaling, outlying
from ockham.tabular.likelihoods import Classes, Counts, GaussianNoise, NoisyClasses, RowLikelihood, Student, resolution

__all__ = ["ClassTarget", "CountTarget", "NumberTarget", "Target", "target_for"]

_CLIP = 5.0  # standard deviations of targets that inputs are screened against, where there are outliers


class Target(ABC):
    """A kind of target.

    Attributes:
        outputs: numbers that the network of the location, or of the classes, gives.
        shown_as: what effects are shown in.
        units: mean and standard deviation that predictions are in.
    """

    outputs: int
    shown_as: str
    units: tuple[float, float] = (0.0, 1.0)

    @abstractmethod
    def numbers(self, y: Any) -> Floats:
        """Targets as numbers [n]: themselves, or the index of the class."""

    @abstractmethod
    def fitted(self, numbers: Floats, weight: Floats) -> Target:
        """The same with scales of these rows."""

    @abstractmethod
    def coded(self, numbers: Floats, weight: Floats) -> Floats:
        """Centred columns [n, k] whose means order the levels of a category."""

    @abstractmethod
    def scaled(self, numbers: Floats) -> Tensor:
        """What the network is fitted to, [n]."""

    @abstractmethod
    def screened(self, scaled: Tensor) -> Tensor:
        """Columns [n, k] that inputs are screened against."""

    @abstractmethod
    def likelihood(self, scaled: Tensor) -> RowLikelihood:
        """Likelihood of what the network is fitted to."""


@dataclass(frozen=True, eq=False)
class NumberTarget(Target):
    """A number.

    Attributes:
        scaling: mean and standard deviation, without targets that are far out; None before they are known.
        heavy: whether there are such targets; the search then begins with heavy tails.
    """

    scaling: Scaling | None = None
    heavy: bool = False
    outputs = 1
    shown_as = "mean of the target"

    def numbers(self, y: Any) -> Floats:
        """Targets as they are."""
        return np.asarray(y, dtype=np.float64)

    def fitted(self, numbers: Floats, weight: Floats) -> NumberTarget:
        """The same with mean and standard deviation of these rows."""
        far = outlying(numbers, weight)
        return replace(self, scaling=Scaling.of(numbers[~far, None], weight[~far]), heavy=bool(far.any()))

    def coded(self, numbers: Floats, weight: Floats) -> Floats:
        """Targets less their mean, [n, 1]."""
        centred: Floats = numbers - weight @ numbers / weight.sum()
        return centred[:, None]

    def scaled(self, numbers: Floats) -> Tensor:
        """Standardised targets."""
        assert self.scaling is not None
        return self.scaling.apply(numbers[:, None])[:, 0].double()

    def screened(self, scaled: Tensor) -> Tensor:
        """Targets, outliers pulled in."""
        return (scaled.clamp(-_CLIP, _CLIP) if self.heavy else scaled).unsqueeze(1)

    def likelihood(self, scaled: Tensor) -> RowLikelihood:
        """Gaussian, or Student's t from the start where some are far out."""
        return Student(resolution(scaled)) if self.heavy else GaussianNoise(resolution(scaled))

    @property
    def units(self) -> tuple[float, float]:  # type: ignore[override]
        """Mean and standard deviation that standardised targets are in."""
        assert self.scaling is not None
        return float(self.scaling.mean[0]), float(self.scaling.std[0])


@dataclass(frozen=True, eq=False)
class CountTarget(Target):
    """A count: 0, 1, 2, ...

    Attributes:
        base: ln of the mean count.
    """

    base: float = 0.0
    outputs = 1
    shown_as = "expected count"

    def numbers(self, y: Any) -> Floats:
        """Counts as they are.

        Raises:
            OckhamError: a target is negative or no whole number.
        """
        numbers = np.asarray(y, dtype=np.float64)
        strange = (numbers < 0) | (numbers != np.round(numbers))
        if strange.any():
            raise OckhamError(
                f"loss='poisson' is for counts, 0, 1, 2, ...; got {numbers[strange][0]:.6g} (row "
                f"{int(strange.argmax())}); leave loss= out for other numbers"
            )
        return numbers

    def fitted(self, numbers: Floats, weight: Floats) -> CountTarget:
        """The same with the mean of these rows."""
        return replace(self, base=float(np.log((weight @ numbers + 0.5) / weight.sum())))

    def coded(self, numbers: Floats, weight: Floats) -> Floats:
        """Counts less their mean, [n, 1]."""
        centred: Floats = numbers - weight @ numbers / weight.sum()
        return centred[:, None]

    def scaled(self, numbers: Floats) -> Tensor:
        """Counts as they are."""
        return torch.from_numpy(numbers)

    def screened(self, scaled: Tensor) -> Tensor:
        """Square roots: their variance does not grow with the count."""
        return scaled.sqrt().unsqueeze(1)

    def likelihood(self, scaled: Tensor) -> RowLikelihood:
        """Poisson."""
        return Counts(self.base)


@dataclass(frozen=True, eq=False)
class ClassTarget(Target):
    """A class.

    Attributes:
        classes: labels, sorted.
        mistakes: whether some labels may be wrong.
    """

    classes: npt.NDArray[Any]
    mistakes: bool = False

    @property
    def outputs(self) -> int:  # type: ignore[override]
        """One for two classes, else one for each."""
        return 1 if len(self.classes) == 2 else len(self.classes)

    @property
    def shown_as(self) -> str:  # type: ignore[override]
        """The probability of the last class."""
        return f"probability of {self.classes[-1]}"

    def numbers(self, y: Any) -> Floats:
        """Index of each label.

        Raises:
            OckhamError: a label is not among the classes.
        """
        index = np.searchsorted(self.classes, y).clip(0, len(self.classes) - 1)
        strange = self.classes[index] != y
        if strange.any():
            raise OckhamError(f"label {np.asarray(y)[strange][0]!r} is not among the classes {list(self.classes)}")
        result: Floats = index.astype(np.float64)
        return result

    def fitted(self, numbers: Floats, weight: Floats) -> ClassTarget:
        """Itself: classes have no scale."""
        return self

    def coded(self, numbers: Floats, weight: Floats) -> Floats:
        """Indicators of all classes but the first, less their means."""
        member = (numbers[:, None] == np.arange(1, len(self.classes))).astype(np.float64)
        centred: Floats = member - weight @ member / weight.sum()
        return centred

    def scaled(self, numbers: Floats) -> Tensor:
        """Indices of the classes."""
        return torch.from_numpy(numbers).long()

    def screened(self, scaled: Tensor) -> Tensor:
        """Indicators of the classes, one for two."""
        onehot = torch.nn.functional.one_hot(scaled, len(self.classes)).float()
        return onehot[:, 1:] if len(self.classes) == 2 else onehot

    def likelihood(self, scaled: Tensor) -> RowLikelihood:
        """Softmax, or the logistic function."""
        return NoisyClasses() if self.mistakes else Classes()


def target_for(y: Any, classes: Any, *, loss: str | None, mistakes: bool) -> Target:
    """Kind of the targets of an estimator.

    Args:
        y: targets [n].
        classes: labels that may come; None: those of y.
        loss: "student_t" or "poisson" of a regression, None of a classification.
        mistakes: whether some labels may be wrong.

    Raises:
        OckhamError: a single class.
    """
    if loss is not None:
        return CountTarget() if loss == "poisson" else NumberTarget()
    check_classification_targets(y)
    labels = np.unique(y if classes is None else classes)
    if len(labels) < 2:
        raise OckhamError(
            f"a classifier needs samples of at least 2 classes in the data, but the data contains only one class: "
            f"{labels[0]!r}"
        )
    return ClassTarget(labels, mistakes)
