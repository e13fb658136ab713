"""Attention on matrix tiles: proved with tiles made of plain loops; the instructions by their assembly."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from harness import check, compiled, guarded, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_amx import SPR, PlainTiles
from test_bf16_caches import poisoned

from mimo_compile._tvm import from_numpy
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.attention.amx_tile import AmxTile
from mimo_compile.schedules.attention.reach import Tiling, visited_whole
from mimo_compile.schedules.attention.x86_flash import FlashConfig
from mimo_compile.schedules.attention.x86_flash_amx import X86FlashAmx
from mimo_compile.schedules.compile import assembly
from mimo_compile.schedules.emit.bf16 import NEEDS
from mimo_compile.schedules.emit.build import load, loop, splat, store
from mimo_compile.schedules.emit.vector import LANES

CPU = local_cpu()
dots = pytest.mark.skipif(not CPU.features >= NEEDS, reason="the CPU has no bfloat16 dots")


class PlainTile(AmxTile):
    """A tile of queries on tiles that every CPU has."""

    tiles_class = PlainTiles


class OnPlainTiles(X86FlashAmx):
    """The schedule on tiles that every CPU has."""

    name = "cached_attention.x86_flash_amx_plain"
    tile_class = PlainTile

    def supports(self, workload, hardware):
        return super().supports(workload, dataclasses.replace(hardware, features=SPR.features))

    def lower(self, workload, config, hardware):
        return dataclasses.replace(super().lower(workload, config, hardware), features=NEEDS)


@dots
@settings(max_examples=2)
@given(data=st.data())
def test_any_shape_position_and_config(data):
    one_of_any(data)


@pytest.mark.slow
@dots
@settings(max_examples=30)
@given(data=st.data())
def test_many_shapes_positions_and_configs(data):
    one_of_any(data)


def one_of_any(data):
    draw = data.draw
    kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    t, window = draw(st.integers(16, 40)), draw(st.sampled_from((0, 0, 1, 17, 100)))
    cap = draw(st.integers(max(17, window + t - 1 if window else t), 260))
    text = (
        f"cached_attention:t={t},h={kv * group},kv={kv},d={draw(st.sampled_from((32, 64)))},"
        f"dv={draw(st.integers(1, 50))},cap={cap},window={window},sink={draw(st.integers(0, 1))},c=bf16"
    )
    valid = draw(st.integers(1, t))
    start = draw(st.integers(0, 3 * cap if window else cap - valid))
    schedule, workload, seed = OnPlainTiles(), parse_workload(text), draw(st.integers(0, 99))
    config = sample_config(schedule, workload, CPU, seed)
    check(schedule, workload, config, seed, inputs=poisoned(text, start, valid, seed))


class Marking(PlainTile):
    """Adds one to the sums of each step whose values go through tiles."""

    def whole_values(self, reach, step):
        super().whole_values(reach, step)
        with loop(self.s.height) as row:
            store(
                self.out,
                load(self.out, row, 0, lanes=LANES) + splat(1.0, LANES),
                row,
                0,
                lanes=LANES,
            )


class OnMarkingTiles(OnPlainTiles):
    name = "cached_attention.x86_flash_amx_marking"
    tile_class = Marking


@dots
@pytest.mark.parametrize(
    "start, cap, window, block, steps",
    [
        (0, 64, 0, 32, 0),  # the first tokens of a prompt: the step's last slots are not written
        (16, 64, 0, 32, 1),  # the diagonal
        (200, 256, 0, 64, 3),  # of 216 slots
        (96, 256, 0, 64, 1),
        (400, 144, 128, 32, 4),  # a ring of nine blocks: the step across its end is left out
    ],
)
def test_steps_that_are_written_go_through_tiles(start, cap, window, block, steps):
    text = f"cached_attention:t=16,h=2,kv=1,d=32,dv=16,cap={cap},window={window},c=bf16"
    given_ = poisoned(text, start, 16)
    config = FlashConfig(16, block, 1, 2, False)
    check(OnPlainTiles(), text, config, inputs=given_)
    for name in ("k_cache", "v_cache"):  # so that all weights are 1, and values 0
        given_[name][: min(start + 16, cap)] = 0
    marked = run_once(OnMarkingTiles(), text, config, given_)
    seen = np.minimum(start + 1 + np.arange(16), window or cap)
    assert np.allclose(marked * seen[:, None, None], steps, rtol=1e-5)


def run_once(schedule, text, config, given_):
    """Return the outputs, unchecked."""
    workload = parse_workload(text)
    kernel = schedule.lower(workload, config, CPU)
    packed = schedule.pack(workload, config, {n: given_[n] for n in ("k_cache", "v_cache")})
    source = {**given_, **packed, "out": np.zeros(kernel.args[-1].shape, np.float32)}
    memory = {a.name: guarded(source[a.name])[0] for a in kernel.args}
    compiled(kernel, CPU)[kernel.name](*(from_numpy(memory[a.name]) for a in kernel.args))
    return memory["out"]


@settings(max_examples=60)
@given(data=st.data())
def test_work_counts_tiles_where_they_run(data):
    draw = data.draw
    window, t = draw(st.sampled_from((0, 0, 17, 100))), draw(st.integers(16, 60))
    cap = draw(st.integers(max(33, window + t), 300))
    length = draw(st.integers(t, 900 if window else cap))
    blocks, tokens = draw(st.sampled_from((2, 4, 8))), draw(st.sampled_from((16, 32)))
    s = Tiling({"t": t, "cap": cap, "window": window, "kv": 1, "h": 1}, tokens, blocks, 1, 20, 0)
    last, written = length - 1, min(length, cap)
    for first in range(0, t, tokens):
        low = max(0, last - cap + 1, length - t + first - window + 1 if window else 0)
        seen = range(low, min(length - t + first + tokens - 1, last) + 1)
        block, steps, slots = low % cap // 16, 0, 0
        parts = []
        for at in seen:  # blocks in the order of positions, none twice in a row nor the first again
            if not parts or (at % cap // 16 != parts[-1] and at % cap // 16 != block):
                parts.append(at % cap // 16)
        for step in range(0, len(parts), blocks):
            if (parts[step] + blocks) * 16 <= written:
                steps, slots = steps + 1, slots + 16 * len(parts[step : step + blocks])
        got = visited_whole(s, length - t, t, np.array([first]))
        assert [int(n[0]) for n in got] == [steps, slots]


def test_windows_have_steps_that_may_be_whole():
    schedule = get_schedule("cached_attention.x86_flash_amx")
    text = "cached_attention:t=64,h=8,kv=1,d=192,dv=128,cap=191,window=128,len=1000,c=bf16"
    workload = parse_workload(text)
    space = schedule.space(workload, SPR)
    assert max(space.knobs["block"]) <= 256 and space.default.block <= 64
    ops = schedule.work(workload, space.default, SPR).ops
    assert ops["tile_bf16"] > 4 * ops["dot_bf16"] > 0
    start = parse_workload("cached_attention:t=256,h=8,kv=2,d=128,dv=128,cap=8192,len=256,c=bf16")
    ops = schedule.work(start, schedule.space(start, SPR).default, SPR).ops
    assert "dot_bf16" not in ops


def test_the_instructions():
    schedule = get_schedule("cached_attention.x86_flash_amx")
    workload = parse_workload("cached_attention:t=64,h=8,kv=2,d=128,dv=128,cap=512,c=bf16")
    kernel = schedule.lower(workload, schedule.space(workload, SPR).default, SPR)
    text = assembly([kernel], SPR)
    # 2 x 2 tiles for two loads of each side, for scores and for values
    assert len(re.findall(r"\btdpbf16ps\b", text)) % 4 == 0
    assert len(re.findall(r"\btdpbf16ps\b", text)) == len(re.findall(r"\btileloadd\b", text)) >= 8
    for instruction in ("ldtilecfg", "tilerelease", "tilezero", "tilestored", "vcvtne2ps2bf16"):
        assert re.search(rf"\b{instruction}\b", text), instruction
    assert "amx-bf16" in kernel.features
    counts = schedule.work(workload, schedule.space(workload, SPR).default, SPR)
    assert counts.ops["tile_bf16"] >= get_op(workload.op).counts(workload).ops["fma_f32"]


def test_what_it_does_not_take():
    schedule = get_schedule("cached_attention.x86_flash_amx")

    def takes(rest, hardware=SPR):
        text = f"cached_attention:h=2,kv=1,{rest}"
        return schedule.supports(parse_workload(text), hardware)

    assert takes("t=16,d=64,dv=64,cap=64,c=bf16")
    assert not takes("t=15,d=64,dv=64,cap=64,c=bf16")
    assert not takes("t=16,d=48,dv=64,cap=64,c=bf16")
    assert not takes("t=16,d=64,dv=64,cap=64")
    assert not takes("t=16,d=64,dv=64,cap=64,c=bf16,arith=int8")
    spr = dataclasses.replace(SPR, features=SPR.features - {"amx-bf16"})
    assert not takes("t=16,d=64,dv=64,cap=64,c=bf16", spr)
