// y [M, N] = x [M, K] * w [N, K]^T (+ bias) for few rows of x; weights are codes of 2, 4 or 8 bits.
//
// A warp has ROWS rows of w. Its lanes hold 16 bytes of each (VECTOR columns), and pass over K in turns with the
// SPLIT - 1 other warps that have the same rows. Codes are two's complement. Byte b of a word holds columns b,
// b + 4, b + 8, ... of the word's, from its lowest bits on: field f of all four bytes are columns 4f to 4f + 3.
//
// DOT: x is int8, and four products are one dp4a. A field is moved to the top of its byte, which is then
// the code times 2^(8 - BITS) without extending a sign. Sums stay integers for all columns that share both
// scales (RUN of them, in LANES neighbouring lanes), and are exact.
//
// Else x is float32. A field at bit p of a word is put among the mantissa's bits of 2^(23 - p), where its
// lowest bit weighs 1; less 2^(23 - p) the number is the code, exactly.
#include "matmul.cuh"
#include "warp.cuh"

constexpr int THREADS = 32 * WARPS * SPLIT;
constexpr int VECTOR = 128 / BITS;
constexpr int VECTORS = K_PADDED / VECTOR;
constexpr int WORD = 32 / BITS;  // columns in a word
constexpr int ROW_BYTES = K_PADDED * BITS / 8;
constexpr int W_GROUPS = W_GROUP ? matmul::up(K, W_GROUP) : 1;

__device__ __forceinline__ uint32_t pick(const uint4& four, int i) {
  return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

#if DOT
constexpr int X_GROUPS = X_GROUP ? matmul::up(K, X_GROUP) : 1;
constexpr int RUN = !W_GROUP ? X_GROUP : !X_GROUP ? W_GROUP : W_GROUP < X_GROUP ? W_GROUP : X_GROUP;
constexpr int SEGMENTS = RUN && RUN < VECTOR ? VECTOR / RUN : 1;
constexpr int LANES = RUN > VECTOR ? RUN / VECTOR : 1;
constexpr int QUANTIZE_THREADS = X_GROUP ? 32 : 256;
constexpr uint32_t TOP = (0xffu << (8 - BITS) & 0xffu) * 0x01010101u;

extern "C" __global__ void __launch_bounds__(QUANTIZE_THREADS)
    mpgemm_quantize(const float* x, int8_t* codes, float* scale) {
  MIMO_SHARED(smem);
  matmul::quantize<K, K_PADDED, X_GROUP, QUANTIZE_THREADS>(x, codes, scale,
                                                           reinterpret_cast<float*>(smem));
}

// Adds the products of a lane's columns to its totals: integers while no scale comes between.
__device__ __forceinline__ void accumulate(const uint4 (&w)[ROWS], const SCALE* scale, const int8_t* x,
                                           const float* x_scale, int vector, int row, TOTAL (&total)[ROWS][M]) {
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
        if (column < K_PADDED) q[m] = load16(x + size_t(m) * K_PADDED + column + 16 * sixteen);
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
          const float both = matmul::widen(scale[size_t(row + r) * W_GROUPS + (W_GROUP ? column / max(W_GROUP, 1) : 0)]) *
                             x_scale[m * X_GROUPS + (X_GROUP ? column / max(X_GROUP, 1) : 0)];
          total[r][m] += TOTAL(float(whole) * both);
        }
      }
    }
  }
}

__device__ __forceinline__ float finish(TOTAL sum, const SCALE* scale, const float* x_scale, int row, int m) {
  const float value = float(sum) * (1.0f / float(1 << (8 - BITS)));
  return RUN == 0 ? value * (matmul::widen(scale[row]) * x_scale[m]) : value;
}

#else
constexpr int SEGMENTS = W_GROUP && W_GROUP < VECTOR ? VECTOR / W_GROUP : 1;

// The code of BITS bits at bit p of a word, p + BITS <= 16.
__device__ __forceinline__ float code_at(uint32_t word, int p) {
  const uint32_t field = ((1u << BITS) - 1u) << p, middle = 1u << (BITS - 1 + p);
  const uint32_t one = uint32_t(150 - p) << 23;  // 2^(23 - p), whose bit p weighs 1
  const float shifted = __uint_as_float(lop3<0x6a>(word, field, one | middle));  // (word & field) ^ c
  return shifted - (float(1 << (23 - p)) + float(1 << (BITS - 1)));
}

// Four columns of a row of x, zero beyond K, rounded as the workload says.
__device__ __forceinline__ float4 four_of(const float* x, int column) {
  float v[4] = {};
#if ALIGNED
  if (column < K) {
    const uint4 four = load16(x + column);
    v[0] = __uint_as_float(four.x), v[1] = __uint_as_float(four.y);
    v[2] = __uint_as_float(four.z), v[3] = __uint_as_float(four.w);
  }
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + i < K) v[i] = ld_global_nc(x + column + i);
  }
#endif
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
__device__ __forceinline__ void accumulate(const uint4 (&w)[ROWS], const SCALE* scale, const float* x,
                                           int vector, int row, float (&total)[ROWS][M]) {
#pragma unroll
  for (int segment = 0; segment < SEGMENTS; ++segment) {
    const int column = vector * VECTOR + segment * (VECTOR / SEGMENTS);
    float sum[ROWS][M] = {};
#pragma unroll
    for (int four = 0; four < VECTOR / 4 / SEGMENTS; ++four) {
      float4 v[M];
#pragma unroll
      for (int m = 0; m < M; ++m) v[m] = four_of(x + size_t(m) * K, column + 4 * four);
      const int at = segment * (VECTOR / SEGMENTS) + 4 * four, p = BITS * (at % WORD / 4);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const uint32_t low = pick(w[r], at / WORD), high = low >> 16;
        const float a = code_at(low, p), b = code_at(low, p + 8), c = code_at(high, p), d = code_at(high, p + 8);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          sum[r][m] = fmaf(a, v[m].x, sum[r][m]);
          sum[r][m] = fmaf(b, v[m].y, sum[r][m]);
          sum[r][m] = fmaf(c, v[m].z, sum[r][m]);
          sum[r][m] = fmaf(d, v[m].w, sum[r][m]);
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

__device__ __forceinline__ float finish(float sum, const SCALE* scale, int row, int m) {
  return W_GROUP ? sum : sum * matmul::widen(scale[row]);
}
#endif

#if DOT
#define X_PARAMETERS const int8_t *__restrict__ x, const float *__restrict__ x_scale
#define X_SCALE x_scale,
#define X x, x_scale
#else
#define X_PARAMETERS const float* __restrict__ x
#define X_SCALE
#define X x
#endif
#if BIAS
#define BIAS_PARAMETER const float *__restrict__ bias,
#define BIAS_OF(row) bias[row]
#else
#define BIAS_PARAMETER
#define BIAS_OF(row) 0.0f
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    mpgemm_gemv(const uint8_t* __restrict__ codes, const SCALE* __restrict__ scale, X_PARAMETERS, BIAS_PARAMETER
                float* __restrict__ y) {
  MIMO_SHARED(smem);
  TOTAL* sums = reinterpret_cast<TOTAL*>(smem);  // [WARPS, SPLIT, ROWS, M]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % SPLIT;
  const int first = (blockIdx.x * WARPS + warp / SPLIT) * ROWS;
  TOTAL total[ROWS][M] = {};
  if (first < N) {  // rows are padded to a multiple of ROWS
#pragma unroll UNROLL
    for (int base = 32 * part; base < VECTORS; base += 32 * SPLIT) {
      const int vector = base + lane;
      uint4 w[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        w[r] = make_uint4(0, 0, 0, 0);
        if (vector < VECTORS) w[r] = load16(codes + size_t(first + r) * ROW_BYTES + size_t(vector) * 16);
      }
      accumulate(w, scale, X, vector, first, total);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int mask = 16; mask > 0; mask >>= 1) total[r][m] += shfl_xor(total[r][m], mask);
      if (lane == 0) sums[(warp * ROWS + r) * M + m] = total[r][m];
    }
  }
  block_sync();
  if (threadIdx.x < WARPS * ROWS * M) {
    const int team = threadIdx.x / (ROWS * M), which = threadIdx.x % (ROWS * M);
    const int row = (blockIdx.x * WARPS + team) * ROWS + which / M, m = which % M;
    TOTAL sum = 0;
#pragma unroll
    for (int p = 0; p < SPLIT; ++p) sum += sums[(team * SPLIT + p) * ROWS * M + which];
    if (row < N) y[size_t(m) * N + row] = finish(sum, scale, X_SCALE row, m) + BIAS_OF(row);
  }
}
