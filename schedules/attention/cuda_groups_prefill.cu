// Attention of many tokens over KV caches in groups of few bits: warps have query rows, and share a block's groups.
//
// A block has 16 rows (token, head of a KV head's group) for each warp and passes over the groups that any of them
// sees as codes, through STAGES stages in shared memory; then each warp goes over its own rows' float32 tail, 16
// positions at a time. Blocks of the last tokens, which see most, come first. Constants: as in
// cuda_groups_decode.cu, without PARTS and MERGE_THREADS, and B (sequences).
#include "groups.cuh"

constexpr int HEADS = H / KV, ROWS = T * HEADS, TILE = 16 * WARPS;
constexpr int TILES = (ROWS + TILE - 1) / TILE;
constexpr int STAGE_BYTES = groups::BYTES<BITS, DK, DW>, QUERY_FLOATS = 16 * exact::QUERY_STRIDE<DK>;

// Grid: KV heads of each sequence for each tile of rows, the last tile first.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
    attend(const float* __restrict__ q, const int* __restrict__ pos, const float* __restrict__ sink,
           const int* __restrict__ pages, const uint8_t* __restrict__ k_cache, const uint8_t* __restrict__ k_scale,
           const float* __restrict__ k_tail, const uint8_t* __restrict__ v_cache,
           const uint8_t* __restrict__ v_scale, const float* __restrict__ v_tail, float* __restrict__ out) {
  MIMO_SHARED(shared);
  const int kv = blockIdx.x % KV, sequence = blockIdx.x / KV % B, tile = TILES - 1 - blockIdx.x / KV / B;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int start = pos[2 * sequence], valid = pos[2 * sequence + 1];
  // tokens of the block; groups that any of its rows sees as codes
  const int first = tile * TILE / HEADS, last = min((tile * TILE + TILE - 1) / HEADS, valid - 1);
  const int count = last < first ? 0 : (start + last) / groups::SIZE;
  // positions of the warp's rows
  const int row = tile * TILE + warp * 16, oldest = start + row / HEADS;
  const int newest = start + min((row + 15) / HEADS, valid - 1);

  const int cache = sequence * KV + kv;
  const groups::Cache codes = {k_cache, k_scale, v_cache, v_scale};
  float* queries = reinterpret_cast<float*>(shared + STAGES * STAGE_BYTES) + warp * QUERY_FLOATS;
  auto load = [&](int group) {
    if (group < count) {
      const size_t place = groups::place_of<GROUPS, KV, PAGE>(sequence, kv, group, pages + size_t(sequence) * TABLE);
      groups::copy_group<BITS, DK, DW, WARPS * 32>(smem_address(shared + group % STAGES * STAGE_BYTES), codes,
                                                   place, threadIdx.x);
    }
    cp_async_commit();
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) load(s);
  auto result = [&](int own) {  // a row's place among all tokens' heads
    return size_t(sequence * T + own / HEADS) * H + kv * HEADS + own % HEADS;
  };
  exact::put_queries<D, DK, 32>(queries, lane, [&](int i) -> const float* {
    return row + i < ROWS && (row + i) / HEADS < valid ? q + result(row + i) * D : nullptr;
  });
  warp_sync();

  const int at[2] = {start + (row + (lane >> 2)) / HEADS, start + (row + (lane >> 2) + 8) / HEADS};
  groups::Rows<DW> rows;
  rows.clear();
  for (int group = 0; group < count; ++group) {
    cp_async_wait<STAGES - 2>();
    block_sync();
    load(group + STAGES - 1);
    if (group >= newest / groups::SIZE) continue;
    const bool seen[2] = {group < at[0] / groups::SIZE, group < at[1] / groups::SIZE};
    groups::attend<BITS, DK, DW, 2>(rows, queries, shared + group % STAGES * STAGE_BYTES, SCALE,
                                    group >= oldest / groups::SIZE, seen);
  }
  cp_async_wait<0>();

  for (int run = oldest / groups::SIZE * groups::SIZE; run <= newest; run += 16) {
    auto place = [&](int i) { return size_t(cache) * TAIL + (run + i) % TAIL; };
    exact::attend_floats<DK, DT, DW>(
        rows, queries, SCALE,
        [&](int i) -> const float* { return run + i <= newest ? k_tail + place(i) * DT : nullptr; },
        [&](int i) -> const float* { return run + i <= newest ? v_tail + place(i) * DW : nullptr; },
        [&](int half, int i) {
          return run + i <= at[half] && run + i >= at[half] / groups::SIZE * groups::SIZE;
        });
  }
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
