"""Joules: which meters exist, which of them work here and why the others do not."""

from __future__ import annotations

from typing import Any

from mimo_compile.errors import EnvironmentMismatch, UsageError
from mimo_compile.ir.hardware import Hardware
from mimo_compile.plugins import Kind
from mimo_compile.search.meters.base import Available, Meter, Reading, measure_energy

METERS: dict[str, Any] = {
    "nvml": "nvml:NvmlMeter",
    "rapl": "rapl:RaplMeter",
    "replay": "replay:ReplayMeter",
}
"""Name -> where its class lives; adding a meter is a file and a line here, or a plug-in's entry point."""

AUTO = "auto"
"""The first meter in the table that reads the target and works here."""
MODELLED = "modelled"
"""No meter: joules are computed from operations and bytes."""

_KIND = Kind("meter", "mimo_compile.meters", __name__)


def meter_names() -> list[str]:
    """Return what may be asked for by name: ``auto``, ``modelled`` and all meters."""
    return [AUTO, MODELLED, *_KIND.names(METERS)]


def _meter_class(name: str) -> Any:
    if name not in (known := _KIND.names(METERS)):
        raise UsageError(
            f"unknown meter {name!r}", remedy=f"Use one of {', '.join([AUTO, MODELLED, *known])}"
        )
    cls = _KIND.get(name, METERS)
    wanted = ("name", "measures", "reads", "step_s", "read_mj")
    if missing := [member for member in wanted if not hasattr(cls, member)]:
        raise _KIND.broken(name, f"{cls!r} has no member {missing[0]}", METERS)
    if cls.name != name:
        raise _KIND.broken(name, f"{cls!r} is named {cls.name!r}", METERS)
    return cls


def available() -> list[Available]:
    """Try each meter and say what it reads or why it cannot."""
    out = []
    for name in _KIND.names(METERS):
        try:
            cls = _meter_class(name)
            cls()
        except (OSError, EnvironmentMismatch) as error:
            out.append(Available(name, False, str(error)))
        else:
            out.append(Available(name, True, cls.reads))
    text = "sum of idle power, operations and bytes; not measured"
    return [*out, Available(MODELLED, True, text)]


def open_meter(hardware: Hardware, name: str | None = None) -> Meter | None:
    """Return the counter that measures a target's joules, or None where there is none.

    Args:
        hardware: The target.
        name: One of `meter_names`; None is ``auto``, and ``modelled`` measures none.

    Raises:
        UsageError: the meter asked for is unknown, reads other hardware or cannot be used here.
        EnvironmentMismatch: a plug-in's meter is broken.
    """
    if name == MODELLED:
        return None
    if name is not None and name != AUTO:
        cls = _reader(hardware, name)
        try:
            return _opened(cls)
        except OSError as error:
            raise UsageError(
                f"the {name} meter cannot be used: {error}",
                remedy="`mimo-compile targets` lists those that can",
            ) from error
    for each in _KIND.names(METERS):
        cls = _meter_class(each)
        if hardware.kind in cls.measures:
            try:
                return _opened(cls)
            except OSError:
                continue
    return None


def check_meter(hardware: Hardware, name: str) -> None:
    """Check that a meter, which is elsewhere, is one that reads a target's joules.

    Raises:
        UsageError: there is no such meter, or it reads other hardware.
        EnvironmentMismatch: a plug-in's meter is broken.
    """
    if name != MODELLED:
        _reader(hardware, name)


def _reader(hardware: Hardware, name: str) -> Any:
    """Return the class of a meter that reads a target's joules."""
    cls = _meter_class(name)
    if hardware.kind not in cls.measures:
        raise UsageError(
            f"the {name} meter reads {', '.join(cls.measures)}, the target is {hardware.kind}"
        )
    return cls


def _opened(cls: Any) -> Meter:
    meter: Meter = cls()
    return meter


__all__ = [
    "AUTO",
    "METERS",
    "MODELLED",
    "Available",
    "Meter",
    "Reading",
    "available",
    "check_meter",
    "measure_energy",
    "meter_names",
    "open_meter",
]
