"""What stands in a generic function's blocks: loops, constants, assignments, reads, reductions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mimo_compile import _tvm
from mimo_compile.ir.tir_numbers import UNITS, Num, Unsupported

PIECE = 1 << 21
"""Elements that are computed at once."""
_REDUCERS = ("Add", "Max", "Min")


@dataclass(slots=True)
class Axes:
    """The loops around one block, as axes of arrays."""

    names: list[int]
    """Identity of each loop's variable."""
    ranges: list[tuple[int, int]]
    dtypes: list[str]
    reduced: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """How often each loop runs."""
        return tuple(end - begin for begin, end in self.ranges)

    def pieces(self) -> Iterator[Axes]:
        """Yield parts along spatial axes of at most `PIECE` elements, if there are such."""
        size = math.prod(self.shape)
        spatial = [i for i in range(len(self.ranges)) if i not in self.reduced]
        wide = max(spatial, key=lambda i: self.shape[i], default=None)
        if size <= PIECE or wide is None or self.shape[wide] == 1:
            yield self
            return
        begin, end = self.ranges[wide]
        step = max(1, (end - begin) // math.ceil(size / PIECE))
        for at in range(begin, end, step):
            ranges = list(self.ranges)
            ranges[wide] = (at, min(end, at + step))
            yield from Axes(self.names, ranges, self.dtypes, self.reduced).pieces()

    def env(self) -> dict[int, Num]:
        """Return each loop's values along its own axis."""
        out = {}
        for i, (name, (begin, end), dtype) in enumerate(
            zip(self.names, self.ranges, self.dtypes, strict=True)
        ):
            shape = [1] * len(self.ranges)
            shape[i] = end - begin
            out[name] = Num(np.arange(begin, end, dtype=dtype).reshape(shape))
        return out


def constant(value: float, dtype: str) -> Num:
    """Return a constant as it is written; the kernel holds it rounded."""
    error = None if holds_exactly(value, dtype) else np.asarray(UNITS[dtype] * abs(value))
    return Num(np.asarray(value, np.float64), error)


def holds_exactly(value: float, dtype: str) -> bool:
    """Say whether a type has a number, as all have what their maxima start from."""
    if dtype == "float64" or not math.isfinite(value):
        return True
    with np.errstate(over="ignore"):
        held = np.asarray(value, "float32" if dtype == "bfloat16" else dtype)
    if dtype == "bfloat16" and int(held.view(np.uint32)) & 0xFFFF:
        return False
    return float(held) == value


def extent(value: Any) -> int:
    """Return a static extent."""
    try:
        return int(value)
    except TypeError as error:
        raise Unsupported(f"the extent {value}") from error


def statements(body: Any) -> list[Any]:
    """Return the assignments of a block."""
    kind = type(body).__name__
    if kind == "SeqStmt":
        return [s for part in body.seq for s in statements(part)]
    if kind not in ("Bind", "BufferStore"):
        raise Unsupported(f"a statement of kind {kind}")
    return [body]


def loads(node: Any) -> list[Any]:
    """Return all reads in a statement or an expression."""
    from tvm_ffi import structural_walk

    found: list[Any] = []
    structural_walk(node, (_tvm.compiler().ir.TensorLoad, found.append))
    return found


def variables(expr: Any) -> set[int]:
    """Return the identities of an expression's variables."""
    from tvm_ffi import structural_walk

    found: set[int] = set()
    structural_walk(expr, (_tvm.compiler().tirx.Var, lambda v: found.add(hash(v))))
    return found


def pattern(stmt: Any) -> tuple[str, Any] | None:
    """Return how a reduction joins its terms, and the term; None if it is of another kind."""
    kind = type(stmt.value).__name__ if hasattr(stmt, "buffer") else ""
    if kind not in _REDUCERS:
        return None
    for own, term in ((stmt.value.a, stmt.value.b), (stmt.value.b, stmt.value.a)):
        if type(own).__name__ == "TensorLoad" and hash(own.source) == hash(stmt.buffer):
            same = all(
                _tvm.runtime().structural_equal(i, j)
                for i, j in zip(own.indices, stmt.indices, strict=True)
            )
            if same and all(hash(x.source) != hash(stmt.buffer) for x in loads(term)):
                return kind, term
    return None


def factors(term: Any) -> tuple[Any, Any] | None:
    """Return the factors of a product of floats."""
    return (term.a, term.b) if type(term).__name__ == "Mul" else None
