"""Batches of every op that decoding may need: each sequence is what it is alone, and one that rests stays."""

from __future__ import annotations

import numpy as np
import pytest
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import batches, get_op, parse_workload
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.attention.group_layout import group_shapes
from mimo_compile.schedules.attention.layout import pack_caches, unpack_caches

CPU = local_cpu()
APPEND = "kv_append:t=1,h=4,kv=2,d=20,dv=24,rot=20,b=3"
ATTEND = "cached_attention:t=1,h=6,kv=2,d=20,dv=24,b=3"
LISTS = "sparse_attention:t=1,h=4,kv=2,d=20,dv=24,b=3"
TEXTS = [
    f"{APPEND},cap=48,c=e4m3,norm=1",
    f"{APPEND},cap=128,c=i4",
    f"{ATTEND},cap=90,window=40,c=e4m3",
    f"{ATTEND},cap=256,c=i8",
    "describe_blocks:t=1,kv=2,d=9,cap=128,kind=bounds,size=16,whole=1,c=bf16,e=bf16,b=3",
    "score_blocks:t=1,h=6,kv=2,d=20,cap=600,kind=quest,agg=query,block=16,b=3",
    "score_blocks:t=1,h=4,kv=2,d=16,cap=600,kind=gate,soft=1,block=16,b=3",
    "score_keys:t=1,h=4,kv=2,d=20,cap=100,kind=logits,lay=rows,b=3",
    "index_keys:t=1,kv=2,d=20,cap=100,span=16,c=bf16,b=3",
    "append_entries:t=1,kv=2,d=9,cap=100,e=bf16,b=3",
    "score_keys:t=1,h=4,kv=2,d=20,cap=100,kind=channels,agg=mean,channels=5,span=16,b=3",
    "select_blocks:t=1,hs=3,cap=200,block=1,k=20,merge=rank,last=2,b=3",
    f"{LISTS},cap=400,hs=4,block=16,kmax=6",
    f"{LISTS},cap=96,hs=1,block=4,kmax=1,first=16,window=40,sink=1",
    f"{LISTS},cap=100,hs=1,block=1,kmax=30,lay=rows,c=bf16",
    "gate_keys:t=1,kv=2,d=16,cap=128,size=16,g=16,rot=16,grot=16,norm=1,b=3",
    "gate_queries:t=1,h=4,kv=2,d=16,g=16,rot=16,grot=16,norm=1,b=3",
]
MORE = [
    f"{ATTEND},cap=90,lay=rows,c=bf16",
    "select_blocks:t=1,hs=2,cap=900,block=16,k=9,first=1,last=1,b=3",
    f"{APPEND},cap=40,lay=rows,c=bf16",
    f"{ATTEND},cap=256,c=i2,sink=1",
    f"{ATTEND},cap=256,c=i1",
    f"{APPEND},cap=64,first=16,c=bf16",
    f"{APPEND},cap=192,c=i2,norm=1".replace("t=1", "t=3"),
    f"{ATTEND},cap=300,c=e4m3,sink=1".replace("t=1", "t=4"),
    f"{ATTEND},cap=320,c=i4".replace("t=1", "t=3"),
    f"{ATTEND},cap=300,lay=rows".replace("t=1", "t=2"),
    "describe_blocks:t=5,kv=2,d=9,cap=100,kind=mean,size=8,stride=4,b=3",
    "describe_blocks:t=5,kv=2,d=9,cap=100,kind=pool3,size=16,b=3",
    "score_blocks:t=3,h=4,kv=2,d=20,cap=300,kind=mean,block=16,b=3",
    "score_blocks:t=2,h=4,kv=2,d=16,cap=300,kind=compressed,agg=sum,block=32,size=32,stride=16,b=3",
    "score_keys:t=2,h=4,kv=2,d=20,cap=700,kind=oracle,agg=max,block=16,b=3,c=bf16",
    "index_keys:t=3,kv=1,d=9,cap=40,span=8,b=4",
    "append_entries:t=3,kv=1,d=9,cap=40,b=4",
    "score_blocks:t=2,h=4,kv=1,d=20,cap=300,kind=indexer,agg=sum,block=1,b=3",
    "score_keys:t=2,h=4,kv=2,d=20,cap=100,kind=channels,channels=3,guess=1,c=bf16,b=2",
    "select_blocks:t=2,hs=2,cap=900,block=16,rule=threshold,k=1,last=1,b=3",
    "select_blocks:t=2,hs=2,cap=900,block=16,rule=mass,b=3",
    f"{LISTS},cap=400,hs=2,block=4,kmax=9,window=20,c=bf16".replace("t=1", "t=3"),
]


def resting(workload, seed):
    """Return fresh inputs of a batch some of whose sequences have no token."""
    rng = np.random.default_rng(seed)
    return batches.rested(workload, get_op(workload.op).make_inputs(workload, rng), rng)


def prove(text, seed=0):
    """Check each schedule, whose reference is that of each sequence alone; kept states must not change."""
    workload = parse_workload(text)
    found = schedules_for(workload, CPU)
    assert found
    for schedule in found:
        config = sample_config(schedule, workload, CPU, seed)
        check(schedule, workload, config, seed, inputs=resting(workload, seed))


@pytest.mark.parametrize("text", TEXTS)
def test_sequences_are_what_they_are_alone(text):
    prove(text)


@pytest.mark.slow
@pytest.mark.parametrize("text", [*TEXTS, *MORE])
def test_sequences_are_what_they_are_alone_in_other_configs(text):
    prove(text, 1)


@pytest.mark.parametrize(
    "more",
    [
        "cap=128,c=i4,page=64,pool=5",
        "cap=48,c=e4m3",
        pytest.param("cap=128,c=i4", marks=pytest.mark.slow),
        pytest.param("cap=48,c=e4m3,page=16,pool=5", marks=pytest.mark.slow),
    ],
)
def test_sequences_whose_keys_are_not_rotated(more):
    prove(f"kv_append:t=1,h=2,kv=1,d=16,dv=16,b=2,{more}")


@settings(max_examples=2)
@given(data=st.data())
def test_groups_and_tails_are_those_of_each_sequence(data):
    """Whatever the lengths: groups that are codes, those in the tail, and rows of a running one."""
    draw = data.draw
    c, t, b = draw(st.sampled_from(("i8", "i4", "i2", "i1"))), draw(st.sampled_from((1, 1, 3))), 3
    text = f"cached_attention:t={t},h=4,kv=2,d=12,dv=20,cap=256,c={c},b={b}"
    workload, op = parse_workload(text), get_op("cached_attention")
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    lengths = draw(st.lists(st.integers(t, 256), min_size=b, max_size=b))
    alone = [batches.alone(workload, len=n) for n in lengths]
    arrays = batches.join(op, workload, [op.make_inputs(one, rng) for one in alone])
    rests = draw(st.integers(0, b))
    if rests < b:
        arrays["pos"][rests] = draw(st.sampled_from(([0, 0], [lengths[rests] - t, 0])))
    schedule = get_schedule("cached_attention.x86_flash_groups")
    check(schedule, workload, sample_config(schedule, workload, CPU, t), inputs=arrays)


@pytest.mark.parametrize("text", [t for t in TEXTS if t.startswith(("kv_append", "cached"))])
def test_states_of_sequences_follow_one_another(text):
    workload = parse_workload(text)
    op, one = get_op(workload.op), batches.alone(workload)
    arrays = op.make_inputs(workload, np.random.default_rng(0))
    states = {a.name for a in op.args(workload) if a.role == "state"}
    packed = pack_caches(workload, arrays)
    for i, mine in enumerate(batches.split(op, workload, arrays)):
        alone = pack_caches(one, mine)
        for name in states:
            assert np.split(packed[name], 3)[i].tobytes() == alone[name].tobytes()
    back = unpack_caches(workload, {name: packed[name] for name in states})
    again = pack_caches(workload, back)
    assert all(again[name].tobytes() == packed[name].tobytes() for name in states)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (f"{APPEND},cap=512,c=i4", 64),
        (f"{APPEND},cap=512,c=i8".replace("b=3", "b=2"), 64),
        (f"{APPEND},cap=512,c=i4,page=64,pool=99", 64),
        ("describe_blocks:t=1,kv=1,d=3,cap=512,kind=mean,size=16,whole=1,b=3", 16),
        ("describe_blocks:t=1,kv=1,d=3,cap=512,kind=mean,size=16,stride=8,whole=1,b=3", 8),
        ("gate_keys:t=1,kv=1,d=8,cap=512,size=64,g=8,rot=8,grot=8,b=4", 64),
        ("index_keys:t=1,kv=1,d=3,cap=512,span=64,b=3", 64),
    ],
)
def test_fresh_inputs_find_a_kernel_that_completes_blocks_of_the_first_sequence_alone(text, size):
    """In every draw another sequence completes one; of several others, none does in all draws."""
    workload = parse_workload(text)
    op, seen = get_op(workload.op), []
    for seed in range(30):
        arrays = op.make_inputs(workload, np.random.default_rng(seed))
        seen.append(arrays["pos"].sum(1) % size == 0)
    ends = np.array(seen)
    assert ends[:, 1:].any(1).all()
    assert ends.any(0).all() and (len(ends[0]) == 2 or not ends[:, 1:].all(0).any())


def test_sequences_with_one_token_are_appended_to_beside_long_ones():
    workload = parse_workload(f"{APPEND},cap=512,c=i4")
    draws = [
        get_op("kv_append").make_inputs(workload, np.random.default_rng(seed))["pos"].tolist()
        for seed in range(20)
    ]
    assert any([0, 1] in places and max(places)[0] > 64 for places in draws)


def test_shapes_of_groups_count_all_sequences():
    p = {"cap": 128, "kv": 2, "d": 64, "dv": 64, "tail": 128, "c": "i4"}
    from mimo_compile.ir.kv_groups import GROUPED

    one, three = (group_shapes({**p, "b": b}, GROUPED["i4"]) for b in (1, 3))
    assert three == {name: (3 * shape[0], *shape[1:]) for name, shape in one.items()}


@pytest.mark.parametrize(
    "text",
    [
        "describe_blocks:t=1,kv=2,d=16,cap=256,kind=bounds,size=16",
        "score_blocks:t=1,h=4,kv=2,d=16,cap=256,kind=quest,agg=max,block=16",
        "select_blocks:t=1,hs=2,cap=256,block=16,k=4",
        "score_keys:t=1,h=4,kv=2,d=16,cap=256,kind=logits",
        "score_keys:t=1,h=4,kv=2,d=16,cap=256,kind=channels,agg=mean,channels=3,span=32",
        "sparse_attention:t=1,h=4,kv=2,d=16,dv=16,cap=256,hs=2,block=16,kmax=4",
        "cached_attention:t=1,h=4,kv=2,d=64,dv=64,cap=256,c=i4",
    ],
)
def test_work_is_that_of_all_sequences(text):
    workload, op = parse_workload(f"{text},b=4"), get_op(text.partition(":")[0])
    lengths = batches.lengths(256, op.full(workload))
    assert lengths[0] == 256 and len(set(lengths)) == 4 and min(lengths) >= 128
    parts = [parse_workload(f"{text},len={n}") for n in lengths]
    schedule = schedules_for(workload, CPU)[0]
    config = schedule.space(workload, CPU).default
    whole, each = (
        schedule.work(workload, config, CPU), [schedule.work(w, config, CPU) for w in parts]
    )  # fmt: skip
    for name in whole.ops:
        assert whole.ops[name] == pytest.approx(sum(w.ops[name] for w in each), rel=0.02), name
    needed = op.counts(workload)
    for name in needed.ops:
        assert needed.ops[name] == pytest.approx(sum(op.counts(w).ops[name] for w in parts))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("cached_attention:t=1,h=2,kv=1,d=64,dv=64,cap=128,b=2,arith=int8", "b=2 is for float"),
    ],
)
def test_what_no_kernel_computes_for_several_is_refused(text, match):
    with pytest.raises(UsageError, match=match):
        parse_workload(text)
