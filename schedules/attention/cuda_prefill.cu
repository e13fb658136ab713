// Attention of many tokens over a bfloat16 KV cache: warps have query rows, and share the keys of a block.
//
// A block has 16 rows (token, head of a KV head's group) for each warp and passes over the positions that any
// of them sees, KEYS at a time through STAGES stages in shared memory. Keys that no row of a warp sees are
// left out, and masks are looked at only where some row sees some of the keys. Blocks of the last tokens,
// which see most, come first. Constants: as in cuda_decode.cu, without PARTS and MERGE_THREADS, and B
// (sequences).
#include "flash.cuh"
#include "kv_slots.cuh"

constexpr int GROUP = H / KV, ROWS = T * GROUP, TILE = 16 * WARPS;
constexpr int TILES = (ROWS + TILE - 1) / TILE;
constexpr int K_BYTES = KEYS * flash::STRIDE<DK>, STAGE_BYTES = K_BYTES + KEYS * flash::STRIDE<DW>;

// Grid: KV heads of each sequence for each tile of rows, the last tile first.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
    attend(const float* __restrict__ q, const int* __restrict__ pos, const float* __restrict__ sink,
           const int* __restrict__ pages, const uint16_t* __restrict__ k_cache,
           const uint16_t* __restrict__ v_cache, float* __restrict__ out) {
  MIMO_SHARED(shared);
  const int kv = blockIdx.x % KV, sequence = blockIdx.x / KV % B, tile = TILES - 1 - blockIdx.x / KV / B;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int start = pos[2 * sequence], valid = pos[2 * sequence + 1];
  // tokens of the block and of the warp, and the positions that any row of the block sees
  const int first = tile * TILE / GROUP, last = min((tile * TILE + TILE - 1) / GROUP, valid - 1);
  const int end = last < first ? 0 : start + last + 1;
  int begin = max(0, start + valid - CAP);
  if (WINDOW > 0) begin = max(begin, start + first - WINDOW + 1);
  const int steps = end > begin ? (end - begin + KEYS - 1) / KEYS : 0;
  const int row = tile * TILE + warp * 16, oldest = start + row / GROUP;
  const int newest = start + min((row + 15) / GROUP, valid - 1);

  const size_t cache = size_t(PAGE ? kv : sequence * KV + kv) * SLOTS;
  const int* table = pages + size_t(sequence) * TABLE;
  const uint32_t base = smem_address(shared);
  auto load = [&](int step) {
    if (step < steps) {
      const uint32_t stage = base + step % STAGES * STAGE_BYTES;
      const int position = begin + step * KEYS;
      auto slot = [&](int key) {
        return position + key < end ? slot_of<CAP, 0, PAGE>(position + key, table) : -1;
      };
      flash::copy_rows<KEYS, DK, WARPS * 32>(stage, k_cache + cache * DK, slot);
      flash::copy_rows<KEYS, DW, WARPS * 32>(stage + K_BYTES, v_cache + cache * DW, slot);
    }
    cp_async_commit();
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) load(s);

  int at[2];     // positions of the lane's two rows
  size_t to[2];  // where their results begin
  int head[2];
  bool there[2];
  uint32_t queries[DK / 16][4];
  flash::load_queries<D, DK>(queries, [&](int half) -> const float* {
    const int own = row + (lane >> 2) + 8 * half, token = own / GROUP;
    at[half] = start + token;
    there[half] = own < ROWS;
    head[half] = kv * GROUP + own % GROUP;
    to[half] = size_t(sequence * T + token) * H + head[half];
    return own < ROWS && token < valid ? q + to[half] * D : nullptr;
  });
  flash::Rows<DW> rows;
  rows.clear();
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<STAGES - 2>();
    block_sync();
    load(step + STAGES - 1);
    const int position = begin + step * KEYS;
    if (position > newest || (WINDOW > 0 && position + KEYS - 1 <= oldest - WINDOW)) continue;
    const uint32_t keys = base + step % STAGES * STAGE_BYTES;
    const bool masked = position + KEYS - 1 > oldest || (WINDOW > 0 && position <= newest - WINDOW);
    flash::attend<KEYS, DK, DW>(rows, queries, keys, keys + K_BYTES, SCALE, masked, [&](int half, int key) {
      const int behind = at[half] - (position + key);
      return behind >= 0 && (WINDOW == 0 || behind < WINDOW);
    });
  }
  cp_async_wait<0>();
  rows.close();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!there[half]) continue;
    const float phantom = flash::sink_of<SINK>(sink, head[half]);
    float factor = flash::closing(rows.top[half], rows.sum[half], phantom).factor;
    if (at[half] - start >= valid) factor = 0.0f;
    flash::store_row<DV, DW>(out + to[half] * DV, rows, half, factor);
  }
}
