"""One `bench` of kernels: for each workload all candidates, peers and the roof in one interleaved run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mimo_compile.bench.contest import Contestant, Row, compete, ratio_of
from mimo_compile.bench.kernels import Pick, contestants, picks
from mimo_compile.bench.memory import needed_bytes, too_large
from mimo_compile.bench.oracle import Oracle
from mimo_compile.bench.peers import Ask, LeftOut, get_peer
from mimo_compile.bench.roof import read_contestant, roof_counts, work_contestant
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
    available_bytes: float | None = None
    """Memory that a comparison may take; None: what is free."""
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
    against float64 over its own weights; what is wrong or impossible is named in ``left_out``, a workload
    too large for the memory as well.

    Raises:
        VerificationError: one of our candidates is wrong.
    """
    op = get_op(workload.op)
    limit, memory = cold_bytes(hardware), settings.memory_bytes
    present = [n for n in settings.peers if get_peer(n).missing() is None]
    largest = limit if "cold" in settings.caches else 0
    need = needed_bytes(workload, present, largest, memory)
    if refused := too_large(need, settings.available_bytes, workload.op):
        return Comparison(left_out=[refused])
    inputs = op.make_inputs(workload, np.random.default_rng(settings.seed))
    chosen = picks(workload, hardware, db, every_schedule=settings.every_schedule)
    oracle = Oracle(workload, inputs)
    found = Comparison()
    if not chosen:
        found.left_out.append(LeftOut("mimo", "no schedule computes it"))
    for cache in settings.caches:
        ask = Ask(workload, hardware, inputs, cache, limit, memory, oracle)
        found.rows += _one_state(ask, chosen, settings, present, found.left_out, log)
        gc.collect()
    return found


def _one_state(
    ask: Ask,
    chosen: Sequence[Pick],
    settings: Settings,
    present: Sequence[str],
    left_out: list[LeftOut],
    log: Callable[[str], None],
) -> list[Row]:
    """Compare in one cache state; all arguments are let go on return, before those of the next are made."""
    workload, hardware, inputs, cache = ask.workload, ask.hardware, ask.inputs, ask.cache
    limit, memory = ask.cold_bytes, ask.memory_bytes
    entrants = contestants(workload, hardware, chosen, inputs, [cache], limit, memory, ask.oracle)
    for name in present:
        log(f"{workload} {cache}: {name}")
        entered, out = get_peer(name).enter(ask)
        entrants += entered
        left_out += [o for o in out if o not in left_out]
    counts = roof_counts(workload, inputs)
    moved = counts.bytes.get("dram", 0.0)
    entrants.append(read_contestant(str(workload), hardware, moved, cache, limit, memory))
    entrants.append(replace(work_contestant(str(workload), hardware, counts), cache=cache))
    rows = compete(entrants, rounds=settings.rounds, batch_s=settings.batch_s, meter=settings.meter)
    rows = with_ratio(with_roof(rows, moved, counts.flops))
    return [replace(r, contestant=_without_sets(r.contestant)) for r in rows]


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
