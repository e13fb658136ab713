// What matmuls share: activations as int8 or bfloat16, the order of a result's tiles, sums of cut columns.
#pragma once
#include "warp.cuh"

namespace matmul {

// Scales and zero points are stored as float16 (its bits) or float32.
__device__ __forceinline__ float widen(uint16_t half) { return f16_to_float(half); }
__device__ __forceinline__ float widen(float value) { return value; }

__host__ __device__ constexpr int up(int value, int unit) { return (value + unit - 1) / unit; }

// Quantises columns `start` to `stop` of a row of x to int8 by their largest magnitude
// (`ir.ops.numerics.quantize_rows`), by all threads of a block; codes behind them, up to `end`, are zero. `shared` has
// room for a float of each warp.
template <int THREADS>
__device__ __forceinline__ void quantize_columns(const float* x, int8_t* codes, float* scale, float* shared, int start,
                                                 int stop, int end) {
  constexpr int WARPS = THREADS / 32;
  float most = 0.0f;
  for (int c = start + int(threadIdx.x); c < stop; c += THREADS) most = fmaxf(most, fabsf(x[c]));
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) most = fmaxf(most, shfl_xor(most, mask));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = most;
  block_sync();
#pragma unroll
  for (int warp = 0; warp < WARPS; ++warp) most = fmaxf(most, shared[warp]);
  const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
  for (int c = start + 4 * int(threadIdx.x); c < end; c += 4 * THREADS) {
    uint32_t four = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = c + i < stop ? x[c + i] : 0.0f;
      const int code = int(fminf(fmaxf(rintf(value * inverse), -127.0f), 127.0f));
      four |= (uint32_t(code) & 255u) << (8 * i);
    }
    *reinterpret_cast<uint32_t*>(codes + c) = four;
  }
  if (threadIdx.x == 0) *scale = most / 127.0f;
}

// Quantises rows of `x` [., K], or each GROUP columns of them apart: block b does group b % GROUPS of row b / GROUPS.
// `codes` has rows of K_PADDED columns, zero beyond K.
template <int K, int K_PADDED, int GROUP, int THREADS>
__device__ __forceinline__ void quantize(const float* x, int8_t* codes, float* scale, float* shared) {
  constexpr int GROUPS = GROUP ? up(K, GROUP) : 1;
  const int row = blockIdx.x / GROUPS, group = blockIdx.x % GROUPS;
  const int start = group * GROUP, stop = GROUP ? min(start + GROUP, K) : K;
  const int end = group == GROUPS - 1 ? K_PADDED : stop;
  quantize_columns<THREADS>(x + size_t(row) * K, codes + size_t(row) * K_PADDED, scale + blockIdx.x, shared, start, stop,
                            end);
}

// By comparison: NaN stays, where fminf and fmaxf return the other number.
__device__ __forceinline__ float within_f16(float x) { return x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x; }

// Two floats as bfloat16, or as float16 (HALF), whose largest take the place of what it cannot hold.
template <bool HALF>
__device__ __forceinline__ uint32_t pack_two(float low, float high) {
  if (!HALF) return pack_bf16(low, high);
  return pack_f16(within_f16(low), within_f16(high));
}

// Rounds `x` [M, K] to 16 bits [M, K_PADDED], zero beyond K; a thread does 8 columns. SWAPPED: of each 4
// columns the middle two change places.
template <int M, int K, int K_PADDED, bool SWAPPED, bool HALF, int THREADS>
__device__ __forceinline__ void round_rows(const float* x, uint16_t* out) {
  const int index = blockIdx.x * THREADS + threadIdx.x;
  if (index >= M * (K_PADDED / 8)) return;
  const int row = index / (K_PADDED / 8), column = index % (K_PADDED / 8) * 8;
  float value[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    value[i] = column + i < K ? x[size_t(row) * K + column + i] : 0.0f;
  }
  constexpr int B = SWAPPED ? 2 : 1, C = 3 - B;
  *reinterpret_cast<uint4*>(out + size_t(row) * K_PADDED + column) =
      make_uint4(pack_two<HALF>(value[0], value[B]), pack_two<HALF>(value[C], value[3]),
                 pack_two<HALF>(value[4], value[4 + B]), pack_two<HALF>(value[4 + C], value[7]));
}

// A row of an operand in device memory. One that is not there counts as zeros; `bytes` is then some row's.
struct Row {
  const uint8_t* bytes;
  bool there;
};

template <int ROWS, int ROW_BYTES>
__device__ __forceinline__ Row row_of(const uint8_t* matrix, int row) {
  const bool there = row < ROWS;
  return {there ? matrix + size_t(row) * ROW_BYTES : matrix, there};
}

struct Tile {
  int m, n;  // which of the tiles of rows and of columns of y
};

// Tile number `index`, when GROUP_M of the `tiles_m` tiles of rows take turns at each tile of columns, so that blocks
// which run at the same time read few different rows of both operands.
template <int TILES_N, int GROUP_M>
__device__ __forceinline__ Tile tile_of(int index, int tiles_m) {
  const int group = index / (GROUP_M * TILES_N), within = index % (GROUP_M * TILES_N);
  const int first = group * GROUP_M, size = min(tiles_m - first, GROUP_M);
  return {first + within % size, within / size};
}

// The sum of SPLIT partial results [SPLIT, M, N] at one place, in their order.
template <int SPLIT, int M, int N, class T>
__device__ __forceinline__ T join(const T* parts, int index) {
  T sum = parts[index];
#pragma unroll
  for (int part = 1; part < SPLIT; ++part) sum += parts[size_t(part) * M * N + index];
  return sum;
}

// Writes two neighbouring columns of a row of N, those that there are; `column` is even.
template <int N, class T>
__device__ __forceinline__ void store_two(T* row, int column, T first, T second) {
  struct alignas(2 * sizeof(T)) Two {
    T first, second;
  };
  if (N % 2 == 0) {
    if (column < N) *reinterpret_cast<Two*>(row + column) = {first, second};
  } else {
    if (column < N) row[column] = first;
    if (column + 1 < N) row[column + 1] = second;
  }
}

}  // namespace matmul
