"""Kernels of sparse attention visit what their lists name, counted while they run, and declare that."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from contract import OP, Case, cases, visible
from harness import compiled, guarded
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile._tvm import from_numpy
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.schedules.attention.flash import Tile
from mimo_compile.schedules.attention.lists_work import visits
from mimo_compile.schedules.attention.tokens import Tokens
from mimo_compile.schedules.attention.x86_lists import X86Lists
from mimo_compile.schedules.attention.x86_rows import X86Rows
from mimo_compile.schedules.emit.build import T, loop, store, when
from mimo_compile.schedules.emit.vector import LANES, splat

CPU = local_cpu()


class Counting(Tile):
    """Counts instead of computing: columns of the output are parts of 16 slots, and values that are read."""

    def touch(self, reach, step):
        """Read nothing ahead."""

    def count(self, column, number):
        with loop(self.s.height) as row:
            store(self.out, self.out[row, column] + T.cast(number, "float32"), row, column)

    def scores(self, reach, step):
        self.count(0, T.int32(self.s.blocks))
        # what is written and never read is no valid code
        place = reach.seat(step, 0, 0) if isinstance(reach, Tokens) else reach.block(step, 0)
        store(self.score, T.cast(place, "float32"), 0, 0)

    def weigh(self):
        with loop(self.s.height) as row:  # denominators of one: the output is what was counted
            store(self.top, T.float32(0), row)
            store(self.sum, splat(1.0 / LANES), row, 0, lanes=LANES)

    def values(self, reach, step):
        with loop(self.s.blocks) as u:
            kept = reach.kept(step, u)
            with T.serial(0, reach.live(step, u)) as i:
                if kept is None:
                    self.count(1, T.int32(1))
                else:
                    with when(T.bitwise_and(T.shift_right(kept, i), T.int32(1)) == 1):
                        self.count(1, T.int32(1))


class CountingLists(X86Lists):
    def tile(self, config):
        return Counting, None


class CountingRows(X86Rows):
    def tile(self, config):
        return Counting, None


def counted(schedule, workload, inputs, config):
    """Return the parts and values ``[T, H]`` that a kernel visits for each row of its tiles."""
    kernel = schedule.lower(workload, config, CPU)
    roles = {a.name: a.role for a in OP.args(workload)}
    states = {n: a for n, a in inputs.items() if roles[n] != "input"}
    given_ = {**inputs, **schedule.pack(workload, config, states)}
    outputs = {a.name: np.zeros(a.shape, np.float32) for a in kernel.args if a.role == "output"}
    memory = {a.name: guarded({**given_, **outputs}[a.name], 0)[0] for a in kernel.args}
    compiled(kernel, CPU)[kernel.name](*(from_numpy(memory[a.name]) for a in kernel.args))
    return memory["out"][..., 0], memory["out"][..., 1]


def plain(schedule, workload, **knobs):
    default = schedule.space(workload, CPU).default
    return dataclasses.replace(default, **{"splits": 1, "parallel": False, "tile": 1, **knobs})


def small(case: Case) -> Case:
    """Return the case with a column for each count."""
    dv = 16
    values = np.zeros((*case.inputs["v_cache"].shape[:2], dv), np.float32)
    return case.having(dv=dv, V_CACHE=values, sink=0)


@pytest.mark.parametrize("by_rows", [False, True])
def test_what_is_visited(by_rows):
    @settings(max_examples=3)
    @given(st.booleans().flatmap(lambda wide: cases(sink=False, wide=wide)))
    def run(case):
        case = small(case)
        p, workload = case.p, case.workload
        schedule = CountingRows() if by_rows else CountingLists()
        if by_rows:
            workload = OP.workload(**{**p, "lay": "rows"})
        group = p["h"] // max(p["hs"], p["kv"])
        config = plain(schedule, workload, block=16, rows=min(group, 4), ahead=0)
        parts, values = counted(schedule, workload, case.inputs, config)
        seen = visible(case)
        assert (values == seen.sum(-1)).all()  # tiles have one token each: no value in vain
        if by_rows:
            assert (parts == -(-seen.sum(-1) // 16)).all()
        else:
            padded = np.pad(seen, ((0, 0), (0, 0), (0, -p["cap"] % 16)))
            blocks = padded.reshape(*seen.shape[:2], -1, 16).any(-1)
            assert (parts == blocks.sum(-1)).all()

    run()


@pytest.mark.parametrize(
    ("schedule", "way"),
    [
        (CountingLists(), "block=16,kmax=9"), (CountingLists(), "block=64,kmax=3"),
        (CountingLists(), "block=32,kmax=2,page=32,pool=20,hs=1"),
        (CountingRows(), "block=1,kmax=50,lay=rows"),
        (CountingRows(), "block=8,kmax=5,window=33,lay=rows"),
    ],
)  # fmt: skip
def test_work_declares_what_is_visited(schedule, way):
    lists = "" if "hs=" in way else "hs=2,"
    text = f"sparse_attention:t=1,h=4,kv=2,d=16,dv=16,cap=640,{lists}{way}"
    workload = parse_workload(text)
    inputs = OP.make_inputs(workload, np.random.default_rng(0))
    p = OP.full(workload)
    blocks = 640 // p["block"] - 5 - -(-p["window"] // p["block"])  # before the window
    ids = np.random.default_rng(1).permutation(blocks)[: p["kmax"]]
    inputs["idx"][...] = np.sort(ids)
    inputs["cnt"][...] = p["kmax"]
    config = plain(schedule, workload, block=16, rows=2, ahead=0)
    parts, values = counted(schedule, workload, inputs, config)
    declared, slots = visits(schedule.tiling(p, config, CPU), 640)
    assert (values == slots).all()
    near = 1 if p["window"] else 0  # keys of list and window share a part by chance
    assert (abs(parts - declared) <= near).all()
