"""From options to a job of spike-and-slab inference: `ockham compress --method spike-slab`."""

from __future__ import annotations

import math
from dataclasses import replace

from ockham.choose.rules import Rounds
from ockham.cli.options import Options
from ockham.errors import OckhamError
from ockham.fit.priors import FixedPrior
from ockham.methods.spike_slab.inclusion import MedianRule
from ockham.methods.spike_slab.optimizer import spike_slab
from ockham.methods.spike_slab.priors import FixedSpikeSlab
from ockham.run.job import Recipe

__all__ = ["with_spike_slab"]

_ROUNDS = Rounds(start=0.5, end=0.9, count=5)
_LOG_ODDS = math.log(0.1 / 0.9)
_SLAB_VARIANCE = 1.0


def with_spike_slab(options: Options, recipe: Recipe) -> Recipe:
    """The recipe with inclusion probabilities: their prior, the median model or a budget, later and fewer rounds.

    Raises:
        OckhamError: options that belong to other methods.
    """
    if options.posterior != "mean-field":
        raise OckhamError(f"--method spike-slab is a posterior of its own: drop --posterior {options.posterior}")
    options.refuse("--method spike-slab", "cap")
    if options.keep_share is None and options.rule != "evidence":
        raise OckhamError(f"--method spike-slab keeps the median model or a --keep-share: drop --rule {options.rule}")
    training = replace(recipe.training, prior=_prior(options))
    given = {"count": options.rounds, "start": options.first_round}
    rounds = replace(_ROUNDS, **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
    rule = recipe.rule if options.keep_share is not None else MedianRule()
    return replace(recipe, training=training, rounds=rounds, rule=rule, estimator=spike_slab)


def _prior(options: Options) -> FixedSpikeSlab:
    """A tenth of the weights, unit slab, or --log-odds and --prior-variance. Not learned: docs/decisions.md."""
    variance = _SLAB_VARIANCE if options.prior_variance is None else FixedPrior(options.prior_variance).variance
    odds = _LOG_ODDS if options.log_odds is None else options.log_odds
    if not abs(odds) < 30:
        raise OckhamError(f"--log-odds is ln p/(1-p) of the prior inclusion, within 30 nats; got {odds}")
    return FixedSpikeSlab(inclusion=1 / (1 + math.exp(-odds)), slab_variance=variance)
