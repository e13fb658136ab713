"""Low-rank adapters in a kernel: ``t = gain * A x``, and ``y + B t``; `packing` says what is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mimo_compile.schedules.emit.build import (
    Register,
    T,
    bind,
    choose,
    load,
    loop,
    prefetch,
    splat,
    store,
    vector_type,
    when,
)
from mimo_compile.schedules.emit.layout import ROWS
from mimo_compile.schedules.lora.packing import Adapters

_SUMS = 16
"""Rows of A that are summed at once: as many registers."""
_TASK_SUMS = 8
"""The same where threads share the rows."""
_CHAINS = 4
"""Additions to one register wait for each other, so the columns of B take turns."""
_AHEAD_BYTES = 2048
"""Most bytes of a block of B that are asked for ahead."""


@dataclass(slots=True)
class AdapterCode:
    """Emits the two products; buffers are the kernel's parameters."""

    adapters: Adapters
    x: Any
    ids: Any
    a: Any
    b: Any
    gain: Any
    t: Any = None
    """``[M, R]`` float32: where `project` leaves its sums."""
    ahead: int = 0
    """Row blocks ahead that B is asked for; 0: left to the CPU."""

    def chosen(self, token: Any) -> tuple[Any, Any]:
        """Return the adapter of a token, bound, and whether it is one."""
        adapter = bind(self.ids[token])
        return adapter, T.cast(adapter, "uint32") < T.uint32(self.adapters.count)

    def project_all(self, *, parallel: bool) -> None:
        """Emit ``t = gain * A x`` for the tokens that have an adapter."""
        groups, rest = divmod(self.adapters.total, _SUMS)
        with loop(self.adapters.m, parallel=parallel) as token:
            adapter, exists = self.chosen(token)
            with when(exists):
                if groups:
                    with loop(groups) as g:
                        self._project(token, adapter, g * _SUMS, _SUMS)
                if rest:
                    self._project(token, adapter, groups * _SUMS, rest)

    def project_shared(self) -> None:
        """Emit the same, a few rows of A a task, in a launch of threads that go on together afterwards.

        Everything in the launch has to be a task: what is outside of one, each thread would do.
        """
        whole, rest = divmod(self.adapters.total, _TASK_SUMS)
        pieces = whole + (rest > 0)

        def task(token: Any, group: Any) -> None:
            adapter, exists = self.chosen(token)

            def some(first: Any, rows: int) -> None:
                self._project(token, adapter, first, rows)

            with when(exists):
                if not rest:
                    some(group * _TASK_SUMS, _TASK_SUMS)
                elif not whole:
                    some(0, rest)
                else:
                    choose(
                        group < whole,
                        lambda: some(group * _TASK_SUMS, _TASK_SUMS),
                        lambda: some(whole * _TASK_SUMS, rest),
                    )

        barrier = T.attr(T.int32(0), "pragma_parallel_barrier_when_finish", 1)
        with barrier, T.parallel(0, self.adapters.m * pieces) as index:
            task(index // pieces, index % pieces)

    def _project(self, token: Any, adapter: Any, first: Any, rows: int) -> None:
        span, share = self.adapters.span, self.adapters.share
        sums = [Register("float32", ROWS, splat(T.float32(0), ROWS)) for _ in range(rows)]

        def block(at: Any, x: list[Any]) -> None:
            for j in range(0, rows, 2):
                index = (adapter, at, first + j)
                for i, values in enumerate(_unit_floats(self.a, index, min(2, rows - j), 0, ROWS)):
                    total = sums[j + i]
                    for value, four in zip(values, x, strict=True):
                        total.set(total.get() + value * four)

        whole, tail = divmod(self.adapters.k, span)
        places = [ROWS * i for i in range(share)]
        if whole:
            with loop(whole) as at:
                block(at, [bind(load(self.x, token, at * span + i, lanes=ROWS)) for i in places])
        if tail:
            zero = splat(T.float32(0), ROWS)
            rest = [Register("float32", ROWS, zero) for _ in places]
            for part, start in zip(rest, places, strict=True):
                if tail > start:
                    with loop(min(ROWS, tail - start)) as i:
                        store(part.buffer, self.x[token, whole * span + start + i], i)
            block(whole, [bind(part.get()) for part in rest])
        for j, total in enumerate(sums):
            value = T.call_llvm_pure_intrin(
                "float32", "llvm.vector.reduce.fadd", T.float32(0), total.get()
            )
            store(self.t, value * self.gain[adapter, first + j], token, first + j)

    def added(self, value: Any, token: Any, block: Any, lane: int, lanes: int) -> Any:
        """Return ``value + B t`` of rows ``16 * block + lane`` and following; a delta of zero adds nothing.

        So sums keep their bits, down to the sign of a zero, where there is no adapter or B is zero.
        """
        out = Register("float32", lanes, value)
        adapter, exists = self.chosen(token)
        with when(exists):
            self._ahead(adapter, block, lane)
            delta = self._delta(token, adapter, block, lane, lanes)
            out.set(_sum(bind(out.get()), delta, lanes))
        return out.get()

    def add_rows(self, y: Any, block: Any, token: Any, *, last: bool) -> None:
        """Emit ``y[token] += B t`` for a block of rows in memory; ``last``: it is the last one."""
        adapter, exists = self.chosen(token)
        valid = self.adapters.n - (self.adapters.row_blocks - 1) * ROWS if last else ROWS
        with when(exists):
            delta = self._delta(token, adapter, block, 0, ROWS)
            if valid == ROWS:
                old = bind(load(y, token, block * ROWS, lanes=ROWS))
                store(y, _sum(old, delta, ROWS), token, block * ROWS, lanes=ROWS)
                return
            lanes = Register("float32", ROWS, delta)
            with loop(valid) as i:
                place = block * ROWS + i
                store(y, _sum(bind(y[token, place]), bind(lanes.lane(i)), 1), token, place)

    def _delta(self, token: Any, adapter: Any, block: Any, lane: int, lanes: int) -> Any:
        columns, share = self.adapters.columns, self.adapters.share
        zero = splat(T.float32(0), lanes)
        chains = [Register("float32", lanes, zero) for _ in range(min(_CHAINS, columns))]
        base = self._part(block)

        def pair(unit: Any, first: Any, count: int) -> None:
            """Add ``count`` columns from ``first`` on, which ``unit`` and the next one hold."""
            found = _unit_floats(self.b, (adapter, block, unit), -(-count // share), lane, lanes)
            for c, weight in enumerate([w for values in found for w in values][:count]):
                value = splat(load(self.t, token, base + first + c), lanes)
                chain = chains[c % len(chains)]
                chain.set(chain.get() + weight * value)

        step = 2 * share
        rounds, rest = divmod(columns, step)
        if rounds:
            with loop(rounds) as i:
                pair(i * 2, i * step, step)
        if rest:
            pair(rounds * 2, rounds * step, rest)
        total = chains[0].get()
        for chain in chains[1:]:
            total = total + chain.get()
        return bind(total)

    def _part(self, block: Any) -> Any:
        """Return the first element of t that belongs to a block of rows."""
        place: Any = 0
        if self.adapters.columns == self.adapters.total:
            return place
        for start in self.adapters.starts:
            behind = block >= start // ROWS
            step = self.adapters.r
            if isinstance(block, int):
                place = place + step * int(behind)
            else:
                place = place + T.Select(behind, T.int32(step), T.int32(0))
        return place if isinstance(place, int) else bind(place)

    def _ahead(self, adapter: Any, block: Any, lane: int) -> None:
        """Ask for the block of B that comes ``ahead`` blocks later."""
        units, span = int(self.b.shape[2]), self.adapters.span
        unit_bytes = span * np.dtype(self.b.dtype).itemsize
        if not self.ahead or lane or units * unit_bytes > _AHEAD_BYTES:
            return
        for unit in range(0, units, max(1, 64 // unit_bytes)):
            prefetch(self.b, adapter, block + self.ahead, unit, 0)


def _sum(old: Any, delta: Any, lanes: int) -> Any:
    return T.Select(delta == splat(T.float32(0), lanes), old, old + delta)


def _unit_floats(
    buffer: Any, index: tuple[Any, ...], count: int, lane: int, lanes: int
) -> list[list[Any]]:
    """Load ``count`` (1 or 2) neighbouring units; for each its S vectors of float32, bound.

    E4M3 comes out over `packing.FP8_UNIT`: in float16, whose exponents it has, small numbers stay exact.
    """
    f32 = vector_type("float32", lanes)

    def unit(i: int, dtype: str) -> Any:
        *outer, first = index
        width = np.dtype(dtype).itemsize // np.dtype(buffer.dtype).itemsize
        raw = load(buffer, *outer, first + i, lane * width, lanes=lanes * width)
        return bind(T.reinterpret(vector_type(dtype, lanes), raw))

    if buffer.dtype == "float32":
        return [[unit(i, "float32")] for i in range(count)]
    if buffer.dtype == "uint16":
        out = []
        for i in range(count):
            word = unit(i, "int32")
            low = T.shift_left(word, splat(T.int32(16), lanes))
            high = T.bitwise_and(word, splat(T.int32(-0x10000), lanes))
            out.append([bind(T.reinterpret(f32, half)) for half in (low, high)])
        return out
    if count == 2 and lanes == ROWS:  # units of 32 bytes lie next to each other
        both = bind(T.reinterpret("int16x32", load(buffer, *index, 0, lanes=4 * ROWS)))
        halves = [bind(T.reinterpret("float16x32", part)) for part in _e4m3_halves(both, 32)]
        return [
            [bind(T.cast(half(f"float16x{ROWS}", part), f32)) for part in halves]
            for half in (T.vectorlow, T.vectorhigh)
        ]
    f16 = vector_type("float16", lanes)
    return [
        [
            bind(T.cast(T.reinterpret(f16, part), f32))
            for part in _e4m3_halves(unit(i, "int16"), lanes)
        ]
        for i in range(count)
    ]


def _e4m3_halves(words: Any, lanes: int) -> list[Any]:
    """Move the low and the high byte of 16-bit lanes, E4M3 bits, to where float16 has these fields."""
    keep, one = splat(T.int16(-0x4080), lanes), splat(T.int16(1), lanes)
    low = T.shift_left(words, splat(T.int16(8), lanes))
    return [T.bitwise_and(T.shift_right(half, one), keep) for half in (low, words)]
