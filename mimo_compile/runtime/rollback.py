"""Whether the states of a sequence can go back to an earlier position, and why not."""

from __future__ import annotations

from collections.abc import Sequence

from mimo_compile.runtime.program import Layer

FREE = ("f32", "bf16", "e4m3")
"""Formats of caches that hold each position by itself, so that any can be written again."""


class Held:
    """Which positions the rings and tails of a sequence hold, while it grows and goes back.

    Both keep their newest positions. What was overwritten does not come back when the sequence does; what
    is appended after that is there again.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        """Begin with nothing; ``layers`` are all of a decoder, none where its artifact does not say."""
        self._layers = layers
        self._first = {n: 0 for n in map(_newest, layers) if n}
        self._end = 0

    def copy(self) -> Held:
        """Return the same for a sequence that begins with the same positions."""
        made = Held(self._layers)
        made._first, made._end = dict(self._first), self._end
        return made

    def append(self, position: int) -> None:
        """Note that positions up to this one (not included) were written."""
        self._end = position
        for newest, first in self._first.items():
            self._first[newest] = max(first, position - newest)

    def rewind(self, position: int) -> None:
        """Note that positions from this one on do not count any more."""
        self._end = position
        for newest, first in self._first.items():
            self._first[newest] = min(first, position)

    def obstacle(self, position: int) -> str:
        """Say what is missing for going back to a position; empty if nothing is."""
        if position in (0, self._end):
            return ""
        if not self._layers:
            return "the artifact does not say what its layers keep"
        return next(filter(None, (self._missing(layer, position) for layer in self._layers)), "")

    def most(self, position: int) -> int:
        """Return the most tokens, up to ``position``, that can be kept; 0 is always among them."""
        group = max((layer.group for layer in self._layers), default=0) or 1
        whole = position // group * group
        return next((n for n in (position, whole) if not self.obstacle(n)), 0)

    def _missing(self, layer: Layer, position: int) -> str:
        newest = _newest(layer)
        if layer.window:
            oldest = max(position - layer.window + 1, layer.first)
            lost = oldest < min(position, self._first[newest])
            return f"window layers hold the newest {newest} positions alone" if lost else ""
        if layer.group:
            # groups before are codes, which stay; the position's own group must be made anew
            own = position // layer.group * layer.group
            lost = own < position and own < self._first[newest]
            return (
                f"caches in {layer.format} quantise {layer.group} positions together and hold the newest "
                f"{newest} alone as they were"
                if lost
                else ""
            )
        return "" if layer.format in FREE else f"caches in {layer.format} cannot be written again"


def _newest(layer: Layer) -> int:
    """Return how many of its newest positions a layer's ring or tail holds; 0: it has none."""
    return layer.slots - layer.first if layer.window else layer.tail
