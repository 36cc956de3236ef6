"""The network that Ockham compares with: chosen and calibrated on examples that it was not trained on."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import scipy.optimize
import torch
from torch import nn

from ockham.core.likelihood import Classification, Poisson, Regression
from ockham.errors import OckhamError
from ockham.run.compression import WEIGHT_DECAY, PlainTraining
from ockham.run.engine import Engine, Task
from ockham.run.job import Job, Recipe
from ockham.zoo.data import Batches, from_arrays


def examples(n: int, seed: int, *, classes: bool) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=g)
    signal = x[:, 0] + x[:, 1] * x[:, 2] + torch.randn(n, generator=g)
    return x, (signal > 0).long() if classes else 300 + 40 * signal


def network(outputs: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, outputs))


def engine(*, classes: bool, epochs: int = 30) -> tuple[Engine, tuple[torch.Tensor, torch.Tensor]]:
    (x, y), held_out = examples(80, 0, classes=classes), examples(60, 1, classes=classes)
    net, likelihood = network(2 if classes else 1), Classification() if classes else Regression()
    task = Task.of(net, Batches(x, y, 16, shuffle=True), likelihood, epochs=epochs)
    return Engine(PlainTraining(0.03, "tune", held_out), net, task), held_out


def test_a_classifier_is_judged_at_its_best_temperature() -> None:
    run, (x, y) = engine(classes=True)
    judged = []
    for _ in run:
        with torch.no_grad():
            logits = copy.deepcopy(run.state.network).eval()(x).double()
        least = scipy.optimize.minimize_scalar(
            lambda t, f=logits: float(nn.functional.cross_entropy(f / math.exp(t), y)), bounds=(-4, 4), method="bounded"
        )
        judged.append((least.fun, len(judged) + 1, math.exp(least.x)))
    found = run.state.own[1]
    assert (found.nll, found.epoch) == (pytest.approx(min(judged)[0]), min(judged)[1])
    assert found.temperature == pytest.approx(min(judged)[2], rel=1e-3) and found.noise_variance is None
    assert 1 < found.epoch < 30 and judged[-1][0] > found.nll + 0.01  # training on would have overfitted


def test_a_regression_has_the_noise_of_what_it_did_not_see() -> None:
    run, (x, y) = engine(classes=False)
    judged = []
    for _ in run:
        with torch.no_grad():
            judged.append(float((run.result().model(x)[:, 0].double() - y).square().mean()))
    found = run.state.own[1]
    assert found.epoch == 1 + judged.index(min(judged)) and found.temperature == 1.0
    assert found.noise_variance == pytest.approx([min(judged)])
    assert found.nll == pytest.approx(0.5 * math.log(2 * math.pi * math.e * min(judged)))


def test_matrices_decay_and_vectors_do_not() -> None:
    run, _ = engine(classes=True)
    named = {id(p): name for name, p in run.state.network.named_parameters()}
    decay = {named[id(p)]: g["weight_decay"] for g in run.state.optimizer.param_groups for p in g["params"]}
    assert decay == {"0.weight": WEIGHT_DECAY, "2.weight": WEIGHT_DECAY, "0.bias": 0.0, "2.bias": 0.0}


def test_the_best_epoch_travels_with_a_checkpoint() -> None:
    (whole, _), (first, _), (second, _) = (engine(classes=True) for _ in range(3))
    list(whole)
    for _ in range(20):
        next(iter(first))
    second.load(first.saved())
    list(second)
    assert second.state.own[1] == whole.state.own[1]


@pytest.mark.filterwarnings("ignore")
def test_the_job_trains_it_anew_on_everything_for_as_many_epochs(tmp_path) -> None:
    data = from_arrays("toy", examples(200, 0, classes=True), examples(400, 2, classes=True))
    method = PlainTraining(0.01, "adam")
    recipe = Recipe(lambda: network(2), Classification, data, 20, method, epochs=12, seed=3)
    job = Job(recipe, tmp_path / "r", "tests:net")
    seen = [(info.stage, info.epoch) for info in job.run()]
    before = job._facts["adam"]
    epochs = [epoch for stage, epoch in seen if stage == "adam"]
    assert [stage for stage, epoch in seen if epoch == 1][:4] == [
        "search 0.0003",
        "search 0.001",
        "search 0.003",
        "tune",
    ]
    assert epochs[: before["epoch"]] == list(range(1, before["epoch"] + 1))
    plain = recipe.engine(PlainTraining(before["rate"]), epochs=12)
    for _ in range(before["epoch"]):
        next(iter(plain))
    with torch.no_grad():
        logits = plain.state.network.eval()(data.test_x).double() / before["temperature"]
    want = float(nn.functional.cross_entropy(logits, data.test_y))
    assert before["facts"]["measures"]["nll"] == pytest.approx(want, rel=1e-6)
    assert before["temperature"] != 1.0


@pytest.mark.filterwarnings("ignore")
def test_a_job_of_another_likelihood_is_not_resumed(tmp_path) -> None:
    x, _ = examples(200, 0, classes=True)
    data = from_arrays("counts", (x, x[:, 0].exp().round()), (x, x[:, 0].exp().round()))
    jobs = [
        Job(
            Recipe(lambda: network(1), kind, data, 20, PlainTraining(0.01), epochs=3),
            tmp_path / "r", "tests:net", baseline=False, resume=resume,
        )
        for kind, resume in ((Regression, False), (Poisson, True))
    ]  # fmt: skip
    run = jobs[0].run()
    next(run)
    next(run)
    run.close()
    with pytest.raises(OckhamError, match="likelihood was regression, is poisson"):
        list(jobs[1].run())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stops", range(1, 40, 4))
def test_a_job_stopped_in_any_stage_has_the_same_yardstick(tmp_path, stops, whole) -> None:
    def job(resume: bool) -> Job:
        return Job(recipe(), tmp_path / "r", "tests:net", resume=resume)

    run = job(False).run()
    seen = [next(run) for _ in range(stops)]
    run.close()
    later = job(True)
    seen += list(later.run())
    assert later.before == whole[0] and [(i.stage, i.epoch, i.loss) for i in seen] == whole[1]


def recipe() -> Recipe:
    data = from_arrays("toy", examples(200, 0, classes=True), examples(400, 2, classes=True))
    return Recipe(lambda: network(2), Classification, data, 20, PlainTraining(0.01, "method"), epochs=12, seed=3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    job = Job(recipe(), tmp_path_factory.mktemp("whole") / "r", "tests:net")
    with warnings.catch_warnings(action="ignore"):
        seen = list(job.run())
    return job.before, [(i.stage, i.epoch, i.loss) for i in seen]
