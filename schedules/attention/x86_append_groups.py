"""Prepare one attention step and append to KV caches in groups: rows into the tail, full groups into codes.

One task is a KV head with its query heads, over all tokens of all sequences, as in `x86_append`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.kv_groups import GROUPED, GroupedFormat, tail_of
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.numerics import F16_MOST
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention.append_task import Task, magnitude, over
from mimo_compile.schedules.attention.group_layout import BLOCKS, elements
from mimo_compile.schedules.attention.layout import kernel_args, round_up
from mimo_compile.schedules.attention.pages import table_of
from mimo_compile.schedules.attention.reach import fixed
from mimo_compile.schedules.attention.score_common import across, add, reduced
from mimo_compile.schedules.attention.sequences import parts_of, turns
from mimo_compile.schedules.attention.x86_append import X86Append
from mimo_compile.schedules.emit.build import (
    Register,
    T,
    bind,
    function,
    load,
    loop,
    store,
    vector_type,
    when,
    workspace,
)
from mimo_compile.schedules.emit.vector import LANES, rint, splat
from mimo_compile.schedules.emit.vector import T as script


class GroupTask(Task):
    """The statements of one KV head."""

    def __init__(
        self, p: dict[str, Any], fmt: GroupedFormat, args: dict[str, Any], head: Any
    ) -> None:
        super().__init__(p, args, head)
        self.fmt, self.per, self.tail = fmt, elements(fmt), tail_of(p, fmt)

    def write_rows(self, i: Any, slot: Any) -> None:
        """Write ``row`` as a key, and the token's value, into a slot of the tail."""
        p, h = self.p, self.head
        with loop(p["d"]) as j:
            store(self.args["k_tail"], self.row[j], h, slot // LANES, j, slot % LANES)
        first = (p["h"] + p["kv"]) * p["d"] + h * p["dv"]

        def step(j: Any, lanes: int) -> None:
            value = load(self.args["qkv"], i, first + j, lanes=lanes) * splat(p["vscale"], lanes)
            store(self.args["v_tail"], value, h, slot, j, lanes=lanes)

        over(p["dv"], step)

    def pack_keys(self, group: Any, block: Any) -> None:
        """Quantise a group's keys, which stand in the tail from ``block`` on, channel by channel."""
        d, h, tail = self.p["d"], self.head, self.args["k_tail"]
        zeros, factors = (workspace((self.per,), "float32") for _ in range(2))
        rest = d % self.per
        with loop(-(-d // self.per)) as w:

            def rows_of(place: Any, w: Any = w) -> list[Any]:
                c = w * self.per + place
                return [bind(load(tail, h, block + u, c, 0, lanes=LANES)) for u in range(BLOCKS)]

            def real(place: Any, w: Any = w) -> AbstractContextManager[None]:
                whole = not rest or (isinstance(place, int) and place < rest)
                return nullcontext() if whole else when(w * self.per + place < d)

            with loop(self.per) as place, real(place):
                at = (bind(w * self.per + place),)
                zero, by = self._parameters(rows_of(place), [LANES] * BLOCKS, "k_scale", group, at)
                store(zeros, zero, place)
                store(factors, by, place)
            words = [Register("int32", LANES, splat(T.int32(0))) for _ in range(BLOCKS)]
            for place in range(self.per):
                with real(place):
                    for word, row in zip(words, rows_of(place), strict=True):
                        code = self._code(row, zeros[place], factors[place], place)
                        word.set(T.bitwise_or(word.get(), code))
            for u, word in enumerate(words):
                self._store_line(word.get(), self.args["k_cache"], h, group, u, w)

    def pack_values(self, group: Any, slot: Any) -> None:
        """Quantise a group's values, which stand in the tail from ``slot`` on, token by token."""
        dv, h, fmt, tail = self.p["dv"], self.head, self.fmt, self.args["v_tail"]
        columns, wide = round_up(dv) // LANES, fmt.columns // LANES
        bias = 128 if fmt.bits == 8 else 0
        zeros, factors = (workspace((self.per,), "float32") for _ in range(2))
        for g in range(fmt.value_groups(dv)):
            own = range(g * wide, min((g + 1) * wide, columns))
            live = [min(LANES, dv - c * LANES) for c in own]
            with loop(fmt.group // self.per) as run:
                with loop(self.per) as place:
                    token = bind(run * self.per + place)
                    rows = [bind(load(tail, h, slot + token, c * LANES, lanes=LANES)) for c in own]
                    zero, by = self._parameters(rows, live, "v_scale", group, (g, token))
                    store(zeros, zero, place)
                    store(factors, by, place)
                for c in own:
                    word = Register("int32", LANES, splat(T.int32(0)))
                    for place in range(self.per):
                        row = load(tail, h, slot + run * self.per + place, c * LANES, lanes=LANES)
                        code = self._code(row, zeros[place], factors[place], place, bias)
                        word.set(T.bitwise_or(word.get(), code))
                    self._store_line(word.get(), self.args["v_cache"], h, group, c, run)

    def _parameters(
        self, rows: list[Any], live: list[int], name: str, group: Any, at: tuple[Any, ...]
    ) -> tuple[Any, Any]:
        """Store scale and zero point of what lies in some vectors; return the zero and one over the scale.

        ``live`` says how many lanes of each count. Codes of a group whose parameters are NaN come out as
        zero, since a maximum with NaN is the other one.
        """
        least, most = (_around_mean if self.fmt.bits == 1 else _extremes)(rows, live)
        limit = T.float32(F16_MOST)
        # magnitudes: comparisons of floats pass over a NaN
        sizes = [_kept(magnitude(x), n, T.int32(0)) for x, n in zip(rows, live, strict=True)]
        largest = fixed(reduced("smax", reduce(T.max, sizes)))
        lost, nan = largest >= T.int32(INFINITE), T.reinterpret("float32", T.int32(NAN))
        zero = T.max(T.min(least, limit), T.float32(-F16_MOST))
        zero = fixed(T.cast(T.if_then_else(lost, nan, zero), "float16"), "float16")
        real = fixed(T.cast(zero, "float32"), "float32")
        step = T.min(T.max((most - real) / T.float32(self.fmt.levels), T.float32(0)), limit)
        scale = fixed(T.cast(T.if_then_else(lost, nan, step), "float16"), "float16")
        store(self.args[name], scale, self.head, group, 0, *at)
        store(self.args[name], zero, self.head, group, 1, *at)
        wide = fixed(T.cast(scale, "float32"), "float32")
        some = wide > T.float32(0)
        return real, fixed(T.if_then_else(some, T.float32(1) / wide, T.float32(0)), "float32")

    def _code(self, row: Any, zero: Any, by: Any, place: int, bias: int = 0) -> Any:
        """Return the codes of 16 numbers in the bits of element ``place`` of their lanes."""
        code = rint((row - splat(zero, LANES)) * splat(by, LANES))
        code = T.cast(T.min(T.max(code, splat(0.0)), splat(float(self.fmt.levels))), "int32x16")
        if bias:
            code = T.bitwise_xor(code, splat(T.int32(bias)))
        shift = 8 * (place % 4) + self.fmt.bits * (place // 4)
        return T.shift_left(code, splat(T.int32(shift)))

    @staticmethod
    def _store_line(words: Any, buffer: Any, *index: Any) -> None:
        lanes = 4 * LANES
        store(buffer, T.reinterpret(vector_type("uint8", lanes), words), *index, 0, lanes=lanes)


def _kept(value: Any, count: int, other: Any) -> Any:
    """Return 16 numbers of which the first ``count`` stay and ``other`` stands for the rest."""
    if count == LANES:
        return value
    return T.Select(T.ramp(T.int32(0), 1, LANES) < splat(T.int32(count)), value, splat(other))


def _extremes(rows: list[Any], live: list[int]) -> tuple[Any, Any]:
    """Return the smallest and the largest number of the lanes that count."""
    found = []
    for kind, pick, other in (("fmin", T.min, F32_MOST), ("fmax", T.max, -F32_MOST)):
        kept = [_kept(x, n, T.float32(other)) for x, n in zip(rows, live, strict=True)]
        found.append(fixed(reduced(kind, reduce(pick, kept), "float32"), "float32"))
    return found[0], found[1]


def _around_mean(rows: list[Any], live: list[int]) -> tuple[Any, Any]:
    """Return the mean of the lanes that count less, and plus, their mean distance from it."""
    most, count = splat(F16_MOST), T.float32(float(sum(live)))
    near = [bind(T.max(T.min(row, most), splat(-F16_MOST))) for row in rows]

    def mean(parts: list[Any]) -> Any:
        kept = [_kept(x, n, T.float32(0)) for x, n in zip(parts, live, strict=True)]
        return fixed(across(add, reduce(add, kept)) / count, "float32")

    middle = mean(near)
    away = mean([T.abs(x - splat(middle)) for x in near])
    return fixed(middle - away, "float32"), fixed(middle + away, "float32")


F32_MOST = 3.4028234663852886e38
INFINITE, NAN = 0x7F800000, 0x7FC00000
"""Bits of float32 infinity, and of a NaN."""


class X86AppendGroups(X86Append):
    """One KV head per task."""

    name = "kv_append.x86_groups"
    version = 3

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Every workload of the op with caches in groups, on any x86-64."""
        if workload.op != self.op or hardware.kind != "cpu":
            return False
        return get_op(self.op).full(workload)["c"] in GROUPED

    def make(self, p: dict[str, Any], rows: Any, unroll: int) -> Any:
        """Return the PrimFunc (qkv, table, pos, [q_norm, k_norm], the caches' arrays, q)."""
        workload, fmt = get_op(self.op).workload(**p), GROUPED[p["c"]]
        args = kernel_args(workload)
        parallel, group = rows is script.parallel, p["h"] // p["kv"]

        def body(*buffers: Any) -> None:
            whole = {a.name: b for a, b in zip(args, buffers, strict=True)}
            with loop(p["kv"], parallel=parallel) as h, turns(p["b"], 1) as (sequence, _):
                given = parts_of(workload, whole, sequence)
                start, valid = fixed(given["pos"][0]), fixed(given["pos"][1])
                task = GroupTask(p, fmt, given, h)
                table = table_of(p, whole, sequence)
                with loop(p["t"]) as i:
                    with loop(group) as g:
                        task.prepare(i, (h * group + g) * p["d"], given.get("q_norm"))
                        task.write_q(i, h * group + g)
                    with when(i < valid):
                        position = fixed(start + i)
                        slot = fixed(position % task.tail)
                        task.prepare(i, (p["h"] + h) * p["d"], given.get("k_norm"))
                        task.write_rows(i, slot)
                        with when(position % fmt.group == fmt.group - 1):
                            full = fixed(position // fmt.group)
                            if table is not None:
                                full = table.flat(full, fmt.group)
                            first = fixed(slot - (fmt.group - 1))
                            task.pack_keys(full, first // LANES)
                            task.pack_values(full, first)

        return function("kv_append_groups", args, body)
