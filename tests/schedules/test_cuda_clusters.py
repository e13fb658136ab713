"""Clusters of blocks in the emulator: what they share, that it finds what goes wrong; their words in PTX."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cuda_text import H200, kernel_of, needs_compiler

from mimo_compile.errors import MimoError
from mimo_compile.ir.ops import parse_workload
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.base import Kernel
from mimo_compile.schedules.cuda.code import Launch, TensorMap
from mimo_compile.schedules.cuda.emulate import EmulationError, emulate
from mimo_compile.schedules.cuda.nvcc import compile_device, find_tool, ptx_of
from mimo_compile.schedules.cuda.sass import disassemble, opcodes
from mimo_compile.search.measure.emulated import check_emulated

pytestmark = pytest.mark.slow
# Each block of two brings half of each tile to both, and writes out what it has.
SHARE = """
#include "cluster.cuh"
constexpr int ROWS = 16, HALF = ROWS * 128, TURNS = 3;
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(128)
    share(const int* mode, const __grid_constant__ CUtensorMap map, float* y) {
  MIMO_SHARED(smem);
  const int what = mode[0], rank = blockIdx.x % 2;
  uint64_t *full = reinterpret_cast<uint64_t*>(smem + 2 * HALF), *empty = full + 1;
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, what == 1 ? 128 : 2 * 128);
    fence_barrier_init();
  }
  if (what == 2) {
    block_sync();
  } else {
    cluster_sync();
  }
  for (int turn = 0; turn < TURNS; ++turn) {
    const int tile = blockIdx.x / 2 * TURNS + turn;
    if (threadIdx.x == 0) {
      mbarrier_wait(empty, (turn & 1) ^ 1);
      mbarrier_expect(full, what == 3 ? HALF : 2 * HALF);
      const int blocks = what == 4 ? 1 << rank : what == 5 ? 7 : what == 9 ? 0 : 3;
      tma_load_multicast(smem + rank * HALF, &map, 0, (2 * tile + rank) * ROWS, full, blocks);
    }
    mbarrier_wait(full, turn & 1);
    const float* from = reinterpret_cast<const float*>(smem);
    float* to = y + (2 * tile + rank) * (HALF / 2);
    for (int i = threadIdx.x; i < HALF / 2; i += 128) to[i] = from[i];
    if (what == 8 && rank == 1) to[0] = from[HALF / 2 + 4];
    for (int block = 0; block < 2; ++block)
      if (what != 1 || block == rank) mbarrier_arrive_in(empty, what == 6 ? 3 * block : block);
  }
  if (what != 7) cluster_sync();
}
"""
X = np.arange(2 * 3 * 32 * 32, dtype=np.float32).reshape(-1, 32)
"""Three tiles of each of two clusters, 32 rows of 128 bytes."""


def kernel(mode: int, threads: int = 128) -> tuple[Kernel, dict[str, np.ndarray[Any, Any]]]:
    """Return the kernel that does something in a way of its own, and its inputs."""
    inputs = {"mode": np.array([mode], np.int32), "x": X}
    box = TensorMap("x", "float32", len(X), 32, 16, 32, 0)
    launch = Launch("share", (4, 1, 1), threads, ("mode", box, "y"), 2 * 16 * 128 + 16, cluster=2)
    outputs = {"y": ((6, 2, 32, 32), "float32")}
    return kernel_of(SHARE, inputs, outputs, (launch,)), inputs


@needs_compiler
@pytest.mark.parametrize("order", [0, 1, 11])
def test_each_block_gets_what_all_bring(order: int) -> None:
    made, inputs = kernel(0)
    got = emulate(made, H200, inputs, order=order)["y"]
    np.testing.assert_array_equal(got, np.repeat(X.reshape(6, 1, 32, 32), 2, axis=1))


@needs_compiler
@pytest.mark.parametrize(
    ("mode", "said"),
    [
        (1, r"a race: (tma_load writes|reads) byte \d+ of shared memory, which"),
        (2, r"there is no barrier at byte \d+ of shared memory"),
        (3, r"more than 1 arrivals at the barrier|deadlock|a race"),
        (4, r"deadlock: threads 0-127 of block 0 wait at mbarrier_wait"),
        (5, r"tma_load_multicast for block 2 of a cluster of 2"),
        (6, r"mbarrier_arrive_in for block 3 of a cluster of 2"),
        (7, r"for a block of the cluster that has ended"),
        (8, r"reads 4 bytes at byte \d+ of 'shared memory'"),
        (9, r"tma_load_multicast to no block"),
    ],
)  # fmt: skip
def test_what_a_cluster_may_not_do_is_found(mode: int, said: str) -> None:
    made, inputs = kernel(mode)
    with pytest.raises(EmulationError, match=said):
        emulate(made, H200, inputs)


@needs_compiler
def test_clusters_that_are_not_emulated_are_refused() -> None:
    made, inputs = kernel(0, threads=64)
    with pytest.raises(EmulationError, match="clusters of 2 blocks of 64 threads are not emulated"):
        emulate(made, H200, inputs)


@pytest.mark.skipif(find_tool("nvcc") is None, reason="nvcc is not installed")
def test_words_of_clusters() -> None:
    made, _ = kernel(0)
    assert compile_device(made, H200).local_bytes == 0
    ptx = ptx_of(made, H200)
    for word in (
        ".reqnctapercluster 2", "barrier.cluster.arrive.release.aligned",
        "barrier.cluster.wait.acquire.aligned",
        "mapa.shared::cluster.u32", "mbarrier.arrive.shared::cluster.b64",
        "complete_tx::bytes.multicast::cluster",
    ):  # fmt: skip
        assert word in ptx, word


@pytest.mark.skipif(find_tool("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize(
    ("launched", "declared"),
    [(4, "(2, 1, 1)"), (1, "(2, 1, 1)"), (2, "(1, 1, 1)"), (2, "(1, 2, 1)")],
)
def test_launches_have_the_clusters_that_were_compiled(launched: int, declared: str) -> None:
    made, _ = kernel(0)
    assert made.device is not None
    text = made.device.text.replace("__cluster_dims__(2, 1, 1)", f"__cluster_dims__{declared}")
    launches = tuple(replace(x, cluster=launched) for x in made.device.launches)
    wrong = replace(made, device=replace(made.device, text=text, launches=launches))
    said = f"clusters of {launched} blocks, its __cluster_dims__ are {declared}"
    with pytest.raises(MimoError, match=re.escape(said)):
        compile_device(wrong, H200)


@pytest.mark.skipif(find_tool("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.skipif(find_tool("nvdisasm") is None, reason="nvdisasm is not installed")
def test_leaving_a_stage_is_no_fence() -> None:
    """Fences of the whole device are where blocks of a cluster meet, and nowhere else."""
    schedule = get_schedule("mpgemm.cuda_wgmma")
    workload = parse_workload("mpgemm:m=512,n=4096,k=4096,w=bf16,a=abf16")
    alone = replace(schedule.space(workload, H200).default, cluster=1)
    found = []
    for config in (alone, replace(alone, cluster=2)):
        binary = compile_device(schedule.lower(workload, config, H200), H200)
        counts = opcodes(disassemble(binary))
        fences = sum(n for name, n in counts.items() if re.match(r"MEMBAR\.\w+\.GPU", name))
        found.append((fences, counts.get("UCGABAR_ARV", 0)))
    assert found == [(0, 0), (2, 2)]


@needs_compiler
@pytest.mark.parametrize(
    ("text", "knobs"),
    [
        # three tiles of tokens: one of the last cluster's blocks has none
        ("mpgemm:m=130,n=199,k=520,w=w8,a=a8,bias=1", {"consumers": 1, "bn": 64, "stages": 2}),
        ("mpgemm:m=300,n=100,k=136,w=bf16,a=abf16", {"bn": 96, "stages": 3, "split": 2}),
    ],
)
def test_blocks_of_matmuls_share_tiles_of_weights(text: str, knobs: dict[str, int]) -> None:
    schedule, workload = get_schedule("mpgemm.cuda_wgmma"), parse_workload(text)
    few = replace(H200, cores=4, threads=4)  # each block has several tiles
    alone = replace(schedule.space(workload, few).default, split=1, group_m=1, cluster=1)
    alone = replace(alone, **knobs)
    paired = replace(alone, cluster=2)
    one, two = (check_emulated(workload, schedule, c, few).outputs["y"] for c in (alone, paired))
    np.testing.assert_array_equal(one, two)
    near = [schedule.work(workload, c, few).bytes["l2"] for c in (alone, paired)]
    assert near[1] < near[0]
