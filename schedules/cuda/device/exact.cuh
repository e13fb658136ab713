// Attention of one warp's 16 query rows in which nothing is rounded more coarsely than float32.
//
// Matrix tiles take float32 numbers as sums of three of bfloat16 (24 bits); of the products those of the greatest
// terms are added up. Weights stay float32. Queries lie in shared memory, keys and values in device memory.
#pragma once
#include "flash.cuh"

namespace exact {

// Floats from one row of queries in shared memory to the next: two rows' lanes are then in different banks.
template <int DK> constexpr int QUERY_STRIDE = DK + 4;

// Puts 16 rows of queries into shared memory, zeros behind D and where `row(i)` is null.
template <int D, int DK, int THREADS, class Row>
__device__ __forceinline__ void put_queries(float* to, int thread, Row row) {
  for (int at = thread; at < 16 * DK; at += THREADS) {
    const float* from = row(at / DK);
    to[at / DK * QUERY_STRIDE<DK> + at % DK] = from != nullptr && at % DK < D ? from[at % DK] : 0.0f;
  }
}

template <int DW>
struct Rows : flash::Rows<DW> {
  // Before weights relative to a greater logit are added.
  __device__ __forceinline__ void shrink(int half, float by) {
    this->sum[half] *= by;
#pragma unroll
    for (int j = 0; j < DW / 8; ++j) {
      this->out[j][2 * half] *= by;
      this->out[j][2 * half + 1] *= by;
    }
  }

  // Once behind the last step: a NaN among the sums cannot be passed over.
  __device__ __forceinline__ void settle() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = this->sum[half];
      sum += shfl_xor(sum, 1);
      sum += shfl_xor(sum, 2);
      if (sum != sum) this->top[half] = fmaxf(this->top[half], -1e30f);
    }
  }
};

// Turns logits into float32 weights relative to the greatest logit of a row so far; rescales what the rows have.
template <int TILES, class AnyRows>
__device__ __forceinline__ void weigh(float (&x)[TILES][4], AnyRows& rows, float scale) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float most = -flash::infinity();
#pragma unroll
    for (int n = 0; n < TILES; ++n) most = fmaxf(most, fmaxf(x[n][2 * half], x[n][2 * half + 1]));
    most = fmaxf(most, shfl_xor(most, 1));
    most = fmaxf(most, shfl_xor(most, 2));
    most = fmaxf(rows.top[half], most * scale);
    const float base = most == -flash::infinity() ? 0.0f : most;
    rows.shrink(half, exp2_approx(rows.top[half] - base));
    rows.top[half] = most;
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float weight = exp2_approx(fmaf(x[n][2 * half + e], scale, -base));
        x[n][2 * half + e] = weight;
        rows.sum[half] += weight;
      }
    }
  }
}

// Two float32 numbers as sums of three of bfloat16, the greatest first.
__device__ __forceinline__ void split(uint32_t (&to)[3], float x, float y) {
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    to[i] = pack_bf16(x, y);
    x -= bf16_low(to[i]);
    y -= bf16_high(to[i]);
  }
}

// Adds the products of numbers in three terms to `small`, the greatest terms' to `sum` (which may be the same).
__device__ __forceinline__ void multiply(float (&sum)[4], float (&small)[4], const uint32_t (&a)[3][4],
                                         const uint32_t (&b)[2][3]) {
#pragma unroll
  for (int order = 2; order > 0; --order) {  // the least first
#pragma unroll
    for (int i = 0; i <= order; ++i) mma_bf16(small, a[i], b[0][order - i], b[1][order - i]);
  }
  mma_bf16(sum, a[0], b[0][0], b[1][0]);
}

// One step of online softmax over 16 keys and values of float32 in device memory. `key(i)` and `value(i)` are
// where they begin (multiples of 16 bytes), or null: zeros. `seen(half, i)`: as for flash::attend.
template <int DK, int DT, int DW, class AnyRows, class Key, class Value, class Seen>
__device__ __forceinline__ void attend_floats(AnyRows& rows, const float* queries, float scale, Key key,
                                              Value value, Seen seen) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  float logits[2][4] = {}, small[2][4] = {};
  const float* keys[2] = {key(g), key(8 + g)};
#pragma unroll
  for (int step = 0; step < DT / 16; ++step) {  // the lane has columns 4t ... 4t + 3
    uint32_t a[3][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 x =
          *reinterpret_cast<const float4*>(queries + (g + 8 * half) * QUERY_STRIDE<DK> + step * 16 + t * 4);
      uint32_t low[3], high[3];
      split(low, x.x, x.y);
      split(high, x.z, x.w);
#pragma unroll
      for (int i = 0; i < 3; ++i) a[i][half] = low[i], a[i][2 + half] = high[i];
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (keys[n] != nullptr) x = *reinterpret_cast<const float4*>(keys[n] + step * 16 + t * 4);
      uint32_t b[2][3];
      split(b[0], x.x, x.y);
      split(b[1], x.z, x.w);
      multiply(logits[n], small[n], a, b);
    }
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      logits[n][e] = seen(e / 2, n * 8 + t * 2 + e % 2) ? logits[n][e] + small[n][e] : -flash::infinity();
    }
  }
  weigh<2>(logits, rows, scale);
  uint32_t a[3][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // register i: row g + 8 (i % 2), keys 8 (i / 2) + 2t and the next
    uint32_t terms[3];
    split(terms, logits[i / 2][i % 2 * 2], logits[i / 2][i % 2 * 2 + 1]);
#pragma unroll
    for (int term = 0; term < 3; ++term) a[term][i] = terms[term];
  }
  const float* values[4] = {value(2 * t), value(2 * t + 1), value(2 * t + 8), value(2 * t + 9)};
#pragma unroll
  for (int j = 0; j < DW / 8; ++j) {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = values[i] != nullptr ? values[i][j * 8 + g] : 0.0f;
    uint32_t b[2][3];
    split(b[0], x[0], x[1]);
    split(b[1], x[2], x[3]);
    float sum[4] = {};
    multiply(sum, sum, a, b);
#pragma unroll
    for (int e = 0; e < 4; ++e) rows.out[j][e] += sum[e];
  }
}

}  // namespace exact
