"""Lightning under a posterior: the optimizer's closure draws by itself, a callback removes weights in rounds."""

import logging
import warnings

import lightning.pytorch as pl
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import ockham
from ockham.integrations.lightning import EvidenceCallback
from ockham.zoo.data import digits
from ockham.zoo.networks import digits_mlp

DATA = digits()


# --8<-- [start:module]
class Digits(pl.LightningModule):
    """A network, its loss and a variational optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.network = digits_mlp()

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """The mean loss of a batch."""
        return cross_entropy(self.network(batch[0]), batch[1])  # no sampled() here: the closure is inside one

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The posterior."""
        return ockham.MeanField(self.named_parameters(), n_data=len(DATA.train_x), lr=3e-3, kl_warmup=200)


# --8<-- [end:module]


def main() -> None:
    pl.seed_everything(0, verbose=False)
    module, evidence = Digits(), EvidenceCallback(ockham.Rounds(start=0.3, end=0.8, count=8))
    trainer = pl.Trainer(max_epochs=30, accelerator="cpu", logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, callbacks=[evidence])  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(DATA.train_x, DATA.train_y), 64, shuffle=True))
    posterior = evidence.posterior
    bare = {name.removeprefix("network."): g for name, g in posterior.items()}
    found = ockham.predict(module.network, ockham.Posterior(bare, posterior.n_data), DATA.test_x)
    accuracy = (found.probabilities.argmax(1) == DATA.test_y).float().mean()
    print(f"test accuracy {accuracy:.1%} with {posterior.kept() / posterior.size():.1%} of the weights")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main()
