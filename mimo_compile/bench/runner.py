"""One `bench` of kernels: for each workload all candidates, peers and the roof in one interleaved run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mimo_compile.bench.contest import Contestant, Row, compete
from mimo_compile.bench.kernels import contestants, picks
from mimo_compile.bench.peers import known_peers
from mimo_compile.bench.roof import read_contestant, work_contestant
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.search.database import Database
from mimo_compile.search.meters import Meter


@dataclass(frozen=True, slots=True)
class Settings:
    """How a comparison is run."""

    peers: Sequence[str] = ("torch",)
    caches: Sequence[str] = ("hot", "cold")
    rounds: int = 11
    batch_s: float = 0.02
    seed: int = 0
    every_schedule: bool = False
    """Let each schedule's default take part, beside the best known candidate."""
    memory_bytes: int = 1 << 30
    """Limit of the argument sets of one contestant."""
    meter: Meter | None = None


def cold_bytes(hardware: Hardware) -> int:
    """Return how much memory must be touched between two uses so that caches hold nothing of it."""
    return max(4 * hardware.l3_bytes, 256 << 20)


def bench_workload(
    workload: Workload, hardware: Hardware, db: Database | None, settings: Settings
) -> list[Row]:
    """Compare everything that can compute one workload; rows of one cache state were interleaved.

    The roof rows come last for each cache state. Every candidate of ours was checked against the op's
    reference before it was timed.

    Raises:
        VerificationError: one of our candidates is wrong.
    """
    op = get_op(workload.op)
    inputs = op.make_inputs(workload, np.random.default_rng(settings.seed))
    chosen = picks(workload, hardware, db, every_schedule=settings.every_schedule)
    counts = op.counts(workload)
    limit = cold_bytes(hardware)
    rows: list[Row] = []
    for cache in settings.caches:
        field = contestants(
            workload, hardware, chosen, inputs, [cache], limit, settings.memory_bytes
        )
        for name in settings.peers:
            peer: Callable[..., list[Contestant]] = known_peers()[name]
            field += peer(workload, hardware, inputs, cache, limit, settings.memory_bytes)
        moved = counts.bytes.get("dram", 0.0)
        field.append(
            read_contestant(str(workload), hardware, moved, cache, limit, settings.memory_bytes)
        )
        field.append(replace(work_contestant(str(workload), hardware, counts), cache=cache))
        found = compete(
            field, rounds=settings.rounds, batch_s=settings.batch_s, meter=settings.meter
        )
        rows += with_roof(found, moved, counts.flops)
    return rows


def with_roof(rows: Sequence[Row], moved: float, flops: float) -> list[Row]:
    """Put beside each row what the roof kernels of its run allow for the bytes it must move.

    A peer that stores its weights wider is measured against the roof of the workload's own format, so
    that shares of one workload compare.
    """
    *entries, read, work = rows
    move_us = read.median_us * moved / max(read.contestant.bytes, 1.0)
    work_us = work.median_us * flops / work.contestant.operations
    roof_us = max(move_us, work_us)
    return [*(replace(r, roof_us=roof_us) for r in entries), read, work]
