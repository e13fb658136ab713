"""What TVM's MetaSchedule searches in `against_metaschedule.py`: five kernels and their spaces.

Each space is written by hand, as one or more sketches whose tile sizes are sampled. Parallel and vector
loops, register tiles, accumulators in registers, unpacking at the tile and the ``vpdpbusd`` instruction are
given (as a tensor intrinsic of our own: the one that comes with TVM 0.27 does not compile with its LLVM),
since what MetaSchedule generates by itself does not complete on x86 in this version. Weights are packed
beforehand, as ours are. ``matmul_f32`` is one PrimFunc for both sides: ours searches the knobs of its rules
for any PrimFunc (`SharedTir`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from mimo_compile._tvm import compiler
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Schedule, Space, kernel_name
from mimo_compile.schedules.generic.x86_tir import TirConfig, lower_tir

tvm = compiler()
from tvm.script import tirx as T

DOT = {"global": "mimo_dot_16x4", "local": "mimo_dot_16x4_local"}
"""Scope of the codes -> name of the tensor intrinsic."""
LANES = 16


@dataclass(frozen=True)
class Case:
    """One kernel of the comparison."""

    name: str
    op: str
    """The workload, as both sides compute it."""
    func: Callable[[], Any]
    """Makes the PrimFunc that MetaSchedule schedules; its parameters: inputs, weights, the output last."""
    sketches: tuple[Callable[[Any], None], ...]
    arrange: Callable[[Mapping[str, Array]], list[Array]]
    """Canonical inputs -> the function's arguments, without the output."""
    shared: bool = False
    """Both sides schedule this PrimFunc."""

    def space(self, schedule: Any) -> list[Any]:
        """Return one schedule for each sketch: what `ScheduleFn` wants."""
        out = []
        for sketch in self.sketches:
            copy = schedule.copy()
            sketch(copy)
            out.append(copy)
        return out


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


def _vector_init(sch: Any, init: Any, loops: int) -> None:
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
        _vector_init(sch, sch.decompose_reduction(blocks[name], loops[name][at]), 1)
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
        _vector_init(sch, sch.decompose_reduction(merge, mg), 3)
        _vector_init(sch, sch.decompose_reduction(dot, p0), 3)
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


# -- float kernels -----------------------------------------------------------------------------


def plain_matmul(m: int, n: int, k: int) -> Any:
    """Return ``y [m, n] = x [m, k] @ w [k, n]`` in float32."""

    @T.prim_func(s_tir=True)
    def main(
        x: T.Buffer((m, k), "float32"),
        w: T.Buffer((k, n), "float32"),
        y: T.Buffer((m, n), "float32"),
    ) -> None:
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        for i, j, a in T.grid(m, n, k):
            with T.sblock("matmul"):
                vi, vj, va = T.axis.remap("SSR", [i, j, a])
                with T.init():
                    y[vi, vj] = T.float32(0)
                y[vi, vj] = y[vi, vj] + x[vi, va] * w[va, vj]

    return main


def panel_matmul(m: int, n: int, k: int) -> Any:
    """Return the product with weights in panels of 16 rows: ``w [n / 16, k, 16]``, ``y [m, n / 16, 16]``."""
    blocks = n // LANES

    @T.prim_func(s_tir=True)
    def main(
        x: T.Buffer((m, k), "float32"),
        w: T.Buffer((blocks, k, 16), "float32"),
        y: T.Buffer((m, blocks, 16), "float32"),
    ) -> None:
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        for i, b, ln, a in T.grid(m, blocks, 16, k):
            with T.sblock("matmul"):
                vi, vb, vl, va = T.axis.remap("SSSR", [i, b, ln, a])
                with T.init():
                    y[vi, vb, vl] = T.float32(0)
                y[vi, vb, vl] = y[vi, vb, vl] + x[vi, va] * w[vb, va, vl]

    return main


def float_sketch(panels: bool, rows_last: bool, copy: bool = False) -> Callable[[Any], None]:
    """Return a sketch of a float matmul: register tile in a local buffer, threads over blocks of tiles.

    Args:
        panels: It is a `panel_matmul`.
        rows_last: Blocks of rows pass under a panel of columns, else panels under rows.
        copy: A panel of columns is copied to where it is contiguous (only with ``rows_last``).
    """

    def sketch(sch: Any) -> None:
        block = sch.get_sblock("matmul")
        panel = sch.cache_read(block, "w", "global") if copy else None
        cached = sch.cache_write(block, 0, "local")
        if panels:
            i, b, lane, a = sch.get_loops(block)
        else:
            i, j, a = sch.get_loops(block)
            b, lane = sch.split(j, [None, LANES])
        i0, i1, i2 = sch.split(i, sch.sample_perfect_tile(i, 3, max_innermost_factor=16))
        b0, b1, b2 = sch.split(b, sch.sample_perfect_tile(b, 3, max_innermost_factor=4))
        a0, a1 = sch.split(a, sch.sample_perfect_tile(a, 2, max_innermost_factor=8))
        middle = (b1, i1) if rows_last else (i1, b1)
        sch.reorder(b0, i0, *middle, a0, a1, i2, b2, lane)
        sch.parallel(sch.fuse(b0, i0))
        if panel is not None:
            sch.compute_at(panel, b1, preserve_unit_loops=True)
            *_, column = sch.get_loops(panel)
            sch.vectorize(sch.split(column, [None, LANES])[1])
        sch.reverse_compute_at(cached, middle[1], preserve_unit_loops=True)
        own = sch.get_loops(cached)[3:]
        if not panels:
            own = [own[0], *sch.split(own[1], [None, LANES])]
        for loop in (*own[:-1], a1, i2, b2):
            sch.unroll(loop)
        sch.vectorize(own[-1])
        sch.vectorize(lane)
        _vector_init(sch, sch.decompose_reduction(block, a0), 3)

    return sketch


def arrange_plain(inputs: Mapping[str, Array]) -> list[Array]:
    """Transpose the weight."""
    return [inputs["x"], inputs["w"].T]


def arrange_panels(inputs: Mapping[str, Array]) -> list[Array]:
    """Lay the weight out in panels of 16 rows."""
    n, k = inputs["w"].shape
    return [inputs["x"], inputs["w"].reshape(n // LANES, LANES, k).transpose(0, 2, 1)]


# -- our side of the shared function -----------------------------------------------------------


class SharedTir(Schedule):
    """Our rules for any PrimFunc, on `plain_matmul`, as a space of their knobs."""

    name = "mpgemm.shared_tir"
    op = "mpgemm"
    config = TirConfig
    _values: ClassVar[dict[str, tuple]] = {
        "parallel": (False, True), "vector": (4, 8, 16), "unroll": (1, 2, 3, 4, 6, 8),
        "tile": (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16),
    }  # fmt: skip

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        p = dict(workload.params)
        return hardware.kind == "cpu" and p.get("w", "f32") == "f32" and "a" not in p

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        return Space(TirConfig, self._values, TirConfig(parallel=hardware.threads > 1))

    def work(self, workload: Workload, config: Any, hardware: Hardware) -> Counts:
        m, n, k = (workload.integer(name) for name in "mnk")
        return Counts({"fma_f32": float(m) * n * k}, {"dram": 4.0 * (m * k + n * k + m * n)})

    def lower(self, workload: Workload, config: Any, hardware: Hardware) -> Kernel:
        name = kernel_name(self, workload, config, hardware)
        func = plain_matmul(*(workload.integer(name) for name in "mnk"))
        kernel = lower_tir(func, name, config, hardware)
        args = tuple(replace(a, role="weight") if a.name == "w" else a for a in kernel.args)
        return replace(kernel, args=args, counts=self.work(workload, config, hardware))

    def layouts(self, workload: Workload, config: Any) -> dict[str, str]:
        return {"weight": "columns"}

    def pack(
        self, workload: Workload, config: Any, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        return {n: np.ascontiguousarray(a.T if n == "w" else a) for n, a in arrays.items()}


# -- the five ----------------------------------------------------------------------------------


def _integer(name: str, m: int, n: int, k: int, bits: int, group: int) -> Case:
    packed, wide = bits == 4, group or k
    sketches = tuple(integer_sketch(packed, last) for last in ((True, False) if m > 1 else (True,)))
    weight = f"w{bits}g{group}" if group else f"w{bits}"
    return Case(
        name, f"mpgemm:m={m},n={n},k={k},w={weight},a=a8",
        lambda: prepared(quantised(m, n, k, bits, wide), m > 1), sketches, arrange_quantised(bits, wide),
    )  # fmt: skip


def cases(*, smoke: bool = False) -> dict[str, Case]:
    """Return the kernels of the comparison by name; ``smoke``: the same on small shapes."""
    m, n, k = (16, 128, 256) if smoke else (128, 1024, 1024)
    big, rows = (256, 4) if smoke else (4096, 16)
    wide = 256 if smoke else 2048
    found = [
        Case(
            "matmul_f32", f"mpgemm:m={m},n={n},k={k},w=f32", lambda: plain_matmul(m, n, k),
            (float_sketch(False, True), float_sketch(False, False), float_sketch(False, True, True)),
            arrange_plain, shared=True,
        ),
        _integer("gemm_int8", rows, big, big, 8, 0),
        _integer("gemv_w4", 1, big, big, 4, 64),
        _integer("gemm_w4", rows, big, big, 4, 64),
        Case(
            "gemm_f32", f"mpgemm:m={rows},n={wide},k={wide},w=f32",
            lambda: panel_matmul(rows, wide, wide),
            (float_sketch(True, True), float_sketch(True, False)), arrange_panels,
        ),
    ]  # fmt: skip
    return {c.name: c for c in found}
