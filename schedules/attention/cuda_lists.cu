// Attention over listed blocks of a bfloat16 KV cache: keys are gathered row by row, split over blocks.
//
// A block has 16 query rows (token, head) that share a list and a KV head, and a part of their keys: those
// of the list in its order, then the last positions. A row sees what is behind its own window through the
// list, and its window as such, so that each key counts once. Where the keys of a stage lie is looked up one
// stage before they are copied. Blocks may have any number of positions, single tokens too: each row is
// copied by itself. Constants: T, H, KV, HS, D, DV, DK, DW (widths of the caches' rows), CAP, SLOTS, FIRST,
// PAGE, TABLE (see cuda_append.cu), BLOCK, KMAX, LIST (tokens that share a list), WINDOW, SINK, SCALE (with
// log2(e)), KEYS, STAGES, WARPS, PARTS, MERGE_THREADS.
#include "flash.cuh"
#include "kv_slots.cuh"

constexpr int GROUPS = HS > KV ? HS : KV, GROUP = H / GROUPS;  // heads with one list and one KV head
constexpr int TOKENS = LIST < T ? LIST : T, LISTS = (T + LIST - 1) / LIST;
constexpr int ROWS = TOKENS * GROUP, TILES = (ROWS + 15) / 16;
constexpr int OWN = KEYS / WARPS;  // keys of a stage that a warp takes
constexpr int K_BYTES = KEYS * flash::STRIDE<DK>, STAGE_BYTES = K_BYTES + KEYS * flash::STRIDE<DW>;
constexpr int RING = STAGES + 1;  // stages whose places are known

// Grid: tiles of rows (of each group of each tile of each list), parts.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
    attend_lists(const float* __restrict__ q, const int* __restrict__ pos, const int* __restrict__ idx,
                 const int* __restrict__ cnt, const int* __restrict__ pages, const float* __restrict__ sink,
                 const uint16_t* __restrict__ k_cache, const uint16_t* __restrict__ v_cache,
                 float* __restrict__ out, float* __restrict__ lse, float* __restrict__ parts,
                 float* __restrict__ states) {
  MIMO_SHARED(shared);
  const int unit = blockIdx.x, part = blockIdx.y, row_list = unit / GROUPS / TILES;
  const int group = unit % GROUPS, tile = unit / GROUPS % TILES;
  const int list = row_list % LISTS, sequence = row_list / LISTS;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int start = pos[2 * sequence], valid = pos[2 * sequence + 1];
  // the tile's first and last token, and the positions that any of its rows sees
  const int first = list * LIST + tile * 16 / GROUP;
  const int last = min(list * LIST + min((tile * 16 + 15) / GROUP, TOKENS - 1), valid - 1);
  const int end = last < first ? 0 : start + last + 1;
  const int line = row_list * HS + group * HS / GROUPS;
  const int listed = end > 0 ? cnt[line] * BLOCK : 0;
  const int recent = WINDOW > 0 ? max(0, start + first - WINDOW + 1) : end;  // where the first window begins
  const int steps = (listed + max(end - recent, 0) + KEYS - 1) / KEYS;
  const int from = int((long long)steps * part / PARTS), to = int((long long)steps * (part + 1) / PARTS);

  const int* ids = idx + size_t(line) * KMAX;
  const size_t cache = ((PAGE ? 0 : size_t(sequence) * KV) + group * KV / GROUPS) * SLOTS;
  const int* table = pages + size_t(sequence) * TABLE;
  const uint32_t base = smem_address(shared);
  int* places = reinterpret_cast<int*>(shared + STAGES * STAGE_BYTES);  // [RING][2][KEYS]: positions, slots
  auto look_up = [&](int step) {
    int* to_ring = places + step % RING * 2 * KEYS;
    for (int row = threadIdx.x; step < to && row < KEYS; row += WARPS * 32) {
      const int at = step * KEYS + row;
      int position = recent + at - listed;
      if (at < listed) position = ids[at / BLOCK] * BLOCK + at % BLOCK;
      const bool there = position < end;
      to_ring[row] = there ? position : -1;
      to_ring[KEYS + row] = there ? slot_of<CAP, FIRST, PAGE>(position, table) : -1;
    }
  };
  auto load = [&](int step) {
    if (step < to) {
      const uint32_t stage = base + step % STAGES * STAGE_BYTES;
      const int* slots = places + step % RING * 2 * KEYS + KEYS;
      auto slot = [&](int row) { return slots[row]; };
      flash::copy_rows<KEYS, DK, WARPS * 32>(stage, k_cache + cache * DK, slot);
      flash::copy_rows<KEYS, DW, WARPS * 32>(stage + K_BYTES, v_cache + cache * DW, slot);
    }
    cp_async_commit();
  };
#pragma unroll
  for (int s = 0; s < STAGES; ++s) look_up(from + s);
  block_sync();
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) load(from + s);

  int at[2];  // positions of the lane's two rows
  uint32_t queries[DK / 16][4];
  flash::load_queries<D, DK>(queries, [&](int half) -> const float* {
    const int row = tile * 16 + (lane >> 2) + 8 * half, token = list * LIST + row / GROUP;
    at[half] = start + token;
    if (row >= ROWS || token >= min(valid, T)) return nullptr;
    return q + (size_t(sequence * T + token) * H + group * GROUP + row % GROUP) * D;
  });
  flash::Rows<DW> rows;
  rows.clear();
  for (int step = from; step < to; ++step) {
    cp_async_wait<STAGES - 2>();
    block_sync();
    load(step + STAGES - 1);
    look_up(step + STAGES);
    const int key_at = step * KEYS + warp * OWN;  // in the list
    const int* positions = places + step % RING * 2 * KEYS + warp * OWN;
    const uint32_t keys = base + step % STAGES * STAGE_BYTES + warp * OWN * flash::STRIDE<DK>;
    const uint32_t values = base + step % STAGES * STAGE_BYTES + K_BYTES + warp * OWN * flash::STRIDE<DW>;
    // listed positions ascend: where the last one is behind the first token's window, all are behind all
    const int newest = positions[OWN - 1];
    const bool masked = newest < 0 || newest > start + first - WINDOW;
    flash::attend<OWN, DK, DW>(rows, queries, keys, values, SCALE, masked, [&](int half, int key) {
      const int position = positions[key], behind = at[half] - position;
      const bool old = WINDOW == 0 || behind >= WINDOW;
      return position >= 0 && behind >= 0 && old == (key_at + key < listed);
    });
  }
  cp_async_wait<0>();
  block_sync();

  flash::merge_warps<WARPS, DW>(shared, rows, [&](int row, int column, float value, float top, float sum) {
    if constexpr (PARTS > 1) {
      const size_t place = (size_t(unit) * PARTS + part) * 16 + row;
      if (from < to) parts[place * DW + column] = value;
      if (column == 0) {
        states[2 * place] = top;
        states[2 * place + 1] = sum;
      }
    } else {
      const int r = tile * 16 + row, token = list * LIST + r / GROUP, head = group * GROUP + r % GROUP;
      if (r >= ROWS || token >= T || column >= DV) return;
      flash::Closing closed = {0.0f, -flash::infinity()};
      if (token < valid) closed = flash::closing(top, sum, flash::sink_of<SINK>(sink, head));
      const size_t place = size_t(sequence * T + token) * H + head;
      out[place * DV + column] = value * closed.factor;
      if (column == 0) lse[place] = closed.log_sum * flash::LN2;
    }
  });
}

// Merges the parts of a token's head. Grid: heads of all tokens.
extern "C" __global__ void __launch_bounds__(MERGE_THREADS)
    merge(const int* __restrict__ pos, const float* __restrict__ sink, const float* __restrict__ parts,
          const float* __restrict__ states, float* __restrict__ out, float* __restrict__ lse) {
  const int head = blockIdx.x % H, token = blockIdx.x / H % T, sequence = blockIdx.x / H / T;
  float* to = out + size_t(blockIdx.x) * DV;
  if (token >= pos[2 * sequence + 1]) {
    for (int column = threadIdx.x; column < DV; column += MERGE_THREADS) to[column] = 0.0f;
    if (threadIdx.x == 0) lse[blockIdx.x] = -flash::infinity();
    return;
  }
  const int row = token % LIST * GROUP + head % GROUP;
  const size_t line = size_t(sequence) * LISTS + token / LIST;
  const size_t place = ((line * TILES + row / 16) * GROUPS + head / GROUP) * PARTS * 16 + row % 16;
  const float phantom = flash::sink_of<SINK>(sink, head);
  flash::merge_parts<PARTS, DV>(parts + place * DW, 16 * DW, states + 2 * place, 32,
                                [&](int column, float value, float top, float sum) {
                                  const flash::Closing closed = flash::closing(top, sum, phantom);
                                  to[column] = value * closed.factor;
                                  if (column == 0) lse[blockIdx.x] = closed.log_sum * flash::LN2;
                                });
}
