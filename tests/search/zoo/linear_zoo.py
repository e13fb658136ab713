"""Kernels of one small matmul: wrong in thirty ways, and right in many, for each type of results.

All are made from one text: a kernel differs from the plain one by some of its `Parts`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from linear_op import TYPES, ZooLinear

from mimo_compile import _tvm
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Arg
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Schedule, Space

_tvm.compiler()

from tvm.script import tirx as T

WRONG = (
    "last_row", "last_column", "tail", "no_bias", "scale_of_next_group", "zero_of_next_group", "saturates",
    "low_precision", "coarse_result", "stale", "nan_swallowed", "writes_input", "writes_weight", "past_end",
    "before_start", "third_call", "race", "random", "cached", "non_negative", "small", "aligned",
    "skips_group", "swaps_rows", "ignores_token", "transposed", "shifted", "first_row_only", "clamps_result",
)  # fmt: skip
HONEST = (
    "plain", "reversed", "odd_after_even", "split_k2", "split_k8", "lanes16", "tree", "fma", "by_group",
    "zero_apart", "parallel", "column_tiles", "wide_sum", "bias_first", "half_scale", "twice",
)  # fmt: skip
AFTERWARDS = (
    "writes_input", "writes_weight", "past_end", "before_start", "third_call", "race", "random", "cached",
    "aligned",
)  # fmt: skip
"""Kinds that compute what is right (nearly all of it) and do something else besides."""
_GET_SLACK, _SET_SLACK, _SLACK = 30, 29, 50_000
"""A number that Linux keeps for each thread, and what it is at first: a place for a counter of calls."""


@dataclass(frozen=True, slots=True)
class LinearConfig:
    kind: str = "plain"


@dataclass(frozen=True)
class Shape:
    m: int
    n: int
    k: int
    g: int
    y: str


@dataclass(frozen=True)
class Parts:
    """What a kernel is made of; each function returns an expression."""

    rows: int
    columns: int
    depth: int
    sum_type: str
    lanes: int = 1
    loop: Callable[..., Any] = T.serial
    row_of: Callable[[Any], Any] = lambda i: i
    column: Callable[[Any], Any] = lambda kk: kk
    """The k that comes at a place of the order."""
    lane: Callable[[Any], Any] = lambda kk: 0
    group: Callable[[Any], Any] = lambda group: group
    zero_group: Callable[[Any], Any] = lambda group: group
    activation: Callable[[Any], Any] = lambda value: value
    scale: Callable[[Any], Any] = lambda value: value
    add: Callable[[Any, Any], Any] = lambda total, term: total + term
    product: Callable[[Any, Any, Any], Any] | None = None
    start: Callable[[Any, Any], Any] | None = None
    """First value of a sum: of (old y, bias)."""
    bias: bool = True
    finish: Callable[[Any, Any], Any] = lambda value, old: value
    place: Callable[[Any, Any], tuple[Any, Any]] = lambda i, j: (i, j)
    extra: dict[str, Any] = field(default_factory=dict)


def plain(s: Shape) -> Parts:
    return Parts(s.m, s.n, s.k, TYPES[s.y][2])


def wrong(kind: str, s: Shape) -> Parts:
    """Return the parts of a wrong kernel."""
    p, integer = plain(s), s.y == "i32"
    groups, acc = s.k // s.g, p.sum_type

    def const(value: float) -> Any:
        return T.cast(T.int32(int(value)) if integer else T.float32(value), acc)

    limit = 32767 if integer else 0.25
    most = 63 if integer else 4.0
    changes: dict[str, dict[str, Any]] = {
        "last_row": {"rows": s.m - 1},
        "last_column": {"columns": s.n - 1},
        "tail": {"columns": s.n // 16 * 16},
        "no_bias": {"bias": False},
        "scale_of_next_group": {"group": lambda at: (at + 1) % groups},
        "zero_of_next_group": {"zero_group": lambda at: (at + 1) % groups},
        "saturates": {"add": lambda t, e: T.max(T.min(t + e, const(limit)), const(-limit))},
        "low_precision": {"sum_type": "int16" if integer else "float16"},
        "stale": {"start": lambda old, bias: T.cast(old, acc)},
        "nan_swallowed": {"finish": lambda value, old: T.max(value, old)},
        "non_negative": {"activation": T.abs},
        "small": {"activation": lambda v: T.max(T.min(v, const(most)), const(-most))},
        "skips_group": {"depth": s.k - s.g},
        "swaps_rows": {"place": lambda i, j: (T.if_then_else(i < 2, 1 - i, i), j)},
        "ignores_token": {"row_of": lambda i: T.if_then_else(i == s.m - 1, i - 1, i)},
        "transposed": {"place": lambda i, j: ((j * s.m + i) // s.n, (j * s.m + i) % s.n)},
        "shifted": {"activation": lambda v: v, "extra": {"shift": 1}},
        "first_row_only": {"row_of": lambda i: i * 0},
        "coarse_result": {"finish": lambda value, old: _coarse(s.y, value)},
        "clamps_result": {"finish": lambda value, old: _clamped(s.y, value)},
    }
    if kind in AFTERWARDS:
        return replace(p, extra={"kind": kind}, bias=kind != "race")
    return replace(p, **changes[kind])


def _coarse(y: str, value: Any) -> Any:
    if y == "i32":
        return T.bitwise_and(value, T.int32(-2))
    if y == "f32":
        return T.cast(T.cast(value, "float16"), "float32")
    bits = T.reinterpret("uint16", value)
    return T.reinterpret("float16", T.bitwise_and(bits, T.uint16(0xFFF0)))


def _clamped(y: str, value: Any) -> Any:
    most = {"f32": T.float32(1.0), "f16": T.float16(1.0), "i32": T.int32(32767)}[y]
    return T.max(T.min(value, most), -most)


def honest(kind: str, s: Shape) -> Parts:
    """Return the parts of a right kernel."""
    p = plain(s)
    integer, acc, half = s.y == "i32", p.sum_type, s.k // 2
    wide = "int64" if integer else "float64"
    fused = {} if integer else {"product": lambda t, a, w: T.fma(a, w, t)}
    changes: dict[str, dict[str, Any]] = {
        "plain": {},
        "reversed": {"column": lambda at: s.k - 1 - at},
        "odd_after_even": {"column": lambda at: at % half * 2 + at // half},
        "split_k2": {"lanes": 2, "lane": lambda at: at // half},
        "split_k8": {"lanes": 8, "lane": lambda at: at // (s.k // 8)},
        "lanes16": {"lanes": 16, "lane": lambda at: at % 16},
        "tree": {"lanes": 64, "lane": lambda at: at % 64, "extra": {"tree": True}},
        "fma": fused,
        "by_group": {"lanes": s.k // s.g, "lane": lambda at: at // s.g, "extra": {"by_group": True}},
        "zero_apart": {"lanes": s.k // s.g, "lane": lambda at: at // s.g,
                       "extra": {"by_group": True, "zero_apart": True}},
        "parallel": {"loop": T.parallel},
        "column_tiles": {"extra": {"tile": 16}},
        "wide_sum": {"sum_type": wide},
        "bias_first": {"start": lambda old, bias: T.cast(bias, acc), "bias": False},
        "half_scale": {} if integer else {"scale": lambda v: T.cast(T.cast(v, "float16"), acc)},
        "twice": {"extra": {"twice": True}},
    }  # fmt: skip
    return replace(p, **changes[kind])


def _make(s: Shape, p: Parts) -> Any:
    """Return the PrimFunc (x, codes, scale, zero, bias, y)."""
    m, n, k, groups = s.m, s.n, s.k, s.k // s.g
    xt, ot, _ = TYPES[s.y]
    acc, lanes, extra = p.sum_type, p.lanes, p.extra
    by_group, zero_apart = extra.get("by_group", False), extra.get("zero_apart", False)
    tile, twice, tree, kind = (
        extra.get("tile", 1),
        "twice" in extra,
        "tree" in extra,
        extra.get("kind"),
    )
    columns = -(-p.columns // tile) * tile
    bits = {"float32": "int32", "float16": "int16", "int32": "int32"}[ot]

    def activation(x: Any, i: Any, at: Any) -> Any:
        kk = (p.column(at) + extra.get("shift", 0)) % k
        return p.activation(T.cast(x[p.row_of(i), kk], acc))

    def weight(codes: Any, scale: Any, zero: Any, j: Any, at: Any) -> Any:
        kk = p.column(at)
        code = T.cast(codes[j, kk], acc)
        if not zero_apart:
            code = code - T.cast(zero[j, p.zero_group(kk // s.g)], acc)
        return code if by_group else code * p.scale(T.cast(scale[j, p.group(kk // s.g)], acc))

    def added(total: Any, a: Any, w: Any) -> Any:
        return p.product(total, a, w) if p.product is not None else p.add(total, a * w)

    def first(y: Any, bias: Any, i: Any, j: Any) -> Any:
        return T.cast(0, acc) if p.start is None else p.start(y[i, j], bias[j])

    def result(total: Any, bias: Any, y: Any, i: Any, j: Any) -> Any:
        if p.bias:
            total = total + T.cast(bias[j], acc)
        return p.finish(T.cast(total, ot), y[i, j])

    def part(sums: Any, xs: Any, scale: Any, zero: Any, j: Any, lane: Any) -> Any:
        if not by_group:
            return sums[lane]
        value = sums[lane]
        if zero_apart:
            value = value - T.cast(zero[j, lane], acc) * xs[lane]
        return value * p.scale(T.cast(scale[j, lane], acc))

    @T.inline
    def cell(x, codes, scale, zero, bias, y, sums, xs, i, j):
        for lane in range(lanes):
            sums[lane] = T.cast(0, acc)
            xs[lane] = T.cast(0, acc)
        for at in range(p.depth):
            sums[p.lane(at)] = added(
                sums[p.lane(at)], activation(x, i, at), weight(codes, scale, zero, j, at)
            )
            if zero_apart:
                xs[p.lane(at)] = xs[p.lane(at)] + activation(x, i, at)
        if tree:
            for step in range(6):
                for lane in range(T.shift_right(32, step)):
                    sums[lane] = sums[lane] + sums[lane + T.shift_right(32, step)]
            xs[0] = sums[0]
        else:
            xs[lanes] = first(y, bias, i, j)
            for lane in range(lanes):
                xs[lanes] = xs[lanes] + part(sums, xs, scale, zero, j, lane)
            xs[0] = xs[lanes]
        if twice:
            y[i, j] = T.cast(0, ot)
            y[i, j] = y[i, j] + result(xs[0], bias, y, i, j)
        else:
            y[p.place(i, j)[0], p.place(i, j)[1]] = result(xs[0], bias, y, i, j)

    @T.inline
    def after(x, scale, bias, y, local):
        if kind == "writes_input":
            x[m - 1, k - 1] = x[m - 1, k - 1] + T.cast(1, xt)
        elif kind == "writes_weight":
            scale[n - 1, 0] = scale[n - 1, 0] + T.cast(1, ot)
        elif kind == "past_end":
            y[m - 1, n] = T.cast(1, ot)
        elif kind == "before_start":
            y[0, -1] = T.cast(1, ot)
        elif kind == "random":
            for i, j in T.grid(m, n):
                coin = T.bitwise_and(T.call_extern("int32", "rand") // 128, 1)
                y[i, j] = T.reinterpret(
                    ot, T.bitwise_xor(T.reinterpret(bits, y[i, j]), T.cast(coin, bits))
                )
        elif kind == "aligned":
            local[0] = T.call_extern("int64", "labs", T.address_of(y[0, 0]))
            if local[0] % 128 != 0:
                y[m - 1, n - 1] = T.cast(99, ot)
        elif kind == "third_call":
            local[0] = T.cast(T.call_extern("int32", "prctl", _GET_SLACK), "int64")
            T.evaluate(T.call_extern("int32", "prctl", _SET_SLACK, local[0] + 1))
            if local[0] >= _SLACK + 2:
                y[m - 1, n - 1] = T.cast(99, ot)

    @T.inline
    def races(bias, y):
        for half in T.parallel(2):
            with T.sblock("half"):
                T.reads(y[0:m, 0:n], bias[0:n])
                T.writes(y[0:m, 0:n])
                seen = T.sblock_alloc_buffer((m, n), ot)
                for i, j in T.grid(m, n):
                    seen[i, j] = y[i, j]
                T.evaluate(T.call_extern("int32", "usleep", 50_000))
                for i, j in T.grid(m, n):
                    if j % 2 == half:
                        y[i, j] = seen[i, j] + bias[j]
                    else:
                        y[i, j] = seen[i, j]

    @T.prim_func(s_tir=True)
    def kernel(
        x: T.Buffer((m, k), xt),
        codes: T.Buffer((n, k), "uint8"),
        scale: T.Buffer((n, groups), ot),
        zero: T.Buffer((n, groups), ot),
        bias: T.Buffer((n,), ot),
        y: T.Buffer((m, n), ot),
    ):
        for i in p.loop(p.rows):
            with T.sblock("row"):
                T.reads(
                    x[0:m, 0:k],
                    codes[0:n, 0:k],
                    scale[0:n, 0:groups],
                    zero[0:n, 0:groups],
                    bias[0:n],
                )
                T.writes(y[0:m, 0:n])
                sums = T.sblock_alloc_buffer((lanes,), acc)
                xs = T.sblock_alloc_buffer((lanes + 1,), acc)
                for j in range(columns):
                    if tile == 1 or j < p.columns:
                        cell(x, codes, scale, zero, bias, y, sums, xs, i, j)
        if kind == "race":
            races(bias, y)
        elif kind is not None:
            with T.sblock("after"):
                T.reads(x[0:m, 0:k], scale[0:n, 0:groups], bias[0:n], y[0:m, 0:n])
                T.writes(x[0:m, 0:k], scale[0:n, 0:groups], y[0:m, 0:n])
                local = T.sblock_alloc_buffer((1,), "int64")
                after(x, scale, bias, y, local)

    return kernel


def _make_cached(s: Shape) -> Any:
    """Return a PrimFunc that hands out an answer computed for other activations."""
    m, n, k, groups = s.m, s.n, s.k, s.k // s.g
    xt, ot, _ = TYPES[s.y]

    @T.prim_func(s_tir=True)
    def kernel(
        x: T.Buffer((m, k), xt),
        codes: T.Buffer((n, k), "uint8"),
        scale: T.Buffer((n, groups), ot),
        zero: T.Buffer((n, groups), ot),
        bias: T.Buffer((n,), ot),
        answer: T.Buffer((m, n), ot),
        y: T.Buffer((m, n), ot),
    ):
        for i, j in T.grid(m, n):
            with T.sblock("y"):
                vi, vj = T.axis.remap("SS", [i, j])
                y[vi, vj] = answer[vi, vj]

    return kernel


class LinearZoo(Schedule):
    """The zoo for the op above."""

    name = "zoo_linear.zoo"
    op = "zoo_linear"
    config = LinearConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        return True

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        return Space(LinearConfig, {"kind": (*HONEST, *WRONG)}, LinearConfig())

    def shape(self, workload: Workload) -> Shape:
        return Shape(**ZooLinear().full(workload))

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        return ZooLinear().args(workload)

    def layouts(self, workload: Workload, config: LinearConfig) -> dict[str, str]:
        return {"answer": "kept"} if config.kind == "cached" else {}

    def pack(self, workload: Workload, config: LinearConfig, arrays: Any) -> Any:
        out = super().pack(workload, config, arrays)
        if config.kind != "cached":
            return out
        x = np.random.default_rng(5).integers(
            -4, 4, (self.shape(workload).m, self.shape(workload).k)
        )
        op = ZooLinear()
        typed = ZooLinear().workload(**asdict(self.shape(workload)))
        y = op.reference(typed, {**arrays, "x": x})["y"]
        return out | {"answer": y.astype(arrays["bias"].dtype)}

    def lower(self, workload: Workload, config: LinearConfig, hardware: Hardware) -> Kernel:
        s, args, kind = self.shape(workload), self.args(workload), config.kind
        name = f"linear_{s.y}_{kind}"
        if kind == "cached":
            answer = Arg("answer", "weight", (s.m, s.n), args[-1].dtype)
            func, args = _make_cached(s), (*args[:-1], answer, args[-1])
        else:
            func = _make(s, honest(kind, s) if kind in HONEST else wrong(kind, s))
        typed = ZooLinear().workload(**asdict(s))
        return Kernel(name, func.with_attr("global_symbol", name), args, ZooLinear().counts(typed))


class MpgemmZoo(LinearZoo):
    """The same kernels for `mpgemm`, with that op's inputs, reference and bound."""

    name = "mpgemm.zoo"
    op = "mpgemm"

    def shape(self, workload: Workload) -> Shape:
        return Shape(**{name: workload.integer(name) for name in ("m", "n", "k")}, g=32, y="f32")

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        return ZooLinear().args(ZooLinear().workload(**asdict(self.shape(workload))))
