"""Joules: which meters exist, which of them work here and why the others do not."""

from __future__ import annotations

from collections.abc import Callable

from mimo_compile.errors import UsageError
from mimo_compile.ir.hardware import Hardware
from mimo_compile.search.meters import modelled, nvml, rapl, replay
from mimo_compile.search.meters.base import Available, Meter, Reading, measure_energy

METERS: dict[str, Callable[[], Available]] = {
    "nvml": nvml.probe,
    "rapl": rapl.probe,
    "modelled": modelled.probe,
    "replay": replay.probe,
}
"""Name -> probe; adding a meter is a file and a line here."""


def available() -> list[Available]:
    """Try each meter and say what it reads or why it cannot."""
    return [probe() for probe in METERS.values()]


def open_meter(hardware: Hardware, name: str | None = None) -> Meter | None:
    """Return the counter that measures a target's joules, or None where there is none.

    Args:
        hardware: The target.
        name: ``nvml`` or ``rapl`` to insist on one; ``modelled`` to measure none.

    Raises:
        UsageError: the meter asked for is unknown or cannot be used here.
    """
    if name == "modelled":
        return None
    wanted = name or ("nvml" if hardware.kind == "cuda" else "rapl")
    makers: dict[str, Callable[[], Meter]] = {"nvml": nvml.NvmlMeter, "rapl": rapl.RaplMeter}
    if wanted not in makers:
        raise UsageError(
            f"unknown meter {wanted!r}", remedy=f"use one of {', '.join(makers)}, modelled"
        )
    try:
        return makers[wanted]()
    except OSError as error:
        if name is None:
            return None
        raise UsageError(f"the {name} meter cannot be used: {error}") from error


__all__ = ["METERS", "Available", "Meter", "Reading", "available", "measure_energy", "open_meter"]
