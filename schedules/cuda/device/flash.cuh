// Attention of one warp's 16 query rows by matrix tiles: scores, online softmax, values, merging.
//
// Fragments are those of m16n8k16: of 16 rows a lane has rows lane / 4 and lane / 4 + 8 ("its two rows").
// Keys and values lie in shared memory row by row, each row 16 bytes longer than its numbers: any eight rows
// that follow one another then begin in different banks, so ldmatrix meets no conflict. Logits are
// kept in base 2: the factor on q.k has log2(e) in it. Weights are rounded to bfloat16 and summed as rounded.
// Method: FlashAttention-2 (Dao, 2023), split over keys as in Flash-Decoding (Dao et al., 2023).
#pragma once
#include "async.cuh"
#include "mma.cuh"
#include "warp.cuh"

namespace flash {

constexpr float LN2 = 0.693147180559945f;
constexpr float LOG2E = 1.442695040888963f;

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

// Bytes from one row of WIDTH 16-bit numbers in shared memory to the next.
template <int WIDTH>
constexpr int STRIDE = 2 * WIDTH + 16;

// Copies ROWS rows of WIDTH numbers by all threads of a block, asynchronously. `slot(row)` is where a row
// lies in `from`; where it is negative, zeros are written instead.
template <int ROWS, int WIDTH, int THREADS, class Slot>
__device__ __forceinline__ void copy_rows(uint32_t to, const uint16_t* from, Slot slot) {
  constexpr int CHUNKS = WIDTH / 8;  // of 16 bytes
#pragma unroll
  for (int at = threadIdx.x; at < ROWS * CHUNKS; at += THREADS) {
    const int row = at / CHUNKS, chunk = at % CHUNKS;
    const int place = slot(row);
    const uint16_t* source = from + size_t(place < 0 ? 0 : place) * WIDTH + chunk * 8;
    cp_async16(to + row * STRIDE<WIDTH> + chunk * 16, source, place >= 0);
  }
}

// Left operands of a warp's 16 queries, rounded to bfloat16. `row(half)` is where the lane's row number
// `half` begins, D float32 numbers, or null: zeros.
template <int D, int WIDTH, class Row>
__device__ __forceinline__ void load_queries(uint32_t (&q)[WIDTH / 16][4], Row row) {
  const int lane = threadIdx.x & 31;
  const float* from[2] = {row(0), row(1)};
#pragma unroll
  for (int step = 0; step < WIDTH / 16; ++step) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const float* x = from[part & 1];
      const int column = step * 16 + (part >> 1) * 8 + (lane & 3) * 2;
      const float low = x != nullptr && column < D ? x[column] : 0.0f;
      const float high = x != nullptr && column + 1 < D ? x[column + 1] : 0.0f;
      q[step][part] = pack_bf16(low, high);
    }
  }
}

// What a warp knows of its 16 rows: weighted values, greatest logit so far, sum of weights below it. Each
// lane of a row has a sum of its own until `close`.
template <int WIDTH>
struct Rows {
  float out[WIDTH / 8][4];
  float top[2], sum[2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < WIDTH / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[j][e] = 0.0f;
    }
    top[0] = top[1] = -infinity();
    sum[0] = sum[1] = 0.0f;
  }

  __device__ __forceinline__ void close() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += shfl_xor(sum[half], 1);
      sum[half] += shfl_xor(sum[half], 2);
    }
  }
};

// Logits of KEYS keys before scaling: `logits[n]` has keys 8n ... 8n + 7.
template <int KEYS, int WIDTH>
__device__ __forceinline__ void score(float (&logits)[KEYS / 8][4], const uint32_t (&q)[WIDTH / 16][4],
                                      uint32_t keys) {
  const int lane = threadIdx.x & 31;
  const uint32_t mine = keys + ((lane & 7) + (lane >> 4) * 8) * STRIDE<WIDTH> + ((lane >> 3) & 1) * 16;
#pragma unroll
  for (int n = 0; n < KEYS / 8; ++n) logits[n][0] = logits[n][1] = logits[n][2] = logits[n][3] = 0.0f;
#pragma unroll
  for (int step = 0; step < WIDTH / 16; ++step) {
#pragma unroll
    for (int n = 0; n < KEYS / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4(b, mine + n * 16 * STRIDE<WIDTH> + step * 32);
      mma_bf16(logits[2 * n], q[step], b[0], b[1]);
      mma_bf16(logits[2 * n + 1], q[step], b[2], b[3]);
    }
  }
}

// Turns logits into weights relative to the greatest logit of a row so far, rounded; rescales what the rows have. A row
// that has seen nothing keeps weights of zero. `keep(n, half, pair)` gets those of the two keys in logits[n].
template <int KEYS, int WIDTH, class Keep>
__device__ __forceinline__ void weigh_pairs(Rows<WIDTH>& rows, const float (&logits)[KEYS / 8][4], float scale,
                                            Keep keep) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float most = -infinity();
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
      most = fmaxf(most, fmaxf(logits[n][2 * half], logits[n][2 * half + 1]));
    }
    most = fmaxf(most, shfl_xor(most, 1));
    most = fmaxf(most, shfl_xor(most, 2));
    most = fmaxf(rows.top[half], most * scale);
    const float base = most == -infinity() ? 0.0f : most;
    const float shrink = exp2_approx(rows.top[half] - base);
    rows.top[half] = most;
    rows.sum[half] *= shrink;
#pragma unroll
    for (int j = 0; j < WIDTH / 8; ++j) {
      rows.out[j][2 * half] *= shrink;
      rows.out[j][2 * half + 1] *= shrink;
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
      const uint32_t pair = pack_bf16(exp2_approx(fmaf(logits[n][2 * half], scale, -base)),
                                      exp2_approx(fmaf(logits[n][2 * half + 1], scale, -base)));
      rows.sum[half] += bf16_to_float(uint16_t(pair & 0xffff)) + bf16_to_float(uint16_t(pair >> 16));
      keep(n, half, pair);
    }
  }
}

// The same with the weights of pairs as left operands of `add_values`.
template <int KEYS, int WIDTH>
__device__ __forceinline__ void weigh(uint32_t (&weights)[KEYS / 16][4], Rows<WIDTH>& rows,
                                      const float (&logits)[KEYS / 8][4], float scale) {
  weigh_pairs<KEYS, WIDTH>(rows, logits, scale, [&](int n, int half, uint32_t pair) {
    weights[n / 2][(n & 1) * 2 + half] = pair;
  });
}

// Adds weighted values to the rows.
template <int KEYS, int WIDTH>
__device__ __forceinline__ void add_values(Rows<WIDTH>& rows, const uint32_t (&weights)[KEYS / 16][4],
                                           uint32_t values) {
  const int lane = threadIdx.x & 31;
  const uint32_t mine = values + (lane & 15) * STRIDE<WIDTH> + (lane >> 4) * 16;
#pragma unroll
  for (int n = 0; n < KEYS / 16; ++n) {
#pragma unroll
    for (int j = 0; j < WIDTH / 16; ++j) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, mine + n * 16 * STRIDE<WIDTH> + j * 32);
      mma_bf16(rows.out[2 * j], weights[n], b[0], b[1]);
      mma_bf16(rows.out[2 * j + 1], weights[n], b[2], b[3]);
    }
  }
}

// Takes the logits of keys out that the lane's rows do not see: `seen(half, key)`.
template <int KEYS, class Seen>
__device__ __forceinline__ void hide(float (&logits)[KEYS / 8][4], Seen seen) {
  const int column = (threadIdx.x & 3) * 2;
#pragma unroll
  for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (!seen(e >> 1, n * 8 + column + (e & 1))) logits[n][e] = -infinity();
    }
  }
}

// One step of online softmax: 16 rows of queries over KEYS keys in shared memory. With `masked`,
// `seen(half, key)` says whether the lane's row number `half` sees a key; else all do.
template <int KEYS, int DK, int DV, class Seen>
__device__ __forceinline__ void attend(Rows<DV>& rows, const uint32_t (&q)[DK / 16][4], uint32_t keys,
                                       uint32_t values, float scale, bool masked, Seen seen) {
  float logits[KEYS / 8][4];
  score<KEYS, DK>(logits, q, keys);
  if (masked) hide<KEYS>(logits, seen);
  uint32_t weights[KEYS / 16][4];
  weigh<KEYS, DV>(weights, rows, logits, scale);
  add_values<KEYS, DV>(rows, weights, values);
}

// Logit of the phantom key of a head, if there are such.
template <bool PHANTOM>
__device__ __forceinline__ float sink_of(const float* sink, int head) {
  return PHANTOM ? sink[head] * LOG2E : -infinity();
}

// What closes a row: the factor that turns weighted values into the result, and the logarithm (base 2) of
// the softmax denominator, a sink's share included. Nothing seen and no sink: 0 and -inf.
struct Closing {
  float factor, log_sum;
};

__device__ __forceinline__ Closing closing(float top, float sum, float sink) {
  const float most = fmaxf(top, sink);
  if (most == -infinity()) return {0.0f, -infinity()};
  const float own = exp2f(top - most), total = sum * own + exp2f(sink - most);
  return {own / total, most + log2f(total)};
}

// Writes row number `half` of a lane, times a factor, to `to`: its share of WIDTH columns, of which DV count. Rows
// that are no tokens have the factor 0, and may hold anything.
template <int DV, int WIDTH>
__device__ __forceinline__ void store_row(float* to, const Rows<WIDTH>& rows, int half, float factor) {
#pragma unroll
  for (int j = 0; j < WIDTH / 8; ++j) {
    const int column = j * 8 + (threadIdx.x & 3) * 2;
    const float low = factor == 0.0f ? 0.0f : rows.out[j][2 * half] * factor;
    const float high = factor == 0.0f ? 0.0f : rows.out[j][2 * half + 1] * factor;
    if (DV % 2 == 0 && column < DV) {
      *reinterpret_cast<float2*>(to + column) = make_float2(low, high);
    } else {
      if (column < DV) to[column] = low;
      if (column + 1 < DV) to[column + 1] = high;
    }
  }
}

// Floats from one row to the next while warps are merged: lanes of four rows then write to different banks.
template <int WIDTH>
constexpr int MERGE_STRIDE = WIDTH + 8;

// Merges the rows of all warps of a block, which saw different keys, in the order of the warps. All threads
// call it, behind a barrier since `shared` was last read; `finish(row, column, value, top, sum)` gets each
// element once.
template <int WARPS, int WIDTH, class Finish>
__device__ __forceinline__ void merge_warps(uint8_t* shared, Rows<WIDTH>& rows, Finish finish) {
  constexpr int STEP = MERGE_STRIDE<WIDTH>;
  float* parts = reinterpret_cast<float*>(shared);  // [WARPS][16][STEP], then top and sum [WARPS][16][2]
  float* states = parts + WARPS * 16 * STEP;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  rows.close();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * 16 + (lane >> 2) + 8 * half;
#pragma unroll
    for (int j = 0; j < WIDTH / 8; ++j) {
      float2* to = reinterpret_cast<float2*>(parts + row * STEP + j * 8 + (lane & 3) * 2);
      *to = make_float2(rows.out[j][2 * half], rows.out[j][2 * half + 1]);
    }
    if ((lane & 3) == 0) {
      states[2 * row] = rows.top[half];
      states[2 * row + 1] = rows.sum[half];
    }
  }
  block_sync();
  for (int at = threadIdx.x; at < 16 * WIDTH; at += WARPS * 32) {
    const int row = at / WIDTH, column = at % WIDTH;
    float most = -infinity(), sum = 0.0f, value = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) most = fmaxf(most, states[2 * (w * 16 + row)]);
    const float base = most == -infinity() ? 0.0f : most;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float share = exp2f(states[2 * (w * 16 + row)] - base);
      sum += states[2 * (w * 16 + row) + 1] * share;
      value += parts[(w * 16 + row) * STEP + column] * share;
    }
    finish(row, column, value, most, sum);
  }
}

// Merges the parts of a row's keys in their order, all threads of a block together. `parts`: values, a
// part every `part_step` floats; `states`: top and sum of each, a part every `state_step` floats. Values of
// parts without keys are not read. `finish(column, value, top, sum)` gets each element once.
template <int PARTS, int WIDTH, class Finish>
__device__ __forceinline__ void merge_parts(const float* parts, size_t part_step, const float* states,
                                            size_t state_step, Finish finish) {
  float most = -infinity(), sum = 0.0f;
  for (int s = 0; s < PARTS; ++s) most = fmaxf(most, states[s * state_step]);
  const float base = most == -infinity() ? 0.0f : most;
  for (int s = 0; s < PARTS; ++s) sum += states[s * state_step + 1] * exp2f(states[s * state_step] - base);
  for (int column = threadIdx.x; column < WIDTH; column += blockDim.x) {
    float value = 0.0f;
    for (int s = 0; s < PARTS; ++s) {
      const float share = exp2f(states[s * state_step] - base);
      if (share > 0.0f) value += parts[s * part_step + column] * share;
    }
    finish(column, value, most, sum);
  }
}

}  // namespace flash
