// Attention of a few tokens over a bfloat16 KV cache: the keys are split over blocks, and over their warps.
//
// A block has 16 query rows (token, head of a KV head's group), and a part of the keys that they see. Of each
// stage of KEYS keys in shared memory every warp takes KEYS / WARPS, with a softmax of its own; at the end
// the warps, and in a second launch the parts, are merged in their order. Constants: T, H, KV, D, DV, DK,
// DW (widths of the caches' rows), CAP, SLOTS, PAGE, TABLE (see cuda_append.cu), WINDOW, SINK, SCALE (with
// log2(e)), KEYS, STAGES, WARPS, PARTS, MERGE_THREADS.
#include "flash.cuh"
#include "kv_slots.cuh"
#include "parts.cuh"

constexpr int GROUP = parts::HEADS, ROWS = parts::ROWS, TILES = parts::TILES;
constexpr int OWN = KEYS / WARPS;  // keys of a stage that a warp takes
constexpr int K_BYTES = KEYS * flash::STRIDE<DK>, STAGE_BYTES = K_BYTES + KEYS * flash::STRIDE<DW>;

// Grid: tiles of rows (of each KV head of each tile of each sequence), parts.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
    attend_part(const float* __restrict__ q, const int* __restrict__ pos, const float* __restrict__ sink,
                const int* __restrict__ pages, const uint16_t* __restrict__ k_cache,
                const uint16_t* __restrict__ v_cache, float* __restrict__ out, float* __restrict__ values,
                float* __restrict__ states) {
  MIMO_SHARED(shared);
  const int unit = blockIdx.x, part = blockIdx.y;
  const int kv = unit % KV, tile = unit / KV % TILES, sequence = unit / KV / TILES;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int start = pos[2 * sequence], valid = pos[2 * sequence + 1];
  // the tile's first and last token, and the positions that any of its rows sees
  const int first = tile * 16 / GROUP, last = min((tile * 16 + 15) / GROUP, valid - 1);
  const int end = last < first ? 0 : start + last + 1;
  int begin = max(0, start + valid - CAP);
  if (WINDOW > 0) begin = max(begin, start + first - WINDOW + 1);
  const int steps = end > begin ? (end - begin + KEYS - 1) / KEYS : 0;
  const int from = int((long long)steps * part / PARTS), to = int((long long)steps * (part + 1) / PARTS);

  const size_t cache = size_t(PAGE ? kv : sequence * KV + kv) * SLOTS;
  const int* table = pages + size_t(sequence) * TABLE;
  const uint32_t base = smem_address(shared);
  auto load = [&](int step) {
    if (step < to) {
      const uint32_t stage = base + step % STAGES * STAGE_BYTES;
      const int position = begin + step * KEYS;
      auto slot = [&](int row) {
        return position + row < end ? slot_of<CAP, 0, PAGE>(position + row, table) : -1;
      };
      flash::copy_rows<KEYS, DK, WARPS * 32>(stage, k_cache + cache * DK, slot);
      flash::copy_rows<KEYS, DW, WARPS * 32>(stage + K_BYTES, v_cache + cache * DW, slot);
    }
    cp_async_commit();
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) load(from + s);

  int at[2];  // positions of the lane's two rows
  uint32_t queries[DK / 16][4];
  flash::load_queries<D, DK>(queries, [&](int half) -> const float* {
    const int row = tile * 16 + (lane >> 2) + 8 * half, token = row / GROUP;
    at[half] = start + token;
    if (row >= ROWS || token >= valid) return nullptr;
    return q + (size_t(sequence * T + token) * H + kv * GROUP + row % GROUP) * D;
  });
  flash::Rows<DW> rows;
  rows.clear();
  for (int step = from; step < to; ++step) {
    cp_async_wait<STAGES - 2>();
    block_sync();
    load(step + STAGES - 1);
    const int position = begin + step * KEYS + warp * OWN;
    if (position >= end) continue;
    const uint32_t keys = base + step % STAGES * STAGE_BYTES + warp * OWN * flash::STRIDE<DK>;
    const uint32_t values = base + step % STAGES * STAGE_BYTES + K_BYTES + warp * OWN * flash::STRIDE<DW>;
    const bool masked =
        position + OWN - 1 > start + first || (WINDOW > 0 && position <= start + last - WINDOW);
    flash::attend<OWN, DK, DW>(rows, queries, keys, values, SCALE, masked, [&](int half, int key) {
      const int behind = at[half] - (position + key);
      return behind >= 0 && (WINDOW == 0 || behind < WINDOW);
    });
  }
  cp_async_wait<0>();
  block_sync();

  flash::merge_warps<WARPS, DW>(shared, rows, parts::Leave{sink, out, values, states, unit, part, valid});
}
