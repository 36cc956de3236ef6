"""Lightning trains under a posterior by its closures; the callback removes; clipping, accumulation and resume hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ockham
from ockham.errors import OckhamError

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = [pytest.mark.filterwarnings("ignore")]

X = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] + X[:, 1] > 0).long()


class Module(lightning.LightningModule):
    def __init__(self, make=ockham.MeanField):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        self.make, self.drawn = make, []

    def training_step(self, batch, index):
        self.drawn.append(self.net[0].weight.detach().clone())
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.make(self.named_parameters(), n_data=len(X))


def fit(module, folder, callback=None, checkpoint=None, **options):
    from ockham.integrations.lightning import EvidenceCallback

    callback = callback or EvidenceCallback(ockham.Rounds(start=0.5, end=0.9, count=3))
    given = {"max_epochs": 6} | options
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                                default_root_dir=folder, callbacks=[callback], **given)  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(X, Y), 32), ckpt_path=checkpoint)
    return trainer, callback


def test_rounds_inside_a_fit(tmp_path):
    module = Module()
    trainer, callback = fit(module, tmp_path, gradient_clip_val=1.0, enable_checkpointing=False)
    assert len(callback.history) == 3 and [r.epoch for r in callback.history] == sorted(
        r.epoch for r in callback.history
    )
    for name, p in module.named_parameters():
        assert bool((p[~callback.posterior[name].keep] == 0).all())
    assert 0 < callback.posterior.kept() < callback.posterior.size()
    assert float(trainer.callback_metrics["kept_share"]) == pytest.approx(callback.history[-1].kept_share)
    assert not torch.equal(module.drawn[0], module.drawn[1])


def test_accumulated_steps_and_ivon(tmp_path):
    module = Module(ockham.IVON)
    _, callback = fit(module, tmp_path, accumulate_grad_batches=2, max_epochs=2, enable_checkpointing=False)
    assert callback.history and torch.equal(module.drawn[0], module.drawn[1])
    assert not torch.equal(module.drawn[1], module.drawn[2])


def test_a_fit_resumes_to_the_same_bits(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    whole = Module()
    keeper = ModelCheckpoint(dirpath=tmp_path, every_n_epochs=3, save_top_k=-1, filename="{epoch}")
    from ockham.integrations.lightning import EvidenceCallback

    rounds = [EvidenceCallback(ockham.Rounds(start=0.3, end=0.9, count=4)) for _ in range(2)]
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=6,
                                enable_model_summary=False, callbacks=[rounds[0], keeper])  # fmt: skip
    trainer.fit(whole, DataLoader(TensorDataset(X, Y), 32))
    again = Module()
    fit(again, tmp_path, rounds[1], str(tmp_path / "epoch=2.ckpt"), enable_checkpointing=False)
    assert [r.epoch for r in rounds[0].history] == [r.epoch for r in rounds[1].history]
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))


def test_optimizers_without_a_posterior_are_refused(tmp_path):
    module = Module(lambda named, n_data: torch.optim.Adam([p for _, p in named]))
    with pytest.raises(OckhamError, match=r"needs a variational optimizer.*got Adam"):
        fit(module, tmp_path, enable_checkpointing=False)


def test_a_callback_begins_anew_and_knows_its_module(tmp_path):
    """A second fit with the same callback has its own rounds; an optimizer of another module is refused at once."""
    callback, kept = None, []
    for _ in range(2):
        _, callback = fit(Module(), tmp_path, callback, enable_checkpointing=False)
        kept.append((len(callback.history), callback.posterior.kept()))
    assert kept[0] == kept[1] and kept[0][0] == 3
    other = Module()
    module = Module(lambda named, n_data: ockham.MeanField(other.named_parameters(), n_data=n_data))
    with pytest.raises(OckhamError, match="no parameter of the model that is trained"):
        fit(module, tmp_path, enable_checkpointing=False)
