// One step's rows of queries, keys and values: QK-norm, rotation, and keys and values to their slots.
//
// A warp has one head of one token. Lanes have pairs of neighbouring columns, so that 32 lanes write 64
// columns of a cache's row at once; what rotation takes from another lane's column is read again (from the
// first-level cache). Constants: B, T, H, KV, D, DV, DK, DW (widths of the caches' rows), CAP, SLOTS (of all
// pages, else CAP), FIRST, PAGE, TABLE (entries of a sequence's table), HALF (rotated pairs), NORM, EPS, GAIN
// (of values), WARPS.
#include "kv_slots.cuh"
#include "warp.cuh"

constexpr int HEADS = H + 2 * KV;
constexpr int WIDTH = (H + KV) * D + KV * DV;

// Column of a head whose row is normalised by `scale` (and `weight`) and then rotated by `turns`.
__device__ __forceinline__ float turned(const float* x, const float* weight, const float* turns, float scale,
                                        int column) {
  auto value = [&](int i) { return NORM ? x[i] * scale * weight[i] : x[i]; };
  if (column >= D) return 0.0f;
  if (column >= 2 * HALF) return value(column);
  const bool low = column < HALF;
  const int pair = low ? column : column - HALF;
  const float a = value(pair), b = value(pair + HALF), cosine = turns[pair], sine = turns[HALF + pair];
  return low ? a * cosine - b * sine : b * cosine + a * sine;
}

// Factor of QK-norm of a head's row.
__device__ __forceinline__ float norm_of(const float* x) {
  float sum = 0.0f;
  for (int i = threadIdx.x & 31; i < D; i += 32) sum += x[i] * x[i];
#pragma unroll
  for (int away = 16; away > 0; away /= 2) sum += shfl_xor(sum, away);
  return 1.0f / sqrtf(sum / D + EPS);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    kv_append(const float* __restrict__ qkv, const float* __restrict__ table, const int* __restrict__ pos,
              const float* __restrict__ q_norm, const float* __restrict__ k_norm,
              const int* __restrict__ pages, uint16_t* __restrict__ k_cache, uint16_t* __restrict__ v_cache,
              float* __restrict__ q) {
  const int lane = threadIdx.x & 31;
  const int at = blockIdx.x * WARPS + (threadIdx.x >> 5), head = at % HEADS, row = at / HEADS;
  if (row >= B * T) return;
  const int sequence = row / T, token = row % T;
  const float* x = qkv + size_t(row) * WIDTH;
  const float* turns = table + size_t(row) * 2 * HALF;
  if (head < H) {
    x += head * D;
    const float scale = NORM ? norm_of(x) : 1.0f;
    float* to = q + (size_t(row) * H + head) * D;
    for (int i = lane; i < D; i += 32) to[i] = turned(x, q_norm, turns, scale, i);
    return;
  }
  if (token >= pos[2 * sequence + 1]) return;
  const int slot = slot_of<CAP, FIRST, PAGE>(pos[2 * sequence] + token, pages + size_t(sequence) * TABLE);
  const int own = (head - H) % KV;
  const size_t place = size_t(PAGE ? own : sequence * KV + own) * SLOTS + slot;
  if (head < H + KV) {
    x += head * D;
    const float scale = NORM ? norm_of(x) : 1.0f;
    uint32_t* to = reinterpret_cast<uint32_t*>(k_cache + place * DK);
    for (int i = lane; i < DK / 2; i += 32) {
      to[i] = pack_bf16(turned(x, k_norm, turns, scale, 2 * i), turned(x, k_norm, turns, scale, 2 * i + 1));
    }
  } else {
    x += (H + KV) * D + own * DV;
    uint32_t* to = reinterpret_cast<uint32_t*>(v_cache + place * DW);
    for (int i = lane; i < DW / 2; i += 32) {
      to[i] = pack_bf16(2 * i < DV ? x[2 * i] * GAIN : 0.0f, 2 * i + 1 < DV ? x[2 * i + 1] * GAIN : 0.0f);
    }
  }
}
