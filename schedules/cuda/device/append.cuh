// One step's rows of queries, keys and values: QK-norm and rotation, whatever the caches keep of them.
//
// A warp has one head of one token. Constants of a text: B, T, H, KV, D, DV, HALF (rotated pairs), NORM, EPS,
// GAIN (of values), WARPS.
#pragma once
#include "warp.cuh"

namespace append {

constexpr int HEADS = H + 2 * KV;
constexpr int WIDTH = (H + KV) * D + KV * DV;

// Column of a head whose row is normalised by `scale` (and `weight`) and then rotated by `turns`. What rotation
// takes from another lane's column is read again (from the first-level cache).
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

// Writes the queries. Of each key that is to be kept a warp calls `keep_key(sequence, head, position, number)`, of
// each value `keep_value`; `number(column)` are its numbers, zero behind the head's width.
template <class Key, class Value>
__device__ __forceinline__ void step(const float* qkv, const float* table, const int* pos, const float* q_norm,
                                     const float* k_norm, float* q, Key keep_key, Value keep_value) {
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
  const int position = pos[2 * sequence] + token, own = (head - H) % KV;
  if (head < H + KV) {
    x += head * D;
    const float scale = NORM ? norm_of(x) : 1.0f;
    keep_key(sequence, own, position, [&](int i) { return turned(x, k_norm, turns, scale, i); });
  } else {
    x += (H + KV) * D + own * DV;
    keep_value(sequence, own, position, [&](int i) { return i < DV ? x[i] * GAIN : 0.0f; });
  }
}

}  // namespace append
