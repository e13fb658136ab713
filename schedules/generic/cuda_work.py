"""Operations and bytes of generic functions on GPUs, from their blocks' expressions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mimo_compile._tvm import compiler
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.ops.tir import facts_of
from mimo_compile.ir.tir_numbers import UNITS
from mimo_compile.schedules.generic.cuda_print import Place
from mimo_compile.schedules.generic.cuda_stages import Stage

tvm = compiler()
_BYTES = {"bool": 1, "bfloat16": 2}


def stage_work(stages: Sequence[Stage], places: Mapping[int, Place], own: set[str]) -> Counts:
    """Return the counts of one launch: what each iteration computes, and each array once.

    Args:
        stages: What the launch does.
        places: Arrays by their buffers' identities.
        own: Names of the kernel's arguments; the others, which launches leave for each other, stay in L2.
    """
    ops: dict[str, float] = {}
    moved: dict[int, float] = {}
    for stage in stages:
        work = float(stage.results * stage.terms)
        costly = sum(facts_of(s, bool(stage.reduced))[1] for s in stage.body)
        floats = places[hash(stage.written[0])].dtype in UNITS
        plain, products = _arithmetic(stage)
        fused = min(plain, products) if stage.reduced and floats else 0
        kinds = {
            "fma_f32": fused, "add_f32" if floats else "int_op": max(plain + products - fused, 1 - fused),
            "exp_f32": costly,
        }  # fmt: skip
        for kind, count in kinds.items():
            if count:
                ops[kind] = ops.get(kind, 0.0) + count * work
        for buffer in (*stage.written, *(load.source for load in stage.read)):
            place = places[hash(buffer)]
            size = min(float(math.prod(place.shape)), work)
            moved[hash(buffer)] = max(moved.get(hash(buffer), 0.0), size * _itemsize(place.dtype))
    far = sum(size for key, size in moved.items() if places[key].name in own)
    return Counts(ops, {"dram": far, "l2": sum(moved.values())})


def _arithmetic(stage: Stage) -> tuple[int, int]:
    """Return the sums, comparisons and choices of one iteration, and its products."""
    from tvm_ffi import structural_walk

    found: list[Any] = []
    tir = tvm.tirx
    kinds = (tir.Add, tir.Sub, tir.Max, tir.Min, tir.Select, tir.Div, tir.LT, tir.LE, tir.EQ)
    products: list[Any] = []
    for stmt in stage.body:
        value = getattr(stmt, "value", None)
        structural_walk(value, [*((k, found.append) for k in kinds), (tir.Mul, products.append)])
    return len(found), len(products)


def covering(counts: Counts, necessary: Counts) -> Counts:
    """Return counts that are nowhere below what is necessary: the last part has what others are short of.

    What is inlined is one operation less than as a block of its own.
    """
    ops = {k: n - counts.ops.get(k, 0.0) for k, n in necessary.ops.items()}
    far = necessary.bytes.get("dram", 0.0) - counts.bytes.get("dram", 0.0)
    more = Counts({k: n for k, n in ops.items() if n > 0}, {"dram": far} if far > 0 else {})
    whole = counts + more
    parts = (*counts.parts[:-1], counts.parts[-1] + more) if counts.parts else ()
    return Counts(whole.ops, whole.bytes, parts=parts)


def _itemsize(dtype: str) -> float:
    return float(_BYTES.get(dtype) or tvm.DataType(dtype).itemsize)
