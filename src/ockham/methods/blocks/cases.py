"""Calibration data as people have them, and what a network's answers to them are worth in nats.

A batch is a tensor, a tuple or list (inputs, targets), or a mapping of keyword inputs, perhaps with "labels". Without
targets a causal language model predicts its own next token; any other network is asked for the curvature of its own
predictive, for which no targets are needed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ockham.core.batch import PYTHON_ERRORS, Batch, asked, described, inputs_of, to_device
from ockham.core.likelihood import CausalLanguage, Classification, Likelihood, Loss, Regression, likelihood_from
from ockham.core.objective import DETACHED, blame
from ockham.core.processes import ALONE, Processes
from ockham.errors import DataError, OckhamError
from ockham.methods.laplace.curvature import DRAWS, fisher_noise, signs
from ockham.surgery.copies import configured

__all__ = [
    "BlockCall",
    "Case",
    "CaseObjective",
    "DenseRows",
    "add_gram_",
    "answer_tensor",
    "cases_from",
    "divergence",
    "dividing",
    "evaluating_blocks",
    "held_out",
    "objective_for",
    "own_cases",
    "symmetric",
    "team",
    "traced_inputs",
    "without_caches",
]

_POSITIONS = 512
_CASES = 8
_IGNORED = -100
_PROBE = 16
_TOKENS = 32
_HELD_EVERY = 4


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """Some examples that pass the network together.

    Attributes:
        args: positional inputs.
        kwargs: keyword inputs.
        target: what the data say, or None.
        mask: boolean ``[examples, positions]``, False where there is only padding; None without any.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Tensor | None = None
    mask: Tensor | None = None

    def inputs(self, model: nn.Module) -> Any:
        """Example inputs as `ockham.trace` takes them: positions, or names where there are any."""
        if not self.kwargs:
            return self.args
        return {**inspect.signature(model.forward).bind_partial(*self.args).arguments, **self.kwargs}

    def answer(self, model: nn.Module, output: Callable[[Any], Tensor]) -> Tensor:
        """What the network says, one tensor.

        Raises:
            DataError: the network cannot take these inputs.
        """
        try:
            found = model(*self.args, **self.kwargs)
        except PYTHON_ERRORS as error:
            given = [*(type(a).__name__ for a in self.args), *self.kwargs]
            raise DataError(
                f"{type(model).__name__} cannot take the calibration data's inputs ({', '.join(given)}): {error}. "
                "Pass batch=, a function from an item of the data to (inputs, targets)"
            ) from error
        answer = asked(output, found, "output= cannot read what the network returns")
        if not isinstance(answer, Tensor):
            raise DataError(f"output= must take a tensor out of what the network returns; got {described(answer)}")
        return answer


@dataclass(frozen=True, slots=True, eq=False)
class CaseObjective:
    """The likelihood of a network's answers.

    Attributes:
        name: what it is, for reports.
        nll: (answer, case) to the summed NLL in nats and the number of terms; None where the data have no targets.
        curvature: (answer, case, generator) to sums whose gradients make the curvature, each of them by itself.
        draws: number of those sums; more than one where they are drawn.
        terms: (answer, case) to the number of log-likelihood terms in a case.
        output: what the network returns to one tensor.
        rows: (answer, case) to what counts of an answer, ``[rows, numbers]``: logits where there are classes.
        classes: True where rows are logits, False where they are means of Gaussians.
    """

    name: str
    nll: Callable[[Tensor, Case], tuple[Tensor, int]] | None
    curvature: Callable[[Tensor, Case, torch.Generator], Iterator[Tensor]]
    draws: int
    terms: Callable[[Tensor, Case], int]
    output: Callable[[Any], Tensor] = field(repr=False)
    rows: Callable[[Tensor, Case], Tensor]
    classes: bool


def cases_from(
    calibration: Iterable[Any], batch: Callable[[Any], Any] | None, model: nn.Module, device: torch.device
) -> list[Case]:
    """Every batch of the calibration data as cases on the model's device; token batches are cut along examples.

    Cases are about a thousand tokens long at most, and at least eight where there are so many windows: some of them are
    held out to judge.

    Args:
        calibration: batches; a bare tensor is one of token windows ``[windows, positions]`` or inputs.
        batch: function from an item to inputs, (inputs, targets) or a `Batch`; None takes the item as it is.
        model: the network, whose ``config`` says whether it needs labels as inputs.
        device: where the cases shall lie.

    Raises:
        DataError: no batches, or items that are no tensors, tuples or mappings.
    """
    items = [calibration] if isinstance(calibration, (Tensor, Mapping)) else calibration
    if not isinstance(items, Iterable) or isinstance(items, (str, bytes)):
        raise DataError(f"calibration data are an iterable of batches, or a tensor; got {described(items)}")
    found = []
    for index, item in enumerate(items):
        case = _case(item if batch is None else asked(batch, item, "batch= cannot read the calibration data"), model)
        where = f"calibration batch {index} (counted from 0)"
        for name, value in [*((f"input {i}", v) for i, v in enumerate(case.args)), *case.kwargs.items()]:
            if any(isinstance(leaf, Tensor) and bool(leaf.isnan().any()) for leaf in pytree.tree_leaves(value)):
                raise DataError(f"{where}: {name} holds NaN; leave these examples out, or fill them in")
        if wrong := blame(Batch(target=case.target)):
            raise DataError(f"{where}: {wrong}")
        moved = to_device((case.args, dict(case.kwargs), case.target, case.mask), device)
        found.append(Case(*moved))
    if not found:
        raise DataError("the calibration data are empty: pass at least one batch; some thousand tokens are enough")
    return [piece for case in found for piece in _pieces(case, math.ceil(_CASES / len(found)))]


def objective_for(
    model: nn.Module, case: Case, likelihood: str | Likelihood, output: Callable[[Any], Tensor] | None
) -> CaseObjective:
    """The likelihood by name, or by what the network and the first case look like ("auto").

    Raises:
        OckhamError: an unknown name, or a likelihood that the data do not fit.
    """
    chosen = answer_tensor if output is None else output
    with torch.no_grad():
        answer = case.answer(model, chosen)
    if wrong := blame(Batch(), answer):
        raise DataError(f"first calibration batch: {wrong}")
    if likelihood == "auto":
        likelihood = _guessed(model, case, answer, chosen)
    if likelihood in ("next-token", "causal-lm") or isinstance(likelihood, CausalLanguage):
        given: Any = case.target if case.target is not None else _tokens(case)
        CausalLanguage().check(answer, given)
        return CaseObjective(
            "next-token",
            _next_token,
            lambda f, c, g: fisher_noise(*_next_tokens(f, c), g),
            DRAWS,
            lambda f, c: int(_next_tokens(f, c)[1].sum()),
            chosen,
            lambda f, c: f[:, :-1][_next_tokens(f, c)[1].view(f[:, :-1].shape[:2])],
            classes=True,
        )
    if likelihood == "own":
        return CaseObjective("own predictive", None, _own, DRAWS, lambda f, c: len(f), chosen, _numbers, classes=False)
    known = likelihood_from(likelihood)
    if case.target is None:
        raise DataError(
            f"likelihood {likelihood!r} needs targets, and the calibration data have none: yield (inputs, targets), "
            "a mapping with 'labels', or leave likelihood='auto'"
        )
    fitting = _by_class(known, answer, case.target)
    known.check(*fitting)
    if isinstance(known, Loss) and not known.learns(*fitting, None):
        raise DataError(DETACHED)
    return _with_targets(known, chosen)


def _guessed(model: nn.Module, case: Case, answer: Tensor, output: Callable[[Any], Tensor]) -> str:
    """Which likelihood the network and a case look like."""
    tokens: Any = _tokens(case)
    target: Any = case.target
    if not isinstance(target, (Tensor, NoneType)):
        raise DataError(f"the targets of a calibration batch are a tensor or None; got {described(target)}")
    text = tokens is not None and answer.shape[:-1] == tokens.shape and (target is None or target.shape == tokens.shape)
    if text and _causal(model, case, tokens, output):
        return "next-token"
    if target is None:
        return "own"
    return "regression" if target.is_floating_point() else "classification"


def _case(item: Any, model: nn.Module) -> Case:
    target: Any = None
    if isinstance(item, (tuple, list)) and len(item) == 3 and _is_weight(item[2], item[1]):
        item = inputs_of(*item)
    if isinstance(item, Batch):
        if item.weight is not None and not bool((item.weight == 1).all()):
            raise DataError(
                "calibration examples count once each, and these have weights: leave the weights out, or draw examples "
                "by their weight"
            )
        return Case(tuple(item.args), dict(item.kwargs), item.target)
    if isinstance(item, (tuple, list)) and len(item) == 2:
        item, target = item
    if isinstance(item, Mapping):
        kwargs = dict(item)
        labels = kwargs.get("labels")
        if labels is not None and not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            kwargs.pop("labels")
        mask = kwargs.get("attention_mask")
        mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()) else None
        return Case((), kwargs, labels if target is None else target, mask)
    if isinstance(item, (tuple, list)):
        return Case(tuple(item), {}, target)
    if not isinstance(item, Tensor):
        raise DataError(
            f"a calibration batch is a tensor, (inputs, targets) or a mapping of inputs; got {type(item).__name__}. "
            "Pass batch=, a function from an item of the data to one of these"
        )
    return Case((item,), {}, target)


def _is_weight(value: Any, target: Any) -> bool:
    """True for a number per example in the third place, as in (inputs, targets, weights)."""
    floating = isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 1
    return floating and isinstance(target, Tensor) and target.ndim > 0 and len(target) == len(value)


def _pieces(case: Case, least: int) -> list[Case]:
    """The case cut along its examples into at least so many pieces, of about five hundred token positions at most."""
    leaves, spec = pytree.tree_flatten((case.args, dict(case.kwargs), case.target, case.mask))
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    tokens = [t for t in tensors if t.ndim == 2 and not t.is_floating_point()]
    if not tokens or any(t.ndim == 0 or len(t) != len(tokens[0]) for t in tensors):
        return [case]
    each = max(1, min(_POSITIONS // tokens[0].shape[1], len(tokens[0]) // least))
    parts = [t.split(each) if isinstance(t, Tensor) else None for t in leaves]
    count = len(tokens[0].split(each))
    cut = [[leaf if p is None else p[i] for leaf, p in zip(leaves, parts, strict=True)] for i in range(count)]
    return [Case(*pytree.tree_unflatten(values, spec)) for values in cut]


def traced_inputs(model: nn.Module, case: Case) -> Any:
    """Inputs of one case for `ockham.trace`, which runs them some thirty times: of text the first tokens will do.

    Numbers and masks of (examples, tokens) are cut to 32 tokens. A single example is given twice: with one, a size that
    counts examples and heads looks like one that counts heads. What the network cannot take stays as it is.
    """
    inputs = case.inputs(model)
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor) and t.ndim]
    text = all(t.ndim == 2 and not t.is_floating_point() for t in tensors)
    twice = bool(tensors) and all(len(t) == 1 for t in tensors)

    def like(t: Tensor) -> Tensor:
        cut = t[:, :_TOKENS] if text and t.ndim else t
        return torch.cat([cut, cut]) if twice and t.ndim else cut

    if not text and not twice:
        return inputs
    changed = pytree.tree_map_only(Tensor, like, inputs)
    try:
        with torch.no_grad():
            model(**changed) if case.kwargs else model(*changed)
    except Exception:  # whatever its forward raises: columns of a table are numbers of two dimensions, too
        return inputs
    return changed


def answer_tensor(found: Any) -> Tensor:
    """The tensor that matters in what a network returns: logits, or else the first floating one.

    Raises:
        OckhamError: there is none.
    """
    if isinstance(found, Tensor):
        return found
    logits = found.get("logits") if isinstance(found, Mapping) else getattr(found, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    for leaf in pytree.tree_leaves(found):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 0:
            return leaf
    raise OckhamError(
        f"the network returns {type(found).__name__} without a floating tensor; pass output=, a function from what it "
        "returns to a tensor"
    )


def _tokens(case: Case) -> Tensor | None:
    given = case.kwargs.get("input_ids", case.args[0] if len(case.args) == 1 else None)
    return given if isinstance(given, Tensor) and given.ndim == 2 and not given.is_floating_point() else None


@torch.no_grad()
def _causal(model: nn.Module, case: Case, tokens: Tensor, output: Callable[[Any], Tensor]) -> bool:
    """True for a network of as many outputs as tokens that does not look ahead: its first answers ignore the last."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) or tokens.shape[1] < 2:
        return False
    some = tokens[:1, :_PROBE]
    other = some.clone()
    given = tokens.unique()  # a token of the data where there is another: 0 is often padding
    other[:, -1] = given[given != some[0, -1]][-1] if len(given) > 1 else torch.where(other[:, -1] == 0, 1, 0)
    answers = []
    for ids in (some, other):
        one = Case((ids,), {}) if case.args else Case((), {"input_ids": ids})
        answers.append(one.answer(model, output)[:, :-1])
    return answers[0].shape[-1] > int(tokens.max()) and torch.allclose(answers[0], answers[1], rtol=1e-4, atol=1e-5)


def _next_tokens(answer: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Logits ``[positions, words]`` of a batch, and which of them something follows that counts."""
    return answer[:, :-1].flatten(0, 1), _following(case) != _IGNORED


def _following(case: Case) -> Tensor:
    """The token after each, ``[positions]``; -100 where it does not count."""
    given = case.target if case.target is not None else _tokens(case)
    if given is None:
        raise DataError("likelihood 'next-token' needs token ids [examples, positions] as input")
    target = given[:, 1:]
    return (target if case.mask is None else target.masked_fill(~case.mask[:, 1:], _IGNORED)).flatten()


def _next_token(answer: Tensor, case: Case) -> tuple[Tensor, int]:
    logits, counted = _next_tokens(answer, case)
    nll = F.cross_entropy(logits.float(), _following(case), ignore_index=_IGNORED, reduction="sum")
    return nll, int(counted.sum())


def _numbers(answer: Tensor, case: Case) -> Tensor:
    """An answer ``[rows, numbers]``, without what is only padding."""
    if case.mask is not None and answer.shape[: case.mask.ndim] == case.mask.shape:
        answer = answer[case.mask]
    return answer.reshape(-1, answer.shape[-1]) if answer.ndim > 1 else answer[:, None]


def _own(answer: Tensor, case: Case, generator: torch.Generator) -> Iterator[Tensor]:
    """A Gaussian around what the network says: residuals of random sign, whose squares have the curvature as mean."""
    counted = answer.new_ones(())
    if case.mask is not None and answer.shape[: case.mask.ndim] == case.mask.shape:
        counted = case.mask.to(answer.dtype).reshape(*case.mask.shape, *[1] * (answer.ndim - case.mask.ndim))
    for sign in signs(answer.shape, generator, answer):
        yield (answer * sign * counted).sum()


def _by_class(likelihood: Likelihood, answer: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Answers ``[N, positions, classes]`` as the likelihood has them, ``[N, classes, positions]``."""
    if isinstance(likelihood, Classification) and answer.ndim == 3 and answer.shape[:2] == target.shape:
        return answer.movedim(-1, 1), target
    return answer, target


def _pair(likelihood: Likelihood, answer: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Answers in the shape that the likelihood has, and targets."""
    if case.target is None:
        raise DataError("some calibration batches have targets and others have none; give all of them targets")
    return _by_class(likelihood, answer.float(), case.target)


def _with_targets(likelihood: Likelihood, output: Callable[[Any], Tensor]) -> CaseObjective:
    def nll(answer: Tensor, case: Case) -> tuple[Tensor, int]:
        f, y = _pair(likelihood, answer, case)
        terms = int(likelihood.terms(y))
        return (likelihood.nll(f, y) * terms if terms else f.new_zeros(())), terms  # a mean of nothing is NaN

    def curvature(answer: Tensor, case: Case, generator: torch.Generator) -> Iterator[Tensor]:
        f, y = _pair(likelihood, answer, case)
        if isinstance(likelihood, Regression):
            yield from _own(f, replace(case, mask=None), generator)
        else:
            yield likelihood.nll(f, y) * likelihood.terms(y)

    def terms(answer: Tensor, case: Case) -> int:
        return int(likelihood.terms(_pair(likelihood, answer, case)[1]))

    name = type(likelihood).__name__.lower()
    if isinstance(likelihood, Classification):
        rows, noise = _with_classes(likelihood)
        return CaseObjective(name, nll, noise, DRAWS, terms, output, rows, classes=True)
    draws = DRAWS if isinstance(likelihood, Regression) else 1
    return CaseObjective(name, nll, curvature, draws, terms, output, _numbers, classes=False)


def _with_classes(
    likelihood: Classification,
) -> tuple[Callable[[Tensor, Case], Tensor], Callable[[Tensor, Case, torch.Generator], Iterator[Tensor]]]:
    """What counts of an answer, and sums whose gradients make the curvature."""

    def classes(answer: Tensor, case: Case) -> tuple[Tensor, Tensor]:
        logits, labels = likelihood.fitted(*_pair(likelihood, answer, case))
        return logits.movedim(1, -1).reshape(-1, logits.shape[1]), labels.reshape(-1) != likelihood.ignore_index

    def rows(answer: Tensor, case: Case) -> Tensor:
        logits, counted = classes(answer, case)
        return logits[counted]

    def noise(answer: Tensor, case: Case, generator: torch.Generator) -> Iterator[Tensor]:
        if likelihood.class_weights is None:
            yield from fisher_noise(*classes(answer, case), generator)
            return
        f, y = _pair(likelihood, answer, case)
        for _ in range(DRAWS):
            yield likelihood.nll(f, likelihood.drawn(f, y, generator)) * likelihood.terms(y)

    return rows, noise


_JUDGED, _KEPT_NUMBERS, _ROWS = 1000, 1 << 25, 128


class DenseRows:
    """What the dense network says to data that judge, and how far a changed one is from it.

    Args:
        model: the dense network.
        cases: data that judge, of this process; so many are used that there are some 1,000 rows of all processes.
        objective: the likelihood.

    Attributes:
        rows: rows that are compared, of all processes; with none nothing can be judged.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, cases: Sequence[Case], objective: CaseObjective) -> None:
        self._objective, self._held = objective, list[tuple[Case, int, Tensor]]()
        seen, few = 0, _JUDGED / team().count
        for case in cases:
            if seen >= few:
                break
            found = objective.rows(case.answer(model, objective.output), case).float()
            seen += len(found)
            if not len(found):  # only padding
                continue
            step = math.ceil(found.numel() * max(1.0, few / len(found)) / _KEPT_NUMBERS)
            self._held.append((case, step, found[::step].clone()))
        self.rows = float(team().summed(torch.tensor(float(sum(len(d) for _, _, d in self._held)))))

    @torch.no_grad()
    def distance(self, model: nn.Module) -> float:
        """Nats a row between what the dense network says and what the model does: mean KL(dense || model)."""
        total = torch.zeros(2, dtype=torch.float64)
        for case, step, dense in self._held:
            found = self._objective.rows(case.answer(model, self._objective.output), case)[::step].float()
            for before, after in zip(dense.split(_ROWS), found.split(_ROWS), strict=True):
                total[0] += float((divergence if self._objective.classes else _half_squares)(before, after))
            total[1] += len(dense)
        total = team().summed(total)
        return float(total[0] / total[1].clamp_min(1))


def _half_squares(before: Tensor, after: Tensor) -> Tensor:
    return 0.5 * (after.double() - before.double()).square().sum()


def divergence(before: Tensor, after: Tensor) -> Tensor:
    r"""Sum over rows of KL(softmax(before) || softmax(after)), nats; float64 of logits ``[rows, classes]``.

        KL = ln(1 + sum_k p_k (exp(c_k) - 1)),    c = d - sum_k p_k d_k,    d = after - before

    A difference of logarithms would lose what near networks differ by. Logits of minus infinity in both count nothing.
    """
    p, away = before.softmax(-1), after - before
    away -= torch.linalg.vecdot(p, away).unsqueeze(-1)
    rest = torch.linalg.vecdot(p, away).double()  # what rounding has left of the mean
    found: Tensor = (away.expm1_().mul_(p).sum(-1, dtype=torch.float64).log1p() - rest).sum()
    if not bool(found.isfinite()):
        old, new = before.double().log_softmax(-1), after.double().log_softmax(-1)
        found = (old.exp() * (old - new)).masked_fill(old.isneginf(), 0.0).sum()
    return found


def held_out(count: int) -> frozenset[int]:
    """Cases that judge and do not decide: every fourth; none where there are fewer than four."""
    return frozenset(range(_HELD_EVERY - 1, count, _HELD_EVERY))


@contextmanager
def evaluating_blocks(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode, no gradients for parameters, no cache of past tokens, experts one by one; undone after it."""
    modes = {m: m.training for m in model.modules()}
    wanted = {p: p.requires_grad for p in model.parameters()}
    model.eval().requires_grad_(False)
    try:
        with configured(model, use_cache=False, _experts_implementation_internal="eager"):
            yield next((p.device for p in model.parameters()), torch.device("cpu"))
    finally:
        for module, mode in modes.items():
            module.training = mode
        for p, need in wanted.items():
            p.requires_grad_(need)


BlockCall = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is called with."""


def without_caches(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BlockCall:
    """A call without transformers' caches of past tokens, which a block that runs again would add to."""

    def kept(value: Any) -> Any:
        return None if "Cache" in type(value).__name__ else value

    return tuple(kept(a) for a in args), {k: kept(v) for k, v in kwargs.items()}


_STRIP = 128  # rows of a Gram matrix that are made at a time


def add_gram_(sums: Tensor, rows: Tensor) -> None:
    """Add rows' rows to the lower triangle of ``sums``; `symmetric` completes it.

    Args:
        sums: ``[groups, n, n]``, changed.
        rows: ``[groups, rows, n]``.
    """
    x = rows.to(sums.dtype)
    for first in range(0, sums.shape[-1], _STRIP):
        last = first + _STRIP
        if len(sums) == 1:  # added as it is made
            sums[0, first:last, :last].addmm_(x[0, :, first:last].mT, x[0, :, :last])
        else:
            sums[:, first:last, :last] += x[..., first:last].mT @ x[..., :last]


def symmetric(sums: Tensor) -> Tensor:
    """The matrix whose lower triangle was summed."""
    lower = sums.tril()
    return lower + lower.tril(-1).mT


_TEAM: ContextVar[Processes] = ContextVar("team", default=ALONE)


def team() -> Processes:
    """The processes that divide the work at hand: this one alone, but inside `dividing`."""
    return _TEAM.get()


@contextmanager
def dividing(wanted: bool) -> Iterator[None]:
    """Inside this block all processes of torch's group work together, if ``wanted``.

    Raises:
        OckhamError: there is no process group.
    """
    processes = Processes.world() if wanted else ALONE
    if wanted and processes.group is None:
        raise OckhamError("divided=True divides the work among several processes: call init_process_group first")
    token = _TEAM.set(processes)
    try:
        yield
    finally:
        _TEAM.reset(token)


def own_cases(cases: Sequence[Case]) -> tuple[Sequence[Case], frozenset[int]]:
    """The cases that this process works on, all where it is alone, and the positions among them of those that judge.

    Raises:
        OckhamError: there are more processes than cases.
    """
    processes = team()
    if len(cases) < processes.count:
        raise OckhamError(
            f"{processes.count} processes divide the calibration data among them, and there are {len(cases)} batches: "
            "pass smaller and more batches, or start fewer processes"
        )
    mine, held = processes.own(len(cases)), held_out(len(cases))
    return [cases[i] for i in mine], frozenset(at for at, i in enumerate(mine) if i in held)
