// A block's tile of x * w^T by mma.sync, of bfloat16 or int8 operands that lie as they are multiplied.
//
// Both operands are rows of ROW_BYTES bytes along K; a step of the matrix units takes 32 of them, whatever their
// type. Tiles of DEPTH bytes of BM rows of x and BN of w are in shared memory, STAGES of them there or on their way; a
// piece of 16 bytes lies at its place exclusive-or its row, so that neither copies nor ldmatrix meet bank conflicts.
// WARPS_M x WARPS_N warps share the tile: each has MT x NT fragments of 16 x 8 sums.
#pragma once
#include "async.cuh"
#include "matmul.cuh"
#include "mma.cuh"

namespace tiles {

__device__ __forceinline__ void multiply(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_i8(c, a, b0, b1);
}
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_bf16(c, a, b0, b1);
}

template <int BM, int BN, int DEPTH, int ROW_BYTES, int WARPS_M, int WARPS_N, int STAGES>
struct Plain {
  static constexpr int THREADS = 32 * WARPS_M * WARPS_N, TILES_K = matmul::up(ROW_BYTES, DEPTH);
  static constexpr int LINES = DEPTH / 16;  // pieces of 16 bytes in a tile's row
  static constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N, MT = WM / 16, NT = WN / 8;
  static constexpr int STAGE_BYTES = (BM + BN) * DEPTH;
  static_assert(MT > 0 && NT > 0 && NT % 2 == 0 && (LINES == 4 || LINES == 8));

  // Where piece `line` of a row of a tile lies.
  static __device__ __forceinline__ int place(int row, int line) {
    return row * DEPTH + (LINES == 8 ? line ^ (row & 7) : line ^ (row >> 1 & 3)) * 16;
  }

  // Starts the copy of ROWS rows of tile `depth` along K; bytes beyond a row are zero.
  template <int ROWS, class Rows>
  static __device__ __forceinline__ void copy_tile(uint32_t to, Rows row_of, int depth) {
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * LINES; i += THREADS) {
      const int row = i / LINES, line = i % LINES, byte = depth * DEPTH + line * 16;
      const matmul::Row from = row_of(row);
      const bool valid = from.there && byte < ROW_BYTES;
      cp_async16(to + place(row, line), valid ? from.bytes + byte : from.bytes, valid);
    }
  }

  // Adds the products of `count` tiles along K from tile `begin` on. `x_row` and `w_row` say where a row of the tile
  // lies; all copies have arrived in the end.
  template <class Sum, class X, class W>
  static __device__ __forceinline__ void run(const uint8_t* smem, X x_row, W w_row, int begin, int count,
                                             Sum (&sum)[MT][NT][4]) {
    const uint32_t base = smem_address(smem);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_m = warp / WARPS_N * WM, warp_n = warp % WARPS_N * WN;
    auto copy = [&](int depth) {  // a group is committed for each tile, also beyond the last
      if (depth < count) {
        const uint32_t to = base + depth % STAGES * STAGE_BYTES;
        copy_tile<BM>(to, x_row, begin + depth);
        copy_tile<BN>(to + BM * DEPTH, w_row, begin + depth);
      }
      cp_async_commit();
    };
#pragma unroll
    for (int depth = 0; depth < STAGES - 1; ++depth) copy(depth);

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
  }
};

}  // namespace tiles
