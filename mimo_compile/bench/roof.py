# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, valid-type"
"""The machine's roof, measured beside the contestants: reading bytes, and doing nothing but arithmetic.

`read_kernel` sums vectors of a buffer with as many bytes as the workload must move; `work_kernel` runs
independent chains of multiply-adds in registers, `tile_kernel` in matrix tiles where the CPU has them. All
use all threads, like the kernels they are roofs of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mimo_compile import _tvm
from mimo_compile.bench.contest import Contestant
from mimo_compile.bench.draws import copies
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel
from mimo_compile.schedules.compile import compile_kernel

if TYPE_CHECKING:
    from mimo_compile.schedules.emit.amx import Row, Tiles

_ROWS = 16
"""Vectors of one row of the read buffer: 1 KiB, all in flight."""
_CHAINS = 12
_STEPS = 1 << 16
_TILE_STEPS = 1 << 12
_TILE_PRODUCTS = {"tile_i8": 16 * 16 * 64, "tile_bf16": 16 * 16 * 32}
"""Multiply-adds of one instruction."""
_TILE_DTYPES = {"tile_i8": ("int8", "int8", "int32"), "tile_bf16": ("int16", "uint16", "float32")}
"""Of both sides and the sums; bfloat16 as its bits."""


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


def tile_kernel(tasks: int, kind: str, tiles: Tiles, steps: int = _TILE_STEPS) -> Any:
    """Return the PrimFunc (a, b [tasks, 2, 16, 64 bytes], y [tasks, 4, 16, 16]) of products of tiles.

    Four tiles of sums, two of each side: nothing is loaded or stored in between.
    """
    from mimo_compile.schedules.emit.build import function, loop

    whole = kind == "tile_i8"
    left, right, total = _TILE_DTYPES[kind]

    def rows(buffer: Any, *at: Any) -> Row:
        return lambda r: (buffer, (*at, r, 0))

    def body(a: Any, b: Any, y: Any) -> None:
        with loop(tasks, parallel=True) as i:
            tiles.begin([(16, 64)] * 8)
            for sums in range(4):
                (tiles.zero if whole else tiles.zero_f32)(sums)
            for side in range(2):
                tiles.load(4 + side, rows(a, i, side), 64)
                tiles.load(6 + side, rows(b, i, side), 64)
            with loop(steps):
                for sums in range(4):
                    pair = 4 + sums // 2, 6 + sums % 2
                    if whole:
                        tiles.dot(sums, *pair, signed=True)
                    else:
                        tiles.dot_bf16(sums, *pair)
            for sums in range(4):
                tiles.store(sums, rows(y, i, sums), 64)
            tiles.end()

    wide = 64 // np.dtype(left).itemsize
    args = [
        Arg("a", "input", (tasks, 2, 16, wide), left),
        Arg("b", "input", (tasks, 2, 16, wide), right),
        Arg("y", "output", (tasks, 4, 16, 16), total),
    ]
    return function("roof_work", args, body)


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


def roof_counts(workload: Workload, inputs: Mapping[str, Array] | None = None) -> Counts:
    """Return a workload's counts, its multiply-adds as those of the fastest unit that its operands allow.

    Attention over 16-bit caches is exact in float32, but kernels may round the rest to bfloat16 too. With
    ``inputs`` counts are of the work on these.
    """
    op = get_op(workload.op)
    counts = op.counts(workload) if inputs is None else op.counts_of(workload, inputs)
    ops = dict(counts.ops)
    if (
        workload.op != "cached_attention"
        or op.full(workload)["c"] != "bf16"
        or "fma_f32" not in ops
    ):
        return counts
    ops["dot_bf16"] = ops.pop("fma_f32")
    return replace(counts, ops=ops)


def work_contestant(op: str, hardware: Hardware, counts: Counts) -> Contestant:
    """Return the roof kernel of the arithmetic that a workload needs.

    int8 or bf16 dots, in tiles or vectors as the CPU has them, or float32 multiply-adds.
    """
    from mimo_compile.schedules.emit import amx, bf16

    kind = max(("fma_f32", "dot_i8", "dot_bf16"), key=lambda k: counts.ops.get(k, 0.0))
    if kind == "dot_i8" and hardware.features >= amx.NEEDS and not _tvm.request_tiles():
        kind = "tile_i8"
    elif kind == "dot_bf16" and hardware.features >= amx.NEEDS_BF16 and not _tvm.request_tiles():
        kind = "tile_bf16"
    elif not {"dot_i8": hardware.has_vnni, "dot_bf16": hardware.features >= bf16.NEEDS}.get(kind):
        kind = "fma_f32"
    tasks = hardware.threads
    if kind in _TILE_PRODUCTS:
        kernel = tile_kernel(tasks, kind, amx.AmxTiles())
        left, right, total = _TILE_DTYPES[kind]
        side = (tasks, 2, 16, 64 // np.dtype(left).itemsize)
        shapes = [(side, left), (side, right), ((tasks, 4, 16, 16), total)]
        state = [_tvm.from_numpy(_filled(shape, dtype)) for shape, dtype in shapes]
        operations = 2.0 * tasks * 4 * _TILE_STEPS * _TILE_PRODUCTS[kind]
    else:
        kernel = bf16_kernel(tasks) if kind == "dot_bf16" else work_kernel(tasks, kind == "dot_i8")
        dtype, lanes = {
            "fma_f32": (np.float32, 16), "dot_i8": (np.int32, 64), "dot_bf16": (np.float32, 32),
        }[kind]  # fmt: skip
        state = [_tvm.from_numpy(_filled((tasks, _CHAINS, 16), dtype))]
        operations = 2.0 * tasks * _CHAINS * _STEPS * lanes
    func = _load(kernel, "roof_work", hardware)
    return Contestant(
        op, f"roof: {kind}", tasks, "hot", _caller(func), [tuple(state)], 0.0,
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
