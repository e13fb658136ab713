"""What kernels of SeerAttention-R's gates are made of: turn back, pool, project, normalise, rotate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mimo_compile.schedules.attention.pages import Table
from mimo_compile.schedules.attention.reach import fixed
from mimo_compile.schedules.attention.score_common import (
    NEVER,
    UPPER,
    across,
    add,
    over,
)
from mimo_compile.schedules.emit.build import (
    Register,
    T,
    bind,
    load,
    loop,
    store,
    vector_type,
    workspace,
)
from mimo_compile.schedules.emit.vector import LANES, cos, sin, splat

Params = Mapping[str, Any]


def weight_lanes(weight: Any, *index: Any, lanes: int, bf16: bool) -> Any:
    """Return weights as float32."""
    found = load(weight, *index, lanes=lanes)
    if not bf16:
        return found
    words = T.cast(found, vector_type("int32", lanes))
    return T.reinterpret(
        vector_type("float32", lanes), T.shift_left(words, splat(T.int32(16), lanes))
    )


def project(
    p: Params, columns: int, x: Any, weight: Any, head: Any, y: Any, wide: int, chains: int
) -> None:
    """Emit ``y[g] = sum_k x[k] * weight[head, k, g]``.

    Args:
        p: Parameters of the op.
        columns: How many ``x`` has.
        x: float32 ``[columns]``.
        weight: ``[KV, columns, G]``.
        head: KV head.
        y: float32 ``[G]``.
        wide: Vectors of outputs that share a number of ``x``.
        chains: Sums of each output that are in flight.
    """
    vectors, tail = divmod(p["g"], LANES)
    tiles = [
        [((first + j) * LANES, LANES) for j in range(min(wide, vectors - first))]
        for first in range(0, vectors, wide)
    ]
    if tail:
        tiles.append([(vectors * LANES + j, 1) for j in range(tail)])
    for tile in tiles:
        lanes = tile[0][1]
        sums = [
            [Register("float32", lanes, splat(0.0, lanes)) for _ in tile] for _ in range(chains)
        ]

        def turn(k: Any, own: list[Register], tile: Any = tile, lanes: int = lanes) -> None:
            number = bind(splat(x[k], lanes))
            for register, (at, _) in zip(own, tile, strict=True):
                w = weight_lanes(weight, head, k, at, lanes=lanes, bf16=p["w"] == "bf16")
                register.set(register.get() + number * w)

        if columns // chains:
            with loop(columns // chains) as i:
                for c, own in enumerate(sums):
                    turn(i * chains + c, own)
        for k in range(columns // chains * chains, columns):
            turn(k, sums[0])
        for j, (at, _) in enumerate(tile):
            total = sums[0][j].get()
            for own in sums[1:]:
                total = total + own[j].get()
            store(y, total, at, lanes=lanes)


def finish(p: Params, y: Any, norm: Any, position: Any, gate_freq: Any) -> None:
    """Emit the norm, if there is one, and the rotation at a position (float32), of ``y [G]`` in place."""
    if norm is not None:
        squares = Register("float32", LANES, splat(0.0))
        rest = Register("float32", 1, T.float32(0))

        def square(at: Any, lanes: int) -> None:
            value = bind(load(y, at, lanes=lanes))
            own = squares if lanes > 1 else rest
            own.set(own.get() + value * value)

        over(p["g"], square)
        total = across(add, squares.get()) + rest.get()
        by = bind(T.float32(1) / T.sqrt(total / T.float32(p["g"]) + T.float32(p["eps"])))

        def scale(at: Any, lanes: int) -> None:
            value = load(y, at, lanes=lanes) * splat(by, lanes) * load(norm, at, lanes=lanes)
            store(y, value, at, lanes=lanes)

        over(p["g"], scale)
    half = p["grot"] // 2

    def turn(at: Any, lanes: int) -> None:
        angle = Register(
            "float32", lanes, splat(position, lanes) * load(gate_freq, at, lanes=lanes)
        )
        c, s = bind(cos(angle.get(), lanes)), bind(sin(angle.get(), lanes))
        a, b = bind(load(y, at, lanes=lanes)), bind(load(y, half + at, lanes=lanes))
        store(y, a * c - b * s, at, lanes=lanes)
        store(y, b * c + a * s, half + at, lanes=lanes)

    over(half, turn)


def turned_queries(
    p: Params, q: Any, token: Any, head: Any, inv_freq: Any, x: Any, position: Any
) -> None:
    """Emit ``x``: the queries of a group as they were before rotation, one behind the other."""
    d, half, group = p["d"], p["rot"] // 2, p["h"] // p["kv"]

    def turn(at: Any, lanes: int) -> None:
        angle = Register("float32", lanes, splat(position, lanes) * load(inv_freq, at, lanes=lanes))
        c, s = bind(cos(angle.get(), lanes)), bind(sin(angle.get(), lanes))
        with loop(group) as g:
            row = bind(head * group + g)
            a = bind(load(q, token, row, at, lanes=lanes))
            b = bind(load(q, token, row, half + at, lanes=lanes))
            store(x, a * c + b * s, g * d + at, lanes=lanes)
            store(x, b * c - a * s, g * d + half + at, lanes=lanes)

    over(half, turn)
    if d > 2 * half:
        with loop(group) as g:

            def copy(at: Any, lanes: int) -> None:
                value = load(q, token, head * group + g, 2 * half + at, lanes=lanes)
                store(x, value, g * d + 2 * half + at, lanes=lanes)

            over(d - 2 * half, copy)


class Pools:
    """Greatest, least and mean of a block's keys as they were before rotation: 16 slots in the lanes."""

    def __init__(
        self, p: Params, bits: int, k: Any, inv_freq: Any, head: Any, entry: Any,
        table: Table | None = None,
    ) -> None:  # fmt: skip
        """Prepare a block ``entry`` of a KV head, over a cache ``k`` of so many bits, or one in pages."""
        self.p, self.bits, self.k, self.inv_freq, self.head = p, bits, k, inv_freq, head
        self.table = table
        size = p["size"]
        self.begin = fixed(entry * size)
        self.first = fixed(self.begin // LANES)
        self.count = fixed((self.begin + size - 1) // LANES - self.first + 1)
        self.x = workspace((3 * p["d"],), "float32")

    def emit(self) -> Any:
        """Emit all channels; returns the pools ``[3 * D]``."""
        half, d = self.p["rot"] // 2, self.p["d"]
        # two neighbours at a time: whether a channel is the first of a pair in memory is known then
        self._each(half, lambda i, at: self._fold(i, (at, half + at), turned=True))
        self._each(d - 2 * half, lambda i, at: self._fold(i, (2 * half + at,), turned=False))
        return self.x

    def _each(self, count: int, step: Callable[[Any, int], None]) -> None:
        """Emit ``step(i, at)`` for numbers ``2 * i + at`` below ``count``."""
        if count // 2:
            with loop(count // 2) as i:
                step(i, 0)
                step(i, 1)
        if count % 2:
            step(0, count - 1)

    def _slots(self, place: Any, i: Any, at: int) -> Any:
        """Return channel ``2 * i + at`` of 16 slots."""
        if self.bits == 32:
            return bind(load(self.k, self.head, place, 2 * i + at, 0, lanes=LANES))
        found = load(self.k, self.head, place, i + at // 2, 0, lanes=2 * LANES)
        words = bind(T.reinterpret("int32x16", found))
        if at % 2:
            words = T.bitwise_and(words, splat(T.int32(UPPER)))
        else:
            words = T.shift_left(words, splat(T.int32(16)))
        return bind(T.reinterpret("float32x16", words))

    def _fold(self, i: Any, offsets: tuple[int, ...], *, turned: bool) -> None:
        """Emit the pools of channels ``2 * i + offset``: of a pair that is rotated together, or of one."""
        start = (NEVER, -NEVER, 0.0)
        acc = [[Register("float32", LANES, splat(n)) for n in start] for _ in offsets]
        end = fixed(self.begin + self.p["size"])
        with T.serial(0, self.count) as at:
            place = bind(self.first + at)
            slots = bind(T.ramp(place * LANES, 1, LANES))
            inside = T.And(slots >= splat(self.begin), slots < splat(end))
            held = place if self.table is None else self.table.block(place)
            values = [self._slots(held, i, offset) for offset in offsets]
            if turned:
                freq = self.inv_freq[2 * i + offsets[0]]
                angle = Register("float32", LANES, T.cast(slots, "float32x16") * splat(freq))
                c, s = bind(cos(angle.get())), bind(sin(angle.get()))
                a, b = values
                values = [bind(a * c + b * s), bind(b * c - a * s)]
            for value, (most, least, total) in zip(values, acc, strict=True):
                # slots of other blocks, and what was never written, take no part: NaN neither
                most.set(T.max(most.get(), T.Select(inside, value, splat(start[0]))))
                least.set(T.min(least.get(), T.Select(inside, value, splat(start[1]))))
                total.set(total.get() + T.Select(inside, value, splat(start[2])))
        for offset, (most, least, total) in zip(offsets, acc, strict=True):
            channel = bind(2 * i + offset)
            mean = across(add, total.get()) / T.float32(self.p["size"])
            numbers = (across(T.max, most.get()), across(T.min, least.get()), mean)
            for part, number in enumerate(numbers):
                store(self.x, number, part * self.p["d"] + channel)
