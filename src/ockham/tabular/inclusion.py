"""Which inputs a network rests on: whole evidences with and without each, and with another in its place."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ockham.tabular.search import State, input_removals, settle, without

__all__ = ["believed", "inclusion"]

_SURE = -30.0  # nats for a removal below which nobody asks further
_LIKE = 0.5  # correlation from where one input may stand in for another
_STANDINS = 2
_ROUNDS = 6
_MOST_WORK = 2e8  # rows times squared weights from where stand-ins are not tried
_FORMS = 8
_ROWS = 4096  # that correlations are taken from


def believed(state: State, t: int, generator: torch.Generator) -> tuple[State, Tensor]:
    """The best of a model and its neighbours, and the inclusion of every input of one of its networks.

    Neighbours are the model without an input, and with another one that is correlated in its place, each at a mode of
    its own with its whole evidence. While a neighbour has more evidence the search goes on from there.

    Returns:
        State, and probabilities [p] of the inputs by `inclusion` among its neighbours.
    """
    for _ in range(_ROUNDS):
        removed, swapped = _neighbours(state, t)
        best = max([*removed.values(), *swapped.values()], key=lambda s: s.evidence, default=state)
        if best.evidence <= state.evidence:
            break
        state = best
    return state, inclusion(
        state.evidence,
        {j: s.evidence for j, s in removed.items()},
        {pair: s.evidence for pair, s in swapped.items()},
        (state.model.nets[t].used() > 0),
        _additions(state, t, generator),
    )


def inclusion(
    here: float,
    removed: dict[int, float],
    swapped: dict[tuple[int, int], float],
    used: Tensor,
    added: Tensor,
) -> Tensor:
    r"""Probability of each input among a model and its neighbours.

        p(j in) = 1 - sum_{neighbours without j} Z / (Z_here + sum_{neighbours without j} Z)   for an input that is used
        p(k in) = sum_{neighbours with k} Z / (Z_here + sum_{neighbours with k} Z)             for one that is not

    Args:
        here: evidence of the model, nats.
        removed: evidence without an input; an input that is used and not here is certain.
        swapped: evidence with the second of a pair in the place of the first.
        used: mask of the inputs that are used, [p].
        added: evidence for adding each input, nats more than here, [p].
    """
    log_odds = torch.where(used, math.inf, added.double())
    for j, evidence in removed.items():
        log_odds[j] = here - evidence
    for (j, k), evidence in swapped.items():
        log_odds[j] = -torch.logaddexp(-log_odds[j], torch.tensor(evidence - here).double())
        log_odds[k] = torch.logaddexp(log_odds[k], torch.tensor(evidence - here).double())
    return torch.sigmoid(log_odds)


def _neighbours(state: State, t: int) -> tuple[dict[int, State], dict[tuple[int, int], State]]:
    """Models without an input, and with a correlated one in its place, as far as they are not out of the question."""
    net, x = state.model.nets[t], state.model.table.x
    used = (net.used() > 0).nonzero()[:, 0].tolist()
    removals = dict(zip(used, input_removals(state, t), strict=True)) if used else {}
    removed = {j: without(state, t, [r]) for j, r in removals.items() if r.score > _SURE}
    swapped = {}
    if len(x) * len(state.vector) ** 2 <= _MOST_WORK:
        rows = x[:_ROWS]
        alike = torch.corrcoef(rows.T).nan_to_num() if x.shape[1] > 1 else torch.ones(1, 1)
        free = [k for k in range(x.shape[1]) if k not in used]
        for j in used:
            close = sorted(free, key=lambda k: -abs(float(alike[j, k])))[:_STANDINS]
            for k in close:
                if abs(float(alike[j, k])) > _LIKE:
                    swapped[j, k] = _in_place_of(state, t, j, k, float(alike[j, k]))
    return removed, swapped


def _in_place_of(state: State, t: int, j: int, k: int, correlation: float) -> State:
    """The model whose weights of input j read input k instead, at a mode near by."""
    net, begin = state.model.nets[t], state.model.starts[t]
    dense = net.tensors(state.vector[None, begin : begin + len(net)])
    keep = {name: mask.clone() for name, mask in net.keep.items()}
    for name in net.readers:
        dense[name][0, :, k], keep[name][:, k] = dense[name][0, :, j] * correlation, keep[name][:, j]
        keep[name][:, j] = False
    other = replace(net, keep=keep)
    weights = torch.cat([dense[n][0].flatten()[c] for n, c in other.cells.items()])
    vector = torch.cat([state.vector[:begin], weights, state.vector[begin + len(net) :]])
    return settle(state.model.with_net(t, other), vector, 10, state.steps, learn=0)


def _additions(state: State, t: int, generator: torch.Generator) -> Tensor:
    r"""Evidence for one more input, nats, [p]: mean over simple forms of it, times what is believed of one more.

        ln BF = 1/2 a^2 / (g + p) - 1/2 ln(1 + g / p),    a = sum_i wanted_i f(x_i),    g = sum_i weight_i f(x_i)^2

    of a form f in the best output, the input itself or a unit that reads it alone, less what the living weights can do
    in its place, with the prior precision p of a direct weight.
    """
    model, net = state.model, state.model.nets[t]
    begin, end = model.starts[t], model.starts[t] + len(net)
    used = net.used() > 0
    free, x = (~used).nonzero()[:, 0], model.table.x
    if not len(free):
        return torch.zeros(net.inputs, dtype=torch.float64)
    bends = _FORMS if net.smooth else 0
    at = x[torch.randint(len(x), (bends,), generator=generator)][:, free]
    root = torch.linalg.cholesky(state.metric[begin:end, begin:end])
    prior = model.precision[t]["skip.weight"]
    outputs = len(net.keep["out.bias"])
    across = torch.zeros(outputs, end - begin, (bends + 1) * len(free), dtype=x.dtype)
    size, along = across.new_zeros(outputs, across.shape[2]), across.new_zeros(outputs, across.shape[2])
    for table in model.chunks:
        information, wanted = model.pseudo_residuals(state.vector, table, t)
        moves = net.jacobian(net.run(state.vector[None, begin:end], table.x), table.x)
        f = table.x[:, free]
        forms = torch.cat([f, *(_bent(f, i, a) for i, a in enumerate(at))], 1)
        across += (information @ moves).permute(1, 2, 0) @ forms
        size += information.diagonal(dim1=1, dim2=2).T @ forms.square()
        along += wanted.T @ forms
    log_factors = []
    spread = torch.cat([_spread(x[:, free])] + [_spread(_bent(x[:, free], i, a)) for i, a in enumerate(at)])
    across, along, size = across / spread, along / spread, size / spread.square()
    for k in range(outputs):
        left = (size[k] - torch.linalg.solve_triangular(root, across[k], upper=False).square().sum(0)).clamp_min(0.0)
        log_factors.append(0.5 * along[k].square() / (left + prior) - 0.5 * (1 + left / prior).log())
    factors = torch.stack(log_factors).amax(0).view(bends + 1, len(free))
    slots = net.inputs + model.left_out - int(used.sum())
    odds = math.log((int(used.sum()) + 1) / max(1, slots))
    found = torch.zeros(net.inputs, dtype=torch.float64)
    linear = factors[0]
    if bends:  # a priori an input that bends something is a quarter of those that do anything
        bent = factors[1:].logsumexp(0) - math.log(bends)
        linear = torch.logaddexp(linear + math.log(0.75), bent + math.log(0.25))
    found[free] = linear + odds
    return found


def _bent(columns: Tensor, kind: int, at: Tensor) -> Tensor:
    """Units that read one column each: hyperbolic tangents (odd kinds) and rectifiers about a row."""
    return torch.tanh(columns - at) if kind % 2 else (columns - at).clamp_min(0.0)


def _spread(columns: Tensor) -> Tensor:
    """Standard deviation of each column, so that the prior of a weight means the same for all."""
    return columns.std(0, correction=0).clamp_min(1e-6)
