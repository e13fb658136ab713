"""How far back states reach, beside a plain account of what every slot holds."""

from __future__ import annotations

from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.runtime.program import Layer
from mimo_compile.runtime.rollback import Held

RINGS = st.builds(
    lambda window, more, first: Layer(
        "layers.0", "window", window, first + window + more, first=first
    ),
    st.integers(1, 9), st.integers(0, 9), st.sampled_from((0, 4)),
)  # fmt: skip
TAILS = st.builds(
    lambda group, groups: Layer(
        "layers.1", slots=1 << 20, format="i4", group=group, tail=group * groups
    ),
    st.integers(2, 5), st.integers(2, 4),
)  # fmt: skip


def slot(layer, position):
    """Return where a position's row stands that may have to be read again as it was."""
    if layer.window and position < layer.first:
        return position
    newest = layer.slots - layer.first if layer.window else layer.tail
    return layer.first + (position - layer.first) % newest


def needed(layer, position):
    """Return the rows that are read once the sequence goes on from a position."""
    if layer.window:
        first = range(min(layer.first, position))
        return {*first, *range(max(0, position - layer.window + 1), position)}
    return set(range(position // layer.group * layer.group, position))


@settings(max_examples=60)
@given(
    st.lists(st.one_of(RINGS, TAILS), min_size=1, max_size=2),
    st.lists(st.tuples(st.integers(0, 30), st.floats(0, 1)), min_size=1, max_size=8),
)
def test_positions_can_be_gone_back_to_where_every_row_is_there(layers, moves):
    held, rows, fresh = Held(layers), [], count()
    memory = [{} for _ in layers]
    for more, share in moves:
        for _ in range(more):
            rows.append(next(fresh))
            for layer, slots in zip(layers, memory, strict=True):
                slots[slot(layer, len(rows) - 1)] = rows[-1]
        held.append(len(rows))
        there = [
            all(
                slots[slot(layer, p)] == rows[p]
                for layer, slots in zip(layers, memory, strict=True)
                for p in needed(layer, n)
            )
            for n in range(len(rows) + 1)
        ]
        assert [not held.obstacle(n) for n in range(len(rows) + 1)] == there
        back = int(share * len(rows))
        assert held.most(back) <= back and there[held.most(back)]
        if there[back]:
            del rows[back:]
            held.rewind(back)


def test_what_nobody_knows_cannot_be_gone_back_to():
    for layers, why in (
        ([], "does not say"),
        ([Layer("layers.0", format="i4")], "cannot be written again"),
    ):
        held = Held(layers)
        held.append(9)
        assert why in held.obstacle(5) and held.most(5) == 0 and not held.obstacle(9)
