"""One `bench` of kernels: for each workload all candidates, peers and the roof in one interleaved run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mimo_compile.bench.contest import Contestant, Row, compete, ratio_of
from mimo_compile.bench.kernels import contestants, picks
from mimo_compile.bench.peers import Ask, LeftOut, get_peer
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


@dataclass(slots=True)
class Comparison:
    """What one workload's runs gave."""

    rows: list[Row] = field(default_factory=list)
    """Rows of one cache state were interleaved; its roof rows come last."""
    left_out: list[LeftOut] = field(default_factory=list)


def cold_bytes(hardware: Hardware) -> int:
    """Return how much memory must be touched between two uses so that caches hold nothing of it."""
    return max(4 * hardware.l3_bytes, 256 << 20)


def missing_peers(names: Sequence[str]) -> list[LeftOut]:
    """Return what is to be said of peers whose packages are not installed."""
    return [m for m in (get_peer(name).missing() for name in names) if m is not None]


def bench_workload(
    workload: Workload,
    hardware: Hardware,
    db: Database | None,
    settings: Settings,
    log: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Compare everything that can compute one workload; peers without their package are skipped.

    Every candidate of ours was checked against the op's reference before it was timed, and every peer
    against float64 over its own weights; what is wrong or impossible is named in ``left_out``.

    Raises:
        VerificationError: one of our candidates is wrong.
    """
    op = get_op(workload.op)
    inputs = op.make_inputs(workload, np.random.default_rng(settings.seed))
    chosen = picks(workload, hardware, db, every_schedule=settings.every_schedule)
    counts = op.counts(workload)
    limit, memory = cold_bytes(hardware), settings.memory_bytes
    found = Comparison()
    if not chosen:
        found.left_out.append(LeftOut("mimo", "no schedule computes it"))
    for cache in settings.caches:
        entrants = contestants(workload, hardware, chosen, inputs, [cache], limit, memory)
        for name in settings.peers:
            peer = get_peer(name)
            if peer.missing() is not None:
                continue
            log(f"{workload} {cache}: {name}")
            ask = Ask(workload, hardware, inputs, cache, limit, memory)
            entered, left_out = peer.enter(ask)
            entrants += entered
            found.left_out += [o for o in left_out if o not in found.left_out]
        moved = counts.bytes.get("dram", 0.0)
        entrants.append(read_contestant(str(workload), hardware, moved, cache, limit, memory))
        entrants.append(replace(work_contestant(str(workload), hardware, counts), cache=cache))
        rows = compete(
            entrants, rounds=settings.rounds, batch_s=settings.batch_s, meter=settings.meter
        )
        found.rows += with_ratio(with_roof(rows, moved, counts.flops))
        entrants.clear()
        found.rows = [replace(r, contestant=_without_sets(r.contestant)) for r in found.rows]
        gc.collect()
    return found


def _without_sets(contestant: Contestant) -> Contestant:
    """Let go of the arguments: those of all rows of a suite would fill the memory."""
    return replace(contestant, call=_finished, sets=(), prepare=_finished)


def _finished(*_: object) -> None:
    raise RuntimeError("this contestant's run is over")


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


def with_ratio(rows: Sequence[Row]) -> list[Row]:
    """Put beside each row of one run its time over that of our fastest, where ours took part."""
    ours = [r for r in rows if r.contestant.impl == "mimo"]
    if not ours:
        return list(rows)
    best = min(ours, key=lambda r: r.median_us)
    return [
        r if r.contestant.impl.startswith("roof") else replace(r, ratio=ratio_of(r, best))
        for r in rows
    ]
