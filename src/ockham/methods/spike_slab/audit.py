"""How far inclusion probabilities can be trusted: the last layer, enumerated exactly on the network's own features.

With the layers before it frozen, the last layer of a network is a linear model, and for at most 16 of its weights per
output all subsets can be visited. What a posterior claims about these weights is compared with that, and with the form
that knows correlations; the report says what to do where they differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ockham.core.batch import ReadOutput, call, inputs_of, tensor_of
from ockham.core.likelihood import likelihood_from
from ockham.core.network import evaluating
from ockham.core.posterior import Gaussian, Posterior
from ockham.core.scaling import aligned, check_target
from ockham.errors import DataError, OckhamError
from ockham.evidence.exact import exact_inclusion as enumerate_subsets
from ockham.methods.spike_slab.correlated import correlation, inclusion_correlated, inclusion_paired
from ockham.methods.spike_slab.priors import inclusion

__all__ = [
    "Audit",
    "AuditedWeight",
    "audit",
]

_MOST = 16
_HIGH = 0.8
_TRUSTED = 0.12
_STARTS = 16


@dataclass(frozen=True, slots=True)
class AuditedWeight:
    """One weight of the last layer.

    Attributes:
        output: row of the weight.
        unit: column of the weight.
        claimed: inclusion by the posterior.
        exact: probability by enumeration.
        correlated: probability by expectation propagation over all living units, which knows correlations.
    """

    output: int
    unit: int
    claimed: float
    exact: float
    correlated: float


@dataclass(frozen=True, slots=True)
class Audit:
    """Claims against enumeration.

    Attributes:
        parameter: name of the audited weight matrix.
        weights: enumerated weights, most doubtful first.
        correlation: largest absolute correlation between features of living units, as the likelihood sees them.
        fixed_points: number of fixed points of the paired posterior from 16 starts, most over the outputs; more than
            one means that a claim can depend on where training began.
        warnings: sentences for people; empty where the claims can be trusted.
    """

    parameter: str
    weights: tuple[AuditedWeight, ...]
    correlation: float
    fixed_points: int
    warnings: tuple[str, ...]

    @property
    def max_error(self) -> float:
        """Largest difference between claim and enumeration."""
        return max((abs(w.claimed - w.exact) for w in self.weights), default=0.0)

    @property
    def correlated_error(self) -> float:
        """The same for the form that knows correlations."""
        return max((abs(w.correlated - w.exact) for w in self.weights), default=0.0)

    @property
    def flips(self) -> int:
        """Weights that the median model would keep by one and drop by the other."""
        return sum((w.claimed > 0.5) != (w.exact > 0.5) for w in self.weights)

    def __str__(self) -> str:
        """A table and a verdict."""
        lines = [f"audit of {self.parameter}: {len(self.weights)} weights enumerated", ""]
        lines.append("output  unit  claimed  exact  correlated")
        lines += [
            f"{w.output:>6}  {w.unit:>4}  {w.claimed:>7.3f}  {w.exact:>5.3f}  {w.correlated:>10.3f}"
            for w in self.weights[:20]
        ]
        lines.append("")
        lines.append(
            f"largest error {self.max_error:.3f} ({self.flips} decisions differ); with correlations "
            f"{self.correlated_error:.3f}; features correlate up to {self.correlation:.2f}"
        )
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])


def audit(
    model: nn.Module,
    posterior: Posterior,
    x: Any,
    y: Tensor,
    *,
    noise_variance: float | Tensor | None = None,
    log_odds: float = 0.0,
    output: ReadOutput | None = None,
) -> Audit:
    """Compare the claimed inclusion of last-layer weights with enumeration.

    For a regression (``noise_variance`` given) the comparison is exact; for classes, binary labels and counts (as the
    posterior's likelihood says) the likelihood of each output is replaced by its quadratic at the network's prediction,
    the other outputs held.

    Args:
        model: network that ends in a Linear layer; its parameters hold the posterior mean. Used in evaluation
            mode, left as it was.
        posterior: distribution of its parameters, with inclusion of its own or without (then `ockham.inclusion` at
            ``log_odds``).
        x: inputs of all training examples (or a large part: the data's weight is scaled to the posterior's n_data):
            a tensor, a tuple or list (positional), or a mapping (keywords).
        y: targets: numbers, counts or binary labels [N] or [N, K], or classes [N].
        noise_variance: noise of a regression, one number or one an output; default what the posterior knows, None for
            classes.
        log_odds: prior log-odds of inclusion, for posteriors that have none of their own.
        output: function that takes the output tensor out of what the network returns; ``.logits`` are found without.

    Returns:
        `Audit`; print it.

    Raises:
        OckhamError: the network does not end in a Linear layer that the posterior knows.
        DataError: targets that do not fit the outputs, or are NaN.
    """
    name, layer = _last_linear(model, posterior)
    features, outputs = _run(model, layer, x, output)
    noise_variance = posterior.noise_variance if noise_variance is None else noise_variance
    gaussian = posterior[name]
    alone = Posterior({name: gaussian}, posterior.n_data)  # of the bias of a regression in its own unit: a prior mean
    claims = gaussian.inclusion if gaussian.inclusion is not None else inclusion(alone, log_odds)[name]
    kind = posterior.likelihood if noise_variance is None else "regression"
    target, curvature = _working(outputs, y, noise_variance, kind)
    terms = target.numel() if kind in ("regression", "binary", "poisson") else len(target)
    scale = posterior.n_data / terms / posterior.temperature
    rows, highest, most = [], 0.0, 1
    for k in range(target.shape[1]):
        root = (curvature[:, k] * scale).sqrt().unsqueeze(1)
        bias = 0.0 if layer.bias is None else float(layer.bias.detach()[k])
        one = _Output(features * root, (target[:, k] - bias) * root[:, 0], gaussian, claims, k, log_odds)
        rows += one.rows()
        highest, most = max(highest, one.correlation()), max(most, one.fixed_points())
    rows.sort(key=lambda w: abs(w.claimed - 0.5))
    found = Audit(name, tuple(rows), highest, most, ())
    return Audit(name, tuple(rows), highest, most, _warnings(found))


class _Output:
    """One output of the last layer as a linear model of unit noise."""

    def __init__(self, x: Tensor, y: Tensor, gaussian: Gaussian, claims: Tensor, output: int, log_odds: float) -> None:
        self.alive = gaussian.keep[output].nonzero()[:, 0]
        self.output = output
        self.claims = claims[output][self.alive].double()
        self.mean = gaussian.expected[output][self.alive].double()
        self.slab = 1 / torch.broadcast_to(gaussian.prior_precision, gaussian.mean.shape)[output][self.alive].double()
        self.x, self.y = x[:, self.alive], y
        self.odds = log_odds
        if gaussian.inclusion is None or not len(self.alive):
            return
        # What the posterior believed before the data: its claims less their evidence; the median is robust.
        here = gaussian.keep[output]
        variance = 1 / gaussian.precision[output][here].double()
        evidence = 0.5 * (variance / self.slab).log() + 0.5 * gaussian.mean[output][here].double().square() / variance
        doubtful = (self.claims > 1e-4) & (self.claims < 1 - 1e-4)
        if bool(doubtful.any()):
            self.odds = float((torch.logit(self.claims) - evidence)[doubtful].median().clamp(-12, 12))

    def rows(self) -> list[AuditedWeight]:
        """Enumerate the most doubtful; the others stay at their mean."""
        if not len(self.alive):
            return []
        doubt = (self.claims - 0.5).abs().argsort()[:_MOST]
        rest = torch.ones(len(self.alive), dtype=torch.bool)
        rest[doubt] = False
        target = self.y - self.x[:, rest] @ self.mean[rest]
        rate = 1 / (1 + math.exp(-self.odds))
        exact = enumerate_subsets(
            self.x[:, doubt], target, prior_inclusion=rate, slab_variance=self.slab[doubt], noise_variance=1.0
        ).probabilities
        correlated = inclusion_correlated(
            *self._likelihood(), log_odds=self.odds, slab_variance=self.slab
        ).probabilities
        return [
            AuditedWeight(self.output, int(self.alive[i]), float(self.claims[i]), float(e), float(correlated[i]))
            for i, e in zip(doubt.tolist(), exact, strict=True)
        ]

    def correlation(self) -> float:
        """Largest between two living features."""
        return float(correlation(self._likelihood()[0]).max()) if len(self.alive) > 1 else 0.0

    def fixed_points(self) -> int:
        """Of the paired posterior, from several starts."""
        if not len(self.alive):
            return 1
        given = {"log_odds": self.odds, "slab_variance": self.slab, "starts": _STARTS, "sweeps": 200}
        return inclusion_paired(*self._likelihood(), **given).fixed_points  # type: ignore[arg-type]

    def _likelihood(self) -> tuple[Tensor, Tensor]:
        return self.x.T @ self.x, self.x.T @ self.y


def _last_linear(model: nn.Module, posterior: Posterior) -> tuple[str, nn.Linear]:
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linears or f"{linears[-1][0]}.weight".lstrip(".") not in posterior:
        raise OckhamError("audit enumerates a last Linear layer; the network has none that the posterior knows")
    return f"{linears[-1][0]}.weight".lstrip("."), linears[-1][1]


@torch.no_grad()
def _run(model: nn.Module, layer: nn.Linear, x: Any, output: ReadOutput | None) -> tuple[Tensor, Tensor]:
    """Features that enter the layer, and the network's outputs, float64."""
    caught: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(lambda _, args, out: caught.append((args[0], out)))
    try:
        with evaluating(model) as device:
            outputs = tensor_of(call(model, inputs_of(x).to(device), output))
    finally:
        handle.remove()
    if (
        len(caught) != 1
        or caught[0][1].shape != outputs.shape
        or not torch.allclose(caught[0][1], outputs, equal_nan=True)
    ):
        raise OckhamError("audit needs a network whose output is that of its last Linear layer, used once")
    return caught[0][0].flatten(0, -2).double(), outputs.flatten(0, -2).double()


def _working(
    outputs: Tensor, y: Tensor, noise_variance: float | Tensor | None, kind: str | None
) -> tuple[Tensor, Tensor]:
    """Targets and curvatures [N, K] of the quadratic likelihood of each output."""
    check_target(y, "audit")
    for what, values in (("targets", y), ("outputs of the network", outputs)):
        if not bool(values.isfinite().all()):
            raise DataError(f"{what} are NaN or infinite, first at example {int((~values.isfinite()).nonzero()[0, 0])}")
    if noise_variance is not None:
        target = aligned(y.to(outputs), outputs, "audit").double()
        return target, (1 / torch.as_tensor(noise_variance).to(target)).expand(target.shape)
    if kind in ("binary", "poisson"):
        likelihood_from(kind).check(outputs, y)
        mean = outputs.sigmoid() if kind == "binary" else outputs.exp()
        curvature = (mean * (1 - mean) if kind == "binary" else mean).clamp_min(1e-6)
        return outputs + (aligned(y.to(outputs), outputs, "audit") - mean) / curvature, curvature
    likelihood_from("classification").check(outputs, y.reshape(-1))
    p = outputs.softmax(1)
    curvature = (p * (1 - p)).clamp_min(1e-6)
    onehot = nn.functional.one_hot(y.reshape(-1).long(), outputs.shape[1]).double()
    return outputs + (onehot - p) / curvature, curvature


def _warnings(found: Audit) -> tuple[str, ...]:
    said = []
    if found.max_error > _TRUSTED:
        said.append(
            f"claims are off by up to {found.max_error:.2f}: do not read single probabilities between .05 and .95 as "
            f"they stand. The full-covariance form (ockham.methods.spike_slab.correlated) "
            f"is within {found.correlated_error:.2f}"
        )
    if found.correlation > _HIGH:
        said.append(
            f"features correlate up to {found.correlation:.2f}: of two that say the same, mean field keeps one at "
            "random or drops both. Use the full covariance for the last layer, or compare several starts"
        )
    if found.fixed_points > 1:
        said.append(
            f"the paired posterior has {found.fixed_points} fixed points here: what it claims depends on where "
            "training began. Train from several seeds and compare (inclusion_paired mixes them by evidence)"
        )
    return tuple(said)
