"""How far the factors of each kind of matrix are trusted, chosen on calibration data that they were not made of.

With few tokens the factors fit their own tokens; what fits best there is not what errs least elsewhere. So on a few
blocks the factors of a part of the data decide a reduction, and those of the rest say what it costs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ockham.methods.blocks.solve import Damping, NofM, loss_increase, quadratic, sparse_matrix

__all__ = ["DEFAULT_DAMPING", "Problem", "Trial", "chosen_damping", "kind_of", "sampled_blocks"]

DEFAULT_DAMPING = Damping(0.05, 0.3)
_INPUTS = (0.01, 0.03, 0.1, 0.3)
_OUTPUTS = (0.1, 0.3, 0.6, 1.0)
_PER_LOOK = 3
_QUICK = (2, 4)


@dataclass(frozen=True, slots=True)
class Trial:
    """What one setting cost where it was tried.

    Attributes:
        kind: kind of matrix.
        damping: the setting.
        cost: nats per term on the data held out, a matrix.
    """

    kind: str
    damping: Damping
    cost: float


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """A matrix with the factors of two parts of the data.

    Attributes:
        weight: the trained matrix.
        bias: whether its last column is one.
        fit: function to A and G of the data that decide.
        held: function to A and G of the data that judge.
        scale: rows x terms of the judging sums.
    """

    weight: Tensor
    bias: bool
    fit: Callable[[], tuple[Tensor, Tensor]]
    held: Callable[[], tuple[Tensor, Tensor]]
    scale: float


def kind_of(key: str) -> str:
    """A matrix's name without its numbers: matrices that differ by depth or expert only are of one kind."""
    return re.sub(r"\d+", "N", key)


def sampled_blocks(kinds: Sequence[frozenset[str]]) -> list[int]:
    """Blocks to try settings on: of every set of kinds up to three, evenly spaced, not the ends."""
    found: list[int] = []
    for look in dict.fromkeys(kinds):
        alike = [i for i, k in enumerate(kinds) if k == look]
        count = min(_PER_LOOK, len(alike))
        found += [alike[(2 * i + 1) * len(alike) // (2 * count)] for i in range(count)]
    return sorted(set(found))


def chosen_damping(kind: str, problems: Sequence[Problem], keep: float | NofM) -> list[Trial]:
    """Try lambda at the usual tau, then tau at the best lambda; the least cost over all problems is the choice.

    Returns:
        Every trial, the best first.
    """

    def tried(damping: Damping) -> Trial:
        cost = 0.0
        for p in problems:
            curvature = quadratic(*p.fit(), damping)
            worth = curvature.conditional()
            small = sparse_matrix(p.weight, curvature, worth, keep=keep, bias=p.bias, rounds=2, steps=_QUICK)
            cost += loss_increase(small - p.weight, *p.held(), p.scale)
        return Trial(kind, damping, cost / len(problems))

    found = [tried(Damping(value, DEFAULT_DAMPING.outputs)) for value in _INPUTS]
    best = min(found, key=lambda t: t.cost).damping.inputs
    found += [tried(Damping(best, v)) for v in _OUTPUTS if v != DEFAULT_DAMPING.outputs]
    return sorted(found, key=lambda t: t.cost)
