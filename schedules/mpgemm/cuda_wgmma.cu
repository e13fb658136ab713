// y [M, N] = x [M, K] * w [N, K]^T (+ bias) by wgmma, of bfloat16 or int8 operands (INT8), sm_90a.
//
// First launch: x is rounded, or quantised with a scale for each row, into rows of ROW_BYTES bytes, as w's are.
//
// Main launch: BLOCKS blocks take the tiles of y (and the SPLIT pieces of K of each) in turns (`wgmma_tiles.cuh`). Blocks
// of a cluster (CLUSTER of them, for the preprocessor CLUSTERED) have tiles below each other: each brings a share of their
// rows of w to all.
//
// Third launch, where K is cut (SPLIT_K): the pieces' sums are added in their order.
#include "gemm_ends.cuh"
#include "wgmma_tiles.cuh"

using Block = tiles::Pipeline<CONSUMERS, BN, STAGES, CLUSTER>;
constexpr int BM = Block::BM, DEPTH = Block::DEPTH, SHARE = BN / CLUSTER;
constexpr int TILES_M = matmul::up(M, BM * CLUSTER), TILES_N = matmul::up(N, BN), TILES = TILES_M * TILES_N * SPLIT;
constexpr int TILES_K = matmul::up(ROW_BYTES, DEPTH), PIECE_TILES = matmul::up(TILES_K, SPLIT);
#if CLUSTERED
#define IN_CLUSTERS __cluster_dims__(CLUSTER, 1, 1)
#else
#define IN_CLUSTERS
#endif

// One of the tiles of a cluster: where this block's is in y, which piece of K, and that piece's stages.
struct Work {
  int m0, n0, piece, begin, count;
  __device__ __forceinline__ Work(int index, int rank) {
    const matmul::Tile tile = matmul::tile_of<TILES_N, GROUP_M>(index % (TILES_M * TILES_N), TILES_M);
    m0 = (tile.m * CLUSTER + rank) * BM, n0 = tile.n * BN, piece = index / (TILES_M * TILES_N);
    begin = piece * PIECE_TILES, count = min(TILES_K - begin, PIECE_TILES);
  }
};

extern "C" __global__ void IN_CLUSTERS __launch_bounds__(Block::THREADS, 1)
    mpgemm_wgmma(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
                 OUT* __restrict__ out ENDS_PARAMETERS) {
  MIMO_SHARED(smem);
  Block block(smem);
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
  const int first = blockIdx.x / CLUSTER, rank = blockIdx.x % CLUSTER;
  if (group == CONSUMERS) {
    registers_decrease<PRODUCER_REGISTERS>();
    for (int index = first; thread == 0 && index < TILES; index += BLOCKS / CLUSTER) {
      const Work work(index, rank);
      block.ask(work.count, [&](uint8_t* to, int depth, uint64_t* barrier) {
        const int column = (work.begin + depth) * (DEPTH / ELEMENT);
        tma_load(to, &x_map, column, work.m0, barrier);
        to += (BM + rank * SHARE) * DEPTH;
#if CLUSTERED
        tma_load_multicast(to, &w_map, column, work.n0 + rank * SHARE, barrier, (1 << CLUSTER) - 1);
#else
        tma_load(to, &w_map, column, work.n0, barrier);
#endif
      });
    }
  } else {
    registers_increase<CONSUMER_REGISTERS>();
    for (int index = first; index < TILES; index += BLOCKS / CLUSTER) {
      const Work work(index, rank);
      SUM sum[BN / 2];
      block.multiply_all(group, work.count, sum);
      const int row = work.m0 + group * 64 + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
      for (int j = 0; j < BN / 8; ++j) {
        const SUM four[4] = {sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]};
        store_fragment(four, out, work.piece, row, work.n0 + j * 8 + thread % 4 * 2 ENDS);
      }
    }
  }
  block.end();
}
