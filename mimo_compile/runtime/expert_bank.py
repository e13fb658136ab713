"""Slots that the experts of some layers take in turn, and what leaves for what comes.

Nothing here knows threads: every method is called under the lock of the `Residency` that has the bank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from typing import NamedTuple

Key = tuple[int, int]
"""A layer's number and one of its experts."""
POLICIES = ("load", "lru")
"""What leaves first: the expert with the least recent load, or the one that was needed longest ago."""
WINDOW = 8
"""Tokens in which the weight of a choice in its layer's load falls to 1/e."""


class Claim(NamedTuple):
    """A slot that was given to an expert."""

    slot: int
    vain: bool
    """Whether one had to leave that came ahead of need, and was not needed."""


class Bank:
    """Slots, and the experts that hold them; every method under the lock of its `Residency`.

    A caller may be interrupted between any two steps. `_slot` alone says what is taken, and an expert is in
    `_coming` before it has a slot and until it has none: at no time does one seem to be there that is not.

    What comes takes the place of an expert whose layer has more than its share of the slots, if there is one:
    layers run in turn, and would otherwise leave each other nothing.
    """

    def __init__(self, slots: int, policy: str, layers: int = 1, chosen: int = 1) -> None:
        """Begin with all slots free.

        Args:
            slots: Their number.
            policy: One of `POLICIES`.
            layers: How many layers share them.
            chosen: Experts of a token.
        """
        self.slots, self._policy = slots, policy
        self._share = slots / layers
        self._keep = math.exp(-1 / (WINDOW * chosen))  # of a load, for each choice since
        self._slot: dict[Key, int] = {}
        self._coming: dict[Key, bool] = {}  # whether ahead of need
        self._awaited: set[Key] = set()  # of them, those that are needed by now
        self._fresh: set[Key] = set()  # loaded ahead of need, and not needed since
        self._load: dict[Key, tuple[float, int]] = {}  # and as of which choice of the layer
        self._choices: Counter[int] = Counter()
        self._last: dict[Key, int] = {}
        self._tick = 0

    def has(self, key: Key) -> bool:
        """Whether an expert is there, complete."""
        return key in self._slot and key not in self._coming

    def coming(self, key: Key) -> bool:
        """Whether an expert is on its way."""
        return key in self._coming

    def slot(self, key: Key) -> int:
        """Return the slot of an expert that is there.

        Raises:
            KeyError: It is not: a kernel that went on would read other weights.
        """
        if key in self._coming:
            raise KeyError(key)
        return self._slot[key]

    def need(self, layer: int, tokens: Mapping[int, int]) -> int:
        """Note that a call of a layer needs experts, of which each has so many tokens.

        Returns:
            How many of them came ahead and are needed for the first time.
        """
        self._tick += 1
        total = sum(tokens.values())
        self._choices[layer] += total
        met = 0
        for expert, count in tokens.items():
            key = layer, expert
            share = (1 - self._keep**total) * count / total
            self._load[key] = self._load_of(key) + share, self._choices[layer]
            self._last[key] = self._tick
            met += key in self._fresh
            self._fresh.discard(key)
            if key in self._coming:
                self._awaited.add(key)
        return met

    def _load_of(self, key: Key) -> float:
        """Return the share of its layer's choices that an expert has had of late."""
        load, at = self._load.get(key, (0.0, 0))
        return load * self._keep ** (self._choices[key[0]] - at)

    def claim(self, key: Key, keep: Collection[Key], *, ahead: bool) -> Claim | None:
        """Give an expert a free slot, or that of the one that the policy lets leave.

        Args:
            key: The expert, which is not there and not on its way.
            keep: Those that stay.
            ahead: Nobody needs it yet.

        Returns:
            The slot; None where all slots hold what stays or comes.
        """
        vain = False
        taken = set(self._slot.values())
        if len(taken) < self.slots:
            slot = next(number for number in range(self.slots) if number not in taken)
        else:
            leaving = [k for k in self._slot if k not in keep and k not in self._coming]
            if not leaving:
                return None
            held = Counter(k[0] for k in self._slot)  # with who comes: slots of each layer
            held[key[0]] += 1
            left = min(leaving, key=lambda k: (held[k[0]] <= self._share, self._worth(k)))
            vain = left in self._fresh
            self._fresh.discard(left)
            slot = self._slot.pop(left)
        self._coming[key] = ahead
        self._slot[key] = slot
        return Claim(slot, vain)

    def _worth(self, key: Key) -> tuple[float, int, Key]:
        """Rank experts that may leave, the least first; no two are equal."""
        load = self._load_of(key) if self._policy == "load" else 0.0
        return load, self._last.get(key, 0), key

    def arrived(self, key: Key) -> None:
        """Note that an expert is complete."""
        if self._coming.pop(key) and key not in self._awaited:
            self._fresh.add(key)
            self._last[key] = self._tick
        self._awaited.discard(key)

    def gone(self, key: Key) -> None:
        """Note that an expert does not come after all."""
        self._slot.pop(key, None)
        self._awaited.discard(key)
        self._coming.pop(key, None)

    def abandoned(self) -> list[Key]:
        """Return the experts whose load a caller has broken off: there is but one, and it asks now."""
        return [key for key, ahead in self._coming.items() if not ahead]
