// The mean of all keys of a KV head.
//
// A block has 16 columns, two for each of eight neighbouring threads, and PARTS parts of the keys: each 8 threads add up
// every PARTS-th key, and the parts are added in pairs. Constants: D, DK (width of the cache's rows), CAP, PARTS (a power
// of 2).
#include "warp.cuh"

constexpr int COLUMNS = 16, PAIRS = COLUMNS / 2, SLICES = DK / COLUMNS;

// Grid: slices of columns of each KV head.
extern "C" __global__ void __launch_bounds__(PAIRS * PARTS)
    key_mean(const int* __restrict__ pos, const uint16_t* __restrict__ k_cache, float* __restrict__ mean) {
  MIMO_SHARED(shared);
  float2* const sums = reinterpret_cast<float2*>(shared);  // [PARTS][PAIRS]
  const int slice = blockIdx.x % SLICES, kv = blockIdx.x / SLICES, pair = threadIdx.x % PAIRS;
  const int part = threadIdx.x / PAIRS, count = max(1, pos[0] + pos[1]);
  const uint16_t* keys = k_cache + size_t(kv) * CAP * DK + slice * COLUMNS + pair * 2;
  float2 own = make_float2(0.0f, 0.0f);
#pragma unroll 8
  for (int key = part; key < count; key += PARTS) {
    const uint32_t both = ld_global_nc(reinterpret_cast<const uint32_t*>(keys + size_t(key) * DK));
    own.x += bf16_low(both);
    own.y += bf16_high(both);
  }
  sums[threadIdx.x] = own;
#pragma unroll
  for (int half = PARTS / 2; half > 0; half /= 2) {
    block_sync();
    if (part >= half) continue;
    const float2 other = sums[threadIdx.x + half * PAIRS];
    own.x += other.x;
    own.y += other.y;
    sums[threadIdx.x] = own;
  }
  const int column = slice * COLUMNS + pair * 2;
  float* to = mean + kv * D + column;
  if (part == 0 && column < D) to[0] = own.x / float(count);
  if (part == 0 && column + 1 < D) to[1] = own.y / float(count);
}
