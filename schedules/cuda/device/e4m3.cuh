// 8-bit floats E4M3 (four bits of exponent, three of mantissa, no infinities) as numbers of 16 bits.
#pragma once
#include "warp.cuh"

// Bytes 1 and 3 of a word as bfloat16, or as float16 (HALF). Exact: both have the bits of mantissa, and more exponents.
template <bool HALF>
__device__ __forceinline__ uint32_t widen_e4m3(uint32_t word) {
  const uint32_t sign = word & 0x80008000u;
  if (HALF) return f16x2_mul((word >> 1 & 0x3f803f80u) | sign, 0x5c005c00u);  // 2^8 times too small before
  return bf16x2_fma((word >> 4 & 0x07f007f0u) | sign, 0x7b807b80u, 0u);       // 2^120 times
}
