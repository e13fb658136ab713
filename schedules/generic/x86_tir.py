"""Any TIR function (what Relax's operators are legalised and fused to) through TVM's own schedule.

There is no algorithm to choose here, only loops: each block is inlined, or split, vectorised along its
contiguous axis and run in parallel. A rule that does not apply leaves the block as it was, so the result is
always the function that came in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mimo_compile._tvm import compiler
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Arg
from mimo_compile.schedules.base import Kernel

_PARALLEL_WORK = 16384
"""Loop iterations below which a block runs on one thread: waking another costs microseconds."""


@dataclass(frozen=True, slots=True)
class TirConfig:
    """How the loops of each block are arranged."""

    parallel: bool = True
    vector: int = 16
    """Lanes of the innermost loop; 1 leaves it scalar."""
    tile: int = 4
    """Rows of a matmul or convolution that one innermost vector is reused for."""


def default_config(func: Any) -> TirConfig:
    """Return the config that is used without tuning (the same for every function)."""
    del func
    return TirConfig()


def lower_tir(func: Any, name: str, config: TirConfig, hardware: Hardware) -> Kernel:
    """Schedule a PrimFunc with static shapes.

    Args:
        func: its parameters are the inputs, then the outputs, all buffers.
        name: symbol of the kernel.
        config: arrangement of loops.
        hardware: parallel loops are made only for more than one thread.
    """
    tvm = compiler()
    sch = tvm.s_tir.Schedule(tvm.IRModule({"main": func.with_attr("tirx.noalias", True)}))
    _inline(sch)
    for block_name in [sch.get(b).name_hint for b in _blocks(sch)]:
        _arrange(sch, block_name, config, hardware)
    scheduled = sch.mod["main"].with_attr("global_symbol", name)
    return Kernel(name, scheduled, _args(func), _counts(func), features=frozenset(), target={})


def _blocks(sch: Any) -> list[Any]:
    return list(sch.get_child_blocks(sch.get_sblock("root")))


def _try(sch: Any, step: Callable[[Any], None]) -> Any:
    """Apply a step to a copy; return the copy, or the schedule as it was when the step is illegal."""
    trial = sch.copy()
    try:
        step(trial)
    except Exception:
        return None
    return trial


def _adopt(sch: Any, step: Callable[[Any], None]) -> bool:
    """Apply a step if it is legal. Steps are tried on a copy, since a failing one may be half done."""
    if _try(sch, step) is None:
        return False
    step(sch)
    return True


def _inline(sch: Any) -> None:
    """Compute element-wise intermediates where they are used."""
    for name in [sch.get(b).name_hint for b in _blocks(sch)]:

        def inline(s: Any, name: str = name) -> None:
            block = s.get_sblock(name)
            if any(int(i.iter_type) != _SPATIAL for i in s.get(block).iter_vars):
                raise ValueError("a reduction is not inlined")
            if len(s.get_consumers(block)) == 0:
                raise ValueError("an output is not inlined")
            s.compute_inline(block)

        _adopt(sch, inline)


_SPATIAL = 0  # tirx.IterVar.DataPar


def _kinds(sch: Any, block: Any) -> tuple[list[Any], list[Any]]:
    """Return the spatial and the reduction loops of a block whose loops map one to one to its axes.

    Raises:
        ValueError: they do not, or an axis is of another kind.
    """
    loops = list(sch.get_loops(block))
    axes = list(sch.get(block).iter_vars)
    if len(loops) != len(axes):
        raise ValueError("loops are not the block's axes")
    spatial, reduce = [], []
    for loop, axis in zip(loops, axes, strict=True):
        kind = int(axis.iter_type)
        if kind == _SPATIAL:
            spatial.append(loop)
        elif kind == 2:
            reduce.append(loop)
        else:
            raise ValueError("an ordered axis")
    return spatial, reduce


def _extent(sch: Any, loop: Any) -> int:
    return int(sch.get(loop).extent)


def _lanes(extent: int, vector: int) -> int:
    """Return the most lanes, a power of two, that divide an extent."""
    while vector > 1 and extent % vector:
        vector //= 2
    return vector


def _arrange(sch: Any, name: str, config: TirConfig, hardware: Hardware) -> None:
    threads = hardware.threads if config.parallel else 1
    try:
        spatial, reduce = _kinds(sch, sch.get_sblock(name))
    except ValueError:
        return
    if not spatial:
        return
    if reduce:
        _adopt(sch, lambda s: _reduction(s, name, config, threads)) or _adopt(
            sch, lambda s: _outer(s, name, threads)
        )
    else:
        _adopt(sch, lambda s: _elementwise(s, name, config, threads)) or _adopt(
            sch, lambda s: _outer(s, name, threads)
        )


def _parallel(sch: Any, loop: Any, threads: int, work: int) -> None:
    if threads > 1 and work >= _PARALLEL_WORK and _extent(sch, loop) > 1:
        sch.parallel(loop)


def _outer(sch: Any, name: str, threads: int) -> None:
    """Only run the outermost spatial loop in parallel."""
    block = sch.get_sblock(name)
    spatial, reduce = _kinds(sch, block)
    work = 1
    for loop in (*spatial, *reduce):
        work *= _extent(sch, loop)
    _parallel(sch, spatial[0], threads, work)


def _elementwise(sch: Any, name: str, config: TirConfig, threads: int) -> None:
    """Fuse all axes but the last, vectorise the last, run the outer ones in parallel."""
    block = sch.get_sblock(name)
    spatial, _ = _kinds(sch, block)
    last = spatial[-1]
    work = 1
    for loop in spatial:
        work *= _extent(sch, loop)
    lanes = _lanes(_extent(sch, last), config.vector)
    outer = spatial[:-1]
    if lanes > 1:
        rest, vector = sch.split(last, [None, lanes])
        sch.vectorize(vector)
        outer = [*outer, rest]
    if outer:
        fused = sch.fuse(*outer)
        if threads > 1 and work >= _PARALLEL_WORK:
            task, _ = sch.split(fused, [min(4 * threads, _extent(sch, fused)), None])
            sch.parallel(task)


def _reduction(sch: Any, name: str, config: TirConfig, threads: int) -> None:
    """Vectorise along the last spatial axis, with the reduction outside of it."""
    block = sch.get_sblock(name)
    spatial, reduce = _kinds(sch, block)
    work = 1
    for loop in (*spatial, *reduce):
        work *= _extent(sch, loop)
    lanes = _lanes(_extent(sch, spatial[-1]), config.vector)
    if lanes < 4:
        _outer(sch, name, threads)
        return
    rest, vector = sch.split(spatial[-1], [None, lanes])
    outer = [*spatial[:-1], rest]
    inner = [vector]
    if len(spatial) > 1 and config.tile > 1:
        rows = _lanes(_extent(sch, spatial[-2]), config.tile)
        if rows > 1:
            more, tile = sch.split(spatial[-2], [None, rows])
            outer = [*spatial[:-2], more, rest]
            inner = [tile, vector]
    sch.reorder(*outer, *reduce, *inner)
    fused = sch.fuse(*outer)
    _parallel(sch, fused, threads, work)
    init = sch.decompose_reduction(block, reduce[0])
    for part in (init, sch.get_sblock(sch.get(block).name_hint)):
        loops = sch.get_loops(part)
        sch.vectorize(loops[-1])
        if len(inner) == 2:
            sch.unroll(loops[-2])


def _args(func: Any) -> tuple[Arg, ...]:
    """Return the parameters; callers know which are outputs, the function does not say."""
    out = []
    for index, param in enumerate(func.params):
        shape = tuple(int(d) for d in param.shape)
        out.append(Arg(f"p{index}", "input", shape, str(param.dtype)))
    return tuple(out)


def _counts(func: Any) -> Counts:
    """Count bytes of the parameters; arithmetic inside is unknown without analysing each block."""
    from mimo_compile.ir.graph import dtype_bytes

    total = 0.0
    for arg in _args(func):
        size = dtype_bytes(arg.dtype)
        for d in arg.shape:
            size *= d
        total += size
    return Counts({}, {"dram": total})
