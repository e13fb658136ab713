// Rows of numbers, N neighbours at a time, and sums over what a team of threads has of a row.
//
// Rows begin at multiples of N numbers, N a power of two to 8: what is loaded or stored at a time has 16 bytes at
// most.
#pragma once
#include "warp.cuh"

template <int N> MIMO_DEVICE void load_row(const float* from, float (&x)[N]) {
  if constexpr (N >= 4) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 part = *reinterpret_cast<const float4*>(from + i);
      x[i] = part.x, x[i + 1] = part.y, x[i + 2] = part.z, x[i + 3] = part.w;
    }
  } else if constexpr (N == 2) {
    const float2 both = *reinterpret_cast<const float2*>(from);
    x[0] = both.x, x[1] = both.y;
  } else {
    x[0] = *from;
  }
}

// Numbers of bfloat16, by their bits.
template <int N> MIMO_DEVICE void load_row(const uint16_t* from, float (&x)[N]) {
  if constexpr (N >= 2) {
    uint32_t pairs[N / 2];
    if constexpr (N == 8) {
      const uint4 all = *reinterpret_cast<const uint4*>(from);
      pairs[0] = all.x, pairs[1] = all.y, pairs[2] = all.z, pairs[3] = all.w;
    } else if constexpr (N == 4) {
      const uint2 both = *reinterpret_cast<const uint2*>(from);
      pairs[0] = both.x, pairs[1] = both.y;
    } else {
      pairs[0] = *reinterpret_cast<const uint32_t*>(from);
    }
#pragma unroll
    for (int i = 0; i < N; i += 2) x[i] = bf16_low(pairs[i / 2]), x[i + 1] = bf16_high(pairs[i / 2]);
  } else {
    x[0] = bf16_to_float(*from);
  }
}

template <int N> MIMO_DEVICE void store_row(float* to, const float (&x)[N]) {
  if constexpr (N >= 4) {
#pragma unroll
    for (int i = 0; i < N; i += 4)
      *reinterpret_cast<float4*>(to + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
  } else if constexpr (N == 2) {
    *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]);
  } else {
    *to = x[0];
  }
}

// The sum of what the TEAM neighbouring threads of this one have, for all of them; TEAM is a power of two, 32 or
// more, and all threads of the block come. `parts`: a float for each warp of the block.
template <int TEAM> MIMO_DEVICE float team_sum(float x, float* parts) {
#pragma unroll
  for (int away = 16; away > 0; away /= 2) x += shfl_xor(x, away);
  if constexpr (TEAM > 32) {
    const int warp = threadIdx.x / 32, first = warp / (TEAM / 32) * (TEAM / 32);
    if (threadIdx.x % 32 == 0) parts[warp] = x;
    block_sync();
    x = 0.0f;
#pragma unroll
    for (int i = 0; i < TEAM / 32; ++i) x += parts[first + i];
  }
  return x;
}
