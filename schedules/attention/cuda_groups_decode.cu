// Attention of a few tokens over KV caches in groups of few bits: groups are split over blocks and their warps.
//
// A block has 16 query rows (token, head of a KV head's group), and a part of the groups that they see as codes:
// its warps take them in turn, each through STAGES stages of its own in shared memory. The float32 tail is cut
// into runs of 16 positions, which go to the warps of all parts, from the last. At the end the warps, and in a
// second launch the parts, are merged in their order. Constants: T, H, KV, D, DV, DK, DT, DW (columns of keys as
// codes, of keys in the tail, of values), BITS, GROUPS (of each KV head in the cache or the pool), PAGE
// and TABLE (see kv_slots.cuh), TAIL, SINK, SCALE (with log2(e)), STAGES, WARPS, PARTS,
// MERGE_THREADS.
#include "groups.cuh"
#include "parts.cuh"

constexpr int HALVES = parts::ROWS > 8 ? 2 : 1;
constexpr int STAGE_BYTES = groups::BYTES<BITS, DK, DW>;

// Grid: tiles of rows (of each KV head of each tile of each sequence), parts.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
    attend_part(const float* __restrict__ q, const int* __restrict__ pos, const float* __restrict__ sink,
                const int* __restrict__ pages,
                const uint8_t* __restrict__ k_cache, const uint8_t* __restrict__ k_scale,
                const float* __restrict__ k_tail, const uint8_t* __restrict__ v_cache,
                const uint8_t* __restrict__ v_scale, const float* __restrict__ v_tail, float* __restrict__ out,
                float* __restrict__ values, float* __restrict__ states) {
  using parts::HEADS;
  MIMO_SHARED(shared);
  const int unit = blockIdx.x, part = blockIdx.y;
  const int kv = unit % KV, tile = unit / KV % parts::TILES, sequence = unit / KV / parts::TILES;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int start = pos[2 * sequence], valid = pos[2 * sequence + 1];
  // the tile's first and last token, groups that any of its rows sees as codes, where its tail begins and ends
  const int first = tile * 16 / HEADS, last = min((tile * 16 + 15) / HEADS, valid - 1);
  const int count = last < first ? 0 : (start + last) / groups::SIZE;
  const int from = int((long long)count * part / PARTS), to = int((long long)count * (part + 1) / PARTS);
  const int own = (start + first) / groups::SIZE, end = last < first ? 0 : start + last + 1;

  const int cache = sequence * KV + kv;
  const groups::Cache codes = {k_cache, k_scale, v_cache, v_scale};
  uint8_t* stages = shared + warp * STAGES * STAGE_BYTES;
  float* queries = reinterpret_cast<float*>(shared + WARPS * STAGES * STAGE_BYTES);
  auto load = [&](int i) {  // the warp's group number i
    const int group = from + warp + i * WARPS;
    if (group < to) {
      const size_t place = groups::place_of<GROUPS, KV, PAGE>(sequence, kv, group, pages + size_t(sequence) * TABLE);
      groups::copy_group<BITS, DK, DW, 32>(smem_address(stages + i % STAGES * STAGE_BYTES), codes, place, lane);
    }
    cp_async_commit();
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) load(s);
  auto token_of = [&](int row) { return (tile * 16 + row) / HEADS; };
  exact::put_queries<D, DK, WARPS * 32>(queries, threadIdx.x, [&](int row) -> const float* {
    const int head = kv * HEADS + (tile * 16 + row) % HEADS, token = token_of(row);
    if (tile * 16 + row >= parts::ROWS || token >= valid) return nullptr;
    return q + (size_t(sequence * T + token) * H + head) * D;
  });
  block_sync();

  const int at[2] = {start + token_of(lane >> 2), start + token_of((lane >> 2) + 8)};
  groups::Rows<DW> rows;
  rows.clear();
  for (int i = 0; from + warp + i * WARPS < to; ++i) {
    const int group = from + warp + i * WARPS;
    cp_async_wait<STAGES - 2>();
    warp_sync();
    load(i + STAGES - 1);
    const bool seen[2] = {group < at[0] / groups::SIZE, group < at[1] / groups::SIZE};
    groups::attend<BITS, DK, DW, HALVES>(rows, queries, stages + i % STAGES * STAGE_BYTES, SCALE, group >= own,
                                         seen);
  }
  cp_async_wait<0>();

  const int workers = PARTS * WARPS, worker = part * WARPS + warp;
  for (int run = own * groups::SIZE + (workers - 1 - worker) * 16; run < end; run += workers * 16) {
    auto place = [&](int i) { return size_t(cache) * TAIL + (run + i) % TAIL; };
    exact::attend_floats<DK, DT, DW>(
        rows, queries, SCALE,
        [&](int i) -> const float* { return run + i < end ? k_tail + place(i) * DT : nullptr; },
        [&](int i) -> const float* { return run + i < end ? v_tail + place(i) * DW : nullptr; },
        [&](int half, int i) {
          return run + i <= at[half] && run + i >= at[half] / groups::SIZE * groups::SIZE;
        });
  }
  rows.settle();
  block_sync();
  flash::merge_warps<WARPS, DW>(shared, rows, parts::Leave{sink, out, values, states, unit, part, valid});
}
