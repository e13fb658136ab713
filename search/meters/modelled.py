"""Joules without a counter: the analytic sum over operations and bytes. Never mixed with measured ones."""

from __future__ import annotations

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.ir.counts import Counts
from mimo_compile.search.meters.base import Available


class ModelledEnergy:
    """Millijoules of a call from its counts and its latency."""

    name = "modelled"

    def __init__(self, device: DeviceModel) -> None:
        """Use the coefficients of a device."""
        self.device = device

    def energy_mj(self, counts: Counts, latency_us: float) -> float:
        """Return modelled millijoules of one call."""
        return self.device.energy_mj(counts, latency_us)


def probe() -> Available:
    """The model needs nothing."""
    return Available("modelled", True, "sum of idle power, operations and bytes; not measured")
