// y [M, N] = x [M, K] * w [N, K]^T (+ bias) by mma.sync, of bfloat16 or int8 operands (INT8).
//
// First launch: x is rounded, or quantised with a scale for each row, into rows of ROW_BYTES bytes, as w's are.
//
// Main launch: a block has BM x BN of y and passes over K, or over its piece of it, one of SPLIT (`mma_tiles.cuh`).
//
// Third launch, where K is cut (SPLIT_K): the pieces' sums are added in their order.
#include "gemm_ends.cuh"
#include "mma_tiles.cuh"

using Block = tiles::Plain<BM, BN, DEPTH, ROW_BYTES, WARPS_M, WARPS_N, STAGES>;
constexpr int TILES_M = matmul::up(M, BM), TILES_N = matmul::up(N, BN);
constexpr int PIECE_TILES = matmul::up(Block::TILES_K, SPLIT);

extern "C" __global__ void __launch_bounds__(Block::THREADS, 1)
    mpgemm_mma(const uint8_t* __restrict__ x, const uint8_t* __restrict__ w, OUT* __restrict__ out ENDS_PARAMETERS) {
  MIMO_SHARED(smem);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp / WARPS_N * Block::WM, warp_n = warp % WARPS_N * Block::WN;
  const matmul::Tile tile = matmul::tile_of<TILES_N, GROUP_M>(blockIdx.x, TILES_M);
  const int m0 = tile.m * BM, n0 = tile.n * BN;
  const int begin = blockIdx.z * PIECE_TILES, count = min(Block::TILES_K - begin, PIECE_TILES);

  auto x_row = [&](int row) { return matmul::row_of<M, ROW_BYTES>(x, m0 + row); };
  auto w_row = [&](int row) { return matmul::row_of<N, ROW_BYTES>(w, n0 + row); };
  SUM sum[Block::MT][Block::NT][4] = {};
  Block::run(smem, x_row, w_row, begin, count, sum);

#pragma unroll
  for (int i = 0; i < Block::MT; ++i) {
#pragma unroll
    for (int j = 0; j < Block::NT; ++j) {
      store_fragment(sum[i][j], out, blockIdx.z, m0 + warp_m + i * 16 + lane / 4,
                     n0 + warp_n + j * 8 + lane % 4 * 2 ENDS);
    }
  }
}
