"""Surgery: which dimensions of a network live and die together, plans that remove them, and the proof."""

from __future__ import annotations

from ockham.surgery.exporting import ExportError, export
from ockham.surgery.grouping import Group, Groups, Member
from ockham.surgery.planning import Plan, PlanError, random_plan
from ockham.surgery.shrinking import mask, shrink, slice_tensor
from ockham.surgery.tracing import trace
from ockham.surgery.verifying import MismatchError, verify

__all__ = [
    "ExportError",
    "Group",
    "Groups",
    "Member",
    "MismatchError",
    "Plan",
    "PlanError",
    "export",
    "mask",
    "random_plan",
    "shrink",
    "slice_tensor",
    "trace",
    "verify",
]
