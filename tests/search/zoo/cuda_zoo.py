"""CUDA kernels that are right, or wrong in ways that running them tells; the stand-in driver has all."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "schedules"))

import cuda_sample

from mimo_compile._cuda import Launch
from mimo_compile.schedules.base import Kernel, Space

RIGHT = ("", "honest")
WRONG = ("half", "beyond")
CRASH = ("wild", "sticky", "dies")
FAULTS = (*RIGHT, *WRONG, *CRASH, "hangs", "lost")
TEXT = "".join(
    f'extern "C" __global__ void {name}() {{}}\n' for name in (*CRASH, "hangs", "lost")
) + ('extern "C" __global__ void beyond(float* y, int n) { y[n] = 0.0f; }\n')


@dataclass(frozen=True, slots=True)
class ZooConfig:
    threads: int = 128
    fault: str = ""


class CudaZoo(cuda_sample.CudaSwiglu):
    """The sample, with a launch behind it that goes wrong."""

    name = "swiglu.cuda_zoo"
    config = ZooConfig
    faults: tuple[str, ...] = ("", "half", "sticky")

    def space(self, workload: Any, hardware: Any) -> Space:
        knobs = {"threads": (32, 128, 1024), "fault": self.faults}
        return Space(ZooConfig, knobs, ZooConfig())

    def lower(self, workload: Any, config: ZooConfig, hardware: Any) -> Kernel:
        kernel = super().lower(workload, config, hardware)
        launches = kernel.device.launches
        if config.fault == "half":
            launches = launches[:1]
        elif config.fault == "beyond":
            size = kernel.args[-1].shape[0] * kernel.args[-1].shape[1]
            launches += (Launch("beyond", (1, 1, 1), 32, ("y", size)),)
        elif config.fault not in RIGHT:
            launches += (Launch(config.fault, (1, 1, 1), 32, ()),)
        code = replace(
            kernel.device, text=kernel.device.text + TEXT, launches=launches, expected=()
        )
        return replace(kernel, device=code)


class Honest(CudaZoo):
    """Kernels of which all are right."""

    faults = ("",)
