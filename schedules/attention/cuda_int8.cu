// Attention in int8 arithmetic over a bfloat16 KV cache: codes of what is seen, then warps with query rows.
//
// The first launch has a block for the keys, and unless HALF one for the values, of each tile of slots of each KV head:
// it leaves their codes and scales. In the second one a block has 16 rows (token, head of a KV head's group) for each
// warp and passes over the slots, KEYS at a time through STAGES stages in shared memory, in their order: those that
// hold no position that its rows see are left out. With HALF values are weighed as they are stored, by weights of
// bfloat16. Blocks of the last tokens come first. Constants: as in cuda_prefill.cu, and DEEP (channels of a key as
// codes), CODERS (threads of the first launch), HALF.
#include "int8.cuh"

constexpr int GROUP = H / KV, ROWS = T * GROUP, HEIGHT = 16 * WARPS, TILES = (ROWS + HEIGHT - 1) / HEIGHT;
constexpr int CODED = (CAP + int8::TILE - 1) / int8::TILE;  // tiles of slots
constexpr int K_BYTES = KEYS * DEEP, V_BYTES = HALF ? KEYS * flash::STRIDE<DW> : KEYS * DW;
constexpr int SCALES = HALF ? 1 : 3, STAGE_BYTES = K_BYTES + V_BYTES + SCALES * 4 * KEYS;
#if HALF
using VALUE = uint16_t;
#else
using VALUE = uint8_t;
static_assert(KEYS == int8::TILE);
#endif

// Grid: tiles of slots of each KV head of each sequence; keys, then values.
extern "C" __global__ void __launch_bounds__(CODERS)
    make_codes(const int* __restrict__ pos, const uint16_t* __restrict__ k_cache,
               const uint16_t* __restrict__ v_cache, uint8_t* __restrict__ k_codes, float* __restrict__ k_scale,
               uint8_t* __restrict__ v_codes, float* __restrict__ v_scale) {
  MIMO_SHARED(shared);
  const int tile = blockIdx.x % CODED, cache = blockIdx.x / CODED;
  const int start = pos[2 * (cache / KV)], end = start + pos[2 * (cache / KV) + 1];
  const int8::Places<CAP> places(end);
  const int low = WINDOW > 0 ? max(0, start - WINDOW + 1) : 0;
  if (end == start || !places.meets<int8::TILE>(tile * int8::TILE, low, end - 1)) return;
  auto place = [&](int slot) { return tile * int8::TILE + slot < places.slots() ? tile * int8::TILE + slot : -1; };
  const bool writes = threadIdx.x % 32 == 0;
  if (blockIdx.y == 0) {
    const uint16_t* rows = k_cache + size_t(cache) * CAP * DK;
    float* scales = k_scale + size_t(blockIdx.x) * int8::TILE;
    int8::encode<DEEP, CODERS>(
        shared, int8::MOST_CODE, [&](int slot, int column) { return int8::four_of<DK>(rows, place(slot), column); },
        [&](int slot, float most, const auto&) {
          if (writes) scales[slot] = int8::step_of(most, int8::MOST_CODE);
        });
    block_sync();
    int8::put_keys<DEEP, CODERS>(k_codes + size_t(blockIdx.x) * int8::TILE * DEEP, shared);
  }
#if !HALF
  if (blockIdx.y == 1) {
    const uint16_t* rows = v_cache + size_t(cache) * CAP * DW;
    float* logs = v_scale + size_t(blockIdx.x) * 2 * int8::TILE;
    int8::encode<DW, CODERS>(
        shared, int8::MOST_CODE, [&](int slot, int column) { return int8::four_of<DW>(rows, place(slot), column); },
        [&](int slot, float most, const auto&) {
          const float scale = fmaxf(most / int8::MOST_CODE, int8::LEAST);
          const bool there = place(slot) >= 0, finite = most < flash::infinity();
          if (writes) logs[slot] = !there ? 0.0f : finite ? log2f(scale) : int8::NOT_FINITE;
          if (writes) logs[int8::TILE + slot] = there && finite ? 1.0f / scale : 0.0f;
        });
    block_sync();
    int8::put_values<DW, CODERS>(v_codes + size_t(blockIdx.x) * int8::TILE * DW, shared);
  }
#endif
}

// Grid: KV heads of each sequence for each tile of rows, the last tile first.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
    attend(const float* __restrict__ q, const int* __restrict__ pos, const float* __restrict__ sink,
           const uint8_t* __restrict__ k_codes, const float* __restrict__ k_scale,
           const VALUE* __restrict__ values, const float* __restrict__ v_scale, float* __restrict__ out) {
  MIMO_SHARED(shared);
  const int kv = blockIdx.x % KV, sequence = blockIdx.x / KV % B, tile = TILES - 1 - blockIdx.x / KV / B;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int start = pos[2 * sequence], valid = pos[2 * sequence + 1];
  // the positions that any row of the block sees, and the tokens of the warp
  const int first = tile * HEIGHT / GROUP, last = min((tile * HEIGHT + HEIGHT - 1) / GROUP, valid - 1);
  const int low = WINDOW > 0 ? max(0, start + first - WINDOW + 1) : 0, high = last < first ? -1 : start + last;
  const int row = tile * HEIGHT + warp * 16, oldest = start + row / GROUP;
  const int newest = start + min((row + 15) / GROUP, valid - 1);
  const int own_low = WINDOW > 0 ? max(0, oldest - WINDOW + 1) : 0;
  const int all_low = WINDOW > 0 ? max(0, newest - WINDOW + 1) : 0;

  const int8::Places<CAP> places(start + valid);
  const int steps = (places.slots() + KEYS - 1) / KEYS;
  auto next = [&](int step) {
    while (step < steps && !places.meets<KEYS>(step * KEYS, low, high)) ++step;
    return step;
  };
  const size_t cache = size_t(sequence) * KV + kv;
  const size_t tiles = cache * CODED;
  auto load_keys = [&](int step, int turn) {  // and all scales
    if (step < steps) {
      const uint32_t stage = smem_address(shared + turn % STAGES * STAGE_BYTES), scales = stage + K_BYTES + V_BYTES;
      const int slot = step * KEYS;
      int8::copy_keys<KEYS, DEEP, WARPS * 32>(stage, k_codes + tiles * int8::TILE * DEEP, slot);
      groups::copy_bytes<4 * KEYS, WARPS * 32>(
          scales, reinterpret_cast<const uint8_t*>(k_scale + tiles * int8::TILE + slot), threadIdx.x);
#if !HALF
      groups::copy_bytes<8 * KEYS, WARPS * 32>(
          scales + 4 * KEYS, reinterpret_cast<const uint8_t*>(v_scale + (tiles + step) * 2 * KEYS), threadIdx.x);
#endif
    }
    cp_async_commit();
  };
  auto load_values = [&](int step, int turn) {
    if (step < steps) {
      const uint32_t stage = smem_address(shared + turn % STAGES * STAGE_BYTES + K_BYTES);
#if HALF
      flash::copy_rows<KEYS, DW, WARPS * 32>(stage, values + cache * CAP * DW, [&](int i) {
        return step * KEYS + i < places.slots() ? step * KEYS + i : -1;
      });
#else
      groups::copy_bytes<V_BYTES, WARPS * 32>(stage, values + (tiles + step) * V_BYTES, threadIdx.x);
#endif
    }
    cp_async_commit();
  };
  int ahead = next(0);
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    load_keys(ahead, s);
    load_values(ahead, s);
    ahead = next(ahead + 1);
  }

  auto result = [&](int own) {  // a row's place among all tokens' heads
    return size_t(sequence * T + own / GROUP) * H + kv * GROUP + own % GROUP;
  };
  // each lane reads what it has written itself
  uint8_t* queries = shared + STAGES * STAGE_BYTES + warp * int8::QUERY_BYTES<DEEP>;
  float unit[2];
  const float* from[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own = row + (lane >> 2) + 8 * half;
    from[half] = own < ROWS && own / GROUP < valid ? q + result(own) * D : nullptr;
  }
  int8::put_queries<DEEP>(queries, unit, int8::MOST_CODE, SCALE, [&](int half, int column) {
    return from[half] != nullptr && column < D ? from[half][column] : 0.0f;
  });
  const int at[2] = {start + (row + (lane >> 2)) / GROUP, start + (row + (lane >> 2) + 8) / GROUP};
  flash::Rows<DW> rows;
  rows.clear();
  int turn = 0;
  for (int step = next(0); step < steps; step = next(step + 1), ++turn) {
    const int slot = step * KEYS;
    const uint8_t* stage = shared + turn % STAGES * STAGE_BYTES;
    const float* scales = reinterpret_cast<const float*>(stage + K_BYTES + V_BYTES);
    const bool met = places.meets<KEYS>(slot, own_low, newest);
    const bool masked = !places.within<KEYS>(slot, all_low, oldest);
    auto hide = [&](int n, float(&logits)[4]) {
      if (masked) {
        int8::hide(n, logits, [&](int half, int key) {
          const int position = places.position(slot + key), behind = at[half] - position;
          return position >= 0 && behind >= 0 && (WINDOW == 0 || behind < WINDOW);
        });
      }
    };
#if HALF
    uint32_t weights[KEYS / 16][4];
#else
    uint32_t weights[KEYS / 32][4];
    float shrink[2], part[2];
#endif
    cp_async_wait<2 * STAGES - 3>();
    block_sync();
    load_keys(ahead, turn + STAGES - 1);
    if (met) {
      float logits[KEYS / 8][4];
#if HALF
      int8::score<KEYS, DEEP>(logits, queries, unit, smem_address(stage), scales, hide);
      flash::weigh<KEYS, DW>(weights, rows, logits, 1.0f);
#else
      int8::Largest largest;
      int8::score<KEYS, DEEP>(logits, queries, unit, smem_address(stage), scales, [&](int n, float(&own)[4]) {
        hide(n, own);
        largest.add(n, own, scales + KEYS);
      });
      largest.close();
      int8::weigh<DW>(weights, shrink, part, rows, logits, largest, scales + 2 * KEYS);
#endif
    }
    cp_async_wait<2 * STAGES - 3>();
    block_sync();
    load_values(ahead, turn + STAGES - 1);
    ahead = next(ahead + 1);
    if (met) {
#if HALF
      flash::add_values<KEYS, DW>(rows, weights, smem_address(stage + K_BYTES));
#else
      int8::add_values<DW>(rows, weights, shrink, part, smem_address(stage + K_BYTES));
#endif
    }
  }
  cp_async_wait<0>();
  rows.close();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own = row + (lane >> 2) + 8 * half;
    if (own >= ROWS) continue;
    const float phantom = flash::sink_of<SINK>(sink, kv * GROUP + own % GROUP);
    const float sum = rows.sum[half];
    // a row that sees nothing but NaN has no largest logit
    float factor = sum == sum ? flash::closing(rows.top[half], sum, phantom).factor : sum;
    if (at[half] - start >= valid) factor = 0.0f;
    flash::store_row<DV, DW>(out + result(own) * DV, rows, half, factor);
  }
}
