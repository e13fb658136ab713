// The mean of all keys of a KV head.
//
// A block has 16 columns, two for each of eight neighbouring threads, and takes turns with SPLITS - 1 others at the keys,
// PARTS at a time: each 8 threads add up theirs, and the parts are added in pairs. With several splits a second launch adds
// up theirs in their order. Constants: D, DK (width of the cache's rows), KV, CAP, PARTS (a power of 2), SPLITS,
// MERGE_THREADS.
#include "warp.cuh"

constexpr int COLUMNS = 16, PAIRS = COLUMNS / 2, SLICES = DK / COLUMNS;

// Grid: slices of columns of each KV head, splits. `sums`: [SPLITS][KV * DK]; not looked at of one split.
extern "C" __global__ void __launch_bounds__(PAIRS * PARTS)
    key_mean(const int* __restrict__ pos, const uint16_t* __restrict__ k_cache, float* __restrict__ sums,
             float* __restrict__ mean) {
  MIMO_SHARED(shared);
  float2* const parts = reinterpret_cast<float2*>(shared);  // [PARTS][PAIRS]
  const int slice = blockIdx.x % SLICES, kv = blockIdx.x / SLICES, pair = threadIdx.x % PAIRS;
  const int part = threadIdx.x / PAIRS, count = max(1, pos[0] + pos[1]);
  const uint16_t* keys = k_cache + size_t(kv) * CAP * DK + slice * COLUMNS + pair * 2;
  float2 own = make_float2(0.0f, 0.0f);
#pragma unroll 8
  for (int key = blockIdx.y * PARTS + part; key < count; key += PARTS * SPLITS) {
    const uint32_t both = ld_global_nc(reinterpret_cast<const uint32_t*>(keys + size_t(key) * DK));
    own.x += bf16_low(both);
    own.y += bf16_high(both);
  }
  parts[threadIdx.x] = own;
#pragma unroll
  for (int half = PARTS / 2; half > 0; half /= 2) {
    block_sync();
    if (part >= half) continue;
    const float2 other = parts[threadIdx.x + half * PAIRS];
    own.x += other.x;
    own.y += other.y;
    parts[threadIdx.x] = own;
  }
  if (part != 0) return;
  const int column = slice * COLUMNS + pair * 2;
  if constexpr (SPLITS > 1) {
    *reinterpret_cast<float2*>(sums + (size_t(blockIdx.y) * KV + kv) * DK + column) = own;
  } else {
    float* to = mean + kv * D + column;
    if (column < D) to[0] = own.x / float(count);
    if (column + 1 < D) to[1] = own.y / float(count);
  }
}

// Grid: columns of all KV heads, MERGE_THREADS at a time.
extern "C" __global__ void __launch_bounds__(MERGE_THREADS)
    merge(const int* __restrict__ pos, const float* __restrict__ sums, float* __restrict__ mean) {
  const int at = blockIdx.x * MERGE_THREADS + threadIdx.x, kv = at / D;
  if (kv >= KV) return;
  const float* from = sums + kv * DK + at % D;
  float total = 0.0f;
#pragma unroll 8
  for (int split = 0; split < SPLITS; ++split) total += from[size_t(split) * KV * DK];
  mean[at] = total / float(max(1, pos[0] + pos[1]));
}
