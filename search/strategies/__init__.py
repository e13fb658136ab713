"""Search strategies by name; adding one is a file and a line here, or a plug-in's entry point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mimo_compile.plugins import Kind
from mimo_compile.search.strategies.base import Observation, Options, Predict, Setting, Strategy

STRATEGIES: dict[str, Any] = {
    "evolutionary": "evolutionary:EvolutionarySearch",
    "random": "random:RandomSearch",
    "grid": "grid:GridSearch",
}
"""Name -> where its class lives; modules are imported on use."""

DEFAULT = "evolutionary"

_KIND = Kind("strategy", "mimo_compile.strategies", __name__)


def strategy_names() -> list[str]:
    """Return the names of all strategies, those of plug-ins last."""
    return _KIND.names(STRATEGIES)


def get_strategy(name: str) -> Callable[[Setting], Strategy]:
    """Return what makes a strategy.

    Raises:
        UsageError: there is none of this name; the known ones are listed.
        EnvironmentMismatch: it is a plug-in's, which cannot be used.
    """
    cls = _KIND.get(name, STRATEGIES)
    if missing := [method for method in ("ask", "tell", "ban") if not hasattr(cls, method)]:
        raise _KIND.broken(name, f"{cls!r} has no method {missing[0]}", STRATEGIES)
    make: Callable[[Setting], Strategy] = cls
    return make


def make_strategy(name: str, setting: Setting) -> Strategy:
    """Make a strategy by name; raises what `get_strategy` raises."""
    return get_strategy(name)(setting)


__all__ = [
    "DEFAULT",
    "STRATEGIES",
    "Observation",
    "Options",
    "Predict",
    "Setting",
    "Strategy",
    "get_strategy",
    "make_strategy",
    "strategy_names",
]
