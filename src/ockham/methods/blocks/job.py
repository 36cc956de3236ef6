"""The block-wise reduction as a job: units, shots, folder and page."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ockham.choose.prices import Budget, Subject, budget_from
from ockham.core.batch import Batch
from ockham.core.files import read_json, write_json
from ockham.core.likelihood import Likelihood
from ockham.core.network import Ignore, device_of, protected_names, teller, trim, watched
from ockham.core.posterior import Posterior
from ockham.core.seal import FolderLock
from ockham.errors import DataError, OckhamError, OckhamWarning
from ockham.fit.predict import norms_of, refresh_batchnorm
from ockham.methods.blocks.cases import (
    Case,
    CaseObjective,
    DenseRows,
    cases_from,
    evaluating_blocks,
    held_out,
    objective_for,
    own_cases,
    team,
    traced_inputs,
)
from ockham.methods.blocks.reduction import (
    Orders,
    Study,
    loss_of,
    reduce_blocks_,
    study,
    study_damping,
    study_shares,
)
from ockham.methods.blocks.solve import Damping, NofM
from ockham.methods.blocks.stop import (
    TERMS_PER_WEIGHT,
    DampingTrial,
    MatrixEvidence,
    Shot,
    best_shot,
    matrix_kind,
    passes_to,
    predicted,
    shares_for,
    shot_from,
    shots,
)
from ockham.methods.blocks.units import (
    UnitReader,
    chosen_branches,
    chosen_units,
    describable,
    droppable,
    measured_curves,
    readers_of,
    refit_units_,
    surviving_posterior,
    unit_curve,
)
from ockham.surgery import Groups, Plan, shrink, trace

__all__ = ["JOBS", "BlockJob", "PruneSettings", "Removal"]

_CURVE_DAMPING = 0.01
_SHOT_ROUNDS = 4
JOBS = ("units", "weights", "evidence")
"""Names of the folders of work."""


def _write_block(block: nn.Module, folder: Path, j: int) -> None:
    save_file({n: t.clone().contiguous() for n, t in block.state_dict().items()}, folder / f"{j}.safetensors")


@torch.no_grad()
def _read_block_(block: nn.Module, folder: Path, j: int) -> None:
    state = block.state_dict()
    for name, value in load_file(folder / f"{j}.safetensors").items():
        state[name].copy_(value)


@torch.no_grad()
def _set_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for n, t in model.named_buffers():
        t.copy_(values[n])


@dataclass(frozen=True, slots=True)
class PruneSettings:
    """What a reduction can be told besides its target.

    Attributes:
        n_data: log-likelihood terms that the network was trained on. None: 20 for each weight that may go, the ratio
            at which a network of its size is trained at the least cost (Hoffmann et al. 2022, arXiv 2203.15556).
        damping: setting of every matrix; None chooses it by kind of matrix on calibration data held out.
        unit_damping: ridge of the refit after whole units went, a share of the inputs' mean square.
        round_to: number of which widths become multiples where units go, since processors like them; groups of fewer
            than eight times as many units have any width. 1: any.
        even: True takes the same share from every matrix instead of one threshold over all.
        rounds: number of rounds in which weights go greedily, in some two thirds of the time; None lets those that
            went come back for others, which costs less of the loss.
        passes: number of passes over the network in which ``keep_share`` is reached, each with its curvature taken
            anew. Two take twice the time and cost a little less where four weights of five go.
        reconstruct: number of epochs over the calibration data in which each block, once reduced, is trained to answer
            as the dense one does; held-out data say which epoch's weights are left. 0: none. Eight double the time.
        ignore: parameters to protect: names, "re:" patterns, module names or types.
        seed: seed of drawn targets.
        folder: place where finished work is kept; the same call with the same folder goes on where it was stopped.
        divided: True lets all processes of torch's group divide data and matrices among them; all must call `prune`,
            with the same network and all of the data.
        posterior: True makes a posterior of the weights that stay as well, which takes as much memory as they do.
    """

    n_data: float | None = None
    damping: Damping | None = None
    unit_damping: float = 0.5
    round_to: int = 16
    even: bool = False
    rounds: int | None = None
    passes: int = 1
    reconstruct: int = 0
    ignore: Ignore = ()
    seed: int = 0
    folder: str | Path | None = None
    divided: bool = False
    posterior: bool = False

    def __post_init__(self) -> None:
        if self.rounds is not None and not (isinstance(self.rounds, int) and self.rounds >= 1):
            raise OckhamError(f"PruneSettings: rounds is a whole number from 1, or None to swap; got {self.rounds!r}")
        if not (isinstance(self.round_to, int) and self.round_to >= 1):
            raise OckhamError(f"PruneSettings: round_to is a whole number from 1; got {self.round_to!r}")
        if not (isinstance(self.passes, int) and self.passes >= 1):
            raise OckhamError(f"PruneSettings: passes is a whole number from 1; got {self.passes!r}")
        if not (isinstance(self.reconstruct, int) and self.reconstruct >= 0):
            raise OckhamError(f"PruneSettings: reconstruct counts epochs, a whole number; got {self.reconstruct!r}")
        if self.n_data is not None and not 0 < self.n_data < math.inf:
            raise OckhamError(f"PruneSettings: n_data counts terms trained on, a number above 0; got {self.n_data!r}")
        if not 0 < self.unit_damping < math.inf:
            raise OckhamError(f"PruneSettings: unit_damping is a ridge, a number above 0; got {self.unit_damping!r}")


@dataclass(frozen=True, slots=True)
class Removal:
    """What was done to the weights.

    Attributes:
        evidence: key of a matrix to what was removed from it.
        damping: kind of matrix to its setting.
        shares: key of a matrix to the share that was to stay.
        trials: settings that were tried.
        shots: networks that were judged.
        untouched: matrices that no data reach.
    """

    evidence: Mapping[str, MatrixEvidence]
    damping: Mapping[str, Damping]
    shares: Mapping[str, float | NofM]
    trials: Sequence[DampingTrial]
    shots: Sequence[Shot]
    untouched: tuple[str, ...]


class BlockJob:
    """One call of `prune`: its data and settings, and the steps.

    Args:
        calibration: data as for `prune`, like all that follow.
        likelihood: name or value.
        batch: function from an item to inputs or (inputs, targets), or None.
        output: function from what a network returns to a tensor, or None.
        settings: the finer ones.
    """

    def __init__(
        self,
        calibration: Iterable[Any],
        likelihood: str | Likelihood,
        batch: Callable[[Any], Any] | None,
        output: Callable[[Any], Tensor] | None,
        settings: PruneSettings,
    ) -> None:
        whole = isinstance(calibration, (Tensor, Mapping)) or not isinstance(calibration, Iterable)
        self._items = calibration if whole else list(calibration)  # read once: a loader may shuffle
        self._given, self._batch, self._output = likelihood, batch, output
        self.settings = settings
        self.likelihood = str(likelihood)
        self.posterior: Posterior | None = None

    @property
    def _kept_in(self) -> Path | None:
        """Place for what need not lie in memory."""
        return None if self.settings.folder is None else Path(self.settings.folder)

    def mean_loss(self, model: nn.Module) -> float | None:
        """Mean NLL on the part of the data that judges, nats per term; None where the data have no targets."""
        with evaluating_blocks(model):
            cases, objective = self._data(model)
            if objective.nll is None:
                return None
            some = held_out(len(cases)) or range(len(cases))
            nll, terms = loss_of(model, [cases[i] for i in some], objective)
            if not bool(terms.any()):
                nll, terms = loss_of(model, cases, objective)
        return float(nll.sum() / terms.sum().clamp_min(1))

    def without_units(
        self, model: nn.Module, budget: Mapping[str, Any], *, uniform: bool, depth: bool = False
    ) -> tuple[nn.Module, Plan, dict[str, MatrixEvidence]]:
        """A network without the units (``depth``: whole blocks) that a budget does not allow.

        ``model`` itself is left half done.
        """
        limit = budget_from(budget)
        with evaluating_blocks(model):
            example = traced_inputs(model, self._data(model)[0][0])
        # of experts: as the network runs them, not one by one
        groups = trace(model, example, ignore=self.settings.ignore, whole=("branches",) if depth else ())
        with self._studied(model, JOBS[0]) as (cases, found, _):
            subject = Subject(model, cases[0].inputs(model))
            n_data = self.settings.n_data or TERMS_PER_WEIGHT * found.weights
            readers: list[UnitReader] = []
            keep: dict[str, Tensor] = {}
            if depth:
                plan = self._without_blocks(groups, subject, found, cases, limit, uniform=uniform)
            else:
                readers = self._readers(model, groups, found, uniform=uniform)
                every = watched(readers, "units", readers)
                curves = [unit_curve(reader, found.dense, _CURVE_DAMPING) for reader in every]
                if found.tried and (judge := self._judge(model, cases)).rows:
                    distance = partial(judge.distance, model)
                    curves = measured_curves(curves, found, distance, self.settings.unit_damping)
                widths = self.settings.round_to
                plan, keep = chosen_units(curves, groups, subject, limit, uniform=uniform, round_to=widths)
            evidence = refit_units_(
                model,
                cases,
                found.dense,
                readers,
                keep,
                damping=self.settings.unit_damping,
                n_data=n_data,
                on_block=teller("reduction"),
                mending=found.samples,
                lost=plan.lost,
                reconstruct=self.settings.reconstruct,
            )
            whole = None
            if self.settings.posterior:
                whole = surviving_posterior(found, evidence, {}, n_data, self.likelihood, self._kept_in)
        small, moments = shrink(model, plan, posterior=whole or {})
        if whole is not None:
            self.posterior = replace(whole, moments=moments)
        return self._refreshed(small), plan, evidence

    def _readers(self, model: nn.Module, groups: Groups, found: Study, *, uniform: bool) -> list[UnitReader]:
        """What reads the units that can go."""
        readers = readers_of(groups, found.dense.maps)
        if uniform and getattr(model, "config", None) is not None:
            readers = describable(readers, groups, model)
        if not readers:
            raise OckhamError(
                f"no unit of {type(model).__name__}'s blocks is read by a single matrix"
                + (" and numbered by its configuration" if uniform else "")
                + ", so none can go by itself; see ockham.trace(model, inputs).frozen for reasons, try "
                "structure='uneven', or pass keep_share for single weights"
            )
        return readers

    def _without_blocks(
        self, groups: Groups, subject: Subject, found: Study, cases: Sequence[Case], limit: Budget, *, uniform: bool
    ) -> Plan:
        """The blocks that go, or branches of them where no configuration must describe what is left."""
        candidates = droppable(groups, found.dense.maps, subject.model, uniform=uniform)
        if not candidates:
            raise OckhamError(
                f"no block of {type(subject.model).__name__} can go as a whole"
                + (" and leave a network that its configuration describes" if uniform else "")
                + ": a block can whose output is its input plus what it computes; take units (structure='auto')"
            )
        judge = self._judge(subject.model, cases)
        return chosen_branches(candidates, groups, subject, limit, partial(judge.distance, subject.model))

    def _judge(self, model: nn.Module, cases: Sequence[Case]) -> DenseRows:
        """What the dense network says to the data held out; to all, where none are."""
        own, held = own_cases(cases)
        judges = [own[i] for i in sorted(held)] if held_out(len(cases)) else own  # another process may hold all of them
        return DenseRows(model, judges, self._objective)

    def without_weights(self, model: nn.Module, keep: float | NofM | None) -> Removal:
        """Take weights out of a network in place: a share or pattern stays, or (None) what the evidence says.

        A share is reached in passes, each with the curvature and the damping of what the one before has left.
        """
        shares: list[float | NofM | None] = [keep]
        if isinstance(keep, (int, float)):
            shares = [*passes_to(keep, self.settings.passes)]
        done = Removal({}, {}, {}, (), (), ())
        name = JOBS[2] if keep is None else JOBS[1]
        for i, share in enumerate(shares):
            place = name if i == 0 else f"{name}/pass-{i + 1}"
            done = self._pass(model, share, done.evidence, place, last=i == len(shares) - 1)
        spared = protected_names(model, self.settings.ignore)
        untouched = tuple(k for k in done.untouched if k.partition("[")[0] not in spared)
        if untouched and keep != 1 and (keep is not None or done.evidence):
            warnings.warn(
                f"{len(untouched)} matrices stay as they are, such as {untouched[0]}: no calibration data reach them, "
                "or their inputs do not fit the pattern",
                OckhamWarning,
                stacklevel=4,
            )
        return replace(done, untouched=untouched)

    def _pass(
        self,
        model: nn.Module,
        keep: float | NofM | None,
        before: Mapping[str, MatrixEvidence],
        name: str,
        *,
        last: bool,
    ) -> Removal:
        """One pass over the network; of evidence before it the costs count."""
        norms, old = norms_of(model), {n: t.clone() for n, t in model.named_buffers()}
        with self._studied(model, name, judged=keep is None) as (cases, studied, folder):
            found = studied
            n_data = self.settings.n_data or TERMS_PER_WEIGHT * found.weights
            asked = self._kept(found, keep if keep is not None else 0.5)
            own, held = own_cases(cases)
            judges = [own[i] for i in sorted(held) if found.tried]
            damping, trials = self._damping(model, judges, found, asked, self.settings.rounds)
            if not isinstance(keep, NofM) and not self.settings.even and trials:
                found = self._shared(model, judges, found, asked, (damping, trials))
                asked = self._kept(found, keep if keep is not None else 0.5)
            orders = Orders(asked, damping, n_data, self.settings.rounds, norms=norms, before=before)
            orders = replace(orders, reconstruct=self.settings.reconstruct)
            fired: list[Shot] = []
            if keep is None:
                quick = replace(orders, reconstruct=0) if orders.reconstruct else orders
                if orders.rounds is None:
                    greedy, _ = self._damping(model, judges, found, asked, _SHOT_ROUNDS)
                    quick = replace(quick, damping=greedy, rounds=_SHOT_ROUNDS)
                evidence, fired = self._until_the_evidence_ends(model, cases, found, (quick, orders), folder)
            else:
                place = f"keep-{keep.n}-of-{keep.m}" if isinstance(keep, NofM) else f"keep-{keep:g}"
                evidence = self._reduced_(model, cases, found, orders, folder / place)
            if self.settings.posterior and last:
                self.posterior = surviving_posterior(found, evidence, damping, n_data, self.likelihood, self._kept_in)
        self._refreshed(model, old if norms else None)
        known = {k for m in found.dense.maps for k in m.matrices} - evidence.keys()
        return Removal(evidence, damping, orders.keep, trials, fired, tuple(sorted(known)))

    def _data(self, model: nn.Module) -> tuple[list[Case], CaseObjective]:
        cases = cases_from(self._items, self._batch, model, device_of(model))
        objective = objective_for(model, cases[0], self._given, self._output)
        self.likelihood = objective.name
        return cases, objective

    @contextmanager
    def _studied(
        self, model: nn.Module, name: str, *, judged: bool = False
    ) -> Iterator[tuple[list[Case], Study, Path]]:
        """The network prepared, its data (``judged``: less the part that judges) and curvature, a folder for work."""
        with evaluating_blocks(model), TemporaryDirectory() as scratch:
            cases, objective = self._data(model)
            judges = held_out(len(cases)) if judged else frozenset()
            cases = [c for i, c in enumerate(cases) if i not in judges]
            if self.settings.reconstruct and not held_out(len(cases)):
                raise DataError(
                    f"reconstruct= trains on three calibration batches of four and judges on the fourth; there are "
                    f"{len(cases)}{' besides those that judge the evidence' if judged else ''}. Pass more batches, of "
                    "fewer examples each"
                )
            folder = Path(scratch if self.settings.folder is None else self.settings.folder)
            if (rank := team().rank) > 0:  # every process keeps its own: they may share no disk
                folder /= f"process-{rank}"
            folder /= name
            folder.mkdir(parents=True, exist_ok=True)
            with FolderLock(folder):  # sums of two jobs in one folder would be of neither
                self._same_job(folder, model, cases)
                self._objective = objective
                spared = protected_names(model, self.settings.ignore)
                found = study(
                    model,
                    cases,
                    objective,
                    folder=folder / "curvature",
                    seed=self.settings.seed,
                    spared=spared,
                    on_case=teller("curvature"),
                )
                yield cases, found, folder

    def _same_job(self, folder: Path, model: nn.Module, cases: Sequence[Case]) -> None:
        """Refuse a folder in which another network or other data were worked on."""
        marks = hashlib.sha256()
        for name, p in model.state_dict().items():
            marks.update(f"{name} {tuple(p.shape)} {float(p.double().sum())}".encode())
        for case in cases:
            for t in (*case.args, *case.kwargs.values()):
                marks.update(f"{tuple(t.shape)} {float(t.double().sum())}".encode() if isinstance(t, Tensor) else b"-")
        marks.update(repr((self._given, replace(self.settings, folder=None, divided=False))).encode())
        mark, path = {"work": marks.hexdigest()}, folder / "job.json"
        if path.exists() and read_json(path) != mark:
            raise OckhamError(
                f"{folder} holds the work of another job (another network, other calibration data or settings): pass "
                "another folder, or empty this one"
            )
        write_json(path, mark)

    def _damping(
        self,
        model: nn.Module,
        judges: Sequence[Case],
        found: Study,
        keep: Mapping[str, float | NofM],
        rounds: int | None,
    ) -> tuple[Mapping[str, Damping], list[DampingTrial]]:
        """The setting of every kind of matrix, and what was tried for it."""
        if self.settings.damping is not None:
            return {matrix_kind(k): self.settings.damping for k in found.samples}, []
        dense = DenseRows(model, judges, self._objective)
        if not dense.rows:
            return {}, []
        return study_damping(found, keep, lambda: dense.distance(model), teller("damping"), rounds)

    def _shared(
        self,
        model: nn.Module,
        judges: Sequence[Case],
        found: Study,
        keep: Mapping[str, Any],
        damping: tuple[Mapping[str, Damping], Sequence[DampingTrial]],
    ) -> Study:
        """The study with costs that tell kinds of matrices apart as data held out do."""
        dense = DenseRows(model, judges, self._objective)
        samples = study_shares(found, keep, damping, lambda: dense.distance(model), self.settings.rounds)
        return replace(found, samples=samples)

    def _kept(self, found: Study, keep: float | NofM) -> dict[str, float | NofM]:
        if isinstance(keep, NofM):
            fits = {k: m.matrices[k].weight for m in found.dense.maps for k in m.matrices if k in found.samples}
            sizes = {k: m.matrices[k].fan_in for m in found.dense.maps for k in m.matrices}
            return {k: keep for k in fits if sizes[k] % keep.m == 0}
        if self.settings.even:
            return dict.fromkeys(found.samples, keep)
        return dict(shares_for(found.samples, keep))

    def _reduced_(
        self, model: nn.Module, cases: Sequence[Case], found: Study, orders: Orders, folder: Path, *, keep: bool = False
    ) -> dict[str, MatrixEvidence]:
        """Reduce block after block, each kept in a file where asked to; those that lie there already are read."""
        folder.mkdir(parents=True, exist_ok=True)
        dense, done = found.dense, 0
        before: dict[str, MatrixEvidence] = {}
        while done < len(dense.blocks) and (folder / f"{done}.json").exists():
            before |= {k: MatrixEvidence(**v) for k, v in read_json(folder / f"{done}.json").items()}
            done += 1
        done = int(team().gathered(torch.tensor(float(done))).min())
        tell = teller("reduction")

        def finished(j: int) -> bool:
            if j < done:
                _read_block_(dense.blocks[j], folder, j)
            return j < done

        def on_block(count: int, evidence: Mapping[str, MatrixEvidence]) -> None:
            j = count - 1
            if j >= done and (keep or self.settings.folder is not None):
                _write_block(dense.blocks[j], folder, j)
                own = {k: asdict(evidence[k]) for k in dense.maps[j].matrices if k in evidence}
                write_json(folder / f"{j}.json", own)
            trim()
            tell(count, len(dense.blocks))

        if done == len(dense.blocks):
            for j in range(done):
                finished(j)
            return before
        return before | reduce_blocks_(model, cases, dense, orders, finished=finished, on_block=on_block)

    def _until_the_evidence_ends(
        self, model: nn.Module, cases: Sequence[Case], found: Study, orders: tuple[Orders, Orders], folder: Path
    ) -> tuple[dict[str, MatrixEvidence], list[Shot]]:
        """Shots at several shares, from the dense weights each; the smallest that the evidence allows is left.

        Shots follow the first orders, which are fast; one more at the share that was found follows the second.
        """
        every, _ = self._data(model)
        judges = [every[i] for i in sorted(held_out(len(every)))]
        if not judges:
            raise DataError(
                f"without a target the evidence is judged on calibration data held out, which takes 4 batches or more; "
                f"there are {len(every)}. Pass more batches, or keep_share"
            )
        dense_loss, blocks = loss_of(model, judges, self._objective), found.dense.blocks
        if not bool(dense_loss[1].any()):
            raise DataError(
                "without a target the evidence is judged on every fourth calibration batch, and there every target is "
                "padding: shuffle the batches, or pass keep_share"
            )
        original = folder / "dense"
        original.mkdir(exist_ok=True)
        for j, block in enumerate(blocks):
            _write_block(block, original, j)
        done: dict[Path, dict[str, MatrixEvidence]] = {}

        def restore(place: Path) -> None:
            for j, block in enumerate(blocks):
                _read_block_(block, place, j)

        def fired_at(share: float, told: Orders) -> tuple[Shot, Path]:
            restore(original)
            place = folder / f"shot-{share:.6f}{'' if told.rounds is None else f'-in-{told.rounds}'}"
            done[place] = self._reduced_(
                model, cases, found, replace(told, keep=self._kept(found, share)), place, keep=True
            )
            # of the curvature as it is: damping says how weights were chosen, not what their freedom had cost
            _, volume = predicted(found.samples, share, told.n_data)
            losses = loss_of(model, judges, self._objective)
            return shot_from(share, dense_loss, losses, volume, told.n_data), place

        places: dict[float, Path] = {}

        def fire(share: float) -> Shot:
            shot, places[share] = fired_at(share, orders[0])
            return shot

        fired = shots(found.samples, orders[0].n_data, fire)
        best, taken = best_shot(fired), original
        if best is not None:
            taken = places[best.keep_share]
            if orders[0] is not orders[1]:
                last, place = fired_at(best.keep_share, orders[1])
                fired.append(last)
                taken = place if last.nats >= best.nats else taken
        restore(taken)
        return done.get(taken, {}), fired

    def _refreshed(self, model: nn.Module, trained: dict[str, Tensor] | None = None) -> nn.Module:
        """Statistics of BatchNorm under the weights that are left; older ones where data that judge prefer those."""
        cases, _ = self._data(model)
        loader: Any = [Batch(tuple(c.args), dict(c.kwargs)) for c in cases]
        sides = [{n: t.clone() for n, t in model.named_buffers()}]
        if not refresh_batchnorm(model, loader, batches=len(loader), batch=lambda case: case):
            return model
        sides = [{n: t.clone() for n, t in model.named_buffers()}, *sides, *([] if trained is None else [trained])]
        losses = []
        for side in sides:
            _set_buffers(model, side)
            losses.append(self.mean_loss(model))
        known = [math.inf if loss is None or math.isnan(loss) else loss for loss in losses]
        _set_buffers(model, sides[known.index(min(known))])
        return model
