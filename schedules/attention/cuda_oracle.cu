// Attention to all of a bfloat16 KV cache, and the largest probability in each block of keys.
//
// Warps have 16 rows (token, head of a KV head's group) and share the keys of a block, which may be a part of them.
// Logits are exact to float32: queries are sums of three numbers of bfloat16, in shared memory. Of each row and block of
// keys the largest logit is kept; once the softmax denominators are known, over all parts, a last launch makes
// probabilities of them, and takes the largest of a group's heads. Weights that multiply values are rounded to bfloat16
// and summed as rounded for `out`; the denominators of scores are sums of those that were not rounded.
// Constants: T, H, KV, D, DV, DK, DW, CAP (as in cuda_append.cu), SCALE (with log2(e)), BLOCK (positions), KEYS,
// STAGES, WARPS, PARTS, MERGE_THREADS.
#include "terms.cuh"

constexpr int GROUP = H / KV, ROWS = T * GROUP, HEIGHT = 16 * WARPS, TILES = (ROWS + HEIGHT - 1) / HEIGHT;
constexpr int BLOCKS = (CAP + BLOCK - 1) / BLOCK, STATE = 3;  // greatest logit, sums of rounded and of exact weights
constexpr int K_BYTES = KEYS * flash::STRIDE<DK>, STAGE_BYTES = K_BYTES + KEYS * flash::STRIDE<DW>;
constexpr int STEP = KEYS % 32 == 0 ? 32 : 16;  // keys that queries are loaded for once
static_assert(KEYS % BLOCK == 0 && BLOCK % 8 == 0);

// Logits of KEYS keys before scaling: `logits[n]` has keys 8n ... 8n + 7.
__device__ __forceinline__ void score_keys(float (&logits)[KEYS / 8][4], const uint8_t* queries, uint32_t keys) {
  const int lane = threadIdx.x & 31;
  const uint32_t mine = keys + ((lane & 7) + (lane >> 4) * 8) * flash::STRIDE<DK> + ((lane >> 3) & 1) * 16;
#pragma unroll
  for (int first = 0; first < KEYS; first += STEP) {
    float sums[STEP / 8][4] = {}, small[STEP / 8][4] = {};
#pragma unroll
    for (int step = 0; step < DK / 16; ++step) {
      uint32_t a[3][4];
      terms::load<DK>(a, queries, step);
#pragma unroll
      for (int n = 0; n < STEP / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4(b, mine + (first + n * 16) * flash::STRIDE<DK> + step * 32);
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          mma_bf16(small[2 * n + u], a[2], b[2 * u], b[2 * u + 1]);
          mma_bf16(small[2 * n + u], a[1], b[2 * u], b[2 * u + 1]);
          mma_bf16(sums[2 * n + u], a[0], b[2 * u], b[2 * u + 1]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < STEP / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) logits[first / 8 + n][e] = sums[n][e] + small[n][e];
    }
  }
}

// Turns logits into weights as flash::weigh does; `whole` has the sums of weights that are not rounded.
__device__ __forceinline__ void weigh(uint32_t (&weights)[KEYS / 16][4], flash::Rows<DW>& rows, float (&whole)[2],
                                      const float (&logits)[KEYS / 8][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float most = -flash::infinity();
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) most = fmaxf(most, fmaxf(logits[n][2 * half], logits[n][2 * half + 1]));
    most = fmaxf(most, shfl_xor(most, 1));
    most = fmaxf(most, shfl_xor(most, 2));
    most = fmaxf(rows.top[half], most * SCALE);
    const float base = most == -flash::infinity() ? 0.0f : most;
    const float shrink = exp2_approx(rows.top[half] - base);
    rows.top[half] = most;
    rows.sum[half] *= shrink;
    whole[half] *= shrink;
#pragma unroll
    for (int j = 0; j < DW / 8; ++j) {
      rows.out[j][2 * half] *= shrink;
      rows.out[j][2 * half + 1] *= shrink;
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
      const float low = exp2_approx(fmaf(logits[n][2 * half], SCALE, -base));
      const float high = exp2_approx(fmaf(logits[n][2 * half + 1], SCALE, -base));
      const uint32_t pair = pack_bf16(low, high);
      whole[half] += low + high;
      rows.sum[half] += bf16_low(pair) + bf16_high(pair);
      weights[n / 2][(n & 1) * 2 + half] = pair;
    }
  }
}

// Keeps the largest logit of each block of a step, of the lane's rows: `to(half)` is where a row's block number 0 is, or
// null.
template <class To>
__device__ __forceinline__ void note(const float (&logits)[KEYS / 8][4], int block, To to) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* row = to(half);
#pragma unroll
    for (int i = 0; i < KEYS / BLOCK; ++i) {
      float most = -flash::infinity();
#pragma unroll
      for (int n = i * (BLOCK / 8); n < (i + 1) * (BLOCK / 8); ++n) {
        most = fmaxf(most, fmaxf(logits[n][2 * half], logits[n][2 * half + 1]));
      }
      most = fmaxf(most, shfl_xor(most, 1));
      most = fmaxf(most, shfl_xor(most, 2));
      if ((threadIdx.x & 3) == 0 && row != nullptr && block + i < BLOCKS) row[block + i] = most;
    }
  }
}

// Grid: KV heads for each tile of rows, the last tile first; parts of the keys.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
    attend(const float* __restrict__ q, const int* __restrict__ pos, const uint16_t* __restrict__ k_cache,
           const uint16_t* __restrict__ v_cache, float* __restrict__ out, float* __restrict__ best,
           float* __restrict__ ends, float* __restrict__ parts, float* __restrict__ states) {
  MIMO_SHARED(shared);
  const int kv = blockIdx.x % KV, tile = TILES - 1 - blockIdx.x / KV, part = blockIdx.y;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int start = pos[0], valid = pos[1];
  const int first = tile * HEIGHT / GROUP, last = min((tile * HEIGHT + HEIGHT - 1) / GROUP, valid - 1);
  const int end = last < first ? 0 : start + last + 1, steps = (end + KEYS - 1) / KEYS;
  const int from = int((long long)steps * part / PARTS), to = int((long long)steps * (part + 1) / PARTS);
  const int row = tile * HEIGHT + warp * 16, oldest = start + row / GROUP;
  const int newest = start + min((row + 15) / GROUP, valid - 1);
  const uint32_t base = smem_address(shared);
  auto load = [&](int step) {
    if (step < to) {
      const uint32_t stage = base + step % STAGES * STAGE_BYTES;
      auto slot = [&](int key) { return step * KEYS + key < end ? step * KEYS + key : -1; };
      flash::copy_rows<KEYS, DK, WARPS * 32>(stage, k_cache + size_t(kv) * CAP * DK, slot);
      flash::copy_rows<KEYS, DW, WARPS * 32>(stage + K_BYTES, v_cache + size_t(kv) * CAP * DW, slot);
    }
    cp_async_commit();
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) load(from + s);

  auto result = [&](int own) { return size_t(own / GROUP) * H + kv * GROUP + own % GROUP; };
  uint8_t* queries = shared + STAGES * STAGE_BYTES + warp * terms::BYTES<DK>;
  const float* from_row[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own = row + (lane >> 2) + 8 * half;
    from_row[half] = own < ROWS && own / GROUP < valid ? q + result(own) * D : nullptr;
  }
  terms::put<DK>(queries, [&](int half, int column) {
    return from_row[half] != nullptr && column < D ? from_row[half][column] : 0.0f;
  });
  const int at[2] = {start + (row + (lane >> 2)) / GROUP, start + (row + (lane >> 2) + 8) / GROUP};
  flash::Rows<DW> rows;
  rows.clear();
  float whole[2] = {0.0f, 0.0f};
  for (int step = from; step < to; ++step) {
    cp_async_wait<STAGES - 2>();
    block_sync();
    load(step + STAGES - 1);
    const int position = step * KEYS;
    if (position > newest) continue;
    const uint32_t keys = base + step % STAGES * STAGE_BYTES;
    float logits[KEYS / 8][4];
    score_keys(logits, queries, keys);
    if (position + KEYS - 1 > oldest) {
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (position + n * 8 + (lane & 3) * 2 + (e & 1) > at[e >> 1]) logits[n][e] = -flash::infinity();
        }
      }
    }
    note(logits, position / BLOCK, [&](int half) -> float* {
      const int own = row + (lane >> 2) + 8 * half;
      return own < ROWS ? best + result(own) * BLOCKS : nullptr;
    });
    uint32_t weights[KEYS / 16][4];
    weigh(weights, rows, whole, logits);
    flash::add_values<KEYS, DW>(rows, weights, keys + K_BYTES);
  }
  cp_async_wait<0>();
  rows.close();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    whole[half] += shfl_xor(whole[half], 1);
    whole[half] += shfl_xor(whole[half], 2);
    const int own = row + (lane >> 2) + 8 * half;
    if (own >= ROWS) continue;
    const size_t place = result(own);
    if constexpr (PARTS > 1) {
      const size_t line = place * PARTS + part;
      if (rows.top[half] > -flash::infinity()) flash::store_row<DW, DW>(parts + line * DW, rows, half, 1.0f);
      if ((lane & 3) == 0) {
        states[line * STATE] = rows.top[half];
        states[line * STATE + 1] = rows.sum[half];
        states[line * STATE + 2] = whole[half];
      }
    } else {
      const bool there = at[half] - start < valid;
      const float factor = there ? flash::closing(rows.top[half], rows.sum[half], -flash::infinity()).factor : 0.0f;
      flash::store_row<DV, DW>(out + place * DV, rows, half, factor);
      if ((lane & 3) == 0) {
        ends[2 * place] = rows.top[half];
        ends[2 * place + 1] = whole[half];
      }
    }
  }
}

// Merges the parts of a token's head in their order. Grid: heads of all tokens.
extern "C" __global__ void __launch_bounds__(MERGE_THREADS)
    merge(const int* __restrict__ pos, const float* __restrict__ parts, const float* __restrict__ states,
          float* __restrict__ out, float* __restrict__ ends) {
  float* to = out + size_t(blockIdx.x) * DV;
  if (int(blockIdx.x) / H >= pos[1]) {
    for (int column = threadIdx.x; column < DV; column += MERGE_THREADS) to[column] = 0.0f;
    return;
  }
  const float* own = states + size_t(blockIdx.x) * PARTS * STATE;
  flash::merge_parts<PARTS, DV>(parts + size_t(blockIdx.x) * PARTS * DW, DW, own, STATE,
                                [&](int column, float value, float top, float sum) {
                                  to[column] = value * flash::closing(top, sum, -flash::infinity()).factor;
                                });
  if (threadIdx.x == 0) {
    float most = -flash::infinity(), sum = 0.0f;
    for (int s = 0; s < PARTS; ++s) most = fmaxf(most, own[s * STATE]);
    for (int s = 0; s < PARTS; ++s) sum += own[s * STATE + 2] * exp2f(own[s * STATE] - most);
    ends[2 * blockIdx.x] = most;
    ends[2 * blockIdx.x + 1] = sum;
  }
}

// Largest probabilities of a token's blocks over the heads of a group. Grid: KV heads of all tokens.
extern "C" __global__ void __launch_bounds__(MERGE_THREADS)
    finish(const int* __restrict__ pos, const float* __restrict__ best, const float* __restrict__ ends,
           float* __restrict__ score) {
  const int token = blockIdx.x / KV, seen = token < pos[1] ? (pos[0] + token) / BLOCK + 1 : 0;
  const size_t row = size_t(blockIdx.x) * GROUP;  // of the first of the group's heads
  for (int block = threadIdx.x; block < BLOCKS; block += MERGE_THREADS) {
    float most = -flash::infinity();
    for (int g = 0; block < seen && g < GROUP; ++g) {
      const float far = fminf(fmaf(best[(row + g) * BLOCKS + block], SCALE, -ends[2 * (row + g)]), 0.0f);
      most = fmaxf(most, exp2f(far) / ends[2 * (row + g) + 1]);
    }
    score[size_t(blockIdx.x) * BLOCKS + block] = most;
  }
}
