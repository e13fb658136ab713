"""Prefetches of register tiles: every line of the next weights once, wherever tiles share the asking."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from harness import check
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile._tvm import empty_aligned, from_numpy, load_object
from mimo_compile.errors import UsageError
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.ir.ops.base import Arg
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.attention import pairs
from mimo_compile.schedules.base import Kernel
from mimo_compile.schedules.compile import assembly, compile_kernel
from mimo_compile.schedules.emit import tile
from mimo_compile.schedules.emit.build import T, function, loop, store
from mimo_compile.schedules.mpgemm.gemm import AHEAD

CPU = local_cpu()


def asked(lines, count, rows, knobs_of, turns):
    """Return how often each line of 3 tiles is asked for while the first is worked on ``turns`` times."""
    shape = (1, 3 * rows, lines, 1)
    args = (Arg("seen", "output", shape, "int32"),)

    def record(buffer, *index, near=True):
        store(buffer, buffer[tuple(index)] + 1, *index)

    def body(seen):
        with loop(turns) as turn, loop(lines // count) as step:
            blocks = [(0, r) for r in range(rows)]
            tile.ask_ahead(seen, blocks, step * count, count, knobs_of(turn))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile, "prefetch", record)
        kernel = Kernel("asked", function("asked", args, body), args, Counts())
    seen = empty_aligned(shape, "int32")
    seen[...] = 0
    load_object(compile_kernel(kernel, CPU))["asked"](from_numpy(seen))
    return seen[0, ..., 0]


@settings(max_examples=8)
@given(
    st.integers(1, 4), st.integers(2, 9), st.sampled_from([1, 2, 3, 5]), st.integers(1, 8)
)  # fmt: skip
def test_tiles_of_tokens_share_the_next_tile(rows, turns, count, steps):
    lines = count * turns * steps
    seen = asked(lines, count, rows, lambda t: tile.TileKnobs(1, 1, False, rows, (t, turns)), turns)
    want = np.zeros_like(seen)
    want[rows : 2 * rows] = 1
    assert np.array_equal(seen, want)


def test_a_distance_goes_on_in_the_next_tile():
    rows, lines, ahead = 2, 12, 5
    seen = asked(lines, 1, rows, lambda t: tile.TileKnobs(ahead, 1, False, rows), 1)
    want = np.zeros_like(seen)
    want[:rows, ahead:] = 1
    want[rows : 2 * rows, :ahead] = 1
    assert np.array_equal(seen, want)


@settings(max_examples=8)
@given(st.integers(1, 4), st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=6))
def test_slots_share_the_tile_that_comes_next(rows, sizes):
    lines, total = 24, sum(sizes)
    begins = np.cumsum([0, *sizes])

    def knobs_of(turn):
        begin = sum((T.Select(turn == i, int(b), 0) for i, b in enumerate(begins[:-1])), T.int32(0))
        size = sum((T.Select(turn == i, n, 0) for i, n in enumerate(sizes)), T.int32(0))
        part = tile.Share.WHOLE // total
        return tile.TileKnobs(share=tile.Share(begin * part, size * part, (0, rows)))

    seen = asked(lines, 1, rows, knobs_of, len(sizes))
    assert not seen[:rows].any() and not seen[2 * rows :].any()
    first = seen[rows : 2 * rows]
    assert (first == first[0]).all() and first.sum() == rows * lines * len(sizes)
    # what rounding down may leave behind the end of the last part
    assert (first[0][: lines - 1 - lines * total // tile.Share.WHOLE] > 0).all()


@pytest.mark.parametrize("w", ["w4g64", "w3g64", "w1g64", "fp4g64", "f32"])
def test_results_do_not_depend_on_prefetches(w):
    act = "a16" if w == "f32" else "a8"
    workload = parse_workload(f"mpgemm:m=9,n=150,k=640,w={w},a={act}")
    for schedule in schedules_for(workload, CPU)[:1]:
        space = schedule.space(workload, CPU)
        if "prefetch" in space.knobs:
            config = dataclasses.replace(space.default, prefetch=AHEAD)
            done = check(schedule, workload, config)
            without = check(schedule, workload, dataclasses.replace(config, prefetch=0))
            assert np.array_equal(done.outputs["y"], without.outputs["y"])


def test_defaults_ask_for_weights_in_memory():
    schedule = get_schedule("mpgemm.x86_portable")
    for m, n, asks in ((1, 4096, True), (4, 4096, True), (16, 4096, True), (16, 64, False)):
        workload = parse_workload(f"mpgemm:m={m},n={n},k=4096,w=w4g64,a=a8")
        assert bool(schedule.space(workload, CPU).default.prefetch) == asks


BIG = [
    ("sparse_attention.x86_lists", ",hs=8,block=64,kmax=16"),
    ("cached_attention.x86_flash", ""),
]


def big(name, more, cap):
    schedule = get_schedule(name)
    workload = parse_workload(f"{schedule.op}:t=1,h=8,kv=8,d=128,dv=128,cap={cap}{more}")
    config = dataclasses.replace(schedule.space(workload, CPU).default, ahead=1, parallel=False)
    return schedule.lower(workload, config, CPU)


@pytest.mark.parametrize(("name", "more"), BIG)
def test_greatest_caches_are_asked_for(name, more):
    assert "prefetch" in assembly([big(name, more, 2**21)], CPU)


@pytest.mark.parametrize(("name", "more"), BIG)
def test_caches_whose_indices_would_wrap_around_are_refused(name, more):
    with pytest.raises(UsageError, match=r"k_cache .* more than 2\^31 elements"):
        big(name, more, 2**21 + 16)


@pytest.mark.parametrize(("block", "ahead"), [(16, 1), (64, 2)])
def test_one_token_reads_listed_pairs_in_short_steps_that_are_asked_for(block, ahead):
    workload = parse_workload(
        f"sparse_attention:t=1,h=8,kv=2,d=128,dv=128,cap=65536,hs=2,block={block},kmax=64,c=bf16"
    )
    schedule = get_schedule("sparse_attention.x86_lists_pairs")
    default = schedule.space(workload, CPU).default
    assert (default.block, default.ahead) == (16, ahead)


def recorded(name, text):
    """Return (arguments by name, what runs the kernel) of one that counts in caches the lines it asks for."""
    schedule, workload = get_schedule(name), parse_workload(text)
    default = schedule.space(workload, CPU).default
    config = dataclasses.replace(default, block=16, ahead=1, splits=1, parallel=False)

    def record(buffer, *index, near=True):
        store(buffer, buffer[tuple(index)] + T.cast(T.int32(1), buffer.dtype), *index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "prefetch", record)
        kernel = schedule.lower(workload, config, CPU)
    arrays = {a.name: empty_aligned(a.shape, a.dtype) for a in kernel.args}
    for array in arrays.values():
        array.reshape(-1).view(np.uint8)[...] = 0
    code = load_object(compile_kernel(kernel, CPU))
    return arrays, lambda: code[kernel.name](*(from_numpy(arrays[a.name]) for a in kernel.args))


@pytest.mark.parametrize("dv", [32, 80])
def test_pairs_of_values_are_asked_for_once_whatever_columns_are_read_in_turns(dv):
    arrays, run = recorded(
        "cached_attention.x86_flash_pairs",
        f"cached_attention:t=1,h=4,kv=1,d=32,dv={dv},cap=80,c=bf16",
    )
    arrays["pos"][...] = 47, 1  # three of the five blocks
    run()
    for cache in ("k_cache", "v_cache"):
        lines = arrays[cache].view(np.uint16).reshape(5, -1, 32)
        # a step asks for the block behind its own, which begins with all zeros
        assert (lines[1:4, :, 0] == 1).all() and lines.sum() == lines[1:4, :, 0].sum()


WOVEN = [
    (16, 64, 64, (4, 2, 2)), (16, 128, 128, (2, 2, 2)), (32, 64, 32, (4, 2, 0)), (32, 128, 128, (0, 2, 2)),
    (16, 48, 32, None), (32, 32, 80, None),
]  # fmt: skip
"""Block, widths of keys and values, and how their lines are asked for."""


@pytest.mark.skipif(not CPU.has_avx512, reason="registers of AVX2 hold fewer columns of values")
@pytest.mark.parametrize(("block", "d", "dv", "woven"), WOVEN)
def test_lines_of_listed_blocks_are_asked_for_once_keys_and_values_in_turns(block, d, dv, woven):
    found = []

    def weave(tile, alone):
        found.append(original(tile, alone))
        return found[-1]

    original = pairs.Widened._weave
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs.Widened, "_weave", weave)
        arrays, run = recorded(
            "sparse_attention.x86_lists_pairs",
            f"sparse_attention:t=1,h=4,kv=1,d={d},dv={dv},cap=80,hs=1,block={block},kmax=3,c=bf16",
        )
    arrays["pos"][...] = 79, 1
    listed = [0, 2, 4] if block == 16 else [0, 2, 0]
    arrays["idx"][...], arrays["cnt"][...] = listed, 3 if block == 16 else 2
    run()
    assert found == [woven]
    for cache in ("k_cache", "v_cache"):
        lines = arrays[cache].view(np.uint16).reshape(5, -1, 32)
        # each of three steps asks for the part after its own, the last for its own
        asked_for = np.array([0, 0, 1, 0, 2] if block == 16 else [0, 1, 0, 0, 2])
        assert (lines[..., 0] == asked_for[:, None]).all() and lines.sum() == lines[..., 0].sum()
