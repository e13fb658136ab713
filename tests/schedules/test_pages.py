"""Caches in pages of a pool: each sequence is what it is over a cache of its own, wherever its pages lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.ir.caches import single_format
from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.ir.ops import batches, get_op, load_all, pages, parse_workload
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.attention.pages import PagedReach

CPU = local_cpu()
FLASH = {
    "f32": get_schedule("cached_attention.x86_flash"),
    "bf16": get_schedule("cached_attention.x86_flash_pairs"),
}
NAN = {"f32": np.float32(np.nan), "bf16": np.uint16(0x7FC0), "e4m3": np.float32(np.nan)}


def schedule_of(workload):
    """Return the schedule that a workload gets without a plan."""
    return schedules_for(workload, CPU)[0]


def shape_of(draw, op):
    """Draw a workload over pages: the pool may hold less than all of the sequences' contexts."""
    kv, group, b = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    t, page = draw(st.sampled_from((1, 1, 3, 20))), draw(st.sampled_from((16, 32, 48)))
    cap, d = draw(st.integers(t, 150)), draw(st.integers(2, 40))
    p = {
        "t": t, "h": kv * group, "kv": kv, "d": d, "dv": draw(st.integers(1, 40)), "cap": cap, "b": b,
        "page": page, "c": draw(st.sampled_from(("f32", "bf16", "bf16", "e4m3"))),
    }  # fmt: skip
    p["lay"] = "" if p["c"] == "e4m3" else draw(st.sampled_from(("", "", "rows")))
    pool = pages.least_pool(p) + draw(st.sampled_from((0, 1, 7)))
    more = {"sink": draw(st.integers(0, 1))}
    if op == "kv_append":
        more = {"rot": d // 2 * 2, "norm": draw(st.integers(0, 1))}
    return get_op(op).workload(**p, pool=pool, **more)


def groups_of(draw, op):
    """Draw a workload over pages whose caches are in groups of few bits."""
    kv, group, b, t = (draw(st.integers(1, n)) for n in (2, 3, 3, 20))
    p = {
        "t": t, "h": kv * group, "kv": kv, "d": draw(st.integers(2, 40)), "dv": draw(st.integers(1, 70)),
        "cap": 64 * draw(st.integers(1, 3)), "b": b, "page": 64 * draw(st.integers(1, 2)),
        "c": draw(st.sampled_from(("i8", "i4", "i2", "i1"))),
    }  # fmt: skip
    more = (
        {"rot": p["d"] // 2 * 2} if op == "kv_append" else {"len": draw(st.integers(t, p["cap"]))}
    )
    return get_op(op).workload(**p, pool=pages.least_pool(p) + draw(st.integers(0, 3)), **more)


@pytest.mark.parametrize("op", ["kv_append", "cached_attention"])
def test_groups_lie_in_pages_and_tails_with_each_sequence(op):
    run_groups(op, 1)


@pytest.mark.slow
@pytest.mark.parametrize("op", ["kv_append", "cached_attention"])
def test_groups_in_pages_of_any_shape(op):
    run_groups(op, 15)


def run_groups(op, count):
    """Check some kernels; attention of each sequence is that over a cache of its own, to the bit."""

    @settings(max_examples=count)
    @given(data=st.data())
    def run(data):
        definition, seed = get_op(op), data.draw(st.integers(0, 999))
        workload = groups_of(data.draw, op)
        schedule, p = schedule_of(workload), definition.full(workload)
        config = sample_config(schedule, workload, CPU, seed)
        arrays = definition.make_inputs(workload, np.random.default_rng(seed))
        found = check(schedule, workload, config, seed, inputs=arrays)
        if op == "cached_attention":
            mine = list(batches.split(definition, workload, arrays))[-1]
            alone = check(schedule, batches.alone(workload), config, seed, inputs=mine)
            assert np.array_equal(alone.outputs["out"], found.outputs["out"][-p["t"] :])

    run()


def places_in(draw, p):
    """Draw start and valid of each sequence; some have no token that counts."""
    valid = [draw(st.integers(0, p["t"])) for _ in range(p["b"])]
    found = [(draw(st.integers(0, p["cap"] - n)), n) for n in valid]
    return np.array(found, np.int32).reshape((p["b"], 2) if p["b"] > 1 else (2,))


@settings(max_examples=4)
@given(data=st.data())
def test_attention_of_each_sequence_is_that_over_a_cache_of_its_own(data):
    """Pages lie anywhere; those that no table names, and what lies behind a sequence's end, hold NaN."""
    draw, op = data.draw, get_op("cached_attention")
    workload, seed = shape_of(draw, "cached_attention"), draw(st.integers(0, 999))
    p = op.full(workload)
    schedule = schedule_of(workload)
    config = sample_config(schedule, workload, CPU, seed)
    arrays = op.make_inputs(workload, np.random.default_rng(seed))
    found = check(schedule, workload, config, seed, inputs=arrays)
    mine = list(batches.split(op, workload, arrays))
    which = draw(st.integers(0, p["b"] - 1))
    alone = check(schedule, batches.alone(workload), config, seed, inputs=mine[which])
    rows = slice(which * p["t"], (which + 1) * p["t"])
    assert np.array_equal(alone.outputs["out"], found.outputs["out"][rows])


@settings(max_examples=3)
@given(data=st.data())
def test_sequences_may_rest_and_share_what_is_equal(data):
    draw, op = data.draw, get_op("cached_attention")
    workload, seed = shape_of(draw, "cached_attention"), draw(st.integers(0, 999))
    p, rng = op.full(workload), np.random.default_rng(seed)
    arrays = op.make_inputs(workload, rng)
    pos = places_in(draw, p)
    table = pages.drawn_tables(p, pages.places_of(pos), rng)
    with_all = np.zeros(p["pool"] * p["page"], bool)
    for (start, valid), own in zip(pages.places_of(pos), table, strict=True):
        if draw(st.booleans()):  # all pages but the last are those of the first sequence
            own[: start // p["page"]] = table[0, : start // p["page"]]
        at = np.arange(start + valid)
        with_all[own[at // p["page"]] * p["page"] + at % p["page"]] = True
    for name in pages.CACHES:
        fresh = rng.standard_normal(arrays[name].shape, dtype=np.float32)
        arrays[name] = single_format(p["c"]).encode(fresh)
        arrays[name][~with_all] = NAN[p["c"]]
    config = sample_config(schedule_of(workload), workload, CPU, seed)
    check(schedule_of(workload), workload, config, inputs={**arrays, "pos": pos, "pages": table})


@settings(max_examples=3)
@given(data=st.data())
def test_append_writes_where_tables_say_and_nowhere_else(data):
    draw = data.draw
    workload, seed = shape_of(draw, "kv_append"), draw(st.integers(0, 999))
    p = get_op("kv_append").full(workload)
    pos = places_in(draw, p)
    table = pages.drawn_tables(p, pages.places_of(pos), np.random.default_rng(seed))
    schedule = schedule_of(workload)
    config = sample_config(schedule, workload, CPU, seed)
    check(schedule, workload, config, seed, inputs={"pos": pos, "pages": table})


@given(data=st.data())
def test_tables_that_are_drawn_keep_what_is_appended_to_apart(data):
    p = get_op("kv_append").full(shape_of(data.draw, "kv_append"))
    places = pages.places_of(places_in(data.draw, p))
    table = pages.drawn_tables(p, places, np.random.default_rng(data.draw(st.integers(0, 99))))
    assert table.shape == (p["b"], pages.width_of(p["cap"], p["page"]))
    assert table.shape[1] % 16 == 0 and (table >= 0).all() and (table < p["pool"]).all()
    held = [
        row[: pages.pages_of(sum(at), p["page"])] for row, at in zip(table, places, strict=True)
    ]
    assert all(len(set(row.tolist())) == len(row) for row in held)
    for i, (start, _) in enumerate(places):
        written = set(held[i][start // p["page"] :].tolist())
        others = {n for j, row in enumerate(held) if j != i for n in row.tolist()}
        assert not written & others


@settings(max_examples=8)
@given(data=st.data())
def test_eager_ops_over_pages_are_those_over_caches_of_their_own(data):
    load_all()
    ops, workload = torch.ops.mimo, shape_of(data.draw, "kv_append")
    op, draw = get_op("kv_append"), data.draw
    p = op.full(workload)
    arrays = op.make_inputs(workload, np.random.default_rng(draw(st.integers(0, 99))))
    arrays["pos"] = places_in(draw, p)
    arrays["pages"] = pages.drawn_tables(
        p, pages.places_of(arrays["pos"]), np.random.default_rng(1)
    )
    caches = [torch.from_numpy(arrays[n].astype(np.float32)) for n in pages.CACHES]
    given_ = {n: torch.from_numpy(a) for n, a in arrays.items()}
    norms = (given_.get("q_norm"), given_.get("k_norm"))
    tail, named = (p["h"], p["eps"], p["vscale"]), p["c"] if p["c"] == "e4m3" else ""
    singles = list(batches.split(op, workload, {**arrays, **dict(zip(pages.CACHES, (
        c.numpy() for c in caches), strict=True))}))  # fmt: skip
    q = ops.kv_append_pages(
        given_["qkv"], given_["table"], given_["pos"], *norms, *caches, given_["pages"], *tail,
        p["cap"], p["page"], named,
    )  # fmt: skip
    out = ops.paged_attention(
        q, *caches, given_["pages"], given_["pos"], None, 0.3, p["cap"], p["page"], named
    )
    for one, mine, got in zip(singles, q.chunk(p["b"]), out.chunk(p["b"]), strict=True):
        own = [torch.from_numpy(np.nan_to_num(one[n])) for n in pages.CACHES]
        pos = torch.from_numpy(one["pos"].copy())
        rows = [torch.from_numpy(one[n]) for n in ("qkv", "table")]
        expected = ops.kv_append(*rows, pos, *norms, *own, *tail, 0, named)
        torch.testing.assert_close(mine, expected)
        seen = ops.cached_attention(expected, *own, pos, None, 0.3, 0, named)
        torch.testing.assert_close(got, seen)


@pytest.mark.parametrize("wrong", ["no table", "another's table"])
def test_kernels_that_look_elsewhere_are_found(wrong, monkeypatch):
    text = "cached_attention:t=1,h=2,kv=1,d=8,dv=8,cap=64,b=2,page=16,pool=9,c=bf16"
    schedule, seed = FLASH["bf16"], 3
    check(schedule, text, seed=seed)
    if wrong == "no table":
        monkeypatch.setattr(PagedReach, "block", PagedReach.place)
    else:
        made = PagedReach.__init__
        monkeypatch.setattr(PagedReach, "__init__", lambda self, *given: made(self, *given[:-1], 0))
    with pytest.raises(AssertionError, match="out"):
        check(schedule, text, seed=seed)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ("page=24,pool=99", "page=24 is not a multiple of 16 positions"),
        ("pool=9", "page=0 is not a multiple"),
        ("page=16,pool=10", r"pool=10 pages are too few for cap=128 and b=4.*pool=11"),
        ("page=16", "pool=0 pages are too few"),
        ("page=16,pool=99,window=64", "a ring has no pages"),
        ("page=16,pool=99,c=i8", "does not hold whole groups of 64 positions"),
        ("page=16,pool=99,arith=int8", "page=16 is for float arithmetic"),
    ],
)
def test_pages_that_no_kernel_reads_are_refused(more, match):
    b = "" if "c=" in more or "arith" in more else ",b=4"
    with pytest.raises(UsageError, match=match) as found:
        parse_workload(f"cached_attention:t=1,h=2,kv=1,d=64,dv=64,cap=128{b},{more}")
    assert found.value.remedy


def test_pools_are_left_to_kernels_that_read_tables():
    server = PRESETS["sapphirerapids"]
    text = "t=16,h=8,kv=2,d=64,dv=64,cap=256,c=bf16,page=64,pool=9"
    found = [s.name for s in schedules_for(parse_workload(f"cached_attention:{text}"), server)]
    assert found == ["cached_attention.x86_flash_pairs"]
    found = [s.name for s in schedules_for(parse_workload(f"kv_append:{text},rot=64"), server)]
    assert found == ["kv_append.x86_pages"]


def test_work_is_that_of_caches_of_their_own_and_the_tables():
    op, text = get_op("cached_attention"), "cached_attention:t=1,h=8,kv=2,d=64,dv=64,cap=512,b=4"
    own, paged = parse_workload(text), parse_workload(f"{text},page=64,pool=40")
    tables = sum(4 * pages.pages_of(n, 64) for n in op.lengths(op.full(own)))
    assert op.counts(paged).ops == op.counts(own).ops
    assert op.counts(paged).bytes["dram"] == op.counts(own).bytes["dram"] + tables
    config = FLASH["f32"].space(own, CPU).default
    assert FLASH["f32"].work(paged, config, CPU).ops == FLASH["f32"].work(own, config, CPU).ops
    few = op.counts(parse_workload(f"{text},page=64,pool=11"))  # then sequences share
    assert few.bytes["dram"] < op.counts(own).bytes["dram"]
