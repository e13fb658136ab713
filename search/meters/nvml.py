"""GPU joules from NVML's total-energy counter (millijoules since driver load; Volta and newer)."""

from __future__ import annotations

from typing import Any


class NvmlMeter:
    """The energy counter of one GPU."""

    name = "nvml"
    measures = ("cuda",)
    reads = "total energy counter of GPU 0"
    step_s = 0.1
    """The counter is refreshed about ten times a second."""

    def __init__(self, index: int = 0, library: Any = None) -> None:
        """Open a GPU's counter (``library`` stands in for pynvml in tests).

        Raises:
            OSError: no driver, no such GPU, or a GPU without the counter; the text says which.
        """
        self._nvml = library if library is not None else _library()
        try:
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
            self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except self._nvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from error

    def read_mj(self) -> float:
        """Return the counter."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._nvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from error

    def state(self) -> dict[str, float]:
        """Return what tells whether a reading is sound: temperature, clock, throttling, other processes."""
        n, h = self._nvml, self._handle
        reads: dict[str, Any] = {
            "temperature_c": lambda: n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU),
            "sm_clock_mhz": lambda: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM),
            "throttle_reasons": lambda: n.nvmlDeviceGetCurrentClocksThrottleReasons(h),
            "processes": lambda: len(n.nvmlDeviceGetComputeRunningProcesses(h)),
        }
        out = {}
        for name, read in reads.items():
            try:
                out[name] = float(read())
            except n.NVMLError:
                continue
        return out


def _library() -> Any:
    try:
        import pynvml
    except ModuleNotFoundError as error:
        raise OSError("nvidia-ml-py is not installed") from error
    return pynvml
