"""A job: a recipe carried out, and the facts of its run that a result folder holds."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ockham.core import __version__
from ockham.core.batch import RowsOf
from ockham.core.files import Count, Share, from_plain, to_plain
from ockham.core.likelihood import Likelihood
from ockham.core.processes import ALONE, Processes
from ockham.core.seal import compare_surroundings, network_fingerprint, surroundings, weights_fingerprint
from ockham.errors import DataError, OckhamError
from ockham.run.compression import PlainTraining
from ockham.run.engine import Compressed, Engine, EpochInfo, Method, OnStep, Task
from ockham.run.folder import (
    NETWORK,
    PLAN,
    POSTERIOR,
    ResultFolder,
    first_checkpoint,
    layer_rows,
    save_network,
    save_plan,
    stored_values,
)
from ockham.run.measure import (
    CLASSIFIERS,
    Predictor,
    input_map,
    labels_for,
    mean_predictor,
    measures,
    path_inclusion,
    posterior_predictor,
    reliability_of,
    tempered,
)
from ockham.run.records import (
    DiagnosisRecord,
    EpochRecord,
    ForeignInputs,
    HistogramRecord,
    LayerRecord,
    Measures,
    ReliabilityPair,
    ReliabilityTable,
    RoundRecord,
    ShiftCurve,
)
from ockham.run.schema import (
    Analysis,
    DataSource,
    GateFacts,
    History,
    Metrics,
    NetworkSource,
    Provenance,
    Result,
    Settings,
    load_lines,
    write_result,
)
from ockham.run.shift import SEVERITIES, corruption_shift, ood_auroc
from ockham.run.structures import structure
from ockham.run.weights import fitted
from ockham.zoo.data import Batches, Dataset, data_fingerprint

__all__ = [
    "SEARCH_RATES",
    "Job",
    "NetworkFacts",
    "Recipe",
    "analysis",
    "compressed_facts",
    "history",
    "network_facts",
    "provenance",
]

_SHIFT_EXAMPLES = 500
_SHIFT_DRAWS = 10  # twenty corrupted copies of every example are predicted, so fewer draws than for the test set


@dataclass(frozen=True, slots=True)
class NetworkFacts:
    """What was measured of one network or posterior on one data set; `ockham.core.files` makes JSON of it.

    Attributes:
        measures: measures of its predictions, and the number of its stored values.
        reliability: 15 bins of confidence, of classifiers only.
        shift: corruption to "accuracy" and "ece" at severities 1 to 5, of image classifiers only.
        ood: AUROC of the entropy against foreign inputs, of classifiers only.
        ood_name: words for what the foreign inputs are.
        input_map: kept first-layer weights per input pixel, of image inputs only.
    """

    measures: Measures
    reliability: ReliabilityTable | None
    shift: Mapping[str, Mapping[str, tuple[Share, ...]]] | None
    ood: Share | None
    ood_name: str
    input_map: tuple[tuple[Count, ...], ...] | None

    def stored(self, size: int) -> NetworkFacts:
        """The same with its size on disk, bytes."""
        return replace(self, measures=replace(self.measures, bytes=size))


def network_facts(
    model: nn.Module,
    data: Dataset,
    noise_variance: Tensor | None,
    foreign: Tensor | None = None,
    *,
    likelihood: str,
    temperature: float = 1.0,
) -> NetworkFacts:
    """Measure a network as it stands.

    Args:
        model: network with every weight at its one value.
        data: examples; those of the test part are used.
        noise_variance: noise of a regression, None for other likelihoods.
        foreign: inputs of another kind; None: the test inputs with their pixels permuted.
        likelihood: name of it.
        temperature: divisor of a classifier's logits.
    """
    predictor = tempered(mean_predictor(model, likelihood=likelihood), temperature)
    return _facts(predictor, predictor, model, data, noise_variance, foreign, likelihood)


def compressed_facts(
    result: Compressed, data: Dataset, foreign: Tensor | None = None, *, likelihood: str, draws: int, seed: int
) -> tuple[NetworkFacts, NetworkFacts]:
    """Measure the posterior predictive, and the mean network beside it; arguments as for `network_facts`."""
    noise = result.noise_variance

    def predictor(count: int) -> Predictor:
        return posterior_predictor(result.model, result.posterior, likelihood=likelihood, draws=count, seed=seed)

    few = predictor(min(draws, _SHIFT_DRAWS))
    after = _facts(predictor(draws), few, result.model, data, noise, foreign, likelihood)
    return after, network_facts(result.model, data, noise, foreign, likelihood=likelihood)


def _facts(
    predictor: Predictor,
    quick: Predictor,
    model: nn.Module,
    data: Dataset,
    noise: Tensor | None,
    foreign: Tensor | None,
    likelihood: str,
) -> NetworkFacts:
    x, y = data.test_x, data.test_y
    outputs = predictor(x)
    found = measures(lambda _: outputs, x, y, noise_variance=noise, likelihood=likelihood)
    y = labels_for(outputs, y) if likelihood in CLASSIFIERS else y
    few = slice(0, _SHIFT_EXAMPLES)
    classes = likelihood in CLASSIFIERS and y.ndim == 1
    permuted = torch.randperm(x[0].numel(), generator=torch.Generator().manual_seed(0))
    others = x.reshape(len(x), -1)[:, permuted].reshape(x.shape) if foreign is None else foreign
    shift: dict[str, dict[str, tuple[float, ...]]] | None = None
    if classes and data.image_shape:
        curves = corruption_shift(quick, x[few], y[few], low=data.low, high=data.high)
        shift = {name: {k: tuple(v) for k, v in rows.items()} for name, rows in curves.items()}
    return NetworkFacts(
        Measures.of(found, parameters=stored_values(model)),
        from_plain(ReliabilityTable, reliability_of(lambda _: outputs, x, y)) if classes else None,
        shift,
        ood_auroc(quick, x[few], others[few]) if classes else None,
        "test inputs with their pixels permuted" if foreign is None else "foreign inputs",
        input_map(model, data),
    )


def history(result: Compressed) -> History:
    """What a run says of its epochs and rounds."""
    epochs = tuple(
        EpochRecord(
            e.epoch,
            e.loss,
            None if math.isnan(e.accuracy) else e.accuracy,
            e.kept_share,
            kl=e.kl or None,
            parameters=e.parameters or None,
            widths=dict(e.widths) or None,
            removed=e.removed if e.widths else None,
        )
        for e in result.epochs
    )
    rounds = tuple(RoundRecord(**asdict(r)) for r in result.rounds)
    counts = tuple(HistogramRecord(h["epoch"], tuple(h["delta_f"])) for h in result.histograms)
    diagnosis = DiagnosisRecord(**asdict(result.diagnosis)) if result.diagnosis else None
    return History(epochs, rounds, counts, diagnosis)


def analysis(result: Compressed, after: NetworkFacts, before: NetworkFacts | None) -> Analysis:
    """What the reduced network is like, beside the network before where that was measured."""
    shift: dict[str, ShiftCurve] | None = None
    if after.shift is not None:
        old = (before.shift if before else None) or {}
        shift = {
            name: ShiftCurve(
                tuple(map(float, SEVERITIES)),
                old.get(name, {}).get("accuracy"),
                rows["accuracy"],
                old.get(name, {}).get("ece"),
                rows["ece"],
            )
            for name, rows in after.shift.items()
        }
    return Analysis(
        layers=from_plain(tuple[LayerRecord, ...], layer_rows(result.posterior, result.plan)) or None,
        reliability=ReliabilityPair(before.reliability if before else None, after.reliability)
        if after.reliability
        else None,
        input_map=after.input_map,
        input_inclusion=path_inclusion(result.model, result.posterior),
        shift=shift,
        ood=None if after.ood is None else ForeignInputs(after.ood_name, before.ood if before else None, after.ood),
    )


def provenance(
    data: Dataset,
    settings: Mapping[str, Any],
    folder: Path,
    *,
    command: str,
    builder: str,
    seed: int,
    seconds: float,
    device: torch.device,
) -> Provenance:
    """How a result was made, on this machine and now.

    Args:
        data: examples of the run.
        settings: plain values by the name of the setting.
        folder: place where the result will be found, as typed.
        command: line as typed.
        builder: label of the network.
        seed: seed of all randomness.
        seconds: wall time of the run.
        device: place of the computation.
    """
    return Provenance(
        ockham=__version__,
        command=command,
        seed=seed,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=seconds,
        versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        machine=f"{platform.machine()}, {(n := torch.get_num_threads())} thread{'s' * (n != 1)}, {device}",
        network=NetworkSource(builder),
        dataset=DataSource.of(data),
        settings=from_plain(Settings, to_plain(settings)),
        load=load_lines(folder, builder, data.train_x.shape[1:]),
    )


_FEWEST = 2
SEARCH_RATES = (3e-4, 1e-3, 3e-3)
"""Learning rates tried for the Adam network, on a tenth of the training data held out."""


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """What a job is about: how to build the network, the data, the method and its schedule.

    Attributes:
        build: function that makes a fresh network; called under the job's seed.
        likelihood: function that makes a fresh likelihood.
        data: training and test examples.
        batch_size: examples a step.
        method: way to make the network smaller.
        epochs: number of epochs of the method.
        hold: share of the steps at full learning rate.
        seed: seed of everything random.
        device: place of the computation.
        held_out: share of the training examples that the method does not train on, for its own curves.
        processes: those that do the job together; each trains on its rows of every batch.
    """

    build: Callable[[], nn.Module]
    likelihood: Callable[[], Likelihood]
    data: Dataset
    batch_size: int
    method: Method
    epochs: int
    hold: float = 0.5
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    held_out: float = 0.0
    processes: Processes = ALONE

    def network(self) -> nn.Module:
        """A fresh network with the job's own initial weights, on the device; global randomness untouched."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.build().to(self.device)

    def split(self, share: float) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Training examples, and a share of them held out; in the given order where nothing is held out."""
        x, y = self.data.train_x, self.data.train_y
        if not share:
            return (x, y), (x[:0], y[:0])
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))
        if len(x) < _FEWEST:
            raise DataError(
                f"there are {len(x)} training examples (rows); at least {_FEWEST} are needed to hold some out"
            )
        cut = len(x) - max(1, int(share * len(x)))
        return (x[order[:cut]], y[order[:cut]]), (x[order[cut:]], y[order[cut:]])

    def engine(
        self, method: Method, *, epochs: int, held_out: float = 0.0, weights: Mapping[str, Tensor] | None = None
    ) -> Engine:
        """A run of a method on a fresh network, or on given weights."""
        network, (x, y) = self.network(), self.split(held_out)[0]
        if weights is not None:
            network.load_state_dict(dict(weights))
        loader: Any = Batches(x, y, self.batch_size, shuffle=method.shuffle)
        if self.processes.count > 1:
            loader = RowsOf(loader, self.processes.rank, self.processes.count)
        task = Task.of(network, loader, self.likelihood(), epochs=epochs, processes=self.processes)
        return Engine(method, network, task, hold=self.hold, seed=self.seed)


@dataclass(slots=True, eq=False)
class Job:
    """Everything that `ockham compress`, `prune` and `gate` do; iterate over `run` for progress.

    Of several processes the first reads and writes the folder.

    Attributes:
        recipe: network, data, method.
        out: result folder.
        builder: label of the network, "zoo:name" or the user's "module:function".
        command: line as typed, for the record.
        weights: tensors to start from instead of from scratch (see `fitted`); they are then also the network "before".
        baseline: flag, True: the same network is trained by Adam for comparison (skipped when weights are given).
        draws: posterior draws of a prediction.
        ood: foreign inputs for the out-of-distribution measure; None: the test images with their pixels permuted.
        resume: flag, True: go on from the checkpoint in ``out``.
        overwrite: flag, True: a finished result in ``out`` may be replaced.
        on_step: function called within epochs.
        report: function that writes the report of a folder.
        notes: sentences on what was decided about data and weights, for people.
    """

    recipe: Recipe
    out: Path
    builder: str
    command: str = ""
    weights: Mapping[str, Tensor] | None = None
    baseline: bool = True
    draws: int = 20
    ood: Tensor | None = None
    resume: bool = False
    overwrite: bool = False
    on_step: OnStep | None = None
    report: Callable[[Path], Any] | None = None
    notes: tuple[str, ...] = ()
    _facts: dict[str, Any] = field(default_factory=dict)
    _spent: float = 0.0
    _started: float = 0.0
    _told: str = ""
    _folder: ResultFolder | None = None

    def __post_init__(self) -> None:
        """Fit the weights to the network, before anything else is done.

        Raises:
            OckhamError: the weights do not fit, or several processes are to do what one can do only.
        """
        if self.recipe.processes.count > 1 and not self.recipe.method.several:
            raise OckhamError(
                f"{self.recipe.method.name} runs in one process; `ockham compress` with mean-field, ivon, map and "
                "spike-slab posteriors runs in several"
            )
        self.notes += self.recipe.data.notes
        if self.weights is not None:
            self.weights, said = fitted(self.recipe.network(), self.weights)
            self.notes += said

    def run(self) -> Iterator[EpochInfo]:
        """Do the job, one epoch per item; at the end the folder is complete and the checkpoint gone.

        Raises:
            OckhamError: weights do not fit, the folder cannot be written, a checkpoint of another job.
        """
        processes = self.recipe.processes
        folder = ResultFolder(self.out, overwrite=self.overwrite, resume=self.resume)
        with folder if processes.rank == 0 else nullcontext() as self._folder:
            seal = None if self._folder is None else self._folder.finished
            if seal is not None:
                self._compare(seal.job)
            if bool(processes.told(torch.tensor(seal is not None))):
                return
            self._started, r = time.monotonic(), self.recipe
            own = None if self._folder is None else self._folder.checkpoint()
            saved: Mapping[str, Any] = first_checkpoint(own, processes) or {}
            self._facts, self._spent = {}, 0.0
            if saved:
                self._compare(saved["job"])
                compare_surroundings(saved.get("surroundings", ""), self.out)
                self._facts, self._spent = json.loads(saved["facts"]), float(saved["spent"])
            if self.weights is None and self.baseline:
                yield from self._adam(saved)
            elif self.weights is not None and "adam" not in self._facts:
                model = r.network()
                model.load_state_dict(dict(self.weights))
                self._done("adam", self._before(model, None) | {"source": "given weights"})
            engine = r.engine(r.method, epochs=r.epochs, held_out=r.held_out, weights=self.weights)
            yield from self._go(engine, saved)
            self._finish(engine)

    @property
    def before(self) -> Mapping[str, Any] | None:
        """What is known of the network that the run is compared with, plain values; None until it was measured."""
        return self._facts.get("adam")

    # ------------------------------------------------------------------ stages
    def _adam(self, saved: Mapping[str, Any]) -> Iterator[EpochInfo]:
        """Train the yardstick: rate, number of epochs and temperature are chosen on a tenth of the training examples.

        Then it is trained on all of them, for as many epochs.
        """
        r = self.recipe
        for rate in SEARCH_RATES:
            method = PlainTraining(rate, f"search {rate:g}")
            if method.stage not in self._facts:
                engine = r.engine(method, epochs=max(1, round(r.epochs / 10)), held_out=0.1)
                yield from self._go(engine, saved)
                done = engine.result()
                told: dict[str, Any] = {"likelihood": r.likelihood().kind}
                predictor = mean_predictor(done.model, **told)
                nll = measures(predictor, *r.split(0.1)[1], noise_variance=done.noise_variance, **told)["nll"]
                self._done(method.stage, {"nll": nll, "rate": rate})
        if "tune" not in self._facts:
            rates = [f for name, f in self._facts.items() if name.startswith("search ")]
            rate = min(rates, key=lambda f: f["nll"])["rate"]
            engine = r.engine(PlainTraining(rate, "tune", r.split(0.1)[1]), epochs=r.epochs, held_out=0.1)
            yield from self._go(engine, saved)
            self._done("tune", {"rate": rate, **asdict(engine.state.own[1])})
        if "adam" not in self._facts:
            tuned = self._facts["tune"]
            engine = r.engine(PlainTraining(tuned["rate"]), epochs=r.epochs)
            yield from self._go(engine, saved, until=tuned["epoch"])
            noise = None if tuned["noise_variance"] is None else torch.tensor(tuned["noise_variance"])
            before = self._before(engine.result().model, noise, tuned["temperature"])
            self._done("adam", before | {k: tuned[k] for k in ("rate", "epoch", "temperature")} | {"source": "adam"})

    def _before(self, model: nn.Module, noise: Tensor | None, temperature: float = 1.0) -> dict[str, Any]:
        if self._folder is None:
            return {}
        probe = self._folder.stage / f".{NETWORK}.before"
        size = save_network(model, probe, builder=self.builder)
        probe.unlink()
        data, kind = self.recipe.data, self.recipe.likelihood().kind
        if kind == "regression" and noise is None:  # given weights: what they leave of the training targets
            output = mean_predictor(model, likelihood=kind)(data.train_x)[0]
            noise = (output - data.train_y.reshape(output.shape)).double().square().mean(0, keepdim=True)
        facts = network_facts(model, data, noise, self.ood, likelihood=kind, temperature=temperature)
        return {"facts": to_plain(facts.stored(size))}

    def _go(self, engine: Engine, saved: Mapping[str, Any], *, until: int | None = None) -> Iterator[EpochInfo]:
        engine.on_step = self.on_step
        if saved.get("stage") == engine.method.stage:
            engine.load(saved["state"])
        last = engine.task.epochs if until is None else until
        while engine.state.done < last:
            info = next(iter(engine))
            self._checkpoint(engine.method.stage, engine.saved())
            yield replace(info, epochs=last)

    # ------------------------------------------------------------------ checkpoint
    def _compare(self, job: str) -> None:
        """Refuse to go on with another job, naming what differs."""
        theirs, ours = json.loads(job), json.loads(self._fingerprint())
        other = [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]
        other = ["method"] if "method" in other else other  # whose settings have no equals
        if other:
            changed = ", ".join(f"{k} was {theirs.get(k)}, is {ours.get(k)}" for k in other)
            raise OckhamError(
                f"{self.out} belongs to another job: {changed}. Resume with the same settings, or start anew "
                "without --resume"
            )

    def _fingerprint(self) -> str:
        if self._told:
            return self._told
        data = self.recipe.data
        names = {"data": data.name, "data content": data_fingerprint(data), "network": self.builder}
        names |= {"network's code": network_fingerprint(self.recipe.network())}
        names |= {"weights": weights_fingerprint(self.weights), "likelihood": self.recipe.likelihood().kind}
        names |= {"foreign inputs": weights_fingerprint(None if self.ood is None else {"x": self.ood})}
        ours = self._settings() | names | {"baseline": self.baseline, "draws": self.draws}
        self._told = json.dumps(ours, sort_keys=True)
        return self._told

    def _settings(self) -> dict[str, Any]:
        r = self.recipe
        return {"method": r.method.name, **r.method.settings(), "batch_size": r.batch_size, "seed": r.seed}

    def _clock(self) -> float:
        return self._spent + time.monotonic() - self._started

    def _checkpoint(self, stage: str, state: Mapping[str, Any]) -> None:
        if self._folder is None:
            return
        tree = {"job": self._fingerprint(), "stage": stage, "state": state, "spent": self._clock()}
        tree |= {"surroundings": surroundings()}
        self._folder.save_checkpoint(tree | {"facts": json.dumps(self._facts)})

    def _done(self, name: str, facts: dict[str, Any]) -> None:
        self._facts[name] = facts
        self._checkpoint("between", {})

    # ------------------------------------------------------------------ the end
    def _finish(self, engine: Engine) -> None:
        result, r = engine.result(), self.recipe
        if self._folder is None:
            return
        new = self._folder.stage
        size = save_network(result.model, new / NETWORK, builder=self.builder)
        if result.posterior:
            result.posterior.save(new / POSTERIOR)
        save_plan(result.plan, new / PLAN)
        asked: dict[str, Any] = {"likelihood": r.likelihood().kind, "draws": self.draws, "seed": r.seed}
        after, mean = compressed_facts(result, r.data, self.ood, **asked)
        old = self._facts.get("adam")
        before = from_plain(NetworkFacts, old["facts"]) if old else None
        seconds, noise = round(self._clock(), 2), result.noise_variance
        metrics = Metrics(
            r.method.name,
            before and before.measures,
            after.stored(size).measures,
            mean.stored(size).measures if result.posterior else None,
            result.keep_share,
            seconds,
            r.seed,
            None if noise is None else tuple(noise.reshape(-1).tolist()),
            r.data.name,
            self.builder,
            before_source=old["source"] if old else "none",
            before_rate=old.get("rate") if old else None,
            before_epochs=old.get("epoch") if old else None,
            before_temperature=old.get("temperature") if old else None,
            draws=1 if not result.posterior or result.posterior.is_point else self.draws,
            likelihood=r.likelihood().kind,
        )
        told: dict[str, Any] = {"command": self.command, "builder": self.builder, "seed": r.seed, "device": r.device}
        made = provenance(r.data, self._settings(), self.out, seconds=seconds, **told)
        changed = structure(r.network(), result, r.data.test_x[:1].to(r.device))
        gates = r.method.record(engine.state)
        said = None if gates is None else from_plain(GateFacts, gates)
        write_result(new, Result(metrics, made, history(result), analysis(result, after, before), changed, said))
        if self.report is not None:
            self.report(new)
        self._folder.commit(job=self._fingerprint())
