"""Kernels of sparse attention: the contract in every config, what they visit, and what they declare."""

from __future__ import annotations

import dataclasses
import zlib

import contract
import numpy as np
import pytest
from contract import OP, Case, cases
from harness import check, compare, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.attention.layout import cache_shapes, pack_caches, unpack_caches
from mimo_compile.schedules.attention.lists import ListTiling
from mimo_compile.schedules.attention.lists_work import visits
from mimo_compile.schedules.compile import assembly

CPU = local_cpu()
F32 = get_schedule("sparse_attention.x86_lists")
BF16 = get_schedule("sparse_attention.x86_lists_pairs")
SCHEDULE = {"f32": F32, "bf16": BF16}
ROWS = {"f32": "sparse_attention.x86_rows", "bf16": "sparse_attention.x86_rows_half"}
ROWS = {c: get_schedule(name) for c, name in ROWS.items()}
SMALL = "h=8,kv=2,d=24,dv=40"
NAN = {"f32": np.float32(np.nan), "bf16": np.uint16(0x7FC0)}


def attend(workload, inputs):
    """Run a kernel for caches of either order and of any config, proved against the reference."""
    p, seed = OP.full(workload), zlib.crc32(str(workload).encode())
    schedule = SCHEDULE[p["c"]]
    if seed % 2:
        schedule, workload = ROWS[p["c"]], by_rows(workload)
    return proved(schedule, workload, sample_config(schedule, workload, CPU, seed), inputs).outputs


def proved(schedule, workload, config=None, inputs=None):
    """Check a config; arithmetic that rounds nothing of 16-bit caches must meet the bound of float32."""
    workload = parse_workload(workload) if isinstance(workload, str) else workload
    config = config or schedule.space(workload, CPU).default
    seen = check(schedule, workload, config, inputs=inputs)
    assert schedule.exact(config) == (getattr(config, "arith", "") == "widen")
    if schedule.exact(config):
        bounds = OP.exact_bound(workload, seen.inputs, seen.expected)
        for name in ("out", "lse"):
            compare(schedule.name, name, seen.outputs[name], seen.expected[name], bounds[name])
    return seen


def by_rows(workload):
    """Return the workload over caches that keep each key by itself."""
    return OP.workload(**{**OP.full(workload), "lay": "rows"})


def any_case(sink=None):
    """Return cases small and wide, of both formats."""
    kinds = st.tuples(st.sampled_from(["f32", "bf16"]), st.booleans())
    return kinds.flatmap(lambda kind: cases(sink=sink, c=kind[0], wide=kind[1]))


def run(verdict, count, sink=None):
    """Put some cases to a check of the contract."""

    @settings(max_examples=count)
    @given(any_case(sink))
    def each(case: Case) -> None:
        verdict(attend, case)

    each()


QUICK = [c for c in contract.CHECKS if c is not contract.check_invariance]


@pytest.mark.parametrize("verdict", QUICK, ids=lambda c: c.__name__[6:])
def test_contract(verdict) -> None:
    run(verdict, 2)


@pytest.mark.slow
@pytest.mark.parametrize("verdict", contract.CHECKS, ids=lambda c: c.__name__[6:])
def test_contract_at_length(verdict) -> None:
    run(verdict, 20 if verdict in QUICK else 8)


@pytest.mark.slow
def test_sink_identity() -> None:
    run(contract.check_sink, 10, sink=True)


# each a way of its own through the generator; all that no list names holds NaN
WAYS = [
    "t=1,cap=700,hs=2,block=64,kmax=4",
    "t=1,cap=700,hs=1,block=16,kmax=9,sink=1,len=650",
    "t=1,cap=704,hs=8,block=32,kmax=6,page=32,pool=23,len=700",
    "t=3,cap=300,hs=2,block=16,kmax=40,window=20,len=291",
    "t=1,cap=300,hs=1,block=1,kmax=60,window=33",
    "t=2,cap=320,hs=2,block=8,kmax=12,page=16,pool=50,b=2",
    "t=20,cap=300,hs=2,block=64,kmax=4,rows=8",
    "t=20,cap=200,hs=8,block=16,kmax=4,rows=64,window=5,sink=1",
]

# a ring behind first positions: in it, across its seam, several laps on, and before it has filled
RINGS = [
    "t=1,cap=96,hs=1,block=4,kmax=1,window=70,first=16,len=300",
    "t=5,cap=112,hs=1,block=3,kmax=1,window=60,first=16,sink=1",
    "t=20,cap=128,hs=1,block=20,kmax=1,window=50,first=32,len=97",
    "t=1,cap=96,hs=1,block=16,kmax=1,first=16,len=1000",
    "t=9,cap=64,hs=1,block=4,kmax=1,window=30,first=16,len=12",
]


@pytest.mark.parametrize("c", SCHEDULE)
@pytest.mark.parametrize("way", RINGS)
def test_rings_behind_first_positions(way, c):
    text = f"sparse_attention:{SMALL},{way},c={c}"
    seed = zlib.crc32(text.encode())
    proved(SCHEDULE[c], text, sample_config(SCHEDULE[c], parse_workload(text), CPU, seed))


@pytest.mark.slow
@settings(max_examples=40)
@given(data=st.data())
def test_any_ring_behind_first_positions(data):
    draw = data.draw
    t, block, window = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 90))
    first = -(-block // 16) * 16 + 16 * draw(st.integers(0, 1))
    ring = -(-(window + t - 1) // 16) * 16 + 16 * draw(st.integers(0, 2))
    text = (
        f"sparse_attention:{SMALL},t={t},cap={first + ring},hs=1,block={block},kmax=1,window={window},"
        f"first={first},len={draw(st.integers(t, 4 * ring))},sink={draw(st.integers(0, 1))},"
        f"c={draw(st.sampled_from(sorted(SCHEDULE)))}"
    )
    workload = parse_workload(text)
    schedule = SCHEDULE[OP.full(workload)["c"]]
    proved(schedule, text, sample_config(schedule, workload, CPU, draw(st.integers(0, 999))))


def test_rings_that_cannot_be_are_refused():
    base = f"sparse_attention:t=3,{SMALL},hs=1,kmax=1"
    for way, message in (
        ("cap=96,block=4,window=70,first=12", "first=12 positions cannot stay"),
        ("cap=90,block=4,window=70,first=16", "multiples of 16"),
        ("cap=96,block=20,window=70,first=16", "first must hold a block"),
        ("cap=96,block=4,window=79,first=16", "the ring behind it window"),
        ("cap=96,block=4,window=9,first=16,lay=rows", "in their usual order"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_workload(f"{base},{way}")


@pytest.mark.parametrize("c", SCHEDULE)
@pytest.mark.parametrize("way", WAYS)
def test_defaults(way, c):
    text = f"sparse_attention:{SMALL.replace('d=24', 'd=33')},{way},c={c}"
    proved(SCHEDULE[c], text)
    proved(ROWS[c], text + ",lay=rows")


@pytest.mark.parametrize("splits", [1, 2])
def test_no_key_and_a_sink_of_minus_infinity_give_zero(splits):
    text = f"sparse_attention:t=1,{SMALL},cap=640,hs=8,block=16,kmax=40,sink=1"
    given_ = OP.make_inputs(parse_workload(text), np.random.default_rng(0))
    cnt, idx = np.full((1, 8), 40, np.int32), np.tile(np.arange(40, dtype=np.int32), (1, 8, 1))
    cnt[:, ::2], idx[:, ::2] = 0, -1
    sink = np.full(8, -np.inf, np.float32)
    sink[6:] = 1
    given_ = {n: np.nan_to_num(a) if n.endswith("_cache") else a for n, a in given_.items()}
    given_ |= {"idx": idx, "cnt": cnt, "sink": sink}
    config = dataclasses.replace(F32.space(parse_workload(text), CPU).default, splits=splits)
    seen = check(F32, text, config, inputs=given_).outputs
    assert (seen["out"][0, [0, 2, 4]] == 0).all() and np.isneginf(seen["lse"][0, [0, 2, 4]]).all()
    assert (seen["out"][0, 6] == 0).all() and np.isclose(seen["lse"][0, 6], 1)


@pytest.mark.parametrize("c", SCHEDULE)
def test_ids_behind_the_newest_query_and_lists_longer_than_the_cache(c):
    text = f"sparse_attention:t=2,{SMALL},cap=300,hs=2,block=32,kmax=16,len=130,c={c}"
    workload = parse_workload(text)
    given_ = OP.make_inputs(workload, np.random.default_rng(0))
    full = contract.lists_of(np.ones((2, 2, 10), bool), 16)
    for name in ("k_cache", "v_cache"):
        rng = np.random.default_rng(1)
        shape = given_[name].shape
        values = rng.standard_normal(shape, dtype=np.float32)
        values[130:] = np.nan
        given_[name] = parse_cache_format(c).encode(values)
    given_ |= {"idx": full["IDX"], "cnt": full["CNT"]}
    check(SCHEDULE[c], text, inputs=given_)


@pytest.mark.parametrize("c", SCHEDULE)
def test_padding_of_the_packed_caches_is_never_seen(c):
    text = f"sparse_attention:t=1,h=4,kv=2,d=8,dv=5,cap=21,hs=2,block=16,kmax=2,c={c}"
    seen = check(SCHEDULE[c], text)
    k, v = (seen.memory[n] for n in ("k_cache", "v_cache"))
    if c == "f32":
        k[:, 1, :, 5:] = np.nan
        v[:, 21:] = np.nan
        v[:, :, 5:] = np.nan
    else:
        k.reshape(2, 2, 4, 16, 2)[:, 1, :, 5:] = NAN[c]
        pairs = v.reshape(2, 16, 16, 2)
        pairs[:, 10, :, 1] = pairs[:, 11:] = pairs[:, :, 5:] = NAN[c]
    seen.call()
    for name in ("out", "lse"):
        assert np.array_equal(seen.memory[name], seen.outputs[name])


def test_splits_and_threads_do_not_change_more_than_rounding():
    text = "sparse_attention:t=1,h=8,kv=1,d=16,dv=16,cap=2000,hs=1,block=16,kmax=60,sink=1"
    base = F32.space(parse_workload(text), CPU).default
    found = [
        check(F32, text, dataclasses.replace(base, splits=n, parallel=n > 1)).outputs
        for n in (1, 2, 8)
    ]
    for other in found[1:]:
        for name in ("out", "lse"):
            assert np.allclose(found[0][name], other[name], atol=2e-6)


def test_every_space_has_a_legal_default_and_survives_json():
    for way in (
        *WAYS,
        "t=1,cap=65536,hs=8,block=64,kmax=103",
        "t=512,cap=512,hs=8,block=64,kmax=8,rows=64",
    ):
        for c, schedule in SCHEDULE.items():
            for hardware in (CPU, *PRESETS.values()):
                workload = parse_workload(f"sparse_attention:{SMALL},{way},c={c}")
                space = schedule.space(workload, hardware)
                assert space.legal(space.default)
                assert all(getattr(space.default, k) in v for k, v in space.knobs.items())
                json = schedule.config_to_json(space.default)
                assert schedule.config_from_json(json) == space.default


def test_code_without_avx512():
    v3 = PRESETS["x86-64-v3"]
    for c, schedule in SCHEDULE.items():
        for way in ("block=16,kmax=3", "block=1,kmax=9,window=5"):
            w = parse_workload(f"sparse_attention:t=1,{SMALL},cap=64,hs=2,{way},c={c}")
            config = dataclasses.replace(schedule.space(w, v3).default, parallel=False)
            code = assembly([schedule.lower(w, config, v3)], v3)
            assert "zmm" not in code and "vfmadd" in code
            assert "logf" not in code and "log2f" not in code


# -- caches that keep each key by itself ------------------------------------------------------


DENSE = {"f32": "cached_attention.x86_flash_rows", "bf16": "cached_attention.x86_flash_rows_half"}


@pytest.mark.parametrize("c", DENSE)
def test_append_dense_and_sparse_attention_share_one_cache_by_rows(c):
    base = f"d=37,dv=21,c={c},lay=rows"
    append = parse_workload(f"kv_append:t=3,h=4,kv=2,cap=50,rot=4,{base}")
    dense = parse_workload(f"cached_attention:t=3,h=4,kv=2,cap=50,{base}")
    sparse = parse_workload(f"sparse_attention:t=3,h=4,kv=2,cap=50,hs=2,block=1,kmax=50,{base}")
    writes, flash = get_schedule("kv_append.x86"), get_schedule(DENSE[c])
    pos = {"pos": np.array([45, 3], np.int32)}
    written = check(writes, append, inputs=pos)
    caches = {n: written.memory[n] for n in ("k_cache", "v_cache")}
    given_ = {"q": written.outputs["q"], **pos, **unpack_caches(append, caches)}
    everything = contract.lists_of(np.ones((3, 2, 50), bool), 50)
    lists = {"idx": everything["IDX"], "cnt": everything["CNT"]}
    seen = [
        check(flash, dense, inputs=given_),
        check(ROWS[c], sparse, inputs={**given_, **lists}),
    ]
    for schedule, workload, one in ((flash, dense, seen[0]), (ROWS[c], sparse, seen[1])):
        config = schedule.space(workload, CPU).default
        assert schedule.layouts(workload, config) == writes.layouts(append, None)
        for name, array in caches.items():
            assert np.array_equal(one.memory[name], array)
    assert np.allclose(seen[0].outputs["out"], seen[1].outputs["out"], atol=1e-5)
    other = parse_workload(str(dense).replace(",lay=rows", ""))
    assert not flash.supports(other, CPU) and len(schedules_for(dense, CPU)) == 1


@settings(max_examples=2)
@given(data=st.data())
def test_dense_attention_by_rows(data):
    dense_by_rows(data)


@pytest.mark.slow
@settings(max_examples=25)
@given(data=st.data())
def test_dense_attention_by_rows_at_length(data):
    dense_by_rows(data)


def dense_by_rows(data):
    """Prove any shape, position and config of dense attention, with NaN where nothing was written."""
    draw = data.draw
    c, t = draw(st.sampled_from(sorted(DENSE))), draw(st.sampled_from((1, 2, 7, 20)))
    window = draw(st.sampled_from((0, 0, 1, 17, 40)))
    cap = draw(st.integers(window + t - 1 if window else t, 150).filter(lambda n: n >= t))
    kv, group, d, dv = (draw(st.integers(1, most)) for most in (3, 5, 40, 40))
    workload = parse_workload(
        f"cached_attention:t={t},h={kv * group},kv={kv},d={d},dv={dv},cap={cap},window={window},"
        f"sink={draw(st.integers(0, 1))},c={c},lay=rows"
    )
    valid, seed = draw(st.integers(1, t)), draw(st.integers(0, 999))
    start = draw(st.integers(0, 3 * cap if window else cap - valid))
    op, schedule = get_op("cached_attention"), get_schedule(DENSE[c])
    inputs = op.make_inputs(workload, np.random.default_rng(seed))
    for name in ("k_cache", "v_cache"):
        values = np.random.default_rng(seed).standard_normal(inputs[name].shape, dtype=np.float32)
        inputs[name] = parse_cache_format(c).encode(values)
        inputs[name][min(start + valid, cap) :] = NAN[c]
    inputs["q"][valid:] = np.nan
    inputs["pos"] = np.array([start, valid], np.int32)
    check(schedule, workload, sample_config(schedule, workload, CPU, seed), inputs=inputs)


@settings(max_examples=20)
@given(cap=st.integers(1, 70), kv=st.integers(1, 3), d=st.integers(1, 40), dv=st.integers(1, 40))
def test_packing_by_rows_round_trips(cap, kv, d, dv):
    w = parse_workload(f"cached_attention:t=1,h={kv},kv={kv},d={d},dv={dv},cap={cap},lay=rows")
    rng = np.random.default_rng(0)
    arrays = {"k_cache": rng.random((cap, kv, d)), "v_cache": rng.random((cap, kv, dv))}
    packed = pack_caches(w, arrays)
    assert {n: a.shape for n, a in packed.items()} == cache_shapes(get_op(w.op).full(w))
    for name, array in unpack_caches(w, packed).items():
        assert np.array_equal(array, arrays[name])


@pytest.mark.parametrize("op", ["cached_attention", "kv_append", "sparse_attention"])
def test_unknown_orders_have_one_clear_error(op):
    lists = ",hs=1,block=1,kmax=2" if op == "sparse_attention" else ""
    for change, message in (("lay=columns", "lay=columns is unknown"), ("c=i8,lay=rows", "lay|i8")):
        with pytest.raises(UsageError, match=message):
            parse_workload(f"{op}:t=1,h=1,kv=1,d=8,dv=8,cap=64{lists},{change}")


# -- what is declared --------------------------------------------------------------------------


def tiling(**p):
    whole = dict(
        t=1, h=4, kv=2, hs=2, d=16, dv=16, window=0, page=0, rows=1, kmax=4, block=16, cap=640
    )
    return ListTiling({**whole, **p}, 1, 2, 4, 20, 0)


def test_visits_of_whole_blocks_are_what_lists_hold():
    parts, slots = visits(tiling(), 640)
    assert parts.tolist() == [4] and slots.tolist() == [64]
    parts, slots = visits(tiling(block=64, kmax=20), 600)  # more blocks than there are keys for
    assert parts.tolist() == [38] and slots.tolist() == [600]
    parts, slots = visits(tiling(window=32), 640)
    assert parts.tolist() == [6] and slots.tolist() == [96]


@pytest.mark.parametrize("block", [1, 4, 8])
def test_visits_of_small_blocks_are_what_random_lists_give(block):
    s = tiling(block=block, kmax=64 // block)
    rng = np.random.default_rng(0)
    drawn = [
        len(np.unique(rng.permutation(640 // block)[: 64 // block] * block // 16))
        for _ in range(300)
    ]
    parts, slots = visits(s, 640)
    assert abs(parts[0] - np.mean(drawn)) < 0.05 * np.mean(drawn) and slots[0] == 64


def test_counts_of_whole_blocks_are_the_formula():
    w = parse_workload("sparse_attention:t=1,h=8,kv=2,d=32,dv=16,cap=1024,hs=2,block=64,kmax=4")
    config = dataclasses.replace(F32.space(w, CPU).default, block=64, splits=1, parallel=False)
    counts = F32.work(w, config, CPU)
    assert counts.ops["fma_f32"] == 8 * 256 * (32 + 16)
    assert counts.ops["exp_f32"] == 8 * 256
    assert counts.bytes["dram"] == OP.counts(w).bytes["dram"]
    assert F32.lower(w, config, CPU).counts == counts
