"""Surgery: which dimensions of a network live and die together, plans that remove them, and the proof."""

from __future__ import annotations

from ockham.surgery.exporting import ExportError, export
from ockham.surgery.groups import Group, Groups, Member, Plan, PlanError, random_plan
from ockham.surgery.shrinking import MismatchError, mask, shrink, slice_tensor, verify
from ockham.surgery.streams import RotationError, rotate
from ockham.surgery.tracing import trace

__all__ = [
    "ExportError",
    "Group",
    "Groups",
    "Member",
    "MismatchError",
    "Plan",
    "PlanError",
    "RotationError",
    "export",
    "mask",
    "random_plan",
    "rotate",
    "shrink",
    "slice_tensor",
    "trace",
    "verify",
]
