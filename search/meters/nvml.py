"""GPU joules from NVML's total-energy counter (millijoules since driver load; Volta and newer).

The counter moves in steps of some 20 to 100 ms, so it is watched while the kernel runs (`watched`). How long
a step is, and what the GPU draws without a kernel, is measured on the GPU itself before the first window.
"""

from __future__ import annotations

import time
from typing import Any

from mimo_compile._cuda import driver
from mimo_compile.errors import MimoError
from mimo_compile.search.meters.watched import State, step_and_watts

THROTTLES = {
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""Bits of NVML's clock event reasons. Idleness, set clocks and the power cap are none of ours: a kernel that
draws all it may runs steadily at a lower clock, and one that does not run steadily is found by the clock."""
_FUNCTIONS = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")


class NvmlMeter:
    """The energy counter of one GPU."""

    name = "nvml"
    measures = ("cuda",)
    reads = "total energy counter of the first GPU that CUDA shows"
    step_s = 0.1
    """Until `prepare` has measured it."""
    poll_s = 0.002
    warm_s = 0.5
    max_spread = 0.02
    longest_s = 3.0
    """Seconds in which an idle GPU's counter must have moved often enough."""

    def __init__(self, uuid: str = "", library: Any = None) -> None:
        """Open a GPU's counter.

        Args:
            uuid: Which GPU, e.g. ``GPU-00112233-4455-...``; empty: the one that kernels run on, the first
                that the driver shows to this process (NVML's own numbers ignore CUDA_VISIBLE_DEVICES).
            library: Stands in for pynvml in tests.

        Raises:
            OSError: no driver, no such GPU, or a GPU without the counter; the text says which.
        """
        self._nvml = library if library is not None else _library()
        self.idle_w: float | None = None
        try:
            self._nvml.nvmlInit()
            uuid = uuid or driver().uuid
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
            self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except self._nvml.NVMLError as error:
            which = f" of {uuid}; it knows parts of a GPU (MIG) by other names" if uuid else ""
            raise OSError(f"NVML: {error}{which}") from error
        except MimoError as error:
            raise OSError(f"which GPU kernels run on is not known: {error}") from error

    def prepare(self) -> None:
        """Watch the counter for some steps while nothing runs.

        Raises:
            OSError: it does not move, or runs backwards.
        """
        if self.idle_w is not None:
            return
        samples: list[tuple[float, float]] = []
        changes, begin = 0, time.perf_counter()
        while changes < 8 and time.perf_counter() - begin < self.longest_s:
            samples.append((time.perf_counter(), self.read_mj()))
            changes += len(samples) > 1 and samples[-1][1] != samples[-2][1]
            time.sleep(self.poll_s)
        try:
            self.step_s, self.idle_w, _ = step_and_watts(samples)
        except ValueError as error:
            raise OSError(f"without a kernel it {error} in {self.longest_s:g} s") from error

    def read_mj(self) -> float:
        """Return the counter."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._nvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from error

    def state(self) -> State:
        """Return temperature, clock, power, throttling and the number of processes."""
        n, h = self._nvml, self._handle
        milliwatts = self._ask(lambda: n.nvmlDeviceGetPowerUsage(h))
        names = [f for f in _FUNCTIONS if hasattr(n, f)]
        bits = int(self._ask(lambda: getattr(n, names[0])(h)) or 0) if names else 0
        processes = self._ask(lambda: len(n.nvmlDeviceGetComputeRunningProcesses(h)))
        return State(
            self._ask(lambda: n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU)),
            self._ask(lambda: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM)),
            None if milliwatts is None else milliwatts / 1e3,
            None if processes is None else int(processes),
            tuple(text for bit, text in THROTTLES.items() if bits & bit),
        )

    def _ask(self, read: Any) -> float | None:
        """Return an answer, or None where the GPU has none."""
        try:
            return float(read())
        except self._nvml.NVMLError:
            return None


def _library() -> Any:
    try:
        import pynvml
    except ModuleNotFoundError as error:
        raise OSError("nvidia-ml-py is not installed") from error
    return pynvml
