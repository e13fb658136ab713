// y [TOKENS, N] = x [TOKENS, K] * w [N, K]^T (+ bias) without matrix units; weights are codes or floats (`gemv.cuh`).
// A block has M tokens.
//
// DOT: a first launch quantises x to int8.
#include "gemv.cuh"

using Rows = Gemv<K, K_PADDED, W_GROUP, X_GROUP>;
constexpr int THREADS = 32 * WARPS * SPLIT;

#if DOT
constexpr int QUANTIZE_THREADS = X_GROUP ? 32 : 256;

extern "C" __global__ void __launch_bounds__(QUANTIZE_THREADS)
    mpgemm_quantize(const float* x, int8_t* codes, float* scale) {
  MIMO_SHARED(smem);
  matmul::quantize<K, K_PADDED, X_GROUP, QUANTIZE_THREADS>(x, codes, scale,
                                                           reinterpret_cast<float*>(smem));
}
#endif

#if BIAS
#define BIAS_PARAMETER const float *__restrict__ bias,
#define BIAS_OF(row) bias[row]
#else
#define BIAS_PARAMETER
#define BIAS_OF(row) 0.0f
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    mpgemm_gemv(const uint8_t* __restrict__ w, SCALES_PARAMETERS, X_PARAMETERS, BIAS_PARAMETER
                float* __restrict__ y) {
  // the last block may begin among the tokens of the one before
  const int token = min(int(blockIdx.y) * M, TOKENS - M);
  x += size_t(token) * Rows::ROW_COLUMNS;
#if DOT
  x_scale += token * Rows::X_GROUPS;
#endif
  MIMO_SHARED(smem);
  TOTAL* sums = reinterpret_cast<TOTAL*>(smem);  // [WARPS, SPLIT, ROWS, M]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % SPLIT;
  const int first = (blockIdx.x * WARPS + warp / SPLIT) * ROWS;
  TOTAL total[ROWS][M] = {};
  if (first < N) Rows::pass(w, SCALES, X, first, part, total);  // rows are padded to a multiple of ROWS
  if (lane == 0) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int m = 0; m < M; ++m) sums[(warp * ROWS + r) * M + m] = total[r][m];
    }
  }
  block_sync();
  if (threadIdx.x < WARPS * ROWS * M) {
    const int team = threadIdx.x / (ROWS * M), which = threadIdx.x % (ROWS * M);
    const int row = (blockIdx.x * WARPS + team) * ROWS + which / M, m = which % M;
    TOTAL sum = 0;
#pragma unroll
    for (int p = 0; p < SPLIT; ++p) sum += sums[(team * SPLIT + p) * ROWS * M + which];
    if (row < N && token + m >= int(blockIdx.y) * M) {
      y[size_t(token + m) * N + row] = Rows::finish(sum, SCALES, X_SCALE row, m) + BIAS_OF(row);
    }
  }
}
