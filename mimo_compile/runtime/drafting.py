"""The draft heads of a sequence: their caches beside the decoder's, and what they say comes next.

Head s reads at position i the decoder's hidden state of i and the token at i + 1 + s, which is a draft of the
head before it where that is not known yet, and says the token at i + 2 + s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mimo_compile.runtime.arguments import Array
from mimo_compile.runtime.program import Decoder
from mimo_compile.runtime.steps import plan_steps

Bind = Callable[[str], Any]
"""Returns an entry point by its name, bound to the states of a sequence."""


class Drafts:
    """What the heads hold of a sequence, which tells it whatever it appends and drops.

    A row of a head's cache is right once the token it was made with is the one that the sequence has there.
    Rows of drafts that were not kept are made again, from hidden states that are held for it. Heads lag while
    nobody drafts: they are one layer each, so rows that no window reaches any more are never made.
    """

    def __init__(self, decoder: Decoder, bind: Bind) -> None:
        """Begin with nothing."""
        self._decoder, self._bind = decoder, bind
        self._rows = [(0, 0)] * decoder.mtp
        """For each head, which of its rows are right: from the first number to the second, not included."""
        self._reach = _reach(decoder)
        most = decoder.steps[-1] + decoder.mtp_steps[-1] + 2 * (decoder.mtp + self._reach)
        self._hidden = np.empty((most, decoder.hidden), np.float32)
        self._first = self._count = 0
        """Position of the first hidden state that is held, and how many are."""
        self._guess: tuple[int, list[int]] | None = None
        """Tokens that the newest rows were made with, and the position of the first."""

    def copy(self, bind: Bind) -> Drafts:
        """Return the same of a sequence that begins with the same tokens, with its own caches of heads."""
        made = Drafts(self._decoder, bind)
        made._rows, made._guess = list(self._rows), self._guess
        made._first, made._count = self._first, self._count
        made._hidden[: self._count] = self._hidden[: self._count]
        return made

    def needed(self, end: int) -> int:
        """Return from which position on hidden states must be made again, to draft after ``end`` tokens."""
        first = min(end, *(self._begin(head, end) for head in range(self._decoder.mtp)))
        held = self._first <= first and self._first + self._count >= end
        return end if held else first

    def prepare(self, tokens: Sequence[int], more: int) -> None:
        """Make room for the hidden states of ``more`` tokens behind those of the sequence."""
        if self._count + more <= len(self._hidden):
            return
        if self._reach:
            self._forget(self._count - self._reach)
        elif min(right for _, right in self._rows) < self._first:
            # rows between are missing: they come again before drafting
            self._first, self._count = len(tokens), 0
        else:  # heads that see all of the sequence must have read it
            for head, (_, right) in enumerate(self._rows):
                self._make(head, right, tokens[right + 1 + head :])
            self._forget(min(right for _, right in self._rows) - self._first)

    def read(self, hidden: Array, tokens: Sequence[int]) -> None:
        """Hold the hidden states ``[n, D]`` of the newest n tokens of a sequence."""
        start = len(tokens) - len(hidden)
        if (
            start != self._first + self._count
        ):  # there is a gap: rows are made again from its end on
            self._first, self._count = start, 0
        self._hidden[self._count : self._count + len(hidden)] = hidden
        self._count += len(hidden)
        if self._guess is not None and self._guess[0] == start:
            chain = self._guess[1]
            if list(tokens[start : start + len(chain)]) == chain:
                for head in range(len(chain) - 1):
                    self._rows[head] = self._rows[head][0], start
        self._guess = None

    def drop(self, position: int) -> None:
        """Forget what came from tokens at a position or behind it."""
        self._guess = None
        self._count = max(0, min(self._count, position - self._first))
        for head, (since, right) in enumerate(self._rows):
            seen = position < since + self._reach  # rows that were left out are
            first = 0 if seen and self._first < since else since
            last = 0 if first < since else min(right, position - 1 - head)
            self._rows[head] = first, max(first, last)

    @property
    def rows(self) -> tuple[tuple[int, int], ...]:
        """For each head, the first of its rows that are right, and the first behind them."""
        return tuple(self._rows)

    def trust(self, rows: Sequence[tuple[int, int]]) -> None:
        """Take rows for right that `drop` could not know to be: their tokens are about to come again."""
        self._rows = list(rows)

    def propose(
        self,
        tokens: Sequence[int],
        token: int,
        depth: int,
        pick: Callable[[Array, int], int | None],
    ) -> tuple[list[int], list[float]]:
        """Return up to ``depth`` drafts of what follows a token that follows the sequence, and their seconds.

        What a head had to read before, since it lagged, is not in its seconds: the next draft is without.

        Args:
            tokens: Those of the sequence; hidden states are held of all that rows are missing for (`needed`).
            token: The next one.
            depth: How many drafts, at most as many as heads.
            pick: Takes logits ``[V]`` and the position of the token that they are about; None ends it.
        """
        end, chain = len(tokens), [token]
        self._guess, seconds = None, []
        for head in range(depth):
            first = self._caught_up(head, tokens, depth + 1)
            begin = time.perf_counter()
            known = list(tokens[first + 1 + head :]) + chain[max(0, first + 1 + head - end) :]
            hidden = self._run(head, first, known)
            bound = self._bind("head_1")
            (into,) = bound.inputs.values()
            into[0] = hidden
            bound.run()
            (logits,) = bound.outputs.values()
            found = pick(logits[0], end + 1 + head)
            seconds.append(time.perf_counter() - begin)
            if found is None:
                break
            chain.append(found)
        self._guess = (end, chain)
        return chain[1:], seconds[: len(chain) - 1]

    def _run(self, head: int, first: int, ids: Sequence[int]) -> Array:
        """Make rows of a head from position ``first`` on; returns the hidden state of the last."""
        decoder = self._decoder
        at, done = first - self._first, 0
        slack = decoder.max_context - first - len(ids)
        for count in plan_steps(len(ids), decoder.mtp_steps, slack):
            valid = min(count, len(ids) - done)
            bound = self._bind(f"mtp{head}_{count}")
            hidden, tokens, pos = bound.inputs.values()
            hidden[:valid] = self._hidden[at + done : at + done + valid]
            tokens[:valid] = ids[done : done + valid]
            hidden[valid:], tokens[valid:] = 0, 0
            pos[...] = first + done, valid
            bound.run()
            done += valid
        last: Array = bound.outputs["hidden"][valid - 1]
        return last

    def _begin(self, head: int, end: int) -> int:
        """Return from where on a head lacks rows that are seen from ``end - 1`` on."""
        _, right = self._rows[head]
        return max(right, end - self._reach if self._reach else 0)

    def _caught_up(self, head: int, tokens: Sequence[int], recent: int) -> int:
        """Let a head lack no more than about so many newest rows; returns the first that it lacks."""
        end = len(tokens)
        first = max(self._begin(head, end), self._first)
        if first > self._rows[head][1]:  # rows before are left out
            self._rows[head] = first, first
        return self._make(
            head, first, tokens[first + 1 + head : max(end - recent, first) + 1 + head]
        )

    def _make(self, head: int, first: int, ids: Sequence[int]) -> int:
        """Make rows of a head whose tokens are known; returns the first behind them."""
        if ids:
            self._run(head, first, ids)
            self._rows[head] = self._rows[head][0], first + len(ids)
        return first + len(ids)

    def _forget(self, gone: int) -> None:
        """Forget the oldest hidden states."""
        kept = self._count - gone
        self._hidden[:kept] = self._hidden[gone : self._count].copy()
        self._first, self._count = self._first + gone, kept


def _reach(decoder: Decoder) -> int:
    """Return how many newest positions heads see, their own included; 0: all."""
    windows = [layer.window for layer in decoder.layers if layer.name.startswith("mtp.")]
    return max(windows, default=0) if all(windows) else 0
