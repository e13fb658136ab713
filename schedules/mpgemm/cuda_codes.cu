// y [M, N] = x [M, K] * w [N, K]^T (+ bias) by mma.sync; weights are codes (`codes.cuh`), unpacked in registers.
//
// x is rounded to 16 bits, or quantised to int8 (INT8: 2 and 4 bits alone), by the first launch; the main one
// (`code_tiles.cuh`) and the last are otherwise those of cuda_mma.cu.
#include "code_tiles.cuh"
#include "gemm_ends.cuh"

using Block = tiles::Codes<BM, BN, DEPTH, ROW_BYTES, WARPS_M, WARPS_N, STAGES>;
constexpr int TILES_M = matmul::up(M, BM), TILES_N = matmul::up(N, BN);
constexpr int PIECE_TILES = matmul::up(Block::TILES_K, SPLIT);
constexpr int GROUPS = W_GROUP ? matmul::up(K, W_GROUP) : 1;
#if X_GROUPED
#define X_SCALE_PARAMETER const float *__restrict__ x_scale,
constexpr int X_GROUPS = matmul::up(K, X_GROUP);

// A tile's rows of x from `first` on, and the scales of their groups.
struct XRows {
  const uint8_t* x;
  const float* scales;
  int first;
  __device__ __forceinline__ matmul::Row operator()(int row) const {
    return matmul::row_of<M, ROW_BYTES>(x, first + row);
  }
  __device__ __forceinline__ float scale(int row, int group) const {
    return first + row < M && group < X_GROUPS ? scales[size_t(first + row) * X_GROUPS + group] : 0.0f;
  }
};
#else
#define X_SCALE_PARAMETER
#endif

extern "C" __global__ void __launch_bounds__(Block::THREADS, 1)
    mpgemm_codes(const uint8_t* __restrict__ x, X_SCALE_PARAMETER const uint8_t* __restrict__ w, SCALES_PARAMETERS,
                 OUT* __restrict__ out ENDS_PARAMETERS) {
  MIMO_SHARED(smem);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp / WARPS_N * Block::WM, warp_n = warp % WARPS_N * Block::WN;
  const matmul::Tile tile = matmul::tile_of<TILES_N, GROUP_M>(blockIdx.x, TILES_M);
  const int m0 = tile.m * BM, n0 = tile.n * BN;
  const int begin = blockIdx.z * PIECE_TILES, count = min(Block::TILES_K - begin, PIECE_TILES);

#if X_GROUPED
  const XRows x_row = {x, x_scale, m0};
#else
  auto x_row = [&](int row) { return matmul::row_of<M, ROW_BYTES>(x, m0 + row); };
#endif
  auto w_row = [&](int row) { return matmul::row_of<N, Block::W_ROW_BYTES>(w, n0 + row); };
  auto scale_of = [&](int row, int group) {
    const bool there = n0 + row < N && group < GROUPS;
    return there ? tiles::scaling_at(SCALES, size_t(n0 + row) * GROUPS + group) : tiles::Scaling{};
  };
  SUM sum[Block::MT][Block::NT][4] = {};
  Block::run(smem, x_row, w_row, scale_of, begin, count, sum);

#pragma unroll
  for (int i = 0; i < Block::MT; ++i) {
#pragma unroll
    for (int j = 0; j < Block::NT; ++j) {
      store_fragment(sum[i][j], out, blockIdx.z, m0 + warp_m + i * 16 + lane / 4,
                     n0 + warp_n + j * 8 + lane % 4 * 2 ENDS);
    }
  }
}
