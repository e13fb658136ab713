"""Code of GPU kernels for an artifact: each compiled by itself, several at a time, and what that tells."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from mimo_compile.errors import EnvironmentMismatch, MimoError
from mimo_compile.ir.hardware import Hardware, gpu_of
from mimo_compile.pipeline.isolate import Origin
from mimo_compile.runtime.device_code import Made, encode
from mimo_compile.schedules.base import Kernel

if TYPE_CHECKING:
    from mimo_compile._cuda import Launch
    from mimo_compile.cost_models.gpu import LaunchShape


def require_compiler(hardware: Hardware) -> None:
    """Check that code for a target can be made here.

    Raises:
        EnvironmentMismatch: it is a GPU, and there is neither nvcc nor NVRTC.
    """
    if hardware.kind == "cuda":
        from mimo_compile.schedules.cuda.nvcc import find_compiler

        find_compiler()


def compiler_version(hardware: Hardware) -> dict[str, str]:
    """Return the release of CUDA whose compiler makes a target's code, by its name in a manifest."""
    if hardware.kind != "cuda":
        return {}
    from mimo_compile.schedules.cuda.nvcc import find_compiler, release

    return {"cuda": ".".join(map(str, release(find_compiler())))}


def compile_device_code(
    kernels: Sequence[Kernel], origins: Sequence[Origin], hardware: Hardware
) -> bytes:
    """Compile CUDA kernels to the code member of an artifact.

    Args:
        kernels: Those that are named alike must be the same.
        origins: Where each kernel comes from.
        hardware: A GPU.

    Raises:
        EnvironmentMismatch: there is neither nvcc nor NVRTC.
        MimoError: it refuses a kernel, the GPU cannot launch it, or it can only be slow, as in a search (it
            uses local memory, say); names workload, schedule and config.
    """
    distinct = {k.name: (k, o) for k, o in zip(kernels, origins, strict=True)}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        made = pool.map(lambda pair: _made(pair[0], pair[1], hardware), distinct.values())
        return encode(gpu_of(hardware).arch, dict(zip(distinct, made, strict=True)))


def _made(kernel: Kernel, origin: Origin, hardware: Hardware) -> Made:
    from mimo_compile.schedules.cuda.limits import code_of
    from mimo_compile.schedules.cuda.nvcc import compile_device
    from mimo_compile.schedules.cuda.table import table_of

    where = f"schedule {origin.schedule}, config {origin.config}"
    try:
        binary = compile_device(kernel, hardware)
        us = predicted_us(kernel, binary.usage, hardware)
        made = Made(table_of(kernel, binary, us), binary.cubin, code_of(kernel).text)
    except EnvironmentMismatch:
        raise
    except (MimoError, ValueError) as error:
        raise MimoError(
            f"code generation for {origin.workload} failed: {error}", where=where
        ) from error
    if binary.slow:
        raise MimoError(
            f"the kernel of {origin.workload} can only be slow: {binary.slow}",
            where=where,
            remedy="Another config may do, which a search finds: "
            f"mimo-compile tune --op {origin.workload} --target {hardware.name}",
        )
    return made


def predicted_us(kernel: Kernel, usage: Mapping[str, Any], hardware: Hardware) -> float:
    """Return the least microseconds of a call by `cost_models.gpu`; 0: counts do not tell of its launches.

    Args:
        kernel: One with CUDA code.
        usage: What its functions take, by symbol.
        hardware: A GPU.

    Raises:
        ValueError: no SM can hold a block of it.
    """
    from mimo_compile.cost_models.gpu import predict
    from mimo_compile.schedules.cuda.limits import code_of

    launches = code_of(kernel).launches
    if len(launches) > 1 and len(kernel.counts.parts) != len(launches):
        return 0.0  # it runs as well as any other
    shapes = [launch_shape(launch, usage.get(launch.symbol)) for launch in launches]
    return 1e6 * predict(kernel.counts, shapes, hardware).seconds


def launch_shape(launch: Launch, usage: Any) -> LaunchShape:
    """Return what a launch asks of an SM; ``usage``: what its function takes, None if that is not known."""
    from mimo_compile.cost_models.gpu import LaunchShape

    x, y, z = launch.grid
    registers, static = (usage.registers, usage.shared_bytes) if usage else (0, 0)
    return LaunchShape(x * y * z, launch.threads, registers, launch.shared_bytes + static)
