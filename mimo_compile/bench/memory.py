"""How much memory a comparison takes, counted before anything of it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mimo_compile.bench.draws import copies
from mimo_compile.bench.oracle import (
    PART_HEADS,
    PART_TOKENS,
    WHOLE_BYTES,
    float64_bytes,
    visible_keys,
)
from mimo_compile.bench.peers.base import LeftOut
from mimo_compile.ir.caches import single_format
from mimo_compile.ir.formats import parse_weight_format
from mimo_compile.ir.kv_groups import grouped, tail_of
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.mpgemm import weight_bytes
from mimo_compile.ir.ops.pages import paged
from mimo_compile.ir.workload import Workload

_FEWER = {
    "cached_attention": "fewer keys (--suite NAME:cap=4096)",
    "moe": "fewer experts or tokens (--suite NAME:e=64,t=1)",
}
EXPERT_PEERS = ("torch", "torch-compile", "transformers")
"""Peers that compute experts."""
SPARE_BYTES = 1 << 30
"""Left to the libraries, to compilers of peers and to other programs."""


def needed_bytes(
    workload: Workload, peers: Sequence[str], cold_bytes: int, memory_bytes: int
) -> float:
    """Return about how many bytes a comparison holds at its peak; 0 for ops whose operands are small.

    Args:
        workload: What is compared; only attention and experts are counted.
        peers: Names of those who take part; all of torch's hold the same keys and values.
        cold_bytes: What the argument sets of each contestant hold together; 0 where only hot ones run.
        memory_bytes: Limit of the argument sets of one contestant.
    """
    op = get_op(workload.op)
    if workload.op == "moe":
        return _experts(workload, peers, cold_bytes, memory_bytes)
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


def _experts(workload: Workload, peers: Sequence[str], cold_bytes: int, memory_bytes: int) -> float:
    """Return `needed_bytes` of a layer of experts: all of PyTorch's forms hold the same weights."""
    op = get_op("moe")
    p = op.full(workload)
    fmt, numbers = parse_weight_format(p["w"]), 3.0 * p["e"] * p["d"] * p["f"]
    widths = {"uint8": 1, "uint16": 2, "float16": 2, "float32": 4}
    sizes = {
        a.name: math.prod(a.shape) * widths[a.dtype]
        for a in op.args(workload)
        if a.role == "weight"
    }
    drawn = 0.0
    if fmt.is_float:  # as float32 first, and their square roots' quotient once more
        drawn = 8.0 * 2 / 3 * numbers
    stored = p["e"] * (
        weight_bytes(fmt, 2 * p["f"], p["d"], p["s"]) + weight_bytes(fmt, p["d"], p["f"], p["s"])
    )
    hit = min(p["e"], p["t"] * p["k"])  # as many draws as there are others

    def sets(each: float) -> float:
        count = copies(int(each * hit / p["e"]), cold_bytes, memory_bytes)
        return float(each * -(-count // (p["e"] // hit)))

    reference = 8.0 * 20 * p["d"] * p["f"] + 8.0 * 8 * p["t"] * p["k"] * (p["d"] + 2 * p["f"])
    theirs = 0.0
    if any(name in EXPERT_PEERS for name in peers):
        own = 0.0 if fmt.is_float else sets(numbers * (fmt.bits / 8 + 4 / 32))
        twice = 2 if "torch" in peers else 1  # plain and packed
        theirs = sets(4 * numbers) + twice * sets(2 * numbers) + own + memory_bytes
    packed = stored + sets(stored)
    return float(sum(sizes.values()) + max(drawn, packed + reference, sets(stored) + theirs))


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


def too_large(
    needed: float, available: float | None = None, op: str = "cached_attention"
) -> LeftOut | None:
    """Say that a comparison does not fit into the memory that is free, or return None.

    Args:
        needed: `needed_bytes`.
        available: Bytes that are free; asked of the system where None.
        op: What is compared.
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
        f"take {_FEWER[op]}, or fewer --peers",
    )
