"""Propose, build, verify, measure, learn: the search for the best kernel of each workload."""

if __name__ != "mimo_compile.search":
    raise ImportError("import mimo_compile.search, not search")

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimo_compile.search.database import Database
    from mimo_compile.search.objective import Objective, parse_objective
    from mimo_compile.search.plan import Plan, make_plan
    from mimo_compile.search.records import Record, Verdict
    from mimo_compile.search.result import TuningResult
    from mimo_compile.search.tune import tune_workloads

__all__ = [
    "Database",
    "Objective",
    "Plan",
    "Record",
    "TuningResult",
    "Verdict",
    "make_plan",
    "parse_objective",
    "tune_workloads",
]

_HOMES = {
    "Database": "database",
    "Objective": "objective",
    "Plan": "plan",
    "Record": "records",
    "TuningResult": "result",
    "Verdict": "records",
    "make_plan": "plan",
    "parse_objective": "objective",
    "tune_workloads": "tune",
}


def __getattr__(name: str) -> Any:
    """Import a public name on its first use: this package itself imports nothing heavy."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
