"""What a network is to learn from a loader: how batches and outputs are read, and the likelihood that joins them.

Every verb that reads a loader does it through an `Objective`, so that all take the same batches and check the first
one alike.
"""

from __future__ import annotations

import copy
import numbers
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ockham.core.batch import (
    PYTHON_ERRORS,
    Batch,
    ReadBatch,
    ReadOutput,
    batches_of,
    call,
    described,
    read_batch,
)
from ockham.core.likelihood import (
    Likelihood,
    Loss,
    Regression,
    TermLikelihood,
    likelihood_from,
)
from ockham.core.network import check_network, device_of, evaluating, keeping_modes, seeded, train_
from ockham.core.posterior import Posterior
from ockham.core.processes import ALONE, Processes
from ockham.core.scaling import (
    Head,
    TargetStatistics,
    aligned,
    check_target,
    find_head,
    rescale_,
    rescaled,
    spread_weight,
)
from ockham.errors import DataError, NonFiniteLossError, OckhamError, OckhamWarning

__all__ = ["Objective", "blame", "fit_noise", "objective_of"]

_LOOKED_AT = 256
"""Examples on which it is found out whether a network already predicts its targets in their own unit."""

_PREDICTS = 0.2
"""Share of the targets' variance that such a network explains at least."""


@dataclass(slots=True, eq=False)
class Objective:
    """A likelihood and the two functions by which a user may say how batches and outputs are read.

    Attributes:
        likelihood: likelihood on the network's device; its own parameters (a noise) are trained with the network.
        batch: function from what the loader yields to a `Batch`, or None.
        output: function from what the network returns to what the likelihood compares, or None.
        head: last layer of a regression network that learns standardised targets, once `prepare` has found it.
    """

    likelihood: Likelihood
    batch: ReadBatch | None = None
    output: ReadOutput | None = None
    head: Head | None = field(default=None, repr=False)

    def batches(self, loader: Iterable[Any], device: torch.device) -> Iterator[Batch]:
        """Every batch of a pass, read and on a device."""
        return batches_of(loader, device, self.batch)

    def answer(self, model: Callable[..., Any], batch: Batch) -> Any:
        """What the network says to a batch, as the likelihood compares it.

        Raises:
            DataError: the network cannot take the inputs, or answers with something that needs ``output=``.
        """
        return self.likelihood.output_of(call(model, batch, self.output))

    def nll(self, output: Any, batch: Batch) -> Tensor:
        """Mean negative log-likelihood of a batch per term, nats.

        Raises:
            DataError: output and targets do not fit.
        """
        given = (output, batch.target) if batch.weight is None else (output, batch.target, batch.weight)
        try:
            return self.likelihood.nll(*given)
        except (OckhamError, torch.OutOfMemoryError):
            raise
        except PYTHON_ERRORS as error:
            self.likelihood.check(output, batch.target)
            raise DataError(
                f"the likelihood cannot compare outputs of {described(output)} with targets of "
                f"{described(batch.target)}: {type(error).__name__}: {error}"
            ) from error

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """`nll` of a batch under a network, and the output it was made from."""
        output = self.answer(model, batch)
        return self.nll(output, batch), output

    def right(self, output: Any, batch: Batch) -> Tensor:
        """Share of right classes, a scalar; nan where there are no classes."""
        return self.likelihood.right(output, batch.target)

    def terms(self, batch: Batch) -> float:
        """Log-likelihood terms of a batch, weights added up."""
        if batch.weight is None:
            return float(self.likelihood.terms(batch.target))
        return float(self.likelihood.terms(batch.target, batch.weight))

    # ------------------------------------------------------------------ before any work
    def check(self, model: nn.Module, batch: Batch, *, training: bool = True) -> Any:
        """Whether a first batch can work at all; the network is left as it was.

        Args:
            model: network called once without gradients, in training mode where it is to be trained.
            batch: batch on the model's device.
            training: or read in evaluation mode, for verbs that do not train.

        Returns:
            The output.

        Raises:
            DataError: inputs, outputs, targets or weights do not fit, or are not finite; says what came, what was
                expected and which argument mends it.
        """
        with keeping_modes(model), _keeping_buffers(model), torch.no_grad(), seeded(0, 0, device_of(model)):
            train_(model) if training else model.eval()
            if batch.target is None:
                raise DataError("the targets of a batch are None: batch= must give ockham.Batch(..., target=...)")
            if isinstance(self.likelihood, TermLikelihood):
                check_target(batch.target, self.likelihood.kind)
            output = self.answer(model, batch)
            self.likelihood.check(output, batch.target)
            self._check_first_axis(model, batch, output)
            _check_weight(batch.weight)
            loss = self.nll(output, batch)
            if not bool(torch.isfinite(loss)):
                nothing = "; it has no targets that count" if not self.terms(batch) else ""
                said = f"the loss of the first batch is {float(loss)}{nothing}"
                raise NonFiniteLossError(blame(batch, output) or said)
            if isinstance(self.likelihood, Loss):
                if not self.likelihood.learns(output, batch.target, batch.weight):
                    raise DataError(DETACHED)
                if self.likelihood.looks_summed(output, batch.target, batch.weight):
                    warnings.warn(_SUMMED, OckhamWarning, stacklevel=4)
        return output

    def _check_first_axis(self, model: nn.Module, batch: Batch, output: Any) -> None:
        """Refuse outputs whose first axis has the length of the batch by accident, such as [T, N] with T = N."""
        if not isinstance(output, Tensor) or output.ndim < 2 or len(output) not in output.shape[1:] or batch.size < 3:
            return
        try:
            fewer = self.answer(model, batch.part(slice(0, batch.size - 1)))
        except DataError:  # a network that takes batches of one size
            return
        if len(fewer) != batch.size - 1:
            raise DataError(
                f"the first axis of the outputs must count the examples; with {batch.size - 1} examples instead of "
                f"{batch.size} they have the shape {tuple(fewer.shape)}. Put the batch first: transpose them by output="
            )

    def checked(self, loader: Iterable[Any], model: nn.Module) -> Iterator[Batch]:
        """Batches on the model's device under a seed, for verbs that read once; the first is checked.

        Raises:
            DataError: see `check`.
        """
        device = device_of(model)
        with seeded(0, 0, device):
            for i, batch in enumerate(self.batches(loader, device)):
                if i == 0:
                    self.check(model, batch, training=False)
                elif wrong := blame(Batch(target=batch.target)):
                    raise DataError(f"batch {i} (counted from 0): {wrong}")
                yield batch

    def prepare(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        n_data: float | None = None,
        processes: Processes = ALONE,
    ) -> float:
        """Check the first batch, then count the data and learn the targets' units, in one pass.

        A regression network that ends in a Linear or convolution layer will learn standardised targets; one that
        already predicts them in their own unit is put into standardised units, in place. `finished` undoes it.

        Args:
            model: network to be trained.
            loader: loader of the training data.
            n_data: number of log-likelihood terms where the user knows it; it is not counted then.
            processes: those that train the network together, whose data are counted together.

        Returns:
            n_data.

        Raises:
            DataError: the first batch cannot work (see `check`), targets are not finite, the loader is empty, or
                ``n_data`` impossible.
        """
        given: object = n_data
        if given is not None and not isinstance(given, numbers.Real):
            raise DataError(f"n_data is the number of log-likelihood terms of all data; got {described(n_data)}")
        device, counter, whole = device_of(model), _Counter(self), True
        with processes.together(), seeded(0, 0, device):
            for i, raw in enumerate(loader):
                batch = read_batch(raw, self.batch)
                if i and (batch.size == 1 or blame(Batch(batch.args, batch.kwargs))):  # BatchNorm; missing inputs
                    try:
                        self.check(model, batch.to(device))
                    except OckhamError as error:
                        raise type(error)(f"batch {i} (counted from 0): {error}") from error
                if i == 0:
                    self.check(model, batch.to(device))
                    whole = n_data is None or batch.weight is not None or counter.statistics is not None
                counter.add(i, batch)
                if counter.wants_outputs():
                    counter.look(model, batch.to(device))
                if i == 0 and n_data is not None and not counter.terms <= n_data:
                    wrong = f"is smaller than one batch ({counter.terms:g} terms)" if n_data > 0 else "must be positive"
                    raise DataError(
                        f"n_data = {n_data:g} {wrong}; it is the number of log-likelihood terms of the whole training "
                        "set"
                    )
                if not whole:
                    break
        if processes.count > 1:
            counter.join(processes)
        counter.finish(model, processes)
        return counter.terms if n_data is None else float(n_data)

    def finished(self, model: nn.Module, posterior: Posterior) -> tuple[nn.Module, Posterior]:
        """A trained network, changed in place, and its posterior: in the targets' own unit, with likelihood and noise.

        Args:
            model: a copy that is handed out.
            posterior: posterior of its weights.
        """
        posterior = replace(posterior, likelihood=self.likelihood.kind)
        if not isinstance(self.likelihood, Regression):
            return model, posterior
        if self.head is not None:
            scale, location = self.likelihood.scale.reshape(-1).double(), self.likelihood.location.reshape(-1).double()
            rescale_(model, self.head, scale, location)
            posterior = rescaled(posterior, self.head, scale, location)
        return model, replace(posterior, noise_variance=self.likelihood.noise_variance)


DETACHED = (
    "the loss does not depend on the network's output, so that nothing can be learned from it: leave .detach(), "
    ".item() and torch.no_grad() out of the function of ockham.Loss"
)
_SUMMED = (
    "the loss is declared a mean, but doubles when the batch is doubled: it is a sum. Declare "
    "ockham.Loss(..., reduction='sum'), else the data count many times over"
)


def objective_of(
    model: nn.Module,
    likelihood: str | Likelihood = "classification",
    *,
    batch: ReadBatch | None = None,
    output: ReadOutput | None = None,
) -> Objective:
    """An objective with a likelihood of its own (a copy, on the model's device), from the façade's arguments.

    Raises:
        OckhamError: an unknown likelihood, a network that cannot be worked with (see
            `ockham.core.network.check_network`), or something else than functions.
    """
    check_network(model)
    for name, function in (("batch", batch), ("output", output)):
        if function is not None and not callable(function):
            raise OckhamError(f"{name}= must be a function; got {described(function)}")
    found = likelihood_from(likelihood)
    own = found if isinstance(found, Loss) else copy.deepcopy(found)
    return Objective(own.to(device_of(model)), batch, output)


def blame(batch: Batch, output: Any = None) -> str:
    """Which number of a batch (or, if all are finite, of the output) is not finite; empty where there is none."""
    places = [(f"input {i}", v) for i, v in enumerate(batch.args)] + [
        (f"input {k!r}", v) for k, v in batch.kwargs.items()
    ]
    for what, value in [*places, ("the target", batch.target), ("the network's output", output)]:
        for leaf in pytree.tree_leaves(value):
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                continue
            bad = leaf.isnan() if what == "the network's output" else ~leaf.isfinite()
            if bool(bad.any()):
                at = int(bad.reshape(len(leaf), -1).any(1).nonzero()[0]) if leaf.ndim else 0
                number = float(leaf[at][bad[at]].reshape(-1)[0]) if leaf.ndim else float(leaf)
                return f"{what} is not finite: {number} in example {at} of the batch (counted from 0)"
    return ""


class _Counter:
    """One pass over the targets: terms, weights, statistics of a regression, and how well the network predicts them."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.likelihood = objective, objective.likelihood
        self.terms = self.plain = 0.0
        self.weighted = False
        self.statistics = TargetStatistics(self.likelihood.axis) if isinstance(self.likelihood, Regression) else None
        self._seen = 0
        self._first: Batch | None = None
        self._residuals: list[tuple[Tensor, Tensor]] = []

    def add(self, index: int, batch: Batch) -> None:
        for leaf in pytree.tree_leaves(batch.target):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(leaf.isfinite().all()):
                raise DataError(f"batch {index} (counted from 0): {blame(Batch((), {}, batch.target))}")
        _check_weight(batch.weight)
        terms = self.objective.terms(batch)
        self.terms += terms
        class_weights = getattr(self.likelihood, "class_weights", None)
        self.weighted = self.weighted or batch.weight is not None or class_weights is not None
        if isinstance(self.likelihood, TermLikelihood):
            self.plain += float(self.likelihood.counted(batch.target).sum())
        else:
            self.plain += float(self.likelihood.terms(batch.target))
        if self.statistics is not None:
            ones = torch.ones(len(batch.target))
            weight = ones if batch.weight is None else batch.weight
            self.statistics.add(batch.target, spread_weight(weight, batch.target))

    def wants_outputs(self) -> bool:
        return self.statistics is not None and self._seen < _LOOKED_AT

    def look(self, model: nn.Module, batch: Batch) -> None:
        """Note what the network predicts for some examples, before anything is trained."""
        assert self.statistics is not None
        self._first = self._first or batch
        self._seen += batch.size
        with evaluating(model), torch.no_grad(), seeded(0, 0, device_of(model)):
            output = aligned(self.objective.answer(model, batch), batch.target, "regression")
        columns = self.statistics.columns
        self._residuals.append((columns(batch.target), columns(batch.target.double().cpu() - output.double().cpu())))

    def join(self, processes: Processes) -> None:
        """Count what all processes have."""
        own = torch.tensor([self.terms, self.plain, float(self.weighted)], dtype=torch.float64)
        self.terms, self.plain, weighted = processes.gathered(own).sum(0).tolist()
        self.weighted = weighted > 0
        if self.statistics is not None:
            self.statistics.joined(processes)

    def finish(self, model: nn.Module, processes: Processes) -> None:
        if self.plain == 0 or self.terms == 0:
            empty = "the training loader is empty: it yields no targets"
            raise DataError(_NO_WEIGHT if self.plain else empty)
        if self.weighted:
            self.likelihood.mean_weight = self.terms / self.plain
            if not 0.5 <= self.likelihood.mean_weight <= 2:
                warnings.warn(
                    f"the weights of the data add up to {self.terms:g} for {self.plain:g} terms: the sum counts as the "
                    "number of data, and decides how much evidence there is. Scale the weights to one per term on "
                    "average if they only say what matters more",
                    OckhamWarning,
                    stacklevel=4,
                )
        if isinstance(self.likelihood, Regression):
            targets, residuals = (torch.cat(parts) for parts in zip(*self._residuals, strict=True))
            mean_square, variance = residuals.square().mean(0), (targets - targets.mean(0)).square().mean(0)
            share = 1 - (mean_square / variance.clamp_min(torch.finfo(torch.float64).tiny)).mean()
            smallest = 1e-3 * variance.sqrt() + torch.finfo(torch.float32).tiny
            residual = torch.maximum(mean_square.sqrt(), smallest)
            # of the first examples of process 0, so that all processes go the same way
            known = processes.told(torch.cat([(share > _PREDICTS).double().reshape(1), residual]))
            self._set_units(model, self.likelihood, bool(known[0]), known[1:])

    def _set_units(self, model: nn.Module, likelihood: Regression, explains: bool, residual: Tensor) -> None:
        """Standardised targets where the network's last layer can be rescaled, else the network's own unit.

        ``explains`` says whether the network predicts the targets as it is, with root mean squares ``residual``.
        """
        assert self.statistics is not None and self._first is not None
        statistics, first = self.statistics, self._first
        spread = statistics.each()[1]
        with evaluating(model), seeded(0, 0, device_of(model)):
            head = find_head(
                model,
                lambda: self.objective.answer(model, first),
                outputs=likelihood.outputs_of(first.target),
                axis=likelihood.axis,
            )
        if head is None:
            mean, spread = statistics.each()
            far = (spread > 30) | (spread < 1 / 30) | (mean.abs() > 30 * spread)
            if not explains and bool(far.any()):
                at = int(far.nonzero()[0])
                warnings.warn(
                    f"the targets (mean {float(mean[at]):g}, spread {float(spread[at]):g}) are far from the unit scale,"
                    " and this network's outputs cannot be rescaled, since no Linear or convolution layer is last: "
                    "standardise the targets, or end the network in such a layer",
                    OckhamWarning,
                    stacklevel=4,
                )
            noise = residual if explains else statistics.root_mean_square()
            likelihood.set_units(torch.zeros(1), torch.ones(1), statistics.shaped(noise))
            return
        location, scale = statistics.each() if head.rows else statistics.pooled()
        if head.bias is None:
            location, scale = torch.zeros_like(scale), statistics.root_mean_square()
            scale = scale if head.rows else scale.square().mean().sqrt()[None]
        noise = (residual if explains else spread) / scale
        if explains:
            rescale_(model, head, 1 / scale, -location / scale)
        self.objective.head = head
        likelihood.set_units(statistics.shaped(location), statistics.shaped(scale), statistics.shaped(noise))


_NO_WEIGHT = "all sample weights are zero: there are no data to learn from"


def _check_weight(weight: Tensor | None) -> None:
    if weight is not None and not bool(((weight >= 0) & weight.isfinite()).all()):
        raise DataError(
            f"sample weights must be finite and not negative; got {float(weight.min()):g}..{float(weight.max()):g}. "
            "If the third entry of a batch is no weight, pass batch="
        )


@contextmanager
def _keeping_buffers(model: nn.Module) -> Iterator[None]:
    saved = {name: b.detach().clone() for name, b in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, b in model.named_buffers():
                if name in saved and saved[name].shape == b.shape:
                    b.copy_(saved[name])


@torch.no_grad()
def fit_noise(model: nn.Module, loader: Iterable[Any], objective: Objective, *, sharded: bool = False) -> None:
    """Set the noise of a regression likelihood to the mean squared residual of every output, in one pass.

    Args:
        model: read in evaluation mode.
        loader: batches of the data.
        objective: its likelihood gets the noise.
        sharded: whether every process reads its own part of the data; the squares are added up then.

    Raises:
        DataError: the loader is empty.
        OckhamError: a residual is zero.
    """
    likelihood = objective.likelihood
    assert isinstance(likelihood, Regression)
    statistics, processes = TargetStatistics(likelihood.axis), Processes.world() if sharded else ALONE
    with evaluating(model), processes.together():
        for one in objective.checked(loader, model):
            found = aligned(objective.answer(model, one), one.target, "regression").double()
            weights = likelihood.term_weights(one.target, one.weight)
            residual = likelihood.standard(one.target) - found.to(likelihood.location.dtype)
            statistics.add(residual * likelihood.scale, torch.ones_like(residual[:1]) if weights is None else weights)
        if not statistics.filled:
            raise DataError("the loader is empty: it yields no targets")
    sums = processes.gathered(torch.stack([statistics.weight * statistics.mean_square(), statistics.weight])).sum(0)
    likelihood.set_noise(statistics.shaped(sums[0] / sums[1]))
