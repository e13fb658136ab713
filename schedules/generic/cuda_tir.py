"""Any legalised PrimFunc as CUDA text: a launch for each block, or one that does all steps row by row.

Producers that cost nothing to repeat are inlined, as on CPUs. Each thread then has an element of a block, or
some threads share a reduction: each adds up every so manieth term, and their sums are joined by halves in
shared memory, in one order. Where all blocks have their first loops in common, as those of a softmax have,
one block of threads can do all steps of a row; what they leave for each other stays near.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from mimo_compile._tvm import compiler
from mimo_compile.errors import UsageError
from mimo_compile.ir import functions
from mimo_compile.ir.counts import in_turn
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Schedule, Space, kernel_name
from mimo_compile.schedules.cuda.code import DeviceCode
from mimo_compile.schedules.cuda.limits import fits
from mimo_compile.schedules.generic.blocks import extent
from mimo_compile.schedules.generic.cuda_print import STORED, Place
from mimo_compile.schedules.generic.cuda_stages import Stage, allocated, common_loops, stages_of
from mimo_compile.schedules.generic.cuda_steps import Step, launch_text
from mimo_compile.schedules.generic.cuda_work import covering, stage_work
from mimo_compile.schedules.generic.x86_tir import inlined

tvm = compiler()

THREADS = 256
FULL = 1 << 18
"""Threads that a GPU runs at a time, about: 132 SMs have 2048 each."""
_SHORT = 32
"""Terms that one thread adds up by itself."""
_ROW = 64
"""Elements of a row for each thread of the block that does its steps; longer rows are for the whole GPU."""
_LEAST_ROW = 32
"""Elements that a row should have at least, lest blocks have more threads than work."""


@dataclass(frozen=True, slots=True)
class BlocksConfig:
    """Knobs of all blocks of a function."""

    threads: int = THREADS
    """Of a block."""
    team: int = 1
    """Threads that share a reduction of many terms that lie side by side, a power of two."""
    rows: bool = False
    """One launch, whose blocks do all steps of a row, where the function allows it."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A function before any knob is turned."""

    func: Any
    """With what is inlined."""
    stages: tuple[Stage, ...]
    common: int
    """First loops that all stages have in common, as many as leave rows of some length."""
    args: tuple[Arg, ...]
    places: dict[int, Place]
    """Arrays by their buffers' identities, arguments first."""
    notes: tuple[str, ...]

    @property
    def in_rows(self) -> bool:
        """It can be one launch instead of several."""
        return len(self.stages) > 1 and self.common > 0

    @property
    def rows(self) -> int:
        """Iterations of the loops that all stages have in common."""
        return _rows(self.stages, self.common)


def prepared(func: Any) -> Prepared:
    """Return a function with its stages.

    Args:
        func: A PrimFunc with static shapes.

    Raises:
        ValueError: its blocks are of a form that there are no kernels for.
    """
    notes: list[str] = []
    schedule = tvm.s_tir.Schedule(tvm.IRModule({"main": func.with_attr("tirx.noalias", True)}))
    whole = inlined(schedule, notes).mod["main"]
    stages = tuple(stages_of(whole))
    outputs = {hash(b) for b in functions.written(whole)}
    args, places, count = [], {}, {"in": 0, "out": 0}
    for buffer in whole.params:
        kind = "out" if hash(buffer) in outputs else "in"
        name, shape = f"{kind}{count[kind]}", tuple(extent(n) for n in buffer.shape)
        count[kind] += 1
        args.append(Arg(name, "output" if kind == "out" else "input", shape, str(buffer.dtype)))
        places[hash(buffer)] = Place(name, str(buffer.dtype), shape)
    for index, buffer in enumerate(allocated(whole)):
        shape = tuple(extent(n) for n in buffer.shape)
        places[hash(buffer)] = Place(f"between{index}", str(buffer.dtype), shape)
    for place in places.values():
        if place.dtype not in STORED:
            raise ValueError(f"there is no kernel for numbers of type {place.dtype}")
    made = {hash(b) for stage in stages for b in stage.written}
    common, work = common_loops(stages, made), max(s.results * s.terms for s in stages)
    while common > 1 and work < _LEAST_ROW * _rows(stages, common):
        common -= 1
    return Prepared(whole, stages, common, tuple(args), places, tuple(notes))


def _rows(stages: tuple[Stage, ...], common: int) -> int:
    return math.prod(loop.extent for loop in stages[0].spatial[:common])


def _default(p: Prepared) -> BlocksConfig:
    longest = max(s.results * s.terms for s in p.stages) // p.rows
    rows = p.in_rows and longest <= _ROW * THREADS
    threads = THREADS
    while rows and threads > 64 and threads // 2 >= longest:
        threads //= 2
    shared = [s for s in p.stages if s.joined is not None and s.alongside and s.terms > _SHORT]
    team, results = 1, min((s.results for s in shared), default=FULL)
    while shared and team < threads and (team < 32 or results * team < FULL):
        team *= 2
    return BlocksConfig(threads, team, rows)


def _lowered(p: Prepared, name: str, config: BlocksConfig) -> Kernel:
    name, own = re.sub(r"\W", "_", name), {a.name for a in p.args}
    groups = [list(p.stages)] if config.rows and p.in_rows else [[s] for s in p.stages]
    common = p.common if config.rows and p.in_rows else 0
    launches, texts, works = [], ['#include "maps.cuh"\n'], []
    for index, group in enumerate(groups):
        symbol = f"step{index}_{re.sub(r'[^A-Za-z0-9_]', '_', group[0].name)}"
        step = Step(symbol, tuple(group), common, config.threads, config.team)
        text, launch = launch_text(step, p.places)
        texts.append(text)
        launches.append(launch)
        works.append(stage_work(group, p.places, own))
    scratch = {
        place.name: Arg(place.name, "output", place.shape, place.dtype)
        for place in p.places.values()
        if place.name not in own and any(place.name in launch.operands for launch in launches)
    }
    return Kernel(
        name, None, p.args, in_turn(*works) if len(works) > 1 else works[0],
        features=frozenset({"cuda"}), notes=p.notes,
        device=DeviceCode("\n".join(texts), tuple(launches), scratch),
    )  # fmt: skip


class CudaTir(Schedule):
    """Any generic function whose blocks assign, or reduce, element by element."""

    name = "tir.cuda"
    op = functions.OP
    config = BlocksConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Functions that are known here and that there is text for."""
        if workload.op != self.op or hardware.kind != "cuda":
            return False
        try:
            return not _refusal(workload)
        except UsageError:
            return False

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Threads of a block and of a reduction, and one launch or several."""
        p = _prepared(workload)
        default = _default(p)
        shared = any(s.joined is not None and s.alongside and s.terms > 1 for s in p.stages)
        return Space(
            BlocksConfig,
            {
                "threads": (64, 128, 256, 512),
                "team": (1, 8, 32, 64, 128, 256, 512) if shared else (1,),
                "rows": (False, True) if p.in_rows else (False,),
            },
            default,
            lambda c: c.team <= c.threads and fits(hardware, threads=c.threads, registers=64),
        )

    def lower(self, workload: Workload, config: BlocksConfig, hardware: Hardware) -> Kernel:
        """Print the function."""
        name = kernel_name(self, workload, config, hardware)
        kernel = _lowered(_prepared(workload), name, config)
        return replace(kernel, counts=covering(kernel.counts, get_op(self.op).counts(workload)))


@lru_cache(maxsize=256)
def _prepared(workload: Workload) -> Prepared:
    return prepared(functions.function_of(workload))


@lru_cache(maxsize=256)
def _refusal(workload: Workload) -> str:
    """Return why there is no kernel of a known function; empty if there is one."""
    functions.function_of(workload)
    try:
        p = _prepared(workload)
        _lowered(p, "tried", _default(p))
    except ValueError as error:
        return str(error)
    return ""
