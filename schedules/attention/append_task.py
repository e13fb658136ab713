"""What kernels that append to KV caches do before a row is stored: normalise, rotate, write queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mimo_compile.schedules.attention.layout import round_up
from mimo_compile.schedules.emit.build import Register, T, bind, load, loop, store, workspace
from mimo_compile.schedules.emit.vector import LANES, splat


def magnitude(value: Any) -> Any:
    """Return 16 float32 numbers without signs as integers of their order, in which NaN is the largest."""
    return T.bitwise_and(T.reinterpret("int32x16", value), splat(T.int32(0x7FFFFFFF)))


def over(count: int, step: Callable[[Any, int], None]) -> None:
    """Emit ``step(first, lanes)`` for whole vectors, then for what is left one by one."""
    if count // LANES:
        with loop(count // LANES) as j:
            step(j * LANES, LANES)
    for j in range(count // LANES * LANES, count):
        step(j, 1)


class Task:
    """Statements for one KV head and its query heads, whatever the format of the caches."""

    def __init__(self, p: dict[str, Any], args: dict[str, Any], head: Any) -> None:
        """``p`` are the op's parameters, ``args`` the kernel's buffers by name."""
        self.p, self.args, self.head = p, args, head
        self.row = workspace((round_up(p["d"]),), "float32")
        self.squares = workspace((LANES,), "float32")

    def prepare(self, i: Any, at: Any, weight: Any) -> None:
        """Leave the head of token ``i`` from column ``at`` on in ``row``, normalised and rotated."""
        p, qkv, table = self.p, self.args["qkv"], self.args["table"]
        d, half = p["d"], p["rot"] // 2
        factor = self._norm(i, at) if weight is not None else None

        def scaled(j: Any, lanes: int) -> None:
            value = load(qkv, i, at + j, lanes=lanes)
            if factor is not None:
                value = value * splat(factor, lanes) * load(weight, j, lanes=lanes)
            store(self.row, value, j, lanes=lanes)

        def turned(j: Any, lanes: int) -> None:
            a, b = (bind(load(self.row, j + n, lanes=lanes)) for n in (0, half))
            c, s = (bind(load(table, i, n, j, lanes=lanes)) for n in (0, 1))
            store(self.row, a * c - b * s, j, lanes=lanes)
            store(self.row, b * c + a * s, j + half, lanes=lanes)

        over(d, scaled)
        if half:
            over(half, turned)

    def _norm(self, i: Any, at: Any) -> Any:
        """Return one over the root mean square of a head."""
        d, qkv = self.p["d"], self.args["qkv"]
        total, rest = Register("float32", LANES, splat(0.0)), Register("float32", 1, T.float32(0))

        def add(j: Any, lanes: int) -> None:
            value = bind(load(qkv, i, at + j, lanes=lanes))
            register = rest if lanes == 1 else total
            register.set(register.get() + value * value)

        over(d, add)
        store(self.squares, total.get(), 0, lanes=LANES)
        for n in range(LANES):
            rest.set(rest.get() + self.squares[n])
        return bind(T.float32(1) / T.sqrt(rest.get() / T.float32(d) + T.float32(self.p["eps"])))

    def write_q(self, i: Any, n: Any) -> None:
        """Write ``row`` as query head ``n``."""

        def step(j: Any, lanes: int) -> None:
            store(self.args["q"], load(self.row, j, lanes=lanes), i, n, j, lanes=lanes)

        over(self.p["d"], step)
