"""Structures beside a training run: after a round the network and its optimizer become physically smaller."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ockham.errors import OckhamError, OckhamWarning
from ockham.posterior.posterior import Posterior
from ockham.posterior.variational import VariationalOptimizer
from ockham.reduction.choice import choose_units
from ockham.reduction.score import score
from ockham.reduction.structure_rule import Structures
from ockham.reduction.structures import Ledger, StructureEvidence
from ockham.surgery.cost import cost
from ockham.surgery.groups import Groups, Plan, plan_masks
from ockham.surgery.shrinking import mask, shrink, slice_tensor, verify
from ockham.surgery.tracing import trace
from ockham.surgery.unit_costs import unit_costs
from ockham.workflow.finishing import fold_constants
from ockham.workflow.origin import Origin
from ockham.workflow.reducer import Ignore
from ockham.workflow.trainer import Loader, seeded, to_device

__all__ = ["Shrinker", "StructureInfo", "example_of"]

ROWS = 2


@dataclass(frozen=True, slots=True)
class StructureInfo:
    """What one round removed as a whole.

    Attributes:
        epoch: after which epoch.
        removed: units that went.
        free: of these, units that nobody read any more.
        nats: E_g of the units that went, summed: what the evidence loses by them.
        widths: group id (of the network before the run) to the units it has now.
        parameters: learnable values that the network has now.
        macs: multiply-accumulates of one example now.
    """

    epoch: int
    removed: int
    free: int
    nats: float
    widths: Mapping[str, int]
    parameters: int
    macs: int


class Shrinker:
    """Scores the structures of a network in training and takes out what is not worth its price.

    Args:
        network: as the run starts.
        rule: evidence, price, widths.
        example_inputs: a small batch of inputs, for tracing and proof.
        ignore: what stays whole.

    Raises:
        TraceError: the network cannot be traced; train it with masks only (``structure=None``).
    """

    def __init__(self, network: nn.Module, rule: Structures, example_inputs: Any, ignore: Ignore) -> None:
        self.rule, self._inputs, self._ignore = rule, example_inputs, ignore
        with seeded(0, 0, torch.device("cpu")):
            groups = trace(network, _as_given(example_inputs), ignore=tuple(ignore))
        self.origin = Origin(groups)
        self._now: Groups | None = groups
        self.ledger = Ledger()
        self.history: list[StructureInfo] = []
        self._steps: list[str] = []

    def shrink(
        self, network: nn.Module, optimizer: VariationalOptimizer, epoch: int
    ) -> tuple[nn.Module, VariationalOptimizer] | None:
        """Take out the structures that have gone; None where all stay.

        Raises:
            MismatchError: the smaller network computes something else than the masked one.
        """
        with seeded(0, 0, _device(network)):
            if self._now is None:
                self._now = trace(network, _as_given(self._inputs), ignore=tuple(self._ignore))
            evidence = self._score(optimizer)
            plan = self._choose(network, evidence)
            if not plan.removed:
                return None
            small = self._apply(network, optimizer, plan)
        self._note(small[0], evidence, plan, epoch)
        return small

    def finished(self, network: nn.Module, posterior: Posterior) -> tuple[nn.Module, Posterior, Plan]:
        """Network and posterior with constants folded, and all that went as one plan for the first network."""
        with seeded(0, 0, _device(network)):
            options: dict[str, Any] = {"example_inputs": _as_given(self._inputs), "ignore": tuple(self._ignore)}
            return fold_constants(network, posterior, self.origin, round_to=self.rule.round_to, **options)

    def state(self) -> dict[str, Any]:
        """Plain values and tensors."""
        history = [asdict(info) for info in self.history]
        ledger = dict(self.ledger.delta_f)
        return {"steps": list(self._steps), "history": history, "ledger": ledger, "nats": self.origin.state()}

    def load(
        self, state: Mapping[str, Any], network: nn.Module, optimizer: VariationalOptimizer
    ) -> tuple[nn.Module, VariationalOptimizer]:
        """Replay the plans on a fresh network and its optimizer."""
        for text in state["steps"]:
            plan = Plan.from_json(text)
            network, optimizer = shrink(network, plan, optimizer=optimizer)
            self._follow(plan, text)
        self.origin.load(state["nats"])
        self.history = [StructureInfo(**info) for info in state["history"]]
        self.ledger = Ledger(dict(state["ledger"]))
        return network, optimizer

    # ------------------------------------------------------------------ inside
    def _score(self, optimizer: VariationalOptimizer) -> StructureEvidence:
        assert self._now is not None
        before = {g.id: g.size for g in self.origin.groups}
        gone = {g.id: before[g.id] - g.size for g in self._now if g.id in before}
        options = {"cut": self.rule.cut, "inside": self.rule.inside, "ledger": self.ledger, "gone": gone}
        return score(optimizer.posterior()).by_group(self._now, **options)

    def _choose(self, network: nn.Module, evidence: StructureEvidence) -> Plan:
        assert self._now is not None
        costs = unit_costs(network, self._now, _as_given(self._inputs), measured=self.rule.price.measured)
        options: dict[str, Any] = {"round_to": self.rule.round_to, "cap": self.rule.cap}
        choice = choose_units(evidence, self.rule.price.nats(evidence, costs), **options)
        if choice.forced:
            warnings.warn(
                f"no unit of {', '.join(choice.forced)} was worth its price; the best stays, since an empty layer "
                "computes nothing",
                OckhamWarning,
                stacklevel=5,
            )
        return plan_masks(self._now, choice.keep, nats=evidence)

    def _apply(
        self, network: nn.Module, optimizer: VariationalOptimizer, plan: Plan
    ) -> tuple[nn.Module, VariationalOptimizer]:
        small, carried = shrink(network, plan, optimizer=optimizer)
        verify(mask(network, plan), small, _as_given(self._inputs), draws=1)
        self.ledger = self.ledger.cut(lambda name, values: slice_tensor(plan, name, values))
        self._follow(plan, plan.to_json())
        return small, carried

    def _follow(self, plan: Plan, text: str) -> None:
        self._steps.append(text)
        self.origin.follow(self._now if plan.nats else None, plan)
        self._now = None

    def _note(self, small: nn.Module, evidence: StructureEvidence, plan: Plan, epoch: int) -> None:
        gone = {key: torch.tensor(units) for key, units in plan.removed.items()}
        nats = sum(float(evidence[key][units].sum()) for key, units in gone.items())
        free = sum(int((evidence.held[key][units] == 0).sum()) for key, units in gone.items())
        now = cost(small, _as_given(self._inputs))
        removed = sum(len(units) for units in gone.values())
        rows = _rows(self._inputs)
        self.history.append(
            StructureInfo(epoch, removed, free, nats, self.origin.widths(), now.parameters, now.macs // rows)
        )


def example_of(loader: Loader, device: torch.device) -> Any:
    """The first rows of the loader's first inputs."""
    with seeded(0, 0, torch.device("cpu")):
        inputs = next(iter(loader))[0]
    few = pytree.tree_map_only(Tensor, lambda t: t[:ROWS] if t.ndim else t, inputs)
    return to_device(few, device)


def _as_given(inputs: Any) -> Any:
    """Inputs as surgery takes them: a list of positional ones is a tuple."""
    return tuple(inputs) if isinstance(inputs, list) else inputs


def _rows(inputs: Any) -> int:
    first = next((t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor) and t.ndim), None)
    if first is None:
        raise OckhamError("the loader's inputs hold no tensor with a batch dimension")
    return int(first.shape[0])


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
