// Experts of few tokens, without matrix units: each slot reads its expert's matrices (`gemv.cuh`), codes or floats.
//
// Up: a warp has ROWS rows of the gate and of the up matrix of a slot's expert, and stores silu(gate) * up.
// Down: a warp has ROWS rows of a token's experts, one after the other, and adds up what they say in the order of the
// token's choices. DOT: x, and what comes between, are quantised to int8 by launches of their own.
#include "experts.cuh"
#include "gemv.cuh"

using Up = Gemv<D, D_PADDED, W_GROUP, X_GROUP>;
using Down = Gemv<F, F_PADDED, W_GROUP, X_GROUP>;
constexpr int THREADS = 32 * WARPS * SPLIT;
constexpr int TEAM = SPLIT * ROWS;  // sums of the warps that have the same rows

#if DOT
constexpr int QUANTIZE_THREADS = X_GROUP ? 32 : 256;

extern "C" __global__ void __launch_bounds__(QUANTIZE_THREADS)
    experts_quantize(const float* x, int8_t* codes, float* scale) {
  MIMO_SHARED(smem);
  matmul::quantize<D, D_PADDED, X_GROUP, QUANTIZE_THREADS>(x, codes, scale, reinterpret_cast<float*>(smem));
}
extern "C" __global__ void __launch_bounds__(QUANTIZE_THREADS)
    experts_quantize_hidden(const int* ids, const float* hidden, int8_t* codes, float* scale) {
  MIMO_SHARED(smem);
  if (!experts::is_expert(ids[blockIdx.x / Down::X_GROUPS])) return;
  matmul::quantize<F, F_PADDED, X_GROUP, QUANTIZE_THREADS>(hidden, codes, scale, reinterpret_cast<float*>(smem));
}
#define ROW_OF_X(matrix, row) x + size_t(row) * matrix::ROW_COLUMNS, x_scale + (row) * matrix::X_GROUPS
#define SCALE_OF_X(matrix, row) x_scale + (row) * matrix::X_GROUPS,
#else
#define ROW_OF_X(matrix, row) x + size_t(row) * matrix::ROW_COLUMNS
#define SCALE_OF_X(matrix, row)
#endif

__device__ __forceinline__ void keep(const TOTAL (&total)[ROWS][1], TOTAL* sums) {
  if (threadIdx.x % 32 != 0) return;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) sums[r] = total[r][0];
}

// What the warps of a team have of a row.
__device__ __forceinline__ TOTAL joined(const TOTAL* sums, int team, int r) {
  TOTAL sum = 0;
#pragma unroll
  for (int part = 0; part < SPLIT; ++part) sum += sums[team * TEAM + part * ROWS + r];
  return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    experts_up(const uint8_t* __restrict__ w, const SCALE* __restrict__ scale, X_PARAMETERS,
               const int* __restrict__ ids, float* __restrict__ hidden) {
  MIMO_SHARED(smem);
  TOTAL* sums = reinterpret_cast<TOTAL*>(smem);  // [2, WARPS, SPLIT, ROWS]
  const int warp = threadIdx.x / 32, slot = blockIdx.y, expert = ids[slot];
  if (!experts::is_expert(expert)) return;
  const int first = (blockIdx.x * WARPS + warp / SPLIT) * ROWS;
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    TOTAL total[ROWS][1] = {};
    const size_t row = (size_t(expert) * 2 + half) * F_ROWS;  // rows are padded to a multiple of ROWS
    if (first < F) {
      Up::pass(w + row * Up::ROW_BYTES, scale + row * Up::W_GROUPS, ROW_OF_X(Up, slot / TOPK), first, warp % SPLIT,
               total);
    }
    keep(total, sums + (half * WARPS * SPLIT + warp) * ROWS);
  }
  block_sync();
  const int team = threadIdx.x / ROWS, r = threadIdx.x % ROWS, row = (blockIdx.x * WARPS + team) * ROWS + r;
  if (team < WARPS && row < F) {
    const size_t gate = size_t(expert) * 2 * F_ROWS, up = gate + F_ROWS;
    const TOTAL both[2] = {joined(sums, team, r), joined(sums + WARPS * TEAM, team, r)};
    hidden[size_t(slot) * F + row] = experts::hidden_of(
        Up::finish(both[0], scale + gate * Up::W_GROUPS, SCALE_OF_X(Up, slot / TOPK) row, 0),
        Up::finish(both[1], scale + up * Up::W_GROUPS, SCALE_OF_X(Up, slot / TOPK) row, 0));
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    experts_down(const uint8_t* __restrict__ w, const SCALE* __restrict__ scale, X_PARAMETERS,
                 const int* __restrict__ ids, const float* __restrict__ weights, float* __restrict__ y) {
  MIMO_SHARED(smem);
  TOTAL* sums = reinterpret_cast<TOTAL*>(smem);  // [TOPK, WARPS, SPLIT, ROWS]
  const int warp = threadIdx.x / 32, token = blockIdx.y;
  const int first = (blockIdx.x * WARPS + warp / SPLIT) * ROWS;
#pragma unroll 1
  for (int choice = 0; choice < TOPK; ++choice) {
    const int slot = token * TOPK + choice, expert = ids[slot];
    if (!experts::is_expert(expert)) continue;
    TOTAL total[ROWS][1] = {};
    const size_t row = size_t(expert) * D_ROWS;
    if (first < D) {
      Down::pass(w + row * Down::ROW_BYTES, scale + row * Down::W_GROUPS, ROW_OF_X(Down, slot), first, warp % SPLIT,
                 total);
    }
    keep(total, sums + (choice * WARPS * SPLIT + warp) * ROWS);
  }
  block_sync();
  const int team = threadIdx.x / ROWS, r = threadIdx.x % ROWS, row = (blockIdx.x * WARPS + team) * ROWS + r;
  if (team < WARPS && row < D) {
    y[size_t(token) * D + row] = experts::combine(ids, weights, token, [&](int slot, int expert) {
      const TOTAL sum = joined(sums + slot % TOPK * WARPS * TEAM, team, r);
      return Down::finish(sum, scale + size_t(expert) * D_ROWS * Down::W_GROUPS, SCALE_OF_X(Down, slot) row, 0);
    });
  }
}
