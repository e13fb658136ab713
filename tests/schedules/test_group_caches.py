"""KV caches in groups of few bits: append and attention in every arithmetic, poison, layouts, counts."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from harness import check, compiled, guarded, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st
from instrument import executed

from mimo_compile._tvm import from_numpy
from mimo_compile.ir import kv_groups
from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.ir.kv_groups import GROUPED, STATES
from mimo_compile.ir.ops import batches, get_op, parse_workload
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.attention.asked import Asked
from mimo_compile.schedules.attention.group_layout import group_shapes, pack_groups, unpack_groups
from mimo_compile.schedules.attention.group_reach import GroupReach, Recent
from mimo_compile.schedules.attention.layout import kernel_args
from mimo_compile.schedules.attention.x86_flash_groups import EXACT, TILES
from mimo_compile.schedules.compile import assembly
from mimo_compile.schedules.emit.build import function
from mimo_compile.schedules.emit.vector import LANES

CPU = local_cpu()
FLASH = get_schedule("cached_attention.x86_flash_groups")
APPEND = get_schedule("kv_append.x86_groups")
OP = get_op("cached_attention")
SMALL = "h=4,kv=2,d=9,dv=20"
FORMATS = [pytest.param(c, marks=pytest.mark.slow) if c == "i2" else c for c in GROUPED]
"""What lies between the most and the fewest bits has its turn in CI's long run."""


def placed(text, start, valid, seed=0):
    """Return inputs for queries from ``start`` on; what they do not see is poison."""
    workload = parse_workload(text)
    p, rng = OP.full(workload), np.random.default_rng(seed)
    fmt = GROUPED[p["c"]]
    k, v = (rng.standard_normal((start + valid, p["kv"], p[n]), np.float32) for n in ("d", "dv"))
    inputs = OP.make_inputs(workload, rng)
    inputs |= kv_groups.encoded(k, v, start, p["cap"], kv_groups.tail_of(p, fmt), fmt)
    inputs["q"][valid:] = np.nan
    return inputs | {"pos": np.array([start, valid], np.int32)}


def proved(text, config, given_, seed=0):
    """Check a config; exact arithmetic must meet the bound of float32 arithmetic."""
    seen = check(FLASH, text, config, seed, inputs=given_)
    if config.arith in EXACT:
        workload = parse_workload(text)
        exact = OP.exact_bound(workload, seen.inputs, seen.expected)["out"]
        assert (np.abs(seen.outputs["out"] - seen.expected["out"]) <= exact).all()
    return seen


@settings(max_examples=2)
@given(data=st.data())
def test_any_shape_position_and_config(data):
    one_of_any(data)


@pytest.mark.slow
@settings(max_examples=40)
@given(data=st.data())
def test_many_shapes_positions_and_configs(data):
    one_of_any(data)


def one_of_any(data):
    draw = data.draw
    kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    t = draw(st.sampled_from((1, 1, 2, 7, 70)))
    cap = 64 * draw(st.integers(1 if t < 64 else 2, 4))
    text = (
        f"cached_attention:t={t},h={kv * group},kv={kv},d={draw(st.integers(1, 40))},"
        f"dv={draw(st.sampled_from((1, 8, 16, 33, 64, 80)))},cap={cap},sink={draw(st.integers(0, 1))},"
        f"c={draw(st.sampled_from(sorted(GROUPED)))}"
    )
    valid = draw(st.integers(1, t))
    start = draw(st.integers(0, cap - valid))
    seed = draw(st.integers(0, 999))
    config = sample_config(FLASH, parse_workload(text), CPU, seed)
    proved(text, config, placed(text, start, valid, seed), seed)


@pytest.mark.parametrize("c", GROUPED)
@pytest.mark.parametrize("start", [0, 62, 63, 64, 127])
def test_around_the_end_of_a_group(c, start):
    text = f"cached_attention:t=1,{SMALL},cap=128,c={c}"
    config = dataclasses.replace(FLASH.space(parse_workload(text), CPU).default, parallel=False)
    proved(text, config, placed(text, start, 1))


@pytest.mark.parametrize("c", FORMATS)
def test_dots_without_vnni(c):
    text = f"cached_attention:t=3,{SMALL},cap=192,c={c}"
    default = FLASH.space(parse_workload(text), CPU).default
    config = dataclasses.replace(default, arith="madd", ahead=0, splits=1, parallel=False)
    if "avx2" in CPU.features:
        given_ = placed(text, 150, 3)
        workload = parse_workload(text)
        code = FLASH.lower(workload, config, PRESETS["x86-64-v3"])
        assert code.features == {"avx2"}
        hardware = dataclasses.replace(CPU, features=CPU.features - {"avx512vnni", "avxvnni"})
        assert FLASH.space(workload, hardware).knobs["arith"] == ("madd", "real")
        check(FLASH, text, config, inputs=given_, hardware=hardware)


@pytest.mark.parametrize("c", FORMATS)
@pytest.mark.parametrize("powers", [110.0, 122.0, 130.0])
def test_groups_that_hardly_count_count_as_little_and_are_no_nan(c, powers):
    text = f"cached_attention:t=1,h=2,kv=1,d=16,dv=16,cap=192,scale=1,c={c}"
    workload = parse_workload(text)
    p, fmt = OP.full(workload), GROUPED[c]
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((180, 1, 16), np.float32) for _ in range(2))
    k[:, :, 0] = 1.0
    k[:64, :, 0] = 1.0 + powers * math.log(2)  # the first group lies so many powers of two above
    given_ = OP.make_inputs(workload, rng)
    given_ |= kv_groups.encoded(k, 0.01 * v, 179, 192, kv_groups.tail_of(p, fmt), fmt)
    given_["q"][:] = 0
    given_["q"][:, :, 0] = 1
    given_["pos"] = np.array([179, 1], np.int32)
    default = FLASH.space(workload, CPU).default
    for arith in ("real", default.arith):
        # one stretch of keys, the least first
        config = dataclasses.replace(default, arith=arith, splits=1, parallel=False)
        flipped = given_ | kv_groups.encoded(
            k[::-1].copy(), 0.01 * v[::-1].copy(), 179, 192, kv_groups.tail_of(p, fmt), fmt
        )
        for inputs in (given_, flipped):
            assert np.isfinite(proved(text, config, inputs).outputs["out"]).all()


@pytest.mark.parametrize("c", FORMATS)
def test_maxima_that_rise_group_by_group_leave_each_row_what_it_had(c):
    # up to 16 powers of two nothing is raised; rows do not rise alike, and values have two scales a token
    text = f"cached_attention:t=5,h=3,kv=1,d=16,dv=80,cap=512,scale=1,sink=1,c={c}"
    workload, rng = parse_workload(text), np.random.default_rng(0)
    p, fmt = OP.full(workload), GROUPED[c]
    k, v = (rng.standard_normal((500, 1, width), np.float32) for width in (16, 80))
    k[:, 0, 0] = 15.9 * math.log(2) * (np.arange(500) // 64)
    given_ = OP.make_inputs(workload, rng)
    given_ |= kv_groups.encoded(k, v, 495, 512, kv_groups.tail_of(p, fmt), fmt)
    given_["q"] *= 0.3
    given_["q"][:, :, 0] = np.linspace(-1, 1.2, 15).reshape(5, 3)
    given_["pos"] = np.array([495, 5], np.int32)
    default = FLASH.space(workload, CPU).default
    proved(text, dataclasses.replace(default, splits=1, parallel=False), given_)


@pytest.mark.parametrize("c", FORMATS)
def test_loud_channels_and_tokens_stay_within_the_bound(c):
    # what is rounded with a large neighbour is rounded coarsely, and the bound says so
    text = "cached_attention:t=1,h=4,kv=1,d=32,dv=32,cap=256,c=" + c
    workload, rng = parse_workload(text), np.random.default_rng(0)
    p, fmt = OP.full(workload), GROUPED[c]
    k, v = (rng.standard_normal((256, 1, 32), np.float32) for _ in range(2))
    k[..., 3] *= 50
    v[::17] *= 50
    given_ = OP.make_inputs(workload, rng)
    given_ |= kv_groups.encoded(k, v, 255, 256, kv_groups.tail_of(p, fmt), fmt)
    for arith in FLASH.space(workload, CPU).knobs["arith"]:
        config = dataclasses.replace(FLASH.space(workload, CPU).default, arith=arith)
        proved(text, config, given_)


def test_what_is_verified_further_finds_a_kernel_that_sees_a_whole_tail(monkeypatch):
    """Several KV heads; what is timed fills the tail's last group, so that nothing is wrong there."""
    workload = parse_workload("cached_attention:t=1,h=2,kv=2,d=8,dv=8,cap=256,len=128,c=i4")
    timed = OP.make_inputs(workload, np.random.default_rng(3))
    further = batches.further(OP, workload, timed, np.random.default_rng(4))
    check(FLASH, workload, inputs=further)
    monkeypatch.setattr(Recent, "live", lambda self, step, u: LANES)
    monkeypatch.setattr(Recent, "sees", staticmethod(lambda at, limits: at >= limits[0]))
    check(FLASH, workload, inputs=timed)
    with pytest.raises(AssertionError, match="elements of out are off"):
        check(FLASH, workload, inputs=further)


@pytest.mark.parametrize("c", GROUPED)
def test_the_bound_refuses_a_missed_key_and_a_group_of_other_codes(c):
    text = f"cached_attention:t=1,{SMALL},cap=192,c={c}"
    workload = parse_workload(text)
    given_ = placed(text, 150, 1)
    want = OP.reference(workload, given_)
    bound = OP.bound(workload, given_, want)["out"]
    less = OP.reference(workload, {**given_, "pos": np.array([149, 1], np.int32)})["out"]
    assert (np.abs(less - want["out"]) > bound).any()
    codes = given_["k_cache"].copy()
    codes[7] = GROUPED[c].levels - codes[7]
    other = OP.reference(workload, {**given_, "k_cache": codes})["out"]
    assert (np.abs(other - want["out"]) > bound).any()


@settings(max_examples=3)
@given(data=st.data())
def test_append(data):
    draw = data.draw
    kv, group, t = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from((1, 5, 130))),
    )
    d = draw(st.integers(1, 40))
    text = (
        f"kv_append:t={t},h={kv * group},kv={kv},d={d},dv={draw(st.integers(1, 80))},"
        f"cap={64 * draw(st.integers(3, 5))},rot={2 * draw(st.integers(0, d // 2))},"
        f"norm={draw(st.integers(0, 1))},vscale={draw(st.sampled_from((1.0, 0.707)))},"
        f"c={draw(st.sampled_from(sorted(GROUPED)))}"
    )
    seed = draw(st.integers(0, 999))
    check(APPEND, text, sample_config(APPEND, parse_workload(text), CPU, seed), seed)


def test_append_then_attend_shares_one_packed_cache():
    geometry = f"t=3,{SMALL},cap=192,tail=128,c=i4"
    attention = parse_workload(f"cached_attention:{geometry},len=131")
    append = parse_workload(f"kv_append:{geometry},rot=4")
    config = FLASH.space(attention, CPU).default
    assert FLASH.layouts(attention, config) == APPEND.layouts(append, None)
    assert FLASH.layouts(attention, config) != FLASH.layouts(
        parse_workload(f"cached_attention:{geometry},len=131".replace("i4", "i2")), config
    )
    before = placed(f"cached_attention:{geometry}", 125, 1)
    states = {n: before[n] for n in STATES}
    for n in ("k_tail", "v_tail"):
        states[n] = np.nan_to_num(states[n])
    for n in ("k_scale", "v_scale"):
        states[n] = np.nan_to_num(states[n])
    pos = {"pos": np.array([126, 3], np.int32)}
    written = check(APPEND, append, inputs={**states, **pos})
    caches = {n: written.memory[n] for n in STATES}
    canonical = unpack_groups(OP.full(attention), GROUPED["i4"], caches)
    seen = check(FLASH, attention, inputs={"q": written.outputs["q"], **pos, **canonical})
    held = unpack_groups(
        OP.full(attention), GROUPED["i4"], {n: seen.memory[n] for n in STATES}
    )  # fmt: skip
    for name, array in canonical.items():
        assert np.array_equal(held[name], array)


def ran(schedule, text, inputs, config=None):
    """Return the outputs and the canonical states that a kernel leaves, which are not checked."""
    workload = parse_workload(text)
    args = get_op(workload.op).args(workload)
    config = schedule.space(workload, CPU).default if config is None else config
    kernel = schedule.lower(workload, config, CPU)
    packed = schedule.pack(
        workload, config, {a.name: inputs[a.name] for a in args if a.role in ("weight", "state")}
    )
    given_ = {a.name: inputs[a.name] for a in args if a.role == "input"} | packed
    memory = {
        a.name: guarded(given_.get(a.name, np.zeros(a.shape, np.float32)))[0] for a in kernel.args
    }
    compiled(kernel, CPU)[kernel.name](*(from_numpy(memory[a.name]) for a in kernel.args))
    states = {n: a for n, a in memory.items() if n in STATES}
    return memory | schedule.unpack_state(workload, config, states)


@pytest.mark.parametrize(
    "c", ["i4", *(pytest.param(c, marks=pytest.mark.slow) for c in ("i8", "i2", "i1"))]
)
def test_rows_that_are_no_numbers_stay_to_be_seen(c):
    # the second of three tokens ends a group
    text, d, dv = f"kv_append:t=3,{SMALL},cap=192,c={c}", 9, 20
    workload, append, left = parse_workload(text), get_op("kv_append"), []
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        given_ = append.make_inputs(workload, np.random.default_rng(0))
        given_["pos"] = np.array([62, 3], np.int32)
        given_["qkv"][0, 4 * d + 7] = bad  # channel 7 of the first head's keys
        given_["qkv"][0, 6 * d + dv + 13] = bad  # channel 13 of the second head's values
        want, got = append.reference(workload, given_), ran(APPEND, text, given_)
        assert np.isnan(want["k_scale"][0, 0, 7]).all() and np.isnan(want["v_scale"][62, 1]).all()
        for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
            assert np.array_equal(got[name], want[name], equal_nan=True)
        left.append({n: got[n] for n in STATES})
    text = f"cached_attention:t=1,{SMALL},cap=192,tail=128,c={c}"
    space = FLASH.space(parse_workload(text), CPU)
    seen = {"q": np.ones((1, 4, d), np.float32), "pos": np.array([64, 1], np.int32)}
    for arith in space.knobs["arith"]:
        config = dataclasses.replace(space.default, arith=arith, ahead=0, parallel=False)
        for states in left:
            assert np.isnan(ran(FLASH, text, states | seen, config)["out"]).all()


@settings(max_examples=20)
@given(
    groups=st.integers(1, 3), kv=st.integers(1, 3), d=st.integers(1, 20), dv=st.integers(1, 70),
    c=st.sampled_from(sorted(GROUPED)),
)  # fmt: skip
def test_packing_round_trips(groups, kv, d, dv, c):
    w = OP.workload(t=1, h=kv, kv=kv, d=d, dv=dv, cap=64 * groups, c=c)
    p, fmt, rng = OP.full(w), GROUPED[c], np.random.default_rng(0)
    arrays = {}
    for arg in OP.args(w):
        if arg.name in STATES:
            values = rng.integers(0, fmt.levels + 1, arg.shape)
            arrays[arg.name] = values.astype(arg.dtype)
    packed = pack_groups(p, fmt, arrays)
    assert {n: a.shape for n, a in packed.items()} == group_shapes(p, fmt)
    for name, array in unpack_groups(p, fmt, packed).items():
        assert np.array_equal(array, arrays[name])
    # element 4 f + i of a lane: byte i, field f
    s, h, i, j = (int(rng.integers(n)) for n in (p["cap"], kv, d, dv))
    per = 32 // fmt.bits
    byte = packed["k_cache"][h, s // 64, s % 64 // 16, i // per, s % 16 * 4 + i % 4]
    assert (byte >> (i % per // 4 * fmt.bits)) & fmt.levels == arrays["k_cache"][s, h, i]
    byte = packed["v_cache"][h, s // 64, j // 16, s % 64 // per, j % 16 * 4 + s % 4]
    code = (byte >> (s % per // 4 * fmt.bits)) & fmt.levels
    assert code ^ (128 if c == "i8" else 0) == arrays["v_cache"][s, h, j]


@pytest.mark.parametrize("c", GROUPED)
@pytest.mark.parametrize("arith", ["vnni", "real"])
def test_counts_of_a_step_over_codes(c, arith):
    # one KV head, all of whose positions but the last group are codes
    w = parse_workload(f"cached_attention:t=1,h=4,kv=1,d=32,dv=64,cap=640,c={c}")
    v4 = dataclasses.replace(
        PRESETS["x86-64-v4"], features=PRESETS["x86-64-v4"].features | {"avx512vnni"}
    )
    config = dataclasses.replace(
        FLASH.space(w, v4).default, arith=arith, rows=4, ahead=0, splits=1, parallel=False
    )
    p, fmt = OP.full(w), GROUPED[c]
    s = FLASH.tiling(p, config, v4)

    def body(q, pos, *rest):
        tile = TILES[arith](s, fmt, rest[:3], rest[3:6], 0)
        tile.hide = tile.follow = lambda *_: None  # memory decides on them
        tile.old(GroupReach(s, fmt, pos, 0), 0, 0, 0, 0)

    once = executed(function("step", kernel_args(w), body))
    declared = FLASH.work(w, config, v4)
    assert once["load:k_cache"] == 64 * 32 * fmt.bits / 8
    assert once["load:v_cache"] == 64 * 64 * fmt.bits / 8
    if arith == "vnni":
        assert declared.ops["dot_i8"] == 9 * once["dot_i8"] > 0
    else:
        assert "dot_i8" not in declared.ops
        near = 9 * once["fma_f32"] + 64 * 4 * 96
        assert declared.ops["fma_f32"] == pytest.approx(near, rel=0.05)


def test_code_without_avx512():
    v3 = PRESETS["x86-64-v3"]
    for text, schedule in (
        (f"cached_attention:t=1,{SMALL},cap=64,c=i4", FLASH), (f"kv_append:t=1,{SMALL},cap=64,c=i2", APPEND),
    ):  # fmt: skip
        w = parse_workload(text)
        config = dataclasses.replace(schedule.space(w, v3).default, parallel=False)
        assert "zmm" not in assembly([schedule.lower(w, config, v3)], v3)


def test_each_schedule_takes_its_own_caches():
    plain = [
        get_schedule(n) for n in ("cached_attention.x86_flash", "cached_attention.x86_flash_pairs")
    ]
    for c in ("f32", "bf16", *GROUPED):
        w = parse_workload(f"cached_attention:t=1,h=4,kv=2,d=8,dv=8,cap=64,c={c}")
        assert FLASH.supports(w, CPU) == (c in GROUPED)
        assert any(s.supports(w, CPU) for s in plain) == (c not in GROUPED)
        w = parse_workload(f"kv_append:t=1,h=4,kv=2,d=8,dv=8,cap=64,c={c}")
        assert APPEND.supports(w, CPU) == (c in GROUPED)
        assert get_schedule("kv_append.x86").supports(w, CPU) == (c not in GROUPED)


@given(
    st.integers(1, 300),
    st.lists(st.tuples(st.integers(1, 100), st.floats(0.5, 64.0)), min_size=1, max_size=3),
)
def test_every_line_is_asked_for(lines, phases):
    asked = Asked(lines, phases)
    each = [
        [n for turn in range(turns) for n in asked.at(i, turn)]
        for i, (turns, _) in enumerate(phases)
    ]
    every = sorted(n for lines in each for n in lines)
    assert set(every) >= set(range(lines))
    assert every == list(range(len(every))), "asked for twice"
    assert len(every) < lines + max(turns for turns, _ in phases)
