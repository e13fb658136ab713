"""Measured energy: the CPU's RAPL counters or NVIDIA's NVML, else the reason why there is none."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mimo_compile._cuda import driver

_POWERCAP = Path("/sys/class/powercap")
_MIN_STEPS = 20  # a window of fewer counter steps says little about the energy in it


@dataclass(frozen=True, slots=True)
class Counter:
    """A counter of energy.

    Attributes:
        read: Returns its value in joules.
        range_j: Where it starts again from 0; 0 if it does not.
    """

    read: Callable[[], float]
    range_j: float = 0.0


@dataclass(slots=True)
class Meter:
    """Adds up counters over a window of time; one that cannot be read gives None, never a guess.

    Attributes:
        source: `rapl` or `nvml`; None if nothing can be read.
        reason: Why there is no number, in words; empty if there is one.
        step_s: How often the counters are updated.
    """

    source: str | None
    counters: list[Counter]
    step_s: float
    reason: str = ""
    clock: Callable[[], float] = time.monotonic
    _last: list[float] = field(default_factory=list)
    _joules: float = 0.0
    _start: float = 0.0
    _polled: float = 0.0

    def start(self) -> None:
        """Begin a window."""
        self.reason = self.reason if self.source is None else ""
        self._joules = 0.0
        self._start = self._polled = self.clock()
        self._last = self._read()

    def keep(self) -> None:
        """Call now and then in long windows, lest a counter starts again twice unseen."""
        if self.source is not None and self.clock() - self._polled > 30:
            self._advance()

    def stop(self) -> float | None:
        """End the window and return its energy in joules, or None and say why in `reason`."""
        self._advance()
        if self.source is None or self.reason:
            return None
        window = self.clock() - self._start
        if window < _MIN_STEPS * self.step_s:
            self.reason = (
                f"{window:.3f} s is shorter than {_MIN_STEPS} steps of the counter "
                f"({self.step_s:g} s each)"
            )
            return None
        if self._joules <= 0:
            self.reason = f"the {self.source} counter stood still for {window:.3f} s"
            return None
        return self._joules

    def _advance(self) -> None:
        now = self._read()
        self._polled = self.clock()
        if self.reason:
            return
        for counter, old, new in zip(self.counters, self._last, now, strict=True):
            if new < old and not counter.range_j:
                self.reason = f"a {self.source} counter went backwards"
                return
            self._joules += new - old + (counter.range_j if new < old else 0.0)
        self._last = now

    def _read(self) -> list[float]:
        try:
            return [counter.read() for counter in self.counters]
        except Exception as error:
            self.reason = f"the {self.source} counter cannot be read: {error}"
            return []


def open_meter(kind: str) -> Meter:
    """Return the meter of the device that an artifact of this kind (`cpu`, `cuda`) runs on."""
    return nvml_meter() if kind == "cuda" else rapl_meter()


def rapl_meter(root: Path = _POWERCAP) -> Meter:
    """Meter all CPU packages and their memory (`dram`, which packages do not include)."""
    counters, reason = [], "this machine shows no RAPL counters"
    for zone in sorted(root.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
            if not name.startswith("package-") and name != "dram":
                continue
            limit = float((zone / "max_energy_range_uj").read_text()) * 1e-6
            counter = Counter(_file_reader(zone / "energy_uj"), limit)
            counter.read()
        except (OSError, ValueError) as error:
            what = error.strerror if isinstance(error, OSError) else str(error)
            reason = f"RAPL counter {zone.name} cannot be read: {what}"
            if isinstance(error, PermissionError):
                reason += f"; as root: chmod a+r {zone}/energy_uj"
            return Meter(None, [], 1e-3, reason)
        counters.append(counter)
    return Meter("rapl", counters, 1e-3) if counters else Meter(None, [], 1e-3, reason)


def _file_reader(path: Path) -> Callable[[], float]:
    return lambda: int(path.read_text()) * 1e-6


def nvml_meter() -> Meter:
    """Meter the GPU that artifacts run on; counters exist from Volta on and move every 100 ms or so.

    NVML counts GPUs in another order than CUDA, and all of them: the driver says which one it is.
    """
    try:
        nvml: Any = importlib.import_module("pynvml")  # of the package nvidia-ml-py, if installed
        nvml.nvmlInit()
        counter = Counter(_gpu_reader(nvml, nvml.nvmlDeviceGetHandleByUUID(driver().uuid)))
        counter.read()
    except Exception as error:
        return Meter(None, [], 0.1, f"NVML does not work here: {error}")
    return Meter("nvml", [counter], 0.1)


def _gpu_reader(nvml: Any, handle: Any) -> Callable[[], float]:
    return lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) * 1e-3
