"""Networks sharded by fully_shard (FSDP2) over CPU processes (gloo) train as in one process, and are saved and loaded.

Starting processes takes longer than what they do here, so one group does everything and the tests look at its files.
"""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ockham
from ockham.errors import OckhamError
from ockham.fit.mean_field import PointEstimate
from ockham.surgery.groups import plan_masks
from ockham.surgery.shrinking import mask

pytestmark = pytest.mark.filterwarnings("ignore")

X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IDS = torch.randint(0, 7, (64, 3), generator=torch.Generator().manual_seed(1))
LABELS = (X[:, 0] > X[:, 1]).long()
STEPS, REMOVAL = 11, 6  # the noise is new, mirrored, rotated; a removal falls into the middle of a turn
MAKERS = {
    "mean-field": lambda p: ockham.MeanField(p, n_data=64, lr=3e-3, prior=ockham.LayerScale(), prior_interval=4),
    "ivon": lambda p: ockham.IVON(p, n_data=64, prior=ockham.EmpiricalBayes(), prior_interval=4, steps=20),
    "map": lambda p: PointEstimate(p, n_data=64, lr=3e-3, prior_variance=1.0),
}


class Net(nn.Module):
    """Rows that do not divide evenly, fewer rows than processes, a padding row; more weights than are ever rotated."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 6, padding_idx=2)
        self.first, self.second, self.last = nn.Linear(11, 71), nn.Linear(71, 61), nn.Linear(61, 2)

    def forward(self, x, ids):
        h = torch.cat([x, self.words(ids).mean(1)], 1)
        return self.last(torch.tanh(self.second(torch.tanh(self.first(h)))))


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().double()


def divided(mesh):
    model = network()
    for part in (model.first, model.second):
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def steps(model, optimizer, which, rank=0, count=1):
    for step in which:
        rows = slice(step % 4 * 16 + rank, step % 4 * 16 + 16, count)
        optimizer.zero_grad()
        with optimizer.sampled():
            nn.functional.cross_entropy(model(X[rows], IDS[rows]), LABELS[rows]).backward()
        optimizer.step()
        if step == REMOVAL:
            halves = {name: g.mean.abs() >= g.mean.abs().median() for name, g in optimizer.posterior().items()}
            optimizer.remove(halves)


def shrunk(model, optimizer):
    """Uneven widths, and not those that the processes would like."""
    groups = ockham.trace(network(), (X[:2], IDS[:2])).separate
    keep = {g.id: torch.arange(g.size) % (3 + at) != 1 for at, g in enumerate(groups)}
    plan = plan_masks(groups, keep)
    assert len(plan.removed) >= 2
    small, carried = ockham.shrink(model, plan, optimizer=optimizer)
    return mask(model, plan), small, carried


def smaller(model, rank=0, count=1):
    """Steps, the units out, steps again."""
    optimizer = MAKERS["mean-field"](model.named_parameters())
    steps(model, optimizer, range(REMOVAL + 2), rank, count)
    model.eval()
    masked, small, carried = shrunk(model, optimizer)
    torch.testing.assert_close(small(X, IDS), masked(X, IDS), rtol=1e-10, atol=1e-10)
    small.train()
    steps(small, carried, range(REMOVAL + 2, STEPS), rank, count)
    return small, carried


def facts(optimizer):
    return optimizer.posterior(), optimizer.kl()


# ------------------------------------------------------------------ what every process does
def worker(rank, count, folder, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=count)
    mesh = init_device_mesh("cpu", (count,))
    for name, make in MAKERS.items():
        model = divided(mesh)
        optimizer = make(model.named_parameters())
        steps(model, optimizer, range(STEPS), rank, count)
        keep(folder / f"{name}.{rank}", optimizer)
        if name == "map":
            continue
        saved = folder / f"{name}.dcp"
        model = divided(mesh)
        optimizer = make(model.named_parameters())
        steps(model, optimizer, range(REMOVAL + 2), rank, count)
        dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=saved)
        model = divided(mesh)
        optimizer = make(model.named_parameters())
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        dcp.load(state, checkpoint_id=saved)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        steps(model, optimizer, range(REMOVAL + 2, STEPS), rank, count)
        keep(folder / f"{name}-loaded.{rank}", optimizer)
    functions(mesh, rank, count, folder)
    started(mesh, rank, count, folder)
    small, optimizer = smaller(divided(mesh), rank, count)
    assert type(small).__name__ == "FSDPNet" and type(small.second).__name__ == "FSDPLinear"
    assert type(small.last) is nn.Linear and hasattr(small.last.weight, "device_mesh")
    keep(folder / f"shrunk.{rank}", optimizer)
    (folder / f"said.{rank}").write_text("\n".join(told(call) for call in refusals(mesh, rank, count)))
    dist.destroy_process_group()


def keep(path, optimizer):
    posterior, kl = facts(optimizer)
    posterior.save(path.with_name(path.name + ".safetensors"))
    path.with_name(path.name + ".kl").write_text(repr(kl))


def functions(mesh, rank, count, folder):
    """The functions of torch.distributed.checkpoint, which keep of an optimizer's state what they know."""
    model = divided(mesh)
    optimizer = MAKERS["mean-field"](model.named_parameters())
    steps(model, optimizer, range(REMOVAL + 2), rank, count)
    plain = network()
    alone = MAKERS["mean-field"](plain.named_parameters())
    alone.start_from(optimizer.posterior())  # the means
    alone.load_state_dict(optimizer.state_dict())
    steps(plain, alone, range(REMOVAL + 2, STEPS))
    keep(folder / f"alone.{rank}", alone)
    weights, state = get_state_dict(model, optimizer)
    model = divided(mesh)
    optimizer = MAKERS["mean-field"](model.named_parameters())
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    steps(model, optimizer, range(REMOVAL + 2, STEPS), rank, count)
    keep(folder / f"functions.{rank}", optimizer)


def started(mesh, rank, count, folder):
    """From a posterior of whole tensors, and from the state of an optimizer of whole parameters."""
    plain = network()
    optimizer = MAKERS["ivon"](plain.named_parameters())
    steps(plain, optimizer, range(REMOVAL + 1))
    model = divided(mesh)
    second = MAKERS["ivon"](model.named_parameters())
    second.start_from(optimizer.posterior())
    steps(model, second, range(REMOVAL + 1, STEPS), rank, count)
    keep(folder / f"started.{rank}", second)
    model = divided(mesh)
    third = MAKERS["ivon"](model.named_parameters())
    third.start_from(optimizer.posterior())  # the means
    third.load_state_dict(optimizer.state_dict())
    steps(model, third, range(REMOVAL + 1, STEPS), rank, count)
    keep(folder / f"taken.{rank}", third)
    x, before = X[:4], model(X[:4], IDS[:4]).detach()
    with third.sampled(), torch.no_grad():
        drawn = model(x, IDS[:4])
    third.zero_grad()
    with third.sampled(), torch.no_grad():
        again = model(x, IDS[:4])
    after = model(x, IDS[:4]).detach()
    torch.save([before, drawn, again, after], folder / f"draws.{rank}")


def refusals(mesh, rank, count):
    """What cannot be done is said, by name and before anything moves."""
    model = divided(mesh)
    yield lambda: ockham.SpikeSlab(model.named_parameters(), n_data=64)
    yield lambda: ockham.MeanField(model.named_parameters(), n_data=64, prior=ockham.GroupScale())
    mixed = network()
    fully_shard(mixed.second, mesh=mesh)
    yield lambda: ockham.MeanField(mixed.named_parameters(), n_data=64)
    seeds = ockham.MeanField(model.named_parameters(), n_data=64, seed=rank)  # a fault
    yield lambda: steps(model, seeds, range(1), rank, count)
    late = divided(mesh)
    optimizer = ockham.MeanField(late.named_parameters(), n_data=64)

    def outside():
        with optimizer.sampled():
            loss = late(X, IDS).sum()
        loss.backward()
        optimizer.step()

    yield outside
    broken = divided(mesh)
    second = ockham.MeanField(broken.named_parameters(), n_data=64)

    def infinite():
        with second.sampled():
            (broken(X, IDS).sum() * (torch.inf if rank == 0 else 1.0)).backward()
        second.step()

    yield infinite
    yield lambda: ockham.compress(model, [((X, IDS), LABELS)])
    yield lambda: ockham.IVON(divided(mesh).named_parameters(), n_data=64).health()


def told(call):
    try:
        call()
    except OckhamError as error:
        return str(error).replace("\n", " ")
    return "nothing"


def started_group(where, count):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (count, where, port), nprocs=count)
    return where


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return started_group(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def whole():
    """What one process does with whole tensors."""
    found = {}
    for name, make in MAKERS.items():
        model = network()
        optimizer = make(model.named_parameters())
        steps(model, optimizer, range(STEPS))
        found[name] = facts(optimizer)
    return found


def assert_alike(folder, name, whole, count=2):
    posterior, kl = whole
    for rank in range(count):
        found = ockham.load_posterior(folder / f"{name}.{rank}.safetensors")
        assert found.n_data == posterior.n_data and list(found) == list(posterior)
        assert 0 < posterior.kept() < posterior.size()
        for key, g in posterior.items():
            assert torch.equal(found[key].keep, g.keep), key
            torch.testing.assert_close(found[key].mean, g.mean, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(found[key].precision, g.precision, rtol=1e-9, atol=0)
            torch.testing.assert_close(found[key].prior_precision, g.prior_precision, rtol=1e-9, atol=0)
        assert float((folder / f"{name}.{rank}.kl").read_text()) == pytest.approx(kl, rel=1e-9)


# ------------------------------------------------------------------ tests
@pytest.mark.parametrize("name", list(MAKERS))
def test_sharded_training_with_a_removal_is_that_of_one_process(folder, whole, name):
    assert_alike(folder, name, whole[name])


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("mean-field-loaded", "mean-field"),
        ("ivon-loaded", "ivon"),
        ("functions", "mean-field"),
        ("alone", "mean-field"),
    ],
)
def test_a_distributed_checkpoint_goes_on_as_if_there_had_been_none(folder, whole, name, method):
    assert_alike(folder, name, whole[method])


def test_a_checkpoint_of_two_processes_goes_on_in_one(folder, whole, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        model = divided(init_device_mesh("cpu", (1,)))
        optimizer = MAKERS["mean-field"](model.named_parameters())
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        dcp.load(state, checkpoint_id=folder / "mean-field.dcp")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        steps(model, optimizer, range(REMOVAL + 2, STEPS))
        keep(tmp_path / "one.0", optimizer)
    finally:
        dist.destroy_process_group()
    assert_alike(tmp_path, "one", whole["mean-field"], 1)


def test_a_run_of_whole_tensors_goes_on_sharded(folder, whole):
    assert_alike(folder, "taken", whole["ivon"])
    model = network()
    optimizer = MAKERS["ivon"](model.named_parameters())
    steps(model, optimizer, range(REMOVAL + 1))
    second = network()
    fresh = MAKERS["ivon"](second.named_parameters())
    fresh.start_from(optimizer.posterior())
    steps(second, fresh, range(REMOVAL + 1, STEPS))
    assert_alike(folder, "started", facts(fresh))


def test_units_go_on_shards_as_in_one_process(folder):
    small, optimizer = smaller(network())
    posterior, kl = facts(optimizer)
    assert small.first.out_features < 71 and small.second.out_features < 61
    assert_alike(folder, "shrunk", (posterior, kl))


def test_every_block_gathers_its_own_draw_and_after_it_the_mean(folder):
    for rank in range(2):
        before, drawn, again, after = torch.load(folder / f"draws.{rank}")
        assert torch.equal(before, after)
        assert not torch.allclose(before, drawn) and not torch.allclose(drawn, again)


def test_what_cannot_be_done_on_shards_is_refused_by_name(folder):
    for rank in range(2):
        said = (folder / f"said.{rank}").read_text().splitlines()
        slab, group, mixed, seeds, outside, infinite, door, health = said
        assert "'words.weight' is a DTensor" in slab and "MeanField, IVON and PointEstimate" in slab
        assert "GroupScale needs whole tensors" in group
        assert "'second.weight' is sharded otherwise" in mixed
        assert "differ in seed: process 0 has 0, process 1 1" in seeds
        assert "run forward and backward inside" in outside
        assert "is NaN or infinite" in infinite
        assert "is sharded over processes (FSDP)" in door
        assert "health() of parameters that are sharded" in health


@pytest.mark.slow
def test_four_processes_do_the_same(tmp_path, whole):
    folder = started_group(tmp_path, 4)
    for name in MAKERS:
        assert_alike(folder, name, whole[name], 4)
    assert_alike(folder, "ivon-loaded", whole["ivon"], 4)
    assert_alike(folder, "functions", whole["mean-field"], 4)
    assert_alike(folder, "shrunk", facts(smaller(network())[1]), 4)
