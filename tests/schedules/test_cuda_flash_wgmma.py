"""Attention by wgmma, run on the CPU thread by thread and held to the op's bound."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_attention import check_drawn, check_exact, drawn_dense, made

from mimo_compile.ir.hardware import CUDA
from mimo_compile.ir.ops import parse_workload
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.attention.cuda_wgmma import FlashConfig
from mimo_compile.schedules.cuda.emulate import compiler
from mimo_compile.schedules.cuda.nvcc import compile_device, find_tool
from mimo_compile.schedules.cuda.sass import disassemble
from mimo_compile.search.measure.emulated import check_emulated

A100, H200 = CUDA["cuda:sm_80"], CUDA["cuda:sm_90a"]
WGMMA = get_schedule("cached_attention.cuda_wgmma")
EXACT = (
    WGMMA,
    f"cached_attention:t=40,h=3,kv=1,d=24,dv=18,cap=110,window=50,c=bf16,scale={math.log(2)}",
    FlashConfig(32, 2, 2, True),
)
RINGS = (
    "cached_attention:t=50,h=6,kv=2,d=80,dv=72,cap=150,window=100,sink=1,c=bf16,b=2",
    [(390, 47), (13, 50)],
    (FlashConfig(32, 2, 2, True), FlashConfig(32, 1, 3, False), FlashConfig(64, 2, 2, False)),
)
"""The tiles of the first sequence break off at the cache's end; behind the second one's positions is NaN."""
FULL = "cached_attention:t=40,h=3,kv=1,d=24,dv=18,cap=150,sink=1,c=bf16", [(110, 40)]
"""Every slot of the cache counts, the oldest as well; one head of a group has a sink above all else."""
slow = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler() is None, reason="emulation needs a C++ compiler"),
]


def emulated(function):
    """Mark a test that takes long and needs a compiler."""
    for mark in slow:
        function = mark(function)
    return function


def test_only_hopper_and_caches_without_pages():
    text = "cached_attention:t=64,h=4,kv=2,d=64,dv=64,cap=128,c=bf16"
    assert WGMMA.supports(parse_workload(text), H200)
    assert not WGMMA.supports(parse_workload(text), A100)
    assert not WGMMA.supports(parse_workload(f"{text},page=16,pool=8"), H200)
    assert not WGMMA.supports(parse_workload(text.replace(",c=bf16", "")), H200)
    assert not WGMMA.supports(parse_workload(f"{text},arith=int8"), H200)


@pytest.mark.parametrize(
    ("width", "config"),
    [
        (128, FlashConfig(96, 3, 2, True)),
        (256, FlashConfig(96, 1, 2, True)),
        (128, FlashConfig(128, 2, 4)),
        (64, FlashConfig(32, 3)),
    ],
)
def test_what_gpus_have_no_room_for_is_not_legal(width, config):
    # registers that nvcc spills, shared memory, more rows than there are
    workload = parse_workload(
        f"cached_attention:t=48,h=8,kv=4,d={width},dv={width},cap=4096,c=bf16"
    )
    space = WGMMA.space(workload, H200)
    assert space.legal(space.default) and not space.legal(config)


def test_counts_of_a_prompt_are_those_of_whole_tiles():
    # 64 tokens of 2 heads are 128 rows: the first group sees 32 keys of a tile, the second all 64
    workload = parse_workload("cached_attention:t=64,h=2,kv=1,d=128,dv=128,cap=64,len=64,c=bf16")
    counts = WGMMA.work(workload, FlashConfig(64, 2), H200)
    assert counts.ops["tile_bf16"] == 128 * 64 * 256
    narrow = parse_workload("cached_attention:t=64,h=2,kv=1,d=128,dv=80,cap=64,len=64,c=bf16")
    counts = WGMMA.work(narrow, FlashConfig(64, 2), H200)
    assert counts.ops["tile_bf16"] == 128 * 64 * 256  # values in panels of 64 columns


@pytest.mark.slow
@pytest.mark.skipif(find_tool("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.skipif(find_tool("nvdisasm") is None, reason="nvdisasm is not installed")
@pytest.mark.parametrize("width", [64, 128, 192])
def test_weights_are_made_while_values_are_multiplied(width):
    text = f"cached_attention:t=512,h=8,kv=2,d={width},dv={width},cap=4096,c=bf16"
    config = WGMMA.space(parse_workload(text), H200).default
    assert config.overlap
    binary = compile_device(WGMMA.lower(parse_workload(text), config, H200), H200)
    waits = re.split(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", disassemble(binary))
    # behind the wait that leaves a product under way, in the order of addresses; two rows rescale their sums
    (exponentials,) = (
        code.count("MUFU.EX2")
        for left, code in zip(waits[1::2], waits[2::2], strict=True)
        if left == "1"
    )
    assert exponentials == config.keys // 2 + 2


@emulated
@pytest.mark.parametrize("config", RINGS[2])
def test_rings_that_were_passed_and_slots_that_were_never_written(config):
    text, places, _ = RINGS
    inputs = made(text, places)
    seen = check_emulated(text, WGMMA, config, H200, seed=2, inputs=inputs)
    assert np.isfinite(seen.outputs["out"]).all()


@emulated
@pytest.mark.parametrize("config", RINGS[2])
def test_caches_that_are_full(config):
    text, places = FULL
    check_emulated(text, WGMMA, config, H200, inputs=made(text, places))


@emulated
def test_groups_that_do_not_see_the_same_tiles():
    # the second group does not see the first tiles, nor the first group the last
    text = "cached_attention:t=90,h=1,kv=1,d=24,dv=18,cap=210,window=120,c=bf16"
    for place in ((210, 90), (20, 80), (0, 3)):
        inputs = made(text, [place])
        seen = check_emulated(text, WGMMA, FlashConfig(32, 2, 3), H200, inputs=inputs)
        assert np.isfinite(seen.outputs["out"]).all()


@emulated
@pytest.mark.parametrize("overlap", [False, True])
def test_heads_as_wide_as_models_have_them(overlap):
    text = "cached_attention:t=70,h=2,kv=1,d=192,dv=128,cap=300,len=230,c=bf16"
    check_emulated(text, WGMMA, FlashConfig(96, 2, 2, overlap), H200, seed=4)


@emulated
@pytest.mark.parametrize("overlap", [False, True])
def test_results_are_exact_where_nothing_is_rounded(overlap):
    schedule, text, config = EXACT
    check_exact(schedule, text, replace(config, overlap=overlap), H200)


@emulated
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_shape_and_place(data):
    text, places = drawn_dense(data.draw, st.integers(1, 60))
    check_drawn(WGMMA, text, places, H200, data.draw(st.integers(0, 99)))
