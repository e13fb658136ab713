"""Count what a kernel's TIR executes, statement by statement, to check declared counts."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

OPERATORS = {
    "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "FloorDiv": operator.floordiv,
    "FloorMod": operator.mod, "LT": operator.lt, "LE": operator.le, "GT": operator.gt,
    "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne, "Min": min, "Max": max,
}  # fmt: skip
CHILDREN = ("a", "b", "value", "base", "condition", "true_value", "false_value", "body")


def executed(func: Any) -> Counter[str]:
    """Return how often things happen in one run of a function whose extents no memory decides.

    ``dot_i8`` counts 8-bit products of ``vpdpbusd``, ``dot_bf16`` those of ``vdpbf16ps``; ``fma_f32``
    multiply-adds of float32 lanes (``a + b * c``, also where they are fused by name); ``permuted``
    lanes picked from a table; ``and_u8`` bytes masked in unpacking; ``load:NAME`` bytes loaded from a
    parameter; ``store:NAME`` bytes stored to one.
    """
    return _statement(func.body, {}, {p.name for p in func.params})


def _statement(s: Any, env: dict[int, int], names: set[str]) -> Counter[str]:
    kind = type(s).__name__
    if kind == "SeqStmt":
        return _sequence(s, dict(env), names)
    if kind == "For":
        extent = _value(s.extent, env)
        if not _turns_differ(s.body):
            once = _statement(s.body, env, names)
            return Counter({k: v * extent for k, v in once.items()})
        turns = ({**env, hash(s.loop_var): i} for i in range(extent))
        return sum((_statement(s.body, e, names) for e in turns), Counter())
    if kind == "IfThenElse":
        branch = s.then_case if _value(s.condition, env) else s.else_case
        return _statement(branch, env, names) if branch is not None else Counter()
    if kind == "BufferStore":
        out = _expression(s.value, names)
        if s.buffer.name in names:
            out[f"store:{s.buffer.name}"] += _bytes(s.value)
        return out
    if kind == "AttrStmt":
        return _statement(s.body, env, names)
    if kind in ("Bind", "Evaluate"):
        return _expression(s.value, names)
    if kind in ("AllocBuffer", "DeclBuffer"):
        return Counter()
    raise AssertionError(f"unknown statement {kind}")


def _sequence(s: Any, env: dict[int, int], names: set[str]) -> Counter[str]:
    out: Counter[str] = Counter()
    for x in s.seq:
        if type(x).__name__ == "Bind":  # what extents and conditions behind it may be made of
            try:
                env[hash(x.var)] = _value(x.value, env)
            except (KeyError, AttributeError):  # it is no number, or one from memory
                env.pop(hash(x.var), None)
        out += _statement(x, env, names)
    return out


def _turns_differ(s: Any) -> bool:
    """Say whether the turns of a loop around the statement may do different things."""
    kind = type(s).__name__
    if kind == "IfThenElse" or (kind == "For" and type(s.extent).__name__ != "IntImm"):
        return True
    parts = [*getattr(s, "seq", ()), *([s.body] if hasattr(s, "body") else [])]
    return any(_turns_differ(p) for p in parts)


def _expression(e: Any, names: set[str]) -> Counter[str]:
    kind = type(e).__name__
    out: Counter[str] = Counter()
    if kind in ("TensorLoad", "BufferLoad"):
        name = e.source.name
        if name in names:
            out[f"load:{name}"] += _bytes(e)
        return out
    if (
        kind == "Add"
        and "float32" in _type(e)
        and "Mul" in (type(e.a).__name__, type(e.b).__name__)
    ):
        out["fma_f32"] += _lanes(e)
    if kind == "BitwiseAnd" and _is_unpack_mask(e.b):
        out["and_u8"] += 4 * _lanes(e)
    if kind == "Call":
        if "llvm.fmuladd" in str(e)[:80] and "call_llvm" in str(e.op):
            out["fma_f32"] += _lanes(e)
        elif "vpdpbusd" in str(e)[:200] and "call_llvm" in str(e.op):
            out["dot_i8"] += 4 * _lanes(e)
        elif "mimo_dot_bf16" in str(e)[:200] and "call_extern" in str(e.op):
            out["dot_bf16"] += 2 * _lanes(e)
        elif "permvar.sf" in str(e)[:200] and "call_llvm" in str(e.op):
            out["permuted"] += _lanes(e)
        for arg in e.args:
            out += _expression(arg, names)
    for child in CHILDREN:
        part = getattr(e, child, None)
        if part is not None and hasattr(part, "ty"):
            out += _expression(part, names)
    return out


def _is_unpack_mask(e: Any) -> bool:
    while hasattr(e, "value") and not isinstance(e.value, int):
        e = e.value
    return getattr(e, "value", None) in {((1 << b) - 1) * 0x01010101 for b in (1, 2, 4)}


def _value(e: Any, env: dict[int, int]) -> int:
    kind = type(e).__name__
    if isinstance(e, int):
        return e
    if kind == "IntImm":
        return int(e.value)
    if kind == "Var":
        return env[hash(e)]
    return int(OPERATORS[kind](_value(e.a, env), _value(e.b, env)))


def _type(e: Any) -> str:
    return str(e.ty)


def _lanes(e: Any) -> int:
    head, _, lanes = _type(e).strip('"').rpartition("x")
    return int("".join(c for c in lanes if c.isdigit())) if head else 1


def _bytes(e: Any) -> int:
    text = _type(e)
    width = next((w for t, w in (("int8", 1), ("float16", 2), ("int16", 2)) if t in text), 4)
    return width * _lanes(e)
