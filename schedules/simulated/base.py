"""What schedules of simulated targets have instead of code: a program that executes in numpy."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from mimo_compile.errors import UsageError
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.simulated import Matmul
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Schedule


class SimulatedSchedule(Schedule):
    """An algorithm for hardware that nobody has: its results are exact, its time comes from a model."""

    def lower(self, workload: Workload, config: Any, hardware: Hardware) -> Kernel:
        """Refuse: there is nothing to generate code for.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"{hardware.name} is simulated, so {self.name} has no code",
            remedy="`tune` ranks its schedules; compile for a target that exists",
        )

    @abstractmethod
    def simulate(
        self, workload: Workload, config: Any, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Execute the program on canonical inputs and weights, with the machine's own integer widths."""

    def slack(
        self, workload: Workload, config: Any, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return by how much the machine's arithmetic may miss the op's bound, for each output.

        Empty: not at all. Anything else must be a property of the hardware that its documentation states.
        """
        return {}

    @staticmethod
    def problem(workload: Workload) -> Matmul:
        """Return the workload in plain values."""
        return Matmul.of(workload)


def quantize_rows(x: Array) -> tuple[Array, Array]:
    """Quantise rows ``[m, k]`` float32 to int8 codes (as int64) and scales ``[m, 1]`` float32.

    The same rule, in the same arithmetic, as `ir.ops.numerics.quantize_rows`.
    """
    x = np.asarray(x, np.float32)
    largest = np.abs(x).max(axis=-1, keepdims=True, initial=0)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
    codes = np.clip(np.rint(x * inverse), -127, 127).astype(np.int64)
    return codes, (largest / np.float32(127)).astype(np.float32)


def scaled_sum(
    problem: Matmul, x: Array, sums: Array, arrays: Mapping[str, Array], row_scale: Array
) -> Array:
    """Return ``row_scale * sum_g s_g (sums_g - z_g sum of x_g)`` float32 ``[m, n]``.

    Args:
        problem: The matmul.
        x: int8 rows ``[m, k]``.
        sums: Exact sums of each weight group ``[groups, m, n]``.
        arrays: ``scale`` and maybe ``zero`` ``[n, groups]``.
        row_scale: Scales of the rows ``[m, 1]``.
    """
    scale, zero = np.asarray(arrays["scale"], np.float32), zero_points(problem, arrays)
    y = np.zeros((problem.m, problem.n), np.float32)
    for group, total in enumerate(sums):
        columns = slice(group * problem.group, (group + 1) * problem.group)
        offset = x[:, columns].sum(axis=1).astype(np.float32)[:, None]
        at = min(group, scale.shape[1] - 1)
        y += scale[:, at] * (total.astype(np.float32) - zero[:, at] * offset)
    return y * row_scale


def zero_points(problem: Matmul, arrays: Mapping[str, Array]) -> Array:
    """Return the zero points ``[n, groups]`` float32, the format's own where none are stored."""
    if "zero" in arrays:
        return np.asarray(arrays["zero"], np.float32)
    shape = np.shape(arrays["scale"])
    return np.full(shape, problem.fmt.fixed_zero, np.float32)
