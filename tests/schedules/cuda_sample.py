"""A schedule of CUDA code as small as they come, for tests of what compiles and inspects them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mimo_compile.ir.counts import Counts, in_turn
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Schedule, Space, kernel_name
from mimo_compile.schedules.cuda.code import DeviceCode, Launch
from mimo_compile.schedules.cuda.limits import fits

TEXT = """
extern "C" __global__ void __launch_bounds__(THREADS) gate(const float* x, float* half, int width) {
  __shared__ float row[THREADS];
  for (int i = threadIdx.x; i < width; i += THREADS) {
    const float g = x[2 * blockIdx.x * width + i];
    row[threadIdx.x] = g / (1.0f + __expf(-g));
    half[blockIdx.x * width + i] = row[threadIdx.x];
  }
}
extern "C" __global__ void __launch_bounds__(THREADS) up(
    const float* x, const float* half, float* y, int width) {
  for (int i = threadIdx.x; i < width; i += THREADS)
    y[blockIdx.x * width + i] = half[blockIdx.x * width + i] * x[(2 * blockIdx.x + 1) * width + i];
}
"""


@dataclass(frozen=True, slots=True)
class Config:
    threads: int = 128


class CudaSwiglu(Schedule):
    """``silu(gate) * up`` in two launches, with the gates in between in device memory."""

    name = "swiglu.cuda_sample"
    op = "swiglu"
    config = Config

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        return workload.op == self.op and hardware.kind == "cuda"

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        return Space(
            Config,
            {"threads": (32, 128, 1024, 2048)},
            Config(),
            lambda config: fits(hardware, threads=config.threads, registers=32),
        )

    def lower(self, workload: Workload, config: Any, hardware: Hardware) -> Kernel:
        op = get_op(self.op)
        p = op.full(workload)
        t, f = p["t"], p["f"]
        launches = tuple(
            Launch(symbol, (t, 1, 1), config.threads, (*names, f))
            for symbol, names in (("gate", ("x", "half")), ("up", ("x", "half", "y")))
        )
        code = DeviceCode(
            f"#define THREADS {config.threads}\n{TEXT}", launches,
            {"half": Arg("half", "input", (t, f), "float32")}, expected=("MUFU.EX2", "LDG"),
        )  # fmt: skip
        each = 4.0 * t * f
        counts = in_turn(
            Counts(op.counts(workload).ops, {"dram": each, "l2": 2 * each}, name="gate"),
            Counts({}, {"dram": 2 * each, "l2": 3 * each}, name="up"),
        )
        return Kernel(
            kernel_name(self, workload, config, hardware), None, op.args(workload), counts,
            features=frozenset({"cuda"}), device=code,
        )  # fmt: skip
