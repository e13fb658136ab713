"""What a launch may ask of a GPU, known before anything is compiled.

Schedules ask `fits` in their space's ``legal``; `check` holds the code of a finished kernel against the same
limits. Source of both: the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and
the documentation of ``cuTensorMapEncodeTiled``.
"""

from __future__ import annotations

import math

import numpy as np

from mimo_compile.ir.hardware import Hardware, gpu_of
from mimo_compile.ir.ops.base import Arg
from mimo_compile.runtime import device_code
from mimo_compile.schedules.base import Kernel
from mimo_compile.schedules.cuda.code import DeviceCode, Launch, TensorMap

WARP = 32
MOST_THREADS = device_code.MOST_THREADS
MOST_REGISTERS = 255
"""Of one thread."""
_MOST_CLUSTER = device_code.MOST_CLUSTER
_MOST_BOX = 256
_ELEMENT_BYTES = {
    "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1, "uint8": 1, "float32": 4,
}  # fmt: skip


def refusal(
    hardware: Hardware, *, threads: int, shared_bytes: int = 0, registers: int = 0, cluster: int = 1
) -> str:
    """Return why a GPU cannot launch such a block, or nothing if it can.

    Args:
        hardware: A GPU.
        threads: Of a block.
        shared_bytes: Shared memory of a block, static and dynamic.
        registers: 32-bit registers of a thread, as far as they are known.
        cluster: Blocks of a cluster.
    """
    gpu = gpu_of(hardware)
    if not 0 < threads <= MOST_THREADS or threads % WARP:
        return f"{threads} threads are not whole warps of {WARP}, or not 1 to {MOST_THREADS}"
    if shared_bytes > gpu.shared_per_block:
        return f"{shared_bytes} bytes of shared memory, a block has {gpu.shared_per_block}"
    if registers > MOST_REGISTERS:
        return f"{registers} registers, a thread has {MOST_REGISTERS}"
    if registers and gpu.warps_with(registers) * WARP < threads:
        return (
            f"{threads} threads with {registers} registers, an SM has {gpu.registers_per_sm} "
            f"in quarters: for {gpu.warps_with(registers) * WARP} threads"
        )
    if cluster != 1 and "sm_90a" not in hardware.features:
        return f"clusters, which {gpu.arch} does not have"
    if not 1 <= cluster <= _MOST_CLUSTER:
        return f"clusters of {cluster} blocks, there may be {_MOST_CLUSTER}"
    return ""


def fits(
    hardware: Hardware, *, threads: int, shared_bytes: int = 0, registers: int = 0, cluster: int = 1
) -> bool:
    """Say whether a GPU can launch such a block; see `refusal`."""
    return not refusal(
        hardware, threads=threads, shared_bytes=shared_bytes, registers=registers, cluster=cluster
    )


def code_of(kernel: Kernel) -> DeviceCode:
    """Return a kernel's CUDA code.

    Raises:
        ValueError: it has none.
    """
    if kernel.device is None:
        raise ValueError(f"{kernel.name} has no CUDA code")
    return kernel.device


def check(kernel: Kernel, hardware: Hardware) -> DeviceCode:
    """Return a kernel's CUDA code when a GPU can launch all of it.

    Raises:
        ValueError: a schedule's mistake: a launch that the GPU cannot do, an operand that is no array of the
            kernel, a tensor map that cannot be made.
    """
    code = code_of(kernel)
    arrays: dict[str, Arg] = {a.name: a for a in kernel.args} | dict(code.scratch)
    if missing := hardware.missing(kernel.features):
        raise ValueError(f"{kernel.name} needs {', '.join(sorted(missing))} of {hardware.name}")
    if unknown := code.zeroed - set(code.scratch):
        raise ValueError(f"{kernel.name}: {', '.join(sorted(unknown))} to be zeroed is no scratch")
    if len(arrays) != len(kernel.args) + len(code.scratch):
        raise ValueError(f"{kernel.name}: arguments and scratch arrays of one name")
    if not code.launches:
        raise ValueError(f"{kernel.name} launches nothing")
    for launch in code.launches:
        if text := _problem(launch, arrays, hardware):
            raise ValueError(f"{kernel.name}, launch of {launch.symbol}: {text}")
    return code


def _problem(launch: Launch, arrays: dict[str, Arg], hardware: Hardware) -> str:
    if any(not 1 <= n <= most for n, most in zip(launch.grid, device_code.MOST_GRID, strict=True)):
        return f"a grid of {launch.grid}, there may be 1 to {device_code.MOST_GRID}"
    if launch.grid[0] % launch.cluster:
        return f"{launch.grid[0]} blocks are no whole clusters of {launch.cluster}"
    if text := refusal(
        hardware,
        threads=launch.threads,
        shared_bytes=launch.shared_bytes,
        cluster=launch.cluster,
    ):
        return text
    for operand in launch.operands:
        if isinstance(operand, str) and operand not in arrays:
            return f"the operand {operand} is no array of the kernel"
        if isinstance(operand, int) and not -(2**31) <= operand < 2**31:
            return f"the operand {operand} is no int32"
        if isinstance(operand, TensorMap):
            if "tma" not in hardware.features:
                return f"a tensor map, which {hardware.name} cannot read"
            if operand.array not in arrays:
                return f"a tensor map of {operand.array}, which is no array of the kernel"
            if text := map_problem(operand, arrays[operand.array]):
                return f"a tensor map of {text}"
    return ""


def map_problem(given: TensorMap, array: Arg) -> str:
    """Return why ``cuTensorMapEncodeTiled`` refuses a tensor map of an array, or nothing.

    Rows of a box that are narrower than the swizzle are refused as well: the emulator does not lay them out.
    """
    if given.dtype not in _ELEMENT_BYTES:
        return f"elements of {given.dtype}"
    size = _ELEMENT_BYTES[given.dtype]
    row, inner = given.columns * size, given.box_columns * size
    if given.rows * row > array_bytes(array):
        return f"{given.rows * row} bytes over the {array_bytes(array)} of {given.array}"
    if row % 16:
        return f"rows of {row} bytes, they must be a multiple of 16"
    if not (1 <= given.box_rows <= _MOST_BOX and 1 <= given.box_columns <= _MOST_BOX):
        return f"a box of {given.box_rows} x {given.box_columns}, each at most {_MOST_BOX}"
    if inner % 16 or (given.swizzle and inner != given.swizzle):
        return f"a box of {inner} bytes in a row with a swizzle of {given.swizzle}"
    return ""


def array_bytes(arg: Arg) -> int:
    """Return the size of an array in device memory."""
    size = _ELEMENT_BYTES.get(arg.dtype) or np.dtype(arg.dtype).itemsize
    return math.prod(arg.shape) * size
