// What comes before and after the tiles of a matmul by matrix units: activations in the operand's type, and
// the last step of a sum with its scales and bias.
//
// It reads the constants of the text that includes it: M, N, K, ROW_BYTES (of x as an operand), ELEMENT (bytes of its
// element), SUM (type of a sum), SCALE (of a stored scale), SPLIT, FACTOR (of all sums), where INT8 X_GROUP (columns of x
// that share a scale; 0: all of a row), and for the preprocessor INT8, X_SCALED (x has a scale for each row), X_F16 (x is
// float16, else bfloat16), X_PERMUTED, W_SCALED (weights have a scale for each row), BIAS, SPLIT_K. Kernels take
// ENDS_PARAMETERS after their own parameters and hand them on as ENDS.
#pragma once
#include "matmul.cuh"
#include "warp.cuh"

constexpr int ENDS_THREADS = 256;
constexpr int K_PADDED = ROW_BYTES / ELEMENT;

#if X_SCALED
#define ENDS_X_PARAMETER , const float *__restrict__ x_scale
#define ENDS_X , x_scale
#else
#define ENDS_X_PARAMETER
#define ENDS_X
#endif
#if W_SCALED
#define ENDS_W_PARAMETER , const SCALE *__restrict__ w_scale
#define ENDS_W , w_scale
#else
#define ENDS_W_PARAMETER
#define ENDS_W
#endif
#if BIAS
#define ENDS_BIAS_PARAMETER , const float *__restrict__ bias
#define ENDS_BIAS , bias
#else
#define ENDS_BIAS_PARAMETER
#define ENDS_BIAS
#endif
#define ENDS_PARAMETERS ENDS_X_PARAMETER ENDS_W_PARAMETER ENDS_BIAS_PARAMETER
#define ENDS ENDS_X ENDS_W ENDS_BIAS

#if INT8
constexpr int QUANTIZE_THREADS = X_GROUP ? 32 : ENDS_THREADS;
extern "C" __global__ void __launch_bounds__(QUANTIZE_THREADS)
    mpgemm_prepare(const float* x, int8_t* codes, float* x_scale) {
  MIMO_SHARED(smem);
  matmul::quantize<K, K_PADDED, X_GROUP, QUANTIZE_THREADS>(x, codes, x_scale, reinterpret_cast<float*>(smem));
}
#else
extern "C" __global__ void __launch_bounds__(ENDS_THREADS) mpgemm_prepare(const float* x, uint16_t* rounded) {
  matmul::round_rows<M, K, K_PADDED, X_PERMUTED, X_F16, ENDS_THREADS>(x, rounded);
}
#endif

// An element of y of its sum. The column may be one beyond the last: what is returned then is not used.
__device__ __forceinline__ float finish(SUM sum, int row, int column ENDS_PARAMETERS) {
  float value = float(sum) * FACTOR;  // a power of two
  column = min(column, N - 1);
#if X_SCALED && W_SCALED
  value *= x_scale[row] * matmul::widen(w_scale[column]);
#elif X_SCALED
  value *= x_scale[row];
#elif W_SCALED
  value *= matmul::widen(w_scale[column]);
#endif
#if BIAS
  value += bias[column];
#endif
  return value;
}

#if SPLIT_K
using OUT = SUM;
extern "C" __global__ void __launch_bounds__(ENDS_THREADS)
    mpgemm_join(const SUM* __restrict__ parts, float* __restrict__ y ENDS_PARAMETERS) {
  const int index = blockIdx.x * ENDS_THREADS + threadIdx.x;
  if (index < M * N) {
    y[index] = finish(matmul::join<SPLIT, M, N>(parts, index), index / N, index % N ENDS);
  }
}
#else
using OUT = float;
#endif

// Writes what a lane has of a 16 x 8 fragment of sums: two columns each of two rows, eight apart. `out` is y, or
// where K is cut the sums of piece `piece`.
__device__ __forceinline__ void store_fragment(const SUM (&sum)[4], OUT* out, int piece, int row,
                                               int column ENDS_PARAMETERS) {
#pragma unroll
  for (int half = 0; half < 2; ++half, row += 8) {
    const SUM first = sum[2 * half], second = sum[2 * half + 1];
    if (row >= M) continue;
#if SPLIT_K
    matmul::store_two<N>(out + (size_t(piece) * M + row) * N, column, first, second);
#else
    matmul::store_two<N>(out + size_t(row) * N, column, finish(first, row, column ENDS),
                         finish(second, row, column + 1 ENDS));
#endif
  }
}
