"""Attention that scores blocks, for GPUs, run on the CPU thread by thread and held to the op's bound."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from harness import sample_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_oracle_attention import poisoned

from mimo_compile.errors import VerificationError
from mimo_compile.ir.hardware import CUDA, PRESETS
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.attention.cuda_flash import PartsConfig
from mimo_compile.schedules.cuda.emulate import compiler
from mimo_compile.search.measure.emulated import check_emulated

A100, H200 = CUDA["cuda:sm_80"], CUDA["cuda:sm_90a"]
ORACLE = get_schedule("oracle_attention.cuda")
needs_compiler = pytest.mark.skipif(compiler() is None, reason="emulation needs a C++ compiler")
SHAPE = "t=9,h=6,kv=2,d=24,dv=18,cap=200,c=bf16"


def test_blocks_that_a_stage_holds_have_a_kernel_and_cpus_have_none():
    for block, there in ((8, True), (24, True), (64, True), (128, True), (12, False), (256, False)):
        workload = parse_workload(f"oracle_attention:{SHAPE},block={block}")
        for hardware in (A100, H200):
            assert [s.name for s in schedules_for(workload, hardware)] == [ORACLE.name] * there
        assert not ORACLE.supports(workload, PRESETS["sapphirerapids"])
    assert not ORACLE.supports(parse_workload(f"oracle_attention:{SHAPE[:-7]},block=64"), H200)
    long = "oracle_attention:t=4096,h=64,kv=4,d=128,dv=128,cap=131072,block=64,c=bf16"
    assert not ORACLE.supports(parse_workload(long), H200)  # 2 GB of noted logits


@pytest.mark.parametrize("t", [1, 300])
def test_counts_are_those_of_the_launches_and_no_less_than_needed(t):
    workload = parse_workload(
        f"oracle_attention:t={t},h=16,kv=2,d=64,dv=40,cap=3000,len=2500,block=16,c=bf16"
    )
    need = get_op(workload.op).counts(workload)
    for seed in range(8):
        config = sample_config(ORACLE, workload, H200, seed)
        kernel = ORACLE.lower(workload, config, H200)
        counts = kernel.counts
        assert counts == ORACLE.work(workload, config, H200)
        assert len(counts.parts) == len(kernel.device.launches)
        assert need.bytes["dram"] <= counts.bytes["dram"] * (1 + 1e-9)
        assert counts.bytes["dram"] <= counts.bytes["l2"] * (1 + 1e-9)
        assert need.ops["fma_f32"] <= counts.ops["tile_bf16"] + counts.ops["fma_f32"]


@pytest.mark.slow
@needs_compiler
@settings(max_examples=6, deadline=None, database=None)
@given(data=st.data())
def test_any_shape_and_place(data):
    draw = data.draw
    kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    t, cap = draw(st.sampled_from((1, 1, 2, 9, 40))), draw(st.integers(40, 400))
    text = (
        f"oracle_attention:t={t},h={kv * group},kv={kv},d={draw(st.integers(1, 70))},"
        f"dv={draw(st.integers(1, 70))},cap={cap},c=bf16,block={draw(st.sampled_from((8, 16, 48, 64)))}"
    )
    valid = draw(st.integers(0, t))
    start, seed = draw(st.integers(0, cap - valid)), draw(st.integers(0, 99))
    hardware = draw(st.sampled_from((A100, H200)))
    config = sample_config(ORACLE, parse_workload(text), hardware, seed)
    check_emulated(text, ORACLE, config, hardware, inputs=poisoned(text, start, valid, seed))


@pytest.mark.slow
@needs_compiler
def test_parts_are_merged_as_if_there_were_none():
    text = "oracle_attention:t=3,h=6,kv=2,d=24,dv=18,cap=300,len=290,block=16,c=bf16"
    one, many = (
        check_emulated(text, ORACLE, PartsConfig(32, 2, 1, n), H200, orders=(0,)).outputs
        for n in (1, 4)
    )
    assert np.allclose(one["score"], many["score"], rtol=1e-5, atol=0)
    assert np.allclose(one["out"], many["out"], rtol=0, atol=2e-2)


@pytest.mark.slow
@needs_compiler
def test_wide_heads():
    text = "oracle_attention:t=9,h=2,kv=1,d=200,dv=130,cap=200,c=bf16,block=16"
    check_emulated(text, ORACLE, None, H200, inputs=poisoned(text, 150, 9))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        (r"mma_bf16\(small\[2 \* n \+ u\], a\[1\], b\[2 \* u\], b\[2 \* u \+ 1\]\);", ""),
        (r"whole\[half\] \+= low \+ high;", "whole[half] += bf16_low(pair) + bf16_high(pair);"),
        (r"most = fmaxf\(most, exp2f\(far\)", "most = fmaxf(0.0f, exp2f(far)"),
    ],
)
def test_scores_of_rounded_queries_weights_and_single_heads_are_found(change):
    workload = parse_workload(f"oracle_attention:{SHAPE},block=16")

    class Mutant(type(ORACLE)):
        def lower(self, workload, config, hardware):
            kernel = super().lower(workload, config, hardware)
            text, times = re.subn(*change, kernel.device.text)
            assert times == 1
            return replace(kernel, device=replace(kernel.device, text=text))

    with pytest.raises(VerificationError, match="score"):
        check_emulated(workload, Mutant(), None, H200, orders=(0,))
