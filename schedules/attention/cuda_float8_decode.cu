// Attention of a few tokens over a KV cache of 8-bit floats: the keys are split over blocks, and over their warps.
//
// As cuda_decode.cu, but stages are whole blocks of 16 keys as they lie in the cache (float8.cuh), so that they
// begin at multiples of 16; keys before a row's window are masked. Constants: T, H, KV, D, DV, DK, DW,
// CAP, SLOTS, WINDOW, SINK, SCALE (with log2(e)), KEYS, STAGES, WARPS, PARTS, MERGE_THREADS.
#include "float8.cuh"
#include "parts.cuh"

constexpr int HEADS = parts::HEADS, TILES = parts::TILES, BLOCKS = KEYS / WARPS / 16;  // blocks of a warp
constexpr int K_BYTES = KEYS / 16 * float8::HELD<DK>, STAGE_BYTES = K_BYTES + KEYS / 16 * float8::HELD<DW>;

// Grid: tiles of rows (of each KV head of each tile of each sequence), parts.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
    attend_part(const float* __restrict__ q, const int* __restrict__ pos, const float* __restrict__ sink,
                const uint8_t* __restrict__ k_cache, const uint8_t* __restrict__ v_cache,
                float* __restrict__ out, float* __restrict__ values, float* __restrict__ states) {
  MIMO_SHARED(shared);
  const int unit = blockIdx.x, part = blockIdx.y;
  const int kv = unit % KV, tile = unit / KV % TILES, sequence = unit / KV / TILES;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int start = pos[2 * sequence], valid = pos[2 * sequence + 1];
  // the tile's first and last token, and the positions that any of its rows sees
  const int first = tile * 16 / HEADS, last = min((tile * 16 + 15) / HEADS, valid - 1);
  const int end = last < first ? 0 : start + last + 1;
  int begin = max(0, start + valid - CAP);
  if (WINDOW > 0) begin = max(begin, start + first - WINDOW + 1);
  const int aligned = begin / 16 * 16;
  const int steps = end > begin ? (end - aligned + KEYS - 1) / KEYS : 0;
  const int from = int((long long)steps * part / PARTS), to = int((long long)steps * (part + 1) / PARTS);

  const size_t cache = size_t(sequence * KV + kv) * (SLOTS / 16);
  uint8_t* queries = shared + STAGES * STAGE_BYTES;
  auto load = [&](int step) {
    if (step < to) {
      const uint32_t stage = smem_address(shared) + step % STAGES * STAGE_BYTES;
#pragma unroll
      for (int i = 0; i < KEYS / 16; ++i) {
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
  for (int s = 0; s < STAGES - 1; ++s) load(from + s);
  auto token_of = [&](int row) { return (tile * 16 + row) / HEADS; };
  float8::put_terms<D, DK, WARPS * 32>(queries, threadIdx.x, [&](int row) -> const float* {
    const int head = kv * HEADS + (tile * 16 + row) % HEADS, token = token_of(row);
    if (tile * 16 + row >= parts::ROWS || token >= valid) return nullptr;
    return q + (size_t(sequence * T + token) * H + head) * D;
  });

  const int at[2] = {start + token_of(lane >> 2), start + token_of((lane >> 2) + 8)};
  exact::Rows<DW> rows;
  rows.clear();
  for (int step = from; step < to; ++step) {
    cp_async_wait<STAGES - 2>();
    block_sync();
    load(step + STAGES - 1);
    const uint8_t* keys = shared + step % STAGES * STAGE_BYTES;
#pragma unroll 1  // several at a time would fill the registers
    for (int block = warp * BLOCKS; block < (warp + 1) * BLOCKS; ++block) {
      const int position = aligned + step * KEYS + block * 16;
      if (position >= end) break;
      const bool masked =
          position + 15 > start + first || (WINDOW > 0 && position <= start + last - WINDOW);
      float8::attend<DK, DW>(rows, queries, keys + block * float8::HELD<DK>,
                             keys + K_BYTES + block * float8::HELD<DW>, SCALE, masked, [&](int half, int key) {
                               const int behind = at[half] - (position + key);
                               return behind >= 0 && (WINDOW == 0 || behind < WINDOW);
                             });
    }
  }
  cp_async_wait<0>();
  rows.settle();
  block_sync();
  flash::merge_warps<WARPS, DW>(shared, rows, parts::Leave{sink, out, values, states, unit, part, valid});
}
