"""Lists of blocks from scores on x86: the level that a rule sets is found by halving, over whole vectors.

Scores become integers of the same order. With ``run``, the greatest of every ``run`` vectors are searched
first: as many of them as are wanted reach a level that the level of all cannot lie below, and only what
reaches it is looked at again. Ties go to the lower block because blocks are taken in ascending order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import batches, get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention.reach import fixed
from mimo_compile.schedules.attention.select_lists import Choice, Frame, List
from mimo_compile.schedules.attention.select_ranks import Ranking, finish
from mimo_compile.schedules.attention.sequences import part_of, place_of, turns
from mimo_compile.schedules.base import Kernel, Schedule, Space
from mimo_compile.schedules.emit.build import T, function, load, store
from mimo_compile.schedules.emit.compress import imported
from mimo_compile.schedules.emit.vector import LANES, symbol
from mimo_compile.schedules.work import Stream, Tile, busiest, work

RUNS: tuple[int, ...] = (0, 2, 4, 8, 16, 32)
TURNS = 24
"""Halvings that a search takes, of at most 32."""
ALONE = 32 << 10
"""Scores that one thread goes through before others would have woken up."""


@dataclass(frozen=True, slots=True)
class SelectConfig:
    """Knobs."""

    run: int = 0
    """Vectors of scores that one vector of greatest ones stands for; 0: all are searched (``topk`` only)."""
    parallel: bool = False


class X86Select(Schedule):
    """A list for each task."""

    name = "select_blocks.x86"
    op = "select_blocks"
    version = 3
    config = SelectConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Every workload of the op, on any x86-64."""
        return workload.op == self.op and hardware.kind == "cpu"

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """How many scores a first search looks at; threads."""
        s = Choice.of(workload, 0)
        p, lists = s.p, s.p["b"] * s.rows * s.p["hs"]
        runs = RUNS if p["rule"] == "topk" else RUNS[:1]
        runs = tuple(n for n in runs if n == 0 or s.blocks >= 2 * n * LANES)
        seen = -(-int(p["len"] or p["cap"]) // p["block"])
        # enough runs that what reaches their level is little more than what is wanted
        run = max(n for n in runs if n == 0 or seen >= 3 * n * s.kmax)
        may = lists > 1 and hardware.threads > 1
        default = SelectConfig(run, may and lists * seen >= ALONE)
        return Space(
            SelectConfig, {"run": runs, "parallel": (False, True) if may else (False,)}, default
        )

    def lower(self, workload: Workload, config: SelectConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        s = Choice.of(workload, config.run)
        args = get_op(self.op).args(workload)
        name = symbol(self.op, self.name, self.version, workload, config)

        def body(score: Any, pos: Any, *rest: Any) -> None:
            value, (idx, cnt) = (rest[0] if len(rest) == 3 else None), rest[-2:]
            with imported():
                _emit(s, config.parallel, score, pos, value, idx, cnt)

        room = 4 * (s.room * (3 if config.run else 2) + (2 * s.kmax if _ranked(s) else 0))
        threads = hardware.threads if config.parallel else 1
        if _ranked(s):
            room = room * threads + 4 * s.p["b"] * s.rows * s.p["hs"] * s.kmax
        return Kernel(
            name, function(name, args, body), args, self.work(workload, config, hardware), room
        )

    def work(self, workload: Workload, config: SelectConfig, hardware: Hardware) -> Counts:
        """Return the kernel's work: passes over keys that stay in a cache, and what is taken."""
        s = Choice.of(workload, config.run)
        p, need = s.p, get_op(self.op).counts(workload)
        lists, lengths = p["b"] * s.rows * p["hs"], batches.lengths(int(p["len"] or p["cap"]), p)
        seen = sum(float(min(s.blocks, -(-n // p["block"]))) for n in lengths) / p["b"]
        # of a sieve, the keys of the first search, and those that are left
        searched = seen / config.run + 1.5 * min(s.kmax, seen) if config.run else seen
        sorts = 8.0 * s.kmax if _ranked(s) else 0.0
        ops = {"int_op": lists * (10.0 * seen + 2.0 * TURNS * searched + sorts)}
        keys = 4.0 * seen
        turns = 4.0 * searched
        streams = [
            Stream(need.bytes["dram"]),
            Stream(lists * keys, ((3.0, keys),), made=True),
            Stream(lists * turns, ((float(TURNS), turns),), made=True),
        ]
        threads = hardware.threads if config.parallel else 1
        return work(
            ops, streams, hardware, tasks=lists if threads > 1 else 1, share=busiest(lists, threads),
            useful=min(1.0, need.ops["int_op"] / ops["int_op"]), tile=Tile(4, 1, 4.0 * turns),
        )  # fmt: skip


def _ranked(s: Choice) -> bool:
    return bool(s.p["merge"] == "rank")


def _emit(s: Choice, parallel: bool, score: Any, pos: Any, value: Any, idx: Any, cnt: Any) -> None:
    """Emit the kernel."""
    b, lists = s.p["b"], s.rows * s.p["hs"]

    def own(sequence: Any | None, *buffers: Any) -> tuple[Any, ...]:
        where = place_of(pos, sequence)
        span = (fixed(where[0]), fixed(where[1]))
        return (span, *(part_of(buffer, sequence, b) for buffer in buffers))

    if _ranked(s):
        ranking = Ranking(s)
        with turns(b, lists, parallel=parallel) as (sequence, task):
            span, scores = own(sequence, score)
            ranking.of(sequence).fill(span, scores, task)
        with turns(b, s.rows, parallel=parallel and b * s.rows > 1) as (sequence, row):
            span, ids, counts = own(sequence, idx, cnt)
            ranking.of(sequence).merge(span, ids, counts, row)
        return
    with turns(b, lists, parallel=parallel) as (sequence, task):
        heads = T.int32(s.p["hs"])
        row, head = fixed(T.floordiv(task, heads)), fixed(T.floormod(task, heads))
        span, scores, ids, counts = own(sequence, score, idx, cnt)
        _one(s, span, scores, value, ids, counts, row, head)


def _one(
    s: Choice, span: tuple[Any, Any], score: Any, value: Any, idx: Any, cnt: Any, row: Any, head: Any
) -> None:  # fmt: skip
    """Emit one list."""
    frame = Frame(s, span, row)
    own = List(s, frame, score, row, head)
    if s.p["rule"] == "topk":
        own.without_forced()
        own.best(frame.room)
    else:
        own.by_rule(value[head])
    _, ids, count = own.taken()
    with T.serial(0, frame.first) as i:
        store(idx, i, row, head, i)
    whole = fixed(T.floordiv(count, T.int32(LANES)))
    with T.serial(0, whole) as j:
        some = load(ids, j * LANES, lanes=LANES)
        store(idx, some, row, head, frame.first + j * LANES, lanes=LANES)
    with T.serial(0, fixed(count - whole * LANES)) as i:
        at = fixed(whole * LANES + i)
        store(idx, ids[at], row, head, frame.first + at)
    before = fixed(frame.first + count)
    with T.serial(0, fixed(frame.seen - frame.last)) as i:
        store(idx, frame.last + i, row, head, before + i)
    finish(s, idx, cnt, (row, head), fixed(before + (frame.seen - frame.last)))
