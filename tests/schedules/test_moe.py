"""Expert kernels: every format and config against the op's reference, routing patterns, bad ids."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile._tvm import empty_aligned, from_numpy, load_object
from mimo_compile.errors import UsageError
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.compile import compile_kernel
from mimo_compile.schedules.moe.problem import Problem

CPU = local_cpu()
vnni = pytest.mark.skipif(not CPU.has_vnni, reason="needs AVX-512 VNNI")


@settings(max_examples=8)
@given(data=st.data())
def test_any_shape_format_and_config(data):
    fmt = data.draw(st.sampled_from(("f32", "bf16", "w4g32", "w8", "w1.58", "w2zg32", "w3g64")))
    act = "a16" if fmt in ("f32", "bf16") else data.draw(st.sampled_from(("a8", "a8", "a16")))
    e = data.draw(st.integers(1, 6))
    k = data.draw(st.integers(1, e))
    t, d, f = (data.draw(st.integers(1, high)) for high in (11, 90, 90))
    workload = parse_workload(f"moe:t={t},e={e},k={k},d={d},f={f},w={fmt},a={act}")
    schedule = data.draw(st.sampled_from(schedules_for(workload, CPU)))
    seed = data.draw(st.integers(0, 999))
    check(schedule, workload, sample_config(schedule, workload, CPU, seed), seed)


def prove(ids, text="moe:t=6,e=5,k=3,d=48,f=32,w=w4g32,a=a8", **inputs):
    workload = parse_workload(text)
    ids = np.asarray(ids, np.int32)
    for schedule in schedules_for(workload, CPU):
        for tokens in (1, 4):
            space = schedule.space(workload, CPU)
            config = dataclasses.replace(space.default, tokens=tokens, unroll=1)
            yield check(schedule, workload, config, inputs={"ids": ids, **inputs})


@pytest.mark.parametrize(
    "ids",
    [
        [[0, 1, 2]] * 6,
        [[4, 3, 2]] * 6,
        [[2, 2, 2]] * 6,
        [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1], [2, 3, 4], [0, 0, 4]],
    ],
)
def test_routing_patterns(ids):
    assert len(list(prove(ids))) >= 2


def test_ids_outside_are_skipped():
    ids = np.array(
        [[-1, 0, 5], [7, 7, 7], [0, 1, 2], [2**31 - 1, -(2**31), 4], [3, 3, -5], [1, 9, 1]],
        np.int32,
    )
    inside = (ids >= 0) & (ids < 5)
    weights = np.random.default_rng(0).random((6, 3)).astype(np.float32)
    # proved with weight zero in the place of bad ids; then the same call with the bad ids
    for done in prove(np.where(inside, ids, 0), weights=weights * inside):
        memory = done.memory
        memory["ids"][...] = ids
        memory["weights"][...] = weights
        memory["y"][...] = np.nan
        done.call()
        assert np.array_equal(memory["y"], done.outputs["y"])
        assert not memory["y"][1].any()


COMPLEX = ("complex2", "complex2grow", "complex2wl", "complex2wl2")


@settings(max_examples=6)
@given(data=st.data())
def test_complex_weights_of_any_shape_and_config(data):
    fmt, act = data.draw(st.sampled_from(COMPLEX)), data.draw(st.sampled_from(("a8", "a8", "a16")))
    e = data.draw(st.integers(1, 4))
    k, t = data.draw(st.integers(1, e)), data.draw(st.integers(1, 9))
    d, f = (2 * data.draw(st.integers(1, 45)) for _ in range(2))
    workload = parse_workload(f"moe:t={t},e={e},k={k},d={d},f={f},w={fmt},a={act}")
    (schedule,) = schedules_for(workload, CPU)
    seed = data.draw(st.integers(0, 999))
    check(schedule, workload, sample_config(schedule, workload, CPU, seed), seed)


@pytest.mark.parametrize("features", [(), ("avx", "avx2", "fma", "ssse3")])
def test_complex_weights_on_lesser_cpus(features):
    hardware = dataclasses.replace(CPU, features=frozenset(features) & CPU.features)
    for act in ("a8", "a16"):
        workload = parse_workload(f"moe:t=2,e=3,k=2,d=70,f=38,w=complex2wl,a={act}")
        (schedule,) = schedules_for(workload, hardware)
        small = {"rows13": 1, "rows2": 1, "tokens": 1, "unroll": 1}
        config = dataclasses.replace(schedule.space(workload, hardware).default, **small)
        check(schedule, workload, config, hardware=hardware, threads=1)


def test_complex_weights_give_gates_and_ups_together():
    # W = s (1 or i) on conj(x): gates are Re x, ups -Im x; or gates Im x, ups Re x
    d, f, one = 64, 32, np.float32(2**-6)
    x = np.random.default_rng(0).standard_normal((1, d)).astype(np.float32)
    codes = np.zeros((1, f, d // 2), np.uint8)
    scale = np.zeros((1, f, 2), np.float32)
    real, imaginary = x[:, : d // 2].sum(), x[:, d // 2 :].sum()
    rng = np.random.default_rng(1)
    down = rng.integers(0, 4, (1, d // 2, f // 2), dtype=np.uint8)
    inner = np.full((1, d // 2, 2), one)
    for axis, (gate, up) in enumerate(((real, -imaginary), (imaginary, real))):
        codes[...], scale[...] = axis, 0
        scale[..., axis] = one
        inputs = {
            "x": x, "ids": np.zeros((1, 1), np.int32), "weights": np.ones((1, 1), np.float32),
            "w13_codes": codes, "w13_scale": scale, "w2_codes": down, "w2_scale": inner,
        }  # fmt: skip
        done = check(get_schedule("moe.x86_complex"), f"moe:t=1,e=1,k=1,d={d},f={f},w=complex2,a=a16",
                     inputs=inputs)  # fmt: skip
        gate, up = gate * one, up * one
        hidden = gate / (1 + np.exp(-gate)) * up
        signs = np.array([1, 0, -1, 0])[down[0]] + np.array([0, 1, 0, -1])[down[0]]
        minus = np.array([0, 1, 0, -1])[down[0]] - np.array([1, 0, -1, 0])[down[0]]
        want = one * hidden * np.concatenate([signs.sum(-1), minus.sum(-1)])
        np.testing.assert_allclose(done.outputs["y"][0], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("d, f", [(63, 32), (64, 31)])
def test_complex_weights_need_even_extents(d, f):
    with pytest.raises(UsageError, match="even d and f"):
        parse_workload(f"moe:t=1,e=2,k=1,d={d},f={f},w=complex2wl,a=a8")


@vnni
def test_tokens_can_be_permuted():
    workload = parse_workload("moe:t=8,e=4,k=2,d=64,f=32,w=w4g32,a=a8")
    schedule = get_schedule("moe.x86_vnni")
    op = get_op("moe")
    arrays = op.make_inputs(workload, np.random.default_rng(5))
    order = np.random.default_rng(6).permutation(8)
    one = check(schedule, workload, inputs=arrays)
    moved = {n: arrays[n][order] for n in ("x", "ids", "weights")}
    two = check(schedule, workload, inputs={**arrays, **moved})
    assert np.array_equal(two.outputs["y"], one.outputs["y"][order])


@vnni
def test_configs_agree_to_the_bit():
    # every tile sums the same numbers in the same order
    workload = parse_workload("moe:t=5,e=4,k=2,d=64,f=64,w=w4g32,a=a8")
    schedule = get_schedule("moe.x86_vnni")
    space = schedule.space(workload, CPU)
    configs = [space.default, *(sample_config(schedule, workload, CPU, i) for i in (1, 2))]
    results = {
        check(schedule, workload, config, seed=1).outputs["y"].tobytes() for config in configs
    }
    assert len(results) == 1


@pytest.mark.parametrize("w", ["w4g32,a=a8", "bf16", "complex2wl,a=a8"])
def test_tasks_share_rows_in_any_way(w):
    # 5 tiles of gate and up, 7 (complex: 4) of down, in one task, two (one of them shorter) and more
    workload = parse_workload(f"moe:t=3,e=4,k=2,d=112,f=80,w={w}")
    for schedule in schedules_for(workload, CPU):
        space = schedule.space(workload, CPU)
        results = set()
        for tasks, apart, parallel in ((0, 0, 0), (1, 1, 0), (2, 0, 1), (3, 1, 1)):
            config = dataclasses.replace(
                space.default, rows13=1, rows2=1, tokens=2, unroll=1, tasks=tasks, prefetch=8,
                apart=bool(apart) and len(space.knobs["apart"]) > 1, parallel=bool(parallel),
            )  # fmt: skip
            results.add(check(schedule, workload, config).outputs["y"].tobytes())
        assert len(results) == 1


@pytest.mark.parametrize("w", ["w4g32,a=a8", "bf16,a=abf16", "complex2wl,a=a8"])
def test_what_is_asked_for_changes_no_result(w):
    workload = parse_workload(f"moe:t=9,e=4,k=2,d=112,f=80,w={w}")
    for schedule in schedules_for(workload, CPU)[:1]:
        space, results = schedule.space(workload, CPU), set()
        for share, tasks, apart in ((False, 0, False), (True, 0, False), (True, 2, True)):
            config = dataclasses.replace(
                space.default, rows13=1, rows2=1, tokens=4, unroll=1, prefetch=0, share=share,
                tasks=tasks, apart=apart and len(space.knobs["apart"]) > 1, parallel=tasks > 0,
            )  # fmt: skip
            results.add(check(schedule, workload, config).outputs["y"].tobytes())
        assert len(results) == 1


def tiles_of_the_rest(schedule, w, kinds):
    """Return the outputs of configs (tokens, once, share) where experts have 11, 7, 5, 4, 3, 2 and 1 slots.

    So each number is left that may be left of tiles of 4, 6 and 8, and whole tiles come before some.
    """
    rest = np.repeat(np.arange(1, 7), (7, 5, 4, 3, 2, 1))
    ids = np.concatenate([np.zeros((11, 1)), rest.reshape(2, 11).T], 1).astype(np.int32)
    workload = parse_workload(f"moe:t=11,e=7,k=3,d=64,f=32,w={w}")
    space = schedule.space(workload, CPU)
    for tokens, once, share in kinds:
        config = dataclasses.replace(
            space.default, rows13=1, rows2=1, tokens=tokens, unroll=1, once=once, share=share,
            prefetch=0, apart=False,
        )  # fmt: skip
        assert space.legal(config), config
        yield check(schedule, workload, config, inputs={"ids": ids}).outputs["y"].tobytes()


@vnni
def test_one_tile_takes_what_is_left_of_an_expert():
    kinds = (4, False, False), (6, True, True), (8, True, False)
    assert len(set(tiles_of_the_rest(get_schedule("moe.x86_vnni"), "w4g32,a=a8", kinds))) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "w", ["bf16", "bf16,a=abf16", "w8,a=a8", "w8g32,a=abf16", "w3g64,a=a8", "w1.58,a=a8",
          "complex2wl,a=a8"],
)  # fmt: skip
def test_one_tile_takes_what_is_left_in_every_format(w):
    kinds = [(1, False, False), *((t, True, s) for t, s in ((4, True), (6, False), (8, True)))]
    some = parse_workload(f"moe:t=11,e=7,k=3,d=64,f=32,w={w}")
    for schedule in schedules_for(some, CPU):
        found = set(tiles_of_the_rest(schedule, w, kinds))
        assert len(found) == 1 or schedule.name == "moe.x86_bf16"  # which promises no order


@pytest.mark.parametrize("left", range(1, 9))
def test_work_counts_the_room_of_the_tile_that_takes_the_rest(left):
    # two experts for each token: they get t slots each
    workload = parse_workload(f"moe:t={8 + left},e=2,k=2,d=64,f=32,w=bf16")
    schedule = get_schedule("moe.x86_float")
    default = schedule.space(workload, CPU).default
    config = dataclasses.replace(default, rows13=1, rows2=1, tokens=8, unroll=1, once=True)
    slots, one = 2 * (8 + left), 3 * 64 * 32
    room = 2 * (8 + {5: 6, 7: 8}.get(left, left))
    known = schedule.work(workload, config, CPU).ops["fma_f32"]
    assert known == pytest.approx(room * one + slots * 64)


@pytest.mark.parametrize(("tasks", "parallel"), [(1, True), (2, True), (4, True), (4, False)])
def test_workspace_has_the_parts_of_all_tasks_that_run(tasks, parallel):
    workload = parse_workload("moe:t=16,e=8,k=2,d=256,f=64,w=bf16")
    schedule, cpu = get_schedule("moe.x86_float"), dataclasses.replace(CPU, cores=2, threads=2)
    config = dataclasses.replace(
        schedule.space(workload, cpu).default, rows13=1, rows2=1, tasks=tasks, parallel=parallel
    )
    one = dataclasses.replace(config, tasks=1, parallel=False)
    known, whole = (schedule.lower(workload, c, cpu).workspace_bytes for c in (config, one))
    running = min(tasks, 2) if parallel else 1
    assert whole - known == 4 * 32 * (256 - running * 256 // tasks)


@pytest.mark.parametrize(
    ("t", "e", "kind"), [(1, 64, "stream"), (16, 64, "stream"), (512, 64, "share"), (512, 4, "")]
)
@pytest.mark.parametrize("w", ["w4g64,a=a8", "w8,a=a8", "bf16,a=abf16"])
def test_defaults_for_one_few_and_many_slots_of_an_expert(t, e, kind, w):
    size = "d=2048,f=768" if kind else "d=256,f=64"
    workload = parse_workload(f"moe:t={t},e={e},k=2,{size},w={w}")
    schedule = schedules_for(workload, CPU)[0]
    config = schedule.space(workload, CPU.with_threads(2)).default
    assert (config.prefetch, config.apart, config.share) == {
        "stream": (128, True, False), "share": (0, False, True), "": (0, False, False)
    }[kind]  # fmt: skip
    if kind == "stream":
        assert (config.rows13, config.rows2, config.tokens) == (1, 1, min(t, 8))
        assert config.once == (t > 1)
    elif kind == "share" and not w.startswith("w4"):
        # an expert's rows of x meet all of a thread's rows of weights while they are in cache
        assert (config.tasks, config.tokens, config.once) == (2, 8, True)


@pytest.mark.parametrize("t", [1, 3, 64])
@pytest.mark.parametrize(
    "w", ["f32", "bf16", "w4g64,a=a8", "w1,a=a8", "w4", "w8", "complex2wl2,a=a8"]
)
def test_default_is_one_of_the_configs(t, w):
    for d, f in ((40, 24), (5, 7) if "complex" not in w else (6, 8), (2048, 768)):
        workload = parse_workload(f"moe:t={t},e=8,k=2,d={d},f={f},w={w}")
        for schedule in schedules_for(workload, CPU):
            space = schedule.space(workload, CPU)
            assert space.legal(space.default)
            for knob, values in space.knobs.items():
                assert getattr(space.default, knob) in values, (workload, knob)


@pytest.mark.parametrize("w", ["w8,a=a8", "bf16,a=abf16"])
def test_defaults_for_many_tokens_keep_workspace_small(w):
    cpu, found = CPU.with_threads(2), []
    for t in (512, 4096, 1 << 15):
        workload = parse_workload(f"moe:t={t},e=64,k=8,d=2048,f=768,w={w}")
        schedule = schedules_for(workload, cpu)[0]
        config = schedule.space(workload, cpu).default
        if not config.once:
            pytest.skip("not on this CPU")
        found.append(config.tasks)
    assert found == [2, 8, 0]


def test_experts_are_packed_like_plain_matrices():
    workload = parse_workload("moe:t=1,e=3,k=1,d=40,f=24,w=w4g32,a=a8")
    op = get_op("moe")
    arrays = op.make_inputs(workload, np.random.default_rng(0))
    problem = Problem.of(workload)
    schedule = get_schedule("moe.x86_float")
    config = schedule.space(workload, CPU).default
    weights = {n: a for n, a in arrays.items() if n[:2] in ("w1", "w2")}
    packed = schedule.pack(workload, config, weights)
    halves = problem.layout13.unpack(packed["w13_codes"])
    assert np.array_equal(halves.reshape(3, 48, 40), arrays["w13_codes"])
    assert np.array_equal(problem.layout2.unpack(packed["w2_codes"]), arrays["w2_codes"])
    for name, array in weights.items():
        (key,) = schedule.pack(workload, config, {name: array})
        assert key == name


@vnni
def test_declared_dots_match_the_code():
    # one token, all experts hit once: the declared work is the executed work
    workload = parse_workload("moe:t=1,e=2,k=2,d=64,f=32,w=w4g32,a=a8")
    schedule = get_schedule("moe.x86_vnni")
    kernel = schedule.lower(workload, schedule.space(workload, CPU).default, CPU)
    layout_work = 2 * (2 * 32 * 64 + 64 * 32)
    assert kernel.counts.ops["dot_i8"] == layout_work
    assert kernel.counts.ops["unpack_u8"] == layout_work
    necessary = get_op("moe").counts(workload)
    assert kernel.counts.ops["dot_i8"] >= necessary.ops["dot_i8"]
    levels = kernel.counts.bytes
    assert levels["l1"] >= levels["l2"] >= levels["dram"] >= necessary.bytes["dram"] - 1e-6


@vnni
def test_experts_beyond_2_gib_are_found():
    # memory that is never touched costs nothing: only the last of 33 experts has weights
    text = "moe:t=1,e={},k=1,d=4096,f=8192,w=w8,a=a8"
    one, many = parse_workload(text.format(1)), parse_workload(text.format(33))
    schedule = get_schedule("moe.x86_vnni")
    config = schedule.space(one, CPU).default
    arrays = get_op("moe").make_inputs(one, np.random.default_rng(0))
    packed = schedule.pack(one, config, {n: a for n, a in arrays.items() if n[:2] in ("w1", "w2")})
    results = []
    for workload, index in ((one, 0), (many, 32)):
        kernel = schedule.lower(workload, config, CPU)
        memory = {a.name: empty_aligned(a.shape, a.dtype) for a in kernel.args}
        for name, array in arrays.items():
            if name in packed:
                memory[name][index] = packed[name][0]
            else:
                memory[name][...] = array
        memory["ids"][...] = index
        module = load_object(compile_kernel(kernel, CPU))
        module[kernel.name](*(from_numpy(memory[a.name]) for a in kernel.args))
        results.append(memory["y"].copy())
    assert memory["w13_codes"].size >= 2**31
    assert results[0].any() and np.array_equal(*results)
