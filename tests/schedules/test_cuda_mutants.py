"""What the emulator's word is worth: kernels without one of their barriers, waits or fences are found wrong.

Each such word of a kernel's text is taken out, one at a time; where operands are read long after a product is
issued, each is also moved behind the words that follow it. A mutant that goes unnoticed is a blind spot of
the emulator, or a word that the kernel does not need; those that are known are listed with their reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from test_cuda_attention import EXACT, check_exact, made
from test_cuda_flash_wgmma import EXACT as WGMMA_EXACT
from test_cuda_flash_wgmma import FULL
from test_cuda_float8 import DECODE as FLOAT8
from test_cuda_float8 import PRECISE, check_precise
from test_cuda_groups import DECODE as GROUPS
from test_cuda_groups import QUICK, TAIL, check_rounded, check_tail
from test_cuda_int8 import DIAGONAL, HALF, INT8, RING, check_integers

from mimo_compile._tvm import compiler as tvm_compiler
from mimo_compile.errors import VerificationError
from mimo_compile.ir import functions
from mimo_compile.ir.hardware import CUDA, Hardware
from mimo_compile.ir.ops import parse_workload
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.base import Kernel, Schedule
from mimo_compile.schedules.cuda.emulate import DEVICE, EmulationError, compiler
from mimo_compile.search.measure.emulated import check_emulated

tvm_compiler()
from tvm.script import tirx as T

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler (CXX, g++ or clang++)"),
]
ONE_SM = replace(CUDA["cuda:sm_90a"], cores=1, threads=1)
"""A block then has several tiles to go through."""


def least(config: Any) -> Hardware:
    """Return a GPU that has room for one block of a config, or one cluster."""
    blocks = getattr(config, "cluster", 1)
    return replace(ONE_SM, cores=blocks, threads=blocks)


WORDS = re.compile(
    r"\b(block_sync|warp_sync|named_sync|cluster_sync|cp_async_wait<\w+>|cp_async_wait<[^;]*?>|cp_async_commit|"
    r"mbarrier_wait|mbarrier_arrive|mbarrier_arrive_in|wgmma_fence|wgmma_commit|wgmma_wait<\w+>|fence_async_proxy|"
    r"fence_barrier_init|"
    r"registers_decrease<\w+>|registers_increase<\w+>)\([^;]*\);"
)
LATE = re.compile(
    r"\b(mbarrier_wait|wgmma_fence|wgmma_commit|wgmma_wait<\w+>|fence_async_proxy)\([^;]*\);"
)
ANCHORS = re.compile(
    r"\b(multiply|tma_load|load|mbarrier_arrive|leave|wgmma_commit|wgmma_wait<\w+>|"
    r"score|add|weigh|added|take_weights)\([^;]*\);"
)
FLASH = [
    (
        "cached_attention.cuda_wgmma",
        "cached_attention:t=90,h=1,kv=1,d=24,dv=18,cap=210,window=120,len=300,c=bf16,"
        f"scale={math.log(2)}",
        {"keys": 32, "consumers": 2, "stages": 2, "overlap": overlap},
    )
    for overlap in (True, False)
]
PIPELINES = [
    (
        "mpgemm.cuda_wgmma", "mpgemm:m=80,n=100,k=900,w=w8,a=a8,bias=1",
        {"stages": 2, "split": 1, "bn": 64, "consumers": 2},
    ),
    (
        "mpgemm.cuda_wgmma", "mpgemm:m=260,n=70,k=520,w=w8,a=a8",
        {"stages": 2, "split": 1, "bn": 64, "consumers": 2, "group_m": 1, "cluster": 2},
    ),
]  # fmt: skip
CASES = [
    ("mpgemm.cuda_gemv", "mpgemm:m=2,n=9,k=150,w=w4g64,a=a8,bias=1", {}),
    ("mpgemm.cuda_mma", "mpgemm:m=19,n=33,k=272,w=w8,a=a8", {}),
    ("mpgemm.cuda_mma_codes", "mpgemm:m=18,n=34,k=320,w=w4g64,a=abf16", {}),
    *PIPELINES,
    ("moe.cuda_gemv", "moe:t=2,e=3,k=2,d=150,f=66,w=w4g64,a=a8", {}),
    ("moe.cuda_mma", "moe:t=19,e=3,k=2,d=200,f=150,w=w8,a=a8", {}),
    (
        "moe.cuda_wgmma", "moe:t=70,e=2,k=2,d=200,f=150,w=bf16,a=abf16",
        {"stages": 2, "bn13": 64, "bn2": 64, "consumers": 2},
    ),
    ("cached_attention.cuda_decode", "cached_attention:t=2,h=9,kv=1,d=24,dv=18,cap=300,sink=1,c=bf16", {}),
    ("cached_attention.cuda_prefill", "cached_attention:t=40,h=3,kv=1,d=24,dv=18,cap=220,len=200,c=bf16", {}),
    *FLASH,
    (
        "cached_attention.cuda_int8",
        "cached_attention:t=40,h=3,kv=1,d=24,dv=18,cap=300,c=bf16,arith=int8", {"warps": 2},
    ),
    (
        "cached_attention.cuda_int8half",
        "cached_attention:t=40,h=3,kv=1,d=24,dv=18,cap=300,c=bf16,arith=int8half", {"warps": 2, "stages": 3},
    ),
    ("oracle_attention.cuda", "oracle_attention:t=2,h=3,kv=1,d=24,dv=18,cap=99,block=8,c=bf16", {"parts": 2}),
    (
        "score_lowbit.cuda",
        "score_lowbit:t=40,h=2,kv=1,d=24,cap=600,block=16,rows=40,first=1,last=2,c=bf16", {},
    ),
    (
        "cached_attention.cuda_groups_decode",
        "cached_attention:t=2,h=9,kv=1,d=24,dv=18,cap=512,len=500,sink=1,c=i4", {},
    ),
    # rows of the first blocks see no group as codes
    (
        "cached_attention.cuda_groups_prefill",
        "cached_attention:t=200,h=1,kv=1,d=24,dv=18,cap=256,len=200,c=i8", {"warps": 2},
    ),
    (
        "cached_attention.cuda_float8_decode",
        "cached_attention:t=2,h=9,kv=1,d=24,dv=18,cap=300,len=280,sink=1,c=e4m3", {},
    ),
    (
        "cached_attention.cuda_float8_prefill",
        "cached_attention:t=40,h=3,kv=1,d=24,dv=18,cap=220,len=200,c=e4m3", {},
    ),
    ("key_mean.cuda", "key_mean:t=2,kv=1,d=24,cap=300,c=bf16", {"parts": 16, "splits": 2}),
    ("kv_append.cuda_groups", "kv_append:t=70,h=4,kv=2,d=24,dv=18,cap=192,rot=8,norm=1,c=i4", {}),
    ("rms_norm.cuda", "rms_norm:t=3,d=300", {"threads": 128, "team": 64}),
    ("score_blocks.cuda", "score_blocks:t=2,h=6,kv=2,d=40,cap=90,kind=quest,agg=max,block=16", {"warps": 2}),
    ("select_blocks.cuda", "select_blocks:t=2,hs=2,cap=300,block=4,k=9,last=1", {"threads": 64}),
    (
        "sparse_attention.cuda_lists",
        "sparse_attention:t=3,h=4,kv=1,d=24,dv=18,cap=160,hs=1,block=4,kmax=24,rows=2,window=40,c=bf16", {},
    ),
]  # fmt: skip


@T.prim_func(s_tir=True)
def maxima_added(
    x: T.Buffer((2, 70, 70), "float32"),
    most: T.Buffer((2, 70), "float32"),
    y: T.Buffer((2,), "float32"),
):
    """Two reductions, row by row: more results, and more terms, than a team of 64 threads has threads."""
    for i, j, k in T.grid(2, 70, 70):
        with T.sblock("most"):
            vi, vj, vk = T.axis.remap("SSR", [i, j, k])
            with T.init():
                most[vi, vj] = T.float32(-1e30)
            most[vi, vj] = T.max(most[vi, vj], x[vi, vj, vk])
    for i, j in T.grid(2, 70):
        with T.sblock("y"):
            vi, vj = T.axis.remap("SR", [i, j])
            with T.init():
                y[vi] = T.float32(0)
            y[vi] = y[vi] + most[vi, vj]


NEEDLESS = {
    r"registers_increase<CONSUMER_REGISTERS>\(\);": "threads then keep the registers that they began with",
    r"cp_async_wait<0>\(\);": "behind the last tile: no copy that was not waited for is under way",
    r"leave\(\) \{\s+warp_sync\(\);": "emulated lanes that wait for a phase never sleep through it",
}
"""Ends of texts up to a word."""


def whole(text: str) -> str:
    """Return a text with the headers that kernels share in it, so that what is in them is taken out, too."""
    words = {"warp.cuh", "mma.cuh", "async.cuh", "tma.cuh", "cluster.cuh", "wgmma.cuh"}
    seen: set[str] = set()

    def put(found: re.Match[str]) -> str:
        name = found[1]
        if name in words:
            return found[0]
        if name in seen:
            return ""
        seen.add(name)
        return re.sub(
            r'#include "([^"]+)"', put, (DEVICE / name).read_text().replace("#pragma once", "")
        )

    return re.sub(r'#include "([^"]+)"', put, text)


def mutant(schedule: Schedule, text: str) -> Schedule:
    """Return a schedule whose kernels have another text."""

    class Mutant(type(schedule)):  # type: ignore[misc]
        def lower(self, workload: Workload, config: Any, hardware: Hardware) -> Kernel:
            kernel = super().lower(workload, config, hardware)
            return replace(kernel, device=replace(kernel.device, text=text))

    return Mutant()


def changed(schedule: Schedule, change: tuple[str, str]) -> Schedule:
    """Return a schedule in whose kernels, of any workload, something is replaced."""

    class Changed(type(schedule)):  # type: ignore[misc]
        def lower(self, workload: Workload, config: Any, hardware: Hardware) -> Kernel:
            kernel = super().lower(workload, config, hardware)
            assert kernel.device is not None
            text, times = re.subn(*change, whole(kernel.device.text))
            assert times == 1
            return replace(kernel, device=replace(kernel.device, text=text))

    return Changed()


def found_wrong(text: str, workload: Workload, schedule: Schedule, config: Any) -> bool:
    """Say whether a schedule's kernel with another text is found wrong."""
    try:
        check_emulated(workload, mutant(schedule, text), config, least(config))
    except VerificationError:
        return True
    return False


def late(text: str) -> Iterator[tuple[str, str]]:
    """Yield each word that waits or fences, and a text where it comes behind the last word before a brace."""
    for word in LATE.finditer(text):
        brace = re.compile(r"[{}]").search(text, word.end())
        behind = [
            m.end()
            for m in ANCHORS.finditer(text, word.end(), brace.start() if brace else len(text))
        ]
        if behind:
            between = text[word.end() : behind[-1]]
            yield word[0], f"{text[: word.start()]};{between} {word[0]}{text[behind[-1] :]}"


@pytest.mark.parametrize(("name", "text", "knobs"), PIPELINES)
def test_no_word_of_a_pipeline_may_come_late(name: str, text: str, knobs: dict[str, Any]) -> None:
    schedule, workload = get_schedule(name), parse_workload(text)
    config = replace(schedule.space(workload, ONE_SM).default, **knobs)
    seen = check_emulated(workload, schedule, config, least(config))
    assert seen.kernel.device is not None
    found = dict(late(whole(seen.kernel.device.text)))
    assert {word.split("(")[0] for word in found} >= {
        "mbarrier_wait", "wgmma_fence", "wgmma_commit", "wgmma_wait<0>", "wgmma_wait<1>",
    }  # fmt: skip
    left = [w for w, other in found.items() if not found_wrong(other, workload, schedule, config)]
    assert not left


def test_no_word_of_flash_attention_may_come_late() -> None:
    # of each loop, with and without overlap, one config is blind
    name, text, _ = FLASH[0]
    schedule, workload = get_schedule(name), parse_workload(text)
    default = schedule.space(workload, ONE_SM).default
    configs = [replace(default, **knobs) for _, _, knobs in FLASH]
    texts = []
    for config in configs:
        device = schedule.lower(workload, config, ONE_SM).device
        assert device is not None
        texts.append(list(late(whole(device.text))))
    words = [word.split("(")[0] for word, _ in texts[0]]
    assert words.count("wgmma_wait<0>") == 3 and {"wgmma_fence", "wgmma_wait<1>"} <= {*words}
    left = [
        (i, word)
        for i, (word, _) in enumerate(texts[0])
        if not any(
            found_wrong(other[i][1], workload, schedule, config)
            for other, config in zip(texts, configs, strict=True)
        )
    ]
    assert not left


ORDERS = [
    (r"(take_weights\(\);)\s+(for \(int step = from \+ 1)", r"\2"),
    (r"added\(\);\s+rescale\(\);\s+take_weights\(\);", "take_weights(); added(); rescale();"),
    (r"added\(\);\s+rescale\(\);\s+take_weights\(\);", "rescale(); added(); take_weights();"),
    (r"wgmma_wait<1>\(\);\s+weigh\(step\);", "weigh(step); wgmma_wait<1>();"),
    (r"(score\(\);)\s+(add\(there\);)", r"\2 \1"),
    (r"wgmma_pin\(flat\(rows\.out\)\);", "values.leave();"),
    (r"if \(have < KEYS\)", "if (have < 0)"),
    (r" && position \+ key < limit;", ";"),
    (r"min\(limit, oldest \+ 1\)", "oldest + 1"),
    (r"min\(limit, oldest \+ 1\)", "limit"),
    (r"WINDOW > 0 && position <= newest - WINDOW", "false"),
    (r"(span\[from\].position) \+ KEYS - 1 <= oldest", r"\1 - 1 <= oldest"),
    (r"(span\[until - 1\].position) > newest", r"\1 >= newest - KEYS"),
    (r"before = min\(end - begin, CAP - slot\);", "before = end - begin;"),
    (r"\(row \+ 8 \* half\) % GROUP\);\s+float", "row % GROUP); float"),
    (r"start \+ valid - CAP\);", "start + valid - CAP + 1);"),
]
"""What is done too early or too late, and tiles and keys that count or do not, where it is the other way."""


@pytest.mark.parametrize("change", ORDERS)
def test_flash_attention_in_another_order_is_found(change: tuple[str, str]) -> None:
    name, text, knobs = FLASH[0]
    schedule, workload = get_schedule(name), parse_workload(text)
    config = replace(schedule.space(workload, ONE_SM).default, **knobs)
    wrong = changed(schedule, change)
    assert wrong.lower(workload, config, ONE_SM)
    with pytest.raises((AssertionError, VerificationError)):
        # a ring with slots that hold NaN, one that was passed, a full cache with sinks
        inputs = made(text, [(20, 80)])
        check_emulated(workload, wrong, config, ONE_SM, inputs=inputs)
        check_exact(wrong, text, config, ONE_SM)
        check_emulated(FULL[0], wrong, config, ONE_SM, inputs=made(*FULL))


@pytest.mark.parametrize(
    ("schedule", "text", "config"),
    [*EXACT, WGMMA_EXACT],
    ids=[s.name for s, _, _ in (*EXACT, WGMMA_EXACT)],
)
def test_a_softmax_scale_half_a_percent_off_is_found(
    schedule: Schedule, text: str, config: Any
) -> None:
    kernel = schedule.lower(parse_workload(text), config, CUDA["cuda:sm_90a"])
    assert kernel.device is not None

    def larger(found: re.Match[str]) -> str:
        return f"constexpr float SCALE = {(float.fromhex(found[1]) * 1.004).hex()}f;"

    other, times = re.subn(r"constexpr float SCALE = (\S+)f;", larger, kernel.device.text)
    assert times == 1
    with pytest.raises((AssertionError, VerificationError)):
        check_exact(mutant(schedule, other), text, config, CUDA["cuda:sm_90a"])


TWO_TERMS = r"(to\[i\] = )(pack_bf16\(x, y\);)", r"\1i == 2 ? 0u : \2"
LARGER = r"(constexpr float SCALE = \S+)f;", r"\1f * 1.004f;"
INTEGERS = "cached_attention:t=20,h=3,kv=1,d=24,dv=18,cap=300,len=280,c=bf16,arith=int8"
LATER = r"position\(slot\) \+ COUNT - 1 <= high", "position(slot) <= high"
BEHIND = r"slot \+ COUNT <= CAP && \(slot", "(slot"


WORSE = [
    (check_precise, FLOAT8, PRECISE, None, TWO_TERMS),
    (check_precise, FLOAT8, PRECISE, None, (r"mma_bf16\(small\[n\], a\[2\], b0, b1\);", "")),
    (check_precise, FLOAT8, PRECISE, None, (r"term = 2; (term >= 0; --term\) mma)", r"term = 1; \1")),
    (check_precise, FLOAT8, PRECISE, None, LARGER),
    (check_tail, GROUPS, TAIL, None, TWO_TERMS),
    (check_tail, GROUPS, TAIL, None, (r"int order = 2; order", "int order = 1; order")),
    (check_rounded, *QUICK[0], LARGER),
    (check_rounded, *QUICK[1], LARGER),
    (check_integers, INT8, INTEGERS, None, LARGER),
    (check_integers, INT8, INTEGERS, None, (r"(constexpr float LEVELS = )255", r"\g<1>250")),
    (check_integers, INT8, INTEGERS, None, (r"logs\[slot\] = .*;", "logs[slot] = 0.0f;")),
    *[(check_integers, s, DIAGONAL + s.arith, None, LATER) for s in (INT8, HALF)],
    *[(check_integers, s, RING + s.arith, None, BEHIND) for s in (INT8, HALF)],
    (check_integers, INT8, INTEGERS, None, (r"levels / most : 0\.0f", "0.99f * levels / most : 0.0f")),
]  # fmt: skip


@pytest.mark.parametrize(("check", "schedule", "text", "config", "change"), WORSE)
def test_arithmetic_that_is_a_little_worse_is_found(
    check: Any, schedule: Schedule, text: str, config: Any, change: tuple[str, str]
) -> None:
    hardware = CUDA["cuda:sm_90a"]
    workload = parse_workload(text)
    kernel = schedule.lower(
        workload, config or schedule.space(workload, hardware).default, hardware
    )
    assert kernel.device is not None
    other, times = re.subn(*change, whole(kernel.device.text))
    assert times == 1
    with pytest.raises((AssertionError, VerificationError)) as found:
        check(mutant(schedule, other), text, config)
    assert not isinstance(found.value, EmulationError)  # it is compiled and runs


@pytest.mark.parametrize(
    ("name", "text", "knobs"),
    [*CASES, ("tir.cuda", "", {"threads": 64, "team": 64, "rows": True})],
    ids=[*(name for name, _, _ in CASES), "tir.cuda"],
)
def test_no_kernel_does_without_a_word_that_orders(
    name: str, text: str, knobs: dict[str, Any]
) -> None:
    schedule = get_schedule(name)
    workload = parse_workload(text) if text else functions.workload_of(maxima_added)
    config = replace(schedule.space(workload, ONE_SM).default, **knobs)
    seen = check_emulated(workload, schedule, config, least(config))
    assert seen.kernel.device is not None
    full = whole(seen.kernel.device.text)
    found = list(WORDS.finditer(full))
    assert found and not found_wrong(full, workload, schedule, config)
    unnoticed = []
    for word in found:
        before, after = full[: word.start()], full[word.end() :]
        if found_wrong(f"{before};{after}", workload, schedule, config):
            continue
        there = f"{before}void not_there(); not_there();{after}"
        if not found_wrong(there, workload, schedule, config):
            continue  # it links: the word is in a function that this kernel does not call
        unnoticed.append(before[-200:] + word[0])
    left = [u for u in unnoticed if not any(re.search(rf"{n}$", u) for n in NEEDLESS)]
    assert not left, f"{len(left)} of {len(found)}: {left}"
