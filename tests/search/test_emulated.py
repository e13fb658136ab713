"""`check_emulated`: CUDA schedules are judged on the CPU by the op's reference and bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from mimo_compile.errors import VerificationError
from mimo_compile.ir.hardware import CUDA, Hardware, local_cpu
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Schedule, Space, kernel_name
from mimo_compile.schedules.cuda.code import DeviceCode, Launch
from mimo_compile.schedules.cuda.emulate import compiler
from mimo_compile.search.measure.emulated import check_emulated

pytestmark = pytest.mark.skipif(
    compiler() is None, reason="needs a C++ compiler (CXX, g++ or clang++)"
)
H200 = CUDA["cuda:sm_90a"]
TEXT = """
#include "warp.cuh"
extern "C" __global__ void swiglu(const float* x, float* y) {
  MIMO_SHARED(smem);
  const float* row = x + 2 * F * blockIdx.x;
  float* out = y + F * blockIdx.x;
  if (FAULT == 4) smem[threadIdx.x % 16] = smem[(threadIdx.x + 1) % 16];
  for (int i = threadIdx.x; i < F; i += blockDim.x) {
    const float g = row[i], u = row[F + i] * (FAULT == 1 ? 1.001f : 1.0f);
    if (FAULT == 2 && i == F - 1) continue;
    out[i] = g / (1.0f + expf(-g)) * u;
  }
  block_sync();
  if (FAULT == 3 && threadIdx.x == 0) atomic_add(out, 16777216.0f), atomic_add(out, -16777216.0f);
  if (FAULT == 3 && threadIdx.x == 32) atomic_add(out, 1.0f);
}
"""


@dataclass(frozen=True, slots=True)
class Config:
    fault: int = 0


class Swiglu(Schedule):
    """``silu(gate) * up`` in one launch; its knob is what is wrong with it."""

    name = "swiglu.cuda_faults"
    op = "swiglu"
    config = Config

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        return workload.op == self.op and hardware.kind == "cuda"

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        return Space(Config, {"fault": (0, 1, 2, 3, 4)}, Config(), lambda config: config.fault < 5)

    def lower(self, workload: Workload, config: Any, hardware: Hardware) -> Kernel:
        op = get_op(self.op)
        t, f = workload.integer("t"), workload.integer("f")
        text = f"constexpr int F = {f}, FAULT = {config.fault};\n{TEXT}"
        return Kernel(
            kernel_name(self, workload, config, hardware), None, op.args(workload), op.counts(workload),
            device=DeviceCode(text, (Launch("swiglu", (t, 1, 1), 64, ("x", "y"), 16),)),
        )  # fmt: skip


WORKLOAD = "swiglu:t=3,f=100"


def test_a_right_kernel_is_within_its_bound() -> None:
    seen = check_emulated(WORKLOAD, Swiglu(), None, H200)
    assert 0 < seen.error_ratio <= 1
    assert seen.outputs["y"].shape == seen.expected["y"].shape == (3, 100)
    x = np.zeros_like(seen.inputs["x"])
    seen = check_emulated(WORKLOAD, Swiglu(), None, H200, inputs={"x": x})
    assert not seen.outputs["y"].any()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (1, r"y\[\d+, \d+\] is .*, expected .* within"),
        (2, r"y\[0, 99\] is nan"),
        (3, r"y depends on the order of warps: 0 and 1 differ"),
        (4, r"a race: writes byte \d+ of shared memory"),
    ],
)
def test_a_wrong_kernel_is_told(fault: int, said: str) -> None:
    with pytest.raises(VerificationError, match=said):
        check_emulated(WORKLOAD, Swiglu(), Config(fault), H200)


def test_what_is_not_supported_is_refused() -> None:
    with pytest.raises(ValueError, match="does not support"):
        check_emulated(WORKLOAD, Swiglu(), None, local_cpu())
    with pytest.raises(ValueError, match="not legal"):
        check_emulated(WORKLOAD, Swiglu(), Config(5), H200)
