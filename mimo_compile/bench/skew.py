"""What it costs that tokens choose some experts more often than others.

A cell is a layer of experts. Its kernel runs over the same tokens and weights with one load after the other
(`ir.ops.moe.LOADS`): all experts alike, as real routers choose, and all tokens the same ones. Compiled code
cannot know the load, so it is one kernel with one config for all; it was checked on each. All take turns in
one run, weights come from memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mimo_compile import _tvm
from mimo_compile.bench.contest import Contestant, Row, compete, ratio_of
from mimo_compile.bench.draws import draws_of
from mimo_compile.bench.kernels import bits_per_weight, picks
from mimo_compile.bench.memory import needed_bytes, too_large
from mimo_compile.bench.oracle import Oracle
from mimo_compile.bench.peers import LeftOut
from mimo_compile.bench.roof import read_contestant, roof_counts, work_contestant
from mimo_compile.bench.runnable import Runnable
from mimo_compile.bench.runner import cold_bytes, with_roof
from mimo_compile.bench.suites import LAYERS, chosen
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.ops.moe import LOADS, Moe
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules import get_schedule
from mimo_compile.search.database import Database

NAME = "skew"
"""Of the suite."""
EVEN = "even"
"""The load that others are compared with."""


def cells(text: str) -> list[Workload]:
    """Return the layers of ``skew`` or, with conditions, some of them: ``skew:t=16,w=bf16``.

    Raises:
        UsageError: none is kept; the remedy lists what there is.
    """
    several = [entry for entry in LAYERS if not entry.startswith("moe:t=1,")]
    return [parse_workload(e) for e in chosen(NAME, several, text.partition(":")[2])]


@dataclass(frozen=True, slots=True)
class Measured:
    """One load of a cell."""

    workload: Workload
    load: str
    row: Row
    hit: int
    """Experts that tokens chose."""
    busiest: float
    """Slots of the expert that has most, over the mean of all experts."""
    time: tuple[float, float, float]
    """Its time over that of the even load: median, p10 and p90 over rounds."""

    def json(self) -> dict[str, Any]:
        """Return the row with the comparison."""
        return {
            **self.row.json(), "load": self.load, "experts_hit": self.hit, "busiest": self.busiest,
            "time_ratio": self.time[0], "time_ratio_p10": self.time[1], "time_ratio_p90": self.time[2],
        }  # fmt: skip


def bench_cell(
    workload: Workload, hardware: Hardware, db: Database | None, rounds: int, seed: int = 0,
    memory_bytes: int = 1 << 30, available_bytes: float | None = None,
) -> list[Measured] | LeftOut:  # fmt: skip
    """Measure all loads of a layer, in turns; say so where memory or schedules are missing.

    Raises:
        VerificationError: the kernel is wrong for one of the loads.
    """
    limit = cold_bytes(hardware)
    need = needed_bytes(workload, [], limit, memory_bytes)
    if refused := too_large(need, available_bytes, workload.op):
        return refused
    found = picks(workload, hardware, db)
    if not found:
        return LeftOut("mimo", "no schedule computes it")
    pick, op = found[0], get_op(workload.op)
    inputs = op.make_inputs(workload, np.random.default_rng(seed))
    _tvm.set_threads(hardware.threads)
    schedule = get_schedule(pick.schedule)
    runnable = Runnable(workload, schedule, pick.config, hardware, inputs)
    given = {load: {**inputs, "ids": _ids(workload, load, seed)} for load in LOADS}
    field = []
    for load, own in given.items():
        runnable.arrays["ids"][...] = own["ids"]
        runnable.check(Oracle(workload, own))
        counts = op.counts_of(workload, own)
        field.append(
            Contestant(
                f"{workload},load={load}", "mimo", hardware.threads, "cold", runnable,
                runnable.sets(limit, memory_bytes, draws_of(workload, own)), counts.bytes["dram"],
                counts.flops, pick.schedule, pick.config, bits_per_weight=bits_per_weight(workload, runnable),
            )
        )  # fmt: skip
    most = roof_counts(workload, given[EVEN])
    read = read_contestant(str(workload), hardware, most.bytes["dram"], "cold", limit, memory_bytes)
    *rows, move, work = compete(
        [*field, read, work_contestant(str(workload), hardware, most)], rounds=rounds
    )
    even = rows[list(given).index(EVEN)]
    out = []
    for (load, own), row in zip(given.items(), rows, strict=True):
        counts = op.counts_of(workload, own)
        beside = with_roof([row, move, work], counts.bytes["dram"], counts.flops)[0]
        slots = np.bincount(own["ids"].flatten(), minlength=op.full(workload)["e"])
        free = replace(beside, contestant=replace(beside.contestant, sets=()))
        out.append(
            Measured(
                workload, load, free, int((slots > 0).sum()), float(slots.max() / slots.mean()),
                ratio_of(row, even),
            )
        )  # fmt: skip
    return out


def _ids(workload: Workload, load: str, seed: int) -> Array:
    own = Moe().workload(**{**dict(workload.params), "load": load})
    return Moe().draw_ids(own, np.random.default_rng(seed))
