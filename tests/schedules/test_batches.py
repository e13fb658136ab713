"""Batches: each sequence is what it is alone, whatever its length, its neighbours and its old slots."""

from __future__ import annotations

import numpy as np
import pytest
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.ir.ops import batches, get_op, parse_workload
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.attention.layout import cache_shapes, pack_caches, unpack_caches

CPU = local_cpu()
FLASH = {
    "f32": get_schedule("cached_attention.x86_flash"),
    "bf16": get_schedule("cached_attention.x86_flash_pairs"),
}
APPEND = get_schedule("kv_append.x86")


def positions(draw, b, t, cap, window):
    """Draw start and valid of each sequence; some have no token that counts."""
    out = []
    for _ in range(b):
        valid = draw(st.integers(0, t))
        most = 3 * cap if window else cap - valid
        out.append((draw(st.integers(0, most)), valid))
    return out


def inputs_of(workload, places, seed):
    """Return canonical arrays with NaN in every slot that its own sequence never wrote, and in padding."""
    op = get_op(workload.op)
    p, rng = op.full(workload), np.random.default_rng(seed)
    out = op.make_inputs(workload, rng)
    fmt = {"f32": np.float32(np.nan), "bf16": np.uint16(0x7FC0)}[p["c"]]
    fresh = op.make_inputs(workload.replace(len=0, even=1), rng)  # every slot holds a number
    for i, (start, valid) in enumerate(places):
        for name in ("k_cache", "v_cache"):
            out[name][i] = fresh[name][i]
            out[name][i, min(start + valid, p["cap"]) :] = fmt
        out["q"][i * p["t"] + valid : (i + 1) * p["t"]] = np.nan
    out["pos"] = np.array(places, np.int32)
    return out


@settings(max_examples=5)
@given(data=st.data())
def test_attention_of_each_sequence_is_that_of_it_alone(data):
    draw = data.draw
    kv, group, b = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(2, 4))
    t = draw(st.sampled_from((1, 1, 1, 3)))
    window = draw(st.sampled_from((0, 0, 16, 17)))
    cap = draw(st.integers(window + t - 1 if window else t, 120).filter(lambda n: n >= t))
    c = draw(st.sampled_from(("f32", "bf16")))
    text = (
        f"cached_attention:t={t},h={kv * group},kv={kv},d={draw(st.integers(1, 40))},"
        f"dv={draw(st.integers(1, 40))},cap={cap},window={window},sink={draw(st.integers(0, 1))},c={c},b={b}"
    )
    workload, seed = parse_workload(text), draw(st.integers(0, 999))
    places = positions(draw, b, t, cap, window)
    arrays = inputs_of(workload, places, seed)
    config = sample_config(FLASH[c], workload, CPU, seed)
    found = check(FLASH[c], workload, config, seed, inputs=arrays)
    one, op = batches.alone(workload), get_op("cached_attention")
    which = draw(st.integers(0, b - 1))
    mine = list(batches.split(op, workload, arrays))[which]
    if places[which][1]:
        alone = check(FLASH[c], one, config, seed, inputs=mine)
        together = list(batches.split(op, workload, {"out": found.outputs["out"]}))[which]
        assert np.array_equal(alone.outputs["out"], together["out"])


@settings(max_examples=4)
@given(data=st.data())
def test_append_writes_each_sequence_into_its_own_slots(data):
    draw = data.draw
    kv, group, b = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(2, 4))
    t, d = draw(st.sampled_from((1, 1, 2))), draw(st.integers(2, 40))
    cap = draw(st.integers(t, 50))
    text = (
        f"kv_append:t={t},h={kv * group},kv={kv},d={d},dv={draw(st.integers(1, 40))},cap={cap},"
        f"rot={d // 2 * 2},norm={draw(st.integers(0, 1))},c={draw(st.sampled_from(('f32', 'bf16')))},b={b}"
    )
    places = np.array(positions(draw, b, t, cap, 1), np.int32)
    check(APPEND, text, sample_config(APPEND, parse_workload(text), CPU, 0), inputs={"pos": places})


@pytest.mark.parametrize("t", [1, 3])
def test_angles_are_those_of_each_sequence(t):
    schedule = get_schedule("rope_table.x86")
    found = check(schedule, f"rope_table:t={t},rot=40,b=3")
    for i, (start, _) in enumerate(found.inputs["pos"]):
        at = {"pos": np.array([start, t], np.int32)}
        alone = check(schedule, f"rope_table:t={t},rot=40", inputs=at)
        mine = found.outputs["table"][i * t : (i + 1) * t]
        assert np.array_equal(mine, alone.outputs["table"])


@pytest.mark.parametrize("c", ["f32", "bf16"])
def test_fresh_inputs_find_a_kernel_that_goes_by_the_length_of_another(c):
    """What searches verify on has sequences of different lengths."""
    op = get_op("cached_attention")
    workload = parse_workload(f"cached_attention:t=1,h=2,kv=1,d=16,dv=16,cap=200,c={c},b=3")
    arrays = op.make_inputs(workload, np.random.default_rng(0))
    lengths = arrays["pos"].sum(axis=1)
    assert lengths.tolist() == op.lengths(op.full(workload)) and len(set(lengths)) == 3
    expected = op.reference(workload, arrays)
    bound = op.bound(workload, arrays, expected)["out"]
    wrong = {**arrays, "pos": arrays["pos"][[2, 2, 2]]}
    off = np.abs(op.reference(workload, wrong)["out"] - expected["out"])
    assert (off[:2] > bound[:2]).any(axis=(1, 2)).all() and (off[2] <= bound[2]).all()


@pytest.mark.parametrize("b", [2, 3, 5])
def test_fresh_inputs_find_an_append_for_sequences_that_rest(b):
    op, resting, counts, zero = get_op("kv_append"), set(), set(), set()
    workload = parse_workload(f"kv_append:t=1,h=2,kv=1,d=16,dv=16,cap=64,rot=16,b={b}")
    for seed in range(20):
        rng = np.random.default_rng(seed)
        fresh = op.make_inputs(workload, rng)
        assert (fresh["pos"][:, 1] > 0).all()  # all go on while kernels are timed
        arrays = batches.rested(workload, fresh, rng)
        rests = np.flatnonzero(arrays["pos"][:, 1] == 0).tolist()
        resting.update(rests)
        counts.add(len(rests))
        zero.update((arrays["pos"][rests, 0] == 0).tolist())
        expected = op.reference(workload, arrays)
        bound = op.bound(workload, arrays, expected)
        everyone = {**arrays, "pos": np.maximum(arrays["pos"], [[0, 1]])}
        wrong = op.reference(workload, everyone)
        off = np.abs(wrong["k_cache"] - expected["k_cache"]) > bound["k_cache"]
        assert np.flatnonzero(off.any(axis=(1, 2, 3))).tolist() == rests
    assert resting == set(range(b)) and counts == set(range(1, b))
    assert zero == {False, True}  # where they stood, or (0, 0) as the runtime writes


@given(
    st.integers(1, 300), st.integers(1, 80), st.sampled_from((1, 1, 3)), st.sampled_from((0, 16)),
)  # fmt: skip
def test_fresh_lengths_go_down_to_half(longest, b, t, window):
    cap = max(longest, t, 32)
    text = f"cached_attention:t={t},h=1,kv=1,d=4,dv=4,cap={cap},len={max(longest, t)},window={window},b={b}"
    op = get_op("cached_attention")
    found = op.lengths(op.full(parse_workload(text)))
    assert len(found) == b and found[0] == max(longest, t)
    assert found == sorted(found, reverse=True)
    assert min(found) >= max(t, found[0] / 2)


def test_caches_that_kernels_cannot_index_are_refused():
    """Their indices have 32 bits: of 20 such sequences, the last ones would be elsewhere."""
    text = "kv_append:t=1,h=8,kv=8,d=128,dv=128,cap=131072,rot=128,c=bf16"
    for b, fits in ((16, True), (17, False)):
        workload = parse_workload(f"{text},b={b}")
        config = APPEND.space(workload, CPU).default
        if fits:
            assert APPEND.lower(workload, config, CPU).args
        else:
            with pytest.raises(UsageError, match=r"k_cache .* has more than 2\^31 elements"):
                APPEND.lower(workload, config, CPU)


@pytest.mark.parametrize("c", ["f32", "bf16"])
def test_caches_of_sequences_follow_one_another(c):
    workload = parse_workload(f"cached_attention:t=1,h=4,kv=2,d=5,dv=7,cap=20,c={c},b=3")
    op = get_op("cached_attention")
    arrays = op.make_inputs(workload, np.random.default_rng(0))
    packed = pack_caches(workload, arrays)
    one = batches.alone(workload)
    shapes = cache_shapes(op.full(one))
    for i, mine in enumerate(batches.split(op, workload, arrays)):
        alone = pack_caches(one, mine)
        for name, shape in shapes.items():
            part = packed[name][i * shape[0] : (i + 1) * shape[0]]
            assert part.tobytes() == alone[name].tobytes()
    back = unpack_caches(workload, {n: packed[n] for n in shapes})
    assert all(back[n].tobytes() == arrays[n].tobytes() for n in shapes)


@pytest.mark.parametrize("more", ["even=1", "b=2,even=2"])
def test_equal_lengths_are_those_of_several(more):
    with pytest.raises(UsageError, match="for several sequences"):
        parse_workload(f"cached_attention:t=1,h=2,kv=1,d=64,dv=64,cap=128,{more}")


def test_matrix_tiles_leave_batches_to_vectors():
    server = PRESETS["sapphirerapids"]
    text = "cached_attention:t=16,h=8,kv=2,d=64,dv=64,cap=256,c=bf16,b=2"
    names = [s.name for s in schedules_for(parse_workload(text), server)]
    assert names == ["cached_attention.x86_flash_pairs"]


def test_work_is_that_of_all_sequences():
    text = "cached_attention:t=1,h=8,kv=2,d=64,dv=64,cap=512"
    op = get_op("cached_attention")
    for even in (0, 1):
        workload = parse_workload(f"{text},b=4,even={even}")
        lengths = op.lengths(op.full(workload))
        config = FLASH["f32"].space(workload, CPU).default
        parts = [parse_workload(f"{text},len={n}") for n in lengths]
        each = [FLASH["f32"].work(p, config, CPU) for p in parts]
        whole = FLASH["f32"].work(workload, config, CPU)
        for name in ("fma_f32", "exp_f32"):
            assert whole.ops[name] == pytest.approx(sum(w.ops[name] for w in each))
        needed = sum(op.counts(p).bytes["dram"] for p in parts)
        assert op.counts(workload).bytes["dram"] == needed


def test_bounds_of_exact_kernels_are_those_of_each_sequence_alone():
    op = get_op("cached_attention")
    workload = parse_workload("cached_attention:t=1,h=4,kv=2,d=16,dv=16,cap=48,b=3,c=bf16")
    inputs = op.make_inputs(workload, np.random.default_rng(0))
    expected = op.reference(workload, inputs)
    allowed = op.exact_bound(workload, inputs, expected)["out"]
    one = batches.alone(workload)
    parts = [
        op.exact_bound(one, x, y)["out"]
        for x, y in zip(
            batches.split(op, workload, inputs), batches.split(op, workload, expected), strict=True
        )
    ]
    assert np.array_equal(allowed, np.concatenate(parts))


FURTHER = [
    "cached_attention:t=1,h=2,kv=1,d=4,dv=4,cap=256,len=128",
    "cached_attention:t=20,h=2,kv=1,d=4,dv=4,cap=256,len=128,page=64,pool=5",
    "cached_attention:t=1,h=2,kv=1,d=4,dv=4,cap=48,window=32",
    "cached_attention:t=1,h=2,kv=1,d=4,dv=4,cap=256,len=128,b=3,even=1",
    "cached_attention:t=1,h=4,kv=2,d=4,dv=4,cap=256,len=128,c=i4",
    "sparse_attention:t=1,h=2,kv=1,d=4,dv=4,cap=256,hs=1,block=16,kmax=6,b=2",
    "select_blocks:t=1,hs=2,cap=256,block=16,k=4",
]


@pytest.mark.parametrize("text", FURTHER)
def test_what_is_verified_further_fills_no_block(text):
    """What is timed may fill all, and none of its sequences rests."""
    workload = parse_workload(text)
    op, found = get_op(workload.op), set()
    b = op.full(workload).get("b", 1)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        fresh = op.make_inputs(workload, rng)
        given = batches.further(op, workload, fresh, rng)
        assert {n: a.shape for n, a in given.items()} == {n: a.shape for n, a in fresh.items()}
        longest = fresh["pos"].reshape(-1, 2).sum(1).max()
        assert longest % 16 == 0
        lengths = given["pos"].reshape(-1, 2).sum(1)
        going = given["pos"].reshape(-1, 2)[:, 1] > 0
        assert going.sum() in (range(1, b) if b > 1 else [1])
        # where lengths differ, those behind the first may be any
        assert max(lengths[going]) % 16 or "b=2" in text
        assert (lengths[going] >= longest // 4).all() and (lengths <= longest).all()
        found.add(int(max(lengths[going])))
    assert len(found) >= 3


def test_there_is_nothing_further_where_a_call_is_all_there_is():
    for text in ("cached_attention:t=64,h=2,kv=1,d=4,dv=4,cap=64", "embed:t=2,v=9,d=4"):
        workload = parse_workload(text)
        op, rng = get_op(workload.op), np.random.default_rng(0)
        assert batches.further(op, workload, op.make_inputs(workload, rng), rng) is None
