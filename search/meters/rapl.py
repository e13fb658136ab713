"""CPU joules from RAPL through the powercap files of Linux (package domains, Intel and AMD)."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/sys/class/powercap")


class RaplMeter:
    """The sum of all CPU packages' energy counters."""

    name = "rapl"
    measures = ("cpu",)
    reads = "energy counters of the CPU packages"
    step_s = 0.001

    def __init__(self, root: Path = ROOT) -> None:
        """Open the counters.

        Raises:
            OSError: there are none, or they may not be read; the text says which.
        """
        domains = [
            d
            for d in sorted(root.glob("intel-rapl:*"))
            if (d / "energy_uj").exists() and (d / "name").read_text().strip().startswith("package")
        ]
        if not domains:
            raise OSError("the kernel offers no RAPL package counter (virtual machines hide it)")
        self._files = [d / "energy_uj" for d in domains]
        try:
            self._wrap = [_number(d / "max_energy_range_uj") for d in domains]
            self._last = [_number(f) for f in self._files]
        except PermissionError as error:
            raise OSError(
                f"{error.filename} may be read by root only; run: sudo chmod a+r {error.filename}"
            ) from error
        self._base = [0] * len(domains)

    def read_mj(self) -> float:
        """Return millijoules since the meter was opened; a counter that started again is carried over."""
        total = 0
        for i, file in enumerate(self._files):
            value = _number(file)
            if value < self._last[i]:
                self._base[i] += self._wrap[i]
            self._last[i] = value
            total += self._base[i] + value
        return total / 1000.0


def _number(file: Path) -> int:
    try:
        return int(file.read_text())
    except ValueError as error:
        raise OSError(f"{file} holds no number") from error
