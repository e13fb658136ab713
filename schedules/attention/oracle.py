"""What blocks of keys got, noted while flash attention passes over them.

The largest probability of a block is that of its largest logit, so a tile keeps that of each row and block,
as an integer of the same order (`exponent.largest`). Once the softmax denominators are known, over all parts
of the keys, the noted logits become probabilities, and those of the heads of a group one score.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mimo_compile.schedules.attention import exponent
from mimo_compile.schedules.attention.flash import Tile
from mimo_compile.schedules.attention.phases import emit
from mimo_compile.schedules.attention.reach import Reach, Tiling, fixed
from mimo_compile.schedules.attention.score_common import NEVER, put
from mimo_compile.schedules.emit.build import Register, T, bind, load, loop, store, when, workspace
from mimo_compile.schedules.emit.vector import LANES, LOG2E, splat


def noted_blocks(s: Tiling, block: int) -> int:
    """Return how many blocks a row has room for: those of the cache, in whole steps and vectors."""
    steps = -(-s.cache_blocks // s.blocks) * (s.blocks * LANES // block)
    return -(-steps // LANES) * LANES


def note(best: Any, block: int, tile: Tile, reach: Reach, first: Any, step: Any) -> None:
    """Keep the largest logits of a step's blocks, all whole, in ``best [rows of all tiles, blocks]``."""
    s = tile.s
    many, wide = s.blocks * LANES // block, block // LANES
    line = bind((tile.lead * s.tiles + T.truncdiv(first, T.int32(s.tokens))) * s.height)
    with loop(s.height) as row, loop(many) as b:
        most = Register("float32", LANES, load(tile.score, row, b * block, lanes=LANES))
        for u in range(1, wide):
            most.set(T.max(most.get(), load(tile.score, row, b * block + u * LANES, lanes=LANES)))
        store(best, exponent.largest(most.get()), line + row, step * many + b)


def finish(
    s: Tiling, block: int, pos: Any, lse: Any, best: Any, score: Any, parallel: bool
) -> None:
    """Turn logits into probabilities, and those of a group's heads into the scores ``[T, KV, blocks]``."""
    p = s.p
    blocks = -(-int(p["cap"]) // block)
    start, valid = fixed(pos[0]), fixed(pos[1])
    tasks = s.groups * s.tiles
    with loop(tasks, parallel=parallel and tasks > 1) as task:
        head = fixed(T.truncdiv(task, T.int32(s.tiles)))
        first = fixed(T.truncmod(task, T.int32(s.tiles)) * s.tokens)
        with loop(s.tokens) as token:
            at = fixed(first + token)
            own = T.truncdiv(start + at, T.int32(block)) + 1
            seen = fixed(T.if_then_else(at < valid, own, T.int32(0)))
            with when(at < p["t"]), loop(-(-blocks // LANES)) as j:
                inside = T.ramp(j * LANES, 1, LANES) < splat(seen)
                most = Register("float32", LANES, splat(NEVER))
                with loop(s.group) as g:
                    row = (head * s.tiles * s.tokens + first + token) * s.group + g
                    logit = exponent.from_order(load(best, row, j * LANES, lanes=LANES))
                    whole = lse[at, head * s.group + g] * T.float32(LOG2E)
                    # a logit may round to more than the denominator: powers are of numbers up to 0
                    far = bind(T.min(bind(logit) - splat(bind(whole)), splat(0.0)))
                    most.set(T.max(most.get(), exponent.exp2(far, scaled=s.avx512)))
                value = T.Select(inside, most.get(), splat(NEVER))
                put(score, value, (at, head), j * LANES, blocks)


def emit_oracle(
    s: Tiling, block: int, splits: int, parallel: bool, scale: float,
    q: Any, pos: Any, k: Any, v: Any, out: Any, score: Any, kind: Callable[..., Tile],
) -> None:  # fmt: skip
    """Emit attention and scores; arguments as for `phases.emit`."""
    best = workspace((s.groups * s.tiles * s.height, noted_blocks(s, block)), "int32")
    lse = workspace((s.p["t"], s.p["h"]), "float32")

    def noting(*given: Any) -> Tile:
        tile = kind(*given)
        tile.watch = lambda *seen: note(best, block, tile, *seen)
        return tile

    emit(s, splits, parallel, scale, q, pos, None, k, v, out, noting, lse)
    finish(s, block, pos, lse, best, score, parallel)
