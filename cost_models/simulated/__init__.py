"""Cycle models of machines that cannot be had; nothing in here was ever measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.simulated import LmmaConfig, Matmul, MmaConfig, RomaConfig, offered


@dataclass(frozen=True, slots=True)
class Estimate:
    """Modelled time of one call, and what it is made of. Unit: microseconds."""

    latency_us: float
    parts: dict[str, float]
    """The limits and additions behind it by name; they need not add up."""


def estimate(matmul: Matmul, config: Any) -> Estimate:
    """Return the modelled time of a program on the target that it was made for."""
    from mimo_compile.cost_models.simulated import lut_tensor_core, roma

    if isinstance(config, LmmaConfig):
        return Estimate(*lut_tensor_core.kernel(matmul, config))
    if isinstance(config, MmaConfig):
        return Estimate(*lut_tensor_core.mma_kernel(matmul, config))
    if isinstance(config, RomaConfig):
        return Estimate(*roma.kernel(matmul, config))
    raise TypeError(f"{type(config).__name__} is no program of a simulated machine")


def device_model(hardware: Hardware) -> DeviceModel:
    """Return a simulated target's peaks, for rooflines and for ranking before a program is modelled."""
    from mimo_compile.cost_models.simulated import lut_tensor_core, roma

    if "lmma" in hardware.features:
        largest = max(int(v[:-1]) for v in offered(hardware, "array"))
        ops, levels = lut_tensor_core.peaks(largest)
    else:
        ops, levels = roma.peaks()
    return DeviceModel(
        {k: v / hardware.threads for k, v in ops.items()},
        {k: (v,) * hardware.threads for k, v in levels.items()},
        launch_us=0.1,
    )
