"""Fitting to a table: restarts, growth and removal by evidence, noise, inputs, draws, trees for what is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from ockham.tabular.data import Floats
from ockham.tabular.inclusion import Effort, State, believed, decide, drop_idle, search
from ockham.tabular.likelihoods import GaussianNoise, RowLikelihood, Student, log_scale, student_nll
from ockham.tabular.model import Model, Table
from ockham.tabular.network import Net
from ockham.tabular.predicting import Draws, ResidualTrees, Trees, hamiltonian

__all__ = ["FitPlan", "Fitted", "OnFitStep", "drawn", "fit", "residual_trees"]

_FIRST_ROWS, _NOISE_ROWS = 1500, 6000
_WORK = 3e10  # rows times weights times (weights + overhead) of all steps on a large table
_OVERHEAD = 60
_NOISE_UNITS = 16
_FAR = 0.1  # nats a row by which a network's evidence may be below the best's and it still predicts
_SETTLE = 20
_CHAINS, _WARMUP, _LEAPS = 8, 12, (6, 14)
_MOST_DRAWN = 4e5  # rows times weights from where draws are Gaussian about the mode
_STIFFEN = 0.1

_TREES: dict[str, Any] = {
    "max_iter": 200,
    "learning_rate": 0.1,
    "min_samples_leaf": 5,
    "max_features": 0.5,
    "early_stopping": False,
}
_HASTY: dict[str, Any] = {**_TREES, "max_iter": 10, "learning_rate": 0.5, "max_leaf_nodes": 15, "max_bins": 63}
_FEWEST, _MANY, _JUDGES = 100, 10_000, 4000  # rows: for trees at all, that folds are made of, that judge
_FOLDS, _SHUFFLES = 5, 3
_WORTH = 1.5  # nats of hasty trees, from which all of them are tried
_CLIP = 4.0  # working responses, in standard deviations of the noise or in logits

OnFitStep = Callable[[int, int, float], None]
"""(step, of at most, evidence in nats)."""


@dataclass(frozen=True, slots=True)
class FitPlan:
    """Settings of a fit.

    Attributes:
        hidden: units of each hidden layer at most.
        outputs: numbers that the network of the location or of the classes gives.
        restarts: searches side by side.
        steps: second-order steps at most.
        slab_variance: prior variance of living weights, centre of its hyper-prior.
        left_out: inputs that did not enter; they count as excluded.
        patience: attempts to grow without a rise of the evidence after which a search ends.
        seed: seed of random units, of rows that a search begins with and of draws.
    """

    hidden: tuple[int, ...]
    outputs: int
    restarts: int
    steps: int
    slab_variance: float
    left_out: int
    patience: int
    seed: int


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """What a fit found.

    Attributes:
        state: the model at its mode.
        inclusion: probability that each input is used, per network, [p] each.
        curve: evidence of the model that was best so far, nats.
        restarts: evidence of each restart when one was chosen, nats.
    """

    state: State
    inclusion: tuple[Tensor, ...]
    curve: tuple[float, ...]
    restarts: tuple[float, ...]


def fit(
    table: Table,
    likelihood: RowLikelihood,
    plan: FitPlan,
    *,
    start: Sequence[Fitted] = (),
    on_step: OnFitStep | None = None,
) -> tuple[Fitted, ...]:
    """Search on few rows from several starts, go on with all rows, then the noise and the inputs.

    On few rows several networks say the same with other units, and a mixture of them predicts better than the one with
    most evidence: all go on but those whose evidence is far below the best. On many rows the best goes on alone.

    Args:
        table: the data.
        likelihood: likelihood of the targets; one with a scale begins with equal noise.
        plan: settings.
        start: fits to go on from, instead of restarts.
        on_step: function called now and then.

    Returns:
        Networks that predict together, the one with most evidence first.

    Raises:
        NonFiniteLossError: the energy became NaN or infinite.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    curve: list[float] = []

    def on_state(state: State) -> None:
        curve.append(state.evidence)
        if on_step is not None:
            on_step(state.steps, plan.steps, state.evidence)

    order = torch.randperm(len(table.x), generator=generator)
    few = _first(table, order, _NOISE_ROWS if start else _FIRST_ROWS)
    if start:
        begun = [decide(replace(f.state.model, table=few), f.state.vector, _SETTLE, 0) for f in start]
        scores: tuple[float, ...] = start[0].restarts
    else:
        begun, begin = [], _linear(few, likelihood, plan)
        for r in range(plan.restarts):
            begin = replace(begin, steps=begun[-1].steps if begun else 0)
            share = plan.steps * (r + 1) // plan.restarts
            effort = Effort(plan.patience, share, generator, 0.5 if r % 2 else 1.0, on_state)
            begun.append(search(begin, 0, plan.hidden[-1] if plan.hidden else 0, effort))
        scores = tuple(s.evidence for s in begun)
        steps, far, alone = begun[-1].steps, max(scores) - _FAR * len(table.x), len(table.x) > _FIRST_ROWS
        kept = [max(begun, key=lambda s: s.evidence)] if alone else [s for s in begun if s.evidence >= far]
        begun = [replace(s, steps=steps) for s in kept]
    found, searched = [], tuple(curve)
    for k, state in enumerate(begun):
        curve.clear()
        done, inclusion = _finished(state, table, order, plan, Effort(1, 0, generator, 0.5, on_state), fresh=not start)
        on_state(done)
        before = start[k].state.steps if start else 0
        found.append(Fitted(replace(done, steps=done.steps + before), inclusion, (*searched, *curve), scores))
    return tuple(sorted(found, key=lambda f: -f.state.evidence))


def _finished(
    state: State, table: Table, order: Tensor, plan: FitPlan, effort: Effort, *, fresh: bool
) -> tuple[State, tuple[Tensor, ...]]:
    """A network that few rows gave, on all of them, with its noise and its inputs."""
    most, first = plan.hidden[-1] if plan.hidden else 0, len(state.model.table.x)
    patient = replace(effort, patience=max(1, plan.patience - 1))
    some = _first(table, order, _NOISE_ROWS)
    if len(some.x) > first or not fresh:
        state = _on(some, state)
        state = search(state, 0, most, replace(patient, steps=_affordable(state, plan)))
    if len(state.model.nets) == 2:
        state = _noisy(state, replace(patient, steps=plan.steps), fresh=fresh)
        state = search(state, 0, most, replace(effort, steps=_affordable(state, plan)))
    if len(table.x) > len(some.x):
        state = _on(table, state)
        state = search(state, 0, most, replace(effort, steps=_affordable(state, plan)))
    state = drop_idle(state, tuple(range(len(state.model.nets))))
    inside = []
    for t in range(len(state.model.nets)):
        state, found = believed(state, t, effort.generator)
        inside.append(found)
    return state, tuple(inside)


def _first(table: Table, order: Tensor, rows: int) -> Table:
    return table if len(order) <= rows else table.rows(order[:rows])


def _on(table: Table, state: State) -> State:
    """The same structure at its mode on other rows."""
    return decide(replace(state.model, table=table), state.vector, _SETTLE, state.steps)


def _affordable(state: State, plan: FitPlan) -> int:
    """Steps until which a search may go on."""
    size = 2 * len(state.vector)  # that it has before what came goes again
    return min(plan.steps, state.steps + int(_WORK / (len(state.model.table.x) * size * (size + _OVERHEAD))))


def _linear(table: Table, likelihood: RowLikelihood, plan: FitPlan) -> State:
    """The linear model of all inputs, at its mode."""
    p = table.x.shape[1]
    nets = [Net.linear(p, plan.outputs, len(plan.hidden))]
    centre = 0.0
    if isinstance(likelihood, (GaussianNoise, Student)):
        nets.append(Net.linear(p, 1, 1, reads=False))
        share = table.weight / table.weight.sum()
        variance = share @ (table.y - share @ table.y).square()
        if isinstance(likelihood, GaussianNoise):  # heavy tails are there for targets that say nothing about the scale
            centre = 0.5 * math.log(max(float(variance), 1e-12))
    size = sum(len(net) for net in nets)
    vector = torch.zeros(size + likelihood.extras, dtype=torch.float64)
    vector[size:] = likelihood.extra_mean
    if len(nets) == 2:
        vector[len(nets[0])] = centre
    precision = tuple(dict.fromkeys(net.keep, 1 / plan.slab_variance) for net in nets)
    model = Model(tuple(nets), likelihood, table, plan.slab_variance, precision, centre, plan.left_out)
    return decide(model, vector, _SETTLE)


def _noisy(state: State, effort: Effort, *, fresh: bool) -> State:
    """Student's t, its scale moved by what the data support: nothing, a linear model, or units as well."""
    model, vector = state.model, state.vector
    if isinstance(model.likelihood, GaussianNoise):
        model = replace(model, likelihood=Student(model.likelihood.floor))
        vector = torch.cat([vector, vector.new_full((1,), model.likelihood.extra_mean)])
        state = decide(model, vector, _SETTLE, state.steps)
    if fresh:
        begin, old = model.starts[1], model.nets[1]
        net = Net.linear(old.inputs, 1, 1)
        weights = vector.new_zeros(len(net))
        weights[net.spans["out.bias"]] = state.vector[begin : begin + len(old)][old.spans["out.bias"]]
        linear = torch.cat([state.vector[:begin], weights, state.vector[begin + len(old) :]])
        moved = drop_idle(decide(state.model.with_net(1, net), linear, _SETTLE, state.steps), (1,))
        state = moved if moved.evidence > state.evidence else replace(state, steps=moved.steps)
    return search(state, 1, _NOISE_UNITS, effort)


def drawn(state: State, draws: int, generator: torch.Generator) -> Draws:
    """Networks from the posterior of a model's weights about its mode; their model has an empty table.

    Hamiltonian Monte Carlo; on tables so large that chains would take minutes a Gaussian about the mode.
    Chains move by the metric plus a tenth of its diagonal: of directions that the data leave open, in which gains of
    units make up for each other, a straight line is a tangent only.
    """
    empty = replace(state.model, table=state.model.table.rows(slice(0)))
    if len(state.model.table.x) * len(state.vector) > _MOST_DRAWN:
        root = torch.linalg.cholesky(state.metric)
        noise = torch.randn(len(state.vector), draws, generator=generator, dtype=torch.float64)
        vectors = state.vector + torch.linalg.solve_triangular(root.T, noise, upper=True).T
        return Draws(empty, vectors, None, state.vector)
    chains, metric = min(_CHAINS, draws), state.metric + _STIFFEN * state.metric.diagonal().diag()
    found = hamiltonian(
        state.model.slopes,
        state.vector.expand(chains, -1),
        metric,
        rounds=math.ceil(draws / chains),
        warmup=_WARMUP,
        leaps=_LEAPS,
        generator=generator,
    )
    return Draws(empty, found.draws.flatten(0, 1)[:draws], found.acceptance)


def residual_trees(draws: Draws, table: Table, seed: int) -> ResidualTrees | None:
    r"""Boosted trees for what networks leave unexplained; None where held-out rows gain nothing by them.

    They are fitted to working responses of the networks, which stay as they are,

        z = -(d nll / d output) / information,    weights: information

    (of a regression the residuals themselves, weighed by the noise). Their share and the factor of the noise's scale
    have the greatest log density of held-out rows; that must rise by more than 1/2 ln n nats, the price of one
    parameter. They read the inputs that networks use, and others only where each brings more than the same price: it
    is then named, with the odds of the nats that held-out rows lose when it is shuffled (less two standard errors and
    the price). Of the noise's scale only the change counts: networks have seen the rows.

    Args:
        draws: networks that predict together.
        table: rows they were fitted to.
        seed: seed of folds and of the columns that a split looks at.

    References:
        Friedman, Hastie & Tibshirani (2000), *Additive logistic regression*, algorithm 3 (working responses).
    """
    reads = torch.stack([d.model.nets[0].used() > 0 for d in (draws, *draws.others)]).any(0)
    used, rest, n = reads.nonzero()[:, 0], (~reads).nonzero()[:, 0], len(table.x)
    if n < _FEWEST:
        return None
    price = 0.5 * math.log(max(float(table.weight.sum()), 1.0))
    few = table.rows(torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:_MANY])
    working = _working(draws, few)
    best = _tried(draws, few, working, used, seed)
    gain, inclusion = 0.0 if best is None else best.gain, torch.zeros(len(reads), dtype=torch.float64)
    every = _tried(draws, few, working, torch.arange(len(reads)), seed) if len(rest) else None
    if every is not None and every.gain > gain + price:
        lost = every.lost(rest)
        new = rest[lost > price]
        columns = torch.cat([used, new]).sort().values
        again = every if len(new) == len(rest) else _Trial(draws, few, working, columns, seed) if len(new) else None
        if again is not None and again.gain > gain + price * len(new):
            best, gain = again, again.gain
            inclusion[new] = torch.sigmoid(lost[lost > price] - price)
    if best is None or gain <= price:
        return None
    trees = _trees(table.x[:, best.columns].numpy(), *_working(draws, table), seed)
    return ResidualTrees(trees, best.columns, best.share, best.log_shrink, gain, inclusion)


def _working(draws: Draws, table: Table) -> tuple[Floats, Floats]:
    """Working responses and their weights, [n, K] each, at the mean output of all networks."""
    likelihood, extra = draws.model.likelihood, draws.extras.mean(0, keepdim=True)
    output = torch.cat([part.mean(0) for part in draws.outputs(table.x)])
    several = len(draws.model.nets[0].keep["out.bias"])
    information = likelihood.information(output, extra[0])[0].diagonal(dim1=1, dim2=2)[:, :several].clamp_min(1e-12)
    if isinstance(likelihood, Student):  # residuals: its slope would leave out what trees are for
        response, width = (table.y - output[:, 0]).unsqueeze(1), information.rsqrt()
    else:
        response = -likelihood.slopes(output.unsqueeze(0), extra, table.y)[0][0] / information
        width = torch.ones_like(information)
    response = response.clamp(-_CLIP * width, _CLIP * width)
    weight = information * table.weight.unsqueeze(1)
    return response.numpy(), weight.numpy()


def _tried(draws: Draws, table: Table, working: tuple[Floats, Floats], columns: Tensor, seed: int) -> _Trial | None:
    """A trial of some inputs; None where there are none, or where a few hasty trees bring less than 1.5 nats."""
    if not len(columns) or _worth(*working, table.x[:, columns].numpy(), seed) < _WORTH:
        return None
    return _Trial(draws, table, working, columns, seed)


def _worth(response: Floats, weight: Floats, x: Floats, seed: int) -> float:
    r"""Nats that a few hasty trees bring to rows they have not seen, to second order in what they say.

    sum_k (sum_n w z t)^2 / (2 sum_n w t^2)   where the share of output k is positive, t: said of row n
    """
    said, part = np.zeros_like(response), np.arange(len(x)) % _FOLDS
    for k in range(_FOLDS):
        train = part != k
        said[~train] = _trees(x[train], response[train], weight[train], seed, _HASTY).predict(x[~train])
    along = (weight * response * said).sum(0).clip(min=0.0)
    return float((along**2 / (weight * said**2).sum(0).clip(min=1e-300)).sum() / 2)


def _trees(x: Floats, response: Floats, weight: Floats, seed: int, effort: Mapping[str, Any] = _TREES) -> Trees:
    """Fitted to responses [n, K], whose weights need only be in proportion."""
    return Trees.fit(x, response, weight / weight.mean(0), random_state=seed, **effort)


class _Trial:
    """Trees of some inputs, judged by rows that they did not see.

    Args:
        draws: networks that predict together.
        table: rows in random order.
        working: what trees are fitted to, and its weights.
        columns: inputs that trees read.
        seed: seed of the trees.

    Attributes:
        share: factor of what they say.
        log_shrink: ln of the factor of the noise's scale.
        gain: nats gained for all rows.
    """

    def __init__(self, draws: Draws, table: Table, working: tuple[Floats, Floats], columns: Tensor, seed: int) -> None:
        self.columns, self._draws, self._table = columns, draws, table
        self._x, self._part = table.x[:, columns].numpy(), np.arange(len(table.x)) % _FOLDS
        self._weight = float(table.weight.sum())
        self._trees: list[Trees] = []
        response, weight = working
        for k in range(_FOLDS):
            train = self._part != k
            self._trees.append(_trees(self._x[train], response[train], weight[train], seed))
        self.share, self.log_shrink, gain = _weighed(*self._judges(self._x))
        self.gain = gain * self._weight

    def _judges(self, x: Floats) -> tuple[Draws, Table, Tensor]:
        """Rows that judge, at most 4,000, and what trees that have not seen them say of inputs [n, q]."""
        rows = np.arange(min(len(self._part), _JUDGES))
        said = np.zeros((len(rows), len(self._trees[0].sums)))
        for k, trees in enumerate(self._trees):
            mine = self._part[rows] == k
            said[mine] = trees.predict(x[rows[mine]])
        return self._draws, self._table.rows(torch.from_numpy(rows)), torch.from_numpy(said)

    def lost(self, columns: Tensor) -> Tensor:
        """Nats that all rows lose when the values of an input are shuffled, less two standard errors, of each [q]."""
        _, judges, said = self._judges(self._x)
        whole, found = _density(self._draws, judges, said)(self.share, self.log_shrink), []
        generator = torch.Generator().manual_seed(0)
        orders = [torch.randperm(len(self._x), generator=generator).numpy() for _ in range(_SHUFFLES)]
        for j in columns.tolist():
            shuffled, place = self._x.copy(), self.columns.tolist().index(j)
            fall = torch.zeros_like(whole)
            for order in orders:
                shuffled[:, place] = self._x[order, place]
                fall += whole - _density(*self._judges(shuffled))(self.share, self.log_shrink)
            fall = fall / _SHUFFLES * judges.weight / judges.weight.mean()
            found.append(float(fall.mean() - 2 * fall.std() / len(fall) ** 0.5) * self._weight)
        return torch.tensor(found, dtype=torch.float64)


def _density(draws: Draws, judges: Table, shift: Tensor) -> Callable[[float, float], Tensor]:
    """Log density of rows, nats, [n], by the share of shifts [n, K] and ln of the factor of the noise's scale."""
    output, extra = torch.cat(list(draws.outputs(judges.x)), 1), draws.extras
    likelihood = draws.model.likelihood
    if isinstance(likelihood, Student):
        residual, own = judges.y - output[..., 0], log_scale(output[..., 1], likelihood.floor)
        floor, freedom = likelihood.floor, 2 + extra.exp()

    def density(share: float, log_shrink: float) -> Tensor:
        if isinstance(likelihood, Student):
            nll = student_nll(residual - share * shift[:, 0], (own + log_shrink).clamp_min(floor), freedom)
        else:
            moved = output.clone()
            moved[..., : shift.shape[1]] += share * shift
            nll = likelihood.nll(moved, extra, judges.y)
        return (-nll).logsumexp(0) - math.log(len(nll))

    return density


def _weighed(draws: Draws, judges: Table, shift: Tensor) -> tuple[float, float, float]:
    """Share of shifts [n, K], ln of the scale's factor and nats gained a row, where the log density is greatest.

    The factor is that with trees over the one that is best without.
    """
    each, scaled = _density(draws, judges, shift), isinstance(draws.model.likelihood, Student)

    def density(share: float, log_shrink: float) -> float:
        return float(each(share, log_shrink) @ judges.weight / judges.weight.sum())

    bounds = [(0.0, 1.5), (-3.0, 1.0)][: 1 + scaled]
    start = [0.7, -0.1][: 1 + scaled]
    settings: dict[str, Any] = {"method": "L-BFGS-B", "options": {"ftol": 1e-6}}
    found = minimize(lambda p: -density(p[0], p[1] if scaled else 0.0), start, bounds=bounds, **settings)
    if not scaled:
        return float(found.x[0]), 0.0, -float(found.fun) - density(0.0, 0.0)
    alone = minimize(lambda p: -density(0.0, p[0]), start[1:], bounds=bounds[1:], **settings)
    return float(found.x[0]), float(found.x[1] - alone.x[0]), float(alone.fun - found.fun)
