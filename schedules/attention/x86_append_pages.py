"""Prepare one attention step and append to KV caches in pages of a pool (`ir.ops.pages`).

One task is a KV head with its query heads, over all tokens of all sequences, as in `x86_append`.
"""

from __future__ import annotations

from typing import Any

from mimo_compile.ir.caches import FORMATS
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.pages import TABLE, paged
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention.append_task import Task, over
from mimo_compile.schedules.attention.half import every_other, upper_half
from mimo_compile.schedules.attention.layout import by_rows, cache_shapes, kernel_args
from mimo_compile.schedules.attention.pages import Table
from mimo_compile.schedules.attention.reach import fixed
from mimo_compile.schedules.attention.x86_append import X86Append
from mimo_compile.schedules.emit.build import T, bind, function, load, loop, store, when
from mimo_compile.schedules.emit.vector import LANES, splat
from mimo_compile.schedules.emit.vector import T as script


class PageTask(Task):
    """The statements of one KV head."""

    def write_key(self, slot: Any) -> None:
        """Write ``row`` as a key."""
        d, cache = self.p["d"], self.args["k_cache"]
        block, lane = bind(slot // LANES), bind(slot % LANES)
        if self.p["c"] == "f32":
            with loop(d) as j:
                store(cache, self.row[j], self.head, block, j, lane)
            return
        with loop(d) as j:
            half = upper_half(self.row[j], 1)
            store(cache, half, self.head, block, j // 2, 2 * lane + j % 2)
        if d % 2:
            store(cache, T.uint16(0), self.head, block, d // 2, 2 * lane + 1)

    def write_value(self, i: Any, slot: Any) -> None:
        """Write the value of row ``i``."""
        p, cache = self.p, self.args["v_cache"]
        first = (p["h"] + p["kv"]) * p["d"] + self.head * p["dv"]

        def step(j: Any, lanes: int) -> None:
            value = load(self.args["qkv"], i, first + j, lanes=lanes) * splat(p["vscale"], lanes)
            if p["c"] == "f32":
                store(cache, value, self.head, slot, j, lanes=lanes)
                return
            place = every_other(2 * j + slot % 2, lanes)
            T.buffer_store(cache, upper_half(value, lanes), [self.head, slot // 2, place])

        over(p["dv"], step)


class RowTask(PageTask):
    """The same for caches that keep each key by itself."""

    def write_key(self, slot: Any) -> None:
        """Write ``row`` as a key, with zeros behind it."""
        d, cache, wide = self.p["d"], self.args["k_cache"], cache_shapes(self.p)["k_cache"][2]
        over(d, lambda j, n: self._put(cache, load(self.row, j, lanes=n), slot, j, n))
        for j in range(d, wide):
            self._put(cache, T.float32(0), slot, j, 1)

    def write_value(self, i: Any, slot: Any) -> None:
        """Write the value of row ``i``."""
        p, cache = self.p, self.args["v_cache"]
        first = (p["h"] + p["kv"]) * p["d"] + self.head * p["dv"]

        def step(j: Any, lanes: int) -> None:
            value = load(self.args["qkv"], i, first + j, lanes=lanes) * splat(p["vscale"], lanes)
            self._put(cache, value, slot, j, lanes)

        over(p["dv"], step)

    def _put(self, cache: Any, value: Any, slot: Any, at: Any, lanes: int) -> None:
        """Store numbers of a row as the cache keeps them."""
        kept = value if self.p["c"] == "f32" else upper_half(value, lanes)
        store(cache, kept, self.head, slot, at, lanes=lanes)


class X86AppendPages(X86Append):
    """One KV head per task."""

    name = "kv_append.x86_pages"

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Every workload of the op over a pool whose caches hold each number by itself, on any x86-64."""
        if workload.op != self.op or hardware.kind != "cpu":
            return False
        p = get_op(self.op).full(workload)
        return paged(p) and p["c"] in FORMATS

    def make(self, p: dict[str, Any], rows: Any, unroll: int) -> Any:
        """Return the PrimFunc (qkv, table, pos, [q_norm, k_norm], pages, k_cache, v_cache, q)."""
        args = kernel_args(get_op(self.op).workload(**p))
        parallel, group, t = rows is script.parallel, p["h"] // p["kv"], p["t"]

        def body(*buffers: Any) -> None:
            given = {a.name: b for a, b in zip(args, buffers, strict=True)}
            pos = given["pos"]
            with loop(p["kv"], parallel=parallel) as h:
                task = (RowTask if by_rows(p) else PageTask)(p, given, h)
                with loop(p["b"]) as sequence:
                    at = (sequence,) if p["b"] > 1 else ()
                    start, valid = fixed(pos[(*at, 0)]), fixed(pos[(*at, 1)])
                    table = Table(given[TABLE], sequence, p["page"])
                    with loop(t) as token:
                        i = fixed(sequence * t + token) if p["b"] * t > 1 else 0
                        with loop(group) as g:
                            task.prepare(i, (h * group + g) * p["d"], given.get("q_norm"))
                            task.write_q(i, h * group + g)
                        with when(token < valid):
                            slot = table.slot(fixed(start + token))
                            task.prepare(i, (p["h"] + h) * p["d"], given.get("k_norm"))
                            task.write_key(slot)
                            task.write_value(i, slot)

        return function("kv_append_pages", args, body)
