r"""When nothing is asked for: the smallest network that the data still prefer to the dense one.

Two networks, the dense one and one with weights removed, differ in log evidence by

    delta_f = volume - n_data x (mean held-out NLL of the reduced - of the dense)

The first term is what the removed weights' freedom had cost, 1/2 sum ln(1 + n_data h / P0), by the Kronecker curvature
of the calibration data. The second is what is lost, n_data log-likelihood terms behind the trained weights counting as
the held-out ones do: it is *measured* on data that took no part, so correlations, the movement of the survivors and
everything beyond second order are in it. Removal ends where delta_f comes down to zero.

n_data is not known of most networks. The default, 20 terms a weight, is the ratio at which a network of its size is
trained at the least cost; with it the loss may rise by (volume a removed weight) x (share removed) / 20 nats at most,
whatever the network, which is 2 to 6 per cent of perplexity.

The search is a root search over the share: what single weights would cost says where to begin, what the network did
lose scales it, and a few shots suffice.

Reference: Kass & Raftery 1995 (Bayes factors); MacKay 1992 (the volume); Hoffmann et al. 2022, arXiv 2203.15556 (20).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ockham.errors import OckhamError
from ockham.methods.blocks.allocation import CostSample, predicted

__all__ = ["TERMS_PER_WEIGHT", "Shot", "best_shot", "shot_from", "shots"]

TERMS_PER_WEIGHT = 20
_SHOTS = 4
_NEAR = 0.015
_LEAST, _MOST = 0.02, 0.98


@dataclass(frozen=True, slots=True)
class Shot:
    """One reduced network, judged.

    Attributes:
        keep_share: weights that stay.
        rise: mean held-out NLL minus that of the dense network, nats per term.
        rise_error: standard error of it over held-out cases, paired.
        volume: nats freed.
        n_data: terms that the rise counts for.
    """

    keep_share: float
    rise: float
    rise_error: float
    volume: float
    n_data: float

    @property
    def nats(self) -> float:
        """Change of the log evidence against the dense network."""
        return self.volume - self.n_data * self.rise

    @property
    def certainty(self) -> float:
        """Probability that the evidence is not below the dense network's, over the draw of held-out data."""
        if self.rise_error == 0:
            return float(self.nats >= 0)
        return 0.5 * math.erfc(-self.nats / (self.n_data * self.rise_error) / math.sqrt(2))


def shot_from(
    keep_share: float, dense: tuple[Tensor, Tensor], reduced: tuple[Tensor, Tensor], volume: float, n_data: float
) -> Shot:
    """Judge a reduced network by its and the dense network's NLL and terms on the same cases (`study.loss_of`)."""
    rises, terms = reduced[0] - dense[0], dense[1]
    mean = float(rises.sum() / terms.sum())
    # of a ratio: the residuals of the cases about the common rise, over the terms
    spread = (rises - mean * terms).square().sum() * len(terms) / max(1, len(terms) - 1)
    return Shot(keep_share, mean, math.sqrt(float(spread)) / float(terms.sum()), volume, n_data)


def shots(
    samples: Mapping[str, CostSample], n_data: float, fire: Callable[[float], Shot], most: int = _SHOTS
) -> list[Shot]:
    """Reduce again and again until the share at which delta_f is zero is known to about 1.5 points.

    Args:
        samples: of what weights cost one by one.
        n_data: terms behind the trained weights.
        fire: function from a share that stays to a network reduced to it, judged.
        most: shots at most.

    Returns:
        The shots in order.
    """
    found: list[Shot] = []
    scale = 1.0
    while len(found) < most:
        share = _root(samples, n_data, scale)
        good = [s.keep_share for s in found if s.nats >= 0]
        bad = [s.keep_share for s in found if s.nats < 0]
        if good and bad and not max(bad) < share < min(good):
            share = (max(bad) + min(good)) / 2
        if any(abs(share - s.keep_share) < _NEAR for s in found):
            break
        shot = fire(share)
        found.append(shot)
        scale = max(shot.rise, 1e-9) / max(predicted(samples, share, n_data)[0], 1e-30)
    return found


def best_shot(found: Sequence[Shot]) -> Shot | None:
    """The smallest network whose evidence is not below the dense one's; None where there is none."""
    good = [s for s in found if s.nats >= 0]
    return min(good, key=lambda s: s.keep_share, default=None)


def _root(samples: Mapping[str, CostSample], n_data: float, scale: float) -> float:
    """Share that stays at which volume = n_data x scale x cost, by bisection."""
    if not samples:
        raise OckhamError("there is nothing that may go")
    low, high = _LEAST, _MOST
    for _ in range(30):
        middle = (low + high) / 2
        cost, volume = predicted(samples, middle, n_data)
        low, high = (low, middle) if volume >= n_data * scale * cost else (middle, high)
    return high
