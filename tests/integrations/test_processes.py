"""Two CPU processes (gloo) give what one process gives on the joined data, whatever loop trains.

Starting processes takes longer than what they do here, so one pair does everything and the tests look at its files.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import ockham
from ockham.core.batch import RowsOf
from ockham.core.processes import ALONE, Processes
from ockham.errors import OckhamError
from ockham.integrations.rounds import StepRounds, variational
from ockham.run.compression import WeightRounds
from ockham.run.job import Job, Recipe
from ockham.zoo.data import from_arrays

pytestmark = pytest.mark.filterwarnings("ignore")

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.stack([X[:, 0] - X[:, 1], 100 * X[:, 2]], 1) + 0.3 * torch.randn(
    64, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64
)
LABELS = (Y[:, 0] > 0).long()


def network(outputs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


# ------------------------------------------------------------------ what both do, alone or together
LAPLACE = {
    "kronecker": {"likelihood": "regression", "structure": "kronecker", "fisher": "empirical"},
    "diagonal": {"likelihood": "regression", "structure": "diagonal", "fisher": "empirical"},
    "classes": {"structure": "kronecker", "fisher": "empirical"},
}


def laplace(name, part=slice(None), **more):
    y = LABELS if name == "classes" else Y
    loader = [(X[i : i + 8], y[i : i + 8]) for i in range(0, 64, 8)][part]
    return ockham.laplace(network(2), loader, **LAPLACE[name], **more)


COMPRESS = {
    "classes": {"structure": ockham.Structures(price=ockham.FlatPrice(1e3), cap=0.34, wait=0), "ignore": "2.bias"},
    "numbers": {"likelihood": "regression"},
}


def compressed(name, wrap=lambda net: net, rank=0, count=1):
    """Batches of 9 rows, the last of one: uneven between processes, and nothing for the second at the end."""
    y = LABELS if name == "classes" else 1e3 + Y
    loader = RowsOf([(X[i : i + 9], y[i : i + 9]) for i in range(0, 64, 9)], rank, count)
    training = ockham.Training(epochs=6, learning_rate=3e-2, prior=ockham.FixedPrior(1.0))
    rounds = ockham.Rounds(start=0.3, end=0.9, count=3)
    return ockham.compress(wrap(network(2)), loader, training=training, rounds=rounds, **COMPRESS[name])


def job(out, processes=ALONE, **more):
    data = from_arrays("tiny", (X.float(), LABELS), (X.float(), LABELS))
    training = ockham.Training(epochs=4, learning_rate=3e-2)
    recipe = Recipe(lambda: network(2).float(), ockham.Classification, data, 9,
                    WeightRounds(training, rounds=ockham.Rounds(start=0.5, end=0.9, count=2)),
                    epochs=4, processes=processes)  # fmt: skip
    return Job(recipe, Path(out), "user", baseline=False, draws=2, **more)


def accelerated():
    """Batches of 16, divided between the processes."""
    from accelerate import Accelerator, DataLoaderConfiguration

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    net, loader = network(2), DataLoader(TensorDataset(X, LABELS), 16)
    optimizer = ockham.MeanField(net.named_parameters(), n_data=64, lr=1e-2)
    model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    inner, rounds, step = variational(optimizer, "test"), StepRounds(ockham.Rounds(start=0.5, end=1.0, count=2)), 0
    rounds.plan(net, 10 * len(loader))
    for _ in range(10):
        for x, y in loader:
            step += 1
            optimizer.zero_grad()
            with inner.sampled():
                loss = nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
            optimizer.step()
            rounds.after_step(inner, step, float(loss.detach()))
    return inner.posterior()


def lightened(**options):
    """Batches of 16; every process takes its rows of each."""
    import lightning.pytorch as pl

    from ockham.integrations.lightning import EvidenceCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network(2)

        def training_step(self, batch, index):
            x, y = (part[self.global_rank :: self.trainer.world_size] for part in batch)
            return nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return ockham.MeanField(self.named_parameters(), n_data=64, lr=1e-2)

    evidence = EvidenceCallback(ockham.Rounds(start=0.5, end=1.0, count=2))
    trainer = pl.Trainer(accelerator="cpu", max_epochs=5, logger=False, enable_progress_bar=False, callbacks=[evidence],
                         enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
                         **options)  # fmt: skip
    trainer.fit(Module(), DataLoader(TensorDataset(X, LABELS), 16))
    return evidence.posterior


# ------------------------------------------------------------------ the pair
def worker(rank, folder, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)

    def keep(name, posterior):
        posterior.save(folder / f"{name}.{rank}.safetensors")

    for name in LAPLACE:
        with mock.patch.object(torch.linalg, "eigh", wraps=torch.linalg.eigh) as eigh:
            keep(f"laplace-{name}", laplace(name, slice(rank, None, 2), sharded=True))
        solved = (str(call.args[0].shape[-1]) for call in eigh.call_args_list)
        (folder / f"eigh-{name}.{rank}").write_text(" ".join(solved))
    for name in COMPRESS:
        found = compressed(name, DistributedDataParallel, rank, 2)
        keep(f"compress-{name}", found.posterior)
        if found.plan is not None:
            (folder / f"plan.{rank}.json").write_text(found.plan.to_json())
    for _ in zip(range(2), job(folder / "job", Processes.world()).run(), strict=False):
        pass  # two epochs, and then it is stopped
    for _ in job(folder / "job", Processes.world(), resume=True).run():
        pass
    (folder / f"refused.{rank}").write_text("\n".join(refusals(rank)))
    try:
        keep("accelerate", accelerated())
        keep("lightning", lightened(devices=2, strategy="ddp"))
    except ImportError:
        pass
    if dist.is_initialized():
        dist.destroy_process_group()


def refusals(rank):
    """What processes that do not fit together are told; all are told the same, and nobody waits for ever."""
    net, part = network(2), RowsOf([(X, LABELS)], rank, 2)
    wrapped = DistributedDataParallel(net)
    with torch.no_grad():
        net[0].weight += 1e-6 * rank
    yield told(lambda: ockham.compress(wrapped, part))
    net = network(2)
    optimizer = ockham.MeanField(net.named_parameters(), n_data=64, seed=rank)  # a fault: two seeds
    rounds = StepRounds(ockham.Rounds(start=0.0, end=1.0, count=1))
    rounds.plan(net, 1)
    with optimizer.sampled():
        nn.functional.cross_entropy(net(X), LABELS).backward()
    optimizer.step()
    yield told(lambda: rounds.after_step(optimizer, 1, 0.0))
    nothing = slice(0) if rank else slice(None)  # a fault: no data for process 1
    yield told(lambda: laplace("classes", nothing, sharded=True))
    yield told(lambda: laplace("kronecker", nothing, sharded=True))
    wrong = RowsOf([(X[:, : 4 - rank], LABELS)], rank, 2)  # a fault: process 1 has three columns
    yield told(lambda: ockham.compress(DistributedDataParallel(network(2)), wrong))


def told(call):
    try:
        call()
    except OckhamError as error:
        return str(error).replace("\n", " ")
    return "nothing"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("pair")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (where, port), nprocs=2)
    return where


def pair(folder, name):
    return [ockham.load_posterior(folder / f"{name}.{rank}.safetensors") for rank in range(2)]


def alike(found, whole, **near):
    assert found.n_data == whole.n_data and list(found) == list(whole)
    for key, g in whole.items():
        assert torch.equal(found[key].keep, g.keep), key
        torch.testing.assert_close(found[key].mean, g.mean, **near)
        torch.testing.assert_close(found[key].precision, g.precision, **near)


# ------------------------------------------------------------------ tests
@pytest.mark.parametrize("name", list(LAPLACE))
def test_laplace_of_divided_data_is_that_of_the_joined_data(folder, name):
    whole = laplace(name)
    for found in pair(folder, f"laplace-{name}"):
        alike(found, whole, rtol=1e-10, atol=1e-10)
        for key, g in whole.items():
            torch.testing.assert_close(found[key].prior_precision, g.prior_precision, rtol=1e-8, atol=0)
        if whole.noise_variance is not None:
            torch.testing.assert_close(found.noise_variance, whole.noise_variance, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", list(COMPRESS))
def test_compression_of_uneven_batches_is_that_of_the_joined_batches(folder, name):
    whole = compressed(name)
    assert whole.rounds and whole.posterior.kept() < 44
    for rank, found in enumerate(pair(folder, f"compress-{name}")):
        alike(found, whole.posterior, rtol=1e-7, atol=1e-7)
        if whole.noise_variance is not None:  # its logarithm is a float32 parameter: a last digit of it is 1.2e-7 here
            torch.testing.assert_close(found.noise_variance, whole.noise_variance, rtol=1e-6, atol=0)
        if whole.plan is not None:
            plan = ockham.Plan.from_json((folder / f"plan.{rank}.json").read_text())
            assert plan.removed == whole.plan.removed != {}


def test_a_job_of_two_processes_that_was_stopped_gives_the_folder_of_one(folder, tmp_path):
    for _ in job(tmp_path / "one").run():
        pass
    one, two = (ockham.load_posterior(where) for where in (tmp_path / "one", folder / "job"))
    alike(two, one, rtol=1e-4, atol=1e-4)
    assert [p for p in (folder / "job").iterdir() if p.name.startswith((".new", "checkpoint"))] == []


def test_processes_that_differ_are_named_before_anything_is_trained_or_removed(folder):
    for rank in range(2):
        start, drift, *_ = (folder / f"refused.{rank}").read_text().splitlines()
        assert "process 1 differ from those of process 0" in start
        assert "process 1 differ from those of process 0" in drift


def test_what_one_process_cannot_read_stops_all_and_is_named(folder):
    """The others would wait for it."""
    first, second = ((folder / f"refused.{rank}").read_text().splitlines()[2:] for rank in range(2))
    assert first == 3 * ["stopped, since process 1 failed: the message there says why"]
    assert "the loader is empty" in second[0] and "the loader is empty" in second[1]
    assert "the network cannot take the data's inputs, float64 (32, 3)" in second[2]


def test_each_process_decomposes_its_share_of_the_factors_and_all_have_the_same(folder):
    sizes = [sorted(map(int, (folder / f"eigh-classes.{rank}").read_text().split())) for rank in range(2)]
    assert sizes == [[2, 7], [5, 6]]  # inputs with their bias, and outputs, of one layer each
    one, two = pair(folder, "laplace-classes")
    for a, b, whole in zip(one.matrices, two.matrices, laplace("classes").matrices, strict=True):
        for name in ("input_values", "input_vectors", "output_values", "output_vectors"):
            assert torch.equal(getattr(a.precision, name), getattr(b.precision, name))
        torch.testing.assert_close(a.precision.curvature, whole.precision.curvature, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("library", "trained"), [("accelerate", accelerated), ("lightning", lightened)])
def test_loops_of_other_libraries_train_on_two_processes_as_on_one(folder, library, trained):
    pytest.importorskip(library)
    whole = trained()
    assert whole.kept() < whole.size()
    for found in pair(folder, library):
        alike(found, whole, rtol=1e-7, atol=1e-7)


def test_sharded_parameters_are_refused_by_name():
    class Sharded(nn.Parameter):
        device_mesh = "2 processes"

    net = network(2)
    net[2].weight = Sharded(net[2].weight.data)
    with pytest.raises(OckhamError, match=r"'2\.weight' is sharded over processes \(FSDP\)"):
        ockham.compress(net, [(X, LABELS)])


NETS = """
import os
from torch import nn

class Net(nn.Sequential):
    left = int(os.environ.get("STOP_AFTER", "-1"))  # forward passes of training until this process dies

    def forward(self, x):
        Net.left -= self.training
        if Net.left == 0:
            os._exit(9)
        return super().forward(x)

def net():
    return Net(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
"""


def typed(folder, out, *more, processes=0, **environment):
    """The command in ``folder``, under torchrun where there are processes."""
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"] if processes else []
    settings = {"epochs": 8, "batch-size": 9, "learning-rate": 0.03, "rounds": 3, "unit-price": 20, "draws": 2,
                "round-to": 1}  # fmt: skip
    given = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    command = ["compress", "--data", "data.npz", "--model", "nets:net", "--structure", "--no-baseline", *given]
    source = str(Path(ockham.__file__).resolve().parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([source, "."]), **environment}
    return subprocess.run([sys.executable, "-m", *launch, "ockham", *command, "--out", out, *more], cwd=folder,
                          capture_output=True, text=True, check=False, env=environment)  # fmt: skip


@pytest.mark.slow
def test_the_command_under_torchrun_stopped_and_resumed_takes_out_the_units_that_one_process_does(tmp_path):
    """Batches of nine and a last one of one row: uneven, and at the end of an epoch the second process has none."""
    np.savez(tmp_path / "data.npz", x=X.numpy().astype("float32"), y=LABELS.numpy())
    (tmp_path / "nets.py").write_text(NETS)
    alone = typed(tmp_path, "one")
    assert alone.returncode == 0, alone.stderr
    stopped = typed(tmp_path, "two", processes=2, STOP_AFTER="45")
    assert stopped.returncode != 0 and not (tmp_path / "two" / "network.safetensors").exists()
    done = typed(tmp_path, "two", "--resume", processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Report:") == 1
    one, two = (ockham.Plan.from_json((tmp_path / out / "plan.json").read_text()) for out in ("one", "two"))
    assert one.removed == two.removed
    assert 0 < sum(map(len, one.removed.values())) < 16
    plain = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    small, again = (ockham.load(tmp_path / out, model=plain) for out in ("one", "two"))
    assert sum(p.numel() for p in again.parameters()) < 4 * 16 + 16 + 16 * 2 + 2
    torch.testing.assert_close(again(X.float()), small(X.float()), rtol=1e-3, atol=1e-3)
    alike(*(ockham.load_posterior(tmp_path / out) for out in ("two", "one")), rtol=1e-3, atol=1e-3)
