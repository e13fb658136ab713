"""Attention on matrix tiles: proved with tiles made of plain loops; the instructions by their assembly."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_amx import SPR, PlainTiles
from test_bf16_caches import poisoned

from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.attention.amx_tile import AmxTile
from mimo_compile.schedules.attention.x86_flash import FlashConfig
from mimo_compile.schedules.attention.x86_flash_amx import X86FlashAmx
from mimo_compile.schedules.compile import assembly
from mimo_compile.schedules.emit.bf16 import NEEDS

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
@settings(max_examples=4)
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


@dots
def test_steps_that_are_seen_whole_go_through_tiles():
    text = "cached_attention:t=16,h=2,kv=1,d=32,dv=32,cap=256,c=bf16"
    given_ = poisoned(text, 200, 16)
    tiles = check(OnPlainTiles(), text, FlashConfig(16, 64, 1, 2, False), inputs=given_)
    pairs = get_schedule("cached_attention.x86_flash_pairs")
    vectors = check(
        pairs,
        text,
        dataclasses.replace(pairs.space(parse_workload(text), CPU).default, arith="dot"),
        inputs=given_,
    )
    assert np.allclose(tiles.outputs["out"], vectors.outputs["out"], atol=0.02)


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
    prompt = parse_workload("cached_attention:h=2,kv=1,t=16,d=64,dv=64,cap=64,c=bf16")
    assert schedules_for(prompt, SPR)[0].name == schedule.name  # the one that untuned plans take
    spr = dataclasses.replace(SPR, features=SPR.features - {"amx-bf16"})
    assert not takes("t=16,d=64,dv=64,cap=64,c=bf16", spr)
