"""Matmuls of int8 activations with 8- and 4-bit codes as PrimFuncs, with sketches for MetaSchedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mimo_compile._tvm import compiler
from mimo_compile.ir.ops.base import Array

tvm = compiler()
from tvm.script import tirx as T

DOT = {"global": "mimo_dot_16x4", "local": "mimo_dot_16x4_local"}
"""Scope of the codes -> name of the tensor intrinsic."""
LANES = 16


# -- vpdpbusd ----------------------------------------------------------------------------------


def dot_intrinsic(scope: str) -> tuple[Any, Any]:
    """Return what the instruction does, and the instruction, for codes in memory of a scope."""

    @T.prim_func(s_tir=True)
    def described(a: T.handle, b: T.handle, c: T.handle) -> None:
        w = T.match_buffer(a, (16, 4), "uint8", offset_factor=1, scope=scope)
        q = T.match_buffer(b, (4,), "int8", offset_factor=1)
        sums = T.match_buffer(c, (16,), "int32", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(sums[0:16], w[0:16, 0:4], q[0:4])
            T.writes(sums[0:16])
            for ln in T.serial(0, 16):
                for k in T.serial(0, 4):
                    with T.sblock("update"):
                        vl, vk = T.axis.remap("SR", [ln, k])
                        sums[vl] = sums[vl] + T.Cast("int32", w[vl, vk]) * T.Cast("int32", q[vk])

    @T.prim_func(s_tir=True)
    def vnni(a: T.handle, b: T.handle, c: T.handle) -> None:
        w = T.match_buffer(a, (16, 4), "uint8", offset_factor=1, scope=scope)
        q = T.match_buffer(b, (4,), "int8", offset_factor=1)
        sums = T.match_buffer(c, (16,), "int32", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(sums[0:16], w[0:16, 0:4], q[0:4])
            T.writes(sums[0:16])
            sums[T.ramp(0, 1, 16)] = T.call_llvm_pure_intrin(
                "int32x16",
                "llvm.x86.avx512.vpdpbusd.512",
                sums.vload([0], dtype="int32x16"),
                w.vload([0, 0], dtype="uint8x64"),
                T.reinterpret(
                    "int8x64", T.broadcast(T.reinterpret("int32", q.vload([0], dtype="int8x4")), 16)
                ),
            )

    return described, vnni


def register_intrinsics() -> None:
    """Make `DOT` known to the schedules of this process."""
    for scope, name in DOT.items():
        tvm.s_tir.TensorIntrin.register(name, *dot_intrinsic(scope), override=True)


# -- integer kernels ---------------------------------------------------------------------------


def quantised(m: int, n: int, k: int, bits: int, group: int) -> Any:
    """Return the unscheduled PrimFunc of int8 activations times 8- or 4-bit symmetric codes.

    Args:
        m: Rows of x ``[m, k]`` float32.
        n: Rows of the weight; y is ``[m, n / 16, 16]`` float32.
        k: Columns.
        bits: 8, or 4: then a byte holds the codes of columns ``8 j + c`` (low) and ``8 j + 4 + c``.
        group: Columns that share a scale; codes are ``[n / 16, k / group, ..., 16, 4]`` uint8.
    """
    blocks, groups, quads, fields = n // LANES, k // group, group // 4, 8 // bits
    zero = 1 << (bits - 1)

    @T.prim_func(s_tir=True)
    def main(
        x: T.Buffer((m, k), "float32"),
        w: T.Buffer((blocks, groups, quads // fields, 16, 4), "uint8"),
        scale: T.Buffer((blocks, groups, 16), "float16"),
        y: T.Buffer((m, blocks, 16), "float32"),
    ) -> None:
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        peaks = T.sblock_alloc_buffer((m, 16), "float32")
        peak = T.sblock_alloc_buffer((m,), "float32")
        inverse = T.sblock_alloc_buffer((m,), "float32")
        q = T.sblock_alloc_buffer((m, k // 4, 4), "int8")
        lane_sums = T.sblock_alloc_buffer((m, groups, 16), "int32")
        code_sums = T.sblock_alloc_buffer((m, groups), "int32")
        u = T.sblock_alloc_buffer((blocks, groups, quads, 16, 4), "uint8")
        acc = T.sblock_alloc_buffer((m, blocks, groups, 16), "int32")
        total = T.sblock_alloc_buffer((m, blocks, 16), "float32")
        for i in T.serial(m):
            for a, ln in T.grid(k // 16, 16):
                with T.sblock("peaks"):
                    vi, vl, va = T.axis.remap("SSR", [i, ln, a])
                    with T.init():
                        peaks[vi, vl] = T.float32(0)
                    peaks[vi, vl] = T.max(peaks[vi, vl], T.abs(x[vi, va * 16 + vl]))
            for ln in T.serial(16):
                with T.sblock("peak"):
                    vi, vl = T.axis.remap("SR", [i, ln])
                    with T.init():
                        peak[vi] = T.float32(0)
                    peak[vi] = T.max(peak[vi], peaks[vi, vl])
            with T.sblock("inverse"):
                vi = T.axis.spatial(m, i)
                inverse[vi] = T.if_then_else(
                    peak[vi] > T.float32(0), T.float32(127) / peak[vi], T.float32(0)
                )
            for a, ln in T.grid(k // 16, 16):
                with T.sblock("codes"):
                    vi, va, vl = T.axis.remap("SSS", [i, a, ln])
                    q[vi, va * 4 + vl // 4, vl % 4] = T.Cast(
                        "int8",
                        T.min(
                            T.max(T.nearbyint(x[vi, va * 16 + vl] * inverse[vi]), T.float32(-127)),
                            T.float32(127),
                        ),
                    )
            for g, a, ln in T.grid(groups, group // 16, 16):
                with T.sblock("lane_sums"):
                    vi, vg, vl, va = T.axis.remap("SSSR", [i, g, ln, a])
                    with T.init():
                        lane_sums[vi, vg, vl] = 0
                    lane_sums[vi, vg, vl] = lane_sums[vi, vg, vl] + T.Cast(
                        "int32", q[vi, vg * quads + va * 4 + vl // 4, vl % 4]
                    )
            for g, ln in T.grid(groups, 16):
                with T.sblock("code_sums"):
                    vi, vg, vl = T.axis.remap("SSR", [i, g, ln])
                    with T.init():
                        code_sums[vi, vg] = 0
                    code_sums[vi, vg] = code_sums[vi, vg] + lane_sums[vi, vg, vl]
        if fields == 2:
            for b, g, p, ln, c in T.grid(blocks, groups, quads, 16, 4):
                with T.sblock("unpack"):
                    vb, vg, vp, vl, vc = T.axis.remap("SSSSS", [b, g, p, ln, c])
                    u[vb, vg, vp, vl, vc] = T.bitwise_and(
                        T.shift_right(w[vb, vg, vp // 2, vl, vc], T.Cast("uint8", vp % 2 * 4)),
                        T.uint8(15),
                    )
        for i, b, g, p, ln, c in T.grid(m, blocks, groups, quads, 16, 4):
            with T.sblock("dot"):
                vi, vb, vg, vp, vl, vc = T.axis.remap("SSSRSR", [i, b, g, p, ln, c])
                with T.init():
                    acc[vi, vb, vg, vl] = 0
                if fields == 2:
                    acc[vi, vb, vg, vl] = acc[vi, vb, vg, vl] + T.Cast(
                        "int32", u[vb, vg, vp, vl, vc]
                    ) * T.Cast("int32", q[vi, vg * quads + vp, vc])
                else:
                    acc[vi, vb, vg, vl] = acc[vi, vb, vg, vl] + T.Cast(
                        "int32", w[vb, vg, vp, vl, vc]
                    ) * T.Cast("int32", q[vi, vg * quads + vp, vc])
        for i, b, ln, g in T.grid(m, blocks, 16, groups):
            with T.sblock("merge"):
                vi, vb, vl, vg = T.axis.remap("SSSR", [i, b, ln, g])
                with T.init():
                    total[vi, vb, vl] = T.float32(0)
                total[vi, vb, vl] = total[vi, vb, vl] + T.Cast(
                    "float32", acc[vi, vb, vg, vl] - zero * code_sums[vi, vg]
                ) * T.Cast("float32", scale[vb, vg, vl])
        for i, b, ln in T.grid(m, blocks, 16):
            with T.sblock("out"):
                vi, vb, vl = T.axis.remap("SSS", [i, b, ln])
                y[vi, vb, vl] = total[vi, vb, vl] * (peak[vi] / T.float32(127))

    return main


def vector_start(sch: Any, init: Any, loops: int) -> None:
    """Unroll and vectorise the innermost loops of a reduction's start."""
    *outer, lane = sch.get_loops(init)[-loops:]
    for loop in outer:
        sch.unroll(loop)
    sch.vectorize(lane)


def prepared(func: Any, parallel: bool) -> Any:
    """Schedule how `quantised` rounds activations: vectors of 16, rows on all threads.

    There is nothing to choose here, and what is no part of a trace is not replayed for each candidate.
    """
    sch = tvm.s_tir.Schedule(tvm.IRModule({"main": func}))
    blocks = {n: sch.get_sblock(n) for n in ("peaks", "codes", "lane_sums")}
    loops = {n: sch.get_loops(b) for n, b in blocks.items()}
    for own in loops.values():
        sch.vectorize(own[-1])
    if parallel:
        sch.parallel(loops["codes"][0])
    for name, at in (("peaks", 1), ("lane_sums", 2)):
        vector_start(sch, sch.decompose_reduction(blocks[name], loops[name][at]), 1)
    return sch.mod["main"]


def integer_sketch(packed: bool, rows_last: bool) -> Callable[[Any], None]:
    """Return a sketch of `quantised`: register tile of rows x vectors, dots at each group, unpacked there.

    Args:
        packed: There is an unpack block.
        rows_last: Blocks of rows pass under a tile of weights, else tiles of weights under rows.
    """

    def sketch(sch: Any) -> None:
        out, merge, dot = (sch.get_sblock(n) for n in ("out", "merge", "dot"))
        i, b, lane = sch.get_loops(out)
        i0, i1 = sch.split(i, sch.sample_perfect_tile(i, 2, max_innermost_factor=16))
        b0, b1, b2 = sch.split(b, sch.sample_perfect_tile(b, 3, max_innermost_factor=4))
        last = i0 if rows_last else b1
        sch.reorder(b0, *((b1, i0) if rows_last else (i0, b1)), i1, b2, lane)
        sch.parallel(b0)
        sch.unroll(i1)
        sch.unroll(b2)
        sch.vectorize(lane)

        sch.compute_at(merge, last, preserve_unit_loops=True)
        mi, mb, ml, mg = sch.get_loops(merge)[3:]
        sch.reorder(mg, mi, mb, ml)
        sch.unroll(mi)
        sch.unroll(mb)
        sch.vectorize(ml)

        sch.compute_at(dot, mg, preserve_unit_loops=True)
        di, db, dg, dp, dl, dc = sch.get_loops(dot)[4:]
        inner = 2 if packed else 1
        pair, half = sch.split(dp, [None, inner])
        p0, p1 = sch.split(pair, sch.sample_perfect_tile(pair, 2, max_innermost_factor=8))
        sch.reorder(dg, p0, p1, half, db, di, dl, dc)
        for loop in (p1, half, db, di):
            sch.unroll(loop)
        if packed:
            unpack = sch.get_sblock("unpack")
            sch.compute_at(unpack, p1, preserve_unit_loops=True)
            *serial, ul, uc = sch.get_loops(unpack)[-5:]
            for loop in serial:
                sch.unroll(loop)
            sch.vectorize(sch.fuse(ul, uc))
            sch.set_scope(unpack, 0, "local")
        sch.set_scope(dot, 0, "local")
        sch.set_scope(merge, 0, "local")
        vector_start(sch, sch.decompose_reduction(merge, mg), 3)
        vector_start(sch, sch.decompose_reduction(dot, p0), 3)
        sch.tensorize(dl, DOT["local" if packed else "global"])

    return sketch


def arrange_quantised(bits: int, group: int) -> Callable[[Mapping[str, Array]], list[Array]]:
    """Return how canonical arrays become the arguments of `quantised`."""

    def arrange(inputs: Mapping[str, Array]) -> list[Array]:
        codes, scale = inputs["codes"], inputs["scale"]
        n, k = codes.shape
        blocks, groups = n // LANES, k // group
        if bits == 4:
            pairs = codes.reshape(blocks, LANES, groups, group // 8, 2, 4)
            stored = pairs[..., 0, :] | (pairs[..., 1, :] << 4)
        else:
            stored = codes.reshape(blocks, LANES, groups, group // 4, 4)
        scales = scale.reshape(blocks, LANES, groups).transpose(0, 2, 1).astype(np.float16)
        return [inputs["x"], stored.transpose(0, 2, 3, 1, 4), scales]

    return arrange
