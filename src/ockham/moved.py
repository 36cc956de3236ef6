"""Import paths of earlier versions, deprecated until 1.0: `ockham.posterior.ivon` still finds `ockham.fit.ivon`.

A finder at the end of ``sys.meta_path`` makes the old modules when somebody asks for them; nothing is imported before.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["MOVED", "install"]

MOVED: dict[str, str] = {
    "cli.options": "cli.build",
    "cli.progress": "cli.app",
    "cli.show": "cli.app",
    "evidence.columns": "evidence.kronecker",
    "evidence.correlated": "methods.spike_slab.correlated",
    "evidence.cut_normal": "methods.gates.truncated",
    "evidence.divergence": "methods.gates.truncated",
    "evidence.horseshoe": "methods.horseshoe",
    "evidence.host": "methods.gates.truncated",
    "evidence.hyper": "evidence.gaussian",
    "evidence.lognormal": "methods.gates.lognormal",
    "evidence.marginal": "methods.laplace.posterior",
    "evidence.paired": "methods.spike_slab.correlated",
    "evidence.quantile": "methods.gates.truncated",
    "evidence.spike_slab": "methods.spike_slab.formulas",
    "files.sparse": "core.files",
    "files.tree": "core.files",
    "fit.point": "fit.mean_field",
    "posterior.adam": "fit.mean_field",
    "posterior.adapters": "methods.adapters",
    "posterior.arena": "fit.memory",
    "posterior.checks": "fit.memory",
    "posterior.curvature": "methods.laplace.curvature",
    "posterior.full": "methods.laplace.posterior",
    "posterior.gates": "methods.gates.noise",
    "posterior.group_priors": "fit.priors",
    "posterior.hamiltonian": "tabular.predicting",
    "posterior.horseshoe": "methods.horseshoe",
    "posterior.ivon": "fit.ivon",
    "posterior.laplace": "methods.laplace.posterior",
    "posterior.matrix": "core.posterior",
    "posterior.mean_field": "fit.mean_field",
    "posterior.noise": "fit.memory",
    "posterior.pieces": "fit.memory",
    "posterior.point": "fit.mean_field",
    "posterior.posterior": "core.posterior",
    "posterior.predict": "fit.predict",
    "posterior.priors": "fit.priors",
    "posterior.propagation": "methods.spike_slab.optimizer",
    "posterior.settings": "fit.memory",
    "posterior.slab_priors": "methods.spike_slab.priors",
    "posterior.slab_updates": "methods.spike_slab.optimizer",
    "posterior.slicing": "fit.memory",
    "posterior.spike_slab": "methods.spike_slab.optimizer",
    "posterior.storage": "core.posterior",
    "posterior.taps": "methods.laplace.curvature",
    "posterior.unit_scales": "fit.priors",
    "posterior.variational": "fit.optimizer",
    "reduction.choice": "choose.units",
    "reduction.columns": "choose.correlated",
    "reduction.diagnose": "choose.rules",
    "reduction.gate_rules": "methods.gates.rules",
    "version": "core",
    "reduction.inclusion": "methods.spike_slab.priors",
    "reduction.one_shot": "choose.correlated",
    "reduction.paths": "choose.units",
    "reduction.prices": "choose.prices",
    "reduction.rounds": "choose.rules",
    "reduction.rule": "choose.rules",
    "reduction.score": "choose.rules",
    "reduction.structure_rule": "choose.prices",
    "reduction.structures": "choose.units",
    "report.axes": "report.figures",
    "report.canvas": "report.figures",
    "report.evidence_sections": "report.html",
    "report.gate_figures": "methods.gates.report",
    "report.gate_report": "methods.gates.report",
    "report.inputs": "run.measure",
    "report.measure": "run.measure",
    "report.sections": "report.html",
    "report.shift": "run.shift",
    "report.words": "report.page",
    "surgery.attention": "surgery.resizing",
    "surgery.attributes": "surgery.resizing",
    "surgery.budgets": "choose.prices",
    "surgery.checking": "surgery.tracing",
    "surgery.choosing": "choose.planning",
    "surgery.cloning": "surgery.copies",
    "surgery.configs": "surgery.shrinking",
    "surgery.correlated": "choose.planning",
    "surgery.cost": "surgery.costs",
    "surgery.emptied": "surgery.refitting",
    "surgery.execution": "surgery.exporting",
    "surgery.folding": "surgery.refitting",
    "surgery.grouping": "surgery.groups",
    "surgery.planning": "surgery.groups",
    "surgery.rotating": "surgery.streams",
    "surgery.rules": "surgery.ops",
    "surgery.rules_layers": "surgery.ops.layers",
    "surgery.rules_pointwise": "surgery.ops.pointwise",
    "surgery.rules_product": "surgery.ops.pointwise",
    "surgery.rules_recurrent": "surgery.ops.layers",
    "surgery.rules_shape": "surgery.ops.shape",
    "surgery.shrinking": "surgery.shrinking",
    "surgery.sites": "surgery.labels",
    "surgery.unit_costs": "choose.prices",
    "surgery.verifying": "surgery.shrinking",
    "tabular.screening": "tabular.data",
    "tabular.showing": "tabular.explaining",
    "workflow.analysis": "run.job",
    "workflow.audit": "methods.spike_slab.audit",
    "workflow.batchnorm": "fit.predict",
    "workflow.compression": "run.compression run.engine",
    "workflow.correlated": "methods.laplace.posterior",
    "workflow.estimators": "run.compression methods.spike_slab.optimizer",
    "workflow.evaluate": "run.measure",
    "workflow.finishing": "run.structures",
    "workflow.gate_curve": "methods.gates.report",
    "workflow.gate_job": "run.job",
    "workflow.gate_settings": "methods.gates.training",
    "workflow.gate_training": "methods.gates.training",
    "workflow.gating": "methods.gates.attach",
    "workflow.job": "run.job",
    "workflow.likelihood": "core.likelihood",
    "workflow.one_shot": "methods.laplace.one_shot",
    "workflow.one_shot_stage": "methods.laplace.one_shot",
    "workflow.origin": "run.structures",
    "workflow.passes": "methods.laplace.one_shot core.batch core.network",
    "workflow.publish": "run.folder",
    "workflow.reducer": "run.compression core.network",
    "workflow.result": "run.folder",
    "workflow.shrinker": "run.structures run.engine",
    "workflow.stages": "run.job run.compression run.compression methods.laplace.one_shot",
    "workflow.structure_facts": "run.job",
    "workflow.trainer": "run.engine core.batch core.network",
    "workflow.wiring": "methods.gates.attach",
    "zoo.paper": "zoo.networks",
}
"""Old module to the new ones that have its contents, below ``ockham``."""

_RENAMED: dict[str, dict[str, str]] = {
    "evidence.correlated": {"Correlated": "CorrelatedSpikeSlab"},
    "evidence.exact": {"inclusion": "exact_inclusion"},
    "evidence.host": {"excess": "host_excess", "log_mills": "host_log_mills", "Array": "HostArray", "Cut": "HostCut"},
    "evidence.kronecker": {"compensated": "conditional_mean"},
    "evidence.spike_slab": {"Real": "Number"},
    "posterior.arena": {"Facts": "RunFacts"},
    "posterior.gates": {"Noise": "GateDraw"},
    "reduction.gate_rules": {"by_random": "in_random_order"},
    "workflow.analysis": {"Facts": "NetworkFacts"},
    "workflow.gate_curve": {"Measure": "MeasureNetwork"},
    "workflow.gate_settings": {"Budget": "ParametersLeft"},
    "workflow.result": {"layers": "layer_rows"},
}
_ROOMS = {"files": "core", "posterior": "fit", "reduction": "choose", "workflow": "run"}
"""Packages that are no more, and those that have most of their contents now."""


class _MovedModule(ModuleType):
    """Answers for a module of an earlier version out of the one that has its contents now."""

    def __getattr__(self, name: str) -> Any:
        old = self.__name__.removeprefix("ockham.")
        if old not in MOVED:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        name = _RENAMED.get(old, {}).get(name, name)
        for place in MOVED[old].split():
            module = importlib.import_module(f"ockham.{place}")
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Finder(MetaPathFinder, Loader):
    """Makes the modules of `MOVED` and the packages that held them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        old = fullname.removeprefix("ockham.")
        if old == fullname or not (old in MOVED or old in _ROOMS):
            return None
        return ModuleSpec(fullname, self, is_package=old in _ROOMS)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _MovedModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.removeprefix("ockham.")
        if old in _ROOMS:
            module.__file__ = importlib.import_module(f"ockham.{_ROOMS[old]}").__file__
        if old in MOVED:
            places = MOVED[old].split()
            every = [n for p in places for n in getattr(importlib.import_module(f"ockham.{p}"), "__all__", ())]
            vars(module).update(__all__=every)


def install() -> None:
    """Let old import paths be found; once is enough."""
    from ockham.choose.planning import plan

    vars(sys.modules["ockham.surgery"])["plan"] = plan  # what was public there, too
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
