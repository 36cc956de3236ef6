"""Lightning's Trainer: its closures draw from the posterior by themselves; this callback adds rounds of removal."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ockham.choose.rules import Rounds, Rule
from ockham.core.network import Ignore
from ockham.core.posterior import Posterior
from ockham.integrations.rounds import StepRounds, variational

__all__ = ["EvidenceCallback"]


class EvidenceCallback(Callback):
    """Removes weights in rounds while Lightning trains under a posterior.

    With an Ockham optimizer in ``configure_optimizers`` Lightning already trains under it: the optimizer runs the
    closure inside `sampled`, so ``training_step`` must not open a block of its own. This callback scores, decides and
    removes after certain steps, and logs ``kept_share`` and ``delta_f``. With ``accumulate_grad_batches`` it is needed
    for another reason, too: Lightning runs all but the last microbatch of a step outside of the optimizer, and the
    callback puts those under the same draw.

    Args:
        rounds: schedule of the removals, as shares of all optimizer steps; default eight rounds between 30 and 80 %.
        rule: decides what goes; default the evidence, no threshold.
        ignore: parameters to protect; names as the LightningModule has them.
        likelihood: name of the likelihood that the training loss is, for `ockham.predict`.

    Raises:
        OckhamError: from ``fit``, before the first step: the optimizer is no variational one, the number of steps is
            not known, or ``ignore`` names nothing.

    >>> trainer = Trainer(max_epochs=10, callbacks=[EvidenceCallback()])                # doctest: +SKIP
    """

    def __init__(
        self,
        rounds: Rounds | None = None,
        *,
        rule: Rule | None = None,
        ignore: Ignore = (),
        likelihood: str | None = "classification",
    ) -> None:
        given: dict[str, Any] = {"rounds": rounds, "rule": rule}
        self._steps = StepRounds(ignore=ignore, **{k: v for k, v in given.items() if v is not None})
        self._likelihood = likelihood
        self._block: Any = None
        self.posterior: Posterior | None = None

    @property
    def history(self) -> list[Any]:
        """Account of every round; its ``epoch`` counts steps."""
        return list(self._steps.history)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plan the rounds."""
        optimizer, steps = self._optimizer(trainer), trainer.estimated_stepping_batches
        begun: dict[str, Any] = {"optimizer": optimizer, "anew": not trainer.global_step}
        self._steps.plan(pl_module, int(steps) if math.isfinite(steps) else 0, **begun)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A microbatch that only accumulates is run under the draw of its step."""
        if trainer.accumulate_grad_batches > 1 and trainer.fit_loop.epoch_loop._should_accumulate():
            self._block = self._optimizer(trainer).sampled()
            self._block.__enter__()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The weights are the mean again, whatever happened."""
        self._close()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The round that is due, and its numbers in the log."""
        self._close()
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        value = float(loss.detach()) * trainer.accumulate_grad_batches if isinstance(loss, Tensor) else math.nan
        done = self._steps.after_step(self._optimizer(trainer), trainer.global_step, value)
        if done is not None:
            pl_module.log_dict({"kept_share": done.kept_share, "delta_f": done.delta_f}, sync_dist=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the posterior."""
        self.posterior = replace(self._optimizer(trainer).posterior(), likelihood=self._likelihood)

    def state_dict(self) -> dict[str, Any]:
        """The rounds so far, plain values."""
        return self._steps.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._steps.load(state_dict)

    def _close(self) -> None:
        block, self._block = self._block, None
        if block is not None:
            block.__exit__(None, None, None)

    def _optimizer(self, trainer: Trainer) -> Any:
        return variational(trainer.optimizers[0] if trainer.optimizers else None, "EvidenceCallback")
