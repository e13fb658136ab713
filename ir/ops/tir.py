"""A generic function: whatever TVM's passes made of operators that no op of the dialect covers.

A workload names it by content (`ir.functions`). Its reference is the function itself before any schedule,
in float64, and its bound comes from following the rounding errors through it (`ir.tir_reference`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mimo_compile.errors import UsageError
from mimo_compile.ir import functions
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.ops.base import Arg, Array, OpDef, Param
from mimo_compile.ir.ops.numerics import bf16_to_f32, f32_to_bf16
from mimo_compile.ir.tir_numbers import FUNCTIONS, UNITS
from mimo_compile.ir.tir_reference import Num, Unsupported, evaluate
from mimo_compile.ir.workload import Value, Workload

DISTRIBUTIONS = ("normal", "positive", "small")
"""How inputs are drawn, in order: the first that gives results that can be verified counts."""
VAGUE = 0.125
"""Share of the results' typical magnitude that the typical bound may be, lest anything passes."""
_WIDE = 127


class Tir(OpDef):
    """``tir:hash=h0123456789abcdef,does=max_map_sum_map,out=f32.3x5x48``."""

    name = functions.OP
    params = (Param("hash", str), Param("does", str), Param("out", str))

    def __init__(self) -> None:
        """Start with nothing computed."""
        self._last: tuple[Mapping[str, Array], dict[str, Num]] | None = None

    def workload(self, **values: Value) -> Workload:
        """Build a canonical workload: where the function is known, it says what follows from the hash."""
        return functions.canonical(super().workload(**values))

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return the function's parameters: ``in0``, ``in1``, ..., and ``out0``, ....

        Raises:
            UsageError: the function is not known here.
        """
        func = functions.function_of(workload)
        outs = {hash(p) for p in functions.written(func)}
        count = {"in": 0, "out": 0}
        args = []
        for buffer in func.params:
            kind = "out" if hash(buffer) in outs else "in"
            shape = tuple(int(n) for n in buffer.shape)
            name = f"{kind}{count[kind]}"
            args.append(Arg(name, "output" if kind == "out" else "input", shape, str(buffer.dtype)))
            count[kind] += 1
        return tuple(args)

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw numbers for which the function has finite results.

        Whole numbers may be indices: they stay below every extent of a parameter. Floats are normal;
        where that gives no result (a logarithm, a variance, a divisor) all numbers are positive; where that
        gives none either, floats are in [0, 1).

        Raises:
            UsageError: no results can be verified.
        """
        reason = ""
        for how in DISTRIBUTIONS:
            inputs = self._draw(workload, rng, how)
            try:
                if not (reason := self._doubt(self._computed(workload, inputs))):
                    return inputs
            except Unsupported as error:
                reason = str(error)
        raise UsageError(
            f"{workload} cannot be verified: {reason}",
            remedy="its default schedule is used untuned",
        )

    def _draw(self, workload: Workload, rng: np.random.Generator, how: str) -> dict[str, Array]:
        args = [a for a in self.args(workload) if a.role == "input"]
        extents = [n for a in self.args(workload) for n in a.shape if n > 1]
        below = min(extents, default=1)
        least = int(how == "positive")
        out: dict[str, Array] = {}
        for a in args:
            if a.dtype == "bool":
                out[a.name] = rng.integers(0, 2, a.shape).astype(bool)
            elif a.dtype in UNITS:
                x = rng.standard_normal(a.shape)
                if how == "positive":
                    x = 0.25 + np.abs(x)
                elif how == "small":
                    x = rng.random(a.shape)
                out[a.name] = f32_to_bf16(x) if a.dtype == "bfloat16" else x.astype(a.dtype)
            elif np.dtype(a.dtype).itemsize == 1:
                low = least if least or a.dtype.startswith("u") else -_WIDE
                out[a.name] = rng.integers(low, _WIDE + 1, a.shape).astype(a.dtype)
            else:
                high = max(below, least + 1)
                out[a.name] = rng.integers(least, high, a.shape).astype(a.dtype)
        return out

    def _computed(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Num]:
        if self._last is None or self._last[0] is not inputs:
            args = self.args(workload)
            plain = {
                a.name: bf16_to_f32(inputs[a.name]) if a.dtype == "bfloat16" else inputs[a.name]
                for a in args
                if a.role == "input"
            }
            func = functions.function_of(workload)
            self._last = inputs, evaluate(func, plain, [a.name for a in args])
        return self._last[1]

    @staticmethod
    def _doubt(results: Mapping[str, Num]) -> str:
        """Return why results cannot tell right kernels from wrong ones; empty if they can."""
        for name, num in results.items():
            if num.value.dtype.kind != "f" or not num.value.size:
                continue
            if np.isnan(num.value).any() or not np.isfinite(num.err).all():
                return f"{name} has no certain value"
            finite = num.mag[np.isfinite(num.value)]
            typical = float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0
            if typical > 0 and float(np.median(num.err)) > VAGUE * typical:
                return f"rounding may change {name} by as much as its value"
        return ""

    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute in float64; whole numbers in their own type."""
        return {n: num.value for n, num in self._computed(workload, inputs).items()}

    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return twice the error that rounding may make in any order of the sums; 0 for whole numbers."""
        return {n: np.asarray(num.err) for n, num in self._computed(workload, inputs).items()}

    def counts(self, workload: Workload) -> Counts:
        """Each element that is read or written once; products that are summed, and other iterations."""
        return _counts(functions.function_of(workload))

    def reason(self, workload: Workload) -> str:
        """Return why a workload cannot be tuned; empty if it can."""
        try:
            self.make_inputs(workload, np.random.default_rng(0))
        except UsageError as error:
            return str(error)
        return ""


def _counts(func: Any) -> Counts:
    ops: dict[str, float] = {}
    moved: dict[int, float] = {}
    size = {
        hash(p): (math.prod(int(n) for n in p.shape), _itemsize(str(p.dtype))) for p in func.params
    }
    for work, body, reduces in blocks_of(func):
        kind, costly, reads, writes = facts_of(body, reduces)
        ops[kind] = ops.get(kind, 0.0) + work
        if costly:
            ops["exp_f32"] = ops.get("exp_f32", 0.0) + float(costly * work)
        for key in (*reads, *writes):
            if key in size:
                count, item = size[key]
                moved[key] = max(moved.get(key, 0.0), float(min(count, work) * item))
    return Counts(ops, {"dram": max(1.0, sum(moved.values()))})


def _itemsize(dtype: str) -> int:
    return {"bool": 1, "bfloat16": 2}.get(dtype) or np.dtype(dtype).itemsize


def blocks_of(func: Any) -> list[tuple[int, Any, bool]]:
    """Return (iterations, body, whether it reduces) of each block that assigns something."""
    from tvm_ffi import structural_walk

    from mimo_compile import _tvm

    found: list[Any] = []
    structural_walk(func.body, (_tvm.compiler().s_tir.SBlock, found.append))
    out = []
    for block in found:
        if not block.iter_vars:
            continue
        work = math.prod(int(v.dom.extent) for v in block.iter_vars)
        out.append((work, block.body, any(int(v.iter_type) == 2 for v in block.iter_vars)))
    return out


def facts_of(body: Any, reduces: bool) -> tuple[str, int, set[int], set[int]]:
    """Return the kind of a body's operations, its costly calls, and what it reads and writes."""
    from tvm_ffi import structural_walk

    from mimo_compile import _tvm

    tvm = _tvm.compiler()
    reads: set[int] = set()
    writes: set[int] = set()
    calls: list[str] = []
    products: list[Any] = []
    floats: list[bool] = []

    def stored(stmt: Any) -> None:
        writes.add(hash(stmt.buffer))
        floats.append(str(stmt.buffer.dtype) in UNITS)

    structural_walk(
        body,
        [
            (tvm.tirx.BufferStore, stored),
            (tvm.ir.TensorLoad, lambda e: reads.add(hash(e.source))),
            (
                tvm.ir.Call,
                lambda c: calls.append(str(getattr(c.op, "name", "")).rpartition(".")[2]),
            ),
            (tvm.tirx.Mul, products.append),
        ],
    )
    costly = sum(
        c in FUNCTIONS and c not in ("fabs", "abs", "floor", "ceil", "round") for c in calls
    )
    kind = "fma_f32" if reduces and products else "add_f32"
    if floats and not floats[0]:
        kind = "int_op"
    return kind, costly, reads - writes, writes
