"""Kernels for GPUs over KV caches in groups of few bits, run on the CPU and held to the ops' bounds."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.ir import kv_groups, kv_rounding
from mimo_compile.ir.hardware import CUDA, PRESETS
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.runtime.check import _together
from mimo_compile.runtime.pages import page_extent
from mimo_compile.runtime.program import Layer, Pool, State
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.attention import cuda_group_layout as layout
from mimo_compile.schedules.attention.cuda_groups import GroupPartsConfig, GroupStagesConfig
from mimo_compile.schedules.cuda.emulate import compiler, emulate
from mimo_compile.search.measure.emulated import check_emulated, device_arrays

A100, H200 = CUDA["cuda:sm_80"], CUDA["cuda:sm_90a"]
APPEND = get_schedule("kv_append.cuda_groups")
DECODE = get_schedule("cached_attention.cuda_groups_decode")
PREFILL = get_schedule("cached_attention.cuda_groups_prefill")
FORMATS = "i8", "i4", "i2", "i1"
needs_compiler = pytest.mark.skipif(compiler() is None, reason="emulation needs a C++ compiler")


def made(text, places, seed=0):
    """Return inputs of sequences at given places ``[(start, valid)]``; what none sees is poison."""
    workload = parse_workload(text)
    p = get_op(workload.op).full(workload)
    fmt, rng = kv_groups.GROUPED[p["c"]], np.random.default_rng(seed)
    q = rng.standard_normal((p["b"], p["t"], p["h"], p["d"]), dtype=np.float32)
    each = []
    for i, (start, valid) in enumerate(places):
        q[i, valid:] = np.nan
        k, v = (
            rng.standard_normal((start + valid, p["kv"], n), dtype=np.float32)
            for n in (p["d"], p["dv"])
        )
        tail = kv_groups.tail_of(p, fmt)
        each.append(kv_groups.encoded(k, v, start, p["cap"], tail, fmt))
    states = {n: np.stack([one[n] for one in each]) for n in kv_groups.STATES}
    pos = np.array(places, np.int32)
    if p["b"] == 1:
        states, pos = {n: a[0] for n, a in states.items()}, pos[0]
    out = {**states, "pos": pos, "q": q.reshape(-1, p["h"], p["d"])}
    if p["sink"]:
        out["sink"] = rng.standard_normal(p["h"], dtype=np.float32)
        out["sink"][0] = 9  # above all logits
    return out


# -- caches ----------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    c=st.sampled_from(FORMATS), b=st.integers(1, 3), kv=st.integers(1, 3), d=st.integers(1, 150),
    dv=st.integers(1, 150), groups=st.integers(1, 3), pages=st.sampled_from((0, 64, 128)),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_packing_is_undone_and_pads_with_zeros(c, b, kv, d, dv, groups, pages, seed):
    where = f",page={pages},pool={-(-groups * 64 // pages) + b}" if pages else ""
    heads = f"h={kv},kv={kv},d={d},dv={dv}"
    text = f"cached_attention:t=1,{heads},cap={groups * 64},c={c},b={b}{where}"
    workload = parse_workload(text)
    inputs = get_op(workload.op).make_inputs(workload, np.random.default_rng(seed))
    caches = {n: inputs[n] for n in kv_groups.STATES}
    packed = layout.pack(workload, caches)
    args = {a.name: a for a in layout.kernel_args(workload)}
    for name, array in packed.items():
        assert array.shape == args[name].shape and array.dtype == args[name].dtype
    assert not packed["k_scale"][..., 2 * d :].any() and not packed["v_tail"][..., dv:].any()
    p = get_op(workload.op).full(workload)
    codes = sum(packed[n].nbytes for n in ("k_cache", "k_scale", "v_cache", "v_scale"))
    assert codes == kv * layout.groups_of(p) * layout.group_bytes(p) * (1 if pages else b)
    for name in (
        "k_cache",
        "k_scale",
        "v_cache",
        "v_scale",
    ):  # where a page is copied to another one
        assert packed[name].shape[page_extent("cuda", packed[name].shape)] == layout.groups_of(p)
        if pages:  # loading asks whether pages and states fit
            state, pool = (
                State(args[name].shape, args[name].dtype),
                Pool(pages, p["pool"], (), "pages"),
            )
            own = Layer("layers.0", group=64, states=(name,))
            others = Layer("layers.1", group=32)
            on_gpu = SimpleNamespace(
                target=SimpleNamespace(kind="cuda"), decoder=SimpleNamespace(layers=(own, others))
            )
            assert _together(on_gpu, name, state, pool) == (64,)  # a group of the state's layer
    back = layout.unpack(workload, packed)
    levels = np.uint8(kv_groups.GROUPED[c].levels)  # pages that no table names hold other bytes
    kept = {n: a & levels if n.endswith("cache") else a for n, a in caches.items()}
    assert all(back[n].tobytes() == kept[n].tobytes() for n in kept)


def test_codes_of_a_lane_are_those_of_its_fragments():
    """One key's and one value's codes, where the PTX ISA's fragments of m16n8k32 have them."""
    for c, bits in (("i8", 8), ("i4", 4), ("i2", 2), ("i1", 1)):
        workload = parse_workload(f"cached_attention:t=1,h=1,kv=1,d=128,dv=128,cap=64,c={c}")
        key, channel, token, column = 37, 32 + 8 * 3 + 4 + 2, 32 + 16 + 8 + 2 * 3 + 1, 77
        caches = {n: np.zeros((64, 1, 128), np.uint8) for n in ("k_cache", "v_cache")}
        bias = 128 if bits == 8 else 0
        caches = {n: a ^ np.uint8(bias) for n, a in caches.items()}
        caches["k_cache"][key, 0, channel] ^= 1
        caches["v_cache"][token, 0, column] ^= 1
        packed = layout.pack(workload, caches)

        for name, major, lane, slot, byte in (
            # key 37: pair 2, tile 0, row g 5; channel: step 1, t 3, half 1, byte 2
            ("k_cache", 1, 5 * 4 + 3, 1, 2),
            # column 77: tile 9, g 5; token: step 1, half 1, second pair of keys, t 3, odd
            ("v_cache", 9, 5 * 4 + 3, 3, 3),
        ):
            words = packed[name].reshape(-1).view(np.uint32)
            at = 4 * major + slot  # of the registers of two tiles or steps, two halves each
            if name == "k_cache":
                words = words.reshape(4, -1)[2]
            word, chunk = at * bits // 8, 2 if (c, name) == ("i1", "k_cache") else 4
            mine = words.reshape(-1, 32, chunk)[word // chunk, lane, word % chunk]
            assert mine == 1 << (8 * byte + at * bits % 8), (c, name)
            assert np.count_nonzero(packed[name]) == 1


def test_gpus_and_cpus_do_not_get_each_other_s_kernels():
    for c in FORMATS:
        for op, where in product(("kv_append", "cached_attention"), ("", ",page=64,pool=9")):
            workload = parse_workload(f"{op}:t=2,h=4,kv=2,d=16,dv=16,cap=128,c={c}{where}")
            for hardware in (A100, H200):
                found = schedules_for(workload, hardware)
                assert found and all(".cuda_groups" in s.name for s in found)
                layouts = {str(s.layouts(workload, None)) for s in found}
                assert layouts == {str(APPEND.layouts(workload, None))}
            cpu = schedules_for(workload, PRESETS["sapphirerapids"])
            assert cpu and not any(".cuda" in s.name for s in cpu)


@pytest.mark.parametrize("hardware", [A100, H200], ids=lambda h: h.name)
def test_heads_of_any_width_have_a_legal_default_or_no_kernel(hardware):
    for d, dv, there in ((64, 64, True), (192, 128, True), (128, 160, True), (256, 256, False)):
        for t in (1, 100, 3000):
            text = f"cached_attention:t={t},h=8,kv=2,d={d},dv={dv},cap=4096,c=i8"
            workload = parse_workload(text)
            found = schedules_for(workload, hardware)
            assert bool(found) == there, text
            for schedule in found:
                space = schedule.space(workload, hardware)
                assert space.legal(space.default), (text, space.default)
                assert sum(1 for _ in space) > 2
    wide = parse_workload("cached_attention:t=1,h=8,kv=2,d=320,dv=128,cap=4096,c=i4")
    assert not schedules_for(wide, hardware)  # more than 256: nvcc spills at 512
    many = parse_workload("cached_attention:t=3000,h=8,kv=2,d=64,dv=64,cap=4096,c=i4")
    assert [s.name for s in schedules_for(many, hardware)] == [PREFILL.name]


# -- results ---------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_compiler
def test_a_few_tokens_are_within_the_op_s_bound():
    text = "cached_attention:t=2,h=6,kv=1,d=24,dv=18,cap=192,sink=1,c=i4,b=2"
    inputs = made(text, [(127, 2), (20, 1)])
    check_emulated(text, DECODE, GroupPartsConfig(2, 2, 2), H200, inputs=inputs, orders=(0,))


QUICK = [
    (DECODE, "cached_attention:t=1,h=4,kv=1,d=128,dv=128,cap=512,len=450,c=i8", None),
    (DECODE, "cached_attention:t=4,h=8,kv=2,d=64,dv=96,cap=512,len=450,c=i4", None),
    (DECODE, "cached_attention:t=2,h=6,kv=1,d=96,dv=80,cap=512,len=450,c=i1", None),
    (
        DECODE,
        "cached_attention:t=3,h=6,kv=1,d=40,dv=80,cap=384,len=331,c=i2",
        GroupPartsConfig(3, 2, 3),
    ),
    (
        PREFILL,
        "cached_attention:t=70,h=2,kv=1,d=64,dv=80,cap=320,len=259,c=i2",
        GroupStagesConfig(2, 4),
    ),
    (
        PREFILL,
        "cached_attention:t=20,h=6,kv=2,d=40,dv=24,cap=320,len=201,c=i8",
        GroupStagesConfig(3, 2),
    ),
]


def check_rounded(schedule, text, config):
    """Hold what is left beside the integers that the bound knows to the bound of exact arithmetic."""
    seen = check_emulated(text, schedule, config, H200)
    workload = parse_workload(text)
    op = get_op(workload.op)
    p = op.full(workload)
    given_ = {n: torch.from_numpy(a) for n, a in seen.inputs.items()}
    fmt = kv_groups.GROUPED[p["c"]]
    rounded = kv_rounding.attend_rounded(given_, op.softmax_scale(p), fmt, None).double().numpy()
    exact = op.exact_bound(workload, seen.inputs, seen.expected)["out"]
    off, known = np.abs(seen.outputs["out"] - rounded), np.abs(rounded - seen.expected["out"])
    # a number next to the middle between two integers may have gone the other way
    assert (off < 0.5 * exact).mean() > 0.99 and (known > 2 * exact).mean() > 0.5


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("schedule", "text", "config"), QUICK)
def test_nothing_is_rounded_but_to_the_op_s_integers(schedule, text, config):
    check_rounded(schedule, text, config)


TAIL = "cached_attention:t=2,h=4,kv=1,d=128,dv=128,cap=128,len=62,c=i8"
"""No group is full."""


def check_tail(schedule, text, config):
    """Hold float32 rows to a part of the bound of exact arithmetic, which two of three terms are beyond."""
    seen = check_emulated(text, schedule, config, H200)
    workload = parse_workload(text)
    exact = get_op(workload.op).exact_bound(workload, seen.inputs, seen.expected)["out"]
    error = np.abs(seen.outputs["out"] - seen.expected["out"])
    assert (error <= 0.03 * exact).all(), (error / exact).max()


@pytest.mark.slow
@needs_compiler
def test_the_tail_is_exact():
    check_tail(DECODE, TAIL, None)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("schedule", "text", "config"),
    [
        (DECODE, "t=3,h=6,kv=2,d=40,dv=24,cap=320,c=i4,page=64,pool=9,b=2", GroupPartsConfig(3, 2, 2)),
        (PREFILL, "t=70,h=2,kv=2,d=24,dv=40,cap=384,c=i8,page=128,pool=8,b=2", GroupStagesConfig(2, 2)),
        (PREFILL, "t=20,h=4,kv=1,d=72,dv=80,cap=256,len=250,c=i1,page=64,pool=6,b=1", None),
    ],
)  # fmt: skip
def test_pages_of_a_pool(schedule, text, config):
    """Pages lie in no order, sequences share some; what no table names is NaN."""
    check_emulated(f"cached_attention:{text}", schedule, config, H200)


def drawn(draw, tokens):
    """Return a workload of some tokens and the places of its sequences."""
    t, b, kv = draw(tokens), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    heads = f"h={kv * draw(st.integers(1, 6))},kv={kv},d={draw(st.integers(1, 70))}"
    cap = 64 * draw(st.integers(-(-t // 64), 5))
    text = (
        f"cached_attention:t={t},{heads},dv={draw(st.integers(1, 90))},cap={cap},"
        f"sink={draw(st.integers(0, 1))},c={draw(st.sampled_from(FORMATS))},b={b}"
    )
    places = []
    for _ in range(b):
        valid = draw(st.integers(0 if b > 1 else 1, t))
        places.append((draw(st.integers(0, cap - valid)), valid))
    return text, places


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("schedule", "most"), [(DECODE, 6), (PREFILL, 100)])
def test_any_shape_and_place(schedule, most):
    @settings(max_examples=10, deadline=None, database=None)
    @given(data=st.data())
    def held(data):
        text, places = drawn(data.draw, st.integers(1, most))
        hardware, seed = data.draw(st.sampled_from((A100, H200))), data.draw(st.integers(0, 99))
        config = sample_config(schedule, parse_workload(text), hardware, seed)
        check_emulated(text, schedule, config, hardware, inputs=made(text, places, seed))

    held()


@pytest.mark.slow
@needs_compiler
def test_a_fault_stays_to_be_seen():
    text = "cached_attention:t=1,h=2,kv=2,d=16,dv=16,cap=192,c=i4"
    for name, schedule in (("k_scale", DECODE), ("v_scale", PREFILL)):
        inputs = made(text, [(150, 1)])
        inputs[name][1 if name == "k_scale" else 70, 0] = np.nan  # of head 0, in the second group
        kernel = check_emulated(text, schedule, None, H200).kernel
        workload = parse_workload(text)
        config = schedule.space(workload, H200).default
        out = emulate(kernel, H200, device_arrays(workload, schedule, config, inputs))["out"]
        assert np.isnan(out[0, 0]).all() and np.isfinite(out[0, 1]).all()


@pytest.mark.slow
@needs_compiler
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_append_of_any_shape(data):
    draw = data.draw
    kv, t, d = draw(st.integers(1, 2)), draw(st.integers(1, 130)), draw(st.integers(1, 140))
    text = (
        f"kv_append:t={t},h={kv * draw(st.integers(1, 3))},kv={kv},d={d},dv={draw(st.integers(1, 140))},"
        f"cap=320,rot={2 * draw(st.integers(0, d // 2))},norm={draw(st.integers(0, 1))},vscale=0.5,"
        f"{draw(st.sampled_from(('', 'page=64,pool=14,', 'page=128,pool=9,')))}"
        f"c={draw(st.sampled_from(FORMATS))},b={draw(st.integers(1, 2))}"
    )
    seed = draw(st.integers(0, 99))
    check_emulated(
        text, APPEND, sample_config(APPEND, parse_workload(text), H200, seed), H200, seed
    )


# -- counts ----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_counts_are_what_blocks_pass_over(data):
    draw = data.draw
    t, kv, group = draw(st.integers(1, 90)), draw(st.integers(1, 2)), draw(st.integers(1, 5))
    cap = 64 * draw(st.integers(2, 9))
    length = draw(st.integers(t, cap))
    prefill = draw(st.booleans()) or t * group > 128
    schedule = PREFILL if prefill else DECODE
    text = f"cached_attention:t={t},h={kv * group},kv={kv},d=40,dv=72,cap={cap},len={length},c=i8"
    workload = parse_workload(text)
    config = sample_config(schedule, workload, H200, draw(st.integers(0, 99)))
    counts = schedule.work(workload, config, H200)
    start = length - t
    met = copied = rows = 0
    height = 16 * (config.warps if prefill else 1)
    for block in range(0, t * group, height):
        tokens = [r // group for r in range(block, min(block + height, t * group))]
        copied += max((start + n) // 64 for n in tokens)
    for tile in range(0, t * group, 16):
        at = [start + r // group for r in range(tile, min(tile + 16, t * group))]
        met += max(n // 64 for n in at)
        rows += max(at) + 1 - min(at) // 64 * 64
    assert counts.ops["tile_i8"] == kv * met * 16 * 64 * (2 * 64 + 80)
    first = counts.parts[0] if counts.parts else counts
    # codes with scales, rows of the tail, queries for each part, results or what is merged
    read = copied * (64 * (64 + 80) + 4 * 64 + 64 * 4 * 2) + rows * 4 * (48 + 80)
    parts = 1 if prefill else config.parts
    made_ = 4 * kv * -(-t * group // 16) * parts * 16 * 82 if parts > 1 else 4 * t * kv * group * 72
    assert first.bytes["l2"] == kv * read + 4 * parts * t * kv * group * 40 + made_
    need = get_op(workload.op).counts(workload)
    assert need.bytes["dram"] <= counts.bytes["dram"] * (1 + 1e-9)
    assert counts.bytes["dram"] <= counts.bytes["l2"] * (1 + 1e-9)
    assert counts == schedule.lower(workload, config, H200).counts
