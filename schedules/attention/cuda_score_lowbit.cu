// Scores of blocks of keys for tiles of queries, from products of codes of a few bits (SALE).
//
// The first launch takes the mean off the keys and leaves their codes and scales, TILE at a time, and of each query head
// the products of its mean with them. In the second one a block has a head and a tile of queries, 16 of those that are
// estimated for each warp: it finds the logarithms of the denominators over the exact region (float32 numbers as sums of
// three of bfloat16), then passes over the codes of all keys between. Of a block of keys only the greatest estimate,
// relative to its query's denominator, is kept. Constants: T, H, KV, D, DK, CAP (as in cuda_append.cu), DEEP (channels of a
// key as codes), BLOCK (positions), LIST (queries of a tile), EVERY, FIRST, LAST, LEAST, SCALE (with log2(e)), TOP (the
// largest code), CODERS (threads of the first launch), STAGES, WARPS.
#include "int8.cuh"
#include "terms.cuh"

constexpr int GROUP = H / KV, TILES = (T + LIST - 1) / LIST, BLOCKS = (CAP + BLOCK - 1) / BLOCK;
constexpr int TILE = int8::TILE, CODED = (CAP + TILE - 1) / TILE, EACH = TILE / BLOCK;
constexpr int STAGE_BYTES = TILE * (DEEP + 8), QUERY_BYTES = int8::QUERY_BYTES<DEEP>, TERM_BYTES = terms::BYTES<DK>;
constexpr float MOST = 115.415603f;  // 80 log2(e): the largest weight's logarithm
static_assert(TILE % BLOCK == 0 && BLOCK % 8 == 0);

// Numbers of a key less the mean, from a column on; zeros behind its end, and where there is no key.
__device__ __forceinline__ float4 four_of(const uint16_t* keys, const float* mean, int key, int column) {
  float4 x = int8::four_of<DK>(keys, key, column);
  if (key < 0) return x;
  if (column < D) x.x -= mean[column];
  if (column + 1 < D) x.y -= mean[column + 1];
  if (column + 2 < D) x.z -= mean[column + 2];
  if (column + 3 < D) x.w -= mean[column + 3];
  return x;
}

__device__ __forceinline__ float2 two_of(const uint16_t* keys, const float* mean, int key, int column) {
  if (key < 0) return make_float2(0.0f, 0.0f);
  const uint32_t pair = ld_global_nc(reinterpret_cast<const uint32_t*>(keys + size_t(key) * DK + column));
  return make_float2(column < D ? bf16_low(pair) - mean[column] : 0.0f,
                     column + 1 < D ? bf16_high(pair) - mean[column + 1] : 0.0f);
}

// Grid: tiles of keys of each KV head.
extern "C" __global__ void __launch_bounds__(CODERS)
    make_codes(const int* __restrict__ pos, const float* __restrict__ q_mean, const float* __restrict__ k_mean,
               const uint16_t* __restrict__ k_cache, uint8_t* __restrict__ codes, float* __restrict__ scales,
               float* __restrict__ shifts) {
  MIMO_SHARED(shared);
  const int tile = blockIdx.x % CODED, kv = blockIdx.x / CODED, end = pos[0] + pos[1];
  if (end <= LEAST || tile * TILE >= end) return;
  const uint16_t* keys = k_cache + size_t(kv) * CAP * DK;
  const int lane = threadIdx.x % 32;
  int8::encode<DEEP, CODERS>(
      shared, TOP,
      [&](int slot, int column) {
        const int key = tile * TILE + slot;
        return four_of(keys, k_mean + kv * D, key < end ? key : -1, column);
      },
      [&](int slot, float most, const auto& x) {
        if (lane == 0) scales[size_t(blockIdx.x) * TILE + slot] = most / TOP;
        for (int g = 0; g < GROUP; ++g) {
          const float* mean = q_mean + (kv * GROUP + g) * D;
          float sum = 0.0f;
#pragma unroll
          for (int i = 0; i < (DEEP + 127) / 128; ++i) {
            const int column = (i * 32 + lane) * 4;
            if (column < D) sum = fmaf(mean[column], x[i].x, sum);
            if (column + 1 < D) sum = fmaf(mean[column + 1], x[i].y, sum);
            if (column + 2 < D) sum = fmaf(mean[column + 2], x[i].z, sum);
            if (column + 3 < D) sum = fmaf(mean[column + 3], x[i].w, sum);
          }
#pragma unroll
          for (int away = 16; away > 0; away /= 2) sum += shfl_xor(sum, away);
          if (lane == 0) shifts[(size_t(kv * GROUP + g) * CODED + tile) * TILE + slot] = sum * SCALE;
        }
      });
  block_sync();
  int8::put_keys<DEEP, CODERS>(codes + size_t(blockIdx.x) * TILE * DEEP, shared);
}

// Logits (base 2) of 16 keys, computed from what `load(key, column)` returns: `logits[n]` has keys 8n ... 8n + 7.
template <class Load>
__device__ __forceinline__ void exact_logits(float (&logits)[2][4], const uint8_t* queries, Load load) {
  const int lane = threadIdx.x & 31;
  float small[2][4] = {};
#pragma unroll
  for (int n = 0; n < 2; ++n) logits[n][0] = logits[n][1] = logits[n][2] = logits[n][3] = 0.0f;
  for (int step = 0; step < DK / 16; ++step) {
    uint32_t a[3][4];
    terms::load<DK>(a, queries, step);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      uint32_t b[2][3];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 x = load(n * 8 + (lane >> 2), step * 16 + i * 8 + (lane & 3) * 2);
        exact::split(b[i], x.x, x.y);
      }
      exact::multiply(logits[n], small[n], a, b);
    }
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) logits[n][e] = (logits[n][e] + small[n][e]) * SCALE;
  }
}

// Grid: heads for each tile of queries, the last tile first.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
    estimate(const float* __restrict__ q, const int* __restrict__ pos, const float* __restrict__ q_mean,
             const float* __restrict__ k_mean, const uint16_t* __restrict__ k_cache,
             const uint8_t* __restrict__ codes, const float* __restrict__ scales, const float* __restrict__ shifts,
             float* __restrict__ score) {
  MIMO_SHARED(shared);
  const int head = blockIdx.x % H, tile = TILES - 1 - blockIdx.x / H, kv = head / GROUP;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int start = pos[0], valid = pos[1], first = tile * LIST, last = min(first + LIST, valid) - 1;
  // blocks up to the tile's last query; those from `low` to `high` are estimated, the others are forced
  const int candidates = last >= first ? (start + last) / BLOCK + 1 : 0;
  const int low = FIRST, high = start + valid > LEAST ? (start + first) / BLOCK - LAST : -1;
  const bool some = candidates > 0 && high >= low;
  float* to = score + (size_t(tile) * H + head) * BLOCKS;
  for (int block = threadIdx.x; block < BLOCKS; block += WARPS * 32) {
    if (some && block >= low && block <= high) continue;
    to[block] = block < candidates ? flash::infinity() : -flash::infinity();
  }
  if (!some) return;

  const int from = low * BLOCK / TILE, steps = (high * BLOCK + BLOCK - 1) / TILE + 1;
  auto load = [&](int step) {
    if (step < steps) {
      const uint32_t stage = smem_address(shared + step % STAGES * STAGE_BYTES);
      const size_t place = size_t(kv) * CODED + step, own = size_t(head) * CODED + step;
      groups::copy_bytes<TILE * DEEP, WARPS * 32>(stage, codes + place * TILE * DEEP, threadIdx.x);
      groups::copy_bytes<4 * TILE, WARPS * 32>(
          stage + TILE * DEEP, reinterpret_cast<const uint8_t*>(scales + place * TILE), threadIdx.x);
      groups::copy_bytes<4 * TILE, WARPS * 32>(
          stage + TILE * (DEEP + 4), reinterpret_cast<const uint8_t*>(shifts + own * TILE), threadIdx.x);
    }
    cp_async_commit();
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) load(from + s);

  // the lane's two queries; each lane reads of them what it has written itself
  uint8_t* queries = shared + STAGES * STAGE_BYTES + warp * (QUERY_BYTES + TERM_BYTES);
  int at[2];
  const float* row[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own = (warp * 16 + (lane >> 2) + 8 * half) * EVERY, token = first + own;
    at[half] = own < LIST && token <= last ? start + token : -1;
    row[half] = at[half] >= 0 ? q + (size_t(token) * H + head) * D : nullptr;
  }
  const float* mean = q_mean + head * D;
  float unit[2];
  int8::put_queries<DEEP>(queries, unit, TOP, SCALE, [&](int half, int column) {
    return row[half] != nullptr && column < D ? row[half][column] - mean[column] : 0.0f;
  });
  terms::put<DK>(queries + QUERY_BYTES, [&](int half, int column) {
    return row[half] != nullptr && column < D ? row[half][column] : 0.0f;
  });

  // logarithms of denominators over the exact region: the first blocks, and those behind `high`
  const int begin = (high + 1) * BLOCK - FIRST * BLOCK, count = start + last + 1 - begin;
  auto position = [&](int key) { return key < FIRST * BLOCK ? key : begin + key; };
  float top[2] = {-flash::infinity(), -flash::infinity()}, sum[2] = {0.0f, 0.0f};
  for (int chunk = 0; chunk < count; chunk += 16) {
    float logits[2][4];
    exact_logits(logits, queries + QUERY_BYTES, [&](int key, int column) {
      const int there = chunk + key < count ? position(chunk + key) : -1;
      return two_of(k_cache + size_t(kv) * CAP * DK, k_mean + kv * D, there, column);
    });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = top[half], x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = chunk + i / 2 * 8 + (lane & 3) * 2 + i % 2;
        const bool seen = key < count && position(key) <= at[half];
        x[i] = seen ? logits[i / 2][2 * half + i % 2] : -flash::infinity();
        most = fmaxf(most, x[i]);
      }
      const float base = most == -flash::infinity() ? 0.0f : most;
      sum[half] *= exp2_approx(top[half] - base);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[half] += exp2_approx(x[i] - base);
      top[half] = most;
    }
  }
  float whole[2];  // of queries that do not count: infinite
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int away = 1; away < 4; away *= 2) {
      const float other = shfl_xor(top[half], away), most = fmaxf(top[half], other);
      const float base = most == -flash::infinity() ? 0.0f : most, more = shfl_xor(sum[half], away);
      // the same order in both lanes
      const float a = sum[half] * exp2_approx(top[half] - base), b = more * exp2_approx(other - base);
      sum[half] = a + b;
      top[half] = most;
    }
    whole[half] = at[half] >= 0 ? top[half] + log2f(sum[half]) : flash::infinity();
  }

  float* parts = reinterpret_cast<float*>(shared + STAGES * STAGE_BYTES + WARPS * (QUERY_BYTES + TERM_BYTES));
  for (int step = from; step < steps; ++step) {
    cp_async_wait<STAGES - 2>();
    block_sync();
    load(step + STAGES - 1);
    const uint8_t* stage = shared + step % STAGES * STAGE_BYTES;
    const float* own = reinterpret_cast<const float*>(stage + TILE * DEEP);
    float best[EACH], logits[TILE / 8][4];
#pragma unroll
    for (int i = 0; i < EACH; ++i) best[i] = -flash::infinity();
    int8::score<TILE, DEEP>(logits, queries, unit, smem_address(stage), own, [&](int n, float(&x)[4]) {
      const float2 shift = *reinterpret_cast<const float2*>(own + TILE + n * 8 + (lane & 3) * 2);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        best[n * 8 / BLOCK] = fmaxf(best[n * 8 / BLOCK], x[e] + (e % 2 ? shift.y : shift.x) - whole[e / 2]);
      }
    });
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
#pragma unroll
      for (int away = 16; away > 0; away /= 2) best[i] = fmaxf(best[i], shfl_xor(best[i], away));
      if (lane == 0) parts[warp * EACH + i] = best[i];
    }
    block_sync();
    for (int i = threadIdx.x; i < EACH; i += WARPS * 32) {
      const int block = step * EACH + i;
      float most = parts[i];
#pragma unroll
      for (int w = 1; w < WARPS; ++w) most = fmaxf(most, parts[w * EACH + i]);
      if (block >= low && block <= high) to[block] = exp2f(fminf(most, MOST));
    }
  }
  cp_async_wait<0>();
}
