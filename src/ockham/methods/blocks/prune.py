"""`prune`: a trained network made sparse or smaller in one sitting, on some thousand tokens or a few hundred images."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ockham.core.files import write_bytes, write_json
from ockham.core.likelihood import Likelihood
from ockham.errors import OckhamError
from ockham.methods.blocks.damping import Trial, kind_of
from ockham.methods.blocks.job import Job, PruneProgress, PruneSettings, Removal
from ockham.methods.blocks.reduction import MatrixEvidence
from ockham.methods.blocks.solve import Damping, NofM
from ockham.methods.blocks.stop import Shot
from ockham.run.result import save_pretrained
from ockham.surgery import Plan
from ockham.surgery.cloning import named_tensors

__all__ = ["BlockEvidence", "Pruned", "prune"]

_STRUCTURES = ("auto", "even", "uneven")


class BlockEvidence(Mapping[str, float]):
    """Change of the log evidence in nats, by matrix; positive where the data prefer what is left.

    Attributes:
        matrices: key of a matrix to what was removed from it.
    """

    def __init__(self, matrices: Mapping[str, MatrixEvidence]) -> None:
        self.matrices = dict(matrices)

    def __getitem__(self, key: str) -> float:
        return self.matrices[key].nats

    def __iter__(self) -> Iterator[str]:
        return iter(self.matrices)

    def __len__(self) -> int:
        return len(self.matrices)

    @property
    def blocks(self) -> dict[str, float]:
        """Sum over the matrices of each block, nats."""
        found: dict[str, float] = {}
        for m in self.matrices.values():
            found[m.block] = found.get(m.block, 0.0) + m.nats
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Pruned:
    """A reduced network with what is known about it.

    Attributes:
        model: the new network, of the original's class.
        plan: units that were taken out for good; empty where only weights went.
        evidence: change of the log evidence, nats, by matrix and by block.
        keep_share: share that is left of the weights in the matrices that lost any (after units went: of what was then
            left of them, where single weights went as well).
        shares: key of a matrix to the share of its weights that is left.
        likelihood: name of what the loss was.
        damping: kind of matrix to how far its factors were trusted.
        trials: settings that were tried for it on data held out.
        shots: networks that were judged, where the evidence decided how far to go.
        before: mean NLL of the original on a quarter of the calibration data, nats per term; None without targets.
        after: the same of the new network. Data that a network was calibrated on flatter it a little.
        seconds: time it took.
        untouched: matrices of the blocks from which nothing could go, since no calibration data reach them.
    """

    model: nn.Module
    plan: Plan
    evidence: BlockEvidence
    keep_share: float
    shares: Mapping[str, float]
    likelihood: str
    damping: Mapping[str, Damping] = field(default_factory=dict)
    trials: Sequence[Trial] = ()
    shots: Sequence[Shot] = ()
    before: float | None = None
    after: float | None = None
    seconds: float = 0.0
    untouched: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """Everything but the network, as plain values for JSON."""
        kinds: dict[str, list[float]] = {}
        for key, share in self.shares.items():
            kinds.setdefault(kind_of(key), []).append(share)
        return {
            "keep_share": self.keep_share,
            "likelihood": self.likelihood,
            "nll_before": self.before,
            "nll_after": self.after,
            "seconds": self.seconds,
            "evidence": {"matrices": dict(self.evidence), "blocks": self.evidence.blocks},
            "shares": {"matrices": dict(self.shares), "kinds": {k: sum(v) / len(v) for k, v in kinds.items()}},
            "damping": {k: asdict(d) for k, d in self.damping.items()},
            "shots": [asdict(s) | {"nats": s.nats, "certainty": s.certainty} for s in self.shots],
            "units": {k: [w, w - len(self.plan.removed.get(k, ()))] for k, w in self.plan.widths.items()},
            "untouched": list(self.untouched),
        }

    def report(self, path: str | Path) -> Path:
        """Write one HTML file about the reduction; it needs no network and holds no scripts."""
        from ockham.methods.blocks.page import page_of

        write_bytes(Path(path), page_of(self.facts()).encode())
        return Path(path)

    def save(self, folder: str | Path) -> Path:
        """Write a folder: a transformers model as its own class writes it, any other as `ockham.save_pretrained` does.

        ``plan.json`` and ``prune.json`` lie beside the weights. Where layers have become unlike each other no
        configuration of transformers describes them: load the original and ``ockham.shrink`` it by the plan, then load
        the weights; ``structure="uneven"`` does that.
        """
        path = Path(folder)
        own = getattr(self.model, "save_pretrained", None)
        if callable(own):
            own(str(path))
            write_bytes(path / "plan.json", self.plan.to_json().encode())
        else:
            save_pretrained(self.model, path, plan=self.plan)
        write_json(path / "prune.json", self.facts())
        return path


def prune(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    keep_share: float | None = None,
    pattern: str | None = None,
    structure: str | None = None,
    budget: Mapping[str, Any] | None = None,
    likelihood: str | Likelihood = "auto",
    batch: Callable[[Any], Any] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    progress: Callable[[PruneProgress], None] | None = None,
    settings: PruneSettings | None = None,
) -> Pruned:
    """Take weights or whole units out of a trained network, block by block, and let those that stay make good for it.

    One backward pass over the calibration data gives each weight matrix of the network's blocks its Kronecker
    curvature. It says what every weight is worth in nats of the loss, so one threshold over all matrices decides how
    much of each goes. Then the blocks are reduced one after the other, on what the reduced blocks before them make of
    the data: weights go in rounds, and the survivors move to where the loss rises least. Matrices outside of the
    blocks (embeddings, heads) stay as they are; a network without a list of like blocks counts as one block.

    With no target at all the evidence decides: the smallest network that calibration data held out still prefer to
    the dense one (`ockham.methods.blocks.stop`).

    Args:
        model: trained network. It is not changed.
        calibration: batches: tensors, (inputs, targets), or mappings of inputs with or without "labels"; a bare tensor
            is one batch. Some thousand tokens or a few hundred images.
        keep_share: share of the blocks' weights that stays, in (0, 1].
        pattern: "2:4", or another n:m along the inputs of each matrix, instead of a share.
        structure: whole units (neurons of MLPs, groups of heads, channels) go until the budget is met. "uneven" takes
            them where they cost least; "even" takes equally many from like layers, so that one configuration describes
            them; "auto" is "even" for transformers models, whose folders would not load otherwise. With a share or
            pattern as well, weights go from what the units left.
        budget: ``{"params": "80%"}``, ``{"macs": "70%"}`` or ``{"latency": seconds}``, of the whole network.
        likelihood: "auto" (next tokens of a causal language model, else by the targets; without targets the network's
            own predictive), "next-token", "classification", "regression", "own", or a `Likelihood`.
        batch: function from an item of the calibration data to inputs or (inputs, targets).
        output: function from what the network returns to one tensor.
        progress: called with a `PruneProgress` as it goes.
        settings: the finer ones.

    Returns:
        `Pruned`, with the new network as ``.model``.

    Raises:
        DataError: calibration data that are empty or do not fit the network.
        OckhamError: arguments that contradict each other or lie outside of their range; a budget that cannot be met.

    >>> import torch
    >>> net = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)], nn.Linear(8, 3))
    >>> data = [(torch.randn(64, 8), torch.randint(0, 3, (64,)))]
    >>> small = prune(net, data, keep_share=0.5).model
    """
    _check(keep_share, pattern, structure, budget)
    began = time.perf_counter()
    settings = settings or PruneSettings()
    job = Job(calibration, likelihood, batch, output, progress, settings)
    small, plan = copy.deepcopy(model), Plan({}, {}, {}, {n: tuple(t.shape) for n, t in named_tensors(model).items()})
    units: dict[str, MatrixEvidence] = {}
    if structure is not None and budget is not None:
        small, plan, units = job.without_units(small, budget, uniform=_evenly(structure, model))
    if keep_share is not None or pattern is not None or structure is None:
        done = job.without_weights(small, NofM.parse(pattern) if pattern is not None else keep_share)
    else:
        done = Removal(units, {}, {}, (), (), ())
    size = sum(e.size for e in done.evidence.values())
    return Pruned(
        small,
        plan,
        BlockEvidence(done.evidence),
        sum(e.kept * e.size for e in done.evidence.values()) / size if size else 1.0,
        {k: e.kept for k, e in done.evidence.items()},
        job.likelihood,
        done.damping,
        done.trials,
        done.shots,
        job.mean_loss(model),
        job.mean_loss(small),
        time.perf_counter() - began,
        done.untouched,
    )


def _evenly(structure: str, model: nn.Module) -> bool:
    described = callable(getattr(getattr(model, "config", None), "to_dict", None))
    return structure == "even" or (structure == "auto" and described)


def _check(
    keep_share: float | None, pattern: str | None, structure: str | None, budget: Mapping[str, Any] | None
) -> None:
    if keep_share is not None and not 0 < keep_share <= 1:
        raise OckhamError(f"keep_share is the share of the blocks' weights that stays, in (0, 1]; got {keep_share}")
    if keep_share is not None and pattern is not None:
        raise OckhamError(
            f"a pattern says what share stays: pass keep_share={keep_share} or pattern={pattern!r}, not both"
        )
    if structure is not None and structure not in _STRUCTURES:
        raise OckhamError(f"structure must be one of {', '.join(map(repr, _STRUCTURES))}; got {structure!r}")
    if (structure is None) != (budget is None):
        raise OckhamError(
            "structure and budget go together, as in structure='auto', budget={'params': '80%'}; got "
            f"structure={structure!r}, budget={budget!r}. For single weights pass keep_share"
        )
