"""The emulator of CUDA text: threads, barriers, and that it finds what goes wrong."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from cuda_text import H200, kernel_of, needs_compiler, run

from mimo_compile.errors import EnvironmentMismatch
from mimo_compile.ir.ops.base import Arg
from mimo_compile.schedules.cuda import emulate as module
from mimo_compile.schedules.cuda.code import Launch
from mimo_compile.schedules.cuda.emulate import EmulationError, emulate
from mimo_compile.schedules.cuda.memory import Cell

pytestmark = needs_compiler

# one program, so that it is compiled once: what it does wrong is told by its input
FAULTS = """
#include "mma.cuh"
#include "async.cuh"

__attribute__((noinline)) void deep(int at) {
  volatile uint8_t much[200000];
  much[at] = 1;
}
__device__ __forceinline__ uint32_t most(uint32_t x) {
#pragma unroll
  for (int i = 16; i > 0; i >>= 1) x = max(x, shfl_xor(x, i));
  return x;
}
__attribute__((noinline)) uint32_t far(uint32_t x) { return most(x); }
extern "C" __global__ void faulty(const int* mode, const uint8_t* x, uint32_t* y) {
  MIMO_SHARED(smem);
  const int what = mode[0], lane = threadIdx.x % 32;
  uint32_t r[4] = {};
  switch (what) {
    case 1: if (lane < 16) shfl_xor(lane, 1);
            else shfl_xor(lane, 2);
            break;
    case 2: if (threadIdx.x < 32) block_sync();
            else named_sync(3, 64);
            break;
    case 3: if (lane != 7) warp_sync(); break;
    case 4: load16(x + 256 - 8); break;
    case 5: r[0] = load16(x + 4).x; break;
    case 6: r[0] = reinterpret_cast<const uint4*>(x + 4 * mode[1])->x; break;
    case 7: r[0] = x[mode[1]]; break;
    case 8: ldmatrix_x4(r, smem_address(smem) + 16 * lane + 8); break;
    case 9: ldmatrix_x4(r, smem_address(smem) + 64 * lane); break;
    case 10: cp_async16(smem_address(smem) + 1024, x, true); break;
    case 11: const_cast<uint8_t*>(x)[3] = 1; break;
    case 12: smem_address(x); break;
    case 13: named_sync(16, 64); break;
    case 14: smem[1024 + mode[1]] = 0; break;
    case 15: y[64 + mode[1]] = 0; break;
    case 16: r[mode[1]] = 1; break;
    case 17: deep(mode[1]); break;
    case 18: if (lane % 2) r[0] = most(lane) + 1;
             else r[0] = most(lane) * 3;
             break;
    case 19: r[0] = lane % 2 ? shfl_xor(lane, 1) : shfl_xor(lane, 2); break;
    case 20: if (lane % 2) r[0] = far(lane) + 1;
             else r[0] = far(lane) * 3;
             break;
    case 22: r[0] = atomic_add(y, 1u);   // it held the largest integer: whose turn was how manieth
             block_sync();
             break;
    case 21: r[0] = ld_global_nc(y + (threadIdx.x ^ 33));
             block_sync();
             break;
  }
  y[threadIdx.x] = r[0] + r[1] + r[2] + r[3];
}
"""


def fault(mode: int, operand: int = 0, order: int = 0) -> dict[str, Any]:
    inputs = {"mode": np.array([mode, operand], np.int32), "x": np.zeros(256, np.uint8)}
    return run(FAULTS, "faulty", inputs, {"y": ((64,), "uint32")}, 64, 1024, order=order)


def test_a_program_without_faults_runs_to_its_end() -> None:
    assert (fault(0)["y"] == 0).all()
    assert (fault(6, 4)["y"] == 0).all()


@pytest.mark.parametrize(
    ("mode", "operand", "said"),
    [
        (1, 0, r"diverged: thread 0 waits at shfl_xor \(line \d+\), thread 16 comes to shfl_xor"),
        (2, 0, r"deadlock: threads 0-31 wait at block_sync \(line \d+\); threads 32-63 wait at named_sync"),
        (3, 0, r"deadlock: threads 0-6 wait at warp_sync \(line \d+\); threads 7-7 have ended"),
        (4, 0, r"load16 of 16 bytes is not inside an array: it begins byte 248 of 'x'"),
        (5, 0, r"load16 of 16 bytes is not aligned to them: byte 4 of 'x'"),
        (6, 1, r"not aligned"),
        (7, 1 << 20, r"thread 0 in sample\.cu:30: reads 1 bytes at 1048320 bytes behind"),
        (7, -4096, r"reads 1 bytes at 4096 bytes before 'x'"),
        (7, 256, r"reads 1 bytes at 0 bytes behind the end of 'x'"),
        (8, 0, r"ldmatrix_x4 at byte 8 of shared memory, which is no multiple of 16"),
        (9, 0, r"ldmatrix_x4 of 16 bytes at byte 1024 of shared memory, which has 1024"),
        (10, 0, r"cp_async16 of 16 bytes at byte 1024 of shared memory, which has 1024"),
        (11, 0, r"writes 1 bytes at byte 3 of 'x', which is an input"),
        (12, 0, r"smem_address of what is not in shared memory: byte 0 of 'x'"),
        (13, 0, r"named_sync of barrier 16"),
        (14, 0, r"writes 1 bytes at 0 bytes behind the end of 'shared memory'"),
        (15, 0, r"writes 4 bytes at 0 bytes behind the end of 'y'"),
        (16, 4, r"index outside a local array"),
        (17, 0, r"stack"),
        (18, 0, r"diverged: thread 0 waits at shfl_xor \(line \d+\), thread 1 .* by another branch"),
        (19, 0, r"diverged: thread 0 waits at shfl_xor \(line \d+\), thread 1 .* by another branch"),
        (20, 0, r"diverged: thread 0 waits at shfl_xor \(line \d+\), thread 1 .* by another branch"),
        (21, 0, r"writes byte \d+ of 'y', which ld_global_nc, load8 or load16 read in the same launch"),
    ],
)  # fmt: skip
def test_a_fault_is_found_and_named(mode: int, operand: int, said: str) -> None:
    with pytest.raises(EmulationError, match=said):
        fault(mode, operand)


def test_lanes_take_turns_in_the_order_asked_for() -> None:
    first, last, drawn = (
        (fault(22, order=order)["y"] + np.uint32(1)).tolist() for order in (0, 1, 5)
    )
    assert first == list(range(64)) and last == first[::-1]
    assert sorted(drawn) == first and drawn[:32] not in (
        first[:32],
        first[32:],
        last[:32],
        last[32:],
    )


SYNC = """
#include "warp.cuh"
#include "async.cuh"
extern "C" __global__ void neighbour(const int* fault, float* y) {
  MIMO_SHARED(smem);
  float* row = reinterpret_cast<float*>(smem);
  row[threadIdx.x] = float(threadIdx.x);
  if (*fault != 1) block_sync();
  y[threadIdx.x] = row[(threadIdx.x + 32) % 128];
}
extern "C" __global__ void reuse(const int* fault, float* y) {
  MIMO_SHARED(smem);
  float* row = reinterpret_cast<float*>(smem);
  float sum = 0;
  for (int i = 0; i < 3; ++i) {
    row[threadIdx.x] = float(threadIdx.x * (i + 1));
    block_sync();
    sum += row[(threadIdx.x + 64) % 128];
    if (*fault != 2) block_sync();
  }
  y[threadIdx.x] = sum;
}
extern "C" __global__ void lanes(const int* fault, float* y) {   // within a warp
  MIMO_SHARED(smem);
  float* row = reinterpret_cast<float*>(smem);
  row[threadIdx.x] = float(threadIdx.x);
  if (*fault != 3) warp_sync();
  const float x = row[threadIdx.x ^ 1];
  if (*fault != 4) warp_sync();
  row[threadIdx.x] = x;
  warp_sync();
  y[threadIdx.x] = row[threadIdx.x ^ 2];
}
extern "C" __global__ void groups(const int* fault, float* y) {   // warps 0, 1 produce for warps 2, 3
  MIMO_SHARED(smem);
  float* row = reinterpret_cast<float*>(smem);
  const int warp = threadIdx.x / 32, t = threadIdx.x % 64;
  if (warp < 2) {
    row[t] = float(t);
    named_sync(1, 128);
    y[threadIdx.x] = 0;
  } else {
    if (*fault != 5) named_sync(1, 128);
    y[threadIdx.x] = row[63 - t];
    if (*fault == 5) named_sync(1, 128);
    return;   // those that have ended are not waited for
  }
  block_sync();
}
extern "C" __global__ void waited(const int* fault, const float* x, float* y) {
  MIMO_SHARED(smem);
  const float* row = reinterpret_cast<const float*>(smem);
  const uint32_t to = smem_address(smem) + 16 * threadIdx.x;
  cp_async16(to, x + 4 * threadIdx.x, true);
  cp_async_commit();
  cp_async16(to + 2048, x, threadIdx.x > 0);
  cp_async_commit();
  if (*fault != 6) cp_async_wait<1>();
  block_sync();
  y[threadIdx.x] = row[4 * ((threadIdx.x + 32) % 128) + 1];
  if (*fault != 7) cp_async_wait<0>();
  if (*fault != 8) block_sync();
  y[threadIdx.x + 128] = row[512 + 4 * ((threadIdx.x + 32) % 128) + 1];
}
extern "C" __global__ void blocks(const int* fault, float* y) {
  const int at = blockIdx.x * 128 + threadIdx.x;
  y[at] = float(at);
  if (*fault == 9) y[at] += y[(at + 128) % 256];
  if (*fault == 10) y[threadIdx.x] = 1;
  if (*fault == 11) y[at] += ld_global_nc(y + at);
  if (*fault == 12) y[at] += y[at ^ 32];
}
extern "C" __global__ void words(const float* x, uint32_t* y) {
  const int t = threadIdx.x;
  const uint32_t bits = __float_as_uint(x[t]);
  y[t] = pack_bf16(x[t], x[t + 32]);
  y[t + 32] = pack_f16(x[t], x[t + 32]);
  y[t + 64] = __float_as_uint(shfl_xor(x[t], 5));
  y[t + 96] = __float_as_uint(shfl(x[t], 9));
  y[t + 128] = warp_ballot(x[t] > 0);
  y[t + 160] = lop3<0xEA>(bits, 0x0f0f0f0fu, 0x64006400u);   // (a & b) | c
  y[t + 192] = prmt(bits, 0x01234567u, 0x94e0u);
  y[t + 224] = uint32_t(dp4a(int(bits), int(0x80ff017fu), 5));
  y[t + 256] = __float_as_uint(exp2_approx(x[t]));
  y[t + 288] = f16x2_fma(y[t + 32], 0x3c004000u, 0x3c003c00u);
  y[t + 320] = __float_as_uint(f16_to_float(uint16_t(y[t + 32])));
  y[t + 352] = __float_as_uint(bf16_to_float(uint16_t(y[t])));
}
"""
PHASES = """
#include "tma.cuh"
extern "C" __global__ void phases(const int* fault, float* y) {   // warp 0 writes, lane 31 tells the others
  MIMO_SHARED(smem);
  float* row = reinterpret_cast<float*>(smem);
  uint64_t* full = reinterpret_cast<uint64_t*>(smem + 512);
  if (threadIdx.x == 0) mbarrier_init(full, 1);
  block_sync();
  y[threadIdx.x] = 0;
  if (threadIdx.x < 32) {
    row[threadIdx.x] = float(threadIdx.x);
    if (*fault != 13) warp_sync();
    if (threadIdx.x == 31) mbarrier_arrive(full);
  } else {
    mbarrier_wait(full, 0);
    y[threadIdx.x] = row[threadIdx.x % 32];
  }
}
"""  # of Hopper


DRAWN = np.random.default_rng(1)
X = DRAWN.standard_normal(512).astype(np.float32)
W = (DRAWN.standard_normal(64) * 2.0 ** DRAWN.integers(-20, 10, 64)).astype(np.float32)
W[:8] = [0, -0.0, 1e-7, -6e-8, 65519, 65520, 1.00390625, 1.01171875]
RESULTS = {
    "neighbour": ((128,), "float32"), "reuse": ((128,), "float32"), "lanes": ((128,), "float32"),
    "groups": ((128,), "float32"), "phases": ((128,), "float32"),
    "waited": ((256,), "float32"), "blocks": ((256,), "float32"), "words": ((384,), "uint32"),
}  # fmt: skip


@cache
def synced(fault: int, order: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Run all of `SYNC` and `PHASES`; what is left out is told by an input: they are compiled once."""
    inputs = {"fault": np.array([fault], np.int32), "x": X, "w": W}
    more = {"waited": ("fault", "x"), "words": ("w",)}
    launches = []
    for name in RESULTS:
        operands = (*more.get(name, ("fault",)), name)
        grid = (2 if name == "blocks" else 1, 1, 1)
        launches.append(Launch(name, grid, 32 if name == "words" else 128, operands, 4096))
    return emulate(
        kernel_of(SYNC + PHASES, inputs, RESULTS, tuple(launches)), H200, inputs, order=order
    )


def test_threads_that_wait_for_each_other_read_what_was_written() -> None:
    lane = np.arange(128)
    second = np.where(np.roll(lane, -32) > 0, X[1], 0)
    right = {
        "neighbour": np.roll(lane, -32),
        "reuse": np.roll(lane, -64) * 6,
        "lanes": lane ^ 3,
        "groups": np.concatenate([np.zeros(64), lane[63::-1]]),
        "phases": np.where(lane < 32, 0, lane % 32),
        "waited": np.concatenate([np.roll(X[1::4], -32), second]),
        "blocks": np.arange(256),
    }
    for order in (0, 1, 7, 8):
        for name, want in right.items():
            np.testing.assert_array_equal(synced(0, order)[name], want)


@pytest.mark.parametrize("order", [0, 1, 5])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            1,
            r"neighbour, .* in sample\.cu:\d+: a race: (reads|writes) byte \d+ .* thread \d+ (wrote|read)",
        ),
        (
            2,
            r"reuse, .* a race: writes byte \d+ of shared memory, which thread \d+ read|reads byte",
        ),
        (3, r"lanes, .* a race: (reads|writes) byte \d+ of shared memory"),
        (4, r"lanes, .* a race: (reads|writes) byte \d+ of shared memory"),
        (5, r"groups, .* a race"),
        (
            6,
            r"waited, .* reads byte \d+ of shared memory before the wait for the cp_async16 of thread",
        ),
        (
            7,
            r"waited, .* reads byte \d+ of shared memory before the wait for the cp_async16 of thread",
        ),
        (
            9,
            r"blocks, .* a race: (reads|writes) byte \d+ of blocks, which thread \d+ of another block",
        ),
        (
            10,
            r"blocks, .* a race: writes byte \d+ of blocks, which thread \d+ of another block wrote",
        ),
        (11, r"ld_global_nc of byte \d+ of 'blocks', which thread \d+ wrote in the same launch"),
        (
            12,
            r"blocks, .* a race: (reads|writes) byte \d+ of blocks, which thread \d+ (read|wrote)",
        ),
        (13, r"phases, .* a race: (reads|writes) byte \d+ of shared memory"),
        (8, r"waited, .* reads byte \d+ of shared memory before the wait|a race: reads"),
    ],
)
def test_what_nothing_orders_is_a_race_in_any_order(fault: int, said: str, order: int) -> None:
    with pytest.raises(EmulationError, match=said):
        synced(fault, order)


def test_words_of_one_thread_and_of_one_warp() -> None:
    got = synced(0)["words"].reshape(12, 32)
    low, high, bits = W[:32], W[32:], W.view(np.uint32)[:32]
    lanes = np.arange(32)

    def bf16(v: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        import torch

        return torch.from_numpy(v).bfloat16().view(torch.uint16).numpy().astype(np.uint32)

    with np.errstate(over="ignore"):
        half = low.astype(np.float16), high.astype(np.float16)
    np.testing.assert_array_equal(got[0], bf16(low) | bf16(high) << 16)
    np.testing.assert_array_equal(
        got[1], half[0].view(np.uint16) | half[1].view(np.uint16).astype(np.uint32) << 16
    )
    np.testing.assert_array_equal(got[2].view(np.float32), low[lanes ^ 5])
    np.testing.assert_array_equal(got[3].view(np.float32), np.full(32, low[9]))
    assert (got[4] == sum(1 << i for i in range(32) if low[i] > 0)).all()
    np.testing.assert_array_equal(got[5], (bits & 0x0F0F0F0F) | 0x64006400)
    # bytes 0, e (the sign of byte 6), 4, 9 (the sign of byte 1), from low to high
    sign = np.where(bits >> 15 & 1, 0xFF, 0).astype(np.uint32)
    np.testing.assert_array_equal(got[6], (bits & 0xFF) | 0 << 8 | 0x67 << 16 | sign << 24)
    signed = bits.view(np.uint8).reshape(32, 4).view(np.int8).astype(np.int64)
    np.testing.assert_array_equal(
        got[7].view(np.int32), 5 + signed @ np.array([0x7F, 0x01, -1, -128])
    )
    with np.errstate(over="ignore"):
        want = np.exp2(low.astype(np.float64))
        near = np.where(want < 2.0**128, want, 0)
        value = np.where(want < 2.0**128, got[8].view(np.float32), 0)
    assert (np.abs(value - near) <= near * 2.0**-22 + 2.0**-126).all()
    assert (value != near.astype(np.float32)).any()
    with np.errstate(over="ignore", invalid="ignore"):
        fused = (half[0] * np.float64(2) + 1).astype(np.float16)
    np.testing.assert_array_equal((got[9] & 0xFFFF).astype(np.uint16).view(np.float16), fused)
    np.testing.assert_array_equal(got[10].view(np.float32), half[0].astype(np.float32))
    np.testing.assert_array_equal(got[11], bf16(low) << 16)


SCRATCH = """
#include "warp.cuh"
extern "C" __global__ void first(const float* x, float* part, int* count, int n, float by) {
  part[blockIdx.x * blockDim.x + threadIdx.x] = x[threadIdx.x] * by;
  if (threadIdx.x == 0) atomic_add(count, n);
}
extern "C" __global__ void second(const float* part, const int* count, float* y) {
  float sum = 0;
  for (int b = 0; b < 3; ++b) sum += part[b * 32 + threadIdx.x];
  y[threadIdx.x] = sum + float(*count);
}
"""


@pytest.mark.parametrize(
    "dtype", ["uint8", "uint16", "uint32", "bfloat16", "float8_e4m3fn", "int8"]
)
def test_what_nobody_wrote_is_not_what_padding_must_be(dtype: str) -> None:
    import torch

    held = Cell("x", Arg("x", "output", (4,), dtype), written=True, scratch=True).filled({})
    assert held.all()
    floats = {1: torch.float8_e4m3fn, 2: torch.bfloat16}
    if held.dtype.kind == "u" and held.itemsize in floats:  # which such arrays may hold
        assert torch.from_numpy(held).view(floats[held.itemsize]).float().isnan().all()


def test_launches_share_scratch_memory() -> None:
    x = np.arange(32, dtype=np.float32)
    launches = (
        Launch("first", (3, 1, 1), 32, ("x", "part", "count", 7, 0.5)),
        Launch("second", (1, 1, 1), 32, ("part", "count", "y")),
    )
    scratch = {
        "part": Arg("part", "output", (96,), "float32"),
        "count": Arg("count", "output", (1,), "int32"),
    }
    for zeroed, right in ((frozenset({"count"}), True), (frozenset(), False)):
        kernel = kernel_of(
            SCRATCH, {"x": x}, {"y": ((32,), "float32")}, launches, scratch=scratch, zeroed=zeroed
        )
        got = emulate(kernel, H200, {"x": x})["y"]
        assert np.array_equal(got, 1.5 * x + 21) == right
    assert "part" not in emulate(kernel, H200, {"x": x})


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        (Launch("first", (3, 1, 1), 32, ("x",)), "1 operands, but the kernel has 5 parameters"),
        (Launch("first", (3, 1, 1), 32, ("x", "x", "x", 1, 1)), "operand 4 is an int32"),
    ],
)
def test_launches_that_cannot_be_emulated_are_refused(launch: Launch, said: str) -> None:
    x = np.zeros(32, np.float32)
    with pytest.raises(EmulationError, match=said):
        emulate(kernel_of(SCRATCH, {"x": x}, {"y": ((32,), "float32")}, (launch,)), H200, {"x": x})


def test_limits_of_the_gpu_hold() -> None:
    x = np.zeros(32, np.float32)
    launch = Launch("first", (3, 1, 1), 48, ())
    with pytest.raises(ValueError, match="48 threads"):
        emulate(kernel_of(SCRATCH, {"x": x}, {"y": ((32,), "float32")}, (launch,)), H200, {"x": x})


def test_what_the_compiler_says_is_in_the_message() -> None:
    with pytest.raises(EmulationError, match=r"sample\.cu:1:.*no_such_word"):
        run("int x = no_such_word;", "f", {}, {"y": ((1,), "float32")})


def test_without_a_compiler_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "compiler", lambda: None)
    with pytest.raises(EnvironmentMismatch, match=r"g\+\+"):
        run("// never compiled", "f", {}, {"y": ((1,), "float32")})
