# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, valid-type"
"""The machine's roof, measured beside the contestants: reading bytes, and doing nothing but arithmetic.

`read_kernel` sums vectors of a buffer with as many bytes as the workload must move; `work_kernel` runs
independent chains of multiply-adds in registers. Both use all threads, like the kernels they are roofs of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mimo_compile import _tvm
from mimo_compile.bench.contest import Contestant
from mimo_compile.bench.runnable import copies
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Arg
from mimo_compile.schedules.base import Kernel
from mimo_compile.schedules.compile import compile_kernel

_ROWS = 16
"""Vectors of one row of the read buffer: 1 KiB, all in flight."""
_CHAINS = 12
_STEPS = 1 << 16


def read_kernel(rows: int, tasks: int) -> Any:
    """Return the PrimFunc (x int32 [tasks, rows, 256], y int32 [tasks, 256]): sums over rows."""
    from mimo_compile.schedules.emit.vector import LANES, T, ramp

    width = _ROWS * LANES

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((tasks, rows, width), "int32"), y: T.Buffer((tasks, width), "int32")):
        T.func_attr({"tirx.noalias": True, "global_symbol": "roof_read"})
        for i in T.parallel(tasks):
            with T.sblock("task"):
                T.reads(x[i, 0:rows, 0:width])
                T.writes(y[i, 0:width])
                total = T.sblock_alloc_buffer((_ROWS, LANES), "int32", scope="local")
                for v in T.unroll(_ROWS):
                    total[v, ramp(0)] = T.broadcast(T.int32(0), LANES)
                for r in range(rows):
                    for v in T.unroll(_ROWS):
                        total[v, ramp(0)] = total[v, ramp(0)] + x[i, r, ramp(v * LANES)]
                for v in T.unroll(_ROWS):
                    y[i, ramp(v * LANES)] = total[v, ramp(0)]

    return kernel


def work_kernel(tasks: int, vnni: bool) -> Any:
    """Return the PrimFunc (y [tasks, chains, 16]) of dependent multiply-adds: int8 dots, or f32."""
    from mimo_compile.schedules.emit.vector import LANES, T, ramp

    dtype = "int32" if vnni else "float32"

    @T.prim_func(s_tir=True)
    def kernel(y: T.Buffer((tasks, _CHAINS, LANES), dtype)):
        T.func_attr({"tirx.noalias": True, "global_symbol": "roof_work"})
        for i in T.parallel(tasks):
            with T.sblock("task"):
                T.reads(y[i, 0:_CHAINS, 0:LANES])
                T.writes(y[i, 0:_CHAINS, 0:LANES])
                total = T.sblock_alloc_buffer((_CHAINS, LANES), dtype, scope="local")
                for v in T.unroll(_CHAINS):
                    total[v, ramp(0)] = y[i, v, ramp(0)]
                for _ in range(_STEPS):
                    for v in T.unroll(_CHAINS):
                        total[v, ramp(0)] = _step(T, total[v, ramp(0)], vnni)
                for v in T.unroll(_CHAINS):
                    y[i, v, ramp(0)] = total[v, ramp(0)]

    return kernel


def _step(T, acc, vnni):
    if vnni:
        # the accumulator is its own operand, so that nothing can be taken out of the loop
        return T.call_llvm_pure_intrin(
            "int32x16", "llvm.x86.avx512.vpdpbusd.512", acc, T.reinterpret("uint8x64", acc),
            T.broadcast(T.int8(1), 64),
        )  # fmt: skip
    return T.call_llvm_pure_intrin(
        "float32x16",
        "llvm.fma",
        acc,
        T.broadcast(T.float32(0.5), 16),
        T.broadcast(T.float32(1), 16),
    )


def bf16_kernel(tasks: int) -> Any:
    """Return the PrimFunc (y [tasks, chains, 16] float32) of dependent dots of bfloat16."""
    from mimo_compile.schedules.emit.bf16 import dot, imported
    from mimo_compile.schedules.emit.build import Register, T, function, load, loop, splat, store

    def body(y: Any) -> None:
        with imported(), loop(tasks, parallel=True) as i:
            totals = [Register("float32", 16, load(y, i, v, 0, lanes=16)) for v in range(_CHAINS)]
            with loop(_STEPS):
                for total in totals:
                    own = T.reinterpret("int32x16", total.get())
                    total.set(dot(total.get(), own, splat(T.int32(0x3F803F80), 16)))
            for v, total in enumerate(totals):
                store(y, total.get(), i, v, 0, lanes=16)

    return function("roof_work", [Arg("y", "output", (tasks, _CHAINS, 16), "float32")], body)


def read_contestant(
    op: str, hardware: Hardware, wanted: float, cache: str, cold_bytes: int, memory_bytes: int
) -> Contestant:
    """Return the roof kernel that reads at least ``wanted`` bytes with all threads."""
    row = _ROWS * 64
    tasks = hardware.threads * (4 if wanted >= 64 * row * hardware.threads else 1)
    rows = max(1, -(-int(wanted) // (row * tasks)))
    func = _load(read_kernel(rows, tasks), "roof_read", hardware)
    out = _tvm.from_numpy(_filled((tasks, _ROWS * 16), np.int32))
    each = tasks * rows * row
    count = copies(each, cold_bytes if cache == "cold" else 0, memory_bytes)
    sets = [
        (_tvm.from_numpy(_filled((tasks, rows, _ROWS * 16), np.int32)), out) for _ in range(count)
    ]
    return Contestant(
        op, "roof: read", hardware.threads, cache, _caller(func), sets, float(each), 0.0,
        prepare=lambda: _tvm.set_threads(hardware.threads),
    )  # fmt: skip


def work_contestant(op: str, hardware: Hardware, counts: Counts) -> Contestant:
    """Return the roof kernel of the arithmetic that a workload needs: int8 or bf16 dots, or multiply-adds."""
    from mimo_compile.schedules.emit.bf16 import NEEDS

    kind = max(("fma_f32", "dot_i8", "dot_bf16"), key=lambda k: counts.ops.get(k, 0.0))
    if not {"dot_i8": hardware.has_vnni, "dot_bf16": hardware.features >= NEEDS}.get(kind):
        kind = "fma_f32"
    tasks = hardware.threads
    func = bf16_kernel(tasks) if kind == "dot_bf16" else work_kernel(tasks, kind == "dot_i8")
    func = _load(func, "roof_work", hardware)
    dtype, lanes = {
        "fma_f32": (np.float32, 16), "dot_i8": (np.int32, 64), "dot_bf16": (np.float32, 32),
    }[kind]  # fmt: skip
    state = _tvm.from_numpy(_filled((tasks, _CHAINS, 16), dtype))
    operations = 2.0 * tasks * _CHAINS * _STEPS * lanes
    return Contestant(
        op, f"roof: {kind}", tasks, "hot", _caller(func), [(state,)], 0.0,
        operations, prepare=lambda: _tvm.set_threads(hardware.threads),
    )  # fmt: skip


def _load(func: Any, name: str, hardware: Hardware) -> Any:
    kernel = Kernel(name, func, (), Counts())
    module = _tvm.load_object(compile_kernel(kernel, hardware))
    return module[name]


def _caller(func: Any) -> Callable[[Any], None]:
    def call(arguments: tuple[Any, ...]) -> None:
        func(*arguments)

    return call


def _filled(shape: tuple[int, ...], dtype: Any) -> Any:
    array = _tvm.empty_aligned(shape, dtype)
    array[...] = 1
    return array
