// Scales of a matrix, and where ZEROS says so the zero points beside them: in the codes' steps, without a sign.
//
// It reads the constants of the text that includes it: BITS, MIDDLE, SCALE (of a stored scale or zero point), and for
// the preprocessor ZEROS. Kernels take SCALES_PARAMETERS, which SCALES makes one thing.
#pragma once
#include "matmul.cuh"

#if ZEROS
struct Scales {
  const SCALE *scale, *zero;
};
#define SCALES_PARAMETERS const SCALE *__restrict__ scale, const SCALE *__restrict__ zero
#define SCALES (Scales{scale, zero})

__device__ __forceinline__ float scale_at(Scales scales, size_t index) { return matmul::widen(scales.scale[index]); }
__device__ __forceinline__ float zero_at(Scales scales, size_t index) { return matmul::widen(scales.zero[index]); }

// Of int8 products: a sum of codes less their zero point, both at the top of a byte (2^(8 - BITS)); `sum` is that of
// codes less MIDDLE, `of_x` of x alone. Rounded once: sums of up to 256 columns are float32 numbers.
__device__ __forceinline__ float less_zero(int sum, float zero, int of_x) {
  constexpr int UNIT = 1 << (8 - BITS);
  return fmaf(-zero * float(UNIT), float(of_x), float(sum + MIDDLE * UNIT * of_x));
}
#else
using Scales = const SCALE*;
#define SCALES_PARAMETERS const SCALE *__restrict__ scale
#define SCALES scale

__device__ __forceinline__ float scale_at(Scales scale, size_t index) { return matmul::widen(scale[index]); }
#endif
