"""Two processes that divide the calibration data prune as one does.

Starting processes takes longer than what they do here, so one pair does everything and the tests look at its files.
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ockham
from ockham.core.seal import sealed
from ockham.errors import OckhamError
from ockham.methods.blocks.prune import Pruned, PruneSettings, prune_folder
from ockham.methods.blocks.solve import Damping

from .networks import batches, ids, network, text_folder

pytestmark = pytest.mark.filterwarnings("ignore")


# an odd number of batches: the two have unequally many, and of the five only the fourth judges
class Residual(nn.Module):
    """A branch added to a stream: its last matrix makes up for what the stream lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.tanh(self.one(x)))


def given(kind: str, count: int) -> tuple[nn.Module, list[Any]]:
    """A network and its data."""
    if kind != "residual":
        return network(kind), batches(kind, count)
    torch.manual_seed(0)
    return nn.Sequential(*[Residual() for _ in range(3)], nn.Linear(6, 3)), [
        (torch.randn(40, 6), torch.arange(40) % 3) for _ in range(count)
    ]


WORK: dict[str, tuple[str, int, dict[str, Any]]] = {
    "llama": ("llama", 5, {"keep_share": 0.5}),
    "pattern": ("llama", 7, {"pattern": "2:4"}),
    "drift": ("residual", 9, {"keep_share": 0.5}),
    "reconstructed": ("residual", 21, {"keep_share": 0.3}),
    "experts": ("mixtral", 5, {"keep_share": 0.5}),
    "units": ("vit", 5, {"structure": "uneven", "budget": {"params": "80%"}}),
    "evidence": ("residual", 9, {}),
    # with 4 batches two settings of one kind cost the same to four digits; with 8 all agree to 4e-5
    "posterior": ("bert", 8, {"keep_share": 0.5}),
}


def pruned(name: str, folder: Path | None = None, *, divided: bool = False) -> Pruned:
    kind, count, target = WORK[name]
    # settings of damping, and supports that are searched for, can hang on the last digits: not here
    plain = name in ("experts", "pattern")
    n_data = 2e3 if name == "evidence" else None
    settings = PruneSettings(
        folder=folder,
        posterior=name == "posterior",
        reconstruct=20 if name == "reconstructed" else 0,
        n_data=n_data,
        divided=divided,
        even=name == "posterior",  # what a random BERT's kinds of matrices cost lies near the rounding of a divergence
        damping=Damping(0.05, 0.3) if plain else None,
        rounds=2 if plain else None,
    )
    model, data = given(kind, count)
    return ockham.prune(model, data, settings=settings, **target)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone().contiguous() for n, t in model.state_dict().items()}


def folder_pruned(where: Path, name: str, *, divided: bool) -> dict[str, Any]:
    settings = PruneSettings(damping=Damping(0.1, 0.5), divided=divided)
    given = {"target": {"keep_share": 0.5}, "windows": (12, 32), "settings": settings}
    return prune_folder(where / "source", where / "source" / "text.txt", where / name, **given)


def worker(rank: int, where: Path, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name in WORK:
        done = pruned(name, divided=True)
        save_file(state(done.model), where / f"{name}.{rank}.safetensors")
        (where / f"{name}.{rank}.json").write_text(json.dumps(dict(done.evidence)))
        if done.posterior is not None:
            done.posterior.save(where / f"{name}.posterior.{rank}.safetensors")
    first = pruned("llama", where / "work", divided=True)
    if rank == 0:  # what two have begun one may end
        ended = pruned("llama", where / "work")
        assert all(
            torch.equal(a, b) for a, b in zip(state(first.model).values(), state(ended.model).values(), strict=True)
        )
    # one process was stopped a block earlier than the other
    if rank == 1:
        (where / "work" / "process-1" / "weights" / "keep-0.5" / "2.json").unlink()
    again = pruned("llama", where / "work", divided=True)
    assert all(torch.equal(a, b) for a, b in zip(state(first.model).values(), state(again.model).values(), strict=True))
    (where / f"metrics.{rank}.json").write_text(json.dumps(folder_pruned(where, "together", divided=True)))
    try:
        folder_pruned(where, "together", divided=True)
    except OckhamError as error:
        (where / f"finished.{rank}").write_text(str(error))
    try:
        ockham.prune(network("llama"), [ids(1)], keep_share=0.5, settings=PruneSettings(divided=True))
        said = "nothing"
    except OckhamError as error:
        said = str(error)
    (where / f"refused.{rank}").write_text(said)
    if rank == 0:  # the other is not waited for
        save_file(state(pruned("llama").model), where / "alone.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("several")
    text_folder(where / "source")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mock.patch.object(sys, "path", [str(Path(__file__).parents[1]), *sys.path]):  # where this file's package is
        mp.spawn(worker, (where, port), nprocs=2)
    return where


@pytest.mark.parametrize("name", WORK)
def test_two_prune_as_one(folder: Path, name: str) -> None:
    one, two = (load_file(folder / f"{name}.{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(t, two[n]) for n, t in one.items())
    whole = pruned(name)
    expected = state(whole.model)
    assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in expected.items()}
    # which expert a token goes to hangs on the last digits
    near = {"experts": 0.05, "drift": 1e-3}.get(name, 0.02)
    for n, t in expected.items():
        assert float(((t == 0) != (one[n] == 0)).float().mean()) < 0.01, n
        assert float((one[n] - t).norm()) <= near * float(t.norm()) + 1e-6, n
    nats = json.loads((folder / f"{name}.0.json").read_text())
    assert nats == json.loads((folder / f"{name}.1.json").read_text())
    assert nats == pytest.approx(dict(whole.evidence), rel=0.02, abs=0.5)


def test_one_of_several_may_prune_by_itself(folder: Path) -> None:
    alone, whole = load_file(folder / "alone.safetensors"), state(pruned("llama").model)
    assert all(torch.equal(t, alone[n]) for n, t in whole.items())


def test_work_is_divided_among_a_group_only() -> None:
    with pytest.raises(OckhamError, match="init_process_group"):
        pruned("llama", divided=True)


def test_the_posterior_is_that_of_all_data(folder: Path) -> None:
    found = ockham.load_posterior(folder / "posterior.posterior.0.safetensors")
    whole = pruned("posterior").posterior
    assert whole is not None
    for name, g in whole.items():
        there = g.keep & found[name].keep
        torch.testing.assert_close(found[name].precision[there], g.precision[there], rtol=1e-3, atol=0)


def test_more_processes_than_batches_are_refused_by_all(folder: Path) -> None:
    for rank in range(2):
        assert "2 processes divide" in (folder / f"refused.{rank}").read_text()


def test_a_folder_is_pruned_by_two_and_written_by_one(folder: Path) -> None:
    metrics, others = (json.loads((folder / f"metrics.{rank}.json").read_text()) for rank in range(2))
    assert others == {} and json.loads((folder / "together" / "metrics.json").read_text()) == metrics
    whole = folder_pruned(folder, "by_itself", divided=False)
    assert metrics["kept"] == pytest.approx(whole["kept"])
    assert metrics["after"]["nll"] == pytest.approx(whole["after"]["nll"], rel=1e-3)
    assert sealed(folder / "together") is not None and not (folder / "together" / "work").exists()
    one, two = (load_file(folder / n / "model.safetensors") for n in ("by_itself", "together"))
    for name, t in one.items():
        assert float((two[name].float() - t.float()).norm()) <= 0.02 * float(t.float().norm()) + 1e-6, name
    # a finished result is refused by the one that writes, and the other does not wait
    assert "overwrite" in (folder / "finished.0").read_text()
    assert "process 0 failed" in (folder / "finished.1").read_text()
