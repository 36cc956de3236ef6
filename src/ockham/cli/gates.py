"""From options to a job with gates: `ockham compress --method bmrs`."""

from __future__ import annotations

from pathlib import Path

from ockham.cli.options import Options
from ockham.errors import OckhamError
from ockham.methods.gates.attach import GATE_RULES
from ockham.methods.gates.job import GateJob
from ockham.methods.gates.training import GateTraining, KLWeight, Tempered, true_elbo
from ockham.run.job import Recipe

__all__ = ["build_gate_job"]

_ORDERS = ("mean", "l2", "taylor", "random")
"""Rules that only order."""

_SMALL = {"epochs": 200, "learning_rate": 3e-3}


def build_gate_job(options: Options, recipe: Recipe, builder: str, *, small: bool, command: str) -> GateJob:
    """The job of the options; network, data and batch size are those of the recipe.

    Raises:
        OckhamError: an unknown rule, or one that only orders without a budget.
    """
    options.refuse("--method bmrs", "cap", "log_odds", "first_round", "rounds")
    rule = "n" if options.rule == "evidence" else options.rule
    if rule not in GATE_RULES:
        raise OckhamError(f"--rule {rule}: unknown for --method bmrs; choose from {', '.join(GATE_RULES)}")
    if rule in _ORDERS and options.keep_share is None:
        raise OckhamError(f"--rule {rule} only orders the structures: add --keep-share 0.2, a budget")
    temperature = options.temperature or 1.0
    weight: KLWeight = true_elbo if temperature == 1.0 else Tempered(temperature)
    epochs = options.epochs or (_SMALL["epochs"] if small else 50)
    training = GateTraining(
        epochs=int(epochs),
        fine_tune=max(1, round(epochs / 5)),
        learning_rate=options.learning_rate or (_SMALL["learning_rate"] if small else 1e-3),
        kl_weight=weight,
        every=0 if options.after_training else 1,
        seed=options.seed,
    )
    return GateJob(
        recipe,
        training,
        rule,
        Path(options.out or "runs/gates"),
        builder,
        keep_share=options.keep_share,
        command=command,
        baseline=options.baseline,
        resume=options.resume,
    )
