"""Search strategies by name; adding one is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable

from mimo_compile.errors import UsageError
from mimo_compile.search.strategies.base import Observation, Options, Predict, Setting, Strategy
from mimo_compile.search.strategies.evolutionary import EvolutionarySearch
from mimo_compile.search.strategies.grid import GridSearch
from mimo_compile.search.strategies.random import RandomSearch

STRATEGIES: dict[str, Callable[[Setting], Strategy]] = {
    "evolutionary": EvolutionarySearch,
    "random": RandomSearch,
    "grid": GridSearch,
}
"""Name -> how to make it."""


def make_strategy(name: str, setting: Setting) -> Strategy:
    """Make a strategy by name.

    Raises:
        UsageError: there is none of this name.
    """
    if name not in STRATEGIES:
        raise UsageError(f"unknown strategy {name!r}", remedy=f"use one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name](setting)


__all__ = [
    "STRATEGIES",
    "Observation",
    "Options",
    "Predict",
    "Setting",
    "Strategy",
    "make_strategy",
]
