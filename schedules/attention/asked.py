"""When lines of a cache that a later step reads are prefetched, where steps have phases of several kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Asked:
    """Which lines of the codes of a later group are prefetched when.

    Asked for in bursts, they would wait for each other, and memory would be idle in between: so those of each
    turn are as many as its share of the time. Some of them may lie behind the last line.
    """

    def __init__(self, lines: int, phases: Sequence[tuple[int, float]]) -> None:
        """Spread ``lines`` over phases, of so many turns that take so many cycles each."""
        cycles = sum(turns * each for turns, each in phases)
        self.each = [0] * len(phases)
        for i in range(len(phases) - 1, 0, -1):
            turns, each = phases[i]
            self.each[i] = min(round(lines * each / cycles), -(-lines // turns))
            lines = max(0, lines - turns * self.each[i])
            cycles -= turns * each
        self.each[0] = -(-lines // phases[0][0])
        taken = [turns * n for (turns, _), n in zip(phases, self.each, strict=True)]
        self.before = [sum(taken[:i]) for i in range(len(taken))]

    def at(self, phase: int, turn: Any) -> list[Any]:
        """Return the lines that a turn of a phase asks for."""
        each = self.each[phase]
        return [self.before[phase] + turn * each + n for n in range(each)]
