"""What the rules need to know about a block: axes, work, how its operands are read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mimo_compile._tvm import compiler

tvm = compiler()
from tvm.sym.analyzer import Analyzer
from tvm_ffi import structural_walk


@dataclass(frozen=True, slots=True)
class BlockFacts:
    """Facts about one block, gathered before any rule touches it."""

    name: str
    kinds: tuple[str, ...]
    """For each loop: S (spatial) or R (reduced)."""
    extents: tuple[int, ...]
    written: tuple[Any, ...]
    reads: tuple[tuple[Any, int], ...]
    """Buffers read and their numbers of elements. Names of buffers need not differ: compare with `holds`."""
    output: bool
    """It writes a parameter of the function."""
    cheap: bool
    """No division and no function call: repeating it costs less than a trip to memory."""
    linear: bool
    """All accesses are ``[i0, i1, ...]`` of one shape, so that all loops may be fused into one."""
    vectorisable: bool
    """Along the last axis every access is contiguous or constant."""
    vector_axis: int | None
    """Loop of the last output axis if every access is contiguous or constant along it."""
    reuse_axis: int | None
    """Spatial loop that what is read along ``vector_axis`` does not depend on: its iterations share loads
    (rows of a matmul, output channels of a convolution)."""

    @property
    def reduced(self) -> bool:
        """It reduces."""
        return "R" in self.kinds

    @property
    def work(self) -> int:
        """Innermost iterations."""
        return math.prod(self.extents)


def extent(value: Any) -> int:
    """Return a static extent.

    Raises:
        ValueError: It is symbolic.
    """
    try:
        return int(value)
    except TypeError as error:
        raise ValueError(f"extent {value} is not static") from error


def holds(buffers: Iterable[Any], buffer: Any) -> bool:
    """Say whether a buffer is among others, by identity: different buffers may have one name."""
    return any(b.same_as(buffer) for b in buffers)


def reads_per_element(user: BlockFacts, producer: BlockFacts) -> float:
    """Return how often ``user`` reads each element that ``producer`` writes, on average."""
    sizes = [size for buffer, size in user.reads if holds(producer.written, buffer)]
    return user.work / max(1, min(sizes)) if sizes else math.inf


def block_facts(schedule: Any) -> list[BlockFacts]:
    """Return facts of all blocks in program order; blocks with other than simple loops are left out."""
    found: list[str] = []
    function = schedule.mod["main"]
    structural_walk(
        function.body,
        (tvm.s_tir.SBlock, lambda b: found.append(b.name_hint)),
        order="pre",
    )
    facts = [_facts(schedule, function, name) for name in found if name != "root"]
    return [f for f in facts if f is not None]


def _facts(schedule: Any, function: Any, name: str) -> BlockFacts | None:
    reference = schedule.get_sblock(name)
    block = schedule.get(reference)
    loops = [schedule.get(loop) for loop in schedule.get_loops(reference)]
    realize = _realize(function, block)
    if len(loops) != len(block.iter_vars) or realize is None:
        return None
    for value, loop in zip(realize.iter_values, loops, strict=True):
        if not value.same_as(loop.loop_var):
            return None  # already split, or an offset
    kinds = tuple({0: "S", 2: "R"}.get(int(v.iter_type), "O") for v in block.iter_vars)
    if "O" in kinds:
        return None
    variables = [v.var for v in block.iter_vars]
    accesses = _accesses(block)
    stores = [a for a in accesses if a[2]]
    if not stores:
        return None
    written = tuple(r.source for r in block.writes)
    last = stores[0][1][-1] if stores[0][1] else None
    axis = next((i for i, v in enumerate(variables) if last is not None and last.same_as(v)), None)
    if axis is not None and (
        kinds[axis] != "S" or not all(_along(a, variables[axis]) for a in accesses)
    ):
        axis = None
    return BlockFacts(
        name=name,
        kinds=kinds,
        extents=tuple(extent(loop.extent) for loop in loops),
        written=written,
        reads=tuple((r.source, math.prod(extent(n) for n in r.source.shape)) for r in block.reads),
        output=any(holds(function.params, b) for b in written),
        cheap=_cheap(block),
        linear=_linear(accesses, variables),
        vectorisable=bool(variables) and all(_along(a, variables[-1]) for a in accesses),
        vector_axis=axis,
        reuse_axis=None if axis is None else _reuse_axis(loops, kinds, variables, accesses, axis),
    )


def _reuse_axis(
    loops: list[Any], kinds: tuple[str, ...], variables: list[Any], accesses: list[Any], axis: int
) -> int | None:
    vectors = [
        indices
        for _, indices, stored in accesses
        if not stored
        and any(_uses(i, variables[axis]) for i in indices)
        and any(
            _uses(i, v) for i in indices for v, k in zip(variables, kinds, strict=True) if k == "R"
        )
    ]
    for at in reversed(range(len(variables))):
        if at == axis or kinds[at] != "S" or extent(loops[at].extent) == 1:
            continue
        if vectors and not any(_uses(i, variables[at]) for v in vectors for i in v):
            return at
    return None


def _realize(function: Any, block: Any) -> Any:
    found: list[Any] = []
    structural_walk(
        function.body,
        (tvm.s_tir.SBlockRealize, lambda r: found.append(r) if r.block.same_as(block) else None),
    )
    return found[0] if found else None


def _accesses(block: Any) -> list[tuple[Any, list[Any], bool]]:
    """Return (buffer, indices, is a store) of all accesses of the body."""
    out: list[tuple[Any, list[Any], bool]] = []
    structural_walk(
        block.body,
        [
            (tvm.tirx.BufferStore, lambda s: out.append((s.buffer, list(s.indices), True))),
            (tvm.ir.TensorLoad, lambda s: out.append((s.source, list(s.indices), False))),
        ],
    )
    return out


def _uses(expr: Any, var: Any) -> bool:
    hit: list[Any] = []
    structural_walk(expr, (tvm.tirx.Var, lambda v: hit.append(v) if v.same_as(var) else None))
    return bool(hit)


def _along(access: tuple[Any, list[Any], bool], var: Any) -> bool:
    """Say whether an access is contiguous or constant along an axis."""
    _, indices, _ = access
    if any(_uses(i, var) for i in indices[:-1]):
        return False
    if not indices or not _uses(indices[-1], var):
        return True
    step = Analyzer().simplify(_shifted(indices[-1], var) - indices[-1])
    return isinstance(step, tvm.tirx.IntImm) and int(step) == 1


def _shifted(expr: Any, var: Any) -> Any:
    from tvm_ffi import structural_map

    one = tvm.tirx.IntImm(str(var.ty), 1)
    return structural_map(expr, (tvm.tirx.Var, lambda v: v + one if v.same_as(var) else v))


def _linear(accesses: list[tuple[Any, list[Any], bool]], variables: list[Any]) -> bool:
    shape = [extent(n) for n in accesses[0][0].shape]
    for buffer, indices, _ in accesses:
        if [extent(n) for n in buffer.shape] != shape or len(indices) != len(variables):
            return False
        if not all(i.same_as(v) for i, v in zip(indices, variables, strict=True)):
            return False
    return True


def _cheap(block: Any) -> bool:
    costly: list[Any] = []
    structural_walk(
        block.body,
        [
            (tvm.ir.Call, lambda c: costly.append(c) if c.op.name != "tirx.if_then_else" else None),
            (tvm.tirx.Div, costly.append),
            (tvm.tirx.Let, costly.append),
        ],
    )
    return not costly
