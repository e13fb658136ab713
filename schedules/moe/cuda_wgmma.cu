// Experts by wgmma, of bfloat16 (sm_90a); see `cuda_mma.cu`, from which this differs in what follows.
//
// gather: rows of x, rounded, in the order of their experts, so that the tensor memory accelerator brings a tile's rows
// at once. Rows behind an expert's last are another's, or nobody's; what is computed of them is not stored.
// up, down: BLOCKS blocks take the tiles in turns (`wgmma_tiles.cuh`). A tile of up has BN_UP / 2 rows of the gate and
// as many of the up matrix behind them: a thread has the same columns of both.
#include "experts.cuh"
#include "wgmma_tiles.cuh"

using Up = tiles::Pipeline<CONSUMERS, BN_UP, STAGES>;
using Down = tiles::Pipeline<CONSUMERS, BN_DOWN, STAGES>;
constexpr int BM = Up::BM, THREADS = Up::THREADS, DEPTH = Up::DEPTH / 2;  // columns of a stage
constexpr int HALF = BN_UP / 2;
constexpr int UP_TILES = matmul::up(F_PADDED, HALF), DOWN_TILES = matmul::up(D, BN_DOWN);
constexpr int UP_STAGES = matmul::up(D_PADDED, DEPTH), DOWN_STAGES = matmul::up(F_PADDED, DEPTH);

extern "C" __global__ void __launch_bounds__(experts::THREADS) experts_count(const int* ids, int* counts) {
  MIMO_SHARED(smem);
  experts::count(ids, counts, blockIdx.x, reinterpret_cast<int*>(smem));
}

extern "C" __global__ void __launch_bounds__(experts::THREADS)
    experts_place(const int* ids, const int* counts, int* order, int4* list, int* totals) {
  MIMO_SHARED(smem);
  experts::place<BM>(ids, counts, order, list, totals, reinterpret_cast<int*>(smem));
}

extern "C" __global__ void __launch_bounds__(experts::THREADS)
    experts_gather(const float* x, const int* order, const int* totals, uint16_t* rows) {
  const int index = blockIdx.x * experts::THREADS + threadIdx.x;
  const int place = index / (D_PADDED / 8), column = index % (D_PADDED / 8) * 8;
  if (place >= totals[1]) return;
  x += size_t(order[place] / TOPK) * D;
  float value[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) value[i] = column + i < D ? x[column + i] : 0.0f;
  *reinterpret_cast<uint4*>(rows + size_t(place) * D_PADDED + column) =
      make_uint4(pack_bf16(value[0], value[1]), pack_bf16(value[2], value[3]), pack_bf16(value[4], value[5]),
                 pack_bf16(value[6], value[7]));
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
               const int4* __restrict__ list, const int* __restrict__ totals, uint16_t* __restrict__ hidden) {
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
    float sum[HALF] = {};
    block.add(group, UP_STAGES, sum);
    const int first = work.first + group * 64 + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = first + 8 * half;
      if (place >= work.end) continue;
#pragma unroll
      for (int j = 0; j < HALF / 8; ++j) {
        const int column = work.column_tile * HALF + j * 8 + thread % 4 * 2;
        if (column >= F_PADDED) continue;
        float value[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {  // rows behind the gate's last are those of other matrices
          const float own = experts::hidden_of(sum[4 * j + 2 * half + e], sum[4 * j + 2 * half + e + HALF / 2]);
          value[e] = column + e < F ? own : 0.0f;
        }
        *reinterpret_cast<uint32_t*>(hidden + size_t(place) * F_PADDED + column) = pack_bf16(value[0], value[1]);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    experts_down(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
                 const int* __restrict__ order, const int4* __restrict__ list, const int* __restrict__ totals,
                 float* __restrict__ parts) {
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
    float sum[BN_DOWN / 2] = {};
    block.add(group, DOWN_STAGES, sum);
    const int first = work.first + group * 64 + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = first + 8 * half;
      if (place >= work.end) continue;
      float* row = parts + size_t(order[place]) * D;
#pragma unroll
      for (int j = 0; j < BN_DOWN / 8; ++j) {
        matmul::store_two<D>(row, work.column_tile * BN_DOWN + j * 8 + thread % 4 * 2, sum[4 * j + 2 * half],
                             sum[4 * j + 2 * half + 1]);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(experts::THREADS)
    experts_combine(const float* __restrict__ parts, const int* __restrict__ ids, const float* __restrict__ weights,
                    float* __restrict__ y) {
  const int index = blockIdx.x * experts::THREADS + threadIdx.x;
  if (index >= T * D) return;
  y[index] = experts::combine(ids, weights, index / D, [&](int slot, int) {
    return parts[size_t(slot) * D + index % D];
  });
}
