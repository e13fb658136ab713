// Attention of many tokens over a bfloat16 KV cache by wgmma, on tiles that TMA brings (sm_90a).
//
// A block has 64 rows (token, head of a KV head's group) for each of CONSUMERS groups of four warps; one thread of a
// further group asks for tiles of KEYS keys and of their values, through STAGES stages each. Queries lie in shared
// memory; logits, weights and sums in registers: weights are the left operand as they are, and values are read across
// their rows, so that nothing is transposed. With OVERLAP the weights of a tile are made while those of the one before
// are multiplied with their values.
//
// What a tile has beyond the positions that count is another sequence's, or was never written: keys are masked, values
// zeroed, since 0 * NaN is NaN. Tiles that no row of a group sees are only passed on. Blocks of the last tokens, which
// see most, come first. Constants: as in cuda_prefill.cu, but for WARPS and those of pages, and two counts of
// registers. Method: FlashAttention-3 (Shah et al., 2024).
#include "flash.cuh"
#include "key_tiles.cuh"

constexpr int GROUP = H / KV, ROWS = T * GROUP, TILE = 64 * CONSUMERS, TILES = (ROWS + TILE - 1) / TILE;
constexpr int K_PANELS = key_tiles::panels(DK), V_PANELS = key_tiles::panels(DW), SUMS = 64 * V_PANELS;
constexpr int EVERYONE = CONSUMERS + 1;  // barrier of all consumers; those of a group each have its number + 1
constexpr int Q_PANEL = 64 * 128;
using Keys = key_tiles::Ring<K_PANELS, KEYS, STAGES, 4 * CONSUMERS>;
using Values = key_tiles::Ring<V_PANELS, KEYS, STAGES, 4 * CONSUMERS>;

template <int N>
__device__ __forceinline__ float (&flat(float (&x)[N][4]))[4 * N] {
  return reinterpret_cast<float(&)[4 * N]>(x);
}

// Grid: KV heads of each sequence for each tile of rows, the last tile first.
extern "C" __global__ void __launch_bounds__(128 * CONSUMERS + 128, 1)
    attend(const float* __restrict__ q, const int* __restrict__ pos, const float* __restrict__ sink,
           const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
           float* __restrict__ out) {
  MIMO_SHARED(shared);
  uint8_t* k_stages = shared + CONSUMERS * K_PANELS * Q_PANEL;
  uint8_t* v_stages = k_stages + STAGES * Keys::BYTES;
  uint64_t* barriers = reinterpret_cast<uint64_t*>(v_stages + STAGES * Values::BYTES);
  Keys keys(k_stages, barriers);
  Values values(v_stages, barriers + 2 * STAGES);
  if (threadIdx.x == 0) fence_barrier_init();
  block_sync();

  const int kv = blockIdx.x % KV, sequence = blockIdx.x / KV % B, tile = TILES - 1 - blockIdx.x / KV / B;
  const int start = pos[2 * sequence], valid = pos[2 * sequence + 1];
  // tokens of the block, and the positions that any row of it sees
  const int first = tile * TILE / GROUP, last = min((tile * TILE + TILE - 1) / GROUP, valid - 1);
  int begin = max(0, start + valid - CAP);
  if (WINDOW > 0) begin = max(begin, start + first - WINDOW + 1);
  const key_tiles::Span<KEYS, CAP> span(begin, last < first ? 0 : start + last + 1);
  const int group = threadIdx.x / 128;
  if (group == CONSUMERS) {
    registers_decrease<PRODUCER_REGISTERS>();
    const int cache = (sequence * KV + kv) * SLOTS;
    for (int step = 0; threadIdx.x % 128 == 0 && step < span.steps; ++step) {
      keys.ask(&k_map, cache + span[step].slot);
      values.ask(&v_map, cache + span[step].slot);
    }
    return;
  }
  registers_increase<CONSUMER_REGISTERS>();
  uint8_t* queries = shared + group * K_PANELS * Q_PANEL;
  const int own = tile * TILE + group * 64;  // the group's first row
  auto result_of = [&](int row) { return size_t(sequence * T + row / GROUP) * H + kv * GROUP + row % GROUP; };
  key_tiles::put_rows<D, 128>(queries, [&](int row) -> const float* {
    return own + row < ROWS && (own + row) / GROUP < valid ? q + result_of(own + row) * D : nullptr;
  });
  fence_async_proxy();
  named_sync(group + 1, 128);

  // the tiles that some row of the group sees
  const int oldest = start + own / GROUP, newest = start + min((own + 63) / GROUP, valid - 1);
  int from = 0, until = newest < oldest ? 0 : span.steps;
  while (WINDOW > 0 && from < until && span[from].position + KEYS - 1 <= oldest - WINDOW) ++from;
  while (from < until && span[until - 1].position > newest) --until;
  auto values_of = [&](int step) {
    uint8_t* there = values.arrived();
    const int have = span[step].limit - span[step].position;
    if (have < KEYS) key_tiles::clear_rows<V_PANELS, KEYS, 128 * CONSUMERS>(there, have, EVERYONE);
    return there;
  };
  auto pass = [&](int step) {
    keys.arrived();
    keys.leave();
    values_of(step);
    values.leave();
  };
  for (int step = 0; step < from; ++step) pass(step);

  const int row = own + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;  // the lane's, and the one 8 behind it
  const int at[2] = {start + row / GROUP, start + (row + 8) / GROUP};
  flash::Rows<SUMS> rows;  // of which only the sums of values are used here
  flash::Rows<8> state;    // the rest, and a column of ones, whose sums are what the others are to be rescaled by
  rows.clear();
  state.clear();
  float logits[KEYS / 8][4];
  uint32_t weights[KEYS / 16][4];
  auto score = [&]() {
    const uint64_t a = wgmma_descriptor(queries), b = wgmma_descriptor(keys.arrived());
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < DK / 16; ++k) {
      const int panel = k / 4, more = k % 4 * 2;
      wgmma_bf16<KEYS>(flat(logits), a + panel * (Q_PANEL / 16) + more, b + panel * (Keys::PANEL / 16) + more, k > 0);
    }
    wgmma_commit();
  };
  // Logits become weights, in their place, rounded to what bfloat16 holds: while a product is under way, ptxas wants no
  // left operand written, not even the next product's.
  auto weigh = [&](int step) {
    wgmma_pin(flat(logits));
    keys.leave();
    const int position = span[step].position, limit = span[step].limit;
    if (min(limit, oldest + 1) < position + KEYS || (WINDOW > 0 && position <= newest - WINDOW)) {
      flash::hide<KEYS>(logits, [&](int half, int key) {
        const int behind = at[half] - (position + key);
        return behind >= 0 && (WINDOW == 0 || behind < WINDOW) && position + key < limit;
      });
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) state.out[0][e] = 1.0f;
    flash::weigh_pairs<KEYS, 8>(state, logits, SCALE, [&](int n, int half, uint32_t pair) {
      logits[n][2 * half] = bf16_to_float(uint16_t(pair & 0xffff));
      logits[n][2 * half + 1] = bf16_to_float(uint16_t(pair >> 16));
    });
  };
  auto take_weights = [&]() {
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        weights[n / 2][n % 2 * 2 + half] =
            prmt(__float_as_uint(logits[n][2 * half]), __float_as_uint(logits[n][2 * half + 1]), 0x7632);
      }
    }
  };
  auto rescale = [&]() {
#pragma unroll
    for (int j = 0; j < SUMS / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) rows.out[j][e] *= state.out[0][e];
    }
  };
  auto add = [&](const uint8_t* there) {
    const uint64_t b = wgmma_descriptor_across(there, Values::PANEL);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < KEYS / 16; ++k) wgmma_bf16_held<SUMS>(flat(rows.out), weights[k], b + k * 128, 1);
    wgmma_commit();
  };
  auto added = [&]() {
    wgmma_wait<0>();
    wgmma_pin(flat(rows.out));
#pragma unroll
    for (int k = 0; k < KEYS / 16; ++k) wgmma_pin(weights[k]);
    values.leave();
  };
  if (OVERLAP && from < until) {
    score();
    wgmma_wait<0>();
    weigh(from);
    take_weights();
    for (int step = from + 1; step < until; ++step) {
      const uint8_t* there = values_of(step - 1);
      score();
      add(there);
      wgmma_wait<1>();
      weigh(step);
      // ptxas moves what touches no memory behind the next wait, where nothing is under way: a store that depends on
      // all weights, and never happens, holds them here
      if (state.sum[0] + state.sum[1] < 0.0f) *reinterpret_cast<volatile float*>(shared) = 0.0f;
      added();
      rescale();
      take_weights();
    }
    add(values_of(until - 1));
    added();
  }
  for (int step = from; !OVERLAP && step < until; ++step) {
    score();
    wgmma_wait<0>();
    weigh(step);
    take_weights();
    rescale();
    add(values_of(step));
    added();
  }
  for (int step = until; step < span.steps; ++step) pass(step);

  state.close();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + 8 * half >= ROWS) continue;
    const float phantom = flash::sink_of<SINK>(sink, kv * GROUP + (row + 8 * half) % GROUP);
    float factor = flash::closing(state.top[half], state.sum[half], phantom).factor;
    if (at[half] - start >= valid) factor = 0.0f;
    flash::store_row<DV, SUMS>(out + result_of(row + 8 * half) * DV, rows, half, factor);
  }
}
