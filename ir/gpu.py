"""What a CUDA GPU offers: limits of its multiprocessors (SMs), clock and bandwidths; read from the driver.

Limits are those of the CUDA C++ Programming Guide ("Technical Specifications per Compute Capability"), clocks
and bandwidths those of NVIDIA's data sheets. The driver is asked through ``libcuda``, without torch or TVM.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

from mimo_compile.errors import EnvironmentMismatch


@dataclass(frozen=True, slots=True)
class Gpu:
    """One model of GPU. Unit of sizes: bytes."""

    arch: str
    """What nvcc generates code for, e.g. ``sm_90a``."""
    shared_per_block: int
    """Largest shared memory of one block, when it asks for more than the usual 48 KiB."""
    shared_per_sm: int
    clock_hz: float
    memory_bytes_per_s: float
    """Peak of the device memory."""
    shared_reserved: int = 1024
    """Shared memory that each block takes for the driver, besides its own."""
    registers_per_sm: int = 65536
    """32-bit registers; a block may have as many."""
    threads_per_sm: int = 2048
    blocks_per_sm: int = 32

    def warps_with(self, registers: int) -> int:
        """Return how many warps whose threads have so many registers (1 or more) an SM has registers for.

        A warp gets them 256 at a time, from one of the four quarters of an SM.
        """
        each = -(-registers * 32 // 256) * 256
        return 4 * (self.registers_per_sm // 4 // each)


A100 = Gpu("sm_80", 163 << 10, 164 << 10, 1.41e9, 2.039e12)
"""A100 SXM with 80 GB: 108 SMs, 40 MiB of L2."""
H200 = Gpu("sm_90a", 227 << 10, 228 << 10, 1.83e9, 4.8e12)
"""H200 SXM: 132 SMs, 50 MiB of L2. The clock is the one behind the data sheet's 989 TFLOPS of its tensor
cores; without them it may reach 1.98 GHz."""

FEATURES = {"sm_80": frozenset({"cuda", "sm_80", "mma", "cp_async"})}
"""What code for an architecture may use, e.g. ``mma``: ``mma.sync`` of 16-bit floats and int8."""
FEATURES["sm_90a"] = FEATURES["sm_80"] | {"sm_90a", "fp8", "wgmma", "tma"}

_ARCHS = {(8, 0): "sm_80", (9, 0): "sm_90a"}
_REMEDY = "Name one instead: cuda:sm_80 (A100) or cuda:sm_90a (H200)"
# Of CUdevice_attribute in cuda.h.
_ATTRIBUTES = {
    "clock_khz": 13, "sms": 16, "memory_khz": 36, "memory_bits": 37, "l2_bytes": 38, "threads_per_sm": 39,
    "major": 75, "minor": 76, "shared_per_sm": 81, "registers_per_sm": 82, "shared_per_block": 97,
    "blocks_per_sm": 106, "shared_reserved": 111,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Device:
    """The GPU of this machine."""

    name: str
    sms: int
    l2_bytes: int
    gpu: Gpu


def described(name: str, values: dict[str, int]) -> Device:
    """Return a device from what its driver says of it (the names of `_ATTRIBUTES`).

    Raises:
        EnvironmentMismatch: there are no kernels for its architecture.
    """
    arch = _ARCHS.get((values["major"], values["minor"]))
    if arch is None:
        known = ", ".join(f"{a}.{b}" for a, b in _ARCHS)
        raise EnvironmentMismatch(
            f"{name} has compute capability {values['major']}.{values['minor']}; "
            f"there are kernels for {known}",
            where="--target cuda",
            remedy=_REMEDY,
        )
    moved = 2e3 * values["memory_khz"] * values["memory_bits"] / 8  # two transfers each cycle
    gpu = Gpu(
        arch, values["shared_per_block"], values["shared_per_sm"], 1e3 * values["clock_khz"], moved,
        values["shared_reserved"], values["registers_per_sm"], values["threads_per_sm"],
        values["blocks_per_sm"],
    )  # fmt: skip
    return Device(name, values["sms"], values["l2_bytes"], gpu)


def find_device(library: Any) -> Device:
    """Ask a driver's library for its first GPU.

    Raises:
        EnvironmentMismatch: it has none, fails, or there are no kernels for the GPU.
    """

    def ask(function: str, *arguments: Any) -> None:
        error = int(getattr(library, function)(*arguments))
        if error:
            raise _none(f"the NVIDIA driver answers {function} with error {error}")

    count, handle, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    ask("cuInit", 0)
    ask("cuDeviceGetCount", ctypes.byref(count))
    if count.value < 1:
        raise _none("the NVIDIA driver finds no GPU")
    ask("cuDeviceGet", ctypes.byref(handle), 0)
    ask("cuDeviceGetName", name, len(name), handle)
    values = {}
    for key, number in _ATTRIBUTES.items():
        value = ctypes.c_int()
        ask("cuDeviceGetAttribute", ctypes.byref(value), number, handle)
        values[key] = value.value
    return described(name.value.decode(errors="replace"), values)


@cache
def local_gpu() -> Device:
    """Describe the first GPU of this machine.

    Raises:
        EnvironmentMismatch: there is none, its driver is missing or fails, or there are no kernels for it.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise _none("there is no NVIDIA driver (libcuda.so.1)") from error
    return find_device(library)


def _none(why: str) -> EnvironmentMismatch:
    return EnvironmentMismatch(
        f"this machine has no GPU that can be used: {why}",
        where="--target cuda",
        remedy=_REMEDY,
    )
