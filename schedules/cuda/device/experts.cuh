// Routed experts: which slots each expert has, in tiles of rows, and what comes before and after the matmuls.
//
// A slot is a pair of token and choice, numbered token by token: slot s is choice s % TOPK of token s / TOPK. Slots
// whose id is no expert have none, and add nothing.
//
// It reads the constants of the text that includes it: T (tokens), E, TOPK, SLOTS (T * TOPK), D, F.
#pragma once
#include "matmul.cuh"
#include "warp.cuh"

namespace experts {

constexpr int THREADS = 256, WARPS = THREADS / 32;  // of all launches but those of the matmuls
constexpr int SHARED_INTS = 2 * WARPS;

__device__ __forceinline__ bool is_expert(int id) { return id >= 0 && id < E; }

// silu(gate) * up.
__device__ __forceinline__ float hidden_of(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

// The sum of all threads' values; `shared` has room for one of each warp.
__device__ __forceinline__ int block_sum(int value, int* shared) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) value += shfl_xor(value, mask);
  block_sync();  // the sum before was read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  block_sync();
  value = 0;
#pragma unroll
  for (int warp = 0; warp < WARPS; ++warp) value += shared[warp];
  return value;
}

// Writes how many slots an expert has; by a block.
__device__ __forceinline__ void count(const int* ids, int* counts, int expert, int* shared) {
  int own = 0;
  for (int slot = threadIdx.x; slot < SLOTS; slot += THREADS) own += ids[slot] == expert;
  own = block_sum(own, shared);
  if (threadIdx.x == 0) counts[expert] = own;
}

// Block e writes the slots of expert e to their places in `order`, expert by expert and in their own order, and cuts
// them into tiles of at most ROWS: {expert, first place, one behind the last, 0}. `totals`: of tiles, of slots in them.
template <int ROWS>
__device__ __forceinline__ void place(const int* ids, const int* counts, int* order, int4* tiles, int* totals,
                                      int* shared) {
  const int expert = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int first = 0, tile = 0;
  for (int e = threadIdx.x; e < expert; e += THREADS) first += counts[e], tile += matmul::up(counts[e], ROWS);
  first = block_sum(first, shared);
  tile = block_sum(tile, shared);
  const int own = counts[expert], own_tiles = matmul::up(own, ROWS);
  if (expert == E - 1 && threadIdx.x == 0) totals[0] = tile + own_tiles, totals[1] = first + own;
  for (int i = threadIdx.x; i < own_tiles; i += THREADS) {
    tiles[tile + i] = make_int4(expert, first + i * ROWS, min(first + (i + 1) * ROWS, first + own), 0);
  }
  if (own == 0) return;

  // each warp has a run of slots, and learns how many of the expert's come before
  constexpr int RUN = matmul::up(SLOTS, THREADS) * 32;
  auto hits_at = [&](int slot) { return warp_ballot(slot < SLOTS && ids[slot] == expert); };
  int* runs = shared + WARPS;
  int mine = 0;
  for (int i = 0; i < RUN; i += 32) mine += __popc(hits_at(warp * RUN + i + lane));
  if (lane == 0) runs[warp] = mine;
  block_sync();
  int at = first;
  for (int w = 0; w < warp; ++w) at += runs[w];
  for (int i = 0; i < RUN; i += 32) {
    const int slot = warp * RUN + i + lane;
    const uint32_t hits = hits_at(slot);
    if (hits >> lane & 1) order[at + __popc(hits & ((1u << lane) - 1))] = slot;
    at += __popc(hits);
  }
}

// An element of y: the results of a token's slots, weighed and added in the order of its choices. `result(slot, id)`
// gives what an expert says of the column.
template <class Result>
__device__ __forceinline__ float combine(const int* ids, const float* weights, int token, Result result) {
  float sum = 0.0f;
  for (int slot = token * TOPK; slot < (token + 1) * TOPK; ++slot) {
    const int id = ids[slot];
    if (is_expert(id)) sum += weights[slot] * result(slot, id);
  }
  return sum;
}

}  // namespace experts
