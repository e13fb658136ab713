// Attention of many tokens over a KV cache of 8-bit floats: warps have query rows, and share the keys of a block.
//
// As cuda_prefill.cu, but stages are whole blocks of 16 keys as they lie in the cache (float8.cuh), so that they
// begin at multiples of 16; keys before a row's window are masked. Constants: as in
// cuda_float8_decode.cu, without PARTS and MERGE_THREADS, and B (sequences).
#include "float8.cuh"

constexpr int HEADS = H / KV, ROWS = T * HEADS, TILE = 16 * WARPS, BLOCKS = KEYS / 16;
constexpr int TILES = (ROWS + TILE - 1) / TILE;
constexpr int K_BYTES = BLOCKS * float8::HELD<DK>, STAGE_BYTES = K_BYTES + BLOCKS * float8::HELD<DW>;

// Grid: KV heads of each sequence for each tile of rows, the last tile first.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
    attend(const float* __restrict__ q, const int* __restrict__ pos, const float* __restrict__ sink,
           const uint8_t* __restrict__ k_cache, const uint8_t* __restrict__ v_cache, float* __restrict__ out) {
  MIMO_SHARED(shared);
  const int kv = blockIdx.x % KV, sequence = blockIdx.x / KV % B, tile = TILES - 1 - blockIdx.x / KV / B;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int start = pos[2 * sequence], valid = pos[2 * sequence + 1];
  // tokens of the block, and the positions that any of its rows sees
  const int first = tile * TILE / HEADS, last = min((tile * TILE + TILE - 1) / HEADS, valid - 1);
  const int end = last < first ? 0 : start + last + 1;
  int begin = max(0, start + valid - CAP);
  if (WINDOW > 0) begin = max(begin, start + first - WINDOW + 1);
  const int aligned = begin / 16 * 16;
  const int steps = end > begin ? (end - aligned + KEYS - 1) / KEYS : 0;
  const int row = tile * TILE + warp * 16, oldest = start + row / HEADS;
  const int newest = start + min((row + 15) / HEADS, valid - 1);

  const size_t cache = size_t(sequence * KV + kv) * (SLOTS / 16);
  uint8_t* queries = shared + STAGES * STAGE_BYTES + warp * float8::TERMS_BYTES<DK>;
  auto load = [&](int step) {
    if (step < steps) {
      const uint32_t stage = smem_address(shared) + step % STAGES * STAGE_BYTES;
#pragma unroll
      for (int i = 0; i < BLOCKS; ++i) {
        const int position = aligned + step * KEYS + i * 16, live = max(0, min(16, end - position));
        const size_t block = cache + (live ? position % SLOTS / 16 : 0);
        float8::copy_block<DK, WARPS * 32>(stage + i * float8::HELD<DK>, k_cache + block * float8::BLOCK<DK>,
                                           live, threadIdx.x);
        float8::copy_block<DW, WARPS * 32>(stage + K_BYTES + i * float8::HELD<DW>,
                                           v_cache + block * float8::BLOCK<DW>, live, threadIdx.x);
      }
    }
    cp_async_commit();
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) load(s);
  auto result = [&](int own) {  // a row's place among all tokens' heads
    return size_t(sequence * T + own / HEADS) * H + kv * HEADS + own % HEADS;
  };
  float8::put_terms<D, DK, 32>(queries, lane, [&](int i) -> const float* {
    return row + i < ROWS && (row + i) / HEADS < valid ? q + result(row + i) * D : nullptr;
  });

  const int at[2] = {start + (row + (lane >> 2)) / HEADS, start + (row + (lane >> 2) + 8) / HEADS};
  exact::Rows<DW> rows;
  rows.clear();
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<STAGES - 2>();
    block_sync();
    load(step + STAGES - 1);
    const uint8_t* keys = shared + step % STAGES * STAGE_BYTES;
#pragma unroll 1  // several at a time would fill the registers
    for (int block = 0; block < BLOCKS; ++block) {
      const int position = aligned + step * KEYS + block * 16;
      if (position > newest) break;
      if (WINDOW > 0 && position + 15 <= oldest - WINDOW) continue;
      const bool masked = position + 15 > oldest || (WINDOW > 0 && position <= newest - WINDOW);
      float8::attend<DK, DW>(rows, queries, keys + block * float8::HELD<DK>,
                             keys + K_BYTES + block * float8::HELD<DW>, SCALE, masked, [&](int half, int key) {
                               const int behind = at[half] - (position + key);
                               return behind >= 0 && (WINDOW == 0 || behind < WINDOW);
                             });
    }
  }
  cp_async_wait<0>();
  rows.settle();
  rows.close();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own = row + (lane >> 2) + 8 * half;
    if (own >= ROWS) continue;
    const float phantom = flash::sink_of<SINK>(sink, kv * HEADS + own % HEADS);
    float factor = flash::closing(rows.top[half], rows.sum[half], phantom).factor;
    if (at[half] - start >= valid) factor = 0.0f;
    flash::store_row<DV, DW>(out + result(own) * DV, rows, half, factor);
  }
}
