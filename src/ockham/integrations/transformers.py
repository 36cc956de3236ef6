"""Hugging Face's Trainer under a posterior: its loop, its arguments, its checkpoints, and no subclass."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers.trainer_callback import ExportableState, TrainerCallback

from ockham.choose.prices import Structures
from ockham.choose.rules import Rounds, Rule
from ockham.core.network import Ignore
from ockham.core.posterior import Posterior
from ockham.errors import OckhamError
from ockham.integrations.rounds import StepRounds, variational
from ockham.run.folder import PLAN, save_plan
from ockham.surgery.groups import Plan

__all__ = ["EvidenceCallback"]

FILE = "posterior.safetensors"


class EvidenceCallback(TrainerCallback, ExportableState):
    """Lets `transformers.Trainer` train under a posterior, and removes weights in rounds as their evidence says.

    Every optimizer step draws one network (for all its accumulated microbatches) and puts the mean back before the
    optimizer moves, so that evaluation and checkpoints see the mean network. Whatever the optimizer removed is exactly
    zero in both. Rounds write ``kept_share`` and ``delta_f`` to the Trainer's log, and the posterior goes beside every
    checkpoint and into the output folder.

    Args:
        rounds: schedule of the removals, as shares of all optimizer steps; default eight rounds between 30 and 80 %.
        rule: decides what goes; default the evidence, no threshold.
        ignore: parameters to protect: names, "re:" patterns, module names or types, modules, parameters.
        structures: how attention heads and units of the MLPs go, too (`ockham.Structures`); the model in training
            becomes physically smaller, in place, and its steps faster. In one process. None: single weights only.
        likelihood: name of the likelihood that the model's loss is, for `ockham.predict`.

    Raises:
        OckhamError: from `Trainer.train`, before the first step: the optimizer is no variational one, the best model is
            to be loaded at the end (its weights are older than the rounds), or ``ignore`` names nothing.

    >>> trainer = Trainer(                                                              # doctest: +SKIP
    ...     model, args, train_dataset=data,
    ...     optimizers=(ockham.MeanField(model.named_parameters(), n_data=len(data)), None),
    ...     callbacks=[EvidenceCallback()],
    ... )
    """

    def __init__(
        self,
        rounds: Rounds | None = None,
        *,
        rule: Rule | None = None,
        ignore: Ignore = (),
        structures: Structures | None = None,
        likelihood: str | None = "classification",
    ) -> None:
        given: dict[str, Any] = {"rounds": rounds, "rule": rule, "structures": structures}
        self._steps = StepRounds(ignore=ignore, **{k: v for k, v in given.items() if v is not None})
        self._likelihood = likelihood
        self._block: Any = None
        self.posterior: Posterior | None = None

    @property
    def history(self) -> list[Any]:
        """Account of every round; its ``epoch`` counts steps."""
        return list(self._steps.history)

    @property
    def plan(self) -> Plan | None:
        """Account of the structures that went, from the model before the run; None without structures."""
        return None if self._steps.shrunk is None else self._steps.shrunk.origin.plan()

    # ------------------------------------------------------------------ the Trainer's events
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Plan the rounds, and refuse what cannot go well."""
        optimizer = variational(kwargs["optimizer"], "EvidenceCallback: Trainer(optimizers=(..., None))")
        if args.load_best_model_at_end:
            raise OckhamError(
                "load_best_model_at_end=True would bring back weights from before later rounds removed them: set it to "
                "False. The last network is the reduced one; the checkpoints are kept"
            )
        if args.max_grad_norm and getattr(args, "fp16", False):
            raise OckhamError("fp16 needs a GradScaler, which an optimizer with draws cannot see: use bf16=True")
        rounds = [entry["ockham_round"] for entry in state.log_history if "ockham_round" in entry]
        if rounds and not self._steps.history:
            self._steps.load({"history": rounds})
        if self._steps.structures is not None and state.global_step:
            raise OckhamError(
                "a run with structures does not go on from a Trainer checkpoint, whose weights fit the model as it was "
                "then: start anew, or train with structures=None"
            )
        loader = kwargs.get("train_dataloader")
        begun: dict[str, Any] = {"optimizer": optimizer, "anew": not state.global_step}
        self._steps.plan(kwargs["model"], state.max_steps, loader, **begun)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The weights become a draw."""
        self._close()
        self._block = variational(kwargs["optimizer"], "EvidenceCallback").sampled()
        self._block.__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The weights become the mean again; their gradients stay."""
        self._close()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The round that is due, and its line in the log."""
        self._close()
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        optimizer = variational(kwargs["optimizer"], "EvidenceCallback")
        loss = losses[-1] if losses else math.nan
        done = self._steps.after_step(optimizer, state.global_step, loss, kwargs["model"])
        if done is not None:
            facts = {"kept_share": done.kept_share, "delta_f": done.delta_f, "removed": done.removed}
            plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(done).items()}
            state.log_history.append({**facts, "ockham_round": plain, "epoch": state.epoch, "step": state.global_step})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """The share of weights that are left, on every line that is printed."""
        if logs is not None and self._steps.history:
            logs["kept_share"] = round(self._steps.history[-1].kept_share, 4)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The posterior, beside the checkpoint."""
        if state.is_world_process_zero:
            self._posterior(kwargs["optimizer"]).save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The posterior, in the output folder and here."""
        self._close()
        self.posterior = self._posterior(kwargs["optimizer"])
        if state.is_world_process_zero:
            self.posterior.save(Path(args.output_dir) / FILE)
            save_plan(self.plan, Path(args.output_dir) / PLAN)

    def state(self) -> dict[str, Any]:
        """What the Trainer keeps of a callback in its own state."""
        return {"args": {}, "attributes": {"saved": self._steps.state()}}

    @property
    def saved(self) -> dict[str, Any]:
        """The rounds so far, plain values."""
        return self._steps.state()

    @saved.setter
    def saved(self, state: dict[str, Any]) -> None:
        self._steps.load(state)

    def _posterior(self, optimizer: Any) -> Posterior:
        return replace(variational(optimizer, "EvidenceCallback").posterior(), likelihood=self._likelihood)

    def _close(self) -> None:
        block, self._block = self._block, None
        if block is not None:
            block.__exit__(None, None, None)
