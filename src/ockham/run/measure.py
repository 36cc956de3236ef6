"""The rim of the measures: predictions and truths become float64 tensors on the CPU, or a `DataError` says why not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ockham.choose.units import chain_weights, node_inclusion
from ockham.core.posterior import Posterior
from ockham.errors import DataError
from ockham.fit.predict import draw_outputs
from ockham.zoo.data import Dataset

__all__ = [
    "CLASSIFIERS",
    "ClassificationMeasures",
    "HeldOut",
    "Predictor",
    "RegressionMeasures",
    "Reliability",
    "accuracy",
    "auroc",
    "brier",
    "by_class",
    "check_sums",
    "classification_summary",
    "confidence",
    "crps_gaussian",
    "crps_mixture",
    "distributions",
    "ece",
    "ece_equal_mass",
    "fit_temperature",
    "gaussian_nll",
    "input_map",
    "interval_coverage",
    "jaccard",
    "labels_for",
    "mean_predictor",
    "measures",
    "mixture",
    "mixture_nll",
    "nll",
    "path_inclusion",
    "poisson_summary",
    "posterior_predictor",
    "real",
    "regression_summary",
    "reliability",
    "reliability_equal_mass",
    "reliability_of",
    "rmse",
    "tempered",
]


def real(name: str, values: Tensor) -> Tensor:
    """Float64 copy of ``values`` on the CPU, without gradient; not empty, no NaN."""
    if values.numel() == 0:
        raise DataError(f"{name} is empty, shape {tuple(values.shape)}; at least one example is needed")
    double = values.detach().to("cpu", torch.float64)
    if count := int(double.isnan().sum()):
        raise DataError(f"{name}: {count} of {double.numel()} values are NaN")
    return double


def by_class(name: str, values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K, d1, ...] with labels [N, d1, ...], indices 0..K-1, as rows [M, K] with labels [M], one row a label."""
    if not values.is_floating_point():
        raise DataError(f"{name} must be floating point; got {values.dtype}")
    shape = tuple(values.shape)
    if values.ndim < 2 or (shape[0], *shape[2:]) != tuple(labels.shape):
        raise DataError(
            f"{name} {shape} and labels {tuple(labels.shape)} do not fit; expected [N, K] with labels [N], or "
            "[N, K, d1, ...] with [N, d1, ...] (class indices, not one-hot)"
        )
    if labels.is_floating_point() or labels.is_complex():
        raise DataError(f"labels must be integers (class indices); got {labels.dtype}")
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= shape[1]):
        raise DataError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, but {name} has {shape[1]} classes "
            f"(0..{shape[1] - 1}); drop padding and ignored examples first"
        )
    rows = real(name, values).movedim(1, -1).flatten(0, -2)
    return rows, labels.detach().to("cpu", torch.int64).flatten()


def distributions(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as `by_class`, each a distribution over the classes."""
    rows, truth = by_class("probabilities", probabilities, labels)
    if bool((rows < 0).any()):
        raise DataError(f"probabilities must not be negative; smallest is {float(rows.min()):.4g}; apply softmax first")
    check_sums("probabilities", rows.sum(1), probabilities)
    return rows, truth


def check_sums(name: str, sums: Tensor, source: Tensor) -> None:
    """Every row sums to one, to within 1e-3 plus what the dtype and the number of classes of ``source`` explain."""
    tolerance = 1e-3 + torch.finfo(source.dtype).eps * (1 + math.log(source.shape[1]))
    worst = sums[(sums - 1).abs().argmax()]
    if not abs(float(worst) - 1) <= tolerance:
        raise DataError(
            f"{name} must be normalised over dimension 1; one row has total probability {float(worst):.6g}; "
            "apply softmax (log_softmax for log-probabilities) first"
        )


def confidence(probabilities: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Largest probability [M] and whether it is right [M] (0.0 or 1.0); ``bins`` is at least one."""
    if bins < 1:
        raise DataError(f"bins must be at least 1; got {bins}")
    rows, truth = distributions(probabilities, labels)
    largest, guess = rows.max(1)
    return largest, (guess == truth).double()


def mixture(name: str, means: Tensor, target: Tensor, variance: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """Means [S, N, ...], target [N, ...] and variance expanded to the means; all finite, variance not negative."""
    if means.shape[1:] != target.shape:
        raise DataError(
            f"{name} and target do not fit: {tuple(means.shape[1:])} and {tuple(target.shape)}"
            f"{' (after the dimension of draws)' if name == 'means' else ''}; nothing is broadcast here"
        )
    m, y, v = real(name, means), real("target", target), real("variance", torch.as_tensor(variance))
    for label, values in ((name, m), ("target", y), ("variance", v)):
        if not bool(values.isfinite().all()):
            raise DataError(f"{label} has infinite values")
    if bool((v < 0).any()):
        raise DataError(f"variance must not be negative; smallest is {float(v.min()):.4g} (a log-variance?)")
    try:
        return m, y, v.expand(m.shape)
    except RuntimeError:
        got = f"{tuple(v.shape)} and {tuple(m.shape)}"
        raise DataError(f"variance does not broadcast to the means (draws first): {got}") from None


@dataclass(frozen=True, slots=True, eq=False)
class Reliability:
    """Confidence against accuracy in bins: the data of a reliability diagram.

    Attributes:
        edges: borders of the bins, [bins + 1], rising from 0 to 1 (equal mass: over the confidences seen).
        confidence: mean largest probability in each bin, [bins]; NaN where the bin is empty.
        accuracy: share of right predictions in each bin, [bins]; NaN where the bin is empty.
        count: examples in each bin, [bins], integers.
    """

    edges: Tensor
    confidence: Tensor
    accuracy: Tensor
    count: Tensor

    @property
    def ece(self) -> float:
        """Expected calibration error, sum over bins of (n_b / N) |accuracy_b - confidence_b|."""
        gap = (self.accuracy - self.confidence).abs().nan_to_num(nan=0.0)
        return float((gap * self.count).sum() / self.count.sum())


@dataclass(frozen=True, slots=True)
class ClassificationMeasures:
    """Accuracy, nll (nats an example), calibration errors and Brier score (0..2) of a classifier."""

    accuracy: float
    nll: float
    ece: float
    ece_equal_mass: float
    brier: float

    def to_dict(self) -> dict[str, float]:
        """The numbers by name, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class RegressionMeasures:
    """Root mean squared error and CRPS (units of the target), nll (nats), coverage of central intervals."""

    rmse: float
    nll: float
    crps: float
    coverage_50: float
    coverage_90: float
    coverage_95: float

    def to_dict(self) -> dict[str, float]:
        """The numbers by name, ready for JSON."""
        return asdict(self)


def classification_summary(log_probabilities: Tensor, labels: Tensor) -> ClassificationMeasures:
    """All measures of a classifier; ``log_probabilities`` are renormalised in float64 where exponentiated."""
    loss = nll(log_probabilities, labels)
    probabilities = log_probabilities.detach().to("cpu", torch.float64).softmax(1)
    return ClassificationMeasures(
        accuracy=accuracy(probabilities, labels),
        nll=loss,
        ece=ece(probabilities, labels),
        ece_equal_mass=ece_equal_mass(probabilities, labels),
        brier=brier(probabilities, labels),
    )


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Share of examples whose largest entry (the first of equals) is the label; logits do as well.

    >>> accuracy(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]))
    0.5
    """
    rows, truth = by_class("probabilities", probabilities, labels)
    return float((rows.argmax(1) == truth).double().mean())


def nll(log_probabilities: Tensor, labels: Tensor) -> float:
    """Negative log-likelihood, -mean ln p(label), in nats an example; inf where a label was held impossible.

    For S posterior draws pass the mixture, ``torch.logsumexp(draws, 0) - ln S``.
    """
    rows, truth = by_class("log_probabilities", log_probabilities, labels)
    check_sums("log_probabilities", rows.exp().sum(1), log_probabilities)
    return float(-rows.gather(1, truth[:, None]).mean())


def brier(probabilities: Tensor, labels: Tensor) -> float:
    """Brier score, mean over examples of sum_k (p_k - [k = label])^2, between 0 and 2.

    Reference: Brier, Monthly Weather Review 78, 1950, eq. 2 (not halved for two classes).
    """
    rows, truth = distributions(probabilities, labels)
    return float((rows - torch.nn.functional.one_hot(truth, rows.shape[1])).square().sum(1).mean())


def ece(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Expected calibration error of the largest probability, in ``bins`` bins of equal width (see `reliability`)."""
    return reliability(probabilities, labels, bins=bins).ece


def ece_equal_mass(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Expected calibration error in ``bins`` bins of equally many examples (see `reliability_equal_mass`)."""
    return reliability_equal_mass(probabilities, labels, bins=bins).ece


def reliability(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> Reliability:
    """Reliability data in the bins ((b - 1) / bins, b / bins] of the largest probability.

    Reference: Guo et al., On calibration of modern neural networks, ICML 2017, section 2.
    """
    largest, correct = confidence(probabilities, labels, bins)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    return _binned(largest, correct, torch.bucketize(largest, edges[1:-1]), edges)


def reliability_equal_mass(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> Reliability:
    """Reliability data in bins of equally many examples (to within one).

    Examples of equal confidence share their mean accuracy, so the result does not depend on the order of the data
    even where saturated predictions straddle bins. With fewer examples than bins some bins are empty.

    Reference: Nixon et al., Measuring calibration in deep learning, CVPR workshops 2019 (adaptive bins).
    """
    largest, correct = confidence(probabilities, labels, bins)
    largest, order = largest.sort()
    tie = torch.nn.functional.pad((largest.diff() != 0).long().cumsum(0), (1, 0))
    shared = torch.bincount(tie, weights=correct[order]) / torch.bincount(tie)
    total = largest.numel()
    index = torch.arange(total) * bins // total
    edges = largest[(-(torch.arange(bins + 1) * -total // bins)).clamp(max=total - 1)]
    return _binned(largest, shared[tie], index, edges)


def auroc(scores_in: Tensor, scores_out: Tensor) -> float:
    """Area under the ROC curve, P(out > in) + P(out = in) / 2, for scores that should be larger out of distribution.

    Args:
        scores_in: score (say predictive entropy) of in-distribution examples, any shape.
        scores_out: score of out-of-distribution examples, any shape.

    Returns:
        0..1; one half where the scores do not tell the sets apart.

    Reference: Hanley & McNeil, Radiology 143, 1982 (the Mann-Whitney statistic).

    >>> auroc(torch.tensor([0.1, 0.2]), torch.tensor([0.2, 0.9]))
    0.875
    """
    inside = real("scores_in", scores_in).flatten().sort().values
    outside = real("scores_out", scores_out).flatten()
    below, not_above = (torch.searchsorted(inside, outside, right=right) for right in (False, True))
    return float((below + not_above).double().mean() / (2 * inside.numel()))


def rmse(prediction: Tensor, target: Tensor) -> float:
    """Root mean squared error, sqrt(mean (prediction - target)^2), in units of the target."""
    means, truth, _ = mixture("prediction", prediction[None], target, 0.0)
    return float((means[0] - truth).square().mean().sqrt())


def gaussian_nll(mean: Tensor, target: Tensor, *, variance: Tensor | float) -> float:
    """Mean of 1/2 ln(2 pi v) + (y - m)^2 / (2 v), in nats; ``variance`` > 0, broadcastable to ``mean``."""
    return mixture_nll(mean[None], target, variance=variance)


def mixture_nll(means: Tensor, target: Tensor, *, variance: Tensor | float) -> float:
    """Negative log-likelihood of a Gaussian mixture, -mean ln (1/S) sum_s N(y; m_s, v), in nats a target element.

    Args:
        means: [S, N, ...], one row a posterior draw.
        target: [N, ...].
        variance: positive noise variance, broadcastable to ``means``.
    """
    m, y, v = mixture("means", means, target, variance)
    if not bool((v > 0).all()):
        raise DataError("variance must be positive for a likelihood; got 0 (draws alone have no density)")
    log_density = -0.5 * ((2 * math.pi * v).log() + (y - m).square() / v)
    return float(math.log(len(m)) - log_density.logsumexp(0).mean())


def crps_gaussian(mean: Tensor, target: Tensor, *, variance: Tensor | float) -> float:
    """Mean CRPS of N(mean, variance), s (z (2 Phi(z) - 1) + 2 phi(z) - 1/sqrt(pi)) with z = (y - m) / s.

    Reference: Gneiting & Raftery, JASA 102, 2007, eq. 21 (negated: smaller is better).
    """
    return crps_mixture(mean[None], target, variance=variance)


def crps_mixture(means: Tensor, target: Tensor, *, variance: Tensor | float) -> float:
    """Mean continuous ranked probability score of a Gaussian mixture, in units of the target; smaller is better.

        CRPS = (1/S) sum_s A(y - m_s, v_s) - (1 / 2 S^2) sum_st A(m_s - m_t, v_s + v_t),   A(d, v) = E|N(d, v)|

    Args:
        means: [S, N, ...], one row a posterior draw.
        target: [N, ...].
        variance: noise variance, broadcastable to ``means``; 0.0 scores the draws themselves.

    Reference: Grimit, Gneiting, Berrocal & Johnson, Q. J. R. Meteorol. Soc. 132, 2006 (mixtures of Gaussians).
    """
    m, y, v = mixture("means", means, target, variance)
    spread = sum((_absolute(m - m[s], v + v[s]).mean(0) for s in range(len(m))), torch.zeros_like(y)) / len(m)
    return float((_absolute(y - m, v).mean(0) - spread / 2).mean())


def interval_coverage(means: Tensor, target: Tensor, *, variance: Tensor | float, level: float) -> float:
    """Share of targets inside the central interval that holds ``level`` of the mixture: |2 F(y) - 1| <= level.

    F is the distribution function of the mixture (`crps_mixture` for the arguments; one Gaussian is ``mean[None]``,
    draws alone are variance 0.0). Good intervals cover ``level`` of the targets.
    """
    if not 0 < level < 1:
        raise DataError(f"level must lie strictly between 0 and 1 (0.9 is the 90 % interval); got {level}")
    m, y, v = mixture("means", means, target, variance)
    below = torch.special.ndtr(((y - m) / v.sqrt()).nan_to_num(nan=0.0)).mean(0)
    return float(((2 * below - 1).abs() <= level).double().mean())


def regression_summary(means: Tensor, target: Tensor, *, noise_variance: Tensor | float) -> RegressionMeasures:
    """All measures of the mixture (1/S) sum_s N(means_s, noise_variance); arguments as in `mixture_nll`."""
    cover = {
        f"coverage_{level}": interval_coverage(means, target, variance=noise_variance, level=level / 100)
        for level in (50, 90, 95)
    }
    return RegressionMeasures(
        rmse=rmse(means.detach().to("cpu", torch.float64).mean(0), target),
        nll=mixture_nll(means, target, variance=noise_variance),
        crps=crps_mixture(means, target, variance=noise_variance),
        **cover,
    )


def jaccard(keep_a: Mapping[str, Tensor], keep_b: Mapping[str, Tensor]) -> float:
    """Overlap |A and B| / |A or B| of two kept sets, over all parameters together; 1 when both are empty.

    Raises:
        DataError: the mappings are empty, or their names, shapes or (boolean) types differ.
    """
    if not keep_a or keep_a.keys() != keep_b.keys():
        odd = sorted(keep_a.keys() ^ keep_b.keys())[:6]
        raise DataError(f"kept sets are empty or name different parameters; only in one of them: {odd}")
    both = either = 0
    for name, a in keep_a.items():
        b = keep_b[name].to(a.device)
        if a.shape != b.shape or a.dtype != torch.bool or b.dtype != torch.bool:
            got = f"{a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
            raise DataError(f"kept sets need booleans of one shape; {name!r} has {got}")
        both, either = both + int((a & b).sum()), either + int((a | b).sum())
    return both / either if either else 1.0


def _binned(largest: Tensor, correct: Tensor, index: Tensor, edges: Tensor) -> Reliability:
    """Means of confidence and correctness by bin; 0 / 0 is the NaN of an empty bin."""
    bins = edges.numel() - 1
    count = torch.bincount(index, minlength=bins)
    mean_confidence, mean_correct = (torch.bincount(index, w, bins) / count for w in (largest, correct))
    return Reliability(edges, mean_confidence, mean_correct, count)


def _absolute(shift: Tensor, variance: Tensor) -> Tensor:
    """E|X| for X ~ N(shift, variance), sqrt(2 v / pi) exp(-z^2 / 2) + d erf(z / sqrt 2); |shift| at variance 0."""
    std = variance.sqrt()
    z = (shift / std).nan_to_num(nan=0.0)
    return math.sqrt(2 / math.pi) * std * (-0.5 * z.square()).exp() + shift * torch.erf(z / math.sqrt(2))


Predictor = Callable[[Tensor], Tensor]
"""Inputs [N, ...] to log-probabilities [N, K, ...] ("binary": K = 2), or to the outputs of S draws [S, N, ...]."""

CLASSIFIERS = ("classification", "binary")
"""Likelihoods whose predictions are probabilities of classes; "binary" has two, no and yes, for every logit."""


@dataclass(frozen=True, slots=True, eq=False)
class _Draws:
    """Posterior predictive of a model."""

    model: nn.Module
    posterior: Posterior
    draws: int
    seed: int
    likelihood: str

    def __call__(self, x: Tensor) -> Tensor:
        device = next(self.model.parameters()).device
        generator = torch.Generator(device).manual_seed(self.seed)
        outputs = draw_outputs(self.model, self.posterior, x.to(device), draws=self.draws, generator=generator)
        if self.likelihood not in CLASSIFIERS:
            return torch.stack([o.cpu() for o in outputs])
        total: Tensor | None = None
        for output in outputs:
            logits = output
            if self.likelihood == "binary":
                yes = output[:, 0] if output.ndim == 2 and output.shape[1] == 1 else output
                logits = torch.stack([torch.zeros_like(yes), yes], 1)
            logs = logits.log_softmax(1).double()
            total = logs if total is None else torch.logaddexp(total, logs)
        assert total is not None
        return (total - math.log(self.draws)).cpu()


def posterior_predictor(
    model: nn.Module, posterior: Posterior, *, likelihood: str, draws: int = 20, seed: int = 0
) -> Predictor:
    """Ln 1/S sum_s p(y | x, w_s) of `CLASSIFIERS`, the S outputs for other likelihoods; the same draws at every call.

    Args:
        model: network of the posterior.
        posterior: distribution of its parameters.
        likelihood: name of the likelihood, such as "classification" or "regression".
        draws: number S of networks.
        seed: seed of the draws.
    """
    return _Draws(model, posterior, draws, seed, likelihood)


def mean_predictor(model: nn.Module, *, likelihood: str) -> Predictor:
    """Prediction of the network as it stands, in evaluation mode; ``likelihood`` as for `posterior_predictor`."""
    return _Draws(model, Posterior({}, 1.0), 1, 0, likelihood)


def fit_temperature(log_probabilities: Tensor, labels: Tensor) -> float:
    """The temperature T > 0 at which the mean NLL of softmax(ln p / T) is least.

    The NLL is convex in 1/T; its derivative, E_p[ln p] less ln p of the label, is brought to zero by halving.

    Args:
        log_probabilities: ln p, [N, K, ...]; logits do as well.
        labels: right classes, [N, ...].

    Returns:
        T between 0.01 and 100.

    Reference: Guo, Pleiss, Sun and Weinberger 2017, arXiv 1706.04599.

    >>> round(fit_temperature(torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0]]), torch.tensor([0, 0, 1])), 2)
    5.77
    """
    logs = log_probabilities.double()
    told = logs.gather(1, labels[:, None])
    low, high = math.log(0.01), math.log(100.0)
    for _ in range(60):
        middle = (low + high) / 2
        expected = ((logs * math.exp(middle)).softmax(1) * logs).sum(1, keepdim=True)
        low, high = (low, middle) if float((expected - told).mean()) > 0 else (middle, high)
    return math.exp(-(low + high) / 2)


def tempered(predictor: Predictor, temperature: float) -> Predictor:
    """A classifier's prediction with its logits divided by a temperature."""
    return predictor if temperature == 1 else lambda x: (predictor(x) / temperature).log_softmax(1)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The epoch after which held-out examples were predicted best, and how its predictions are calibrated.

    Attributes:
        epoch: number, from 1; 0 before the first.
        nll: mean NLL of the held-out examples at that temperature or noise, nats.
        temperature: divisor of a classifier's logits.
        noise_variance: mean squared residual of every output of a regression; None of a classifier.
    """

    epoch: int = 0
    nll: float = math.inf
    temperature: float = 1.0
    noise_variance: Sequence[float] | None = None

    @staticmethod
    def of(model: nn.Module, x: Tensor, y: Tensor, *, likelihood: str, epoch: int) -> HeldOut:
        """What a network predicts of examples that it was not trained on."""
        found = mean_predictor(model, likelihood=likelihood)(x)
        if likelihood == "poisson":
            return HeldOut(epoch, poisson_summary(found, y)["nll"])
        if likelihood in CLASSIFIERS:
            labels = labels_for(found, y)
            temperature = fit_temperature(found, labels) if found.ndim > 1 else 1.0
            calibrated = (found / temperature).log_softmax(1)
            return HeldOut(epoch, nll(calibrated, labels), temperature)
        variance = (found[0] - y.reshape(found[0].shape)).double().square().mean(0).reshape(-1)
        entropy = 0.5 * (2 * math.pi * math.e * variance).log().mean()
        return HeldOut(epoch, float(entropy), 1.0, variance.tolist())


def labels_for(log_probabilities: Tensor, y: Tensor) -> Tensor:
    """Integer labels in the shape that log-probabilities [N, K, ...] have without their axis of classes.

    Raises:
        DataError: targets between the classes 0 and 1 (as the likelihood "binary" takes them) have no label.
    """
    if y.is_floating_point() and bool((y != y.round()).any()):
        between = float(y[y != y.round()][0])
        raise DataError(f"a classifier is measured against labels; got {between:g}. Round the targets for testing")
    return y.long().reshape(log_probabilities.shape[:1] + log_probabilities.shape[2:])


def poisson_summary(log_rates: Tensor, counts: Tensor) -> dict[str, float]:
    """RMSE of the mean rate, and NLL -mean ln (1/S) sum_s Poisson(y; exp(f_s)), nats, of log rates [S, N, ...]."""
    f, y = real("log_rates", log_rates), real("counts", counts).reshape(log_rates.shape[1:])
    logs = y * f - f.exp() - torch.lgamma(y + 1)
    return {"rmse": rmse(f.exp().mean(0), y), "nll": float(math.log(len(f)) - logs.logsumexp(0).mean())}


def measures(
    predictor: Predictor, x: Tensor, y: Tensor, *, noise_variance: Tensor | float | None, likelihood: str | None = None
) -> dict[str, float]:
    """Accuracy, NLL, ECE, Brier of a classifier; RMSE, NLL, CRPS, coverage of a regression; RMSE, NLL of counts.

    Args:
        predictor: prediction, made for the same likelihood.
        x: inputs [N, ...].
        y: targets.
        noise_variance: noise of a regression, None for other likelihoods.
        likelihood: name of the likelihood; None: "regression" with a noise, "classification" without.
    """
    if noise_variance is None and likelihood == "poisson":
        return poisson_summary(predictor(x), y)
    if noise_variance is None:
        found = predictor(x)
        return classification_summary(found, labels_for(found, y)).to_dict()
    means = predictor(x)
    target = y.reshape(means.shape[1:])
    return regression_summary(means, target, noise_variance=noise_variance).to_dict()


def reliability_of(predictor: Predictor, x: Tensor, y: Tensor) -> dict[str, Any]:
    """15 equal-width bins: confidence, accuracy, count; empty bins are None."""
    table = asdict(reliability(predictor(x).exp(), y))
    plain = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in table.items()}
    return {k: [None if isinstance(e, float) and math.isnan(e) else e for e in v] for k, v in plain.items()}


@torch.no_grad()
def input_map(model: nn.Module, data: Dataset) -> tuple[tuple[int, ...], ...] | None:
    """Kept first-layer weights per pixel [H][W], all channels; None if the first layer is no Linear on pixels."""
    first = next((m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))), None)
    if data.image_shape is None or not isinstance(first, nn.Linear):
        return None
    channels, height, width = data.image_shape
    if first.in_features != channels * height * width:
        return None
    counts = (first.weight != 0).sum(0).view(channels, height, width).sum(0)
    return tuple(tuple(int(c) for c in row) for row in counts)


def path_inclusion(model: nn.Module, posterior: Posterior) -> tuple[float, ...] | None:
    """Probability that a living path leads from each input to an output (path rule); of plain chains of layers only.

    None where the posterior has no inclusion probabilities, or the network is not one `nn.Sequential` of Linear layers.
    """
    layers = [m for m in model.modules() if not list(m.children())]
    chain = isinstance(model, nn.Sequential) and all(
        isinstance(m, nn.Linear) or not list(m.parameters()) for m in layers
    )
    if not chain or not posterior or any(g.inclusion is None for g in posterior.values()):
        return None
    return tuple(round(float(p), 6) for p in node_inclusion(chain_weights(model, posterior)).inputs)
