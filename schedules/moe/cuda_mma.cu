// Experts by mma.sync: bfloat16 or int8 (INT8) operands as they lie, or codes that are unpacked (CODES).
//
// prepare: x becomes an operand, and each expert's slots are counted. place: slots in the order of their experts, cut
// into tiles of at most BM. up: a block has a tile of slots and BN_UP / 2 columns of the gate and of the up matrix,
// eight rows of one and eight of the other in turns, so that a thread has both of an element, and stores
// silu(gate) * up as an operand of the next matmul (INT8: as floats, which a launch of its own quantises), a row for
// each place in that order. down: a tile of slots and BN_DOWN columns, of a piece of K, one of SPLIT. combine: the pieces'
// sums, and the slots of each token, in their order (`expert_ends.cuh`).
//
// Grids are those of the most tiles that there can be; blocks beyond the tiles that there are end at once.
#include "expert_ends.cuh"
#if CODES
#include "code_tiles.cuh"
#else
#include "mma_tiles.cuh"
#endif

constexpr int UP_BYTES = D_PADDED * ELEMENT, DOWN_BYTES = F_PADDED * ELEMENT;  // of a row of x
#if CODES
template <int BN, int ROW_BYTES> using Block = tiles::Codes<BM, BN, DEPTH, ROW_BYTES, WARPS_M, WARPS_N, STAGES>;
#else
template <int BN, int ROW_BYTES> using Block = tiles::Plain<BM, BN, DEPTH, ROW_BYTES, WARPS_M, WARPS_N, STAGES>;
#endif
using Up = Block<BN_UP, UP_BYTES>;
using Down = Block<BN_DOWN, DOWN_BYTES>;
constexpr int THREADS = Up::THREADS;
constexpr int UP_COLUMNS = BN_UP / 2, DOWN_TILES = matmul::up(D, BN_DOWN);
constexpr int UP_TILES = matmul::up(INT8 ? F : F_PADDED, UP_COLUMNS);  // columns behind the last are stored as zeros
constexpr int PIECE_TILES = matmul::up(Down::TILES_K, SPLIT);
constexpr int UP_GROUPS = W_GROUP ? matmul::up(D, W_GROUP) : 1, DOWN_GROUPS = W_GROUP ? matmul::up(F, W_GROUP) : 1;

// A block's tile: which expert, its first place, and in shared memory the slots of its rows, -1 where there are none.
struct Slots {
  int expert, first, column_tile;
  int* rows;
  bool there;
};
template <int COLUMN_TILES, int STAGE_BYTES>
__device__ __forceinline__ Slots slots_of(uint8_t* smem, const int* order, const int4* list, const int* totals) {
  const int count = totals[0], index = blockIdx.x;
  Slots slots = {0, 0, 0, reinterpret_cast<int*>(smem + STAGES * STAGE_BYTES), index < count * COLUMN_TILES};
  if (!slots.there) return slots;
  const matmul::Tile tile = matmul::tile_of<COLUMN_TILES, GROUP_M>(index, count);
  const int4 own = list[tile.m];
  slots.expert = own.x, slots.first = own.y, slots.column_tile = tile.n;
  for (int i = threadIdx.x; i < BM; i += THREADS) slots.rows[i] = own.y + i < own.z ? order[own.y + i] : -1;
  block_sync();
  return slots;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    experts_up(const uint8_t* __restrict__ x, const uint8_t* __restrict__ w, const SCALE* __restrict__ scale,
               const float* __restrict__ x_scale, const int* __restrict__ order, const int4* __restrict__ list,
               const int* __restrict__ totals, HIDDEN* __restrict__ hidden) {
  MIMO_SHARED(smem);
  const Slots slots = slots_of<UP_TILES, Up::STAGE_BYTES>(smem, order, list, totals);
  if (!slots.there) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp / WARPS_N * Up::WM, warp_n = warp % WARPS_N * Up::WN;
  const int begin = slots.column_tile * UP_COLUMNS;
  const size_t gate = size_t(slots.expert) * 2 * F_ROWS;  // its first row; the up matrix is F_ROWS behind
  auto column_of = [&](int row) { return begin + row / 16 * 8 + row % 8; };
  auto x_row = [&](int row) {
    const int slot = slots.rows[row];
    return matmul::Row{slot < 0 ? x : x + size_t(slot / TOPK) * UP_BYTES, slot >= 0};
  };
  auto w_row = [&](int row) {
    const bool there = column_of(row) < F;
    const size_t number = gate + (row / 8 % 2) * F_ROWS + column_of(row);
    return matmul::Row{there ? w + number * W_UP_BYTES : w, there};
  };
  SUM sum[Up::MT][Up::NT][4] = {};
#if CODES
  const SCALE* own = scale + gate * UP_GROUPS;
  auto scale_of = [&](int row, int group) {
    const int number = row / 8 % 2 * F_ROWS + column_of(row);
    return column_of(row) < F && group < UP_GROUPS ? matmul::widen(own[number * UP_GROUPS + group]) : 0.0f;
  };
  Up::run(smem, x_row, w_row, scale_of, 0, Up::TILES_K, sum);
#else
  Up::run(smem, x_row, w_row, 0, Up::TILES_K, sum);
#endif

#pragma unroll
  for (int i = 0; i < Up::MT; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_m + i * 16 + half * 8 + lane / 4, slot = slots.rows[row], token = slot / TOPK;
      if (slot < 0) continue;
#pragma unroll
      for (int j = 0; j < Up::NT; j += 2) {
        const int column = begin + warp_n / 2 + j * 4 + lane % 4 * 2;
        float value[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const size_t gate_row = gate + min(column + e, F - 1);
          value[e] = experts::hidden_of(scaled(sum[i][j][2 * half + e], scale, x_scale, gate_row, token),
                                        scaled(sum[i][j + 1][2 * half + e], scale, x_scale, gate_row + F_ROWS, token));
        }
        store_hidden(hidden, slots.first + row, column, value[0], value[1]);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    experts_down(const uint8_t* __restrict__ x, const uint8_t* __restrict__ w, const SCALE* __restrict__ scale,
                 const int* __restrict__ order, const int4* __restrict__ list, const int* __restrict__ totals,
                 SUM* __restrict__ parts) {
  MIMO_SHARED(smem);
  const Slots slots = slots_of<DOWN_TILES, Down::STAGE_BYTES>(smem, order, list, totals);
  if (!slots.there) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp / WARPS_N * Down::WM, warp_n = warp % WARPS_N * Down::WN;
  const int n0 = slots.column_tile * BN_DOWN;
  const int begin = blockIdx.z * PIECE_TILES, count = min(Down::TILES_K - begin, PIECE_TILES);
  const size_t first = size_t(slots.expert) * D_ROWS;
  auto x_row = [&](int row) {
    const bool there = slots.rows[row] >= 0;
    return matmul::Row{there ? x + size_t(slots.first + row) * DOWN_BYTES : x, there};
  };
  auto w_row = [&](int row) { return matmul::row_of<D, W_DOWN_BYTES>(w + first * W_DOWN_BYTES, n0 + row); };
  SUM sum[Down::MT][Down::NT][4] = {};
#if CODES
  const SCALE* own = scale + first * DOWN_GROUPS;
  auto scale_of = [&](int row, int group) {
    const bool there = n0 + row < D && group < DOWN_GROUPS;
    return there ? matmul::widen(own[(n0 + row) * DOWN_GROUPS + group]) : 0.0f;
  };
  Down::run(smem, x_row, w_row, scale_of, begin, count, sum);
#else
  Down::run(smem, x_row, w_row, begin, count, sum);
#endif

#pragma unroll
  for (int i = 0; i < Down::MT; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int slot = slots.rows[warp_m + i * 16 + half * 8 + lane / 4];
      if (slot < 0) continue;
      SUM* row = parts + (size_t(blockIdx.z) * SLOTS + slot) * D;
#pragma unroll
      for (int j = 0; j < Down::NT; ++j) {
        matmul::store_two<D>(row, n0 + warp_n + j * 8 + lane % 4 * 2, sum[i][j][2 * half], sum[i][j][2 * half + 1]);
      }
    }
  }
}
