"""Work without code: what every schedule says of a config, the levels that passes read from, shares."""

from __future__ import annotations

import numpy as np
import pytest
from harness import sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.ir.counts import LEVELS, TRAITS
from mimo_compile.ir.hardware import PRESETS
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import SCHEDULES, get_schedule
from mimo_compile.schedules.base import Schedule
from mimo_compile.schedules.emit import build
from mimo_compile.schedules.mpgemm.problem import GemmConfig
from mimo_compile.schedules.work import Stream, busiest, moved

V3, V4 = (PRESETS[n].with_threads(2) for n in ("x86-64-v3", "sapphirerapids"))
WORKLOADS = [
    "mpgemm:m=1,n=70,k=192,w=w4g64,a=a8",
    "mpgemm:m=9,n=200,k=100,w=w8,a=a8",
    "mpgemm:m=5,n=70,k=192,w=w2zg32,a=a8",
    "mpgemm:m=4,n=70,k=64,w=w4g64",
    "mpgemm:m=2,n=40,k=128,w=w3g64,a=a8",
    "mpgemm:m=2,n=40,k=160,w=w1.58d,a=a8",
    "mpgemm:m=1,n=40,k=160,w=w1.58,a=a8",
    "mpgemm:m=9,n=40,k=192,w=w2g64,a=a8",
    "mpgemm:m=50,n=70,k=192,w=w3g64,a=a8",
    "mpgemm:m=3,n=40,k=128,w=nf4g64",
    "mpgemm:m=3,n=40,k=128,w=nf3g64",
    "mpgemm:m=1,n=70,k=192,w=bf16",
    "mpgemm:m=33,n=70,k=50,bias=1",
    "mpgemm:m=3,n=70,k=200,w=bf16,a=abf16",
    "mpgemm:m=40,n=70,k=200,w=bf16,a=abf16",
    "mpgemm:m=3,n=70,k=200,w=w4zg64,a=abf16",
    "mpgemm:m=9,n=70,k=192,w=w8,a=a8g64",
    "mpgemm:m=3,n=40,k=128,w=nf4,a=a8g32",
    "lora_mpgemm:m=3,n=70,k=192,w=w4g64,a=abf16,r=3",
    "mpgemm:m=3,n=70,k=192,w=afp4,a=a8",
    "mpgemm:m=2,n=72,k=180,w=complex2wl2,a=a8",
    "mpgemm:m=1,n=72,k=180,w=complex2,bias=1",
    "lora_mpgemm:m=1,n=70,k=192,w=w4g64,a=a8,r=16",
    "lora_mpgemm:m=9,n=200,k=100,w=w8,a=a8,r=3,l=4",
    "lora_mpgemm:m=2,n=40,k=128,w=w3g64,a=a8,r=5",
    "lora_mpgemm:m=2,n=40,k=160,w=w1.58d,a=a8,r=5,d=fp8",
    "lora_mpgemm:m=3,n=40,k=128,w=nf3g64,r=5,d=f32",
    "lora_mpgemm:m=3,n=70,k=50,bias=1,r=2,parts=48+22",
    "lora_mpgemm:m=1,n=72,k=180,w=complex2,r=1",
    "lora_mpgemm:m=2,n=72,k=180,w=complex2wl2,a=a8,r=1",
    "lora_mpgemm:m=3,n=40,k=192,w=w2g64,a=a8,r=5,d=fp8",
    "lora_mpgemm:m=17,n=40,k=192,w=w2g64,a=a8,r=5",
    "lora_mpgemm:m=50,n=70,k=192,w=w3g64,a=a8,r=5",
    "lora_mpgemm:m=1,n=40,k=160,w=w1.58,a=a8,r=3",
    "lora_mpgemm:m=17,n=40,k=192,w=bf16,a=abf16,r=5",
    "moe:t=5,e=8,k=2,d=64,f=48,w=afp4g32,a=a8",
    "moe:t=5,e=8,k=2,d=64,f=48,w=w4g32,a=a8",
    "moe:t=1,e=8,k=2,d=64,f=48,w=bf16",
    "moe:t=9,e=4,k=2,d=64,f=48,w=w4g32",
    "moe:t=3,e=4,k=2,d=72,f=40,w=complex2wl2,a=a8",
    "moe:t=3,e=4,k=2,d=128,f=64,w=w2g64,a=a8",
    "moe:t=1,e=4,k=2,d=128,f=64,w=w3g64,a=a8",
    "moe:t=3,e=4,k=2,d=160,f=100,w=w1.58d,a=a8",
    "moe:t=3,e=4,k=2,d=160,f=100,w=w1.58,a=a8",
    "moe:t=3,e=4,k=2,d=64,f=48,w=bf16,a=abf16",
    "moe:t=9,e=4,k=2,d=64,f=64,w=w4g32,a=abf16",
    "cached_attention:t=1,h=8,kv=2,d=32,dv=16,cap=300",
    "cached_attention:t=40,h=4,kv=2,d=24,dv=20,cap=200,window=33,sink=1",
    "kv_append:t=3,h=4,kv=2,d=24,dv=20,cap=40,rot=8",
    "kv_append:t=3,h=4,kv=2,d=24,dv=20,cap=64,rot=8,b=2,page=16,pool=9",
    "cached_attention:t=3,h=4,kv=2,d=24,dv=20,cap=64,b=2,page=16,pool=9",
    "cached_attention:t=1,h=8,kv=2,d=33,dv=16,cap=300,c=bf16",
    "cached_attention:t=40,h=4,kv=2,d=24,dv=20,cap=200,window=33,sink=1,c=bf16",
    "cached_attention:t=40,h=4,kv=2,d=32,dv=20,cap=200,window=33,sink=1,c=bf16",
    "cached_attention:t=40,h=4,kv=2,d=25,dv=20,cap=300,c=bf16,arith=int8",
    "cached_attention:t=9,h=4,kv=2,d=24,dv=20,cap=200,window=33,sink=1,arith=int8half",
    "kv_append:t=3,h=4,kv=2,d=25,dv=20,cap=40,rot=8,c=bf16",
    "cached_attention:t=1,h=8,kv=2,d=33,dv=16,cap=320,c=i8",
    "cached_attention:t=40,h=4,kv=2,d=24,dv=80,cap=192,sink=1,c=i4",
    "kv_append:t=3,h=4,kv=2,d=25,dv=20,cap=64,rot=8,c=i2",
    "oracle_attention:t=3,h=8,kv=2,d=33,dv=20,cap=300,block=32,len=200",
    "oracle_attention:t=40,h=4,kv=2,d=24,dv=16,cap=200,block=64,c=bf16",
    "sparse_attention:t=1,h=8,kv=2,d=33,dv=16,cap=700,hs=2,block=64,kmax=4",
    "sparse_attention:t=3,h=8,kv=2,d=32,dv=20,cap=640,hs=8,block=1,kmax=90,window=33,sink=1,page=16,pool=41",
    "sparse_attention:t=40,h=4,kv=2,d=24,dv=20,cap=200,hs=2,block=16,kmax=5,rows=16,len=130",
    "sparse_attention:t=1,h=8,kv=2,d=33,dv=16,cap=700,hs=1,block=32,kmax=4,c=bf16",
    "sparse_attention:t=3,h=8,kv=2,d=32,dv=20,cap=640,hs=2,block=8,kmax=50,page=16,pool=90,b=2,c=bf16",
    "sparse_attention:t=3,h=8,kv=2,d=32,dv=20,cap=96,hs=1,block=4,kmax=1,window=60,first=16,c=bf16",
    "kv_append:t=3,h=4,kv=2,d=24,dv=20,cap=64,rot=8,first=16",
    "cached_attention:t=1,h=8,kv=2,d=33,dv=16,cap=320,c=e4m3",
    "kv_append:t=3,h=4,kv=2,d=24,dv=20,cap=64,rot=8,c=e4m3",
    "describe_blocks:t=3,kv=2,d=24,cap=90,kind=pool3,size=8",
    "describe_blocks:t=1,kv=2,d=24,cap=90,kind=bounds,size=16,len=80,whole=1,c=bf16,e=bf16",
    "gate_queries:t=3,h=4,kv=2,d=24,g=40,rot=24,grot=40,norm=1,w=bf16",
    "gate_keys:t=20,kv=2,d=24,cap=90,size=8,g=40,rot=24,grot=40,c=bf16",
    "score_blocks:t=3,h=4,kv=2,d=24,cap=900,kind=quest,agg=max,block=8,len=600",
    "score_blocks:t=3,h=4,kv=2,d=24,cap=90,kind=gate,block=8,soft=1,e=bf16",
    "score_keys:t=3,h=4,kv=2,d=24,cap=900,kind=oracle,agg=max,block=16,len=600",
    "score_keys:t=20,h=4,kv=2,d=24,cap=90,kind=logits,c=bf16",
    "describe_blocks:t=9,kv=2,d=24,cap=90,kind=bounds,size=4,whole=1,c=bf16,e=bf16,b=2,page=16,pool=9",
    "gate_keys:t=20,kv=2,d=24,cap=90,size=8,g=40,rot=24,grot=40,c=bf16,b=2,page=16,pool=9",
    "score_blocks:t=3,h=4,kv=2,d=24,cap=900,kind=quest,agg=max,block=8,len=600,b=2,page=64,pool=25",
    "score_keys:t=20,h=4,kv=2,d=24,cap=90,kind=logits,c=bf16,b=2,page=16,pool=9",
    "score_keys:t=2,h=4,kv=2,d=24,cap=900,kind=oracle,agg=max,c=bf16,lay=rows",
    "score_keys:t=1,h=4,kv=2,d=24,cap=900,kind=channels,agg=mean,channels=5,len=700,c=bf16,span=64",
    "cached_attention:t=3,h=8,kv=2,d=33,dv=16,cap=300,window=40,lay=rows",
    "cached_attention:t=1,h=8,kv=2,d=33,dv=16,cap=300,c=bf16,lay=rows",
    "kv_append:t=3,h=4,kv=2,d=25,dv=20,cap=40,rot=8,c=bf16,lay=rows",
    "score_lowbit:t=50,h=4,kv=2,d=24,cap=300,block=16,rows=16,first=1,last=2,len=200",
    "score_lowbit:t=50,h=4,kv=2,d=24,cap=300,block=16,rows=16,first=1,last=2,len=200,every=3",
    "key_mean:t=3,kv=2,d=24,cap=300,len=200,c=bf16",
    "index_keys:t=3,kv=2,d=24,cap=300,span=16",
    "append_entries:t=3,kv=1,d=24,cap=300",
    "select_blocks:t=3,hs=4,cap=900,block=4,k=9",
    "select_blocks:t=3,hs=4,cap=900,block=4,k=9,merge=rank,len=500",
    "select_blocks:t=3,hs=4,cap=900,block=4,rule=threshold",
    "sparse_attention:t=3,h=8,kv=2,d=32,dv=20,cap=640,hs=8,block=1,kmax=90,window=33,lay=rows",
    "sparse_attention:t=3,h=8,kv=2,d=33,dv=20,cap=640,hs=2,block=8,kmax=50,page=16,pool=90,b=2,c=bf16,lay=rows",
    "route:t=3,e=20,k=2,scoring=softmax",
    "rms_norm:t=3,d=70,residual=1",
    "rope_table:t=3,rot=16",
    "swiglu:t=3,f=70",
    "embed:t=3,v=50,d=70",
]
# simulated targets have cycle models of their own; generic functions have no text that says what they are;
# GPUs have no traits, and what their kernels declare is tested beside them
NAMES = [
    name
    for entries in SCHEDULES.values()
    for name in entries
    if ".sim_" not in name and ".cuda" not in name and not name.startswith("tir.")
]


PARSED = {text: parse_workload(text) for text in WORKLOADS}
CASES = [
    (name, text)
    for name, schedule in zip(NAMES, map(get_schedule, NAMES), strict=True)
    for text, workload in PARSED.items()
    if workload.op == schedule.op and any(schedule.supports(workload, h) for h in (V3, V4))
]


def test_every_schedule_has_a_workload_here():
    assert {name for name, _ in CASES} == set(NAMES)


@pytest.mark.parametrize("hardware", [V3, V4], ids=lambda h: h.name)
@pytest.mark.parametrize(("name", "text"), CASES)
def test_work_is_what_the_kernel_declares_and_takes_no_code(name, text, hardware, monkeypatch):
    schedule, workload = get_schedule(name), parse_workload(text)
    assert type(schedule).work is not Schedule.work
    if not schedule.supports(workload, hardware):
        return
    need = get_op(workload.op).counts(workload)
    config = sample_config(schedule, workload, hardware, seed=1)
    declared = schedule.lower(workload, config, hardware).counts
    monkeypatch.setattr(type(schedule), "lower", None)
    monkeypatch.setattr(build, "function", None)
    for seed in range(1, 30):
        config = sample_config(schedule, workload, hardware, seed)
        seen = schedule.work(workload, config, hardware)
        if seed == 1:
            assert seen == declared
        far = [seen.bytes[level] for level in LEVELS]
        assert far == sorted(far) and far[0] > 0  # no level gives more than the one in front of it
        assert far[0] >= need.bytes["dram"] * (1 - 1e-9)
        assert set(seen.traits) == set(TRAITS)
        parallel = config.parallel and seen.traits["tasks"] > 1
        assert (1 / 2 if parallel else 1) - 1e-9 <= seen.traits["share"] <= 1 + 1e-9
        assert seen.traits["tasks"] == 1 or config.parallel
        assert 0 < seen.traits["useful"] <= 1 + 1e-9
        assert seen.traits["tile_bytes"] > 0


def test_a_pass_reads_from_the_nearest_cache_that_holds_what_came_between():
    sizes = [1 << 10, V4.l1d_bytes + 1, V4.l2_bytes + 1, V4.l3_bytes + 1]
    for i, between in enumerate(sizes):
        got = moved([Stream(100.0, ((7, between),))], V4)
        # the first pass comes from memory through all levels, the other six from level i on
        assert [got[level] for level in reversed(LEVELS)] == [700.0] * (i + 1) + [100.0] * (3 - i)
    inner = moved([Stream(100.0, ((2, 10.0), (5, V4.l1d_bytes + 1)))], V4)
    assert (inner["l1"], inner["l2"], inner["l3"]) == (1000.0, 500.0, 100.0)
    made = moved([Stream(100.0, made=True), Stream(2.0 * V4.l1d_bytes, made=True)], V4)
    assert made["l1"] == 100 + 2 * V4.l1d_bytes
    assert made["l2"] == 2 * V4.l1d_bytes and made["l3"] == made["dram"] == 0


@given(tasks=st.integers(1, 300), threads=st.integers(1, 64))
def test_the_busiest_thread(tasks, threads):
    run = -(-tasks // min(tasks, threads))  # how TVM cuts a parallel loop
    shares = [len(range(tasks)[i * run : (i + 1) * run]) for i in range(threads)]
    assert sum(shares) == tasks
    assert busiest(tasks, threads) == max(shares) / tasks


def test_tiles_save_traffic_and_orders_differ():
    text = "mpgemm:m=64,n=4096,k=4096,w=w8,a=a8"
    schedule, workload = get_schedule("mpgemm.x86_vnni"), parse_workload(text)

    def seen(**knobs):
        return schedule.work(workload, GemmConfig(dot="vnni512", **knobs), V4)

    small, large = seen(rows=1, tokens=1), seen(rows=4, tokens=4)
    assert large.bytes["l1"] < small.bytes["l1"] / 3
    assert large.traits["loads"] < small.traits["loads"]
    # weights of a chunk that overflow the cache are read again for each tile of tokens
    by_rows, by_tokens = (
        seen(rows=4, tokens=4, chunk=8, order=order) for order in ("rows", "tokens")
    )
    assert by_tokens.bytes["l2"] >= by_rows.bytes["l2"]
    assert seen(rows=8, chunk=8, parallel=True).traits["share"] == 0.5
    assert seen(rows=4, chunk=1).traits["share"] == 1


@settings(max_examples=30)
@given(data=st.data())
def test_share_of_a_parallel_matmul_counts_row_blocks(data):
    n, rows, chunk = (data.draw(st.integers(1, most)) for most in (900, 8, 8))
    threads = data.draw(st.integers(2, 8))
    hardware = PRESETS["sapphirerapids"].with_threads(threads)
    workload = parse_workload(f"mpgemm:m=1,n={n},k=64,w=w8,a=a8")
    config = GemmConfig(rows=rows, chunk=chunk, parallel=True, dot="vnni512")
    got = get_schedule("mpgemm.x86_vnni").work(workload, config, hardware).traits
    blocks = -(-n // 16)
    tiles = [min(rows, blocks - i) for i in range(0, blocks, rows)]
    tasks = [sum(tiles[i : i + chunk]) for i in range(0, len(tiles), chunk)]
    run = -(-len(tasks) // min(len(tasks), threads))
    assert got["share"] == max(sum(tasks[i : i + run]) for i in range(0, len(tasks), run)) / blocks


def test_padding_is_not_useful():
    schedule = get_schedule("mpgemm.x86_float")
    config = GemmConfig()
    exact, padded = (
        schedule.work(parse_workload(f"mpgemm:m=1,n={n},k=64"), config, V4) for n in (64, 49)
    )
    assert exact.traits["useful"] == 1 and padded.traits["useful"] == 49 / 64


def test_causal_prefill_shares_fall_on_both_threads():
    schedule = get_schedule("cached_attention.x86_flash")
    workload = parse_workload("cached_attention:t=256,h=4,kv=1,d=64,dv=64,cap=256")
    make = schedule.config
    even = schedule.work(workload, make(8, 64, 1, 4, True), V4).traits["share"]
    assert 0.5 <= even < 0.55  # tiles come alternately from both ends
    assert schedule.work(workload, make(64, 64, 1, 4, True), V4).traits["tasks"] == 4
    alone = schedule.work(workload, make(8, 64, 1, 4, False), V4)
    assert alone.traits["share"] == 1 and np.isclose(alone.bytes["dram"], 4 * 256 * 128 * 5)
