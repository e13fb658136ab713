// Scores of blocks from their descriptors: an upper bound of a query's products with the keys, or its product with
// one vector.
//
// A block has some entries of one head of keys for one row; its queries are in shared memory. A warp has an entry at a
// time, each lane every 32nd column. Constants: R (rows of a sequence), KV, GROUP (queries of a head of keys), D,
// BLOCKS (entries), BLOCK, ROWS (tokens of a row), BOUNDS (entries are least and greatest), AGG (0 none, 1 greatest,
// 2 mean, 3 sum, 4 the mean query), PAGE, TABLE (entries of a sequence's table), SCALE, ENTRY (type of an entry's
// numbers), EACH (entries of a warp), WARPS.
#include "kv_slots.cuh"
#include "maps.cuh"

constexpr int PARTS = BOUNDS ? 2 : 1, OWN = (D + 31) / 32, QUERIES = AGG == 4 ? 1 : GROUP;
constexpr int HEADS = AGG == 0 ? KV * GROUP : KV, TILES = (BLOCKS + WARPS * EACH - 1) / (WARPS * EACH);

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(uint16_t x) { return bf16_to_float(x); }

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    score_blocks(const float* __restrict__ q, const int* __restrict__ pos, const int* __restrict__ pages,
                 const ENTRY* __restrict__ desc, float* __restrict__ score) {
  MIMO_SHARED(smem);
  float* const query = reinterpret_cast<float*>(smem);
  const int tile = blockIdx.x % TILES, head = blockIdx.x / TILES % KV, row = blockIdx.x / TILES / KV;
  const int sequence = row / R, first = row % R * ROWS, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float* own = q + (size_t(row) * KV + head) * GROUP * D;
  for (int i = threadIdx.x; i < QUERIES * D; i += WARPS * 32) {
    float x = own[i];
    if (AGG == 4) {
      for (int g = 1; g < GROUP; ++g) x += own[g * D + i];
      x /= GROUP;
    }
    query[i] = x;
  }
  block_sync();
  // rows of padding end before every block
  const int valid = pos[2 * sequence + 1];
  const int end = first < valid ? pos[2 * sequence] + min(first + ROWS, valid) - 1 : -1;
  float* const to = score + size_t(row) * HEADS * BLOCKS;
  for (int e = 0; e < EACH; ++e) {
    const int entry = (tile * EACH + e) * WARPS + warp;
    if (entry >= BLOCKS) break;
    float together = AGG == 1 ? -infinity() : 0.0f;
    const bool complete = (entry + 1) * BLOCK - 1 <= end;
    float low[OWN], high[OWN];
    if (complete) {   // a table has no page for others
      const size_t place = entry_of<BLOCKS, BLOCK, PAGE>(sequence, entry, pages + size_t(sequence) * TABLE);
      const ENTRY* numbers = desc + (place * KV + head) * PARTS * D;
#pragma unroll
      for (int i = 0; i < OWN; ++i) {
        const int column = lane + 32 * i;
        low[i] = column < D ? wide(numbers[column]) : 0.0f;
        high[i] = BOUNDS && column < D ? wide(numbers[D + column]) : low[i];
      }
    }
    for (int g = 0; g < QUERIES; ++g) {
      float sum = 0.0f;
      if (complete) {
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
          const int column = lane + 32 * i;
          const float x = column < D ? query[g * D + column] : 0.0f;
          sum += x * (x >= 0.0f ? high[i] : low[i]);
        }
      }
#pragma unroll
      for (int away = 16; away > 0; away /= 2) sum += shfl_xor(sum, away);
      sum = complete ? sum * SCALE : -infinity();
      if (AGG == 0) {
        if (lane == 0) to[size_t(head * GROUP + g) * BLOCKS + entry] = sum;
      } else {
        together = AGG == 1 ? larger(together, sum) : together + sum;
      }
    }
    if (AGG == 2) together /= GROUP;
    if (AGG != 0 && lane == 0) to[size_t(head) * BLOCKS + entry] = together;
  }
}
