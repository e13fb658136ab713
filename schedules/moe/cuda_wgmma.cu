// Experts by wgmma, of bfloat16 or int8 operands (sm_90a); see `cuda_mma.cu`, from which this differs in what follows.
//
// gather: rows of x as operands, in the order of their experts, so that the tensor memory accelerator brings a tile's
// rows at once. Rows behind an expert's last are another's, or nobody's; what is computed of them is not stored.
// up, down: BLOCKS blocks take the tiles in turns (`wgmma_tiles.cuh`). A tile of up has BN_UP / 2 rows of the gate and
// as many of the up matrix behind them: a thread has the same columns of both.
#include "expert_ends.cuh"
#include "wgmma_tiles.cuh"

using Up = tiles::Pipeline<CONSUMERS, BN_UP, STAGES>;
using Down = tiles::Pipeline<CONSUMERS, BN_DOWN, STAGES>;
constexpr int THREADS = Up::THREADS, DEPTH = Up::DEPTH / ELEMENT;  // columns of a stage
constexpr int HALF = BN_UP / 2;
constexpr int UP_TILES = matmul::up(INT8 ? F : F_PADDED, HALF), DOWN_TILES = matmul::up(D, BN_DOWN);
constexpr int UP_STAGES = matmul::up(D_PADDED, DEPTH), DOWN_STAGES = matmul::up(F_PADDED, DEPTH);
static_assert(BM == Up::BM);

extern "C" __global__ void __launch_bounds__(experts::THREADS)
    experts_gather(const uint8_t* operand, const int* order, const int* totals, uint8_t* rows) {
  constexpr int ROW_BYTES = D_PADDED * ELEMENT, PIECES = ROW_BYTES / 16;
  const int index = blockIdx.x * experts::THREADS + threadIdx.x;
  const int place = index / PIECES, piece = index % PIECES * 16;
  if (place >= totals[1]) return;
  const uint8_t* from = operand + size_t(order[place] / TOPK) * ROW_BYTES;
  *reinterpret_cast<uint4*>(rows + size_t(place) * ROW_BYTES + piece) = *reinterpret_cast<const uint4*>(from + piece);
}

// One of the tiles of a block: whose it is, its places in the order of slots, and which of the tiles of columns.
struct Work {
  int expert, first, end, column_tile;
};
template <int COLUMN_TILES>
__device__ __forceinline__ Work work_of(int index, const int4* list, int tiles) {
  const matmul::Tile tile = matmul::tile_of<COLUMN_TILES, GROUP_M>(index, tiles);
  const int4 own = list[tile.m];
  return {own.x, own.y, own.z, tile.n};
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    experts_up(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
               const SCALE* __restrict__ scale, const float* __restrict__ x_scale, const int* __restrict__ order,
               const int4* __restrict__ list, const int* __restrict__ totals, HIDDEN* __restrict__ hidden) {
  MIMO_SHARED(smem);
  Up block(smem);
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128, tiles = totals[0];
  if (group == CONSUMERS) {
    registers_decrease<PRODUCER_REGISTERS>();
    if (thread != 0) return;
    for (int index = blockIdx.x; index < tiles * UP_TILES; index += BLOCKS) {
      const Work work = work_of<UP_TILES>(index, list, tiles);
      const int gate = work.expert * 2 * F_ROWS + work.column_tile * HALF;
      block.ask(UP_STAGES, [&](uint8_t* to, int depth, uint64_t* barrier) {
        tma_load(to, &x_map, depth * DEPTH, work.first, barrier);
        tma_load(to + BM * Up::DEPTH, &w_map, depth * DEPTH, gate, barrier);
        tma_load(to + (BM + HALF) * Up::DEPTH, &w_map, depth * DEPTH, gate + F_ROWS, barrier);
      });
    }
    return;
  }

  registers_increase<CONSUMER_REGISTERS>();
  for (int index = blockIdx.x; index < tiles * UP_TILES; index += BLOCKS) {
    const Work work = work_of<UP_TILES>(index, list, tiles);
    SUM sum[HALF];
    block.multiply_all(group, UP_STAGES, sum);
    const int first = work.first + group * 64 + thread / 32 * 16 + thread % 32 / 4;
    const size_t gate = size_t(work.expert) * 2 * F_ROWS;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = first + 8 * half;
      if (place >= work.end) continue;
      const int token = order[place] / TOPK;
#pragma unroll
      for (int j = 0; j < HALF / 8; ++j) {
        const int column = work.column_tile * HALF + j * 8 + thread % 4 * 2;
        float value[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {  // rows behind the gate's last are those of other matrices
          const size_t row = gate + min(column + e, F - 1);
          const int at = 4 * j + 2 * half + e;
          const float own = experts::hidden_of(scaled(sum[at], scale, x_scale, row, token),
                                               scaled(sum[at + HALF / 2], scale, x_scale, row + F_ROWS, token));
          value[e] = column + e < F ? own : 0.0f;
        }
        store_hidden(hidden, place, column, value[0], value[1]);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    experts_down(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
                 const int* __restrict__ order, const int4* __restrict__ list, const int* __restrict__ totals,
                 SUM* __restrict__ parts) {
  MIMO_SHARED(smem);
  Down block(smem);
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128, tiles = totals[0];
  if (group == CONSUMERS) {
    registers_decrease<PRODUCER_REGISTERS>();
    if (thread != 0) return;
    for (int index = blockIdx.x; index < tiles * DOWN_TILES; index += BLOCKS) {
      const Work work = work_of<DOWN_TILES>(index, list, tiles);
      const int row = work.expert * D_ROWS + work.column_tile * BN_DOWN;
      block.ask(DOWN_STAGES, [&](uint8_t* to, int depth, uint64_t* barrier) {
        tma_load(to, &x_map, depth * DEPTH, work.first, barrier);
        tma_load(to + BM * Down::DEPTH, &w_map, depth * DEPTH, row, barrier);
      });
    }
    return;
  }

  registers_increase<CONSUMER_REGISTERS>();
  for (int index = blockIdx.x; index < tiles * DOWN_TILES; index += BLOCKS) {
    const Work work = work_of<DOWN_TILES>(index, list, tiles);
    SUM sum[BN_DOWN / 2];
    block.multiply_all(group, DOWN_STAGES, sum);
    const int first = work.first + group * 64 + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = first + 8 * half;
      if (place >= work.end) continue;
      SUM* row = parts + size_t(order[place]) * D;
#pragma unroll
      for (int j = 0; j < BN_DOWN / 8; ++j) {
        matmul::store_two<D>(row, work.column_tile * BN_DOWN + j * 8 + thread % 4 * 2, sum[4 * j + 2 * half],
                             sum[4 * j + 2 * half + 1]);
      }
    }
  }
}
