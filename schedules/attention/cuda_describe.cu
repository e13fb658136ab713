// Descriptors of blocks of keys: each entry that this step wrote to is made anew from its keys.
//
// A thread has two neighbouring columns of an entry of a head, and reads the entry's keys one after the other.
// Constants: B, KV, D, DK (width of the cache's rows), CAP, SLOTS (of all pages, else CAP), PAGE, TABLE (entries of a
// sequence's table), ENTRIES, SIZE, STRIDE, MOST (entries that a step writes to at most), PARTS, SUM, LEAST, GREATEST,
// SPAN (the place of each part, -1: there is none), WHOLE, ENTRY (type of an entry's numbers), THREADS.
#include "kv_slots.cuh"
#include "maps.cuh"

constexpr int PAIRS = (D + 1) / 2;

__device__ __forceinline__ void put(float* to, float x) { *to = x; }
__device__ __forceinline__ void put(uint16_t* to, float x) { *to = to_bf16(x); }

extern "C" __global__ void __launch_bounds__(THREADS)
    describe_blocks(const int* __restrict__ pos, const int* __restrict__ pages, const uint16_t* __restrict__ k_cache,
                    ENTRY* __restrict__ desc) {
  const long long at = (long long)blockIdx.x * THREADS + threadIdx.x;
  if (at >= (long long)B * MOST * KV * PAIRS) return;
  const int column = int(at % PAIRS) * 2, head = int(at / PAIRS % KV);
  const int place = int(at / PAIRS / KV % MOST), sequence = int(at / PAIRS / KV / MOST);
  const int start = pos[2 * sequence], end = start + pos[2 * sequence + 1];
  int stop = min(ENTRIES, floor_div(end - 1, STRIDE) + 1);
  if (WHOLE) stop = min(stop, floor_div(end - SIZE, STRIDE) + 1);
  const int entry = max(0, floor_div(start - SIZE, STRIDE) + 1) + place;
  if (end == start || entry >= stop) return;
  const int first = entry * STRIDE, last = min(first + SIZE, end);
  const int* table = pages + size_t(sequence) * TABLE;
  const uint16_t* keys = k_cache + size_t(PAGE ? head : sequence * KV + head) * SLOTS * DK + column;
  float least[2] = {infinity(), infinity()}, greatest[2] = {-infinity(), -infinity()}, sum[2] = {0.0f, 0.0f};
#pragma unroll 4
  for (int i = first; i < last; ++i) {
    const size_t slot = slot_of<CAP, 0, PAGE>(i, table);
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(keys + slot * DK);
    const float x[2] = {bf16_low(pair), bf16_high(pair)};
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      least[c] = smaller(least[c], x[c]);
      greatest[c] = larger(greatest[c], x[c]);
      sum[c] += x[c];
    }
  }
  const size_t row = entry_of<ENTRIES, SIZE, PAGE>(sequence, entry, table);
  ENTRY* to = desc + (row * KV + head) * PARTS * D + column;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    if (column + c >= D) continue;
    if (LEAST >= 0) put(to + LEAST * D + c, least[c]);
    if (GREATEST >= 0) put(to + GREATEST * D + c, greatest[c]);
    if (SUM >= 0) put(to + SUM * D + c, sum[c] / float(last - first));
    if (SPAN >= 0) put(to + SPAN * D + c, larger(greatest[c], -least[c]));
  }
}
