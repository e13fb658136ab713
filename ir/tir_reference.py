"""What a generic function computes, in numpy and float64, with the error that an honest kernel may make.

The function is read block by block as it came, before any schedule: nothing of TVM's code generation takes
part. Loops become axes of arrays; sums of products become matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mimo_compile.ir.tir_numbers import (
    BINARY,
    FLOORS,
    FUNCTIONS,
    UNITS,
    Array,
    Num,
    Unsupported,
    cast,
    contract,
    negated,
    plus,
    select,
    total,
)
from mimo_compile.ir.tir_reading import (
    Axes,
    constant,
    extent,
    factors,
    loads,
    pattern,
    statements,
    variables,
)

_IN_ORDER = 1 << 15
"""Most steps of a reduction that has to be followed one by one."""
_MOST_WORK = 1 << 34
"""Most innermost iterations of a function that a reference is computed of."""
_DIVISIONS = ("Div", "Mod", "FloorDiv", "FloorMod")


@dataclass(slots=True)
class Evaluator:
    """Follows one function; ``buffers`` holds what was computed, by the buffers' identities."""

    buffers: dict[int, Num] = field(default_factory=dict)
    env: dict[int, Num] = field(default_factory=dict)
    guarded: int = 0
    """Conditions that choose what is looked at around an expression."""
    branched: int = 0
    """Those of them that are branches: the processor does not compute what is not chosen."""

    # -- statements ----------------------------------------------------------------------------

    def run(self, stmt: Any, loops: list[Any]) -> None:
        """Follow a statement inside of loops."""
        kind = type(stmt).__name__
        if kind == "SeqStmt":
            if loops:
                raise Unsupported("blocks that share a loop")
            for part in stmt.seq:
                self.run(part, loops)
        elif kind == "For":
            self.run(stmt.body, [*loops, stmt])
        elif kind == "SBlockRealize" and not stmt.block.iter_vars and not loops:
            if stmt.block.match_buffers:
                raise Unsupported("matched buffers")
            for buffer in stmt.block.alloc_buffers:
                self.new(buffer)
            self.run(stmt.block.body, loops)
        elif kind == "SBlockRealize":
            self.block(stmt, loops)
        else:
            raise Unsupported(f"a statement of kind {kind}")

    def new(self, buffer: Any) -> None:
        """Make room for a buffer; what is read before it was written is NaN or 0."""
        shape, dtype = [extent(n) for n in buffer.shape], str(buffer.dtype)
        if dtype in UNITS:
            self.buffers[hash(buffer)] = Num(np.full(shape, np.nan), np.zeros(shape))
        else:
            self.buffers[hash(buffer)] = Num(np.zeros(shape, dtype))

    def block(self, realize: Any, loops: list[Any]) -> None:
        """Follow one block over all iterations of its loops."""
        block = realize.block
        if block.alloc_buffers or block.match_buffers:
            raise Unsupported("buffers of a block's own")
        if type(realize.predicate).__name__ != "IntImm" or not int(realize.predicate.value):
            raise Unsupported("a block with a condition")
        starts = [extent(loop.min) for loop in loops]
        axes = Axes(
            [hash(loop.loop_var) for loop in loops],
            [(s, s + extent(loop.extent)) for s, loop in zip(starts, loops, strict=True)],
            [str(loop.loop_var.ty) for loop in loops],
        )
        axes.reduced = self.reduced_axes(realize, axes)
        if math.prod(axes.shape) > _MOST_WORK:
            raise Unsupported("too much work for a reference")
        for piece in axes.pieces():
            self.env = piece.env()
            for var, value in zip(block.iter_vars, realize.iter_values, strict=True):
                self.env[hash(var.var)] = self.evaluate(value)
            if axes.reduced:
                self.reduction(block, piece)
            else:
                self.refuse_own_reads(block)
                for stmt in statements(block.body):
                    self.execute(stmt)

    def reduced_axes(self, realize: Any, axes: Axes) -> tuple[int, ...]:
        found: dict[int, set[int]] = {0: set(), 2: set()}
        for var, value in zip(realize.block.iter_vars, realize.iter_values, strict=True):
            kind = int(var.iter_type)
            if kind not in found:
                raise Unsupported("iterations in a certain order")
            found[kind] |= {axes.names.index(v) for v in variables(value) if v in axes.names}
        if found[0] & found[2]:
            raise Unsupported("a loop that is reduced and is not")
        return tuple(sorted(found[2]))

    def refuse_own_reads(self, block: Any) -> None:
        """Refuse a block whose iterations depend on each other."""
        written = {hash(s.buffer) for s in statements(block.body) if hasattr(s, "buffer")}
        if any(hash(load.source) in written for load in loads(block.body)):
            raise Unsupported("iterations that depend on each other")

    def execute(self, stmt: Any) -> None:
        """Follow an assignment for all iterations at once."""
        if type(stmt).__name__ == "Bind":
            self.env[hash(stmt.var)] = self.evaluate(stmt.value)
            return
        self.store(stmt, self.evaluate(stmt.value))

    def store(self, stmt: Any, result: Num) -> None:
        """Write results to where a statement puts them."""
        target = self.buffers[hash(stmt.buffer)]
        at = self.indices(stmt.indices, target.value.shape, "written")
        shape = np.broadcast_shapes(*(np.shape(i) for i in at)) if at else ()
        value = np.asarray(result.value)
        spread = math.prod(np.broadcast_shapes(shape, value.shape))
        if spread != math.prod(shape):
            raise Unsupported("elements that are written more than once")
        target.value[at] = value.reshape(shape) if value.size == spread else value
        if target.error is not None:
            whole = np.broadcast_shapes(shape, value.shape)
            target.error[at] = np.broadcast_to(result.err, whole).reshape(shape)
        elif result.error is not None and np.any(result.error):
            errors = np.zeros(target.value.shape)
            errors[at] = np.broadcast_to(result.error, value.shape).reshape(shape)
            self.buffers[hash(stmt.buffer)] = Num(target.value, errors)

    # -- reductions ----------------------------------------------------------------------------

    def reduction(self, block: Any, axes: Axes) -> None:
        """Follow a block that reduces."""
        parts = statements(block.body)
        if block.init is None:
            raise Unsupported("a reduction without a start")
        whole = dict(self.env)
        self.first_of(axes)
        for stmt in statements(block.init):
            self.execute(stmt)
        self.env = whole
        if len(parts) == 1 and (found := pattern(parts[0])) is not None:
            kind, term = found
            self.store(parts[0], self.joined(parts[0], kind, term, axes))
            return
        steps = math.prod(axes.shape[i] for i in axes.reduced)
        if steps > _IN_ORDER:
            raise Unsupported("a long reduction of an unusual kind")
        for at in np.ndindex(*(axes.shape[i] for i in axes.reduced)):
            self.env = {
                name: Num(
                    num.value[tuple(
                        slice(None) if i not in axes.reduced or num.value.shape[i] == 1
                        else slice(at[axes.reduced.index(i)], at[axes.reduced.index(i)] + 1)
                        for i in range(num.value.ndim)
                    )]
                )
                for name, num in whole.items()
            }  # fmt: skip
            for stmt in parts:
                self.execute(stmt)
        self.env = whole

    def first_of(self, axes: Axes) -> None:
        """Keep only the first iteration of reduced loops."""
        for name, num in self.env.items():
            index = tuple(
                slice(0, 1) if i in axes.reduced else slice(None) for i in range(num.value.ndim)
            )
            self.env[name] = Num(num.value[index])

    def joined(self, stmt: Any, kind: str, term: Any, axes: Axes) -> Num:
        """Return what is stored after all terms were joined to the start."""
        dtype = str(stmt.buffer.dtype)
        terms = math.prod(axes.shape[i] for i in axes.reduced)
        rank = len(axes.shape)
        whole, self.env = self.env, dict(self.env)
        self.first_of(axes)
        start = self.load(stmt.buffer, stmt.indices)
        self.env = whole
        if kind == "Add" and dtype in UNITS and (product := factors(term)) is not None:
            a, b = (self.ranked(self.evaluate(f), rank) for f in product)
            if all(
                a.value.shape[i] > 1 or b.value.shape[i] > 1 or axes.shape[i] == 1
                for i in axes.reduced
            ):
                return plus(contract(a, b, axes.reduced, terms, dtype), start)
        x = self.spread(self.evaluate(term), axes)
        if kind == "Add":
            return plus(total(x, axes.reduced, terms, dtype), start)
        pick = np.max if kind == "Max" else np.min
        value = pick(x.value, axis=axes.reduced, keepdims=True)
        error = None if x.error is None else x.error.max(axis=axes.reduced, keepdims=True)
        return BINARY[kind](Num(value, error), start, dtype)

    @staticmethod
    def ranked(x: Num, rank: int) -> Num:
        """Return numbers with an axis for each loop."""
        value = x.value.reshape((1,) * (rank - x.value.ndim) + x.value.shape)
        error = (
            None
            if x.error is None
            else np.broadcast_to(x.error, x.value.shape).reshape(value.shape)
        )
        return Num(value, error)

    @staticmethod
    def spread(x: Num, axes: Axes) -> Num:
        """Return numbers with the full extent of each reduced loop."""
        shape = np.broadcast_shapes(
            x.value.shape, [n if i in axes.reduced else 1 for i, n in enumerate(axes.shape)]
        )
        error = None if x.error is None else np.broadcast_to(x.error, shape)
        return Num(np.broadcast_to(x.value, shape), error)

    # -- expressions ---------------------------------------------------------------------------

    def indices(self, indices: Sequence[Any], shape: tuple[int, ...], what: str) -> tuple[Any, ...]:
        """Return the indices of an access, inside of the buffer."""
        out = []
        for expr, size in zip(indices, shape, strict=True):
            num = self.evaluate(expr)
            if num.error is not None and np.any(num.error):
                raise Unsupported("an index that rounding may change")
            at = num.value
            if at.size and (at.min() < 0 or at.max() >= size):
                if what == "written" or not self.guarded:
                    raise Unsupported(f"an element outside of its buffer is {what}")
                at = np.clip(at, 0, size - 1)
            out.append(at)
        return tuple(out)

    def load(self, source: Any, indices: Sequence[Any]) -> Num:
        """Read elements of a buffer."""
        held = self.buffers.get(hash(source))
        if held is None:
            raise Unsupported("a buffer from elsewhere")
        at = self.indices(indices, held.value.shape, "read")
        error = None if held.error is None else np.asarray(held.error[at])
        return Num(np.asarray(held.value[at]), error)

    def evaluate(self, expr: Any) -> Num:
        """Return an expression's values over the axes of its block."""
        kind = type(expr).__name__
        dtype = str(expr.ty)
        if kind in BINARY:
            a, b = self.evaluate(expr.a), self.evaluate(expr.b)
            zero = kind in _DIVISIONS and dtype not in UNITS and not np.all(b.value)
            if zero and not self.branched:  # ends the process
                raise Unsupported("a division by zero")
            return BINARY[kind](a, b, dtype)
        if kind == "IntImm":
            return Num(np.asarray(int(expr.value), "bool" if dtype == "bool" else dtype))
        if kind == "FloatImm":
            return constant(float(expr.value), dtype)
        if kind == "TensorLoad":
            return self.load(expr.source, expr.indices)
        if kind == "Cast":
            return cast(self.evaluate(expr.value), str(expr.value.ty), dtype)
        if kind == "Call":
            return self.call(expr, dtype)
        if kind == "Select":
            return self.choice(expr.condition, expr.true_value, expr.false_value)
        if kind == "Not":
            return negated(self.evaluate(expr.a))
        if kind == "Let":
            self.env[hash(expr.var)] = self.evaluate(expr.value)
            return self.evaluate(expr.body)
        found = self.env.get(hash(expr)) if kind == "Var" else None
        if found is None:
            raise Unsupported(f"an expression of kind {kind}")
        return found

    def choice(self, condition: Any, a: Any, b: Any) -> Num:
        """Return one of two, which are looked at only where they count."""
        self.guarded += 1
        try:
            return select(self.evaluate(condition), self.evaluate(a), self.evaluate(b))
        finally:
            self.guarded -= 1

    def call(self, expr: Any, dtype: str) -> Num:
        """Return the values of a function."""
        name = str(getattr(expr.op, "name", expr.op)).rpartition(".")[2]
        if name == "if_then_else":
            self.branched += 1
            try:
                return self.choice(*expr.args)
            finally:
                self.branched -= 1
        if name == "likely":
            return self.evaluate(expr.args[0])
        args = [self.evaluate(a) for a in expr.args]
        if name == "pow" and dtype in UNITS:
            return BINARY["pow"](args[0], args[1], dtype)
        kind = str(expr.args[0].ty) if expr.args else dtype
        if name in FUNCTIONS and len(args) == 1 and (kind in UNITS or name in ("abs", "fabs")):
            return FUNCTIONS[name](args[0], kind)
        raise Unsupported(f"the function {name}")


def evaluate(function: Any, inputs: Mapping[str, Array], names: Sequence[str]) -> dict[str, Num]:
    """Compute what a function writes.

    Args:
        function: A PrimFunc before scheduling.
        inputs: Numbers by name (16-bit floats as such, not as bits).
        names: A name for each parameter, in order.

    Returns:
        By name, each parameter that the function writes; errors are doubled, for what first-order analysis
        leaves out.

    Raises:
        Unsupported: it does something else than assign, block by block.
    """
    follow = Evaluator()
    for name, buffer in zip(names, function.params, strict=True):
        follow.new(buffer)
        if name in inputs:
            held = follow.buffers[hash(buffer)].value
            held[...] = np.asarray(inputs[name]).reshape(held.shape)
            follow.buffers[hash(buffer)] = Num(held)
    with np.errstate(all="ignore"):
        follow.run(function.body, [])
    out = {}
    for name, buffer in zip(names, function.params, strict=True):
        if name not in inputs:
            num, dtype = follow.buffers[hash(buffer)], str(buffer.dtype)
            floor = 4 * FLOORS[dtype] if dtype in UNITS else 0.0
            out[name] = Num(
                num.value, np.broadcast_to(2 * np.asarray(num.err) + floor, num.value.shape)
            )
    return out


__all__ = ["Num", "Unsupported", "evaluate"]
