// Rows of a matrix times few rows of activations, without matrix units: codes (`codes.cuh`), or floats.
//
// A warp has ROWS rows. Its lanes hold 16 bytes of each (VECTOR columns), and pass over K in turns with the
// SPLIT - 1 other warps that have the same rows.
//
// DOT: x is int8, and four products are one dp4a. Sums stay integers for all columns that share both scales (RUN of
// them, in LANES neighbouring lanes), and are exact; they count FACTOR. Zero points (ZEROS; only where RUN is not 0)
// multiply the sum of the same columns of x, which is an integer, too.
//
// Else x is float32, and codes become float32, less their zero point. Float weights are widened.
//
// It reads the constants of the text that includes it: those of `codes.cuh`, ROWS, M (rows of x), SPLIT, UNROLL (turns
// whose loads may be on their way together), SCALE (of a stored scale), FACTOR, TOTAL (type of a sum over all
// columns), and for the preprocessor DOT, W_FLOAT, W_F16 (of 16 bits: float16, else bfloat16), ROUND_BF16 and
// ROUND_F16 (of x), ZEROS.
#pragma once
#include "matmul.cuh"
#include "scales.cuh"
#if !W_FLOAT
#include "codes.cuh"
#endif
#include "warp.cuh"

__device__ __forceinline__ uint32_t pick(const uint4& four, int i) {
  return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

#if DOT
#define X_PARAMETERS const int8_t *__restrict__ x, const float *__restrict__ x_scale
#define X_SCALE x_scale,
#define X x, x_scale
#else
#define X_PARAMETERS const float* __restrict__ x
#define X_SCALE
#define X x
#endif

// A matrix of K columns, K_PADDED with the padding; W_GROUP of them share a scale, X_GROUP one of x (0: all do).
template <int K, int K_PADDED, int W_GROUP, int X_GROUP>
struct Gemv {
  static constexpr int VECTOR = 128 / BITS, VECTORS = K_PADDED / VECTOR;
  static constexpr int WORD = 32 / BITS;  // columns in a word
  static constexpr int ROW_BYTES = K_PADDED * BITS / 8;
  static constexpr int ROW_COLUMNS = DOT ? K_PADDED : K;  // of a row of x
  static constexpr int W_GROUPS = W_GROUP ? matmul::up(K, W_GROUP) : 1, X_GROUPS = X_GROUP ? matmul::up(K, X_GROUP) : 1;

#if DOT
  static constexpr int RUN = !W_GROUP ? X_GROUP : !X_GROUP ? W_GROUP : W_GROUP < X_GROUP ? W_GROUP : X_GROUP;
  static constexpr int SEGMENTS = RUN && RUN < VECTOR ? VECTOR / RUN : 1;
  static constexpr int LANES = RUN > VECTOR ? RUN / VECTOR : 1;
#if ZEROS
  static_assert(RUN > 0 && RUN <= 256);  // see less_zero
#endif

  // Adds the products of a lane's columns to its totals: integers while no scale comes between.
  static __device__ __forceinline__ void accumulate(const uint4 (&w)[ROWS], Scales scale, const int8_t* x,
                                                    const float* x_scale, int vector, int row,
                                                    TOTAL (&total)[ROWS][M]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int segment = 0; segment < SEGMENTS; ++segment) {
      const int column = vector * VECTOR + segment * (VECTOR / SEGMENTS);
      int sum[ROWS][M] = {}, of_x[M] = {};
#pragma unroll
      for (int sixteen = 0; sixteen < VECTOR / 16 / SEGMENTS; ++sixteen) {
        uint4 q[M];
#pragma unroll
        for (int m = 0; m < M; ++m) {
          q[m] = make_uint4(0, 0, 0, 0);
          if (column < K_PADDED) q[m] = load16(x + size_t(m) * ROW_COLUMNS + column + 16 * sixteen);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = segment * (VECTOR / SEGMENTS) + 16 * sixteen + 4 * i;  // in the lane's columns
#if ZEROS
#pragma unroll
          for (int m = 0; m < M; ++m) of_x[m] = dp4a(0x01010101, int(pick(q[m], i)), of_x[m]);
#endif
#pragma unroll
          for (int r = 0; r < ROWS; ++r) {
            const int four = int(codes::bytes_of(pick(w[r], at / WORD), at % WORD / 4));
#pragma unroll
            for (int m = 0; m < M; ++m) sum[r][m] = dp4a(four, int(pick(q[m], i)), sum[r][m]);
          }
        }
      }
#if ZEROS
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int mask = 1; mask < LANES; mask <<= 1) of_x[m] += shfl_xor(of_x[m], mask);
      }
#endif
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
          int whole = sum[r][m];
          if (RUN == 0) {
            total[r][m] += TOTAL(whole);
            continue;
          }
#pragma unroll
          for (int mask = 1; mask < LANES; mask <<= 1) whole += shfl_xor(whole, mask);
          if (lane % LANES == 0 && column < K) {
            const size_t group = size_t(row + r) * W_GROUPS + (W_GROUP ? column / max(W_GROUP, 1) : 0);
            const int x_group = m * X_GROUPS + (X_GROUP ? column / max(X_GROUP, 1) : 0);
            const float both = scale_at(scale, group) * x_scale[x_group];
#if ZEROS
            total[r][m] += TOTAL(less_zero(whole, zero_at(scale, group), of_x[m]) * both);
#else
            total[r][m] += TOTAL(float(whole) * both);
#endif
          }
        }
      }
    }
  }

  // What a row's total is multiplied by: a power of two, and the scales where there is one of each for all columns.
  static __device__ __forceinline__ float finish(TOTAL sum, Scales scale, const float* x_scale, int row, int m) {
    const float value = float(sum) * FACTOR;
    return RUN == 0 ? value * (scale_at(scale, row) * x_scale[m]) : value;
  }

#else
  static constexpr int SEGMENTS = W_GROUP && W_GROUP < VECTOR ? VECTOR / W_GROUP : 1;

  // Four weights of a lane's 16 bytes, from column `at` of them on.
  static __device__ __forceinline__ float4 weights_at(const uint4& w, int at) {
#if W_FLOAT
    if constexpr (BITS == 32) {
      return make_float4(__uint_as_float(w.x), __uint_as_float(w.y), __uint_as_float(w.z), __uint_as_float(w.w));
    } else {
      const uint32_t low = pick(w, at / WORD), high = pick(w, at / WORD + 1);
#if W_F16
      return make_float4(f16_to_float(uint16_t(low)), f16_to_float(uint16_t(low >> 16)),
                         f16_to_float(uint16_t(high)), f16_to_float(uint16_t(high >> 16)));
#else
      return make_float4(bf16_low(low), bf16_high(low), bf16_low(high), bf16_high(high));
#endif
    }
#else
    return codes::floats_of(pick(w, at / WORD), at % WORD / 4);
#endif
  }

  // Four columns of a row of x, zero beyond K, rounded as the workload says.
  static __device__ __forceinline__ float4 four_of(const float* x, int column) {
    float v[4] = {};
    if constexpr (K % 4 == 0) {
      if (column < K) {
        const uint4 four = load16(x + column);
        v[0] = __uint_as_float(four.x), v[1] = __uint_as_float(four.y);
        v[2] = __uint_as_float(four.z), v[3] = __uint_as_float(four.w);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (column + i < K) v[i] = ld_global_nc(x + column + i);
      }
    }
#if ROUND_BF16
    const uint32_t low = matmul::pack_two<false>(v[0], v[1]), high = matmul::pack_two<false>(v[2], v[3]);
    return make_float4(bf16_low(low), bf16_high(low), bf16_low(high), bf16_high(high));
#elif ROUND_F16
    const uint32_t low = matmul::pack_two<true>(v[0], v[1]), high = matmul::pack_two<true>(v[2], v[3]);
    return make_float4(f16_to_float(uint16_t(low)), f16_to_float(uint16_t(low >> 16)),
                       f16_to_float(uint16_t(high)), f16_to_float(uint16_t(high >> 16)));
#else
    return make_float4(v[0], v[1], v[2], v[3]);
#endif
  }

  // Adds the products of a lane's columns to its totals, those of a group multiplied by its scale.
  static __device__ __forceinline__ void accumulate(const uint4 (&w)[ROWS], Scales scale, const float* x,
                                                    int vector, int row, float (&total)[ROWS][M]) {
#pragma unroll
    for (int segment = 0; segment < SEGMENTS; ++segment) {
      const int column = vector * VECTOR + segment * (VECTOR / SEGMENTS);
      float sum[ROWS][M] = {};
      const size_t group = size_t(row) * W_GROUPS + (W_GROUP ? column / max(W_GROUP, 1) : 0);  // of the first row
#if ZEROS
      float zero[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) zero[r] = column < K ? zero_at(scale, group + r * W_GROUPS) : 0.0f;
#endif
#pragma unroll
      for (int four = 0; four < VECTOR / 4 / SEGMENTS; ++four) {
        float4 v[M];
#pragma unroll
        for (int m = 0; m < M; ++m) v[m] = four_of(x + size_t(m) * ROW_COLUMNS, column + 4 * four);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          float4 a = weights_at(w[r], segment * (VECTOR / SEGMENTS) + 4 * four);
#if ZEROS
          a.x -= zero[r], a.y -= zero[r], a.z -= zero[r], a.w -= zero[r];
#endif
#pragma unroll
          for (int m = 0; m < M; ++m) {
            sum[r][m] = fmaf(a.x, v[m].x, sum[r][m]);
            sum[r][m] = fmaf(a.y, v[m].y, sum[r][m]);
            sum[r][m] = fmaf(a.z, v[m].z, sum[r][m]);
            sum[r][m] = fmaf(a.w, v[m].w, sum[r][m]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        float factor = 1.0f;
        if (W_GROUP) factor = column < K ? scale_at(scale, group + r * W_GROUPS) : 0.0f;
#pragma unroll
        for (int m = 0; m < M; ++m) total[r][m] = fmaf(sum[r][m], factor, total[r][m]);
      }
    }
  }

  static __device__ __forceinline__ float finish(float sum, Scales scale, int row, int m) {
#if W_FLOAT
    return FACTOR * sum;
#else
    return FACTOR * (W_GROUP ? sum : sum * scale_at(scale, row));
#endif
  }
#endif

  // Totals of a warp's rows, from `first` on, over the columns that are its share, `part` of SPLIT; all lanes get them.
  static __device__ __forceinline__ void pass(const uint8_t* w_rows, Scales scale, X_PARAMETERS, int first,
                                              int part, TOTAL (&total)[ROWS][M]) {
    const int lane = threadIdx.x % 32;
#pragma unroll UNROLL
    for (int base = 32 * part; base < VECTORS; base += 32 * SPLIT) {
      const int vector = base + lane;
      uint4 w[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        w[r] = make_uint4(0, 0, 0, 0);
        if (vector < VECTORS) w[r] = load16(w_rows + size_t(first + r) * ROW_BYTES + size_t(vector) * 16);
      }
      accumulate(w, scale, X, vector, first, total);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int mask = 16; mask > 0; mask >>= 1) total[r][m] += shfl_xor(total[r][m], mask);
      }
    }
  }
};
