"""A call's int8 copies of the keys and values of a cache, in the order in which dots of bytes read them.

Bit for bit as `ir.ops.int8_attention` defines it: each slot's row by its own largest magnitude. Keys lie
``[KV, blocks, ceil(D/4), 16]`` words of four channels (plus 128: the unsigned side of a dot); values
``[KV, slots/4, DV up to 16]`` words of four slots. Slots are filled up to whole tiles of weights.

Rows with a NaN or an infinity have any codes; a key's scale is NaN then, of a value the logarithm. Largest
magnitudes are compared as integers, for which a NaN is above all numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mimo_compile.ir.ops.int8_attention import LEAST, TILE
from mimo_compile.schedules.attention.layout import round_up
from mimo_compile.schedules.attention.reach import fixed
from mimo_compile.schedules.emit.build import Register, T, bind, load, loop, store, when, workspace
from mimo_compile.schedules.emit.vector import LANES, log2, rint, splat

BIAS = 128
"""What codes of keys are stored above their values."""
UPPER = -0x10000


def slots_of(p: Mapping[str, Any]) -> int:
    """Return the slots of the copies."""
    return int(-(-p["cap"] // TILE) * TILE)


def copies_bytes(p: Mapping[str, Any], *, values: bool) -> int:
    """Return the scratch bytes of `Copies`."""
    slots = int(p["kv"]) * slots_of(p)
    keys = slots * (4 * -(-int(p["d"]) // 4) + 4)
    return keys + (slots * (round_up(p["dv"]) + 8) if values else 0)


@dataclass(frozen=True, slots=True)
class Keys:
    """Quantised keys."""

    codes: Any
    scale: Any
    """``[KV, slots]``."""


@dataclass(frozen=True, slots=True)
class Values:
    """Quantised values."""

    codes: Any
    log_scale: Any
    """``[KV, slots]``, base 2; 0 where nothing was written."""
    inverse: Any
    """One over the scale ``[KV, slots]``; 0 where nothing was written."""


class Copies:
    """Emits the copies; ``values`` is None where values stay floats."""

    def __init__(self, p: Mapping[str, Any], k: Any, v: Any, *, values: bool) -> None:
        self.p, self.k, self.v = p, k, v
        self.pairs = p["c"] == "bf16"
        kv, slots = int(p["kv"]), slots_of(p)
        self.quads = -(-int(p["d"]) // 4)
        self.columns = round_up(p["dv"]) // LANES
        self.keys = Keys(
            workspace((kv, slots // LANES, self.quads, LANES), "int32"),
            workspace((kv, slots), "float32"),
        )
        self.values: Values | None = None
        if values:
            words = workspace((kv, slots // 4, self.columns * LANES), "int32")
            scales = (workspace((kv, slots), "float32") for _ in range(2))
            self.values = Values(words, *scales)

    def emit(self, pos: Any, *, parallel: bool) -> None:
        """Copy every tile that some query may see, or of which a slot was written."""
        p, tiles = self.p, slots_of(self.p) // TILE
        with loop(int(p["kv"]) * tiles, parallel=parallel) as task:
            head, tile = bind(task // tiles), fixed(task % tiles)
            start, end = fixed(pos[0]), fixed(pos[0] + pos[1])
            written = fixed(T.min(end, T.int32(p["cap"])))
            needed = tile * TILE < written
            if p["window"]:
                old = (tile + 1) * TILE <= start - p["window"]
                needed = T.And(needed, T.Not(T.And(end <= T.int32(p["cap"]), old)))
            with when(needed), loop(TILE // LANES) as u:
                block = bind(tile * (TILE // LANES) + u)
                # a partial tile ends behind the cache
                with when(block < round_up(p["cap"]) // LANES):
                    self._keys(head, block)
                if self.values is not None:
                    self._block_of_values(self.values, head, block, written)

    # -- keys: lanes are slots ---------------------------------------------------------------------

    def _channels(self, head: Any, block: Any, quad: Any, count: int) -> list[Any]:
        """Return ``count`` channels from ``4 * quad`` on, 16 slots each."""
        if not self.pairs:
            at = quad * 4
            return [bind(load(self.k, head, block, at + c, 0, lanes=LANES)) for c in range(count)]
        out: list[Any] = []
        for c in range(0, count, 2):
            line = load(self.k, head, block, quad * 2 + c // 2, 0, lanes=2 * LANES)
            out += _numbers(bind(T.reinterpret("int32x16", line)))
        return out[:count]

    def _each_quad(self, step: Callable[[Any, int], None]) -> None:
        whole, rest = divmod(int(self.p["d"]), 4)
        if whole:
            with loop(whole) as quad:
                step(quad, 4)
        if rest:
            step(whole, rest)

    def _keys(self, head: Any, block: Any) -> None:
        largest = Register("int32", LANES, splat(T.int32(0)))

        def measure(quad: Any, count: int) -> None:
            for value in self._channels(head, block, quad, count):
                largest.set(T.max(largest.get(), magnitude(value)))

        self._each_quad(measure)
        amax = bind(T.reinterpret("float32x16", largest.get()))
        scale = T.Select(finite(amax), amax / splat(127.0), splat(math.nan))
        store(self.keys.scale, scale, head, block * LANES, lanes=LANES)
        by = bind(inverse_of(amax))

        def write(quad: Any, count: int) -> None:
            found = self._channels(head, block, quad, count)
            parts = [code(v, by) + splat(T.int32(BIAS)) for v in found]
            store(self.keys.codes, joined(parts), head, block, quad, 0, lanes=LANES)

        self._each_quad(write)

    # -- values: lanes are channels, four slots share a word ---------------------------------------

    def _four(self, head: Any, quad: Any, column: Any) -> list[Any]:
        """Return 16 channels of each of four slots from ``4 * quad`` on."""
        at = column * LANES
        if not self.pairs:
            slot = quad * 4
            return [bind(load(self.v, head, slot + c, at, lanes=LANES)) for c in range(4)]
        out: list[Any] = []
        for line in range(2):
            words = load(self.v, head, quad * 2 + line, 2 * at, lanes=2 * LANES)
            out += _numbers(bind(T.reinterpret("int32x16", words)))
        return out

    def _block_of_values(self, values: Values, head: Any, block: Any, written: Any) -> None:
        amax, by = Register("int32", LANES, splat(T.int32(0))), Register("float32", LANES)
        inside = round_up(self.p["cap"]) // LANES
        slots = bind(T.ramp(block * LANES, 1, LANES))
        there = slots < T.broadcast(written, LANES)
        with when(block < inside), loop(LANES // 4) as i:
            self._measure_four(head, bind(block * 4 + i), i, amax)
        largest = bind(T.reinterpret("float32x16", T.Select(there, amax.get(), splat(T.int32(0)))))
        scale = bind(T.max(largest / splat(127.0), splat(LEAST)))  # a number of a NaN, too
        at = (head, block * LANES)
        log_scale = T.Select(finite(largest), log2(scale), splat(math.nan))
        store(values.log_scale, T.Select(there, log_scale, splat(0.0)), *at, lanes=LANES)
        inverse = T.Select(there, splat(1.0) / scale, splat(0.0))
        store(values.inverse, inverse, *at, lanes=LANES)
        by.set(inverse_of(largest))
        with loop(LANES // 4) as i:
            quad = bind(block * 4 + i)
            seen = [splat(bind(block * LANES + i * 4 + c)) < splat(written) for c in range(4)]
            factors = [bind(splat(by.lane(i * 4 + c))) for c in range(4)]
            with loop(self.columns) as column:
                out = Register("int32", LANES, splat(T.int32(0)))
                with when(block * LANES + i * 4 < written):
                    found = self._four(head, quad, column)
                    parts = [
                        T.Select(s, code(v, f), splat(T.int32(0)))
                        for s, v, f in zip(seen, found, factors, strict=True)
                    ]
                    out.set(joined(parts))
                store(values.codes, out.get(), head, quad, column * LANES, lanes=LANES)

    def _measure_four(self, head: Any, quad: Any, i: Any, amax: Register) -> None:
        parts = [Register("int32", LANES, splat(T.int32(0))) for _ in range(4)]
        dv = int(self.p["dv"])

        def take(column: Any, lanes: int) -> None:
            for part, value in zip(parts, self._four(head, quad, column), strict=True):
                size = magnitude(value)
                if lanes < LANES:  # what fills up the last vector may be anything
                    inside = T.ramp(T.int32(0), 1, LANES) < splat(T.int32(lanes))
                    size = T.Select(inside, size, splat(T.int32(0)))
                part.set(T.max(part.get(), size))

        if dv // LANES:
            with loop(dv // LANES) as column:
                take(column, LANES)
        if dv % LANES:
            take(dv // LANES, dv % LANES)
        for c, part in enumerate(parts):
            top = T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.smax", part.get())
            store(amax.buffer, top, i * 4 + c)


def _numbers(words: Any) -> list[Any]:
    """Return the first and the second number of each pair as float32."""
    first = T.reinterpret("float32x16", T.shift_left(words, splat(T.int32(16))))
    second = T.reinterpret("float32x16", T.bitwise_and(words, splat(T.int32(UPPER))))
    return [bind(first), bind(second)]


def magnitude(value: Any) -> Any:
    """Return the magnitude of 16 numbers, as integers of the same order."""
    return T.bitwise_and(T.reinterpret("int32x16", value), splat(T.int32(0x7FFFFFFF)))


def finite(amax: Any) -> Any:
    """Say of 16 magnitudes whether they are numbers."""
    return amax < splat(math.inf)


def inverse_of(amax: Any) -> Any:
    """Return what 16 rows with these largest magnitudes are multiplied by; 0 for rows of zeros."""
    return T.Select(amax > splat(0.0), splat(127.0) / amax, splat(0.0))


def code(value: Any, by: Any) -> Any:
    """Return the int8 codes of 16 numbers, as int32, bound."""
    limit = T.min(splat(127.0), T.max(splat(-127.0), rint(value * by)))
    return bind(T.cast(limit, "int32x16"))


def joined(parts: list[Any]) -> Any:
    """Return words of the lowest bytes of up to four vectors, the first in the lowest."""
    out = T.bitwise_and(parts[0], splat(T.int32(255)))
    for i, part in enumerate(parts[1:], 1):
        byte = T.bitwise_and(part, splat(T.int32(255)))
        out = T.bitwise_or(out, T.shift_left(byte, splat(T.int32(8 * i))))
    return out
