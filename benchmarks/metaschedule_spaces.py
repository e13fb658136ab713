"""What TVM's MetaSchedule searches in `against_metaschedule.py`: five kernels and their spaces.

Each space is written by hand, as one or more sketches whose tile sizes are sampled. Parallel and vector
loops, register tiles, accumulators in registers, unpacking at the tile and the ``vpdpbusd`` instruction are
given (as a tensor intrinsic of our own: the one that comes with TVM 0.27 does not compile with its LLVM),
since what MetaSchedule generates by itself does not complete on x86 in this version. Weights are packed
beforehand, as ours are. ``matmul_f32`` is one and the same for both sides, function, sketches and decisions:
ours searches them as knobs (`SharedSketches`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from metaschedule_integer import (
    LANES,
    arrange_quantised,
    integer_sketch,
    prepared,
    quantised,
    vector_start,
)

from mimo_compile._tvm import compiler
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Schedule, Space, kernel_name

tvm = compiler()
from tvm.script import tirx as T


@dataclass(frozen=True)
class Case:
    """One kernel of the comparison."""

    name: str
    op: str
    """The workload, as both sides compute it."""
    func: Callable[[], Any]
    """Makes the PrimFunc that MetaSchedule schedules; its parameters: inputs, weights, the output last."""
    sketches: tuple[Callable[..., None], ...]
    arrange: Callable[[Mapping[str, Array]], list[Array]]
    """Canonical inputs -> the function's arguments, without the output."""
    shared: bool = False
    """Both sides search these sketches of this PrimFunc."""

    def space(self, schedule: Any) -> list[Any]:
        """Return one schedule for each sketch: what `ScheduleFn` wants."""
        out = []
        for sketch in self.sketches:
            copy = schedule.copy()
            sketch(copy)
            out.append(copy)
        return out


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


ROWS_MOST, VECTORS_MOST, STEPS_MOST = 16, 4, 8
"""Largest register tile of the float kernels, and steps that are written out."""


def float_sketch(panels: bool, rows_last: bool, copy: bool = False) -> Callable[..., None]:
    """Return a sketch of a float matmul: register tile in a local buffer, threads over blocks of tiles.

    It takes the schedule, and decisions by loop (``i``, ``b``, ``a``) unless they are to be sampled.

    Args:
        panels: It is a `panel_matmul`.
        rows_last: Blocks of rows pass under a panel of columns, else panels under rows.
        copy: A panel of columns is copied to where it is contiguous (only with ``rows_last``).
    """

    def sketch(sch: Any, decided: Mapping[str, tuple[int, ...]] | None = None) -> None:
        def tiles(name: str, loop: Any, parts: int, most: int) -> list[Any]:
            decision = None if decided is None else list(decided[name])
            drawn = sch.sample_perfect_tile(loop, parts, most, decision=decision)
            found: list[Any] = sch.split(loop, drawn)
            return found

        block = sch.get_sblock("matmul")
        panel = sch.cache_read(block, "w", "global") if copy else None
        cached = sch.cache_write(block, 0, "local")
        if panels:
            i, b, lane, a = sch.get_loops(block)
        else:
            i, j, a = sch.get_loops(block)
            b, lane = sch.split(j, [None, LANES])
        i0, i1, i2 = tiles("i", i, 3, ROWS_MOST)
        b0, b1, b2 = tiles("b", b, 3, VECTORS_MOST)
        a0, a1 = tiles("a", a, 2, STEPS_MOST)
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
        vector_start(sch, sch.decompose_reduction(block, a0), 3)

    return sketch


def arrange_plain(inputs: Mapping[str, Array]) -> list[Array]:
    """Transpose the weight."""
    return [inputs["x"], inputs["w"].T]


def arrange_panels(inputs: Mapping[str, Array]) -> list[Array]:
    """Lay the weight out in panels of 16 rows."""
    n, k = inputs["w"].shape
    return [inputs["x"], inputs["w"].reshape(n // LANES, LANES, k).transpose(0, 2, 1)]


# -- our side of the shared function -----------------------------------------------------------

SHARED = (float_sketch(False, True), float_sketch(False, False), float_sketch(False, True, True))


@dataclass(frozen=True, slots=True)
class Decisions:
    """One sketch of `SHARED` with its decisions: the middle and the inner factors of each loop."""

    sketch: int
    i1: int
    i2: int
    b1: int
    b2: int
    a1: int


def divisors(n: int, most: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, min(n, most) + 1) if n % d == 0)


class SharedSketches(Schedule):
    """The very space that MetaSchedule gets for `plain_matmul`, as knobs."""

    name = "mpgemm.shared_sketches"
    op = "mpgemm"
    config = Decisions

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        p = dict(workload.params)
        plain = p.get("w", "f32") == "f32" and not {"a", "bias"} & set(p)
        return hardware.kind == "cpu" and plain and p["n"] % LANES == 0

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        m, n, k = (workload.integer(name) for name in "mnk")
        blocks = n // LANES
        knobs = {
            "sketch": tuple(range(len(SHARED))), "i1": divisors(m, m), "i2": divisors(m, ROWS_MOST),
            "b1": divisors(blocks, blocks), "b2": divisors(blocks, VECTORS_MOST),
            "a1": divisors(k, STEPS_MOST),
        }  # fmt: skip

        def legal(c: Decisions) -> bool:
            return m % (c.i1 * c.i2) == 0 and blocks % (c.b1 * c.b2) == 0

        return Space(Decisions, knobs, Decisions(0, 1, 1, 1, 1, 1), legal)

    def work(self, workload: Workload, config: Decisions, hardware: Hardware) -> Counts:
        m, n, k = (workload.integer(name) for name in "mnk")
        c, threads = config, hardware.threads
        tasks = m // (c.i1 * c.i2) * (n // LANES // (c.b1 * c.b2))
        traits = {
            "tasks": float(tasks), "share": -(-tasks // threads) / tasks, "useful": 1.0,
            "lanes": float(LANES), "sums": float(c.i2 * c.b2), "loads": 1 / c.i2 + 1 / c.b2,
            "tile_bytes": 4.0 * k * (c.i2 + c.b2 * LANES),
        }  # fmt: skip
        moved = {"dram": 4.0 * (m * k + n * k + m * n)}
        return Counts({"fma_f32": float(m) * n * k}, moved, traits)

    def lower(self, workload: Workload, config: Decisions, hardware: Hardware) -> Kernel:
        m, n, k = (workload.integer(name) for name in "mnk")
        c, name = config, kernel_name(self, workload, config, hardware)
        schedule = tvm.s_tir.Schedule(tvm.IRModule({"main": plain_matmul(m, n, k)}))
        decided = {
            "i": (m // (c.i1 * c.i2), c.i1, c.i2), "a": (k // c.a1, c.a1),
            "b": (n // LANES // (c.b1 * c.b2), c.b1, c.b2),
        }  # fmt: skip
        SHARED[c.sketch](schedule, decided)
        func = schedule.mod["main"].with_attr("global_symbol", name)
        args = (
            Arg("x", "input", (m, k), "float32"), Arg("w", "weight", (k, n), "float32"),
            Arg("y", "output", (m, n), "float32"),
        )  # fmt: skip
        return Kernel(name, func, args, self.work(workload, config, hardware))

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
            SHARED, arrange_plain, shared=True,
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
