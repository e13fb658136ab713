"""Prepare one attention step and append to KV caches of 8-bit floats (`ir.float8`).

One task is a KV head with its query heads, over all tokens of all sequences, as in `x86_append`.
"""

from __future__ import annotations

from typing import Any

from mimo_compile.ir.caches import SCALED
from mimo_compile.ir.float8 import LEAST_BYTE, LOST, MOST, MOST_BYTE, UNDER
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention.append_task import Task, magnitude, over
from mimo_compile.schedules.attention.layout import kernel_args, round_up
from mimo_compile.schedules.attention.pages import table_of
from mimo_compile.schedules.attention.reach import fixed
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
    when,
    workspace,
)
from mimo_compile.schedules.emit.vector import LANES, splat
from mimo_compile.schedules.emit.vector import T as script

SMALLEST = 0x3C800000
"""Bits of 2**-6, the smallest normal number of E4M3."""
TO_STEPS = 2.0**14
"""Added to a number it leaves that in steps of 2**-9, rounded half to even, in the lowest bits."""


def code_of(value: Any) -> Any:
    """Return the codes of 16 float32 numbers up to 448 in magnitude, as integers of 32 bits."""
    bits = bind(T.reinterpret("int32x16", value))
    size = bind(T.bitwise_and(bits, splat(T.int32(0x7FFFFFFF))))
    odd = T.bitwise_and(T.shift_right(size, splat(T.int32(20))), splat(T.int32(1)))
    rounded = T.shift_right(size + splat(T.int32(0x7FFFF)) + odd, splat(T.int32(20)))
    normal = rounded - splat(T.int32(120 << 3))  # exponents of float32 lie 120 above
    low = T.reinterpret("float32x16", size) + splat(TO_STEPS)
    steps = T.reinterpret("int32x16", low) - T.reinterpret("int32x16", splat(TO_STEPS))
    found = T.Select(size < splat(T.int32(SMALLEST)), steps, normal)
    sign = T.bitwise_and(T.shift_right(bits, splat(T.int32(24))), splat(T.int32(0x80)))
    return T.bitwise_or(found, sign)


class Float8Task(Task):
    """The statements of one KV head."""

    def __init__(self, p: dict[str, Any], args: dict[str, Any], head: Any) -> None:
        """``args`` are the kernel's buffers by name."""
        super().__init__(p, args, head)
        self.wide = round_up(max(p["d"], p["dv"]))
        self.numbers = workspace((self.wide,), "float32")
        self.codes = workspace((self.wide,), "uint8")

    def quantise(self, width: int) -> Any:
        """Leave the codes of a row of ``numbers`` in ``codes``; returns its byte."""
        for j in range(width, round_up(width)):
            store(self.numbers, T.float32(0), j)
        size = Register("int32", LANES, splat(T.int32(0)))
        with loop(round_up(width) // LANES) as j:
            row = load(self.numbers, j * LANES, lanes=LANES)
            size.set(T.max(size.get(), magnitude(row)))
        most = bind(T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.smax", size.get()))
        found = T.shift_right(most - T.int32(UNDER), T.int32(23))
        byte = bind(T.min(T.max(found, T.int32(LEAST_BYTE)), T.int32(MOST_BYTE)))
        lost = bind(most >= T.int32(0x7F800000))
        power = T.reinterpret("float32", T.shift_left(T.int32(254) - byte, T.int32(23)))
        power = bind(power)
        with loop(round_up(width) // LANES) as j:
            value = load(self.numbers, j * LANES, lanes=LANES) * splat(power)
            value = bind(T.min(T.max(value, splat(-MOST)), splat(MOST)))
            code = T.Select(splat(lost), splat(T.int32(0)), code_of(value))
            store(self.codes, T.cast(code, "uint8x16"), j * LANES, lanes=LANES)
        return bind(T.cast(T.if_then_else(lost, T.int32(LOST), byte), "uint8"))

    def write_key(self, slot: Any) -> None:
        """Write ``row`` as a key."""
        d, cache = self.p["d"], self.args["k_cache"]
        self.copy(d)
        byte = self.quantise(d)
        block, lane = bind(slot // LANES), bind(slot % LANES)
        with loop(d) as j:
            store(cache, self.codes[j], self.head, block, j, lane)
        store(cache, byte, self.head, block, d, lane)

    def copy(self, width: int) -> None:
        """Take ``row`` as the numbers that become codes."""
        over(width, lambda j, n: store(self.numbers, load(self.row, j, lanes=n), j, lanes=n))

    def write_value(self, i: Any, slot: Any) -> None:
        """Write the value of token ``i``."""
        p, cache, wide = self.p, self.args["v_cache"], round_up(self.p["dv"])
        first = (p["h"] + p["kv"]) * p["d"] + self.head * p["dv"]

        def take(j: Any, lanes: int) -> None:
            value = load(self.args["qkv"], i, first + j, lanes=lanes) * splat(p["vscale"], lanes)
            store(self.numbers, value, j, lanes=lanes)

        over(p["dv"], take)
        byte = self.quantise(p["dv"])
        block, lane = bind(slot // LANES), bind(slot % LANES)
        with loop(wide // LANES) as j:
            codes = load(self.codes, j * LANES, lanes=LANES)
            store(cache, codes, self.head, block, lane * wide + j * LANES, lanes=LANES)
        store(cache, byte, self.head, block, LANES * wide + lane)


class X86AppendFloat8(X86Append):
    """One KV head per task."""

    name = "kv_append.x86_float8"

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Every workload of the op with caches of 8-bit floats, on any x86-64."""
        if workload.op != self.op or hardware.kind != "cpu":
            return False
        return get_op(self.op).full(workload)["c"] in SCALED

    def make(self, p: dict[str, Any], rows: Any, unroll: int) -> Any:
        """Return the PrimFunc (qkv, table, pos, [q_norm, k_norm], k_cache, v_cache, q)."""
        workload = get_op(self.op).workload(**p)
        args = kernel_args(workload)
        parallel, group = rows is script.parallel, p["h"] // p["kv"]

        def body(*buffers: Any) -> None:
            whole = {a.name: b for a, b in zip(args, buffers, strict=True)}
            with loop(p["kv"], parallel=parallel) as h, turns(p["b"], 1) as (sequence, _):
                given = parts_of(workload, whole, sequence)
                start, valid = fixed(given["pos"][0]), fixed(given["pos"][1])
                task = Float8Task(p, given, h)
                table = table_of(p, whole, sequence)
                with loop(p["t"]) as i:
                    with loop(group) as g:
                        task.prepare(i, (h * group + g) * p["d"], given.get("q_norm"))
                        task.write_q(i, h * group + g)
                    with when(i < valid):
                        position = fixed(start + i)
                        slot = fixed(position % p["cap"]) if table is None else table.slot(position)
                        task.prepare(i, (p["h"] + h) * p["d"], given.get("k_norm"))
                        task.write_key(slot)
                        task.write_value(i, slot)

        return function("kv_append_float8", args, body)
