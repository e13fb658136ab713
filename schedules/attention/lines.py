"""Lines of 16 numbers of one key, and sums of their products, for caches that keep each key by itself."""

from __future__ import annotations

from typing import Any

from mimo_compile.schedules.emit.build import T, bind, load
from mimo_compile.schedules.emit.vector import LANES, splat


def added_up(sums: list[Any]) -> Any:
    """Return a vector whose lane ``i`` is the sum of all lanes of ``sums[i]``, of 16 vectors."""
    chunk = LANES
    while chunk > 1:
        half, count = chunk // 2, LANES // chunk

        def lanes(
            offset: int, half: int = half, chunk: int = chunk, count: int = count
        ) -> list[int]:
            starts = [v * LANES + c * chunk + offset for v in (0, 1) for c in range(count)]
            return [s + j for s in starts for j in range(half)]

        sums = [
            bind(T.Shuffle([a, b], lanes(0)) + T.Shuffle([a, b], lanes(half)))
            for a, b in zip(sums[::2], sums[1::2], strict=True)
        ]
        chunk = half
    return sums[0]


def paired(buffer: Any, *index: Any) -> Any:
    """Return 16 pairs of 16-bit numbers, each in a lane of 32 bits, bound."""
    return bind(T.reinterpret("int32x16", load(buffer, *index, lanes=2 * LANES)))


def widened(buffer: Any, *index: Any) -> Any:
    """Return 16 bfloat16 numbers as float32, bound."""
    found = T.cast(load(buffer, *index, lanes=LANES), "int32x16")
    return bind(T.reinterpret("float32x16", T.shift_left(found, splat(T.int32(16)))))


def powers(height: int, most: int = 8) -> list[tuple[int, int, int]]:
    """Return (first row, rows, count) of tiles whose rows are a power of two up to ``most``."""
    out, base, rows = [], 0, most
    while rows:
        count = (height - base) // rows
        if count:
            out.append((base, rows, count))
            base += rows * count
        rows //= 2
    return out
