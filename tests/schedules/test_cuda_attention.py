"""Attention and append for GPUs, run on the CPU thread by thread and held to the ops' bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from harness import sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.ir.hardware import CUDA, PRESETS
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.attention import cuda_layout as layout
from mimo_compile.schedules.attention.cuda_append import WarpsConfig
from mimo_compile.schedules.attention.cuda_flash import PartsConfig, StagesConfig
from mimo_compile.schedules.cuda import limits
from mimo_compile.schedules.cuda.emulate import compiler
from mimo_compile.search.measure.emulated import check_emulated

A100, H200 = CUDA["cuda:sm_80"], CUDA["cuda:sm_90a"]
APPEND, DECODE = get_schedule("kv_append.cuda"), get_schedule("cached_attention.cuda_decode")
PREFILL, LISTS = (
    get_schedule("cached_attention.cuda_prefill"),
    get_schedule("sparse_attention.cuda_lists"),
)
needs_compiler = pytest.mark.skipif(compiler() is None, reason="emulation needs a C++ compiler")


def made(text, changes, seed=0):
    """Return a workload's inputs with other places ``pos``; what was never written then holds NaN."""
    workload = parse_workload(text)
    op = get_op(workload.op)
    inputs = op.make_inputs(workload, np.random.default_rng(seed))
    rng, p = np.random.default_rng(seed), op.full(workload)
    pos = np.array(changes, np.int32).reshape(inputs["pos"].shape)
    caches = {
        n: inputs[n].reshape(p["b"], p["cap"], *inputs[n].shape[-2:])
        for n in ("k_cache", "v_cache")
    }
    for name, cache in caches.items():
        drawn = rng.standard_normal(cache.shape, dtype=np.float32)
        for own, (start, valid) in zip(drawn, pos.reshape(-1, 2), strict=True):
            own[min(start + valid, p["cap"]) :] = np.nan
        bits = (drawn.view(np.uint32) >> 16).astype(np.uint16)  # shorter, but still NaN
        inputs[name] = bits.reshape(inputs[name].shape)
    for i, (_, valid) in enumerate(pos.reshape(-1, 2)):
        inputs["q"][i * p["t"] + valid : (i + 1) * p["t"]] = np.nan  # padding may hold anything
    if "sink" in inputs:
        inputs["sink"][0] = 9  # above all logits
    return {**inputs, "pos": pos}


# -- caches ----------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    b=st.integers(1, 3), kv=st.integers(1, 3), d=st.integers(1, 40), dv=st.integers(1, 40),
    cap=st.integers(1, 30), seed=st.integers(0, 99),
)  # fmt: skip
def test_packing_is_undone_and_pads_with_zeros(b, kv, d, dv, cap, seed):
    text = f"cached_attention:t=1,h={kv},kv={kv},d={d},dv={dv},cap={cap},c=bf16,b={b}"
    workload = parse_workload(text)
    inputs = get_op(workload.op).make_inputs(workload, np.random.default_rng(seed))
    caches = {n: inputs[n] for n in ("k_cache", "v_cache")}
    packed = layout.pack(workload, caches)
    args = {a.name: a for a in layout.kernel_args(workload)}
    for name, width in (("k_cache", d), ("v_cache", dv)):
        array = packed[name]
        assert array.shape == args[name].shape and array.dtype == args[name].dtype
        assert array.shape[-1] % 16 == 0 and not array[..., width:].any()
        canonical = caches[name].reshape(b, cap, kv, width)
        assert (array.reshape(b, kv, cap, -1)[-1, 0, cap - 1, :width] == canonical[-1, -1, 0]).all()
    back = layout.unpack(workload, packed)
    assert all(np.array_equal(back[n], caches[n]) for n in caches)


def test_gpus_and_cpus_do_not_get_each_other_s_kernels():
    texts = (
        "kv_append:t=2,h=4,kv=2,d=16,dv=16,cap=40,c=bf16",
        "cached_attention:t=2,h=4,kv=2,d=16,dv=16,cap=40,c=bf16",
        "sparse_attention:t=2,h=4,kv=2,d=16,dv=16,cap=40,hs=2,block=4,kmax=4,c=bf16",
    )
    for text in texts:
        workload = parse_workload(text)
        for hardware in (A100, H200):
            assert all(".cuda" in s.name for s in schedules_for(workload, hardware))
        assert not any(
            ".cuda" in s.name for s in schedules_for(workload, PRESETS["sapphirerapids"])
        )
        float32 = parse_workload(text.replace(",c=bf16", ""))
        assert not schedules_for(float32, H200)


@pytest.mark.parametrize("hardware", [A100, H200], ids=lambda h: h.name)
def test_heads_of_any_width_have_a_legal_default_or_no_kernel(hardware):
    wide = ((256, 256, True), (64, 272, True), (64, 320, True), (576, 512, False))
    for d, dv, there in ((64, 64, True), (192, 128, True), *wide):
        for t in (1, 100, 3000):
            text = f"cached_attention:t={t},h=8,kv=2,d={d},dv={dv},cap=4096,c=bf16"
            workload = parse_workload(text)
            found = schedules_for(workload, hardware)
            assert bool(found) == there, text
            for schedule in found:
                space = schedule.space(workload, hardware)
                assert space.legal(space.default), (text, space.default)
                assert sum(1 for _ in space) > 5
                assert "wgmma" not in schedule.name or dv <= 256  # columns of a product
    many = parse_workload("cached_attention:t=3000,h=8,kv=2,d=64,dv=64,cap=4096,c=bf16")
    wgmma = ["cached_attention.cuda_wgmma"] if hardware is H200 else []
    assert [s.name for s in schedules_for(many, hardware)] == [PREFILL.name, *wgmma]


@pytest.mark.parametrize(
    ("schedule", "d", "dv", "config"),
    [
        (LISTS, 256, 256, PartsConfig(32, 4, 2, 6)),
        (LISTS, 256, 240, PartsConfig(64, 2, 4, 8)),
        (LISTS, 208, 208, PartsConfig(64, 2, 2, 6)),
        (DECODE, 240, 208, PartsConfig(64, 3, 2, 8)),
        (DECODE, 200, 200, PartsConfig(64, 3, 2, 12)),
        (PREFILL, 200, 200, StagesConfig(64, 2, 2)),
    ],
)
def test_configs_that_nvcc_spills_registers_of_are_not_legal(schedule, d, dv, config):
    lists = ",hs=1,block=16,kmax=64,window=100" if schedule is LISTS else ""
    t = 100 if schedule is PREFILL else 2
    text = f"{schedule.op}:t={t},h=12,kv=4,d={d},dv={dv},cap=4096,c=bf16{lists}"
    assert not schedule.space(parse_workload(text), H200).legal(config)


@pytest.mark.parametrize(
    "text",
    [
        "cached_attention:t=150000,h=64,kv=1,d=64,dv=64,cap=150000,c=bf16",
        "sparse_attention:t=100000,h=64,kv=8,d=64,dv=64,cap=100000,hs=8,block=64,kmax=16,rows=100000,c=bf16",
        "kv_append:t=100000,h=64,kv=8,d=64,dv=64,cap=100000,c=bf16",
    ],
)
def test_launches_of_many_tokens_are_within_limits(text):
    workload = parse_workload(text)
    for schedule in schedules_for(workload, H200):
        limits.check(schedule.lower(workload, schedule.space(workload, H200).default, H200), H200)


# -- results ---------------------------------------------------------------------------------------

QUICK = [
    (
        APPEND,
        "kv_append:t=3,h=4,kv=2,d=25,dv=18,cap=12,rot=10,norm=1,vscale=0.7,c=bf16,b=2",
        WarpsConfig(2),
    ),
    (
        DECODE,
        "cached_attention:t=2,h=9,kv=1,d=24,dv=18,cap=150,window=120,sink=1,c=bf16,b=2",
        PartsConfig(32, 2, 2, 2),
    ),
    (
        LISTS,
        "sparse_attention:t=3,h=4,kv=1,d=24,dv=18,cap=160,hs=1,block=4,kmax=24,rows=2,window=40,sink=1,page=16,"
        "pool=12,len=133,c=bf16",
        PartsConfig(32, 2, 2, 2),
    ),
    (
        PREFILL,
        "cached_attention:t=40,h=3,kv=1,d=24,dv=18,cap=120,window=60,sink=1,len=200,c=bf16",
        StagesConfig(16, 2, 4),
    ),
    (PREFILL, "cached_attention:t=5,h=15,kv=1,d=9,dv=9,cap=80,window=64,c=bf16", StagesConfig(16)),
]


@needs_compiler
@pytest.mark.parametrize(("schedule", "text", "config"), QUICK, ids=[s.name for s, _, _ in QUICK])
def test_results_are_within_the_op_s_bound(schedule, text, config):
    # one sequence has filled its ring, the other has slots that were never written
    inputs = made(text, [(498, 2), (70, 2)]) if schedule is DECODE else None
    seen = check_emulated(text, schedule, config, H200, seed=2, inputs=inputs)
    assert all(np.isfinite(a).all() for n, a in seen.outputs.items() if n in ("out", "q", "lse"))


EXACT = [
    (
        DECODE,
        f"cached_attention:t=2,h=9,kv=1,d=24,dv=18,cap=150,c=bf16,scale={math.log(2)}",
        PartsConfig(32, 2, 2, 2),
    ),
    (
        LISTS,
        "sparse_attention:t=3,h=4,kv=1,d=24,dv=18,cap=160,hs=1,block=4,kmax=24,rows=2,window=40,len=133,c=bf16,"
        f"scale={math.log(2)}",
        PartsConfig(32, 2, 2, 2),
    ),
    (
        PREFILL,
        f"cached_attention:t=20,h=3,kv=1,d=24,dv=18,cap=90,window=50,c=bf16,scale={math.log(2)}",
        StagesConfig(16, 2, 2),
    ),
]
"""Logits to base 2 are q.k itself."""


def exact_inputs(workload):
    """Return inputs whose logits to base 2 are whole numbers, so that weights are powers of 2.

    Nothing but float32 sums is rounded then: results are within the op's `exact_bound`, which a softmax scale
    that is off by half a percent is far from.
    """
    rng = np.random.default_rng(0)
    inputs = get_op(workload.op).make_inputs(workload, rng)
    for name in ("q", "k_cache", "v_cache"):
        drawn = rng.integers(-1, 2, inputs[name].shape).astype(np.float32)
        if name == "v_cache":
            drawn = rng.standard_normal(inputs[name].shape, dtype=np.float32)
        inputs[name] = drawn if name == "q" else (drawn.view(np.uint32) >> 16).astype(np.uint16)
    return inputs


def check_exact(schedule, text, config, hardware, **more):
    """Hold results where nothing is rounded to the op's `exact_bound`; arguments as for `check_emulated`."""
    workload = parse_workload(text)
    seen = check_emulated(
        workload, schedule, config, hardware, inputs=exact_inputs(workload), **more
    )
    bound = get_op(workload.op).exact_bound(workload, seen.inputs, seen.expected)
    for name, most in bound.items():
        error = np.abs(seen.outputs[name] - seen.expected[name])
        assert (error <= most).all(), f"{name}: {(error / most).max():.3g} of what is exact"
    return seen


@needs_compiler
@pytest.mark.parametrize(
    ("schedule", "text", "config"),
    EXACT,
    ids=[s.name for s, _, _ in EXACT],
)
def test_results_are_exact_where_nothing_is_rounded(schedule, text, config):
    check_exact(schedule, text, config, H200)


def drawn_heads(draw):
    kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    d, dv = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    return f"h={kv * group},kv={kv},d={d},dv={dv}"


def drawn_dense(draw, tokens):
    """Return a dense workload of some tokens and the places of its sequences."""
    t, b = draw(tokens), draw(st.integers(1, 2))
    window = draw(st.sampled_from((0, 0, 1, 16, 17, 40, 90)))
    cap = draw(st.integers(window + t - 1 if window else t, 260).filter(lambda n: n >= t))
    sink = draw(st.integers(0, 1))
    text = f"cached_attention:t={t},{drawn_heads(draw)},cap={cap},window={window},sink={sink},c=bf16,b={b}"
    places = []
    for _ in range(b):
        valid = draw(st.integers(0 if b > 1 else 1, t))
        places.append((draw(st.integers(0, 3 * cap if window else cap - valid)), valid))
    return text, places


def check_drawn(schedule, text, changes, hardware, seed):
    workload = parse_workload(text)
    config = sample_config(schedule, workload, hardware, seed)
    check_emulated(workload, schedule, config, hardware, inputs=made(text, changes, seed))


@pytest.mark.slow
@needs_compiler
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_decode_of_any_shape_and_place(data):
    text, places = drawn_dense(data.draw, st.integers(1, 6))
    check_drawn(
        DECODE,
        text,
        places,
        data.draw(st.sampled_from((A100, H200))),
        data.draw(st.integers(0, 99)),
    )


@pytest.mark.slow
@needs_compiler
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_prefill_of_any_shape_and_place(data):
    text, places = drawn_dense(data.draw, st.integers(1, 60))
    check_drawn(
        PREFILL,
        text,
        places,
        data.draw(st.sampled_from((A100, H200))),
        data.draw(st.integers(0, 99)),
    )


@pytest.mark.slow
@needs_compiler
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_lists_of_any_shape(data):
    draw = data.draw
    heads, t = drawn_heads(draw), draw(st.integers(1, 5))
    h, kv = (int(part.partition("=")[2]) for part in heads.split(",")[:2])
    hs, block = draw(st.sampled_from((1, kv, h))), draw(st.sampled_from((1, 3, 16, 64)))
    first = draw(st.sampled_from((0, 0, 64)))
    cap = draw(st.integers(8, 16)) * 16
    window = draw(st.integers(0, min(40, cap - first - t + 1)))
    page = 16 * draw(st.integers(0, 1)) * (not first)
    length, b = draw(st.integers(t, 2 * cap if first else cap)), draw(st.integers(1, 2))
    text = (
        f"sparse_attention:t={t},{heads},cap={cap},hs={hs},block={block},kmax={draw(st.integers(1, 30))},"
        f"rows={draw(st.integers(1, 6))},window={window},sink={draw(st.integers(0, 1))},page={page},"
        f"pool={b * cap // 16 + 1 if page else 0},len={length},first={first},c=bf16,b={b}"
    )
    hardware, seed = draw(st.sampled_from((A100, H200))), draw(st.integers(0, 99))
    config = sample_config(LISTS, parse_workload(text), hardware, seed)
    check_emulated(text, LISTS, config, hardware, seed)


@pytest.mark.slow
@needs_compiler
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_append_of_any_shape(data):
    draw = data.draw
    heads, t = drawn_heads(draw), draw(st.integers(1, 5))
    d = int(heads.split(",")[2].partition("=")[2])
    pages = draw(st.booleans())
    where = (
        f"cap=64,page=16,pool=40,b={draw(st.integers(1, 2))}"
        if pages
        else f"cap=48,b={draw(st.integers(1, 2))}"
    )
    if not pages:
        where += f",first={draw(st.sampled_from((0, 16)))}"
    text = (
        f"kv_append:t={t},{heads},{where},rot={2 * draw(st.integers(0, d // 2))},"
        f"norm={draw(st.integers(0, 1))},vscale=0.5,c=bf16"
    )
    seed = draw(st.integers(0, 99))
    check_emulated(
        text, APPEND, sample_config(APPEND, parse_workload(text), H200, seed), H200, seed
    )


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("schedule", "t", "config"),
    [(DECODE, 2, PartsConfig(32, 3, 2, 2)), (PREFILL, 40, StagesConfig(32, 2, 2))],
)
def test_pages_of_a_pool(schedule, t, config):
    text = f"cached_attention:t={t},h=6,kv=2,d=32,dv=20,cap=128,len=120,c=bf16,page=16,pool=20,b=2"
    check_emulated(text, schedule, config, H200)


@pytest.mark.slow
@needs_compiler
def test_sequences_that_rest_and_heads_that_see_nothing():
    text = "cached_attention:t=2,h=4,kv=2,d=16,dv=16,cap=70,c=bf16,b=3"
    for parts in (1, 2):
        inputs = made(text, [(0, 0), (50, 0), (3, 1)])
        seen = check_emulated(text, DECODE, PartsConfig(32, 2, 2, parts), H200, inputs=inputs)
        assert not seen.outputs["out"][:4].any() and seen.outputs["out"][4].any()
    # a list that is empty, without and with a sink
    for sink in (0, 1):
        text = f"sparse_attention:t=1,h=4,kv=2,d=16,dv=16,cap=64,hs=2,block=16,kmax=3,sink={sink},c=bf16"
        lists = {"idx": np.full((1, 2, 3), -1, np.int32), "cnt": np.zeros((1, 2), np.int32)}
        lists["idx"][0, 1, 0], lists["cnt"][0, 1] = 2, 1
        for name in ("k_cache", "v_cache"):
            drawn = np.random.default_rng(0).standard_normal((64, 2, 16), dtype=np.float32)
            lists[name] = (drawn.view(np.uint32) >> 16).astype(np.uint16)
        for parts in (1, 2):
            config = PartsConfig(32, 2, 2, parts)
            seen = check_emulated(text, LISTS, config, H200, inputs=lists)
            assert np.isinf(seen.outputs["lse"][0, :2]).all() == (not sink)


# -- counts ----------------------------------------------------------------------------------------


def prefill_steps(p, config, length):
    """Return (keys copied, rows times keys multiplied) by walking what the text of the kernel says."""
    group, start, rows = p["h"] // p["kv"], length - p["t"], p["t"] * p["h"] // p["kv"]
    copied = cells = 0
    for tile in range(-(-rows // (16 * config.warps))):
        tokens = [(tile * 16 * config.warps + r) // group for r in range(16 * config.warps)]
        seen = [set(visible(p, start, n)) for n in tokens if n < p["t"]]
        begin, end = min(set().union(*seen)), max(set().union(*seen)) + 1
        copied += end - begin
        for warp in range(config.warps):
            own = [n for n in tokens[warp * 16 : warp * 16 + 16] if n < p["t"]]
            mine = set().union(*(visible(p, start, n) for n in own))
            for at in range(begin, end, config.keys):
                cells += 16 * config.keys * bool(mine & set(range(at, at + config.keys)))
    return copied, cells


def visible(p, start, token):
    last = start + token
    return range(max(0, last - p["window"] + 1) if p["window"] else 0, last + 1)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_prefill_counts_the_tiles_that_it_visits(data):
    draw = data.draw
    t, kv, group = draw(st.integers(1, 50)), draw(st.integers(1, 2)), draw(st.integers(1, 5))
    window = draw(st.sampled_from((0, 1, 16, 50)))
    cap = draw(st.integers(t + window, 200))
    length = draw(st.integers(t, cap))
    text = (
        f"cached_attention:t={t},h={kv * group},kv={kv},d=20,dv=40,cap={cap},window={window},len={length},"
        "c=bf16"
    )
    workload = parse_workload(text)
    p = get_op(workload.op).full(workload)
    config = sample_config(PREFILL, workload, H200, draw(st.integers(0, 99)))
    copied, cells = prefill_steps(p, config, length)
    counts = PREFILL.work(workload, config, H200)
    assert counts.ops["tile_bf16"] == kv * cells * (32 + 48)
    given = 4.0 * t * kv * group * (20 + 40)
    assert counts.bytes["l2"] == kv * copied * 2 * (32 + 48) + given


def parts_of_keys(steps, config):
    """Return (first step, step behind the last) of each part."""
    return [
        (steps * i // config.parts, steps * (i + 1) // config.parts) for i in range(config.parts)
    ]


def first_launch_reads(p, config, tiles):
    """Return the bytes of L2 of the launch over parts, part by part of tiles (keys, rows of queries)."""
    row, total = 2 * sum(-(-p[n] // 16) * 16 for n in ("d", "dv")), 0
    for keys, rows in tiles:
        for first, behind in parts_of_keys(-(-keys // config.keys), config):
            copied = max(0, min(keys, behind * config.keys) - first * config.keys)
            total += copied * row + rows * 4 * p["d"]
            if config.parts > 1:
                total += 4 * 16 * (-(-p["dv"] // 16) * 16 + 2)
    return total + (4 * p["t"] * p["h"] * p["dv"] if config.parts == 1 else 0)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_decode_and_lists_count_what_each_part_reads(data):
    draw = data.draw
    t, kv, group = draw(st.integers(1, 6)), draw(st.integers(1, 2)), draw(st.integers(1, 7))
    cap = draw(st.integers(300, 900))
    length, window = draw(st.integers(t, cap)), draw(st.sampled_from((0, 50)))
    heads = f"t={t},h={kv * group},kv={kv},d=20,dv=40,cap={cap},window={window},len={length},c=bf16"
    lists = draw(st.booleans())
    block, per = 16, draw(st.integers(1, 4))
    more = f",hs={kv},block={block},kmax={draw(st.integers(1, 9))},rows={per}" if lists else ""
    schedule = LISTS if lists else DECODE
    workload = parse_workload(f"{schedule.op}:{heads}{more}")
    p, start = get_op(workload.op).full(workload), length - t
    tiles = []
    for at in range(0, t, per if lists else t):
        tokens = list(range(at, min(at + per, t) if lists else t))
        full = (
            min(per, t) if lists else t
        )  # the last list may be short, its tiles are there all the same
        for tile in range(-(-full * group // 16)):
            within = [tokens[0] + r // group for r in range(tile * 16, tile * 16 + 16)]
            rows = [n for n in within if n < tokens[0] + full and n < t]
            seen = set().union(*(visible(p, start, n) for n in rows)) if rows else set()
            keys = len(seen) if not lists or window else 0
            if lists and rows:
                newest = start + rows[-1]
                chosen = range(min(p["kmax"], newest // block + 1) * block)
                keys += sum(1 for n in chosen if n <= newest)
            tiles.append((keys, len(rows)))
    config = sample_config(schedule, workload, H200, draw(st.integers(0, 99)))
    counts = schedule.work(workload, config, H200)
    named = 4 * (len(range(0, t, per)) * kv * (p["kmax"] + 1) + t * kv * group) if lists else 0
    first = counts.parts[0] if counts.parts else counts
    if named:
        named *= -(-min(per, t) * group // 16)  # each tile reads its list
    assert (
        first.bytes["l2"]
        == kv * first_launch_reads(p, config, tiles)
        - ((kv - 1) * 4 * t * kv * group * 40 if config.parts == 1 else 0)
        + named
    )


COUNTED = [
    (APPEND, "kv_append:t=5,h=4,kv=2,d=20,dv=16,cap=40,rot=8,norm=1,c=bf16,b=2"),
    (DECODE, "cached_attention:t=3,h=16,kv=2,d=64,dv=40,cap=3000,len=2500,c=bf16,b=3"),
    (
        DECODE,
        "cached_attention:t=1,h=16,kv=2,d=64,dv=64,cap=2048,len=2000,c=bf16,page=64,pool=70,b=4",
    ),
    (DECODE, "cached_attention:t=3,h=16,kv=2,d=64,dv=40,cap=600,window=500,c=bf16"),
    (PREFILL, "cached_attention:t=300,h=16,kv=2,d=64,dv=40,cap=3000,len=2500,c=bf16"),
    (PREFILL, "cached_attention:t=300,h=16,kv=2,d=64,dv=40,cap=600,window=100,c=bf16,len=2500"),
    (
        LISTS,
        "sparse_attention:t=3,h=16,kv=2,d=64,dv=40,cap=3000,hs=2,block=16,kmax=40,window=50,c=bf16",
    ),
    (
        LISTS,
        "sparse_attention:t=3,h=16,kv=2,d=64,dv=40,cap=3000,hs=16,block=1,kmax=100,rows=2,c=bf16,page=16,pool=300,b=2",
    ),
    (
        LISTS,
        "sparse_attention:t=1,h=16,kv=2,d=64,dv=40,cap=640,hs=1,block=16,kmax=5,first=128,window=60,c=bf16,b=2",
    ),
]


@pytest.mark.parametrize(("schedule", "text"), COUNTED)
def test_counts_are_those_of_the_kernel_and_no_less_than_needed(schedule, text):
    workload = parse_workload(text)
    need = get_op(workload.op).counts(workload)
    for seed in range(20):
        config = sample_config(schedule, workload, H200, seed)
        kernel = schedule.lower(workload, config, H200)
        counts = kernel.counts
        assert counts == schedule.work(workload, config, H200)
        assert (
            need.bytes["dram"] * (1 - 1e-9)
            <= counts.bytes["dram"]
            <= counts.bytes["l2"] * (1 + 1e-9)
        )
        tiles = counts.ops.get("tile_bf16", 0.0)
        assert tiles + counts.ops["fma_f32"] >= need.ops["fma_f32"]
        scratch = sum(4 * np.prod(a.shape) for a in kernel.device.scratch.values())
        assert scratch == kernel.workspace_bytes
        assert len(counts.parts) in (0, len(kernel.device.launches))
        if counts.parts:  # the first launch writes what the second one reads
            assert kernel.device.launches[1].symbol == "merge"
            for level in ("dram", "l2"):
                assert sum(part.bytes[level] for part in counts.parts) == pytest.approx(
                    counts.bytes[level]
                )
