# mypy: disable-error-code="no-untyped-def, valid-type"
"""Prepare one attention step: QK-norm, partial rotation, and k, v into their cache slots.

One task is a KV head with its query heads, over all tokens: 16 neighbouring tokens share the cache lines of
a key block, so tokens are never split over threads. 16-bit caches take each row rounded, half to even, into
its half of the pairs that lie there. The sequences of a batch, too, are worked on by the task of their head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mimo_compile.ir.caches import FORMATS, parse_cache_format
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.ops.pages import paged
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import layout
from mimo_compile.schedules.attention.half import every_other, upper_half
from mimo_compile.schedules.base import Kernel, Space
from mimo_compile.schedules.elementwise.rows import PARALLEL_BYTES, RowConfig, RowSchedule
from mimo_compile.schedules.emit.build import check_states
from mimo_compile.schedules.emit.vector import LANES, T, ramp, splat


@T.inline
def _over(count, step):
    # whole vectors, then the rest one by one
    for j in range(count // LANES):
        step(j * LANES, LANES)
    for j in range(count % LANES):
        step(count // LANES * LANES + j, 1)


def _head(p: dict[str, Any]) -> Any:
    """Return the step that leaves a head of row ``i`` in ``row``, normalised and rotated."""
    d, half, norm, eps = p["d"], p["rot"] // 2, bool(p["norm"]), p["eps"]
    over = _over

    @T.inline
    def head(qkv, table, weight, row, acc, one, i, at):
        one[0] = T.float32(1)
        if norm:
            acc[ramp(0)] = splat(0.0)
            for j in range(d // LANES):
                v: T.let = qkv[i, ramp(at + j * LANES)]
                acc[ramp(0)] = acc[ramp(0)] + v * v
            one[0] = T.float32(0)
            for j in range(d % LANES):
                s: T.let = qkv[i, at + d // LANES * LANES + j]
                one[0] = one[0] + s * s
            for j in T.unroll(LANES):
                one[0] = one[0] + acc[j]
            one[0] = T.float32(1) / T.sqrt(one[0] / T.float32(d) + T.float32(eps))

        @T.inline
        def scaled(j, lanes):
            if norm:
                row[ramp(j, lanes)] = (
                    qkv[i, ramp(at + j, lanes)] * splat(one[0], lanes) * weight[ramp(j, lanes)]
                )
            else:
                row[ramp(j, lanes)] = qkv[i, ramp(at + j, lanes)]

        @T.inline
        def turned(j, lanes):
            a: T.let = row[ramp(j, lanes)]
            b: T.let = row[ramp(half + j, lanes)]
            c: T.let = table[i, 0, ramp(j, lanes)]
            s: T.let = table[i, 1, ramp(j, lanes)]
            row[ramp(j, lanes)] = a * c - b * s
            row[ramp(half + j, lanes)] = b * c + a * s

        over(d, scaled)
        if half > 0:
            over(half, turned)

    return head


def _writing(p: dict[str, Any]) -> tuple[Any, Any]:
    """Return the steps that write a query head, and a value head into its slot."""
    d, dv, v_scale = p["d"], p["dv"], p["vscale"]
    v_at = (p["h"] + p["kv"]) * d
    over = _over

    @T.inline
    def write_q(q, row, i, n):
        @T.inline
        def step(j, lanes):
            q[i, n, ramp(j, lanes)] = row[ramp(j, lanes)]

        over(d, step)

    @T.inline
    def write_v(qkv, v_cache, i, h, at, slot):
        @T.inline
        def step(j, lanes):
            v: T.let = qkv[i, ramp(v_at + h * dv + j, lanes)]
            v_cache[at, slot, ramp(j, lanes)] = v * splat(v_scale, lanes)

        over(dv, step)

    @T.inline
    def write_pairs(qkv, v_cache, i, h, at, slot):
        @T.inline
        def step(j, lanes):
            v: T.let = qkv[i, ramp(v_at + h * dv + j, lanes)]
            v_cache[at, slot // 2, every_other(2 * j + slot % 2, lanes)] = upper_half(
                v * splat(v_scale, lanes), lanes
            )

        over(dv, step)

    @T.inline
    def write_row(qkv, v_cache, i, h, at, slot):
        @T.inline
        def step(j, lanes):
            v: T.let = qkv[i, ramp(v_at + h * dv + j, lanes)]
            v_cache[at, slot, ramp(j, lanes)] = upper_half(v * splat(v_scale, lanes), lanes)

        over(dv, step)

    if p["c"] == "f32":  # in both orders of the cache
        return write_q, write_v
    return write_q, write_row if layout.by_rows(p) else write_pairs


def _row_writer(p: dict[str, Any]) -> Any:
    """Return the step that writes a key by itself, with zeros behind it."""
    d, half, over = p["d"], p["c"] != "f32", _over
    pad = layout.cache_shapes(p)["k_cache"][2] - d
    zero = T.uint16(0) if half else T.float32(0)

    @T.inline
    def write_k(row, k_cache, h, slot):
        @T.inline
        def step(j, lanes):
            if half:
                k_cache[h, slot, ramp(j, lanes)] = upper_half(row[ramp(j, lanes)], lanes)
            else:
                k_cache[h, slot, ramp(j, lanes)] = row[ramp(j, lanes)]

        over(d, step)
        for j in range(pad):
            k_cache[h, slot, d + j] = zero

    return write_k


def _key_writer(p: dict[str, Any]) -> Any:
    """Return the step that writes a key, which stands in ``row``, into its slot."""
    if layout.by_rows(p):
        return _row_writer(p)
    d, odd = p["d"], p["d"] % 2 == 1

    @T.inline
    def write_k(row, k_cache, h, slot):
        for j in range(d):
            k_cache[h, slot // LANES, j, slot % LANES] = row[j]

    @T.inline
    def write_pairs(row, k_cache, h, slot):
        for j in range(d // 2):
            for half in T.unroll(2):
                k_cache[h, slot // LANES, j, slot % LANES * 2 + half] = upper_half(
                    row[2 * j + half], 1
                )
        if odd:
            k_cache[h, slot // LANES, d // 2, slot % LANES * 2] = upper_half(row[d - 1], 1)
            k_cache[h, slot // LANES, d // 2, slot % LANES * 2 + 1] = T.uint16(0)

    return write_k if p["c"] == "f32" else write_pairs


def slots_of(p: dict[str, Any]) -> Any:
    """Return what gives the slot of a position."""
    first, cap = p["first"], p["cap"]

    def slot_at(position: Any) -> Any:
        if not first:
            return position % cap
        ring = first + T.truncmod(position - first, cap - first)
        return T.if_then_else(position < first, position, ring)

    return slot_at


def _kv_head(p: dict[str, Any]) -> Any:
    """Return all that is done for one KV head and its query heads."""
    t, d, group, b, kv = p["t"], p["d"], p["h"] // p["kv"], p["b"], p["kv"]
    wide, k_at = layout.round_up(d), p["h"] * d
    head, (write_q, write_v), write_k = _head(p), _writing(p), _key_writer(p)
    slot_at = slots_of(p)

    def start(pos: Any, i: Any) -> Any:
        return pos[0] + i if b == 1 else pos[i // t, 0] + i % t

    def counts(pos: Any, i: Any) -> Any:
        return i < pos[1] if b == 1 else i % t < pos[i // t, 1]

    def place(h: Any, i: Any) -> Any:  # of the head's rows in the caches of row i's sequence
        return h if b == 1 else i // t * kv + h

    @T.inline
    def task(qkv, table, pos, q_norm, k_norm, k_cache, v_cache, q, h):
        row = T.sblock_alloc_buffer((wide,), "float32")
        acc = T.sblock_alloc_buffer((LANES,), "float32")
        one = T.sblock_alloc_buffer((1,), "float32")
        for i in range(b * t):
            for g in range(group):
                head(qkv, table, q_norm, row, acc, one, i, (h * group + g) * d)
                write_q(q, row, i, h * group + g)
            if counts(pos, i):
                slot: T.let = slot_at(start(pos, i))
                head(qkv, table, k_norm, row, acc, one, i, k_at + h * d)
                write_k(row, k_cache, place(h, i), slot)
                write_v(qkv, v_cache, i, h, place(h, i), slot)

    return task


def _make(p: dict[str, Any], rows: Any) -> Any:
    t, heads, kv, d, half = p["b"] * p["t"], p["h"], p["kv"], p["d"], p["rot"] // 2
    where = (2,) if p["b"] == 1 else (p["b"], 2)
    width = (heads + kv) * d + kv * p["dv"]
    k_shape, v_shape = layout.cache_shapes(p).values()
    stored = parse_cache_format(p["c"]).stored
    # an empty table is not a tensor that a kernel can check: it is passed and not looked at
    angles = T.Buffer((t, 2, half), "float32") if half else T.handle
    task = _kv_head(p)
    if p["norm"]:

        @T.prim_func(s_tir=True)
        def normed(
            qkv: T.Buffer((t, width), "float32"), table: angles,
            pos: T.Buffer(where, "int32"), q_norm: T.Buffer((d,), "float32"),
            k_norm: T.Buffer((d,), "float32"), k_cache: T.Buffer(k_shape, stored),
            v_cache: T.Buffer(v_shape, stored), q: T.Buffer((t, heads, d), "float32"),
        ):  # fmt: skip
            T.func_attr({"tirx.noalias": True})
            for h in rows(kv):
                with T.sblock("head"):
                    T.reads()
                    T.writes()
                    task(qkv, table, pos, q_norm, k_norm, k_cache, v_cache, q, h)

        return normed

    @T.prim_func(s_tir=True)
    def plain(
        qkv: T.Buffer((t, width), "float32"), table: angles,
        pos: T.Buffer(where, "int32"), k_cache: T.Buffer(k_shape, stored),
        v_cache: T.Buffer(v_shape, stored), q: T.Buffer((t, heads, d), "float32"),
    ):  # fmt: skip
        T.func_attr({"tirx.noalias": True})
        for h in rows(kv):
            with T.sblock("head"):
                T.reads()
                T.writes()
                task(qkv, table, pos, pos, pos, k_cache, v_cache, q, h)

    return plain


class X86Append(RowSchedule):
    """One KV head per task."""

    name = "kv_append.x86"
    op = "kv_append"
    rows_param = "kv"

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Every workload of the op whose caches hold each number by itself, in no pool, on any x86-64."""
        if not super().supports(workload, hardware):
            return False
        p = get_op(self.op).full(workload)
        return p["c"] in FORMATS and not paged(p)

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """KV heads over threads, or not."""
        p = get_op(self.op).full(workload)
        may = p["kv"] > 1 and hardware.threads > 1
        traffic = get_op(self.op).counts(workload).bytes["dram"]
        default = RowConfig(may and traffic >= PARALLEL_BYTES, 1)
        return Space(
            RowConfig, {"parallel": (False, True) if may else (False,), "unroll": (1,)}, default
        )

    def lower(self, workload: Workload, config: RowConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config.

        Raises:
            UsageError: The caches have more elements than kernels can index.
        """
        check_states(self.name, self.kernel_args(workload))
        return super().lower(workload, config, hardware)

    def make(self, p: dict[str, Any], rows: Any, unroll: int) -> Any:
        """Return the PrimFunc (qkv, table, pos, [q_norm, k_norm], k_cache, v_cache, q)."""
        return _make(p, rows)

    def kernel_args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return the op's arguments with packed caches."""
        return layout.kernel_args(workload)

    def layouts(self, workload: Workload, config: RowConfig) -> dict[str, str]:
        """Return the names of the cache layouts."""
        return layout.layouts(workload)

    def pack(
        self, workload: Workload, config: RowConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Lay out the caches; norms stay as they are."""
        return layout.pack_caches(workload, arrays)

    def unpack_state(
        self, workload: Workload, config: RowConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return canonical caches."""
        return layout.unpack_caches(workload, arrays)
