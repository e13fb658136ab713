"""Calls of expert kernels whose experts come and go: have them, number them by their slots, look ahead.

Where all are there, calls are told at least which rows are no tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mimo_compile import _tvm
from mimo_compile.runtime.foresight import (
    Ahead,
    Argument,
    Function,
    Rows,
    Says,
    foreseeing,
    in_order,
)
from mimo_compile.runtime.memory import as_tensor

if TYPE_CHECKING:
    from mimo_compile.runtime.entry import Array, BoundEntry
    from mimo_compile.runtime.residency import Residency


class ExpertCall:
    """A call of an expert kernel that has its experts first; it takes the place of the kernel's."""

    def __init__(
        self, kernel: Argument, ids: Array, slots: Array, y: Array, experts: int, layer: int,
        residency: Residency, ahead: Sequence[Says], counting: Rows | None = None,
    ) -> None:  # fmt: skip
        """Take what is called with what, and where it reads and writes.

        Args:
            kernel: Its function and arguments, with `slots` in place of `ids`.
            ids: int32 ``[T, k]``, experts of each row, as the router has chosen them.
            slots: int32 ``[T, k]``, what the kernel takes instead.
            y: float32 ``[T, D]``, the kernel's result.
            experts: E.
            layer: Number of the layer.
            residency: Has the layer's experts.
            ahead: Say what the next layers need, in their order.
            counting: Which rows have experts at all; None: all of them.
        """
        self._function, self._arguments = kernel
        self._source, self._counting = ids, counting
        self._ids = ids if counting is None else np.empty_like(ids)
        self._slots, self._y = slots, y
        self._experts, self._layer, self._residency, self._ahead = experts, layer, residency, ahead
        self._room = residency.room(layer)
        self._table = np.full(experts + 2, -1, np.int32)  # the ends are for ids that are no experts

    def __call__(self) -> None:
        """Run the layer's experts, in several passes where they have no room together."""
        if self._counting is not None:
            np.copyto(self._ids, self._source)
            self._ids[self._counting.others] = -1
        rows = [[e for e in row if 0 <= e < self._experts] for row in self._ids.tolist()]
        tokens = Counter(e for row in rows for e in row)
        if len(tokens) <= self._room:
            self._look_ahead_and_run(tokens)
        else:
            self._run_in_waves(rows, tokens)

    def _run_in_waves(self, rows: Sequence[Sequence[int]], tokens: Mapping[int, int]) -> None:
        """Run some experts at a time; a row counts in the first pass that has all of its experts.

        In each pass an expert has all of its tokens, as it would have them in a single one, so that the
        kernel divides them into the same tiles; what it adds up for other rows is forgotten.
        """
        plan = waves(rows, self._room, self._residency.resident(self._layer, tokens))
        result, done = np.zeros_like(self._y), np.zeros(len(rows), bool)
        met: set[int] = set()
        for number, wave in enumerate(plan, 1):
            some = {expert: tokens[expert] for expert in wave}
            if number == len(plan):
                self._look_ahead_and_run(some, met)
            else:
                self._have(some, met)
                self._function(*self._arguments)
            met |= some.keys()
            now = np.array([some.keys() >= set(row) for row in rows]) & ~done
            result[now] = self._y[now]
            done |= now
        self._y[...] = result
        self._residency.traffic.waves += len(plan) - 1

    def _look_ahead_and_run(
        self, tokens: Mapping[int, int], met: Collection[int] = frozenset()
    ) -> None:
        """Have experts, let those of the next layers come, and run the kernel meanwhile."""
        self._have(tokens, met)
        if self._ahead:
            self._residency.foresee(in_order(self._ahead))
        self._function(*self._arguments)

    def _have(self, tokens: Mapping[int, int], met: Collection[int]) -> None:
        """Have experts, and write their slots where the kernel looks; the others add nothing.

        Of those that an earlier wave ``met`` the need was noted then.
        """
        found = self._residency.acquire(self._layer, tokens, met)
        self._table.fill(-1)
        for expert, slot in zip(tokens, found, strict=True):
            self._table[expert + 1] = slot
        np.take(self._table, self._ids + 1, mode="clip", out=self._slots)


def waves(rows: Sequence[Sequence[int]], room: int, first: Collection[int] = ()) -> list[list[int]]:
    """Divide experts into lists of at most ``room``, so that each row has all of its own in one of them.

    Args:
        rows: Experts of each row, at most ``room``.
        room: Experts of a list.
        first: Experts that are there already; lists begin with rows that need few others.

    Returns:
        The lists, each in ascending order; few, though not always the fewest.
    """
    counts = Counter(frozenset(row) for row in rows if row)
    left: list[frozenset[int]] = list(counts)
    out: list[list[int]] = []
    wave: frozenset[int] = frozenset(first)

    def cost(row: frozenset[int]) -> tuple[int, int, list[int]]:
        """Rank rows by what they add to the wave; equal ones by what is in them, however they are ordered."""
        return len(row - wave), -counts[row], sorted(row)

    while left:
        wave = min(left, key=cost)
        while fits := [row for row in left if len(row | wave) <= room]:
            best = min(fits, key=cost)
            wave |= best
            left = [row for row in left if not row <= wave]
        out.append(sorted(wave))
    return out


def limited(
    bound: BoundEntry, layers: Mapping[int, int], experts: Mapping[int, int], residency: Residency,
    ahead: Ahead, apart: Collection[str],
) -> None:  # fmt: skip
    """Make an entry point have the experts of each layer before it runs them.

    Args:
        bound: The entry point; its list of calls is changed.
        layers: Index of each call of an expert kernel whose experts come and go, to the layer's number.
        experts: E of each layer.
        residency: Has the experts.
        ahead: How far to look ahead.
        apart: Kernels of experts in which no row's bits depend on other rows: there only rows that count have
            experts. In others padding has its own as well.
    """
    order = sorted(layers)
    if not order:
        return
    rows = _counting(bound, layers)
    alone = {at: bound.program.calls[at].kernel in apart for at in order}
    for number, at in enumerate(order):
        call = bound.program.calls[at]
        function, arguments = bound.calls[at]
        ids, y = bound.array(call.args[1]), bound.array(call.args[-1])
        slots = _tvm.empty_aligned(ids.shape, "int32")
        taken = (arguments[0], as_tensor(slots), *arguments[2:])
        says = ahead.behind(bound, number, order, layers, rows, alone)
        layer, counting = layers[at], rows if alone[at] else None
        made = ExpertCall(
            (function, taken), ids, slots, y, experts[layer], layer, residency, says, counting
        )
        bound.calls[at] = made, ()
    for first, says in ahead.before(bound, order, layers, rows, alone):
        function, arguments = bound.calls[first]
        bound.calls[first] = partial(foreseeing, residency, says, function), arguments
    if rows is not None:
        function, arguments = bound.calls[0]
        bound.calls[0] = partial(rows.then, function), arguments


def spare(bound: BoundEntry, apart: Collection[str]) -> None:
    """Give rows that do not count no experts, where all are mapped: their weights need not be read.

    Args:
        bound: The entry point; its list of calls is changed.
        apart: Kernels of experts in which no row's bits depend on other rows; others are left alone.
    """
    order = [at for at, call in enumerate(bound.program.calls) if call.kernel in apart]
    rows = _counting(bound, order)
    if rows is None:
        return
    for at in order:
        function, arguments = bound.calls[at]
        ids = bound.array(bound.program.calls[at].args[1])
        bound.calls[at] = partial(_without, function, ids, rows), arguments
    function, arguments = bound.calls[0]
    bound.calls[0] = partial(rows.then, function), arguments


def _without(function: Function, ids: Array, rows: Rows, *arguments: Any) -> None:
    """Call an expert kernel; the rows that do not count get ids of no expert."""
    if rows.some:
        ids[rows.others] = -1
    function(*arguments)


def _counting(bound: BoundEntry, layers: Iterable[int]) -> Rows | None:
    """Return which rows of an entry point count; None: all of them do, or it does not say."""
    counts = {bound.array(bound.program.calls[at].args[1]).shape[0] for at in layers}
    pos = bound.inputs.get("pos")
    if pos is None or len(counts) != 1:
        return None
    (count,) = counts
    return Rows(pos, count) if count > 1 and pos.shape in ((2,), (count, 2)) else None
