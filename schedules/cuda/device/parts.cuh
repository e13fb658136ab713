// What ends attention whose keys are split: a block's rows leave for `out`, or as a part, and parts are merged.
//
// Of the constants of a text: T, H, KV, DV, DW, SINK, PARTS, MERGE_THREADS, as in cuda_decode.cu.
#pragma once
#include "flash.cuh"

namespace parts {

constexpr int HEADS = H / KV, ROWS = T * HEADS, TILES = (ROWS + 15) / 16;

// An element of a unit's row (see merge_warps): to `out` where it is the only part, else to the unit's part.
struct Leave {
  const float* sink;
  float *out, *values, *states;
  int unit, part, valid;

  __device__ __forceinline__ void operator()(int row, int column, float value, float top, float sum) const {
    if constexpr (PARTS > 1) {
      const size_t place = (size_t(unit) * PARTS + part) * 16 + row;
      if (top > -flash::infinity()) values[place * DW + column] = value;
      if (column == 0) {
        states[2 * place] = top;
        states[2 * place + 1] = sum;
      }
    } else {
      const int kv = unit % KV, tile = unit / KV % TILES, sequence = unit / KV / TILES;
      const int r = tile * 16 + row, token = r / HEADS, head = kv * HEADS + r % HEADS;
      if (r < ROWS && column < DV) {
        const float phantom = flash::sink_of<SINK>(sink, head);
        const float result = value * flash::closing(top, sum, phantom).factor;
        out[(size_t(sequence * T + token) * H + head) * DV + column] = token < valid ? result : 0.0f;
      }
    }
  }
};

}  // namespace parts

// Merges the parts of a token's head. Grid: heads of all tokens.
extern "C" __global__ void __launch_bounds__(MERGE_THREADS)
    merge(const int* __restrict__ pos, const float* __restrict__ sink, const float* __restrict__ values,
          const float* __restrict__ states, float* __restrict__ out) {
  using parts::HEADS;
  const int head = blockIdx.x % H, token = blockIdx.x / H % T, sequence = blockIdx.x / H / T;
  float* to = out + size_t(blockIdx.x) * DV;
  if (token >= pos[2 * sequence + 1]) {
    for (int column = threadIdx.x; column < DV; column += MERGE_THREADS) to[column] = 0.0f;
    return;
  }
  const int row = token * HEADS + head % HEADS;
  const size_t unit = (size_t(sequence) * parts::TILES + row / 16) * KV + head / HEADS;
  const size_t place = unit * PARTS * 16 + row % 16;
  const float phantom = flash::sink_of<SINK>(sink, head);
  flash::merge_parts<PARTS, DV>(values + place * DW, 16 * DW, states + 2 * place, 32,
                                [&](int column, float value, float top, float sum) {
                                  to[column] = value * flash::closing(top, sum, phantom).factor;
                                });
}
