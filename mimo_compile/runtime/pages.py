"""Pages of KV caches: sequences take them from a pool as they grow, share equal ones, and give them back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from mimo_compile.errors import UsageError
from mimo_compile.runtime import dtypes
from mimo_compile.runtime.memory import Bytes, as_array
from mimo_compile.runtime.program import Manifest, Pool

Array = npt.NDArray[Any]
Want = tuple[int, int, int]
"""A slot, and the first and the last position (not included) that are to be written there."""


class PagePool:
    """Which pages hold the positions of the sequence in each slot, and which ones are free.

    A page that several sequences name is written by none of them: who is about to gets a copy first. The
    tables that kernels read are kept up to date; entries behind a sequence's last page are 0.
    """

    def __init__(
        self,
        pool: Pool,
        tables: Array,
        copy_page: Callable[[int, int], None],
        copy: Callable[[int, int], None] | None = None,
    ) -> None:
        """Begin with all pages free.

        Args:
            pool: How many pages of how many positions there are.
            tables: int32 ``[slots, width]``, the block tables that kernels read.
            copy_page: Copies what all caches hold in one page to another one.
            copy: Copies what a sequence keeps besides from one slot to another; None: there is nothing.
        """
        self._copy = copy
        self.page, self.pages = pool.page, pool.pages
        self._tables = tables
        self._copy_page = copy_page
        self.clear()

    def clear(self) -> None:
        """Take all pages back."""
        self._free = list(range(self.pages))[::-1]  # what was used last is used next
        self._used = np.zeros(self.pages, np.int64)
        self._held: list[list[int]] = [[] for _ in self._tables]
        self._tables[...] = 0

    @property
    def free(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def held(self, slot: int) -> tuple[int, ...]:
        """Return the pages of the sequence in a slot, in the order of its positions."""
        return tuple(self._held[slot])

    def pages_of(self, positions: int) -> int:
        """Return how many pages hold so many positions."""
        return -(-positions // self.page)

    def needed(self, wants: Iterable[Want]) -> int:
        """Return how many free pages it takes until all of these positions can be written."""
        total, left = 0, Counter[int]()
        for slot, start, end in wants:
            mine, last = self._held[slot], self.pages_of(end)
            total += max(0, last - len(mine))
            for page in mine[start // self.page : last]:
                if self._used[page] - left[page] > 1:
                    left[page] += 1
                    total += 1
        return total

    def check(self, wants: Sequence[Want]) -> None:
        """Check that these positions can be written.

        Raises:
            UsageError: There are not as many free pages as it takes.
        """
        if (needed := self.needed(wants)) <= self.free:
            return
        others = {slot: len(held) for slot, held in enumerate(self._held) if held}
        by = ", ".join(f"{count} by slot {slot}" for slot, count in others.items())
        raise UsageError(
            f"{needed} more pages of {self.page} positions are needed, {self.free} of {self.pages} are free "
            f"(held {by or 'by none'})",
            remedy="End a sequence (its end(), or the module's vacate(slot)) or go back in one, or compile "
            "with more --pages.",
        )

    def take(self, wants: Sequence[Want]) -> None:
        """Make it so that these positions can be written: of a sequence's own pages.

        Raises:
            UsageError: As `check`; nothing has changed then.
        """
        self.check(wants)
        for slot, start, end in wants:
            mine, last = self._held[slot], self.pages_of(end)
            for at in range(start // self.page, min(last, len(mine))):
                if self._used[mine[at]] > 1:
                    self._own(slot, at)
            while len(mine) < last:
                page = self._free.pop()
                self._used[page] = 1
                self._tables[slot, len(mine)] = page
                mine.append(page)

    def _own(self, slot: int, at: int) -> None:
        """Let a sequence have a copy of a page that it shares."""
        shared, page = self._held[slot][at], self._free.pop()
        self._copy_page(shared, page)
        self._used[shared] -= 1
        self._used[page] = 1
        self._held[slot][at] = self._tables[slot, at] = page

    def share(self, source: int, slot: int, positions: int) -> None:
        """Let the sequence in a slot, which has none yet, begin with some positions of another one."""
        self.cut(slot, 0)
        if self._copy is not None:
            self._copy(source, slot)  # tables, too
        self._tables[slot] = 0
        for page in self._held[source][: self.pages_of(positions)]:
            self._used[page] += 1
            self._tables[slot, len(self._held[slot])] = page
            self._held[slot].append(page)

    def cut(self, slot: int, positions: int) -> None:
        """Keep so many positions of a sequence and give back the pages behind them."""
        mine = self._held[slot]
        while len(mine) > self.pages_of(positions):
            page = mine.pop()
            self._tables[slot, len(mine)] = 0
            self._used[page] -= 1
            if not self._used[page]:
                self._free.append(page)


@contextmanager
def taken(pool: PagePool | None, wants: Sequence[Want]) -> Iterator[None]:
    """Take pages for positions that are written inside; gives them back where that fails. None: no pages.

    Raises:
        UsageError: As `PagePool.take`.
    """
    if pool is None:
        yield
        return
    before = [(slot, len(pool.held(slot)) * pool.page) for slot, _, _ in wants]
    pool.take(wants)
    try:
        yield
    except BaseException:
        for slot, positions in before:
            pool.cut(slot, positions)
        raise


def page_extent(kind: str, shape: Sequence[int]) -> int:
    """Return which extent of a pooled state's shape goes over pages: 0 or 1.

    Heads come first, but for descriptors on GPUs (``kind`` "cuda"), ``[entries of the pool, KV, parts, D]``;
    all else there has three extents.
    """
    return 0 if kind == "cuda" and len(shape) == 4 else 1


def copier(pool: Pool, caches: Sequence[Array]) -> Callable[[int, int], None]:
    """Return what copies a page to another one, of caches in memory.

    Args:
        pool: How many pages there are.
        caches: Arrays of all slots' caches; their second extents are the pages, one after the other.
    """
    paged = [
        cache.reshape(len(cache), pool.pages, cache.shape[1] // pool.pages, *cache.shape[2:])
        for cache in caches
    ]

    def copy_page(source: int, page: int) -> None:
        for cache in paged:
            cache[:, page] = cache[:, source]

    return copy_page


def pool_of(
    manifest: Manifest,
    states: Mapping[str, Bytes],
    slots: int,
    copy: Callable[[int, int], None] | None = None,
) -> PagePool | None:
    """Return the pages of an artifact's caches, all free; None where each slot has caches of its own.

    Args:
        manifest: Of the artifact.
        states: Memory of its states by name, of all slots.
        slots: Sequences that may be in progress.
        copy: See `PagePool`.
    """
    pool = None if manifest.decoder is None else manifest.decoder.pool
    if pool is None:
        return None

    def view(name: str, more: int = 1) -> Array:
        first, *rest = manifest.states[name].shape
        return as_array(states[name], manifest.states[name].dtype, (more * first, *rest))

    copy_page = copier(pool, [view(name) for name in pool.states])
    return PagePool(pool, view(pool.table, slots), copy_page, copy)


def pooled_bytes(manifest: Manifest) -> int:
    """Return the bytes of the states that all sequences have together."""
    states = [manifest.states[name] for name in pooled_states(manifest)]
    return sum(dtypes.size(s.dtype, s.shape) for s in states)


def held_bytes(manifest: Manifest) -> dict[str, int]:
    """Return the bytes of each state of an artifact, of all sequences."""
    batch, pooled = (
        1 if manifest.decoder is None else manifest.decoder.batch,
        pooled_states(manifest),
    )
    return {
        name: (1 if name in pooled else batch) * dtypes.size(s.dtype, s.shape)
        for name, s in manifest.states.items()
    }


def pooled_states(manifest: Manifest) -> frozenset[str]:
    """Return the names of states that all sequences have together."""
    pool = None if manifest.decoder is None else manifest.decoder.pool
    return frozenset(() if pool is None else pool.states)
