"""Which experts are in memory: what layers need is loaded there and then, what is foreseen meanwhile.

Nothing here knows kernels or files. Whoever runs a layer acquires its experts and gets their slots; what is
missing is loaded there and then. What a layer will probably need may be foreseen, and is loaded by a thread
of its own. That thread reads, piece by piece, what comes first by then. It waits while somebody loads what is
needed now, and breaks a load off as soon as it is no longer foreseen: what was foreseen wrongly is hardly
waited for, though an expert has left for it that may be needed again. Which experts are there, and when they
came, changes times and nothing else.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mimo_compile.errors import UsageError
from mimo_compile.runtime.expert_bank import Bank, Key

Load = Callable[[Key, int], Iterator[int]]
"""Fills a slot (of the layer's bank) with an expert, piece by piece: yields after each the bytes that it
read. Whoever drives it may leave it in between."""


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
    """Loads ahead of need that were begun."""
    unused: int = 0
    """Of them, those that left without having been needed."""
    dropped: int = 0
    """Of them, those that were broken off, since what they were foreseen for did not need them."""
    failed_ahead: int = 0
    """Loads ahead of need that failed; they are tried again if there is need."""
    waves: int = 0
    """Times that a layer ran once more, since not all of its experts had room at once."""
    bytes_read: int = 0
    """From the file, what is read only to be hashed and what was broken off included."""
    stall_seconds: float = 0.0
    """Time that layers waited for experts."""

    @property
    def needs(self) -> int:
        """All needs."""
        return self.hits + self.late + self.misses


class Residency:
    """The banks of all layers, and the thread that loads ahead of need. One caller at a time."""

    def __init__(self, banks: Sequence[Bank], bank_of: Sequence[int], load: Load) -> None:
        """Begin with nothing loaded.

        Args:
            banks: Of slots.
            bank_of: For each layer the number of its bank.
            load: Loads an expert. It is called from two threads, never for one slot at once.
        """
        self._banks, self._bank_of, self._read = banks, bank_of, load
        self._changed = threading.Condition()
        self._ahead: ThreadPoolExecutor | None = None
        self._busy = False
        self._urgent = False
        """Whether somebody loads what is needed now."""
        self._wishes: list[Key] = []
        self._foreseen: dict[Key, int] = {}
        """Place of each in the order in which they come."""
        self._pinned: frozenset[Key] = frozenset()
        self._process = os.getpid()
        self.traffic = Traffic()

    def _bank(self, key: Key) -> Bank:
        """Return the bank of an expert's layer."""
        return self._banks[self._bank_of[key[0]]]

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

        What was foreseen of the layer, and is not among them, comes no more.

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
            self._urgent = False
            for key in bank.abandoned():
                bank.gone(key)
            self._wishes = [key for key in self._wishes if key[0] != layer]
            self._foreseen = {k: n for k, n in self._foreseen.items() if k[0] != layer}
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
            self._changed.notify_all()
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
            foreseen: dict[Key, int] = {}
            wishes: list[Key] = []
            for key in keys:
                number = self._bank_of[key[0]]
                if key in self._pinned or not left[number]:
                    continue
                left[number] -= 1
                foreseen[key] = len(foreseen)
                bank = self._banks[number]
                if not bank.has(key) and not bank.coming(key):
                    wishes.append(key)
            self._foreseen, self._wishes = foreseen, wishes
            self._changed.notify_all()
            if not self._wishes or self._busy:
                return
        try:
            self._busy = True  # not before: an interrupt in between would leave it so
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
            self._wishes, self._foreseen, self._urgent = [], {}, False
            self._changed.notify_all()

    def _bring(self, bank: Bank, key: Key) -> None:
        """Have one expert, if need be by waiting until it or another one has come."""
        while True:
            with self._changed:
                if bank.has(key):
                    return
                found = None if bank.coming(key) else bank.claim(key, self._pinned, ahead=False)
                if found is None:
                    if not bank.coming(key):
                        self.forget()  # what comes for others has taken all the room
                    self._changed.wait()
                    continue
                self.traffic.unused += found.vain
                self._urgent = True
            try:
                self._fill(bank, key, found.slot)
            finally:
                with self._changed:
                    self._urgent = False
                    self._changed.notify_all()
            return

    def _load_ahead(self) -> None:
        """Load what is wished for, piece by piece, until nothing is; in the thread for that."""
        begun: dict[Key, Iterator[int]] = {}
        try:
            while (key := self._next_ahead(begun)) is not None:
                self._piece_ahead(key, begun)
        except BaseException:
            with self._changed:
                for key in begun:
                    self._bank(key).gone(key)
                self._busy = False  # whatever it was, the next call may try again
                self._changed.notify_all()
            raise

    def _next_ahead(self, begun: dict[Key, Iterator[int]]) -> Key | None:
        """Return the load ahead of need that goes on; None: nothing is left, and the thread ends.

        It is one that is needed by now, or else the first of what is foreseen, once nobody loads what is
        needed more urgently: what was begun for later waits where it is. Loads that are foreseen no more are
        broken off.
        """
        with self._changed:
            while True:
                vain = [k for k in begun if k not in self._pinned and k not in self._foreseen]
                for key in vain:
                    self._end_ahead(key, begun, complete=False)
                    self.traffic.dropped += 1
                needed = next((key for key in begun if key in self._pinned), None)
                if needed is not None:
                    return needed
                if not begun and not self._wishes:
                    self._busy = False
                    return None
                if self._urgent:
                    self._changed.wait()
                    continue
                key = min([*begun, *self._wishes[:1]], key=self._foreseen.__getitem__)
                if key in begun or self._begin_ahead(self._wishes.pop(0), begun):
                    return key

    def _begin_ahead(self, key: Key, begun: dict[Key, Iterator[int]]) -> bool:
        """Begin a load ahead of need, under the lock; returns whether it is not there and has room."""
        bank = self._bank(key)
        if bank.has(key) or bank.coming(key):
            return False
        found = bank.claim(key, self._pinned | self._foreseen.keys(), ahead=True)
        if found is None:
            return False
        self.traffic.unused += found.vain
        self.traffic.loaded_ahead += 1
        begun[key] = self._read(key, found.slot)
        return True

    def _piece_ahead(self, key: Key, begun: dict[Key, Iterator[int]]) -> None:
        """Read the next piece of a load ahead of need."""
        try:
            complete = self._read_piece(begun[key])
        except Exception:  # whoever needs it tries again, and says so
            with self._changed:
                self._end_ahead(key, begun, complete=False)
                self.traffic.failed_ahead += 1
        else:
            if complete:
                with self._changed:
                    self._end_ahead(key, begun, complete=True)

    def _end_ahead(self, key: Key, begun: dict[Key, Iterator[int]], *, complete: bool) -> None:
        """Note, under the lock, that a load ahead of need has come or does not."""
        del begun[key]
        if complete:
            self._bank(key).arrived(key)
        else:
            self._bank(key).gone(key)
        self._changed.notify_all()

    def _fill(self, bank: Bank, key: Key, slot: int) -> None:
        """Load an expert that is needed into a slot that it has claimed."""
        complete = False
        try:
            pieces = self._read(key, slot)
            while not complete:
                complete = self._read_piece(pieces)
        finally:
            with self._changed:
                if complete:
                    bank.arrived(key)
                else:
                    bank.gone(key)
                self._changed.notify_all()

    def _read_piece(self, pieces: Iterator[int]) -> bool:
        """Read the next piece of an expert; returns whether there was none left."""
        read = next(pieces, None)
        if read is None:
            return True
        with self._changed:
            self.traffic.bytes_read += read
        return False
