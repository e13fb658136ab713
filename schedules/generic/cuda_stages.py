"""The blocks of a generic function as steps of GPU kernels: what is spread over threads, what adds up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mimo_compile import _tvm
from mimo_compile.ir.tir_numbers import Unsupported
from mimo_compile.ir.tir_reading import extent, loads, pattern, statements, variables


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop of a block, which begins at 0."""

    var: int
    """Identity of its variable."""
    extent: int


@dataclass(frozen=True, slots=True)
class Stage:
    """One block with the loops around it."""

    name: str
    block: Any
    values: dict[int, Any]
    """What the block's variables are in terms of loops."""
    spatial: tuple[Loop, ...]
    reduced: tuple[Loop, ...]
    body: tuple[Any, ...]
    """Its assignments, and before them those of a reduction's start."""
    start: tuple[Any, ...]
    joined: tuple[str, Any] | None
    """How a reduction of one result joins its terms, and the term; None for maps and other reductions."""
    alongside: bool
    """Neighbouring iterations of the last reduced loop read neighbouring elements, or the same."""

    @property
    def results(self) -> int:
        """Iterations of the spatial loops."""
        return math.prod(loop.extent for loop in self.spatial)

    @property
    def terms(self) -> int:
        """Iterations of the reduced loops."""
        return math.prod(loop.extent for loop in self.reduced)

    @property
    def written(self) -> list[Any]:
        """Buffers."""
        return [s.buffer for s in self.body if hasattr(s, "buffer")]

    @property
    def read(self) -> list[Any]:
        """Reads of elements, those of a reduction's start among them."""
        return [load for s in (*self.start, *self.body) for load in loads(s)]


def stages_of(func: Any) -> list[Stage]:
    """Return a function's blocks in their order.

    Args:
        func: A PrimFunc of static shapes whose blocks have loops of their own.

    Raises:
        ValueError: it is of another form.
    """
    found: list[Stage] = []

    def visit(stmt: Any, loops: list[Any]) -> None:
        kind = type(stmt).__name__
        if kind == "SeqStmt" and not loops:
            for part in stmt.seq:
                visit(part, loops)
        elif kind == "For":
            visit(stmt.body, [*loops, stmt])
        elif kind == "SBlockRealize" and not stmt.block.iter_vars and not loops:
            visit(stmt.block.body, loops)
        elif kind == "SBlockRealize":
            found.append(_stage(stmt, loops))
        else:
            raise ValueError(f"there is no kernel for a statement of kind {kind} between blocks")

    try:
        visit(func.body, [])
    except Unsupported as error:
        raise ValueError(f"there is no kernel for {error}") from error
    if not found:
        raise ValueError("there is no kernel for a function without blocks")
    return found


def allocated(func: Any) -> list[Any]:
    """Return the buffers that a function has for itself."""
    from tvm_ffi import structural_walk

    found: list[Any] = []
    block = _tvm.compiler().s_tir.SBlock
    structural_walk(func.body, (block, lambda b: found.extend(b.alloc_buffers)))
    return found


def _stage(realize: Any, loops: list[Any]) -> Stage:
    block = realize.block
    predicate = realize.predicate
    if type(predicate).__name__ != "IntImm" or not int(predicate.value):
        raise Unsupported("a block with a condition")
    if any(extent(loop.min) for loop in loops):
        raise Unsupported("a loop that does not begin at 0")
    own = [Loop(hash(loop.loop_var), extent(loop.extent)) for loop in loops]
    kinds: dict[int, set[int]] = {0: set(), 2: set()}
    values = {}
    for var, value in zip(block.iter_vars, realize.iter_values, strict=True):
        if int(var.iter_type) not in kinds:
            raise Unsupported("iterations in a certain order")
        values[hash(var.var)] = value
        kinds[int(var.iter_type)] |= variables(value)
    if kinds[0] & kinds[2]:
        raise Unsupported("a loop that is reduced and is not")
    reduced = tuple(loop for loop in own if loop.var in kinds[2])
    body = statements(block.body)
    written = {hash(s.buffer) for s in body if hasattr(s, "buffer")}
    if not reduced and any(hash(x.source) in written for s in body for x in loads(s)):
        raise Unsupported("iterations that depend on each other")
    if reduced and block.init is None:
        raise Unsupported("a reduction without a start")
    joined = pattern(body[0]) if reduced and len(body) == 1 else None
    stage = Stage(
        block.name_hint, block, values, tuple(x for x in own if x not in reduced), reduced, tuple(body),
        tuple(statements(block.init)) if reduced else (), joined, False,
    )  # fmt: skip
    _each_its_own(stage)
    return _with_alongside(stage)


def _each_its_own(stage: Stage) -> None:
    """Refuse a block whose iterations may store to one element, or read what others start from: they race."""
    stores = [s for s in (*stage.start, *stage.body) if hasattr(s, "buffer")]
    written = {hash(s.buffer) for s in stores}
    if any(hash(x.source) in written for s in stage.start for x in loads(s)):
        raise Unsupported("a reduction that starts from its own results")
    if len(written) < len(stage.written):
        raise Unsupported("iterations that store several elements of an array")
    for store in stores:
        if any(loads(index) for index in store.indices):
            raise Unsupported("iterations that store where numbers in memory say")
        steady = {_steady(index, stage.values) for index in store.indices}
        if any(loop.extent > 1 and loop.var not in steady for loop in stage.spatial):
            raise Unsupported("iterations that may store to the same element")


def _steady(index: Any, values: Mapping[int, Any]) -> int | None:
    """Return the loop whose iterations each have another value of an index; None if no loop is known to."""
    kind = type(index).__name__
    if hash(index) in values:
        return _steady(values[hash(index)], values)
    if kind == "Var":
        return hash(index)
    if kind == "Cast":
        return _steady(index.value, values)
    if kind in ("Add", "Sub", "Mul"):
        for part, other in ((index.a, index.b), (index.b, index.a)):
            if type(other).__name__ == "IntImm" and (kind != "Mul" or int(other.value)):
                return _steady(part, values)
    return None


def _with_alongside(stage: Stage) -> Stage:
    """Return a stage that knows how its terms lie."""
    if stage.joined is None:
        return stage
    last = stage.reduced[-1].var
    own = {last, *(var for var, value in stage.values.items() if last in variables(value))}
    for load in loads(stage.joined[1]):
        if any(variables(index) & own for index in load.indices[:-1]):
            return stage
        if load.indices and variables(load.indices[-1]) & own and hash(load.indices[-1]) not in own:
            return stage
    return replace(stage, alongside=True)


def common_loops(stages: Sequence[Stage], made: set[int]) -> int:
    """Return how many first loops all stages have in common, so that one block can do all stages of a row.

    Args:
        stages: In their order.
        made: Identities of the buffers that the function writes: what one stage leaves for another lies at
            the indices of these loops.
    """
    most = min(len(stage.spatial) for stage in stages)
    count = 0
    while count < most and len({stage.spatial[count].extent for stage in stages}) == 1:
        count += 1
    for stage in stages:
        accesses = [
            (s.buffer, s.indices) for s in (*stage.start, *stage.body) if hasattr(s, "buffer")
        ]
        accesses += [(load.source, load.indices) for load in stage.read]
        for buffer, indices in accesses:
            if hash(buffer) not in made:
                continue
            count = min(count, len(indices))
            for at in range(count):
                value = stage.values.get(hash(indices[at]))
                if value is None or hash(value) != stage.spatial[at].var:
                    count = at
                    break
    return count
