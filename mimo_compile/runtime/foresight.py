"""What layers will need, said while an earlier one runs.

It is known where the earlier one has chosen it, and otherwise what routers or trained gates foresee.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mimo_compile import _tvm
from mimo_compile.runtime.memory import as_tensor
from mimo_compile.runtime.pregate import BEGIN, Gate, Pair

if TYPE_CHECKING:
    from mimo_compile.runtime.entry import Array, BoundEntry
    from mimo_compile.runtime.expert_bank import Key
    from mimo_compile.runtime.program import Call
    from mimo_compile.runtime.residency import Residency

Function = Callable[..., Any]
Argument = tuple[Function, tuple[Any, ...]]
Says = Callable[[], "list[tuple[Key, float]]"]
"""Returns experts of a later layer that are probably needed, the surest first, and how probable each is."""
LIKELY = 0.2
"""Probability from which on an expert is loaded ahead of need: loads that are not needed are broken off."""
SURE = 0.5
"""Probability from which on it comes before those of earlier layers that are less sure."""


class Rows:
    """Which rows of a running entry point are of tokens; others are padding, or of a slot that rests."""

    def __init__(self, pos: Array, count: int) -> None:
        """Take the entry point's `pos` (int32 ``[2]``, of a batch ``[B, 2]``) and its number of rows."""
        self._pos, self._places = pos, np.arange(count)
        self.others: Array = np.zeros(count, bool)
        """bool ``[T]``: those that do not count."""
        self.some = False
        """Whether there are any."""

    def note(self) -> None:
        """Look, before the first call: the place of `pos` in the arena may be taken by others later."""
        if self._pos.ndim == 2:
            np.equal(self._pos[:, 1], 0, out=self.others)
        else:
            np.greater_equal(self._places, self._pos[1], out=self.others)
        self.some = bool(self.others.any())

    def then(self, function: Function, *arguments: Any) -> None:
        """Look, and call a function."""
        self.note()
        function(*arguments)

    def last(self) -> Array:
        """Return bool ``[T]``: of each text in progress the row after which another token comes."""
        rows = ~self.others
        if self._pos.ndim == 1:
            rows[: max(np.count_nonzero(rows) - 1, 0)] = False
        return rows


class Known:
    """What an earlier layer has chosen for a layer: nothing has to be foreseen."""

    def __init__(self, layer: int, ids: Array, rows: Rows | None) -> None:
        """Take the layer's number, its experts int32 ``[T, k]``, and which rows count (None: all)."""
        self.layer, self._ids, self._rows = layer, ids, rows

    def __call__(self) -> list[tuple[Key, float]]:
        """Return the layer's experts, those with most tokens first, all of which are sure."""
        return _sure(self.layer, self._ids, self._rows)


class Foresight:
    """What a layer's router says of rows that an earlier layer's router has seen.

    The residual stream changes little from one layer to the next, so this is mostly what it will say of its
    own rows. Where it is not, experts are loaded when they are needed.
    """

    def __init__(
        self, layer: int, calls: Sequence[Argument], ids: Array, rows: Rows | None
    ) -> None:
        """Take the layer's number, the router's calls on memory of their own, and where they write ids.

        Of ``rows`` only those that count are asked about; None: all of them.
        """
        self.layer, self._calls, self._ids, self._rows = layer, calls, ids, rows

    def __call__(self) -> list[tuple[Key, float]]:
        """Return the layer's experts, those with most tokens first, as if they were sure."""
        for function, arguments in self._calls:
            function(*arguments)
        return _sure(self.layer, self._ids, self._rows)


def _sure(layer: int, ids: Array, rows: Rows | None) -> list[tuple[Key, float]]:
    """Return the experts of the rows that count, those with most tokens first, as sure."""
    if rows is not None:
        ids = ids[~rows.others]
    experts = ids.ravel().tolist()
    if len(ids) > 1:
        counts = Counter(experts)
        experts = sorted(counts, key=lambda expert: (-counts[expert], expert))
    return [((layer, expert), 1.0) for expert in experts]


class Kept:
    """What was foreseen at an earlier call of the entry point, of rows that are gone by now."""

    def __init__(self, says: Says) -> None:
        """Take what is asked at the earlier call."""
        self._says = says
        self._said: list[tuple[Key, float]] = []

    def ask(self) -> list[tuple[Key, float]]:
        """Return what is foreseen now, and keep it."""
        self._said = self._says()
        return self._said

    def __call__(self) -> list[tuple[Key, float]]:
        """Return what was foreseen."""
        return self._said


class GateForesight:
    """What a trained gate says of rows that an earlier layer's experts get."""

    def __init__(
        self, layer: int, gate: Gate, seen: Array, rows: Rows | None, following: bool
    ) -> None:
        """Take what is foreseen from what.

        Args:
            layer: Number of the layer that is foreseen.
            gate: Says it.
            seen: float32 ``[T, D]``, the rows.
            rows: Which rows count; None: all.
            following: It is foreseen for the token that follows, so that only a text's last row counts.
        """
        self.layer, self._gate, self._seen = layer, gate, seen
        self._rows, self._following = rows, following

    def __call__(self) -> list[tuple[Key, float]]:
        """Return the layer's experts that are `LIKELY` for some row."""
        seen = self._seen
        if self._rows is not None:
            seen = seen[self._rows.last() if self._following else ~self._rows.others]
        for_any = 1 - np.prod(1 - self._gate(seen), 0)
        order = np.argsort(-for_any, kind="stable").tolist()
        chances = for_any.tolist()
        return [((self.layer, e), chances[e]) for e in order if chances[e] >= LIKELY]


@dataclass(frozen=True, slots=True)
class Ahead:
    """How far to look ahead, and by what."""

    layers: int
    """How many; 0: not at all."""
    routers: frozenset[str] = frozenset()
    """Kernels that are routers."""
    gates: Mapping[Pair, Gate] = field(default_factory=dict)
    """Trained ones; where there is one, it is asked in place of the router."""

    def behind(
        self, bound: BoundEntry, number: int, calls: Sequence[int], layers: Mapping[int, int],
        rows: Rows | None, apart: Mapping[int, bool],
    ) -> list[Says]:  # fmt: skip
        """Return what is asked while a layer's experts run.

        Args:
            bound: The entry point.
            number: Of the layer's call of experts among ``calls``.
            calls: Indices of all such calls, in running order.
            layers: Of each of them the layer's number.
            rows: Which rows are of tokens; None: all of them.
            apart: Of each call, whether other rows have no experts.
        """
        at, out = calls[number], []
        x = bound.array(bound.program.calls[at].args[0])
        for step in range(1, self.layers + 1):
            over, place = divmod(number + step, len(calls))
            following = calls[place]
            layer = layers[following]
            gate = self.gates.get((layers[at], layer))
            says: Says | None = None
            if over > 1 or (over == 1) != (layer <= layers[at]):
                continue
            counting = rows if apart[following] else None
            if not over and chosen_at(bound, following, self.routers) < at:
                says = Known(layer, bound.array(bound.program.calls[following].args[1]), counting)
            elif gate is not None:
                says = GateForesight(layer, gate, x, rows, over == 1)
            elif not over:
                says = router_foresight(bound, at, following, layer, self.routers, counting)
            if says is not None:
                out.append(says)
        return out

    def before(
        self, bound: BoundEntry, calls: Sequence[int], layers: Mapping[int, int], rows: Rows | None,
        apart: Mapping[int, bool],
    ) -> list[tuple[int, list[Says]]]:  # fmt: skip
        """Return what is asked before the first layer with experts, by the call behind which it is.

        It is what gates say of the embeddings. Where a layer without experts chooses for that one, it is then
        what it has chosen, with what the gates have said of the layers behind.
        """
        program, at = bound.program, calls[0]
        out: list[tuple[int, list[Says]]] = []
        if not self.layers:
            return out
        first = embeddings(bound, at)
        seen = bound.array(program.calls[first].args[-1])
        told = {
            n: Kept(GateForesight(layers[n], gate, seen, rows, False))
            for n in calls[: self.layers]
            if first >= 0 and (gate := self.gates.get((BEGIN, layers[n]))) is not None
        }
        if told:
            out.append((first, [kept.ask for kept in told.values()]))
        chosen = chosen_at(bound, at, self.routers)
        if _stage(program.calls[chosen]) != _stage(program.calls[at]):
            ids = bound.array(program.calls[at].args[1])
            behind = [kept for n, kept in told.items() if n != at]
            out.append((chosen, [Known(layers[at], ids, rows if apart[at] else None), *behind]))
        return out


def chosen_at(bound: BoundEntry, at: int, routers: frozenset[str]) -> int:
    """Return the call that chooses what a call of experts runs; that call itself if none is found."""
    calls = bound.program.calls
    ids = calls[at].args[1]
    found = _last(calls[:at], lambda c: c.kernel in routers and ids in c.args)
    return at if found is None else found


def _stage(call: Call) -> list[str]:
    """Return which part of a model a call belongs to: ``layers`` and a number."""
    return call.label.split(".")[:2]


def embeddings(bound: BoundEntry, at: int) -> int:
    """Return the first call that writes rows such as those of a call of experts; -1: none before it does."""
    program = bound.program
    wanted = program.buffers[program.calls[at].args[0]]
    for index, call in enumerate(program.calls[:at]):
        found = program.buffers[call.args[-1]]
        if (found.kind, found.shape, found.dtype) == ("arena", wanted.shape, wanted.dtype):
            return index
    return -1


def foreseeing(
    residency: Residency, says: Sequence[Says], function: Function, *arguments: Any
) -> None:
    """Call a function, and then let what is foreseen from its result come."""
    function(*arguments)
    residency.foresee(in_order(says))


def in_order(says: Sequence[Says]) -> list[Key]:
    """Return what is foreseen: what is sure by layers, and then the rest by layers."""
    found = [pair for one in says for pair in one()]
    return [k for k, p in found if p >= SURE] + [k for k, p in found if p < SURE]


def router_foresight(
    bound: BoundEntry, at: int, following: int, layer: int, routers: frozenset[str],
    rows: Rows | None,
) -> Foresight | None:  # fmt: skip
    """Return the router before the call `following`, on the rows of the call `at`; None if none is found.

    It is the matmul that writes the logits from such rows and weights alone, and the call that chooses.
    """
    calls = bound.program.calls
    ids = calls[following].args[1]
    choose = _last(calls[:following], lambda c: c.kernel in routers and ids in c.args)
    if choose is None:
        return None
    scratch = [i for i in calls[choose].args if bound.program.buffers[i].kind == "arena"]
    logits = scratch[0]
    score = _last(calls[:choose], lambda c: c.args[-1] == logits)
    if score is None:
        return None
    seen, *constants = calls[score].args[:-1]
    x = calls[at].args[0]
    buffers = bound.program.buffers
    alike = (buffers[seen].shape, buffers[seen].dtype) == (buffers[x].shape, buffers[x].dtype)
    if not alike or any(buffers[i].kind != "weight" for i in constants):
        return None
    arrays = {i: _tvm.empty_aligned(buffers[i].shape, buffers[i].dtype) for i in scratch}
    instead = {i: as_tensor(array) for i, array in arrays.items()}
    instead[seen] = as_tensor(bound.array(x))
    made: list[Argument] = []
    for number in (score, choose):
        function, arguments = bound.calls[number]
        pairs = zip(calls[number].args, arguments, strict=True)
        made.append((function, tuple(instead.get(i, argument) for i, argument in pairs)))
    return Foresight(layer, made, arrays[ids], rows)


def _last(calls: Sequence[Call], fits: Callable[[Call], bool]) -> int | None:
    """Return the index of the last call that fits."""
    return next((i for i in range(len(calls) - 1, -1, -1) if fits(calls[i])), None)
