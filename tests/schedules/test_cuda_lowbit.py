"""SALE's estimates and the mean key for GPUs, run on the CPU thread by thread and held to the ops' bounds."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from harness import sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import VerificationError
from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.hardware import CUDA, PRESETS
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.ops.score_lowbit import MOST
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.attention.cuda_key_mean import PartsOfKeysConfig
from mimo_compile.schedules.attention.cuda_score_lowbit import LowbitStagesConfig
from mimo_compile.schedules.cuda.emulate import compiler
from mimo_compile.search.measure.emulated import check_emulated

A100, H200 = CUDA["cuda:sm_80"], CUDA["cuda:sm_90a"]
SCORE, MEAN = get_schedule("score_lowbit.cuda"), get_schedule("key_mean.cuda")
OP = get_op("score_lowbit")
needs_compiler = pytest.mark.skipif(compiler() is None, reason="emulation needs a C++ compiler")
SHAPE = "score_lowbit:t=20,h=2,kv=1,d=24,cap=600,block=16,rows=16,first=1,last=2,c=bf16"


def placed(text, start, valid, seed=0):
    """Return keys up to the last token, NaN behind it and in queries of padding; one key is the mean."""
    workload = parse_workload(text)
    p, inputs = OP.full(workload), OP.make_inputs(workload, np.random.default_rng(seed))
    keys = np.random.default_rng(seed).standard_normal(inputs["k_cache"].shape, dtype=np.float32)
    keys[(start + valid) // 2] = 0
    means = {"k_mean": 0 * inputs["k_mean"]} if seed % 2 else {}
    keys[start + valid :] = np.nan
    inputs["q"][valid:] = np.nan
    keys = parse_cache_format(p["c"]).encode(keys)
    return {**inputs, **means, "k_cache": keys, "pos": np.array([start, valid], np.int32)}


def test_blocks_of_a_tile_have_a_kernel_and_cpus_have_none():
    for block, there in ((8, True), (32, True), (128, True), (24, False), (256, False)):
        workload = parse_workload(SHAPE.replace("block=16", f"block={block}"))
        for hardware in (A100, H200):
            assert [s.name for s in schedules_for(workload, hardware)] == [SCORE.name] * there
        assert not SCORE.supports(workload, PRESETS["sapphirerapids"])
    assert not SCORE.supports(parse_workload(SHAPE.replace("d=24", "d=300")), H200)
    assert not SCORE.supports(parse_workload(SHAPE.replace("c=bf16", "c=f32")), H200)


@pytest.mark.parametrize(
    "more", ["t=128,cap=1024", "t=300,cap=4096,len=4000", "t=64,cap=200,least=1024"]
)
def test_counts_are_those_of_the_launches_and_no_less_than_needed(more):
    text = f"score_lowbit:h=4,kv=2,d=64,block=32,rows=64,first=1,last=5,c=bf16,{more}"
    workload = parse_workload(text)
    need = OP.counts(workload)
    for stages in (2, 4):
        kernel = SCORE.lower(workload, LowbitStagesConfig(stages), H200)
        counts = kernel.counts
        assert len(counts.parts) == len(kernel.device.launches)
        assert need.bytes["dram"] <= counts.bytes["dram"] * (1 + 1e-9)
        assert counts.bytes["dram"] <= counts.bytes["l2"] * (1 + 1e-9)
        assert need.ops["dot_i8"] <= counts.ops["tile_i8"]


@pytest.mark.slow
@needs_compiler
@settings(max_examples=6, deadline=None, database=None)
@given(data=st.data())
def test_any_shape_and_place(data):
    draw = data.draw
    kv, t = draw(st.integers(1, 2)), draw(st.sampled_from((1, 7, 40)))
    cap = draw(st.integers(max(t, 100), 600))
    text = (
        f"score_lowbit:t={t},h={kv * draw(st.sampled_from((1, 2, 5)))},kv={kv},d={draw(st.integers(1, 70))},"
        f"cap={cap},block={draw(st.sampled_from((8, 16, 32)))},rows={draw(st.sampled_from((1, 4, 16, 64)))},"
        f"first={draw(st.integers(1, 2))},last={draw(st.integers(1, 3))},c=bf16,"
        f"bits={draw(st.sampled_from((2, 4, 8)))},every={draw(st.sampled_from((1, 1, 2, 5)))},"
        f"least={draw(st.sampled_from((0, 0, cap // 2)))}"
    )
    valid = draw(st.integers(1, t))
    start, seed = draw(st.integers(0, cap - valid)), draw(st.integers(0, 99))
    hardware = draw(st.sampled_from((A100, H200)))
    config = sample_config(SCORE, parse_workload(text), hardware, seed)
    check_emulated(text, SCORE, config, hardware, inputs=placed(text, start, valid, seed))


@pytest.mark.slow
@needs_compiler
def test_heads_as_wide_as_codes_go():
    text = SHAPE.replace("d=24", "d=250").replace("cap=600", "cap=300")
    check_emulated(text, SCORE, None, H200, inputs=placed(text, 270, 20))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        (r"constexpr float TOP = \S+f;", "constexpr float TOP = 6.0f;"),
        (r"shifts\[(.*)\] = sum \* SCALE", r"shifts[\1] = 0.0f"),
        (r"position\(key\) <= at\[half\]", "true"),
        (r"fmaxf\(most, parts\[w \* EACH \+ i\]\)", "most"),
    ],
)
def test_other_codes_means_regions_and_queries_are_found(change):
    workload = parse_workload(SHAPE.replace("rows=16", "rows=20"))
    with pytest.raises(VerificationError, match="score"):
        check_emulated(workload, mutant(change), None, H200, orders=(0,))


def mutant(change):
    """Return the schedule with one thing of its text replaced."""

    class Mutant(type(SCORE)):
        def lower(self, workload, config, hardware):
            kernel = super().lower(workload, config, hardware)
            text, times = re.subn(*change, kernel.device.text)
            assert times == 1
            return replace(kernel, device=replace(kernel.device, text=text))

    return Mutant()


@pytest.mark.slow
@needs_compiler
def test_no_estimate_is_worth_more_than_the_greatest_weight():
    inputs = placed(SHAPE, 300, 20)
    keys = parse_cache_format("bf16").decode(inputs["k_cache"])
    keys[100] = 200 * inputs["q"][0, 0]
    inputs["k_cache"] = parse_cache_format("bf16").encode(keys)
    seen = check_emulated(SHAPE, SCORE, None, H200, inputs=inputs, orders=(0,))
    scores = seen.expected["score"]
    assert np.isclose(scores[np.isfinite(scores)].max(), np.exp(MOST))
    for change in ((r"(float MOST = )\S+f;", r"\g<1>110.0f;"), (r"fminf\(most, MOST\)", "most")):
        with pytest.raises(VerificationError, match="score"):
            check_emulated(SHAPE, mutant(change), None, H200, inputs=inputs, orders=(0,))


@pytest.mark.slow
@needs_compiler
@settings(max_examples=5, deadline=None, database=None)
@given(
    d=st.integers(1, 40), kv=st.integers(1, 3), cap=st.integers(1, 400), c=st.sampled_from((A100, H200)),
    data=st.data(),
)  # fmt: skip
def test_mean_of_any_number_of_keys(d, kv, cap, c, data):
    length = data.draw(st.integers(1, cap))
    text = f"key_mean:t=1,kv={kv},d={d},cap={cap},len={length},c=bf16"
    workload = parse_workload(text)
    config = sample_config(MEAN, workload, c, length)
    check_emulated(workload, MEAN, config, c, seed=length)


def test_keys_of_bfloat16_have_a_mean_on_gpus():
    workload = parse_workload("key_mean:t=4,kv=2,d=24,cap=100,c=bf16")
    assert [s.name for s in schedules_for(workload, H200)] == [MEAN.name]
    assert not MEAN.supports(workload, PRESETS["sapphirerapids"])
    assert not MEAN.supports(parse_workload("key_mean:t=4,kv=2,d=24,cap=100"), H200)
    need = get_op("key_mean").counts(workload)
    for splits in (1, 4):
        config = PartsOfKeysConfig(32, splits)
        kernel, work = MEAN.lower(workload, config, H200), MEAN.work(workload, config, H200)
        assert kernel.counts == work
        assert len(work.parts or (work,)) == len(kernel.device.launches)
        assert work.bytes["dram"] >= need.bytes["dram"] * (1 - 1e-9)
        assert all(work.ops[n] >= x for n, x in need.ops.items())
        if splits > 1:  # sums of blocks are written once, and read
            plain = MEAN.work(workload, PartsOfKeysConfig(32, 1), H200)
            written = 4 * splits * 2 * 32
            assert work.bytes["l2"] == plain.bytes["l2"] + written + 4 * splits * 2 * 24


def test_keys_are_split_until_a_gpu_is_full_or_threads_have_few():
    for hardware, cores in ((A100, 108), (H200, 132)):
        for kv, d, cap in ((8, 128, 65536), (1, 64, 65536), (2, 128, 2048), (4, 24, 40)):
            workload = parse_workload(f"key_mean:t=1,kv={kv},d={d},cap={cap},c=bf16")
            config = MEAN.space(workload, hardware).default
            blocks = MEAN.lower(workload, config, hardware).device.launches[0].grid
            blocks = blocks[0] * blocks[1]
            assert blocks <= 4 * cores
            of_a_thread = cap / (config.parts * config.splits)
            assert of_a_thread < 16 or blocks > 2.6 * cores  # of 4 to an SM
