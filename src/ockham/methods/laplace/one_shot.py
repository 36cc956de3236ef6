"""One-shot reduction of a trained network, alone and as a stage of a run."""

from __future__ import annotations

import itertools
import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ockham.choose.correlated import narrowed, removed_in_rounds
from ockham.choose.planning import plan
from ockham.choose.prices import Structures
from ockham.choose.rules import Diagnosis, diagnose
from ockham.core.batch import ReadBatch, ReadOutput, read_batch
from ockham.core.likelihood import Likelihood, Regression
from ockham.core.network import (
    Ignore,
    check_network,
    copied,
    evaluating,
    ignored,
    protected_names,
    seeded,
    watched,
)
from ockham.core.objective import Objective, fit_noise, objective_of
from ockham.core.posterior import POINT, Gaussian, Posterior
from ockham.core.processes import ALONE, Processes
from ockham.errors import OckhamError, OckhamWarning
from ockham.fit.mean_field import PointEstimate
from ockham.fit.predict import refresh_batchnorm
from ockham.methods.laplace.curvature import Score
from ockham.methods.laplace.posterior import (
    Curvature,
    FittedPrior,
    diagonal_curvature,
    evidence_prior_precision,
    joined,
    kronecker_curvature,
    laplace_posterior,
    mean_square_prior_precision,
)
from ockham.run.engine import Compressed, EpochInfo, Method, RunState, Task
from ockham.run.structures import example_of, structures_name
from ockham.surgery import shrink, trace
from ockham.surgery.groups import Groups, Plan
from ockham.surgery.refitting import check_model

__all__ = [
    "OneShot",
    "OneShotReduction",
    "compensate",
    "compensated",
    "laplace",
    "laplace_of",
    "reduce",
    "unscored",
    "with_means",
]


_T = TypeVar("_T")
_STRUCTURES: dict[str, Callable[..., Curvature]] = {"diagonal": diagonal_curvature, "kronecker": kronecker_curvature}
_PRIORS: dict[str, FittedPrior] = {"evidence": evidence_prior_precision, "mean-square": mean_square_prior_precision}
_DEFAULT_PRIOR = {"diagonal": "mean-square", "kronecker": "evidence"}


def laplace(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    structure: str = "kronecker",
    likelihood: str | Likelihood = "classification",
    n_data: float | None = None,
    prior: str | float | None = None,
    fisher: str = "monte-carlo",
    noise_variance: float | Tensor | None = None,
    seed: int = 0,
    batch: ReadBatch | None = None,
    output: ReadOutput | None = None,
    sharded: bool = False,
) -> Posterior:
    r"""A Gaussian posterior of a trained network, from one pass over data.

        q(w) = N(trained weights, (H + P0 I)^-1),    H = curvature of the summed NLL x n_data / terms in the loader

    The network is read in evaluation mode and left as it was; frozen parameters have no posterior, nor have entries
    that the user fixed: padding rows of an Embedding, and what `torch.nn.utils.prune` masks.

    Args:
        model: trained network. It is not changed.
        loader: batches of (inputs, targets), (inputs, targets, weight) or mappings with "labels"; some thousand
            examples are enough.
        structure: "kronecker" (correlations inside each weight matrix: Linear, convolutions, recurrent weights, packed
            attention projections; a diagonal for the rest) or "diagonal" (any layer).
        likelihood: "classification", "regression", "binary", "poisson", "causal-lm", or with ``fisher="empirical"``
            any `Likelihood`.
        n_data: number of log-likelihood terms of the *training set*, where the loader holds a part of it. Default: the
            terms in the loader.
        prior: how the prior precision of a tensor or matrix is found. "evidence": it maximises the Laplace evidence
            (default for "kronecker"); "mean-square": 1 / mean square of its weights (default for "diagonal", whose own
            evidence overrates what it knows; docs: decisions); a number: the same everywhere, such as
            n_data x weight decay for weight decay on a mean loss.
        fisher: "monte-carlo" (targets drawn from the network: the GGN) or "empirical" (the data's targets).
        noise_variance: noise of a regression, one number or one an output; default the mean squared residual of every
            output, from a pass of its own.
        seed: seed of the drawn targets; global random state is not touched.
        batch: function from what the loader yields to an `ockham.Batch`, for loaders that yield something else.
        output: function that takes the logits or numbers out of what the network returns; ``.logits`` are found.
        sharded: whether every process of the default group reads its own part of the data (a `DistributedSampler`);
            sums are then added up over them, each eigendecomposes a share of the factors, and all get the posterior of
            the joined data. Drawn targets differ with the number of processes where they matter (classes), the
            empirical Fisher does not.

    Returns:
        `Posterior`; with "kronecker" its `marginal_precision` and `matrices` carry the correlations, of a regression
        `noise_variance` the noise.

    Raises:
        DataError: an empty loader, or inputs and targets that do not fit.
        OckhamError: an unknown name, a number out of range, a network without parameters or outputs.

    Reference: Daxberger et al. 2021, arXiv 2106.14806; Immer et al. 2021, arXiv 2104.04975.

    >>> net, data = torch.nn.Linear(3, 2), [(torch.randn(8, 3), torch.tensor([0, 1] * 4))]
    >>> laplace(net, data, structure="diagonal")
    Posterior(Laplace (diagonal, monte-carlo), 2 tensors, 8 of 8 weights kept)
    """
    objective = objective_of(model, likelihood, batch=batch, output=output)
    if isinstance(objective.likelihood, Regression):
        if noise_variance is None:
            fit_noise(model, loader, objective, sharded=sharded)
        else:
            objective.likelihood.set_noise(torch.as_tensor(noise_variance, dtype=torch.float64).reshape(-1))
    return laplace_of(
        model,
        loader,
        objective,
        structure=structure,
        n_data=n_data,
        prior=prior,
        fisher=fisher,
        seed=seed,
        sharded=sharded,
    )


def laplace_of(
    model: nn.Module,
    loader: Iterable[Any],
    objective: Objective,
    *,
    structure: str = "kronecker",
    n_data: float | None = None,
    prior: str | float | None = None,
    fisher: str = "monte-carlo",
    seed: int = 0,
    sharded: bool = False,
) -> Posterior:
    """The same as `laplace`, under an objective whose likelihood is ready: its noise is taken as it stands."""
    fit = _prior(prior, _named("structure", structure, _DEFAULT_PRIOR))
    score = Score(objective, _named("fisher", fisher, {"monte-carlo": False, "empirical": True}))
    processes = Processes.world() if sharded else ALONE
    with evaluating(model) as device, processes.together():
        generator = torch.Generator(device).manual_seed(seed + processes.rank)
        batches = watched(objective.checked(loader, model), "curvature", loader)
        curvature = _STRUCTURES[structure](model, batches, score, generator)
    curvature = joined(curvature) if sharded else curvature
    terms: object = curvature.terms if n_data is None else n_data
    if not isinstance(terms, numbers.Real) or not 0 < float(terms) < math.inf:
        raise OckhamError(f"n_data counts log-likelihood terms and must be positive; got {n_data}")
    source = f"Laplace ({structure}, {fisher})"
    found = laplace_posterior(model, curvature, n_data=float(terms), prior=fit, source=source, processes=processes)
    return replace(found, likelihood=objective.likelihood.kind, noise_variance=objective.likelihood.noise_variance)


def reduce(
    model: nn.Module, posterior: Posterior, keep: float | None = None, *, ignore: Ignore = (), rounds: int = 8
) -> nn.Module:
    """A smaller network from a posterior, without data and without refitting.

    Weights go in the order of P mean^2. Where the posterior is correlated (`laplace` with "kronecker") they go in
    rounds; after each the survivors of a weight matrix move to make good for what went, and are scored again.
    Vector parameters (biases, scales of norms) are not scored: they stay, and biases move with their weights.

    Args:
        model: the network that the posterior belongs to. It is not changed.
        posterior: posterior from any source.
        keep: share of the scored weights that stays. None: the evidence decides, weights go while delta_f > 0.
        ignore: parameters to protect: names, "re:" patterns, module names or types.
        rounds: how finely, where weights are correlated.

    Returns:
        A new network with exact zeros; statistics of BatchNorm are untouched, see `ockham.refresh_batchnorm`.

    Raises:
        OckhamError: posterior and model do not fit, nothing can be scored, or a share outside (0, 1].

    >>> net = torch.nn.Linear(4, 2)
    >>> posterior = laplace(net, [(torch.randn(64, 4), torch.tensor([0, 1] * 32))])
    >>> int((reduce(net, posterior, keep=0.5).weight == 0).sum())
    4
    """
    check_network(model)
    _fitting(model, posterior)
    protected = unscored(model, ignore)
    if not any(name not in protected for name in posterior):
        raise OckhamError("there is nothing to remove: the posterior has no weight matrix that is not protected")
    if keep is None:
        found = diagnose(posterior).warnings
        if found:
            warnings.warn(" ".join(found), OckhamWarning, stacklevel=2)
    small = removed_in_rounds(posterior, keep, protected, rounds)
    return with_means(model, small)


def compensate(model: nn.Module, posterior: Posterior, groups: Groups, plan: Plan) -> nn.Module:
    """A copy of a network in which nothing reads the units that a plan removes and the survivors make good for them.

    The columns of a weight matrix that read removed units become zero, the others move to their conditional mean under
    the Kronecker posterior (the bias with them). No data are read. `shrink` the copy with the same plan next; a network
    with BatchNorm then wants `refresh_batchnorm` or some fine-tuning.

    Args:
        model: the network that the posterior and the groups belong to. It is not changed.
        posterior: `laplace` with "kronecker". Of independent weights none moves.
        groups: what `trace` found.
        plan: which units go, from `plan`.

    Raises:
        OckhamError: posterior, groups or plan do not fit the model.

    >>> import ockham
    >>> net, x = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)), torch.randn(64, 3)
    >>> posterior, groups = laplace(net, [(x, torch.tensor([0, 1] * 32))]), ockham.trace(net, x)
    >>> plan = ockham.plan(groups, posterior, budget={"params": "50%"}, model=net, example_inputs=x)
    >>> small = ockham.shrink(compensate(net, posterior, groups, plan), plan)
    """
    return with_means(model, compensated(model, posterior, groups, plan))


def compensated(model: nn.Module, posterior: Posterior, groups: Groups, plan: Plan) -> Posterior:
    """The posterior of `compensate`: of the whole network's shapes, nothing reads the units that the plan removes."""
    check_model(plan, model)
    _fitting(model, posterior)
    keep = {}
    for key, lost in plan.removed.items():
        keep[key] = torch.ones(groups[key].size, dtype=torch.bool)
        keep[key][list(lost)] = False
    return narrowed(posterior, groups, keep)


def unscored(model: nn.Module, ignore: Ignore = ()) -> frozenset[str]:
    """Parameters from which a single reduction takes nothing: vectors, and what ``ignore`` covers."""
    return protected_names(model, ignore) | {name for name, p in model.named_parameters() if p.ndim < 2}


def _fitting(model: nn.Module, posterior: Posterior) -> None:
    shapes = {name: p.shape for name, p in model.named_parameters()}
    wrong = [name for name, g in posterior.items() if shapes.get(name) != g.mean.shape]
    if wrong:
        raise OckhamError(f"posterior and model do not fit: {wrong[:6]} differ in name or shape; load the right model")


@torch.no_grad()
def with_means(model: nn.Module, posterior: Posterior) -> nn.Module:
    """A copy of a network with the means of a posterior for its weights."""
    new = copied(model)
    for name, p in new.named_parameters():
        if name in posterior:
            p.copy_(posterior[name].mean)
    return new


def _prior(prior: str | float | None, default: str) -> FittedPrior:
    if isinstance(prior, (int, float)):
        if not 0 < prior < float("inf"):
            raise OckhamError(f"a prior precision must be positive and finite; got {prior}")
        return lambda curvature, mean: float(prior)
    return _named("prior", default if prior is None else prior, _PRIORS)


def _named(argument: str, name: str, table: Mapping[str, _T]) -> _T:
    if name not in table:
        raise OckhamError(f"{argument} must be one of {', '.join(map(repr, table))}; got {name!r}")
    return table[name]


@dataclass(frozen=True, slots=True)
class OneShot:
    """Settings of a job that prunes a trained network once.

    Attributes:
        structure: kind of the Laplace posterior, "diagonal" or "kronecker".
        keep: share of the scored weights that stays; None: the evidence decides.
        epochs: number of epochs of refitting, 0 for none.
        learning_rate: rate of refitting.
        structures: price and widths of whole units that go instead of single weights; None: single weights.
        budget: resource to the share of it that stays, with structures: one of "macs", "params" (learnable values) and
            "latency" (measured, batch 64), each of one example; None: the evidence decides.
        prior_variance: variance of the prior over every weight; None: fitted (see `ockham.laplace`).
        calibration: number of training examples, about, that the curvature is taken from, whole batches at even
            distances; it is scaled up to all of them.
        depth: whether residual branches may go as a whole, too, with structures.
    """

    structure: str
    keep: float | None = None
    epochs: int = 0
    learning_rate: float = 3e-4
    structures: Structures | None = None
    budget: Mapping[str, float] | None = None
    prior_variance: float | None = None
    calibration: int = 4000
    depth: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """State of a reduction in one shot."""

    task: Task
    scored: int  # weights of the posterior before
    small: Posterior
    diagnosis: Diagnosis
    plan: Plan | None


@dataclass(frozen=True, slots=True, eq=False)
class OneShotReduction(Method):
    """Laplace posterior of a trained network, reduction, and refitting of the survivors by Adam.

    The result is a point: its stored posterior has the means and masks only, and predictions are those of the network.
    (Draws from a Laplace posterior of a whole network predict worse than its mean.)

    Attributes:
        shot: posterior, budget, refit.
        ignore: parameters to protect.
    """

    shot: OneShot
    ignore: Ignore = ()
    stage = "prune"

    @property
    def name(self) -> str:
        """The posterior, as the command calls it."""
        return "kronecker" if self.shot.structure == "kronecker" else "laplace"

    @property
    def shuffle(self) -> bool:  # type: ignore[override]
        """Only a refit needs the examples in a new order every epoch."""
        return bool(self.shot.epochs)

    def start(self, network: nn.Module, task: Task) -> RunState:
        """Posterior and reduction; what is left is what the refit starts from."""
        s = self.shot
        prior = None if s.prior_variance is None else 1 / s.prior_variance
        with seeded(0, 0, torch.device("cpu")):
            examples = read_batch(next(iter(task.loader)), task.objective.batch).size * len(task.loader)
        some = itertools.islice(task.loader, 0, None, max(1, examples // s.calibration))
        given: dict[str, Any] = {"structure": s.structure, "prior": prior, "n_data": task.n_data}
        posterior = laplace_of(network, some, task.objective, **given)
        found = diagnose(posterior)
        if found.warnings:
            warnings.warn(" ".join(found.warnings), OckhamWarning, stacklevel=2)
        chosen = None
        if s.structures is None:
            small = removed_in_rounds(posterior, s.keep, unscored(network, self.ignore))
            model = with_means(network, small)
        else:
            example = example_of(task.loader, task.objective, network)
            kept, whole = tuple(sorted(ignored(network, self.ignore))), ["branches"] if s.depth else []
            groups = trace(network.eval(), example, ignore=kept, whole=whole)
            if s.depth and not groups.branches:
                warnings.warn(
                    "depth: this network has no residual branch (x + branch(x)) that zeros in its weights silence; "
                    "only units can go",
                    OckhamWarning,
                    stacklevel=2,
                )
            budget = None if s.budget is None else {name: f"{100 * share}%" for name, share in s.budget.items()}
            options: dict[str, Any] = {"price": s.structures.price, "round_to": s.structures.round_to, "budget": budget}
            chosen = plan(groups, posterior, model=network, example_inputs=example, **options)
            moved = compensated(network, posterior, groups, chosen)
            model, cut = shrink(with_means(network, moved), chosen, posterior=moved)
            small = Posterior(cut, posterior.n_data, posterior.temperature, posterior.source)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        optimizer = PointEstimate(named, n_data=task.n_data, lr=s.learning_rate)
        optimizer.remove({n: g.keep for n, g in small.items()})
        state = RunState.start(model, task.objective, optimizer, _Run(task, posterior.size(), small, found, chosen))
        if s.epochs:
            return state
        info = EpochInfo(1, *_looked_at(state), kept_share=small.kept() / posterior.size(), epochs=1, stage=self.stage)
        return replace(state, history=(info,))

    def after_epoch(self, state: RunState, info: EpochInfo) -> tuple[RunState, EpochInfo]:
        """Nothing goes after the one shot."""
        return state, replace(info, kept_share=state.own.small.kept() / state.own.scored)

    def settings(self) -> dict[str, Any]:
        """Plain values, for the record."""
        s = self.shot
        own = asdict(replace(s, structures=None)) | {"structures": structures_name(s.structures)}
        own |= {"keep_share": own.pop("keep"), "macs": None} | dict(own.pop("budget") or {})
        return {"one_shot": own.pop("structure"), "ignore": repr(self.ignore), **own}

    def result(self, state: RunState) -> Compressed:
        """Network, point posterior and plan."""
        own, model = state.own, state.network
        if self.shot.epochs:
            refresh_batchnorm(model, own.task.loader, batch=own.task.objective.batch)
        if isinstance(state.likelihood, Regression):
            fit_noise(model, own.task.loader, own.task.objective)
        values = {n: p.detach().clone() for n, p in model.named_parameters()}
        moments: dict[str, Gaussian] = {}
        for name, g in own.small.items():
            prior = g.prior_precision.expand(g.mean.shape).masked_fill(~g.keep, torch.inf)
            moments[name] = replace(g, mean=values[name], precision=prior, marginal_precision=None)
        point = Posterior(moments, own.small.n_data, 1.0, POINT)
        whole: dict[str, Any] = {"plan": own.plan, "parameters": own.task.parameters}
        model, point = own.task.objective.finished(copied(model, {}), point)
        return Compressed(model.eval(), point, (), state.history, own.diagnosis, point.noise_variance, **whole)


@torch.no_grad()
def _looked_at(state: RunState) -> tuple[float, float]:
    """Mean NLL and accuracy of the reduced network on the training data."""
    objective, losses, right, terms, count = state.objective, 0.0, 0.0, 0.0, 0
    with evaluating(state.network) as device, seeded(0, 0, device):
        for batch in objective.batches(state.own.task.loader, device):
            nll, output = objective.loss(state.network, batch)
            here = objective.terms(batch)
            losses, terms = losses + float(nll) * here, terms + here
            right, count = right + float(objective.right(output, batch)) * batch.size, count + batch.size
    return losses / max(1.0, terms), right / max(1, count)
