"""How much memory a comparison takes, counted before anything of it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mimo_compile.bench.oracle import (
    PART_HEADS,
    PART_TOKENS,
    WHOLE_BYTES,
    float64_bytes,
    visible_keys,
)
from mimo_compile.bench.peers.base import LeftOut
from mimo_compile.bench.runnable import copies
from mimo_compile.ir.caches import single_format
from mimo_compile.ir.kv_groups import grouped, tail_of
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.pages import paged
from mimo_compile.ir.workload import Workload

SPARE_BYTES = 1 << 30
"""Left to the libraries, to compilers of peers and to other programs."""


def needed_bytes(
    workload: Workload, peers: Sequence[str], cold_bytes: int, memory_bytes: int
) -> float:
    """Return about how many bytes a comparison holds at its peak; 0 for ops whose operands are small.

    Args:
        workload: What is compared; only attention is counted.
        peers: Names of those who take part; all of torch's hold the same keys and values.
        cold_bytes: What the argument sets of each contestant hold together; 0 where only hot ones run.
        memory_bytes: Limit of the argument sets of one contestant.
    """
    op = get_op(workload.op)
    if workload.op != "cached_attention":
        return 0.0
    p = op.full(workload)
    numbers = float(
        p["b"] * p["kv"] * (p["d"] + p["dv"])
    )  # of one key with its value, in each sequence
    width = _cell_bytes(p)
    keys, caches = visible_keys(p), numbers * p["cap"]
    if paged(p):
        caches = numbers / p["b"] * p["pool"] * p["page"]
    rows = 4.0 * p["b"] * p["t"] * p["h"] * (p["d"] + p["dv"])

    def sets(each: float) -> float:
        return each * copies(int(each), cold_bytes, memory_bytes)

    # drawn, packed, and copied behind guards
    made: float = 4 * caches + rows + width * caches + sets(width * caches)
    if not any(name.startswith("torch") for name in peers):
        return made + max(_reference(p), sets(width * numbers * keys))
    theirs: float = sets(4 * numbers * keys) + sets(2 * numbers * keys) + 8 * rows
    masks: float = 10.0 * p["t"] * keys + 3.0 * memory_bytes if p["t"] > 1 else 0.0
    return made + max(_reference(p), sets(width * numbers * keys) + theirs + masks)


def _cell_bytes(p: Mapping[str, Any]) -> float:
    """Return the bytes of a number of the packed caches; of those in groups with what it shares."""
    fmt = grouped(p)
    if fmt is None:
        return single_format(p["c"]).bytes
    codes = fmt.bytes_of(p["d"], keys=True) + fmt.bytes_of(p["dv"], keys=False)
    return float(codes / (p["d"] + p["dv"]) + 4.0 * tail_of(p, fmt) / p["cap"])


def _reference(p: Mapping[str, Any]) -> float:
    """Return what the largest part holds: keys and values for each head, both again masked, and scores."""
    whole = float64_bytes(p)
    if whole > WHOLE_BYTES:
        whole = float64_bytes({**p, "h": PART_HEADS, "t": min(p["t"], PART_TOKENS)})
    return 3.0 * whole


def too_large(needed: float, available: float | None = None) -> LeftOut | None:
    """Say that a comparison does not fit into the memory that is free, or return None.

    Args:
        needed: `needed_bytes`.
        available: Bytes that are free; asked of the system where None.
    """
    if not needed:
        return None
    if available is None:
        import psutil

        available = float(psutil.virtual_memory().available)
    if needed + SPARE_BYTES <= available:
        return None
    gb = 1e9
    return LeftOut(
        "every implementation",
        f"they would need about {(needed + SPARE_BYTES) / gb:.1f} GB of memory, "
        f"{available / gb:.1f} GB are free",
        "take fewer keys (--suite NAME:cap=4096), or fewer --peers",
    )
