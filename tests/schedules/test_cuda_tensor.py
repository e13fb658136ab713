"""Tensor cores, bulk copies and their barriers in the emulator, against layouts written as in the PTX ISA."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_text import H200, bf16_bits, bf16_values, kernel_of, needs_compiler, run

from mimo_compile.schedules.cuda.code import Launch, TensorMap
from mimo_compile.schedules.cuda.emulate import EmulationError, emulate

pytestmark = needs_compiler
Values = np.ndarray[Any, Any]
LANES = range(32)

# PTX ISA 9.7.14.5.8 and .10, matrix fragments of mma.m16n8k16 (16 bits) and mma.m16n8k32 (8 bits): row and
# column of element i of lane n; elements lie in registers from low to high.
A16 = [
    [(n >> 2 if i < 2 or 4 <= i < 6 else (n >> 2) + 8, (n % 4) * 2 + (i & 1) + (8 if i >= 4 else 0))
     for i in range(8)] for n in LANES
]  # fmt: skip
B16 = [[((n % 4) * 2 + (i & 1) + (8 if i >= 2 else 0), n >> 2) for i in range(4)] for n in LANES]
A8 = [
    [(n >> 2 if i < 4 or 8 <= i < 12 else (n >> 2) + 8, (n % 4) * 4 + (i & 3) + (16 if i >= 8 else 0))
     for i in range(16)] for n in LANES
]  # fmt: skip
B8 = [[((n % 4) * 4 + (i & 3) + (16 if i >= 4 else 0), n >> 2) for i in range(8)] for n in LANES]
C = [[(n >> 2 if i < 2 else (n >> 2) + 8, (n % 4) * 2 + (i & 1)) for i in range(4)] for n in LANES]


def registers(matrix: Values, places: list[list[tuple[int, int]]]) -> Values:
    """Return the 32-bit registers of each lane for a matrix of 8- or 16-bit patterns."""
    picked = np.array([[matrix[p] for p in lane] for lane in places])
    return np.ascontiguousarray(picked).view(np.uint32)


def gathered(sums: Values) -> Values:
    """Return the 16 x 8 matrix of the accumulators of 32 lanes."""
    out = np.zeros((16, 8), sums.dtype)
    for lane in LANES:
        for i, place in enumerate(C[lane]):
            out[place] = sums[lane, i]
    return out


MMA = """
#include "mma.cuh"

extern "C" __global__ void products(const uint32_t* a, const uint32_t* b, const float* c, float* bf16,
                                    float* f16, float* e4m3, int* i8, int* u8) {
  const int lane = threadIdx.x;
  uint32_t ra[4];
  for (int i = 0; i < 4; ++i) ra[i] = a[lane * 4 + i];
  const uint32_t b0 = b[lane * 2], b1 = b[lane * 2 + 1];
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[lane * 4 + i];
  mma_bf16(sum, ra, b0, b1);
  for (int i = 0; i < 4; ++i) bf16[lane * 4 + i] = sum[i], sum[i] = c[lane * 4 + i];
  mma_f16(sum, ra, b0, b1);
  for (int i = 0; i < 4; ++i) f16[lane * 4 + i] = sum[i], sum[i] = c[lane * 4 + i];
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
  mma_e4m3(sum, ra, b0, b1);
#endif
  for (int i = 0; i < 4; ++i) e4m3[lane * 4 + i] = sum[i];
  int whole[4] = {1, 2, 3, 4};
  mma_i8(whole, ra, b0, b1);
  for (int i = 0; i < 4; ++i) i8[lane * 4 + i] = whole[i];
  mma_u8(whole, ra, b0, b1);
  for (int i = 0; i < 4; ++i) u8[lane * 4 + i] = whole[i] - i8[lane * 4 + i];
}
extern "C" __global__ void fragments(const uint16_t* x, const int* rows, uint32_t* y) {
  MIMO_SHARED(smem);
  uint16_t* s = reinterpret_cast<uint16_t*>(smem);
  const int lane = threadIdx.x;
  for (int i = lane; i < 512; i += 32) s[i] = x[i];
  warp_sync();
  const uint32_t from = smem_address(s + 8 * rows[lane]);
  uint32_t r[4];
  ldmatrix_x4(r, from);
  for (int i = 0; i < 4; ++i) y[i * 32 + lane] = r[i];
  ldmatrix_x4_trans(r, from);
  for (int i = 0; i < 4; ++i) y[(4 + i) * 32 + lane] = r[i];
  uint32_t two[2];
  ldmatrix_x2(two, from);
  for (int i = 0; i < 2; ++i) y[(8 + i) * 32 + lane] = two[i];
  ldmatrix_x2_trans(two, from);
  for (int i = 0; i < 2; ++i) y[(10 + i) * 32 + lane] = two[i];
}
"""
OUT = {n: ((32, 4), "float32") for n in ("bf16", "f16", "e4m3")} | {
    "i8": ((32, 4), "int32"), "u8": ((32, 4), "int32"), "y": ((12, 32), "uint32")
}  # fmt: skip
X = np.random.default_rng(2).integers(0, 1 << 16, 512, np.uint32).astype(np.uint16)
ROWS = np.random.default_rng(2).permutation(64)[:32].astype(np.int32)


def products(a: Values, b: Values, c: Values) -> dict[str, Values]:
    """Run all of `MMA`, which is compiled once."""
    inputs = {"a": a, "b": b, "c": c, "x": X, "rows": ROWS}
    launches = (
        Launch("products", (1, 1, 1), 32, ("a", "b", "c", "bf16", "f16", "e4m3", "i8", "u8")),
        Launch("fragments", (1, 1, 1), 32, ("x", "rows", "y"), 1024),
    )
    return emulate(kernel_of(MMA, inputs, OUT, launches), H200, inputs)


def e4m3_values(bits: Values) -> Values:
    import torch

    return torch.from_numpy(np.ascontiguousarray(bits)).view(torch.float8_e4m3fn).double().numpy()


def near(got: Values, want: Values, size: Values, bits: int = 24) -> None:
    """Assert that sums are right but for what is cut off: one unit of the largest for each summand."""
    assert (np.abs(got - want) <= size * 40 * 2.0 ** (1 - bits)).all()


def test_products_of_16_bit_numbers() -> None:
    rng = np.random.default_rng(0)
    a, b = (
        rng.standard_normal((16, 16)).astype(np.float32),
        rng.standard_normal((16, 8)).astype(np.float32),
    )
    c = rng.standard_normal((32, 4)).astype(np.float32)
    for name, bits, value in (
        ("bf16", bf16_bits, bf16_values),
        ("f16", lambda x: x.astype(np.float16).view(np.uint16), lambda u: u.view(np.float16)),
    ):
        ra, rb = bits(a), bits(b)
        got = products(registers(ra, A16), registers(rb, B16), c)[name]
        va, vb = value(ra).astype(np.float64), value(rb).astype(np.float64)
        near(gathered(got), va @ vb + gathered(c), np.abs(va) @ np.abs(vb) + np.abs(gathered(c)))


def test_products_of_8_bit_numbers() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 256, (16, 32), np.uint8), rng.integers(0, 256, (32, 8), np.uint8)
    a[a % 128 == 127] = 0  # NaN of e4m3
    b[b % 128 == 127] = 0
    c = rng.standard_normal((32, 4)).astype(np.float32)
    got = products(registers(a, A8), registers(b, B8), c)
    want = a.view(np.int8).astype(np.int64) @ b.view(np.int8).astype(np.int64)
    start = gathered(np.tile(np.arange(1, 5, dtype=np.int32), (32, 1)))
    np.testing.assert_array_equal(gathered(got["i8"]), want + start)
    unsigned = a.astype(np.int64) @ b.view(np.int8).astype(np.int64)
    np.testing.assert_array_equal(gathered(got["u8"]), unsigned)
    va, vb = e4m3_values(a), e4m3_values(b)
    near(
        gathered(got["e4m3"]),
        va @ vb + gathered(c),
        np.abs(va) @ np.abs(vb) + np.abs(gathered(c)),
        14,
    )


def test_sums_are_cut_off_below_24_bits_of_the_largest() -> None:
    # 2^24 takes no part of summands below 2; plain float32 sums would round some of them up
    a, b = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
    a[:, 0], b[0] = 2.0**24, 1
    a[:, 1], b[1] = 1.75, 1
    a[:, 2], b[2] = -1.75, 1
    got = products(
        registers(bf16_bits(a), A16), registers(bf16_bits(b), B16), np.zeros((32, 4), np.float32)
    )
    assert (got["bf16"] == 2.0**24).all()
    a[:, 1:3] = 3  # 3 is 2 after its last bit is cut
    got = products(
        registers(bf16_bits(a), A16), registers(bf16_bits(b), B16), np.zeros((32, 4), np.float32)
    )
    assert (got["bf16"] == 2.0**24 + 4).all()


def test_ldmatrix() -> None:
    a, c = np.zeros((32, 4), np.uint32), np.zeros((32, 4), np.float32)
    got = products(a, a[:, :2], c)["y"]
    # matrix i has the rows whose addresses lanes 8 i to 8 i + 7 bring; lane l gets row l / 4, columns
    # 2 (l % 4) and the next, or of the transposed matrix
    for turned, first, count in ((False, 0, 4), (True, 4, 4), (False, 8, 2), (True, 10, 2)):
        for i in range(count):
            matrix = X.reshape(64, 8)[ROWS[8 * i : 8 * i + 8]]
            matrix = matrix.T if turned else matrix
            pairs = [matrix[n // 4, n % 4 * 2 : n % 4 * 2 + 2] for n in LANES]
            want = np.ascontiguousarray(pairs).view(np.uint32)[:, 0]
            np.testing.assert_array_equal(got[first + i], want)


GROUP = """
#include "wgmma.cuh"

constexpr int N = 32, DEPTH = 64, STAGES = 2, STEPS = 3;
constexpr int A_BYTES = 64 * 128, STAGE = A_BYTES + N * 128;

// 64 x 32 outputs by one group of four warps, fed by another group's copies through a ring of two stages.
extern "C" __global__ void __launch_bounds__(256, 1)
    multiply(const int* mode, const __grid_constant__ CUtensorMap a_map,
             const __grid_constant__ CUtensorMap b_map, float* y, uint32_t* raw) {
  MIMO_SHARED(smem);
  const int what = mode[0];
  uint64_t* full = reinterpret_cast<uint64_t*>(smem + STAGES * STAGE);
  uint64_t* empty = full + STAGES;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      mbarrier_init(full + s, 1);
      mbarrier_init(empty + s, 128);
    }
    if (what != 1) fence_barrier_init();
  }
  block_sync();
  if (threadIdx.x >= 128) {
    if (what == 20) registers_decrease<256>();
    if (what < 18 || what == 21 || (what == 19 && threadIdx.x < 224)) registers_decrease<24>();
    if (threadIdx.x == 128) {
      if (what == 21) smem[STAGE] = 1;
      for (int k = 0; k < STEPS; ++k) {
        const int s = k % STAGES;
        if (what != 2) mbarrier_wait(empty + s, (k / STAGES & 1) ^ 1);
        mbarrier_expect(full + s, what == 3 ? STAGE - 128 : STAGE);
        uint8_t* to = smem + s * STAGE + (what == 4 ? 64 : 0);
        tma_load(to, &a_map, k * DEPTH, 0, full + s);
        tma_load(smem + s * STAGE + A_BYTES, &b_map, k * DEPTH, -3, full + s);
      }
    }
    if (what == 5 && threadIdx.x == 128) full[0] = 0;
    return;
  }
  registers_increase<256>();
  float acc[N / 2];
  for (int i = 0; i < N / 2; ++i) acc[i] = 1.0f;
  for (int k = 0; k < STEPS; ++k) {
    const int s = k % STAGES;
    const bool late = what == 14;
    if (what != 6 && !late) mbarrier_wait(full + s, k / STAGES & 1);
    if (k == 0 && !late)
      for (int i = threadIdx.x; i < STAGE / 4; i += 128) raw[i] = reinterpret_cast<uint32_t*>(smem)[i];
    const uint64_t a = wgmma_descriptor(smem + s * STAGE), b = wgmma_descriptor(smem + s * STAGE + A_BYTES);
    if ((what == 12 || what == 13 || what == 15) && k == 1) {   // one byte goes through a register
      if (threadIdx.x == 0) *const_cast<volatile uint8_t*>(smem + s * STAGE) = smem[s * STAGE];
      if (what == 13) fence_async_proxy();
      named_sync(1, 128);
    }
    if (what != 7) wgmma_fence();
    for (int j = 0; j < DEPTH / 16; ++j) wgmma_bf16<N>(acc, a + 2 * j, b + 2 * j, k > 0 || j > 0);
    if (what == 10 && threadIdx.x < 32) wgmma_bf16<N>(acc, a, b, 1);
    if (what == 11) acc[3] = 0;
    wgmma_commit();
    if (late) mbarrier_wait(full + s, k / STAGES & 1);
    if (what == 15) fence_async_proxy();
    if (what == 16) mbarrier_arrive(empty + s), mbarrier_wait(full + s, (k / STAGES & 1) ^ 1);
    if (what != 8 && (what != 17 || k < 2)) wgmma_wait<0>();
    if (what != 16) mbarrier_arrive(empty + s);
    if (what == 9 && k == 2) mbarrier_wait(full, 0), mbarrier_wait(full, 1);
  }
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;   // rows 16 to a warp
  const int row = threadIdx.x / 32 * 16 + g % 8;
  for (int i = 0; i < N / 2; ++i) {
    const int r = row + 8 * (i / 2 % 2), c = 8 * (i / 4) + 2 * t + i % 2;
    y[r * N + c] = acc[i];
  }
  if (what == 17) wgmma_wait<0>();
}
"""
K = 3 * 64 - 16  # the last box hangs over the edge
MAPS = (TensorMap("a", "bfloat16", 64, K, 64, 64), TensorMap("b", "bfloat16", 40, K, 32, 64))
STAGE = (64 + 32) * 128


def multiplied(mode: int, order: int = 0) -> tuple[Values, Values, dict[str, Values]]:
    rng = np.random.default_rng(3)
    a = bf16_bits(rng.standard_normal((64, K)).astype(np.float32))
    b = bf16_bits(rng.standard_normal((40, K)).astype(np.float32))
    inputs = {"mode": np.array([mode], np.int32), "a": a, "b": b}
    outputs = {"y": ((64, 32), "float32"), "raw": ((STAGE // 4,), "uint32")}
    got = run(
        GROUP, "multiply", inputs, outputs, 256, 2 * STAGE + 32,
        operands=("mode", *MAPS, "y", "raw"), order=order,
    )  # fmt: skip
    return a, b, got


@pytest.mark.parametrize("order", [0, 1, 11, 12])
def test_a_warp_group_multiplies_what_bulk_copies_bring(order: int) -> None:
    a, b, got = multiplied(0, order)
    va, vb = bf16_values(a).astype(np.float64), np.zeros((32, K))
    vb[3:] = bf16_values(b[:29])  # rows -3 to 28: those before the first are zero
    near(got["y"], va @ vb.T, np.abs(va) @ np.abs(vb.T))
    if order:
        return
    # rows of 128 bytes; within 1024 bytes, chunk c of 16 bytes of row r lies at chunk c xor r
    stage = got["raw"].view(np.uint16)
    for rows, first, matrix in (
        (64, 0, a),
        (32, 64 * 64, np.vstack([np.zeros((3, K), np.uint16), b])[:32]),
    ):
        for r in range(rows):
            for c in range(64):
                at = first + r * 64 + ((c // 8) ^ (r % 8)) * 8 + c % 8
                assert stage[at] == matrix[r, c], (r, c)


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        (1, r"tma_load with a barrier that no fence_barrier_init follows"),
        (3, r"a block ended with -128 bytes|deadlock|bytes still expected"),
        (4, r"tma_load at byte 64 of shared memory, which is no multiple of 1024"),
        (5, r"the barrier at byte \d+ of shared memory was overwritten"),
        (7, r"wgmma without a wgmma_fence"),
        (8, r"warp \d ended before its wgmma did: wgmma_wait comes first"),
        (9, r"deadlock: .*mbarrier_wait \(line \d+\) for the end of parity \d of the barrier at byte \d+"),
        (10, r"differs from its group's|issued 5 wgmma, another of its group 4|issued \d+ wgmma"),
        (11, r"accumulator 3 of wgmma was changed"),
        (12, r"wgmma reads byte 12288 of shared memory, which thread 0 wrote without a fence_async_proxy"),
        (14, r"a race: (wgmma reads|tma_load writes) byte \d+ of shared memory"),
        (15, r"wgmma reads byte 12288 of shared memory, which thread 0 wrote without a fence_async_proxy"),
        (16, r"byte \d+ of shared memory was written while a wgmma that reads it was under way"),
        (18, r"deadlock: threads 0-127 wait at registers_increase \(line \d+\)"),
        (19, r"a change of registers in line|changed its registers 0 times, another of its group 1"),
        (20, r"registers_decrease to 256 by a warp whose threads have 248"),
        (21, r"tma_load writes byte \d+ of shared memory, which thread 128 wrote without a fence_async"),
        (2, r"more than 1 arrivals at the barrier at byte \d+ in one phase"),
        (6, r"deadlock|a race"),
    ],
)  # fmt: skip
def test_what_a_pipeline_may_not_do_is_found(mode: int, said: str) -> None:
    with pytest.raises(EmulationError, match=said):
        multiplied(mode)


HELD = """
#include "wgmma.cuh"

constexpr int N = 128, PANEL = 32 * 128;

// y [64, N] = a [64, 32] b [32, N]: a in registers, rows of b as they lie.
extern "C" __global__ void __launch_bounds__(128, 1)
    multiply(const int* mode, const uint16_t* a, const __grid_constant__ CUtensorMap b_map, float* y) {
  MIMO_SHARED(smem);
  const int what = mode[0];
  uint64_t* full = reinterpret_cast<uint64_t*>(smem + 2 * PANEL);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    fence_barrier_init();
    mbarrier_expect(full, 2 * PANEL);
    tma_load(smem, &b_map, 0, 0, full);
    tma_load(smem + PANEL, &b_map, 64, 0, full);
  }
  block_sync();
  mbarrier_wait(full, 0);
  if (what == 1 && threadIdx.x == 0) {
    *const_cast<volatile uint8_t*>(smem + PANEL + 127) = smem[PANEL + 127];
  }
  block_sync();
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, row = threadIdx.x / 32 * 16 + g;
  uint32_t held[2][4];
  for (int i = 0; i < 8; ++i) {
    const int column = i / 4 * 16 + i / 2 % 2 * 8 + 2 * t, from = (row + 8 * (i % 2)) * 32 + column;
    held[i / 4][i % 4] = a[from] | uint32_t(a[from + 1]) << 16;
  }
  float acc[N / 2];
  for (int i = 0; i < N / 2; ++i) acc[i] = 1.0f;
  const uint64_t b = wgmma_descriptor_across(smem + (what == 2 ? 128 : 0), what == 3 ? PANEL + 128 : PANEL);
  if (what != 4) wgmma_fence();
  for (int k = 0; k < 2; ++k) wgmma_bf16_held<N>(acc, held[k], b + (what == 7 ? 0 : 128 * k), k > 0);
  wgmma_commit();
  if (what == 5 && threadIdx.x == 77) held[1][2] ^= 1;
  if (what == 6 && threadIdx.x == 0) *const_cast<volatile uint8_t*>(smem + 2 * PANEL - 1) = 0;
  wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) y[(row + 8 * (i / 2 % 2)) * N + 8 * (i / 4) + 2 * t + i % 2] = acc[i];
}
"""


def held(mode: int, order: int = 0) -> tuple[Values, Values]:
    """Return what `HELD` computes, and what it should."""
    rng = np.random.default_rng(5)
    a = bf16_bits(rng.standard_normal((64, 32)).astype(np.float32))
    b = bf16_bits(
        rng.standard_normal((29, 120)).astype(np.float32)
    )  # the boxes hang over its edges
    inputs = {"mode": np.array([mode], np.int32), "a": a, "b": b}
    got = run(
        HELD, "multiply", inputs, {"y": ((64, 128), "float32")}, 128, 2 * 4096 + 8,
        operands=("mode", "a", TensorMap("b", "bfloat16", 29, 120, 32, 64), "y"), order=order,
    )  # fmt: skip
    want = np.zeros((64, 128))
    want[:, :120] = bf16_values(a)[:, :29].astype(np.float64) @ bf16_values(b)
    return got["y"], want


@pytest.mark.slow
@pytest.mark.parametrize("order", [0, 1])
def test_a_left_operand_in_registers_and_a_right_one_across(order: int) -> None:
    got, want = held(0, order)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    assert np.abs(held(7)[0] - want).max() > 1  # the first rows of the depth twice


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "said"),
    [
        (1, r"wgmma reads byte \d+ of shared memory, which thread 0 wrote without a fence_async_proxy"),
        (2, r"b, which lies across, begins at byte 128 of shared memory, no multiple of 1024"),
        (3, r"64 columns of b are 4224 bytes behind the others, no multiple of 1024"),
        (4, r"wgmma without a wgmma_fence"),
        (5, r"the left operand of wgmma was changed in lane 13 while a product"),
        (6, r"byte \d+ of shared memory was written while a wgmma that reads it was under way|a race"),
    ],
)  # fmt: skip
def test_what_products_of_held_operands_may_not_do_is_found(mode: int, said: str) -> None:
    with pytest.raises(EmulationError, match=said):
        held(mode)


def test_what_a_thread_writes_needs_a_fence_before_wgmma_reads_it() -> None:
    np.testing.assert_array_equal(multiplied(13)[2]["y"], multiplied(0)[2]["y"])


def test_sums_are_unreadable_before_the_wait_for_them() -> None:
    assert np.isnan(multiplied(17)[2]["y"]).all()
