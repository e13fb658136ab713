"""Names to classes: those of the package, and those that other installed distributions add.

Each room keeps a table of names with the place of their class, ``{"rapl": "rapl:RaplMeter"}``, relative to
the room. Another distribution adds names through an entry point of the room's group:

    [project.entry-points."mimo_compile.meters"]
    hwmon = "hwmon_meter:HwmonMeter"

Nothing is imported before a name is used. Groups: ``mimo_compile.schedules``, ``mimo_compile.strategies``,
``mimo_compile.meters``, ``mimo_compile.weight_formats``, ``mimo_compile.peers``.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from mimo_compile.errors import EnvironmentMismatch, UsageError


@dataclass(frozen=True, slots=True)
class Kind:
    """One sort of things that can be added.

    Attributes:
        noun: What one of them is called in messages.
        group: The entry points' group.
        package: What the modules of the room's own table are relative to.
    """

    noun: str
    group: str
    package: str

    def names(self, own: Collection[str]) -> list[str]:
        """Return the room's own names, then those of plug-ins.

        Raises:
            EnvironmentMismatch: Two plug-ins have one name, or one has a name of the room.
        """
        return [*own, *self._added(own)]

    def get(self, name: str, own: Mapping[str, Any]) -> Any:
        """Import what a name stands for.

        Args:
            name: One of `names`.
            own: The room's table: name to ``module:Class``, or to the class itself.

        Raises:
            UsageError: There is no such name; the known ones are listed.
            EnvironmentMismatch: The plug-in of this name cannot be loaded.
        """
        added = self._added(own)
        if name in added:
            try:
                return added[name].load()
            except Exception as error:  # whatever somebody else's module does
                raise self.broken(name, f"{type(error).__name__}: {error}", own) from error
        if name not in own:
            known = ", ".join(self.names(own))
            raise UsageError(f"unknown {self.noun} {name!r}", remedy=f"Use one of {known}")
        place = own[name]
        if not isinstance(place, str):
            return place
        module, _, attribute = place.partition(":")
        return getattr(import_module(f"{self.package}.{module}"), attribute)

    def broken(self, name: str, why: str, own: Collection[str]) -> EnvironmentMismatch:
        """Return the error that says what is wrong with a name's class, and whose it is."""
        entry = self._added(own).get(name)
        if entry is None:
            return EnvironmentMismatch(f"the {self.noun} {name!r} cannot be used: {why}")
        return EnvironmentMismatch(
            f"the {self.noun} plug-in {name!r} cannot be used: {why}",
            where=f"{entry.value} of {_owner(entry)}, entry point group {self.group}",
            remedy=f"Repair it, or run: pip uninstall {_owner(entry)}",
        )

    def _added(self, own: Collection[str]) -> dict[str, EntryPoint]:
        """Return the plug-ins by name, sorted."""
        found: dict[str, EntryPoint] = {}
        for entry in _entries(self.group):
            if entry.name in own or entry.name in found:
                other = found.get(entry.name)
                whose = f"that of {_owner(other)}" if other else "one of mimo_compile"
                raise EnvironmentMismatch(
                    f"the {self.noun} plug-in {entry.name!r} of {_owner(entry)} has the name of {whose}",
                    where=f"entry point group {self.group}",
                    remedy=f"Rename it, or run: pip uninstall {_owner(entry)}",
                )
            found[entry.name] = entry
        return found


@cache
def _all_entries(path: tuple[str, ...]) -> Any:
    """Return every entry point there is; ``path`` is what they are searched on (the key of the cache)."""
    del path
    return entry_points()


@cache
def _grouped(path: tuple[str, ...], group: str) -> tuple[EntryPoint, ...]:
    """Return the entry points of a group, sorted: looking through all of them takes a millisecond."""
    found = _all_entries(path).select(group=group)
    return tuple(sorted(found, key=lambda e: (e.name, _owner(e))))


def _entries(group: str) -> tuple[EntryPoint, ...]:
    return _grouped(tuple(sys.path), group)


def _owner(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.module
