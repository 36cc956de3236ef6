"""Which inputs are in: inclusion by evidence, and the search for the best subset."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from ockham.errors import NonFiniteLossError
from ockham.tabular.model import Model, which_inputs
from ockham.tabular.network import REACH, matched_units, random_units

__all__ = [
    "Effort",
    "State",
    "believed",
    "decide",
    "drop_idle",
    "grow",
    "inclusion_of",
    "input_removals",
    "search",
    "with_products",
    "without_inputs",
]


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
    return state, inclusion_of(
        state.evidence,
        {j: s.evidence for j, s in removed.items()},
        {pair: s.evidence for pair, s in swapped.items()},
        (state.model.nets[t].used() > 0),
        _additions(state, t, generator),
    )


def inclusion_of(
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
    removed = {j: without_inputs(state, t, [r]) for j, r in removals.items() if r.score > _SURE}
    swapped = {}
    if len(x) * len(state.vector) ** 2 <= _MOST_WORK:
        alike = torch.corrcoef(x[:_ROWS].T).nan_to_num() if x.shape[1] > 1 else torch.ones(1, 1)
        free = [k for k in range(x.shape[1]) if k not in used]
        for j in used:
            close = sorted(free, key=lambda k: -abs(float(alike[j, k])))[:_STANDINS]
            for k in (k for k in close if abs(float(alike[j, k])) > _LIKE):
                swapped[j, k] = _swapped(state, t, j, k, float(alike[j, k]))
    return removed, swapped


def _swapped(state: State, t: int, j: int, k: int, scale: float) -> State:
    """The model in which what reads input j reads k instead, at a mode."""
    net, begin = state.model.nets[t], state.model.starts[t]
    dense = net.tensors(state.vector[None, begin : begin + len(net)])
    keep = {name: mask.clone() for name, mask in net.keep.items()}
    for name in net.readers:
        dense[name][0, :, k], keep[name][:, k] = dense[name][0, :, j] * scale, keep[name][:, j]
        keep[name][:, j] = False
    pairs = tuple((k if a == j else a, k if b == j else b) for a, b in net.pairs)
    other = replace(net, keep=keep, pairs=pairs)
    weights = torch.cat([dense[n][0].flatten()[c] for n, c in other.cells.items()])
    vector = torch.cat([state.vector[:begin], weights, state.vector[begin + len(net) :]])
    return decide(state.model.with_net(t, other), vector, 10, state.steps, learn=0)


def _additions(state: State, t: int, generator: torch.Generator) -> Tensor:
    r"""Evidence for one more input, nats, [p]: mean over simple forms of it, times what is believed of one more.

        ln BF = 1/2 a^2 / (g + p) - 1/2 ln(1 + g / p),    a = sum_i wanted_i f(x_i),    g = sum_i weight_i f(x_i)^2

    of a form f in the best output, the input itself or a unit that reads it alone, less what the living weights can do
    in its place, with the prior precision p of a direct weight; and the sum over products with another input.
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
    count, every = int(used.sum()), net.inputs + model.left_out
    odds = which_inputs(count + 1, every) - which_inputs(count, every)
    found = torch.zeros(net.inputs, dtype=torch.float64)
    linear = factors[0]
    if bends:  # a priori an input that bends something is a quarter of those that do anything
        bent = factors[1:].logsumexp(0) - math.log(bends)
        linear = torch.logaddexp(linear + math.log(0.75), bent + math.log(0.25))
    found[free] = linear + odds
    if net.inputs > 1:  # or as a factor of a product with one that is used, or with another that is not
        some, factors = product_factors(state, t)
        partner = used[some]
        two = which_inputs(count + 2, every) - which_inputs(count, every)
        slots = [
            outputs * c * (c - 1) // 2 for c in (count + 1, count + 2)
        ]  # for weights of products, how many uniform
        price = torch.where(partner, odds - math.log1p(slots[0]), two - math.log1p(slots[1]))
        together = factors + price
        together.fill_diagonal_(-torch.inf)
        worth = together.logsumexp(1)
        found[some] = torch.where(partner, found[some], torch.logaddexp(found[some], worth))
    return found


def _bent(columns: Tensor, kind: int, at: Tensor) -> Tensor:
    """Units that read one column each: hyperbolic tangents (odd kinds) and rectifiers about a row."""
    return torch.tanh(columns - at) if kind % 2 else (columns - at).clamp_min(0.0)


def _spread(columns: Tensor) -> Tensor:
    """Standard deviation of each column, so that the prior of a weight means the same for all."""
    return columns.std(0, correction=0).clamp_min(1e-6)


_TOLERANCE, _ROUGH = 0.01, 0.05  # nats: of a mode, and of a mode on trial
_TRIAL_STEPS, _GROWTH_STEPS = 6, 8
_MARGIN, _MARGIN_PER_ROW = 0.5, 2e-4  # nats: what more units must bring
_RANDOM_UNITS = 200
_PAIRS, _PAIRED = 8, 400  # products that come at once; inputs among which they are looked for
_ALIKE = 0.7  # correlation from where two inputs have no product
_UNSURE = 3.0  # nats below zero from which nobody tries a product
_REFUSALS = 3
_FIRST_UNITS = 4
_ROWS = 4096


@dataclass(frozen=True, eq=False)
class State:
    """A model at a mode.

    Attributes:
        model: networks, likelihood, priors and data.
        vector: weights and extras, [d].
        metric: Fisher information and prior precision there, [d, d].
        evidence: ln p(data, structure), nats.
        steps: second-order steps taken so far, in all.
    """

    model: Model
    vector: Tensor
    metric: Tensor
    evidence: float
    steps: int


@dataclass(frozen=True, eq=False)
class _Removal:
    """Weights of one network that may go together: evidence for it, their positions, and what is free to make up."""

    score: float
    members: Tensor
    free: Tensor


def decide(
    model: Model, vector: Tensor, steps: int, before: int = 0, *, learn: int = 1, tolerance: float = _TOLERANCE
) -> State:
    """Levenberg-Marquardt steps to a mode, and in between slab variances that fit.

    Args:
        model: the model.
        vector: where to begin, [d].
        steps: most steps, each time.
        before: steps taken before, for the count.
        learn: times that slab variances are learned.
        tolerance: nats below which a step is the last.

    Raises:
        NonFiniteLossError: the energy is not finite where it begins.
    """
    here = model.passed(vector)
    if not math.isfinite(here.energy):
        raise NonFiniteLossError(f"the energy of a table's network became {here.energy}; are there huge targets?")
    while True:
        slope, metric = model.expand(here)
        damping, taken = 1e-3, 0
        while taken < steps and damping < 1e8:
            damped = metric.clone()
            damped.diagonal().mul_(1 + damping)
            root, info = torch.linalg.cholesky_ex(damped)
            step = -torch.cholesky_solve(slope.unsqueeze(1), root)[:, 0]
            there = model.passed(here.vector + step) if int(info) == 0 else here
            gain = here.energy - there.energy
            if there is here or not gain >= 0:
                damping *= 8
                continue
            expected = -float(slope @ step + 0.5 * step @ (metric @ step))
            damping = max(damping / 8, 1e-8) if gain > 0.5 * expected else damping * (4 if gain < 0.2 * expected else 1)
            here, taken = there, taken + 1
            slope, metric = model.expand(here)
            if gain < tolerance:
                break
        before, learn = before + taken, learn - 1
        if learn < 0:
            return State(model, here.vector, metric, model.evidence(here.energy, metric), before)
        model = model.learned(here.vector, torch.cholesky_inverse(torch.linalg.cholesky(metric)).diagonal())
        here = model.passed(here.vector)


@dataclass(frozen=True, eq=False)
class Effort:
    """How long a search goes on.

    Attributes:
        patience: attempts without success after which it ends, each with half as many units as the one before.
        steps: second-order steps after which no attempt begins.
        generator: source of random units.
        smooth: share of hyperbolic tangents among them.
        on_state: function called with every state on the way.
    """

    patience: int
    steps: int
    generator: torch.Generator
    smooth: float
    on_state: Callable[[State], None]


def search(state: State, t: int, most: int, effort: Effort) -> State:
    """Add units to a network (at most so many in its last hidden layer) and prune, as long as the evidence rises."""
    state, failed, looked = drop_idle(state, (t,)), 0, False
    effort.on_state(state)
    while failed < effort.patience and state.steps < effort.steps:
        if not looked and (pairs := likely_products(state, t)):
            trial = drop_idle(with_products(state, t, pairs), (t,))
            looked = trial.evidence <= state.evidence + _MARGIN + _MARGIN_PER_ROW * len(trial.model.table.x)
            state = replace(state, steps=trial.steps) if looked else trial
            effort.on_state(state)
            continue
        looked = True
        net = state.model.nets[t]
        units = net.units[-1] if net.smooth else most
        more = min(max(1, max(_FIRST_UNITS, units // 3) >> failed), most - units)
        if more <= 0:
            break
        trial = drop_idle(grow(state, t, more, effort.generator, effort.smooth), (t,))
        better = trial.evidence > state.evidence + _MARGIN + _MARGIN_PER_ROW * len(trial.model.table.x)
        state, failed = (trial, 0) if better else (replace(state, steps=trial.steps), failed + 1)
        looked = looked and not better
        effort.on_state(state)
    return state


# ---------------------------------------------------------------------- what goes


def drop_idle(state: State, nets: tuple[int, ...]) -> State:
    """Remove units, inputs and weights of some networks as long as the whole evidence rises."""
    kinds: tuple[Callable[[State, int], list[_Removal]], ...] = (_units, input_removals, _weights)
    changed = True
    while changed:
        before = state
        for t, kind in product(nets, kinds):
            found = sorted((r for r in kind(state, t) if r.score > 0), key=lambda r: -r.score)
            size, begin = math.ceil(len(found) / 3), 0  # a third of them at once where the evidence allows
            while begin < min(len(found), _REFUSALS):
                trial = without_inputs(state, t, found[begin : begin + size])
                if trial.evidence > state.evidence:
                    state = trial
                    found = sorted((r for r in kind(state, t) if r.score > 0), key=lambda r: -r.score)
                    size, begin = math.ceil(len(found) / 3), 0
                elif size > 1:
                    size = max(1, size // 3)
                else:
                    begin += 1
        changed = state is not before
        if changed:
            state = decide(state.model, state.vector, _TRIAL_STEPS, state.steps)
    return state


def without_inputs(state: State, t: int, removals: list[_Removal]) -> State:
    """The model without some weights of a network, at a mode near by: what is free makes up for them first."""
    net, begin = state.model.nets[t], state.model.starts[t]
    gone = torch.zeros(len(net), dtype=torch.bool)
    for removal in removals:
        gone[removal.members] = True
    free, vector = removals[0].free, state.vector.clone()
    lost, rest = begin + free[gone[free]], begin + free[~gone[free]]
    if len(lost) and len(rest):  # the minimum over the rest with the lost at zero: H_rr d = H_rl theta_l
        right = state.metric[rest][:, lost] @ vector[lost]
        vector[rest] += torch.linalg.solve(state.metric[rest][:, rest], right)
    smaller, stays = net.without(gone)
    end = begin + len(net)
    vector = torch.cat([vector[:begin], vector[begin:end][stays], vector[end:]])
    model = state.model.with_net(t, smaller)
    return decide(model, vector, _TRIAL_STEPS, state.steps, learn=0, tolerance=_ROUGH)


@dataclass(frozen=True, eq=False)
class _Block:
    """Posterior of some weights of a network while the rest stands still.

    Layers after a weight stand still: let them move too, and the gain of a unit, w dw + b db = v dv, would make up for
    the removal of any weight, which it does in the tangent and not in the network.
    """

    free: Tensor
    mean: Tensor
    covariance: Tensor
    prior: Tensor

    @staticmethod
    def of(state: State, t: int, names: list[str]) -> _Block:
        net, begin = state.model.nets[t], state.model.starts[t]
        free = torch.cat([torch.arange(net.spans[n].start, net.spans[n].stop) for n in names if n in net.spans])
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(state.metric[begin + free][:, begin + free]))
        return _Block(free, state.vector[begin + free], covariance, state.model.prior[1][begin + free])

    def removal(self, group: Tensor, more: float = 0.0) -> _Removal:
        """Savage-Dickey ratio of a group of them (positions among the free): ln p(0 | data) - ln p(0)."""
        root = torch.linalg.cholesky(self.covariance[group][:, group])
        solved = torch.linalg.solve_triangular(root, self.mean[group].unsqueeze(1), upper=False)
        volume = 0.5 * float(self.prior[group].log().sum()) + float(root.diagonal().log().sum())
        return _Removal(more - volume - 0.5 * float(solved.square().sum()), self.free[group], self.free)


def _weights(state: State, t: int) -> list[_Removal]:
    """Single weights that read something, and biases."""
    net, found = state.model.nets[t], []
    active = int((net.used() > 0).sum())
    for i in range(max(1, len(net.smooth))):
        names = [f"hidden.{i}.weight", f"hidden.{i}.bias", *([] if i else ["skip.weight", "pair.weight"])]
        block = _Block.of(state, t, [*names, "out.bias"])
        variance = block.covariance.diagonal()
        score = -0.5 * ((block.prior * variance).log() + block.mean.square() / variance)
        for name in names:
            if name not in net.spans:
                continue
            span = net.spans[name]
            living = span.stop - span.start
            slots = len(net.keep[name]) * active if name in net.readers else net.keep[name].numel()
            if name == "pair.weight":
                slots = len(net.keep[name]) * active * (active - 1) // 2
            here = (block.free >= span.start) & (block.free < span.stop)
            score[here] += math.log((slots - living + 1) / max(1, living))
        ends = (block.free >= net.spans["out.bias"].start) & (block.free < net.spans["out.bias"].stop)
        score[ends] = -math.inf
        places = (score > 0).nonzero()[:, 0].tolist()
        found += [_Removal(float(score[k]), block.free[k : k + 1], block.free) for k in places]
    return found


def input_removals(state: State, t: int) -> list[_Removal]:
    """All weights that read one input, of each input that is used, ascending."""
    net = state.model.nets[t]
    block = _Block.of(state, t, ["hidden.0.weight", "hidden.0.bias", "skip.weight", "pair.weight", "out.bias"])
    reads = net.reads[block.free]
    inputs = (net.used() > 0).nonzero()[:, 0].tolist()
    return [block.removal((reads == j).any(1).nonzero()[:, 0]) for j in inputs]


def _units(state: State, t: int) -> list[_Removal]:
    """Units of the last hidden layer: weights that read them go, and what feeds them returns to its prior."""
    net, begin = state.model.nets[t], state.model.starts[t]
    if not net.smooth or not net.units[-1]:
        return []
    block = _Block.of(state, t, ["out.weight", "skip.weight", "pair.weight", "out.bias"])
    prior = state.model.prior[1][begin : begin + len(net)]
    weight, bias = f"hidden.{len(net.smooth) - 1}.weight", f"hidden.{len(net.smooth) - 1}.bias"
    of_weight, of_bias = net.cells[weight] // net.keep[weight].shape[1], net.cells[bias]
    read, found = net.cells["out.weight"] % net.units[-1], []
    for u in range(net.units[-1]):
        into = [net.spans[weight].start + (of_weight == u).nonzero()[:, 0]]
        into += [net.spans[bias].start + (of_bias == u).nonzero()[:, 0]]
        fed = torch.cat(into)
        value = state.vector[begin + fed]
        volume = torch.linalg.slogdet(state.metric[begin + fed][:, begin + fed])[1] - prior[fed].log().sum()
        saved = 0.5 * float(volume + prior[fed] @ value.square())
        found.append(block.removal((read == u).nonzero()[:, 0], saved))
    return found


# ---------------------------------------------------------------------- what comes


def grow(state: State, t: int, units: int, generator: torch.Generator, kinds: float) -> State:
    """More units where the residuals ask for them, at a mode; not yet pruned.

    Random units are matched against the derivative of the log-likelihood, orthogonally to what the last layer reads;
    the best enter, the output weights are solved for, and then everything moves.
    """
    model, net = state.model, state.model.nets[t]
    begin, end = model.starts[t], model.starts[t] + len(net)
    table, rows = model.table, len(model.table.x)
    if rows > _ROWS:
        table = table.rows(torch.randperm(rows, generator=generator)[:_ROWS])
    information, wanted = model.pseudo_residuals(state.vector, table, t)
    weight = information.diagonal(dim1=1, dim2=2).mean(1)
    done = net.run(state.vector[None, begin:end], table.x)
    below, wider, fresh = table.x, table.x[:, :0], []
    for i in range(len(net.smooth)):
        last = i + 1 == len(net.smooth)
        if i:
            below = torch.cat([*(r[0] for r in done.read[i : i + 1]), wider], 1)
        likely = net.used() > 0 if i == 0 else torch.ones(below.shape[1], dtype=torch.bool)
        new = random_units(below, likely, _RANDOM_UNITS if last else units, table.weight, generator, kinds)
        z = below @ new["weight"].T + new["bias"]
        wider = torch.where(new["smooth"], torch.tanh(z), z.clamp_min(0))
        if last:
            basis = [table.x, *(r[0] for r in done.read[i + 1 :])]
            picked = matched_units(
                wider, torch.cat([torch.ones_like(weight).unsqueeze(1), *basis], 1), weight, wanted, units
            )
            new = {name: value[picked] for name, value in new.items()}
            new["out"] = table.x.new_zeros(wanted.shape[1], units)
        if i == 0:  # what is used elsewhere may be used here
            tiny = 1e-3 * torch.randn(new["weight"].shape, generator=generator, dtype=below.dtype)
            new["weight"] = torch.where((new["weight"] == 0) & (net.used() > 0), tiny, new["weight"])
        fresh.append(new)
    bigger, weights = net.grown(state.vector[begin:end], fresh)
    vector = torch.cat([state.vector[:begin], weights, state.vector[end:]])
    model = model.with_net(t, bigger)
    return decide(model, _solved(model, vector, t), _GROWTH_STEPS, state.steps)


def _solved(model: Model, vector: Tensor, t: int) -> Tensor:
    """The vector with output weights of a network at their minimum, the hidden layers as they are."""
    net, here = model.nets[t], model.passed(vector)
    slope, metric = model.expand(here)
    spans = (net.spans[n] for n in ("out.weight", "out.bias", "skip.weight", "pair.weight") if n in net.spans)
    free = model.starts[t] + torch.cat([torch.arange(s.start, s.stop) for s in spans])
    step = torch.zeros_like(vector)
    step[free] = -torch.linalg.solve(metric[free][:, free], slope[free])
    for _ in range(8):
        if model.passed(vector + step).energy <= here.energy:
            return vector + step
        step = step / 4
    return vector


def _total(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)


def product_factors(state: State, t: int) -> tuple[Tensor, Tensor]:
    r"""Evidence for the product of two inputs in a network, nats, without the price of choosing it.

        ln BF = 1/2 a^2 / (g + p) - 1/2 ln(1 + g / p),   a = sum_i wanted_i z_i,   g = sum_i weight_i z_i^2

    of a product z less its mean, with the prior precision p of its weight, in the best output.

    Returns:
        Inputs [m]: all of them or, of many, those that do most by themselves; and ln BF [m, m], minus infinity for
        inputs that are nearly the same.
    """
    model, net, x = state.model, state.model.nets[t], state.model.table.x
    n, p = x.shape
    asked = [(c.x.clamp(-REACH, REACH), *model.pseudo_residuals(state.vector, c, t)) for c in model.chunks]
    some = torch.arange(p)
    if p > _PAIRED:
        square = _total(rows.square().sum(0) for rows, _, _ in asked) / n
        linear = _total(pull.T @ rows for rows, _, pull in asked)
        curved = _total(pull.T @ (rows.square() - square) for rows, _, pull in asked)
        alone = torch.cat([linear, curved], 1).square().sum(0).view(2, p).amax(0)
        some = torch.cat([(net.used() > 0).nonzero()[:, 0], alone.topk(_PAIRED).indices]).unique()
        asked = [(rows[:, some], information, pull) for rows, information, pull in asked]
    mean = _total(rows.T @ rows for rows, _, _ in asked) / n
    best = torch.full_like(mean, -torch.inf)
    prior = model.precision[t].get("pair.weight", 1 / model.slab(t))
    for k in range(asked[0][2].shape[1]):
        size, along = torch.zeros_like(mean), torch.zeros_like(mean)
        for rows, information, pull in asked:  # all of them: what chance gives a part of the rows is not theirs
            weight, squares = information[:, k, k], rows.square()
            size += squares.T @ (squares * weight.unsqueeze(1)) + mean.square() * weight.sum()
            size -= 2 * mean * (rows.T @ (rows * weight.unsqueeze(1)))
            along += rows.T @ (rows * pull[:, k : k + 1]) - mean * pull[:, k].sum()
        size.clamp_min_(0.0)
        best = torch.maximum(best, 0.5 * along.square() / (size + prior) - 0.5 * (size / prior).log1p())
    x = x[:_ROWS, some].clamp(-REACH, REACH)
    if len(some) > 1:  # the product of two that are alike is nearly a square of either, and says nothing of both
        best[torch.corrcoef(x.T).nan_to_num().abs() > _ALIKE] = -torch.inf
    return some, best


def likely_products(state: State, t: int) -> list[tuple[int, int]]:
    """Pairs of inputs whose product might bring evidence, the choice among all pairs paid for: a few, best first."""
    net = state.model.nets[t]
    if net.inputs < 2:
        return []
    some, factors = product_factors(state, t)
    rows, columns = torch.triu_indices(len(some), len(some), 1)
    worth = factors[rows, columns] - math.log(net.inputs * (net.inputs - 1) / 2)
    order = worth.argsort(descending=True)[: _PAIRS + len(net.pairs)]
    found = [(int(some[rows[i]]), int(some[columns[i]])) for i in order if float(worth[i]) > -_UNSURE]
    return [pair for pair in found if pair not in net.pairs and pair[::-1] not in net.pairs][:_PAIRS]


def with_products(state: State, t: int, pairs: list[tuple[int, int]]) -> State:
    """The model with products of inputs in it, at a mode; not yet pruned."""
    begin, end = state.model.starts[t], state.model.starts[t + 1]
    net, weights = state.model.nets[t].paired(state.vector[begin:end], pairs)
    vector = torch.cat([state.vector[:begin], weights, state.vector[end:]])
    own = {"pair.weight": 1 / state.model.slab(t), **state.model.precision[t]}
    precision = (*state.model.precision[:t], own, *state.model.precision[t + 1 :])
    return decide(replace(state.model.with_net(t, net), precision=precision), vector, _GROWTH_STEPS, state.steps)
