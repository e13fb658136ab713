"""Work of a kernel from its loops alone: bytes by memory level, share of the busiest thread, traits.

A schedule says which arrays its loops pass over and how much else passes by before an array comes
again; from that and the sizes of the caches follows the level that each pass reads from. No code is
generated, so the search ranks thousands of configs a second.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware


@dataclass(frozen=True, slots=True)
class Stream:
    """An array that a loop nest passes over."""

    bytes: float
    """Distinct bytes."""
    again: tuple[tuple[float, float], ...] = ()
    """For each loop around it: how many times it passes over the array, and the bytes that one of its
    turns touches (what a cache must hold for the next turn to find the array there)."""
    made: bool = False
    """The kernel itself wrote it just before, so that it is read from where there was room for it."""


@dataclass(frozen=True, slots=True)
class Tile:
    """The innermost loop: what stays in registers and what it reads."""

    rows: float
    """Vectors of accumulators along the vectorised axis."""
    tokens: float
    """Accumulators that share each of these vectors' operands."""
    bytes: float
    """Bytes that one run of the loop touches."""
    lanes: int = 16
    """Elements of an accumulator."""
    sums: float = 1.0
    """Sums that are in flight at least: a tile with fewer accumulators gives them several registers."""


def moved(streams: Iterable[Stream], hardware: Hardware) -> dict[str, float]:
    """Return the bytes that cross into the core from each level of `ir.counts.LEVELS`.

    A pass is served by the nearest cache that holds what was touched since the pass before; the first
    one comes from memory.
    """
    # bytes from a level are those that the cache in front of it did not hold
    held = {"l1": 0, "l2": hardware.l1d_bytes, "l3": hardware.l2_bytes, "dram": hardware.l3_bytes}
    out = dict.fromkeys(held, 0.0)
    for stream in streams:
        for level, cache in held.items():
            size = stream.bytes
            for times, touched in stream.again:
                if touched > cache:
                    size *= times
            if not (stream.made and cache and size <= cache):
                out[level] += size
    return out


def busiest(tasks: int, threads: int) -> float:
    """Return the share of equal tasks that the busiest thread does: each takes one run of them."""
    return -(-tasks // min(tasks, threads)) / tasks


def work(
    ops: dict[str, float],
    streams: Iterable[Stream],
    hardware: Hardware,
    *,
    tasks: int,
    share: float,
    useful: float,
    tile: Tile,
) -> Counts:
    """Return the counts of a tiled kernel.

    Args:
        ops: Arithmetic by kind.
        streams: What its loops read and write.
        hardware: Whose caches decide where bytes come from.
        tasks: Independent tasks of the widest phase; 1 if all runs on one thread.
        share: Part of the work that the busiest thread does.
        useful: Part of the arithmetic that is not padding.
        tile: The innermost loop.
    """
    rows, tokens = max(tile.rows, 1.0), max(tile.tokens, 1.0)
    traits = {
        "tasks": float(tasks),
        "share": share,
        "useful": useful,
        "lanes": float(tile.lanes),
        "sums": max(rows * tokens, tile.sums),
        "loads": (rows + tokens) / (rows * tokens),
        "tile_bytes": tile.bytes,
    }
    return Counts(ops, moved(streams, hardware), traits)
