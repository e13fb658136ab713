"""Which experts are in memory: slots that they take in turn, what leaves for what comes, loads ahead of need.

Nothing here knows kernels or files. Whoever runs a layer acquires its experts and gets their slots; what is
missing is loaded there and then. What a layer will probably need may be foreseen, and is loaded by a thread
of its own meanwhile. Which experts are there, and when they came, changes times and nothing else.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from mimo_compile.errors import UsageError

Key = tuple[int, int]
"""A layer's number and one of its experts."""
POLICIES = ("load", "lru")
"""What leaves first: the expert with the least recent load, or the one that was needed longest ago."""
WINDOW = 8
"""Tokens in which the weight of a choice in its layer's load falls to 1/e."""


@dataclass(slots=True)
class Traffic:
    """Counts of experts that layers needed, and of what it took to have them.

    One need is one expert of one call of a layer, however many tokens go to it.
    """

    hits: int = 0
    """Needs of experts that were there."""
    ahead: int = 0
    """Of the hits, the first one of an expert that was loaded ahead of need."""
    late: int = 0
    """Needs of experts that were on their way."""
    misses: int = 0
    """Needs of experts that were loaded then."""
    loaded_ahead: int = 0
    """Loads ahead of need."""
    unused: int = 0
    """Of them, those that left without having been needed."""
    failed_ahead: int = 0
    """Loads ahead of need that failed; they are tried again if there is need."""
    waves: int = 0
    """Times that a layer ran once more, since not all of its experts had room at once."""
    bytes_read: int = 0
    """From the file, what is read only to be hashed included."""
    stall_seconds: float = 0.0
    """Time that layers waited for experts."""

    @property
    def needs(self) -> int:
        """All needs."""
        return self.hits + self.late + self.misses


class Claim(NamedTuple):
    """A slot that was given to an expert."""

    slot: int
    vain: bool
    """Whether one had to leave that came ahead of need, and was not needed."""


class Bank:
    """Slots that the experts of some layers take in turn; every method under the lock of its `Residency`.

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
        self._held: Counter[int] = Counter()  # slots of each layer
        self._free = list(range(slots))[::-1]
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
        if self._free:
            slot = self._free.pop()
        else:
            leaving = [k for k in self._slot if k not in keep and k not in self._coming]
            if not leaving:
                return None
            left = min(leaving, key=lambda k: (not self._above_share(k[0], key[0]), self._worth(k)))
            slot, vain = self._slot.pop(left), left in self._fresh
            self._fresh.discard(left)
            self._held[left[0]] -= 1
        self._slot[key] = slot
        self._held[key[0]] += 1
        self._coming[key] = ahead
        return Claim(slot, vain)

    def _above_share(self, layer: int, coming: int) -> bool:
        """Whether a layer has more than its share of the slots, counting what comes for a layer."""
        return self._held[layer] + (layer == coming) > self._share

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
        del self._coming[key]
        self._awaited.discard(key)
        self._held[key[0]] -= 1
        self._free.append(self._slot.pop(key))

    def abandoned(self) -> list[Key]:
        """Return the experts whose load a caller has broken off: there is but one, and it asks now."""
        return [key for key, ahead in self._coming.items() if not ahead]


class Residency:
    """The banks of all layers, and the thread that loads ahead of need. One caller at a time."""

    def __init__(
        self, banks: Sequence[Bank], bank_of: Sequence[int], load: Callable[[Key, int], int]
    ) -> None:
        """Begin with nothing loaded.

        Args:
            banks: Of slots.
            bank_of: For each layer the number of its bank.
            load: Fills a slot (of the layer's bank) with an expert, and returns the bytes that it read. It is
                called from two threads, never for one slot at once.
        """
        self._banks, self._bank_of, self._read = banks, bank_of, load
        self._changed = threading.Condition()
        self._ahead: ThreadPoolExecutor | None = None
        self._busy = False
        self._wishes: list[Key] = []
        self._foreseen: frozenset[Key] = frozenset()
        self._pinned: frozenset[Key] = frozenset()
        self._process = os.getpid()
        self.traffic = Traffic()

    def room(self, layer: int) -> int:
        """Return how many experts of a layer can be there at once."""
        return self._banks[self._bank_of[layer]].slots

    def resident(self, layer: int, experts: Iterable[int]) -> set[int]:
        """Return those of a layer's experts that are there."""
        bank = self._banks[self._bank_of[layer]]
        with self._changed:
            return {expert for expert in experts if bank.has((layer, expert))}

    def check(self) -> None:
        """Check that this is the process that loads.

        Raises:
            UsageError: It was forked from that: the thread did not come along.
        """
        if os.getpid() != self._process:
            raise UsageError(
                "--expert-memory: the module's experts are loaded by a thread of process "
                f"{self._process}, from which this one was forked",
                remedy="load the artifact in each process",
            )

    def acquire(
        self, layer: int, tokens: Mapping[int, int], met: Collection[int] = frozenset()
    ) -> list[int]:
        """Have experts of a layer, and keep them until the next call.

        Args:
            layer: Its number.
            tokens: How many tokens each of the experts has, at most as many experts as there is room for.
            met: Those of which the need was noted before, in an earlier wave of the same call.

        Returns:
            The slot of each expert, in their order.

        Raises:
            MimoError: One of them cannot be loaded; what was there still is.
        """
        bank = self._banks[self._bank_of[layer]]
        keys = [(layer, expert) for expert in tokens]
        with self._changed:
            for key in bank.abandoned():
                bank.gone(key)
            self._wishes = [key for key in self._wishes if key[0] != layer]
            self._pinned = frozenset(keys)
            needed = {expert: count for expert, count in tokens.items() if expert not in met}
            first = bank.need(layer, needed)
            missing = [key for key in keys if not bank.has(key)]
            noted = [key for key in missing if key[1] in needed]
            late = sum(map(bank.coming, noted))
            traffic = self.traffic
            traffic.hits += len(needed) - len(noted)
            traffic.ahead += first
            traffic.late += late
            traffic.misses += len(noted) - late
            missing.sort(key=bank.coming)  # what nobody brings comes first
        if missing:
            begin = time.perf_counter()
            try:
                for key in missing:
                    self._bring(bank, key)
            except BaseException:
                self.forget()
                raise
            finally:
                traffic.stall_seconds += time.perf_counter() - begin
        with self._changed:
            return [bank.slot(key) for key in keys]

    def foresee(self, keys: Sequence[Key]) -> None:
        """Say what layers will probably need, the next and surest first, in place of what was said before.

        What has no room beside the experts of the layer that runs is left out.
        """
        with self._changed:
            left = [bank.slots for bank in self._banks]
            for layer, _ in self._pinned:
                left[self._bank_of[layer]] -= 1
            foreseen, wishes = [], []
            for key in keys:
                number = self._bank_of[key[0]]
                if key in self._pinned or not left[number]:
                    continue
                left[number] -= 1
                foreseen.append(key)
                bank = self._banks[number]
                if not bank.has(key) and not bank.coming(key):
                    wishes.append(key)
            self._foreseen, self._wishes = frozenset(foreseen), wishes
            if not self._wishes or self._busy:
                return
            self._busy = True
        try:
            if self._ahead is None:
                self._ahead = ThreadPoolExecutor(1, "mimo-experts")
            self._ahead.submit(self._load_ahead)
        except RuntimeError:  # there is no thread to be had: what is needed is loaded then
            with self._changed:
                self._busy = False
                self.traffic.failed_ahead += len(self._wishes)
                self._wishes = []
        except BaseException:  # broken off: the next call tries again
            self._busy = False
            raise

    def forget(self) -> None:
        """Load nothing more of what was foreseen: the call that it was foreseen for is broken off."""
        with self._changed:
            self._wishes = []

    def _bring(self, bank: Bank, key: Key) -> None:
        """Have one expert, if need be by waiting until it or another one has come."""
        while True:
            with self._changed:
                if bank.has(key):
                    return
                found = None if bank.coming(key) else bank.claim(key, self._pinned, ahead=False)
                if found is None:
                    self._changed.wait()
                    continue
                self.traffic.unused += found.vain
            self._fill(bank, key, found.slot)
            return

    def _load_ahead(self) -> None:
        """Load what is wished for until nothing is; in the thread for that."""
        try:
            while self._load_next():
                pass
        except BaseException:
            with self._changed:
                self._busy = False  # whatever it was, the next call may try again
            raise

    def _load_next(self) -> bool:
        """Load the first of what is wished for; returns whether there was any."""
        with self._changed:
            if not self._wishes:
                self._busy = False
                return False
            key = self._wishes.pop(0)
            bank = self._banks[self._bank_of[key[0]]]
            if bank.has(key) or bank.coming(key):
                return True
            found = bank.claim(key, self._pinned | self._foreseen, ahead=True)
            if found is None:
                return True
            self.traffic.unused += found.vain
            self.traffic.loaded_ahead += 1
        try:
            self._fill(bank, key, found.slot)
        except Exception:  # whoever needs it tries again, and says so
            with self._changed:
                self.traffic.failed_ahead += 1
        return True

    def _fill(self, bank: Bank, key: Key, slot: int) -> None:
        """Load an expert into a slot that it has claimed."""
        try:
            count = self._read(key, slot)
        except BaseException:
            with self._changed:
                bank.gone(key)
                self._changed.notify_all()
            raise
        with self._changed:
            bank.arrived(key)
            self.traffic.bytes_read += count
            self._changed.notify_all()
