"""Our own contestants: a candidate lowered, compiled, checked against the op's reference, ready to call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mimo_compile import _tvm
from mimo_compile.bench.contest import Contestant
from mimo_compile.bench.draws import draws_of
from mimo_compile.bench.oracle import Oracle
from mimo_compile.bench.runnable import Runnable
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.search.database import Database
from mimo_compile.search.lookup import known_results, measured_here
from mimo_compile.search.space import JointSpace


@dataclass(frozen=True, slots=True)
class Pick:
    """A candidate to compare with: which, and why."""

    schedule: str
    config: dict[str, Any]
    source: str
    """``measured`` (best record), ``near`` (that of another machine or number of threads), ``default`` (no
    record) or ``given``."""


def picks(
    workload: Workload, hardware: Hardware, db: Database | None, *, every_schedule: bool = False
) -> list[Pick]:
    """Return the best known candidate (else the preferred default), optionally each schedule's default."""
    found: list[Pick] = []
    schedules = schedules_for(workload, hardware)
    if not schedules:
        return found
    for best, result in known_results(JointSpace(workload, hardware, schedules), db)[:1]:
        source = "measured" if measured_here(result, hardware) else "near"
        found.append(Pick(best.schedule, best.config, source))
    for schedule in schedules:
        if found and not every_schedule:
            break
        config = schedule.config_to_json(schedule.space(workload, hardware).default)
        pick = Pick(schedule.name, config, "default")
        if all((p.schedule, p.config) != (pick.schedule, pick.config) for p in found):
            found.append(pick)
    return found


def contestants(
    workload: Workload,
    hardware: Hardware,
    chosen: Sequence[Pick],
    inputs: Mapping[str, Array],
    caches: Sequence[str],
    cold_bytes: int,
    memory_bytes: int,
    oracle: Oracle | None = None,
) -> list[Contestant]:
    """Build and check candidates and return one contestant for each cache state.

    Raises:
        VerificationError: a candidate is wrong: it may not compete.
    """
    counts = get_op(workload.op).counts_of(workload, inputs)
    draws = draws_of(workload, inputs)

    def use_threads() -> None:
        _tvm.set_threads(hardware.threads)

    out = []
    for pick in chosen:
        runnable = Runnable(workload, get_schedule(pick.schedule), pick.config, hardware, inputs)
        use_threads()
        runnable.check(oracle)
        for cache in caches:
            contestant = Contestant(
                op=str(workload),
                impl="mimo",
                threads=hardware.threads,
                cache=cache,
                call=runnable,
                sets=runnable.sets(cold_bytes if cache == "cold" else 0, memory_bytes, draws),
                bytes=counts.bytes.get("dram", 0.0),
                operations=counts.flops,
                schedule=pick.schedule,
                config=pick.config,
                prepare=use_threads,
                bits_per_weight=bits_per_weight(workload, runnable),
            )
            out.append(contestant)
    return out


def bits_per_weight(workload: Workload, runnable: Runnable) -> float | None:
    """Return the bits that a candidate stores for one weight, as packed, scales included.

    Of attention: for one number of the caches. None for ops without either.
    """
    p = get_op(workload.op).full(workload)
    role = "weight"
    if workload.op == "mpgemm":
        count = p["n"] * p["k"]
    elif workload.op == "moe":
        count = 3 * p["e"] * p["d"] * p["f"]
    elif workload.op == "cached_attention":
        slots = p["pool"] * p["page"] or p["b"] * p["cap"]
        count, role = slots * p["kv"] * (p["d"] + p["dv"]), "state"
    else:
        return None
    stored = sum(
        runnable.arrays[a.name].nbytes
        for a in runnable.kernel.args
        if a.role == role and a.name != "bias"
    )
    return float(8 * stored / count)
