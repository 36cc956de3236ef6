"""Evidence for whole units, on one path or several."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import singledispatch
from itertools import pairwise
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ockham.choose.rules import Evidence, score
from ockham.core.posterior import Posterior
from ockham.errors import OckhamError

__all__ = [
    "Account",
    "Choice",
    "CutOf",
    "GroupLike",
    "Inside",
    "Multiples",
    "NodeRule",
    "Nodes",
    "StructureEvidence",
    "all_masks",
    "by_max",
    "by_path",
    "by_product",
    "chain_weights",
    "choose_units",
    "held_weights",
    "incoming",
    "living",
    "multiple_of",
    "node_inclusion",
    "outgoing",
    "score_structures",
    "structures_from",
    "summed",
    "unit_evidence",
    "units_of",
]


class GroupLike(Protocol):
    """What reduction needs of a group of units: an id, a size, and the weights on both sides of every unit."""

    @property
    def id(self) -> str:
        """Name of the group."""

    @property
    def size(self) -> int:
        """Number of units."""

    def outgoing_cuts(self) -> list[tuple[str, Tensor]]:
        """Weights that read the units: (parameter, flat positions ``(units, n)``)."""

    def incoming_cuts(self) -> list[tuple[str, Tensor]]:
        """Weights, biases and norm affines that make them."""


CutOf = Callable[[GroupLike], list[tuple[str, Tensor]]]
"""Which side of a unit is scored: `outgoing` or `incoming`."""

Inside = Callable[[Evidence, "Account"], Mapping[str, Tensor]]
"""Parameter name to the summand of every weight, shape of the parameter: `held_weights` or `all_masks`."""


def outgoing(group: GroupLike) -> list[tuple[str, Tensor]]:
    """The weights that read a unit. They suffice always: what nobody reads does nothing."""
    return group.outgoing_cuts()


def incoming(group: GroupLike) -> list[tuple[str, Tensor]]:
    """The weights, bias and norm affine that make a unit. They suffice where an input of 0 gives an output of 0."""
    return group.incoming_cuts()


@dataclass(slots=True, eq=False)
class Account:
    """delta_f of every removed weight as it was when it went; NaN where the weight lives or nobody wrote it down.

    Attributes:
        delta_f: parameter name to a tensor of the parameter's shape, nats.
    """

    delta_f: dict[str, Tensor] = field(default_factory=dict)

    def entered(self, evidence: Evidence, keep: Mapping[str, Tensor]) -> Account:
        """The ledger with the living weights of ``evidence`` that ``keep`` (True = stays) removes."""
        known = dict(self.delta_f)
        for name, mask in keep.items():
            alive = evidence.posterior[name].keep
            wide = torch.full(alive.shape, math.nan, device=alive.device)
            wide[alive] = evidence[name].float()
            before = known.get(name, torch.full_like(wide, math.nan))
            known[name] = torch.where(alive & ~mask, wide, before)
        return Account(known)

    def enter(self, evidence: Evidence, keep: Mapping[str, Tensor]) -> None:
        """Write them down in this ledger; `entered` leaves it as it is."""
        self.delta_f.update(self.entered(evidence, keep).delta_f)

    def cut(self, take: Callable[[str, Tensor], Tensor]) -> Account:
        """The ledger of a smaller network; ``take`` gives what stays of a tensor shaped like a parameter."""
        return Account({name: take(name, values) for name, values in self.delta_f.items()})


@dataclass(frozen=True, slots=True, eq=False)
class StructureEvidence(Mapping[str, Tensor]):
    """E_g of every unit of every group; as a mapping group id to float64 nats ``(units,)``, positive = wanted.

    Attributes:
        nats: group id to E_g; infinite for units that read frozen parameters, of which nothing is known.
        held: group id to the number of living weights in each unit's scored cut; 0: nobody reads it, it goes for free.
        made: group id to the number of living weights that make each unit from others (matrices and filters, not
            biases and norm affines); 0: its output is a constant.
        gone: group id to the number of units removed before, for a learned rate.
        n_data: number of log-likelihood terms, for `per_example`.
        whole: ids of residual branches among the keys, of one unit each, which may go.
        least: group id to the number of units that have to stay, where that is more than one.
    """

    nats: Mapping[str, Tensor]
    held: Mapping[str, Tensor]
    made: Mapping[str, Tensor]
    gone: Mapping[str, int]
    n_data: float
    whole: frozenset[str] = frozenset()
    least: Mapping[str, int] = field(default_factory=dict)

    def only(self, keys: Collection[str]) -> Self:
        """The evidence of some groups."""
        tables = {f.name: getattr(self, f.name) for f in fields(self)}
        some = {n: {k: t[k] for k in keys if k in t} for n, t in tables.items() if isinstance(t, Mapping)}
        return replace(self, **cast(Any, some))

    def __getitem__(self, key: str) -> Tensor:
        """E_g of the units of one group."""
        return self.nats[key]

    def __iter__(self) -> Iterator[str]:
        """Group ids."""
        return iter(self.nats)

    def __len__(self) -> int:
        """Number of groups."""
        return len(self.nats)

    def per_example(self, key: str) -> Tensor:
        """E_g / N: nats per example, the scale on which removal is felt."""
        return self.nats[key] / self.n_data


def held_weights(log_odds: float = 0.0) -> Inside:
    """Over the weights that a unit still holds; p0 from the log-odds of the rule that removed the others."""

    def terms(evidence: Evidence, ledger: Account) -> Mapping[str, Tensor]:
        return {name: _spread(evidence, name, unit_evidence(evidence[name], log_odds)) for name in evidence.posterior}

    return terms


def all_masks(*, strength: float = 1.0) -> Inside:
    """Over all weights, the removed ones with the delta_f of the ledger; p0 learned per parameter tensor.

    The rate of weights that are on solves p0 = mean of sigma(ln p0/(1 - p0) - delta_f), with ``strength`` as the
    pseudo-count of one weight on and one off; removed weights of which nothing is known count as off. A weight that a
    unit holds then has to pay for being on, ln 1/p0, and only what is beyond that speaks for the unit.
    """

    def terms(evidence: Evidence, ledger: Account) -> Mapping[str, Tensor]:
        found = {}
        for name in evidence.posterior:
            odds = _rate(evidence, ledger, name, strength)
            found[name] = _spread(evidence, name, unit_evidence(evidence[name], odds))
            if name in ledger.delta_f:
                gone = ~evidence.posterior[name].keep
                past = unit_evidence(ledger.delta_f[name][gone], odds)
                found[name][gone] = past.nan_to_num(nan=0.0)
        return found

    return terms


def _spread(evidence: Evidence, name: str, living: Tensor) -> Tensor:
    """Values of the living weights in the shape of their parameter, 0 elsewhere."""
    keep = evidence.posterior[name].keep
    wide = torch.zeros(keep.shape, dtype=torch.float64, device=keep.device)
    wide[keep] = living
    return wide


def _rate(evidence: Evidence, ledger: Account, name: str, strength: float) -> float:
    """Log odds that a weight stays, from delta_f where it is known and the removed weights of which it is not."""
    keep = evidence.posterior[name].keep
    known = [evidence[name].double()]
    if name in ledger.delta_f:
        past = ledger.delta_f[name][~keep].double()
        known.append(past[~past.isnan()])
    delta = torch.cat(known)
    off, odds = keep.numel() - delta.numel(), 0.0
    for _ in range(200):
        on = float(torch.sigmoid(odds - delta).sum())
        new = math.log(on + strength) - math.log(delta.numel() - on + off + strength)
        if abs(new - odds) < 1e-8:
            break
        odds = new
    return odds


def unit_evidence(delta_f: Tensor, log_odds: float | Tensor = 0.0) -> Tensor:
    r"""``ln[(1 - p0) + p0 exp(-delta_f)]``, elementwise, float64 nats, with log_odds = ln p0/(1 - p0).

    Stable as softplus(log_odds - delta_f) - softplus(log_odds). As p0 -> 1 it becomes -delta_f (no masks inside).

    >>> unit_evidence(torch.tensor([-40.0, 0.0, 40.0])).tolist()  # about 40 - ln 2, 0, -ln 2
    [39.30685281944005, 0.0, -0.6931471805599453]
    """
    odds = torch.as_tensor(log_odds, dtype=torch.float64, device=delta_f.device)
    return softplus(odds - delta_f.double(), threshold=700.0) - softplus(odds, threshold=700.0)


def score_structures(
    evidence: Evidence,
    groups: Iterable[GroupLike],
    *,
    cut: CutOf = outgoing,
    inside: Inside | None = None,
    ledger: Account | None = None,
    gone: Mapping[str, int] | None = None,
) -> StructureEvidence:
    """Score the units of traced groups; `Evidence.by_group` is this function.

    Args:
        evidence: score of the living weights, after the single weights of this round went.
        groups: result of `ockham.trace`.
        cut: the side that is scored.
        inside: choice of the weights of a cut that count, and of their p0; default `held_weights()`.
        ledger: delta_f of the removed weights.
        gone: group id to units removed before.

    Raises:
        OckhamError: a cut names a parameter of another shape than the posterior's: trace the network it belongs to.
    """
    groups, found = list(groups), (inside or held_weights())(evidence, ledger or Account())
    terms = {name: values.reshape(-1) for name, values in found.items()}
    alive = {name: g.keep.reshape(-1) for name, g in evidence.posterior.items()}
    nats, held, made = {}, {}, {}
    for group in groups:
        for name, at in (*group.outgoing_cuts(), *group.incoming_cuts()):
            if name in alive and int(at.max()) >= alive[name].numel():
                raise OckhamError(
                    f"group {group.id!r} speaks of weight {int(at.max())} of {name!r}, of which this posterior has "
                    f"{alive[name].numel()}: trace the network the posterior belongs to"
                )
        nats[group.id] = summed(cut(group), terms, group.size, unknown=math.inf)
        held[group.id] = summed(cut(group), alive, group.size, unknown=1.0).long()
        if getattr(group, "router", ""):  # a silent expert is read by nothing, and yet its tokens would go to others
            held[group.id] = held[group.id].clamp(min=1)
        matrices = [(n, at) for n, at in group.incoming_cuts() if n not in alive or evidence.posterior[n].mean.ndim > 1]
        made[group.id] = summed(matrices, alive, group.size, unknown=1.0).long()
    least = {group.id: getattr(group, "least", 1) for group in groups}
    return StructureEvidence(nats, held, made, dict(gone or {}), evidence.posterior.n_data, least=least)


@singledispatch
def structures_from(source: Any, groups: Iterable[GroupLike]) -> StructureEvidence:
    """Structure evidence from what a user has at hand: itself, `Evidence`, or a `Posterior` that is scored here.

    A posterior with correlated matrices is scored by columns (`ockham.choose.correlated.score_columns`).

    Raises:
        OckhamError: anything else.
    """
    raise OckhamError(f"evidence of structures comes from a posterior or its score; got {type(source).__name__}")


@structures_from.register
def _(source: StructureEvidence, groups: Iterable[GroupLike]) -> StructureEvidence:
    return source


@structures_from.register
def _(source: Evidence, groups: Iterable[GroupLike]) -> StructureEvidence:
    from ockham.choose.correlated import with_branches

    return with_branches(score_structures(source, groups), source.posterior, groups)


@structures_from.register
def _(source: Posterior, groups: Iterable[GroupLike]) -> StructureEvidence:
    from ockham.choose.correlated import score_columns, with_branches

    found = score_columns(source, groups) if source.matrices else score_structures(score(source), groups)
    return with_branches(found, source, groups)


def summed(cuts: Collection[tuple[str, Tensor]], values: Mapping[str, Tensor], size: int, *, unknown: float) -> Tensor:
    """Sum over the weights of every unit, each once; a weight without a posterior (a frozen one) counts ``unknown``."""
    total = torch.zeros(size, dtype=torch.float64)
    by_name: dict[str, list[Tensor]] = {}
    for name, at in cuts:
        if name in values:
            by_name.setdefault(name, []).append(at)
        else:
            total += unknown * at.shape[1]
    for name, parts in by_name.items():
        flat = values[name]
        at = (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(flat.device)
        found = flat[at].double()
        if len(parts) > 1:  # a parameter that reads a unit along two dimensions holds the crossing twice
            order = at.sort(dim=1)
            twice = torch.zeros_like(found, dtype=torch.bool)
            twice[:, 1:] = order.values[:, 1:] == order.values[:, :-1]
            found = found.gather(1, order.indices).masked_fill(twice, 0.0)
        total += found.sum(1).cpu()
    return total


def units_of(groups: Iterable[GroupLike], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, Tensor]]:
    """Structures as a prior with one scale each wants them: all weights that make a unit share its number.

    Args:
        groups: result of `ockham.trace`.
        shapes: parameter name to shape.

    Returns:
        Parameter name to (dimension, number of the unit of each index), for `ockham.GroupScale(units=...)`; parameters
        that make no removable unit along a whole dimension are left out.
    """
    found: dict[str, tuple[int, Tensor]] = {}
    start = 0
    for group in groups:
        for name, at in group.incoming_cuts():
            if name not in shapes or name in found:
                continue
            flat = torch.full((math.prod(shapes[name]),), -1)
            flat[at] = torch.arange(start, start + len(at))[:, None].expand_as(at)
            for dim, size in enumerate(shapes[name]):
                rows = flat.view(shapes[name]).movedim(dim, 0).reshape(size, -1)
                if bool((rows == rows[:, :1]).all()) and bool((rows >= 0).all()):
                    found[name] = dim, rows[:, 0].clone()
                    break
        start += group.size
    return found


_IDLE = -1.0  # nats at most that a unit which nobody reads is worth: it goes, whatever its price
_MOST = 1e12  # nats; keeps sums exact where a worth is infinite


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Which units stay.

    Attributes:
        keep: group id to boolean ``(units,)``, True = stays.
        forced: ids of groups in which nothing was worth its price and the best was kept all the same.
    """

    keep: Mapping[str, Tensor]
    forced: tuple[str, ...]


Multiples = int | Mapping[str, int]
"""What widths are multiples of: one number, or group id to a number (groups left out: 1)."""


def multiple_of(round_to: Multiples, key: str) -> int:
    """The number of which the width of one group is a multiple."""
    return round_to if isinstance(round_to, int) else round_to.get(key, 1)


def choose_units(
    evidence: StructureEvidence, prices: Mapping[str, Tensor], *, round_to: Multiples = 1, cap: float = 1.0
) -> Choice:
    """Keep the units with E_g >= price; remove those that nobody reads; keep at least one (or ``round_to``) of a group.

    With ``round_to`` the width of a group becomes a multiple of it (or stays whole): of all such widths the one whose
    best units are worth most in sum, sum (E_g - price).

    Args:
        evidence: score of the units.
        prices: group id to nats ``(units,)``.
        round_to: hardware-friendly multiple, at least 1; or one a group.
        cap: largest share of the units of a group that goes at once, those that nobody reads aside: units that stand
            in for each other look dispensable one by one, so leave time to refit.

    Raises:
        OckhamError: ``round_to`` below 1 or ``cap`` no share.
    """
    if min((multiple_of(round_to, key) for key in evidence), default=1) < 1 or not 0 < cap <= 1:
        raise OckhamError(f"round_to is at least 1 and cap a share in (0, 1]; got {round_to} and {cap}")
    keep, forced = {}, []
    for key, nats in evidence.items():
        worth = nats - prices[key]
        worth = torch.where(evidence.held[key] > 0, worth, worth.clamp(max=_IDLE)).clamp(-_MOST, _MOST)
        if key in evidence.whole:
            keep[key] = worth >= 0
            continue
        read = int((evidence.held[key] > 0).sum())
        least = max(evidence.least.get(key, 1), read - max(1, int(cap * read)) if cap < 1 else 1)
        multiple = multiple_of(round_to, key)
        widths = [w for w in (*range(multiple, len(worth), multiple), len(worth)) if w >= least]
        sums: list[float] = worth.sort(descending=True).values.cumsum(0)[torch.tensor(widths) - 1].tolist()
        best = max(sums)
        count = max(w for w, s in zip(widths, sums, strict=True) if s == best)
        keep[key] = torch.zeros(len(worth), dtype=torch.bool)
        keep[key][torch.argsort(worth, descending=True, stable=True)[:count]] = True
        if not bool((worth >= 0).any()):
            forced.append(key)
    return Choice(keep, tuple(forced))


NodeRule = Callable[[Tensor, Tensor], Tensor]
"""(pi of the outgoing weights [consumers, nodes], inclusion of the consumers [consumers]) to inclusion [nodes]."""


def by_path(pi: Tensor, consumers: Tensor) -> Tensor:
    """The default: 1 - prod_k (1 - pi_jk a_k), probability of a living path if the weights are independent."""
    return 1 - _log_none(pi * consumers.unsqueeze(1)).sum(0).exp()


def by_product(pi: Tensor, consumers: Tensor) -> Tensor:
    """1 - prod_k (1 - pi_jk), consumers taken as alive. Inflates noise: 400 weights at pi = .035 give 1.0."""
    return 1 - _log_none(pi).sum(0).exp()


def by_max(pi: Tensor, consumers: Tensor) -> Tensor:
    """max_k pi_jk, consumers taken as alive. Does not add up weak weights; counts weights into dead nodes."""
    return pi.amax(0)


@dataclass(frozen=True, slots=True, eq=False)
class Nodes:
    """Inclusion of the nodes of a chain.

    Attributes:
        inputs: inclusion of each input, shape [inputs]; the importance of a feature.
        hidden: weight's name to the inclusion of the nodes it *makes* (its outputs), all but the last layer's.
    """

    inputs: Tensor
    hidden: Mapping[str, Tensor]


def node_inclusion(
    weights: Mapping[str, Tensor], order: Sequence[str] | None = None, rule: NodeRule = by_path
) -> Nodes:
    """Inclusion of nodes and inputs of a chain of layers.

    Args:
        weights: weight's name to inclusion probabilities [outputs, inputs] (more dimensions, kernels, are combined by
            1 - prod(1 - pi)); neighbours must fit. Flattened images between a convolution and a linear layer fit where
            the inputs are a multiple of the outputs before.
        order: names from input to output; default the order of ``weights``.
        rule: `by_path` (default), `by_product` or `by_max`.

    Raises:
        OckhamError: no weights, or neighbours that do not fit.

    >>> first = torch.tensor([[0.9, 0.1], [0.9, 0.9]])
    >>> last = torch.tensor([[1.0, 0.0]])
    >>> node_inclusion({"fc1": first, "fc2": last}).inputs
    tensor([0.9000, 0.1000])
    """
    names = list(weights if order is None else order)
    if not names:
        raise OckhamError("node_inclusion needs at least one weight matrix")
    alive = torch.ones(weights[names[-1]].shape[0], dtype=torch.float64, device=weights[names[-1]].device)
    hidden: dict[str, Tensor] = {}
    for name in reversed(names):
        pi = weights[name].double()
        if pi.ndim < 2 or len(pi) != len(alive):
            raise OckhamError(f"{name!r}: inclusion of shape [{len(alive)}, inputs] expected; got {tuple(pi.shape)}")
        kernels = pi.flatten(2) if pi.ndim > 2 else pi.unsqueeze(2)
        alive = rule(1 - _log_none(kernels).sum(2).exp(), alive)
        if name != names[0]:
            before = names[names.index(name) - 1]
            outputs = weights[before].shape[0]
            if len(alive) % outputs:
                raise OckhamError(
                    f"{before!r} makes {outputs} outputs, {name!r} reads {len(alive)} inputs: not a chain"
                )
            alive = 1 - _log_none(alive.view(outputs, -1)).sum(1).exp()  # a node may feed several inputs (flattened)
            hidden[before] = alive
    kind = weights[names[0]].dtype
    return Nodes(alive.to(kind), {n: hidden[n].to(kind) for n in names[:-1]})


def chain_weights(model: nn.Module, posterior: Posterior) -> dict[str, Tensor]:
    """Inclusion of the weights of a chain of Linear and convolution layers, in the order of the network.

    Raises:
        OckhamError: a posterior without inclusion probabilities (make them with `ockham.inclusion`), or a network whose
            layers are not a chain of children (`nn.Sequential` and the like): name the order yourself then.
    """
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            key = f"{name}.weight" if name else "weight"
            if key not in posterior or posterior[key].inclusion is None:
                raise OckhamError(f"the posterior has no inclusion probabilities for {key!r}; see ockham.inclusion")
            value = posterior[key].inclusion
            assert value is not None
            found[key] = value
    return found


def living(keep: Mapping[str, Tensor], order: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Masks without the weights that no path from an input to an output leads through.

    A unit lives where a living weight reads it and one feeds it; the weights of dead units, and their biases, are left
    out. A unit that only a bias feeds is a constant and counts as dead: refit, or fold it, if it mattered.

    Args:
        keep: boolean masks, True = stays: weights [outputs, inputs, ...] of a chain, and biases "....bias" beside them.
        order: names of the weights from input to output; default all of two or more dimensions, in their order.

    Returns:
        New masks by name; a flattened image between two layers counts as one unit per channel.

    Raises:
        OckhamError: neighbours that do not fit.

    >>> first, last = torch.tensor([[True, False], [False, False]]), torch.tensor([[True, True]])
    >>> living({"fc1.weight": first, "fc2.weight": last})["fc2.weight"]
    tensor([[ True, False]])
    """
    names = [n for n, m in keep.items() if m.ndim > 1] if order is None else list(order)
    found = {n: m.clone() for n, m in keep.items()}
    for _ in names:
        for before, after in pairwise(names):
            units = len(found[before])
            if found[after].shape[1] % units:
                raise OckhamError(
                    f"{before!r} makes {units} outputs, {after!r} reads {found[after].shape[1]}: no chain"
                )
            read = found[after].flatten(2).any(-1) if found[after].ndim > 2 else found[after]
            alive = read.any(0).view(units, -1).any(1) & found[before].flatten(1).any(1)
            found[before] &= alive.view(-1, *[1] * (found[before].ndim - 1))
            spread = alive.repeat_interleave(found[after].shape[1] // units)
            found[after] &= spread.view(1, -1, *[1] * (found[after].ndim - 2))
            bias = before.removesuffix("weight") + "bias"
            if bias in found:
                found[bias] &= alive
    return found


def _log_none(pi: Tensor) -> Tensor:
    return torch.log1p(-pi.clamp(0.0, 1.0))
