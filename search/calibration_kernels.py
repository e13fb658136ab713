"""Kernels whose speed is known to be the machine's: streaming reads, multiply-adds, 8-bit dot products.

They are schedules of a pseudo op, so that they are built and run by the same children as candidates:
``calibrate:tasks=2,chunk=4096,reps=8`` (``chunk`` 16-lane float32 vectors for each parallel task).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mimo_compile import _tvm
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Arg
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Schedule, Space

_tvm.compiler()

from tvm.script import tirx as T  # type: ignore[import-untyped,unused-ignore]

CHAINS = 12
"""Independent accumulators: enough to hide the latency of two multiply-add ports."""


@dataclass(frozen=True, slots=True)
class NoKnobs:
    """Nothing to choose."""


class _Calibration(Schedule):
    op = "calibrate"
    config = NoKnobs

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Runs everywhere."""
        return workload.op == self.op

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """One config."""
        return Space(NoKnobs, {}, NoKnobs())

    def _kernel(self, name: str, func: Any, workload: Workload, counts: Counts) -> Kernel:
        tasks, chunk = workload.integer("tasks"), workload.integer("chunk")
        args = (
            Arg("x", "input", (tasks, chunk, 16), "float32"),
            Arg("y", "output", (tasks, 16), "float32"),
        )
        return Kernel(name, func.with_attr("global_symbol", name), args, counts)


class ReadBandwidth(_Calibration):
    """Sum a chunk for each task, ``reps`` times over."""

    name = "calibrate.read"

    def lower(self, workload: Workload, config: Any, hardware: Hardware) -> Kernel:
        """Generate the kernel."""
        tasks, chunk, reps = (workload.integer(k) for k in ("tasks", "chunk", "reps"))
        U = 8

        @T.prim_func(s_tir=True)
        def read(x: T.handle, y: T.handle) -> None:
            X = T.match_buffer(x, (tasks, chunk, 16), "float32")
            Y = T.match_buffer(y, (tasks, 16), "float32")
            T.func_attr({"tirx.noalias": True})
            for t in T.parallel(tasks):
                with T.sblock("o"):
                    vt = T.axis.spatial(tasks, t)
                    T.reads(X[vt, 0:chunk, 0:16])
                    T.writes(Y[vt, 0:16])
                    acc = T.sblock_alloc_buffer((U, 16), "float32", scope="local")
                    for u in T.unroll(U):
                        acc[u, T.ramp(0, 1, 16)] = T.broadcast(T.float32(0), 16)
                    for _ in range(reps):
                        for i in range(chunk // U):
                            for u in T.unroll(U):
                                acc[u, T.ramp(0, 1, 16)] = (
                                    acc[u, T.ramp(0, 1, 16)] + X[vt, i * U + u, T.ramp(0, 1, 16)]
                                )
                    for u in T.unroll(U - 1):
                        acc[0, T.ramp(0, 1, 16)] = (
                            acc[0, T.ramp(0, 1, 16)] + acc[u + 1, T.ramp(0, 1, 16)]
                        )
                    Y[vt, T.ramp(0, 1, 16)] = acc[0, T.ramp(0, 1, 16)]

        moved = 64.0 * tasks * chunk * reps
        return self._kernel(
            "calibrate_read", read, workload, Counts({"add_f32": moved / 4}, {"dram": moved})
        )


class FmaPeak(_Calibration):
    """Chains of 16-lane multiply-adds on values from memory."""

    name = "calibrate.fma"

    def lower(self, workload: Workload, config: Any, hardware: Hardware) -> Kernel:
        """Generate the kernel."""
        tasks, chunk, reps = (workload.integer(k) for k in ("tasks", "chunk", "reps"))
        U = CHAINS

        @T.prim_func(s_tir=True)
        def fma(x: T.handle, y: T.handle) -> None:
            X = T.match_buffer(x, (tasks, chunk, 16), "float32")
            Y = T.match_buffer(y, (tasks, 16), "float32")
            T.func_attr({"tirx.noalias": True})
            for t in T.parallel(tasks):
                with T.sblock("o"):
                    vt = T.axis.spatial(tasks, t)
                    T.reads(X[vt, 0:chunk, 0:16])
                    T.writes(Y[vt, 0:16])
                    acc = T.sblock_alloc_buffer((U, 16), "float32", scope="local")
                    for u in T.unroll(U):
                        acc[u, T.ramp(0, 1, 16)] = X[vt, u, T.ramp(0, 1, 16)]
                    for _ in range(reps):
                        for u in T.unroll(U):
                            acc[u, T.ramp(0, 1, 16)] = T.call_llvm_pure_intrin(
                                "float32x16",
                                "llvm.fma",
                                acc[u, T.ramp(0, 1, 16)],
                                X[vt, U, T.ramp(0, 1, 16)],
                                X[vt, U + 1, T.ramp(0, 1, 16)],
                            )
                    for u in T.unroll(U - 1):
                        acc[0, T.ramp(0, 1, 16)] = (
                            acc[0, T.ramp(0, 1, 16)] + acc[u + 1, T.ramp(0, 1, 16)]
                        )
                    Y[vt, T.ramp(0, 1, 16)] = acc[0, T.ramp(0, 1, 16)]

        work = 16.0 * tasks * reps * U
        return self._kernel("calibrate_fma", fma, workload, Counts({"fma_f32": work}, {}))


class DotPeak(_Calibration):
    """Chains of 512-bit ``vpdpbusd``: 64 multiply-adds of 8 bit each."""

    name = "calibrate.dot"

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Needs AVX-512 VNNI."""
        return workload.op == self.op and hardware.has_vnni

    def lower(self, workload: Workload, config: Any, hardware: Hardware) -> Kernel:
        """Generate the kernel."""
        tasks, chunk, reps = (workload.integer(k) for k in ("tasks", "chunk", "reps"))
        U = CHAINS

        @T.prim_func(s_tir=True)
        def dot(x: T.handle, y: T.handle) -> None:
            X = T.match_buffer(x, (tasks, chunk, 16), "float32")
            Y = T.match_buffer(y, (tasks, 16), "float32")
            T.func_attr({"tirx.noalias": True})
            for t in T.parallel(tasks):
                with T.sblock("o"):
                    vt = T.axis.spatial(tasks, t)
                    T.reads(X[vt, 0:chunk, 0:16])
                    T.writes(Y[vt, 0:16])
                    acc = T.sblock_alloc_buffer((U, 16), "int32", scope="local")
                    for u in T.unroll(U):
                        acc[u, T.ramp(0, 1, 16)] = T.reinterpret(
                            "int32x16", X[vt, u, T.ramp(0, 1, 16)]
                        )
                    for _ in range(reps):
                        for u in T.unroll(U):
                            acc[u, T.ramp(0, 1, 16)] = T.call_llvm_pure_intrin(
                                "int32x16",
                                "llvm.x86.avx512.vpdpbusd.512",
                                acc[u, T.ramp(0, 1, 16)],
                                T.reinterpret("uint8x64", X[vt, U, T.ramp(0, 1, 16)]),
                                T.reinterpret("int8x64", X[vt, U + 1, T.ramp(0, 1, 16)]),
                            )
                    for u in T.unroll(U - 1):
                        acc[0, T.ramp(0, 1, 16)] = (
                            acc[0, T.ramp(0, 1, 16)] + acc[u + 1, T.ramp(0, 1, 16)]
                        )
                    Y[vt, T.ramp(0, 1, 16)] = T.cast(acc[0, T.ramp(0, 1, 16)], "float32x16")

        work = 64.0 * tasks * reps * U
        return self._kernel("calibrate_dot", dot, workload, Counts({"dot_i8": work}, {}))
