// Rows of a matrix times few rows of activations, without matrix units: codes of 2, 4 or 8 bits, or floats.
//
// A warp has ROWS rows. Its lanes hold 16 bytes of each (VECTOR columns), and pass over K in turns with the
// SPLIT - 1 other warps that have the same rows. Codes are two's complement. Byte b of a word holds columns b,
// b + 4, b + 8, ... of the word's, from its lowest bits on: field f of all four bytes are columns 4f to 4f + 3.
//
// DOT: x is int8, and four products are one dp4a. A field is moved to the top of its byte, which is then
// the code times 2^(8 - BITS) without extending a sign. Sums stay integers for all columns that share both
// scales (RUN of them, in LANES neighbouring lanes), and are exact.
//
// Else x is float32. A field at bit p of a word is put among the mantissa's bits of 2^(23 - p), where its
// lowest bit weighs 1; less 2^(23 - p) the number is the code, exactly. Float weights are widened.
//
// It reads the constants of the text that includes it: BITS, ROWS, M (rows of x), SPLIT, UNROLL (turns whose loads may
// be on their way together), SCALE (of a stored scale), TOTAL (type of a sum over all columns), and for the
// preprocessor DOT, W_FLOAT, W_F16 (of 16 bits: float16, else bfloat16), ROUND_BF16 and ROUND_F16 (of x).
#pragma once
#include "matmul.cuh"
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

  // Adds the products of a lane's columns to its totals: integers while no scale comes between.
  static __device__ __forceinline__ void accumulate(const uint4 (&w)[ROWS], const SCALE* scale, const int8_t* x,
                                                    const float* x_scale, int vector, int row,
                                                    TOTAL (&total)[ROWS][M]) {
    constexpr uint32_t TOP = (0xffu << (8 - BITS) & 0xffu) * 0x01010101u;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int segment = 0; segment < SEGMENTS; ++segment) {
      const int column = vector * VECTOR + segment * (VECTOR / SEGMENTS);
      int sum[ROWS][M] = {};
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
          const int shift = 8 - BITS - BITS * (at % WORD / 4);
#pragma unroll
          for (int r = 0; r < ROWS; ++r) {
            const int four = int(pick(w[r], at / WORD) << shift & TOP);
#pragma unroll
            for (int m = 0; m < M; ++m) sum[r][m] = dp4a(four, int(pick(q[m], i)), sum[r][m]);
          }
        }
      }
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
            const float both =
                matmul::widen(scale[size_t(row + r) * W_GROUPS + (W_GROUP ? column / max(W_GROUP, 1) : 0)]) *
                x_scale[m * X_GROUPS + (X_GROUP ? column / max(X_GROUP, 1) : 0)];
            total[r][m] += TOTAL(float(whole) * both);
          }
        }
      }
    }
  }

  // What a row's total is multiplied by: a power of two, and the scales where there is one of each for all columns.
  static __device__ __forceinline__ float finish(TOTAL sum, const SCALE* scale, const float* x_scale, int row, int m) {
    const float value = float(sum) * (1.0f / float(1 << (8 - BITS)));
    return RUN == 0 ? value * (matmul::widen(scale[row]) * x_scale[m]) : value;
  }

#else
  static constexpr int SEGMENTS = W_GROUP && W_GROUP < VECTOR ? VECTOR / W_GROUP : 1;

  // The code of BITS bits at bit p of a word, p + BITS <= 16.
  static __device__ __forceinline__ float code_at(uint32_t word, int p) {
    const uint32_t field = ((1u << BITS) - 1u) << p, middle = 1u << (BITS - 1 + p);
    const uint32_t one = uint32_t(150 - p) << 23;  // 2^(23 - p), whose bit p weighs 1
    const float shifted = __uint_as_float(lop3<0x6a>(word, field, one | middle));  // (word & field) ^ c
    return shifted - (float(1 << (23 - p)) + float(1 << (BITS - 1)));
  }

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
    const int p = BITS * (at % WORD / 4);
    const uint32_t low = pick(w, at / WORD), high = low >> 16;
    return make_float4(code_at(low, p), code_at(low, p + 8), code_at(high, p), code_at(high, p + 8));
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
  static __device__ __forceinline__ void accumulate(const uint4 (&w)[ROWS], const SCALE* scale, const float* x,
                                                    int vector, int row, float (&total)[ROWS][M]) {
#pragma unroll
    for (int segment = 0; segment < SEGMENTS; ++segment) {
      const int column = vector * VECTOR + segment * (VECTOR / SEGMENTS);
      float sum[ROWS][M] = {};
#pragma unroll
      for (int four = 0; four < VECTOR / 4 / SEGMENTS; ++four) {
        float4 v[M];
#pragma unroll
        for (int m = 0; m < M; ++m) v[m] = four_of(x + size_t(m) * ROW_COLUMNS, column + 4 * four);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const float4 a = weights_at(w[r], segment * (VECTOR / SEGMENTS) + 4 * four);
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
        if (W_GROUP) {
          factor = column < K ? matmul::widen(scale[size_t(row + r) * W_GROUPS + column / max(W_GROUP, 1)]) : 0.0f;
        }
#pragma unroll
        for (int m = 0; m < M; ++m) total[r][m] = fmaf(sum[r][m], factor, total[r][m]);
      }
    }
  }

  static __device__ __forceinline__ float finish(float sum, const SCALE* scale, int row, int m) {
#if W_FLOAT
    return sum;
#else
    return W_GROUP ? sum : sum * matmul::widen(scale[row]);
#endif
  }
#endif

  // Totals of a warp's rows, from `first` on, over the columns that are its share, `part` of SPLIT; all lanes get them.
  static __device__ __forceinline__ void pass(const uint8_t* w_rows, const SCALE* scale, X_PARAMETERS, int first,
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
