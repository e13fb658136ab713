"""Kernels as files hold them that run without a schedule: launches, arrays and what their code takes."""

from __future__ import annotations

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.ops.base import Arg
from mimo_compile.runtime.device_code import (
    SCRATCH_ALIGNMENT,
    Argument,
    DeviceKernel,
    Scratch,
    Usage,
)
from mimo_compile.schedules.base import Kernel
from mimo_compile.schedules.cuda.code import DeviceCode
from mimo_compile.schedules.cuda.limits import array_bytes, code_of
from mimo_compile.schedules.cuda.nvcc import Binary


def table_of(kernel: Kernel, binary: Binary, predicted_us: float = 0.0) -> DeviceKernel:
    """Return what a file holds of a kernel beside its machine code and text.

    Scratch arrays follow one another, each on a boundary of 256 bytes.

    Args:
        kernel: One with `Kernel.device`.
        binary: Its machine code.
        predicted_us: The least time of a call; 0: not predicted.
    """
    code, at, scratch = code_of(kernel), 0, []
    for name, arg in code.scratch.items():
        scratch.append(Scratch(name, arg.shape, arg.dtype, at, name in code.zeroed))
        at += -(-array_bytes(arg) // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
    symbols = {launch.symbol for launch in code.launches}
    usage = {
        name: Usage(u.registers, u.shared_bytes, u.stack_bytes, u.spill_bytes)
        for name, u in binary.usage.items()
        if name in symbols
    }
    return DeviceKernel(
        tuple(Argument(a.name, a.role, a.shape, a.dtype, a.mutated) for a in kernel.args),
        code.launches, tuple(scratch), usage, predicted_us,
    )  # fmt: skip


def kernel_of(name: str, table: DeviceKernel, text: str) -> Kernel:
    """Return a kernel of a file as schedules make them, for the emulator and for nvcc; it has no counts."""
    code = DeviceCode(
        text,
        table.launches,
        {s.name: Arg(s.name, "input", s.shape, s.dtype) for s in table.scratch},
        frozenset(s.name for s in table.scratch if s.zeroed),
    )
    args = tuple(Arg(a.name, a.role, a.shape, a.dtype, a.mutated) for a in table.args)
    return Kernel(name, None, args, Counts(), device=code)
