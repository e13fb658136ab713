// What comes before, between and after the two matmuls of experts by matrix units: x as an operand, lists of slots,
// hidden values as an operand, and a token's slots added up.
//
// Slots lie in the order of their experts ("places", see `experts::place`). Hidden values and their codes have a row
// for each place, what the second matmul sums one for each slot.
//
// It reads the constants of the text that includes it: those of experts.cuh, BM (slots of a tile), D_PADDED, F_PADDED
// (columns of an operand), D_ROWS (rows of an expert's down matrix), X_BLOCKS (blocks that make operands of x), SUM
// (type of a sum), SCALE (of a stored scale), FACTOR (of all sums), SPLIT (pieces of K of the second matmul), X_F16, and
// for the preprocessor INT8 (operands of x are int8 with a scale for each row), CODES (weights are unpacked), W_SCALED
// (weights have a scale for each row).
#pragma once
#include "experts.cuh"

#if INT8
using OPERAND = int8_t;
using HIDDEN = float;  // a launch of its own makes codes of them
#else
using OPERAND = uint16_t;
using HIDDEN = uint16_t;
#endif

extern "C" __global__ void __launch_bounds__(experts::THREADS)
    experts_prepare(const float* x, OPERAND* operand, float* x_scale, const int* ids, int* counts) {
  MIMO_SHARED(smem);
  if (blockIdx.x >= X_BLOCKS) {
    experts::count(ids, counts, blockIdx.x - X_BLOCKS, reinterpret_cast<int*>(smem));
    return;
  }
#if INT8
  matmul::quantize<D, D_PADDED, 0, experts::THREADS>(x, operand, x_scale, reinterpret_cast<float*>(smem));
#else
  matmul::round_rows<T, D, D_PADDED, CODES, X_F16, experts::THREADS>(x, operand);
#endif
}

extern "C" __global__ void __launch_bounds__(experts::THREADS)
    experts_place(const int* ids, const int* counts, int* order, int4* list, int* totals) {
  MIMO_SHARED(smem);
  experts::place<BM>(ids, counts, order, list, totals, reinterpret_cast<int*>(smem));
}

// What sums of a row of weights are multiplied by.
__device__ __forceinline__ float scaled(SUM sum, const SCALE* scale, const float* x_scale, size_t row, int x_row) {
  float value = float(sum) * FACTOR;  // a power of two
#if INT8 && W_SCALED
  value *= x_scale[x_row] * matmul::widen(scale[row]);
#elif INT8
  value *= x_scale[x_row];
#elif W_SCALED
  value *= matmul::widen(scale[row]);
#endif
  return value;
}

// Stores two neighbouring columns of a place's row between the matmuls.
__device__ __forceinline__ void store_hidden(HIDDEN* hidden, int place, int column, float first, float second) {
#if INT8
  matmul::store_two<F>(hidden + size_t(place) * F, column, first, second);
#else
  if (column >= F_PADDED) return;
  const uint32_t both = matmul::pack_two<X_F16>(first, second);
  HIDDEN* row = hidden + size_t(place) * F_PADDED;
#if CODES
  HIDDEN* four = row + column / 4 * 4 + column % 4 / 2;  // of each 4 columns the middle two change places
  four[0] = uint16_t(both), four[2] = uint16_t(both >> 16);
#else
  *reinterpret_cast<uint32_t*>(row + column) = both;
#endif
#endif
}

#if INT8
extern "C" __global__ void __launch_bounds__(experts::THREADS)
    experts_quantize_hidden(const int* order, const int* totals, const float* hidden, int8_t* codes, float* scale) {
  MIMO_SHARED(smem);
  const int place = blockIdx.x;
  if (place >= totals[1]) return;
  matmul::quantize_columns<experts::THREADS>(hidden + size_t(place) * F, codes + size_t(place) * F_PADDED,
                                             scale + order[place], reinterpret_cast<float*>(smem), 0, F, F_PADDED);
}
#endif

extern "C" __global__ void __launch_bounds__(experts::THREADS)
    experts_combine(const SUM* __restrict__ parts, const SCALE* __restrict__ scale,
                    const float* __restrict__ hidden_scale, const int* __restrict__ ids,
                    const float* __restrict__ weights, float* __restrict__ y) {
  const int index = blockIdx.x * experts::THREADS + threadIdx.x;
  if (index >= T * D) return;
  const int column = index % D;
  y[index] = experts::combine(ids, weights, index / D, [&](int slot, int expert) {
    const SUM sum = matmul::join<SPLIT, SLOTS, D>(parts, slot * D + column);
    return scaled(sum, scale, hidden_scale, size_t(expert) * D_ROWS + column, slot);
  });
}
