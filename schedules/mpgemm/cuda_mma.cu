// y [M, N] = x [M, K] * w [N, K]^T (+ bias) by mma.sync, of bfloat16 or int8 operands (INT8).
//
// First launch: x is rounded, or quantised with a scale for each row, into rows of ROW_BYTES bytes, as w's are.
// Both operands are then rows of bytes along K; a step of the matrix units takes 32 of them, whatever their type.
//
// Main launch: a block has BM x BN of y and passes over K (or over its piece of it, one of SPLIT) by DEPTH bytes.
// STAGES tiles of both operands are in shared memory or on their way; a piece of 16 bytes lies at its place
// exclusive-or its row, so that neither copies nor ldmatrix meet bank conflicts. WARPS_M x WARPS_N warps share
// the block's tile.
//
// Third launch, where K is cut (SPLIT_K): the pieces' sums are added in their order.
#include "async.cuh"
#include "gemm_ends.cuh"
#include "mma.cuh"

constexpr int THREADS = 32 * WARPS_M * WARPS_N;
constexpr int TILES_M = matmul::up(M, BM), TILES_N = matmul::up(N, BN);
constexpr int TILES_K = matmul::up(ROW_BYTES, DEPTH), PIECE_TILES = matmul::up(TILES_K, SPLIT);
constexpr int LINES = DEPTH / 16;  // pieces of 16 bytes in a tile's row
constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N, MT = WM / 16, NT = WN / 8;
constexpr int STAGE_BYTES = (BM + BN) * DEPTH;
static_assert(MT > 0 && NT > 0 && NT % 2 == 0 && (LINES == 4 || LINES == 8));

__device__ __forceinline__ void multiply(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_i8(c, a, b0, b1);
}
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_bf16(c, a, b0, b1);
}

// Where piece `line` of a row of a tile lies.
__device__ __forceinline__ int place(int row, int line) {
  return row * DEPTH + (LINES == 8 ? line ^ (row & 7) : line ^ (row >> 1 & 3)) * 16;
}

// Starts the copy of ROWS rows of tile `depth` along K; rows beyond `rows` and bytes beyond a row are zero.
template <int ROWS>
__device__ __forceinline__ void copy_tile(uint32_t to, const uint8_t* from, int first, int rows, int depth) {
#pragma unroll
  for (int i = threadIdx.x; i < ROWS * LINES; i += THREADS) {
    const int row = i / LINES, line = i % LINES, byte = depth * DEPTH + line * 16;
    const bool valid = first + row < rows && byte < ROW_BYTES;
    cp_async16(to + place(row, line), valid ? from + size_t(first + row) * ROW_BYTES + byte : from, valid);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    mpgemm_mma(const uint8_t* __restrict__ x, const uint8_t* __restrict__ w, OUT* __restrict__ out ENDS_PARAMETERS) {
  MIMO_SHARED(smem);
  const uint32_t base = smem_address(smem);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp / WARPS_N * WM, warp_n = warp % WARPS_N * WN;
  const matmul::Tile tile = matmul::tile_of<TILES_M, TILES_N, GROUP_M>(blockIdx.x);
  const int m0 = tile.m * BM, n0 = tile.n * BN;
  const int begin = blockIdx.z * PIECE_TILES, count = min(TILES_K - begin, PIECE_TILES);

  auto copy = [&](int depth) {  // of the piece's tiles; a group is committed for each, also beyond the last
    if (depth < count) {
      const uint32_t to = base + depth % STAGES * STAGE_BYTES;
      copy_tile<BM>(to, x, m0, M, begin + depth);
      copy_tile<BN>(to + BM * DEPTH, w, n0, N, begin + depth);
    }
    cp_async_commit();
  };
#pragma unroll
  for (int depth = 0; depth < STAGES - 1; ++depth) copy(depth);

  SUM sum[MT][NT][4] = {};
  for (int depth = 0; depth < count; ++depth) {
    cp_async_wait<STAGES - 2>();
    block_sync();  // all have the tile, and all are done with the one before, whose place is taken now
    copy(depth + STAGES - 1);
    const uint32_t xs = base + depth % STAGES * STAGE_BYTES, ws = xs + BM * DEPTH;
#pragma unroll
    for (int step = 0; step < DEPTH / 32; ++step) {
      uint32_t a[MT][4];
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        ldmatrix_x4(a[i], xs + place(warp_m + i * 16 + lane % 16, step * 2 + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < NT; j += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, ws + place(warp_n + j * 8 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < MT; ++i) {
          multiply(sum[i][j], a[i], b[0], b[1]);
          multiply(sum[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }
  cp_async_wait<0>();

#pragma unroll
  for (int i = 0; i < MT; ++i) {
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      store_fragment(sum[i][j], out, blockIdx.z, m0 + warp_m + i * 16 + lane / 4,
                     n0 + warp_n + j * 8 + lane % 4 * 2 ENDS);
    }
  }
}
