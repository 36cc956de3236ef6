"""What a run writes down, record by record: measures of a network, epochs, rounds, layers, gates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ockham.core.files import Count, Share, rest, wrong

__all__ = [
    "BINS",
    "DiagnosisRecord",
    "EpochRecord",
    "ForeignInputs",
    "GateCurve",
    "GateLayer",
    "GatePoint",
    "GateWidths",
    "GroupRecord",
    "HistogramRecord",
    "LayerRecord",
    "Measures",
    "ReliabilityPair",
    "ReliabilityTable",
    "RoundRecord",
    "ShiftCurve",
    "StructureRecord",
]

BINS = 60
"""Bins of a delta_f histogram, equally wide over [-25, 5] nats."""


@dataclass(frozen=True, slots=True)
class Measures:
    """What was measured of one network on test data; None where it was not.

    Attributes:
        accuracy: share of right answers.
        nll: negative log-likelihood, nats per example.
        ece: expected calibration error over bins of equal width.
        ece_equal_mass: the same over bins of equal mass.
        brier: mean squared distance between predicted probabilities and truth.
        rmse: root mean squared error, in the unit of the targets.
        crps: continuous ranked probability score, in the unit of the targets.
        coverage_50: share of targets inside the central 50 % interval.
        coverage_90: share inside the 90 % interval.
        coverage_95: share inside the 95 % interval.
        parameters: learnable values that are stored, zeros not counted.
        bytes: size on disk, or in memory where the network is dense (`Structure`).
        macs: multiply-accumulates of one example.
        latency_1: median time of a forward pass of one example, seconds.
        latency_64: the same for 64 examples at once, seconds.
        others: measures of other names, such as those of other likelihoods.
    """

    accuracy: Share | None = None
    nll: float | None = None
    ece: Share | None = None
    ece_equal_mass: float | None = None
    brier: float | None = None
    rmse: float | None = None
    crps: float | None = None
    coverage_50: Share | None = None
    coverage_90: Share | None = None
    coverage_95: Share | None = None
    parameters: Count | None = None
    bytes: Count | None = None
    macs: Count | None = None
    latency_1: float | None = None
    latency_64: float | None = None
    others: Mapping[str, float | None] = rest()

    @classmethod
    def of(cls, values: Mapping[str, float | None], **more: Any) -> Measures:
        """Measures by their names; those without an attribute go to ``others``."""
        named = {f.name for f in fields(cls)} - {"others"}
        known = {name: value for name, value in values.items() if name in named}
        return cls(**known | more, others={k: v for k, v in values.items() if k not in named})


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One epoch.

    Attributes:
        epoch: number, from 1.
        loss: mean negative log-likelihood of the epoch, nats per example.
        accuracy: training accuracy, None without classes.
        kept_share: living weights over all weights of the network before, after this epoch.
        kl: divergence of the posterior from its prior at the end of the epoch, nats.
        parameters: learnable values the network has.
        widths: group id to the units it has.
        removed: units or weights that went after this epoch.
        seconds: wall time of the epoch.
    """

    epoch: Count
    loss: float | None
    accuracy: Share | None
    kept_share: Share
    kl: float | None = None
    parameters: Count | None = None
    widths: Mapping[str, Count] | None = None
    removed: Count | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """What one round of removal did.

    Attributes:
        epoch: number of the epoch after which it took place.
        removed: weights that went.
        kept_share: living weights over all weights of the network before, after the round.
        delta_f: predicted change of the log evidence, nats.
        nll_cost: predicted rise of the mean negative log-likelihood, nats per example.
        free_energy: lower bound on the log evidence of the network before the round, nats.
    """

    epoch: Count
    removed: Count
    kept_share: Share
    delta_f: float | None
    nll_cost: float | None
    free_energy: float | None


@dataclass(frozen=True, slots=True)
class HistogramRecord:
    """Weights by their delta_f before a round.

    Attributes:
        epoch: number of the epoch after which the round took place.
        delta_f: counts in `BINS` bins, outliers in the end bins; empty where nothing was scored.
    """

    epoch: Count
    delta_f: tuple[Count, ...]

    def __post_init__(self) -> None:
        if len(self.delta_f) not in (0, BINS):
            raise wrong("delta_f", f"a list of 0 or {BINS}", self.delta_f)


@dataclass(frozen=True, slots=True)
class DiagnosisRecord:
    """What the spread of the posterior's precision said before the first removal.

    Attributes:
        undetermined: share of living weights that the data never touched.
        spread: coefficient of variation of the precision inside a tensor, averaged over weights.
        removable: share of living weights with a positive delta_f.
        warnings: sentences for people.
        noise_cost: expected price of the posterior's spread, nats per example.
        nll: measured negative log-likelihood under the posterior, nats per example.
    """

    undetermined: Share
    spread: float | None
    removable: Share
    warnings: tuple[str, ...] = ()
    noise_cost: float | None = None
    nll: float | None = None


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """What is left of one parameter tensor.

    Attributes:
        name: path of the parameter.
        shape: shape in the network before.
        total: number of values in the network before.
        kept: number of values that stay.
        expected: sum of the inclusion probabilities, None where the posterior has none.
    """

    name: str
    shape: tuple[Count, ...]
    total: Count
    kept: Count
    expected: float | None = None

    def __post_init__(self) -> None:
        if self.kept > self.total:
            raise wrong("kept", f"at most {self.total}", self.kept)


@dataclass(frozen=True, slots=True)
class ReliabilityTable:
    """Test examples by how sure the network was of them.

    Attributes:
        edges: borders of the bins of confidence, one more than bins.
        confidence: mean confidence in each bin, None where it is empty.
        accuracy: share of right answers in each bin, None where it is empty.
        count: examples in each bin.
    """

    edges: tuple[Share, ...]
    confidence: tuple[Share | None, ...]
    accuracy: tuple[Share | None, ...]
    count: tuple[Count, ...]

    def __post_init__(self) -> None:
        n = len(self.count)
        if (len(self.edges), len(self.confidence), len(self.accuracy)) != (n + 1, n, n):
            raise wrong("", f"{n} bins with {n + 1} edges", self.edges)


@dataclass(frozen=True, slots=True)
class ReliabilityPair:
    """Reliability of the network before, if it was measured, and of the reduced one."""

    before: ReliabilityTable | None
    after: ReliabilityTable


@dataclass(frozen=True, slots=True)
class ShiftCurve:
    """Accuracy and calibration error under one corruption; every list has one value per severity.

    Attributes:
        severity: strength of the damage.
        before: accuracy of the network before, or None.
        after: accuracy of the reduced network.
        before_ece: calibration error of the network before, or None.
        after_ece: calibration error of the reduced network, or None.
    """

    severity: tuple[float, ...]
    before: tuple[Share, ...] | None
    after: tuple[Share, ...]
    before_ece: tuple[Share, ...] | None
    after_ece: tuple[Share, ...] | None

    def __post_init__(self) -> None:
        for curve in (self.before, self.after, self.before_ece, self.after_ece):
            if curve is not None and len(curve) != len(self.severity):
                raise wrong("", "as many values as severities", curve)


@dataclass(frozen=True, slots=True)
class ForeignInputs:
    """How well inputs of another kind are told from the test data, as AUROC of the predictive entropy.

    Attributes:
        name: words for what the inputs are.
        before: AUROC of the network before, or None.
        after: AUROC of the reduced network, or None.
    """

    name: str
    before: Share | None
    after: Share | None


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """Width of one group of units, or a residual branch that went as a whole, one unit of which none stays.

    Attributes:
        id: name of the group, after its first dimension, or of the branch.
        before: units in the network before.
        after: units that stay; 0 of what went with a branch.
        nats: evidence that the removed units were worth, summed.
    """

    id: str
    before: Count
    after: Count
    nats: float | None

    def __post_init__(self) -> None:
        if self.after > self.before:
            raise wrong("after", f"0 to {self.before}", self.after)


@dataclass(frozen=True, slots=True)
class StructureRecord:
    """What one round removed as a whole.

    Attributes:
        epoch: number of the epoch after which it took place.
        removed: units that went.
        free: units among them that nothing read any more.
        nats: evidence that the units were worth, summed.
        widths: group id to the units it has after the round.
        parameters: learnable values the network has after the round.
        macs: multiply-accumulates of one example after the round.
    """

    epoch: Count
    removed: Count
    free: Count
    nats: float | None
    widths: Mapping[str, Count]
    parameters: Count
    macs: Count


@dataclass(frozen=True, slots=True)
class GateWidths:
    """Gated structures that are left after an epoch.

    Attributes:
        start: group id to the structures it had at first.
        epoch: number, from 1.
        widths: group id to the structures it has.
    """

    start: Mapping[str, Count]
    epoch: Count
    widths: Mapping[str, Count]


@dataclass(frozen=True, slots=True)
class GateLayer:
    """The living gates of one group before the last decision, one value per gate in every list.

    Attributes:
        id: name of the group.
        mean: location of ln theta.
        std: scale of ln theta.
        theta: expected value of the gate.
        delta_f: change of the log evidence when the structure goes, nats.
        kl: divergence of the gate's posterior from its prior, nats.
        score: number by which the rule decided.
        keep: flags, True where the structure stayed.
        no_evidence: flags, True where the posterior is the prior.
    """

    id: str
    mean: tuple[float | None, ...]
    std: tuple[float | None, ...]
    theta: tuple[float | None, ...]
    delta_f: tuple[float | None, ...]
    kl: tuple[float | None, ...]
    score: tuple[float | None, ...]
    keep: tuple[bool, ...]
    no_evidence: tuple[bool, ...]

    def __post_init__(self) -> None:
        columns = (self.mean, self.std, self.theta, self.delta_f, self.kl, self.score, self.no_evidence)
        if any(len(column) != len(self.keep) for column in columns):
            raise wrong("", f"{len(self.keep)} values in every list", self.id)


@dataclass(frozen=True, slots=True)
class GatePoint:
    """One compression on a curve.

    Attributes:
        structures: number of structures removed.
        removed: share of the learnable values that are gone.
        measures: results of the network on held-out data.
    """

    structures: Count
    removed: Share
    measures: Measures


@dataclass(frozen=True, slots=True)
class GateCurve:
    """Compressions in the order of one rule, and the one where the rule stops by itself."""

    points: tuple[GatePoint, ...]
    stop: GatePoint
