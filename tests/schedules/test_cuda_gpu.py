"""The command that validates CUDA kernels where there is a GPU: right on it, and how long they take there.

``pytest -m gpu tests/schedules/test_cuda_gpu.py -s -k NAME`` prints a line for each workload of the schedules
whose name has NAME in it: the least time predicted beside what the GPU's events say, with L2 full of other
things.
"""

from __future__ import annotations

import statistics

import pytest
from harness import sample_config
from test_cuda_every import NAMES, WORKLOADS

from mimo_compile.cli.inspect_cuda import launches_of
from mimo_compile.ir.hardware import local_cuda
from mimo_compile.ir.ops import parse_workload
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.cuda import driver
from mimo_compile.schedules.cuda.nvcc import compile_device
from mimo_compile.search.measure.emulated import check_emulated, device_arrays

RANDOM, CALLS = 3, 50
CASES = [(n, text) for n in NAMES for text in WORKLOADS.get(get_schedule(n).op, ())]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "text"), CASES, ids=lambda value: str(value).partition(",")[0])
def test_right_on_the_gpu_and_how_fast(name: str, text: str) -> None:
    schedule, workload, hardware = get_schedule(name), parse_workload(text), local_cuda()
    if not schedule.supports(workload, hardware):
        pytest.skip(f"no kernel for {hardware.name}")
    default = schedule.space(workload, hardware).default
    drawn = [sample_config(schedule, workload, hardware, seed) for seed in range(RANDOM)]
    for config in dict.fromkeys([default, *drawn]):
        # runs twice: what depends on the order of blocks is found as well
        found = check_emulated(workload, schedule, config, hardware, run=driver.run)
        with driver.loaded(found.kernel, hardware) as ready:
            ready.fill(device_arrays(workload, schedule, config, found.inputs))
            ready.call()  # the first one is slower
            times = sorted(1e6 * t for t in ready.seconds(CALLS, 2 * hardware.l3_bytes))
        binary = compile_device(found.kernel, hardware)
        least = launches_of(found.kernel, hardware, binary)["predicted_us"]
        print(
            f"\n{hardware.name}: {name} {text} {config}: predicted {least:.2f} us at least, measured "
            f"{statistics.median(times):.2f} us ({times[CALLS // 10]:.2f} to {times[-CALLS // 10]:.2f}), "
            f"error {found.error_ratio:.2g} of its bound"
        )
