// A warp's 16 queries as sums of three numbers of bfloat16, in shared memory: left operands that lose nothing of float32.
//
// Each lane reads only what it has written itself.
#pragma once
#include "exact.cuh"

namespace terms {

// Of queries WIDTH wide.
template <int WIDTH>
constexpr int BYTES = 3 * WIDTH / 16 * 512;

template <int WIDTH>
__device__ __forceinline__ int place_of(int term, int step) {
  return ((term * (WIDTH / 16) + step) * 32 + (threadIdx.x & 31)) * 16;
}

// `number(half, column)` is of the lane's row number `half`, zero behind its end.
template <int WIDTH, class Number>
__device__ __forceinline__ void put(uint8_t* to, Number number) {
  for (int step = 0; step < WIDTH / 16; ++step) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int column = step * 16 + (part >> 1) * 8 + (threadIdx.x & 3) * 2;
      uint32_t three[3];
      exact::split(three, number(part & 1, column), number(part & 1, column + 1));
#pragma unroll
      for (int term = 0; term < 3; ++term) {
        reinterpret_cast<uint32_t*>(to + place_of<WIDTH>(term, step))[part] = three[term];
      }
    }
  }
}

// Those of 16 columns, the greatest term first.
template <int WIDTH>
__device__ __forceinline__ void load(uint32_t (&to)[3][4], const uint8_t* from, int step) {
#pragma unroll
  for (int term = 0; term < 3; ++term) {
    const uint4 x = *reinterpret_cast<const uint4*>(from + place_of<WIDTH>(term, step));
    to[term][0] = x.x, to[term][1] = x.y, to[term][2] = x.z, to[term][3] = x.w;
  }
}

}  // namespace terms
