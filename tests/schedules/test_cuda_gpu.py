"""The command that validates CUDA kernels where there is a GPU: right on it, and how long they take there.

``pytest -m gpu tests/schedules/test_cuda_gpu.py -s -k NAME`` prints a line for each workload of the schedules
whose name has NAME in it: the least time predicted beside what a search would measure: calls as
a graph, over weights and states beyond L2.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, replace
from typing import Any

import pytest
from cuda_functions import parsed
from harness import sample_config
from test_cuda_attention import DECODE, EXACT, PREFILL, QUICK, check_exact, made
from test_cuda_every import NAMES, WORKLOADS
from test_cuda_flash_wgmma import EXACT as WGMMA_EXACT
from test_cuda_flash_wgmma import FULL, RINGS
from test_cuda_mpgemm import ratio_of_kernels

from mimo_compile import _cuda
from mimo_compile.cli.inspect_cuda import launches_of
from mimo_compile.ir.hardware import CUDA, Hardware, gpu_of, local_cuda
from mimo_compile.ir.ops import parse_workload
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.cuda import driver
from mimo_compile.schedules.cuda.nvcc import compile_device
from mimo_compile.search.measure.emulated import check_emulated, device_arrays
from mimo_compile.search.measure.gpu_times import times_of

RANDOM = 3
RAGGED = {
    "mpgemm": (
        "mpgemm:m=70,n=199,k=1000,w=bf16,a=abf16,bias=1",
        "mpgemm:m=70,n=199,k=1000,w=w8,a=a8,bias=1",
        "mpgemm:m=70,n=199,k=1000,w=w4g64,a=abf16,bias=1",
        "mpgemm:m=5,n=199,k=1000,w=w8,a=a8",
        "mpgemm:m=5,n=199,k=11008,w=bf16,a=abf16",
        "mpgemm:m=70,n=199,k=1000,w=fp8b128,a=abf16",
        "mpgemm:m=70,n=199,k=1000,w=nf4,a=af16",
        "mpgemm:m=70,n=199,k=1000,w=w4zg64,a=a8g64",
        "mpgemm:m=5,n=199,k=1000,w=w2zg32,bias=1",
    ),
    "moe": (
        "moe:t=7,e=5,k=2,d=200,f=66,w=w4g32,a=a8",
        "moe:t=70,e=5,k=2,d=200,f=66,w=w4g32,a=a8",
        "moe:t=70,e=40,k=3,d=200,f=66,w=bf16,a=abf16",
    ),
}
"""Extents that fill no tile, few tokens, bias, experts without tokens."""
PLACES = {DECODE.name: [(498, 2), (70, 1)], PREFILL.name: [(170, 33)]}
"""Where sequences begin, in rings that were passed, and how many tokens are valid: fewer than rows."""
CASES = [
    (n, text)
    for n in NAMES
    for op in (get_schedule(n).op,)
    for text in (*WORKLOADS.get(op, ()), *RAGGED.get(op, ()))
]


def configs_of(schedule: Any, workload: Workload, hardware: Hardware) -> list[Any]:
    """Return the default, the one of clusters of two blocks that is most like it, and random configs."""
    space = schedule.space(workload, hardware)
    paired = [c for c in space if c.cluster == 2] if "cluster" in space.knobs else []
    own = asdict(space.default)

    def others(config: Any) -> tuple[int, list[bool]]:
        found = [own[name] != value for name, value in asdict(config).items()]
        return sum(found), found  # those of tiles come first

    paired.sort(key=others)
    drawn = [sample_config(schedule, workload, hardware, seed) for seed in range(RANDOM)]
    return list(dict.fromkeys([space.default, *paired[:1], *drawn]))


def test_clusters_are_among_what_is_run() -> None:
    schedule, hardware = get_schedule("mpgemm.cuda_wgmma"), CUDA["cuda:sm_90a"]
    workload = parse_workload("mpgemm:m=512,n=4096,k=4096,w=bf16,a=abf16")
    first, second, *_ = configs_of(schedule, workload, hardware)
    assert (first.cluster, second.cluster) == (1, 2)
    assert second == replace(first, cluster=2, group_m=second.group_m)
    few = parse_workload("mpgemm:m=5,n=199,k=11008,w=bf16,a=abf16")
    assert all(c.cluster == 1 for c in configs_of(schedule, few, hardware))


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "text"), CASES, ids=lambda value: str(value).partition(",")[0])
def test_right_on_the_gpu_and_how_fast(name: str, text: str) -> None:
    schedule, workload, hardware = get_schedule(name), parsed(text), local_cuda()
    if not schedule.supports(workload, hardware):
        pytest.skip(f"no kernel for {hardware.name}")
    most = ratio_of_kernels(workload) if workload.op == "mpgemm" else 1.0
    for config in configs_of(schedule, workload, hardware):
        # runs twice: what depends on the order of blocks is found as well
        found = check_emulated(
            workload, schedule, config, hardware, run=driver.run, most_ratio=most
        )
        binary = compile_device(found.kernel, hardware)
        arrays, on = device_arrays(workload, schedule, config, found.inputs), _cuda.driver()
        on.enter()
        times = sorted(1e6 * t for t in times_of(found.kernel, binary, hardware, arrays, on))
        # at the clock of docs/cuda.md, and at the highest that this GPU's driver names
        documented = CUDA[f"cuda:{gpu_of(hardware).arch}"]
        least, here = (
            launches_of(found.kernel, h, binary)["predicted_us"] for h in (documented, hardware)
        )
        print(
            f"\n{hardware.name}: {name} {text} {config}: predicted {least:.2f} us at least "
            f"({here:.2f} at {1e-9 * gpu_of(hardware).clock_hz:.2f} GHz), measured "
            f"{statistics.median(times):.2f} us ({times[0]:.2f} to {times[-1]:.2f}), "
            f"error {found.error_ratio:.2g} of its bound"
        )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("schedule", "text", "config"), QUICK, ids=[f"{s.name}{i}" for i, (s, _, _) in enumerate(QUICK)]
)
def test_windows_rings_pages_and_rows_that_are_no_tokens(schedule, text, config) -> None:
    places = PLACES.get(schedule.name)
    tokens = parse_workload(text).integer("t")
    inputs = made(text, places) if places and tokens in (2, 40) else None
    check_emulated(text, schedule, config, local_cuda(), inputs=inputs, run=driver.run)


@pytest.mark.gpu
@pytest.mark.parametrize(("text", "places"), [RINGS[:2], FULL], ids=["rings", "full"])
@pytest.mark.parametrize("config", RINGS[2])
def test_caches_of_flash_attention_by_wgmma(config, text, places) -> None:
    schedule, hardware = WGMMA_EXACT[0], local_cuda()
    if not schedule.supports(parse_workload(text), hardware):
        pytest.skip(f"no kernel for {hardware.name}")
    check_emulated(text, schedule, config, hardware, inputs=made(text, places), run=driver.run)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("schedule", "text", "config"),
    [*EXACT, WGMMA_EXACT],
    ids=[s.name for s, _, _ in (*EXACT, WGMMA_EXACT)],
)
def test_attention_is_exact_where_nothing_is_rounded(schedule, text, config) -> None:
    hardware = local_cuda()
    if not schedule.supports(parse_workload(text), hardware):
        pytest.skip(f"no kernel for {hardware.name}")
    check_exact(schedule, text, config, hardware, run=driver.run)
