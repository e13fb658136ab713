"""Scores of blocks from descriptors on x86: every kind, way of bringing heads together, format, position."""

from __future__ import annotations

import numpy as np
import pytest
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.ops.score_blocks import KINDS
from mimo_compile.schedules import get_schedule

CPU = local_cpu()
SCORE = get_schedule("score_blocks.x86")
OP = get_op("score_blocks")
WAYS = [(kind, agg) for kind, aggs in KINDS.items() for agg in aggs]


def poisoned(text, start, valid, seed=0):
    """Return descriptors with NaN in every entry that no token may see, and in queries of padding."""
    workload = parse_workload(text)
    p, inputs = OP.full(workload), OP.make_inputs(workload, np.random.default_rng(seed))
    fmt, (size, stride) = parse_cache_format(p["e"]), OP.sizes(p)
    desc = np.random.default_rng(seed).standard_normal(inputs["desc"].shape, dtype=np.float32)
    if p["kind"] == "quest":
        desc.sort(axis=2)
    desc[max(0, (start + valid - size) // stride + 1) :] = np.nan
    inputs["q"][-(-valid // p["rows"]) :] = np.nan
    return {**inputs, "desc": fmt.encode(desc), "pos": np.array([start, valid], np.int32)}


def shape_of(draw, kind, agg):
    kv, group = draw(st.integers(1, 3)), draw(st.sampled_from((1, 2, 3, 5)))
    t, d = draw(st.sampled_from((1, 1, 2, 9, 40))), draw(st.integers(1, 20))
    block = draw(st.sampled_from((1, 3, 4, 16)))
    more = ""
    if kind == "indexer":
        kv, block = 1, 1
    if kind == "gate":
        more = f",soft={draw(st.integers(0, 1))}"
    if kind == "compressed":
        more = f",size={draw(st.sampled_from((2, 4, 8)))},stride={draw(st.sampled_from((2, 3, 4)))}"
    cap = draw(st.integers(t, 330))
    text = (
        f"score_blocks:t={t},h={kv * group},kv={kv},d={d},cap={cap},kind={kind},agg={agg},block={block},"
        f"rows={draw(st.sampled_from((1, 1, 2, 16)))}{more},e={draw(st.sampled_from(('f32', 'bf16')))}"
    )
    valid = draw(st.integers(0, t))
    return text, draw(st.integers(0, cap - valid)), valid


@pytest.mark.parametrize(("kind", "agg"), WAYS)
@settings(max_examples=3)
@given(data=st.data())
def test_any_shape_position_and_config(kind, agg, data):
    text, start, valid = shape_of(data.draw, kind, agg)
    seed, workload = data.draw(st.integers(0, 999)), parse_workload(text)
    config = sample_config(SCORE, workload, CPU, seed)
    check(SCORE, workload, config, seed, inputs=poisoned(text, start, valid, seed))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "agg"), WAYS)
@settings(max_examples=8)
@given(data=st.data())
def test_many_shapes_positions_and_configs(kind, agg, data):
    text, start, valid = shape_of(data.draw, kind, agg)
    seed, workload = data.draw(st.integers(0, 999)), parse_workload(text)
    config = sample_config(SCORE, workload, CPU, seed)
    check(SCORE, workload, config, seed, inputs=poisoned(text, start, valid, seed))


@pytest.mark.parametrize(
    "text",
    [
        "t=1,h=8,kv=2,d=128,cap=4096,kind=quest,agg=max,block=16,e=bf16",
        "t=1,h=8,kv=2,d=64,cap=4096,kind=quest,agg=query,block=16,len=4000",
        "t=30,h=4,kv=2,d=32,cap=4096,kind=mean,block=512",
        "t=2,h=8,kv=2,d=64,cap=4096,kind=gate,block=64,soft=1",
        "t=1,h=8,kv=2,d=64,cap=2048,kind=compressed,agg=sum,block=64,size=32,stride=16",
        "t=1,h=12,kv=1,d=64,cap=1000,kind=indexer,agg=sum,block=1",
    ],
)
def test_usual_sizes_by_default(text):
    check(SCORE, "score_blocks:" + text)


def test_a_position_more_is_a_block_more():
    """A block counts from its last token on, for each row by itself."""
    text = "score_blocks:t=3,h=2,kv=1,d=8,cap=64,kind=mean,block=8"
    for start in (4, 5, 6, 7, 8):
        got = check(SCORE, text, inputs=poisoned(text, start, 3)).outputs["score"]
        seen = np.isfinite(got).sum(-1)
        assert seen.tolist() == [[(start + i + 1) // 8] * 2 for i in range(3)]


def test_parts_and_tiles_change_nothing():
    """Each score is one sum in one order, however the work is spread."""
    text = "score_blocks:t=9,h=6,kv=2,d=20,cap=900,kind=quest,agg=max,block=4"
    workload = parse_workload(text)
    space = SCORE.space(workload, CPU)
    given_ = poisoned(text, 700, 9)
    results = [
        check(SCORE, text, space.make(**{**SCORE.config_to_json(space.default), **knobs}), inputs=given_)
        for knobs in ({"splits": 1, "tile": 1, "rows": 1}, {"splits": 4, "tile": 4, "rows": 3})
    ]  # fmt: skip
    assert np.array_equal(*(r.outputs["score"] for r in results))


@pytest.mark.parametrize("extra", ["kind=quest,agg=max,block=1", "kind=mean,block=1,e=bf16"])
def test_counts_of_an_aligned_case_are_the_formula(extra):
    text = f"score_blocks:t=1,h=4,kv=2,d=32,cap=512,{extra}"
    kernel = check(SCORE, text).kernel
    need = OP.counts(parse_workload(text))
    assert kernel.counts.ops["fma_f32"] == need.ops["fma_f32"]
    assert kernel.counts.bytes["dram"] == pytest.approx(need.bytes["dram"], rel=1e-3)


@pytest.mark.parametrize("length", [3, 50, 170])
def test_counts_cover_what_is_necessary(length):
    for kind, agg in WAYS:
        more = ",size=8,stride=4" if kind == "compressed" else ""
        one = kind == "indexer"
        text = (
            f"score_blocks:t=2,h=4,kv={1 if one else 2},d=16,cap=200,kind={kind},agg={agg},"
            f"block={1 if one else 8},len={length}{more}"
        )
        workload = parse_workload(text)
        need = OP.counts(workload)
        for seed in range(3):
            made = SCORE.work(workload, sample_config(SCORE, workload, CPU, seed), CPU)
            assert made.ops["fma_f32"] >= need.ops["fma_f32"]
            assert made.bytes["dram"] >= 0.9 * need.bytes["dram"]


def test_16_bit_entries_are_half_the_bytes():
    text = "score_blocks:t=1,h=32,kv=8,d=128,cap=65536,kind=quest,agg=max,block=16"
    full, half = (
        SCORE.work(w, SCORE.space(w, CPU).default, CPU).bytes["dram"]
        for w in (parse_workload(text), parse_workload(text + ",e=bf16"))
    )
    assert half == pytest.approx(full / 2, rel=0.01)


def test_code_without_avx512():
    old = PRESETS["x86-64-v3"].with_threads(2)
    if not old.features <= CPU.features:
        pytest.skip("not on this CPU")
    for more in ("kind=quest,agg=max,block=4,e=bf16", "kind=gate,soft=1,block=4"):
        check(SCORE, f"score_blocks:t=2,h=6,kv=2,d=9,cap=300,{more}", hardware=old, threads=1)
