"""How many drafts to verify at once: as many as pay, by what was accepted and what steps have cost so far.

With acceptances a_1, a_2, ... of the heads (each given that those before it were accepted) a pass over K
drafts emits 1 + a_1 + a_1 a_2 + ... tokens. The depth with most tokens for its time is taken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

_FIRST = 4
"""Passes with all heads before anything is left out."""
_AGAIN, _SELDOM = 48, 768
"""Passes after which what has not been tried for so long is tried once more; twice as many each time that it
still does not pay, up to the second number."""
_MEMORY = 0.95
"""Part of what is known that one more observation leaves."""
_PRIOR = 0.6
"""Acceptance that is expected before anything is known; counts as one observation."""
_HOPE = 1.0
"""Standard errors that acceptances are hoped to be greater by."""
_TIMES = 9
"""Last times of something that its usual time is taken from: a median forgives what others' work takes."""
_FEW = 3
"""Times up to which what has fewest of them is tried first: one alone may be what others' work took."""


class Depth:
    """Chooses the number of drafts of each pass, and learns from each."""

    def __init__(self, most: int, fixed: int | None = None) -> None:
        """Begin to learn; ``most``: heads that there are; ``fixed``: always so many drafts."""
        self.most = most
        self._fixed = fixed
        self._passes = 0
        self._kept, self._tried = [_PRIOR] * most, [1.0] * most
        self._passing = [_Times() for _ in range(most + 1)]
        """Of passes with so many drafts: more tokens choose more experts."""
        self._heads = [_Times() for _ in range(most)]
        self._last: list[int] = [0] * (most + 1)
        """Pass in which each depth was tried, that very one: a greater one tells no time of it."""
        self._wait = [_AGAIN] * (most + 1)
        self._before = -1
        """Drafts of the last pass: what it did not run is not in the processor's caches, and takes longer."""
        self._repeat: int | None = None
        """Depth that was tried in a pass and is in another, whose times are learned."""

    def choose(self, room: int) -> int:
        """Return the number of drafts of the next pass, at most ``room``."""
        most = min(self.most, room)
        if self._fixed is not None:
            return min(self._fixed, most)
        if most <= 0 or self._passes < _FIRST:
            return max(most, 0)
        stale = [k for k in range(most + 1) if self._passes - self._last[k] > self._wait[k]]
        if self._repeat is not None:
            depth, self._repeat = min(self._repeat, most), None
            return depth
        if not self._passing[0].count:
            stale = [0]
        if stale:
            depth = self._repeat = min(stale, key=self._known)
            self._wait[depth] = min(2 * self._wait[depth], _SELDOM)
            return depth
        depth = max(range(most + 1), key=self._worth)
        self._wait[depth] = _AGAIN
        return depth

    def learn(self, drafted: int, kept: int, seconds: float, heads: Sequence[float]) -> None:
        """Take note of a pass.

        Args:
            drafted: Drafts of the pass.
            kept: Of them, accepted.
            seconds: What it took without drafting.
            heads: Seconds of each draft, without what its head had missed.
        """
        self._passes += 1
        for head in range(min(kept + 1, drafted)):
            self._kept[head] = _MEMORY * self._kept[head] + (head < kept)
            self._tried[head] = _MEMORY * self._tried[head] + 1
        if self._before >= 0 and (self._before > 0) == (drafted > 0):
            self._passing[drafted].add(seconds)
        for times, took in zip(self._heads[: max(self._before, 0)], heads, strict=False):
            times.add(took)
        self._before = drafted
        self._last[drafted] = self._passes

    def expected(self, depth: int, errors: float = 0.0) -> float:
        """Return the tokens that a pass with so many drafts is expected to emit.

        ``errors``: by how many standard errors acceptances are thought greater than they were.
        """
        tokens, all_kept = 1.0, 1.0
        for kept, tried in zip(self._kept[:depth], self._tried, strict=False):
            share = kept / tried
            all_kept *= min(share + errors * (share * (1 - share) / tried) ** 0.5, 1.0)
            tokens += all_kept
        return tokens

    def _known(self, depth: int) -> tuple[int, int]:
        """Return how well the times of a depth are known: how many there are, if few, and of when."""
        return min(self._passing[depth].count, _FEW), self._last[depth]

    def _worth(self, depth: int) -> float:
        """Return the tokens per second that are hoped for of a depth; 0 if it was never timed.

        What heads deeper than the depth in use would keep is not seen. Hoping more of what is known less
        takes them up again after a few bad passes, such as a text's first ones; after more, `_AGAIN` does.
        """
        passing = self._usual(depth)
        seconds = passing + sum(head.usual for head in self._heads[:depth])
        return self.expected(depth, _HOPE) / seconds if passing else 0.0

    def _usual(self, depth: int) -> float:
        """Return what a pass with so many drafts takes without drafting; 0 if nothing is known.

        What was never timed is thought to lie between its neighbours that were; taken then, it is timed.
        """
        times = self._passing
        timed = [k for k in range(self.most + 1) if times[k].count]
        if times[depth].count or depth == 0 or timed in ([], [0]):
            return times[depth].usual
        below = max((k for k in timed if k < depth), default=None)
        above = min((k for k in timed if k > depth), default=below)
        if below is None or above is None or below == above:
            return times[timed[0] if below is None else below].usual
        part = (depth - below) / (above - below)
        return times[below].usual + part * (times[above].usual - times[below].usual)


class _Times:
    """How long something takes."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=_TIMES)
        self.count = 0
        self.usual = 0.0

    def add(self, seconds: float) -> None:
        self._last.append(seconds)
        self.count += 1
        self.usual = sorted(self._last)[(len(self._last) - 1) // 2]
