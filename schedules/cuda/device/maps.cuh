// Words of generic functions (schedules/generic/cuda_print.py): what TIR has and C++ has not.
#pragma once
#include "angles.cuh"
#include "warp.cuh"

// NaN if one of both is: which of many numbers comes last does not matter then.
template <class T> MIMO_DEVICE T larger(T a, T b) { return a > b || a != a ? a : b; }
template <class T> MIMO_DEVICE T smaller(T a, T b) { return a < b || a != a ? a : b; }
template <class T> MIMO_DEVICE T added(T a, T b) { return T(a + b); }

// Quotients of whole numbers rounded down, and what is left then.
template <class T> MIMO_DEVICE T floor_div(T a, T b) {
  return T(a % b != 0 && (a < 0) != (b < 0) ? a / b - 1 : a / b);
}
template <class T> MIMO_DEVICE T floor_mod(T a, T b) {
  const T left = T(a % b);
  return T(left != 0 && (left < 0) != (b < 0) ? left + b : left);
}

MIMO_DEVICE uint16_t to_bf16(float x) { return uint16_t(pack_bf16(x, 0.0f)); }
MIMO_DEVICE uint16_t to_f16(float x) { return uint16_t(pack_f16(x, 0.0f)); }

MIMO_DEVICE float infinity() { return __uint_as_float(0x7f800000u); }
template <class T> MIMO_DEVICE bool is_nan(T x) { return x != x; }
template <class T> MIMO_DEVICE bool is_infinite(T x) { return x == T(infinity()) || x == -T(infinity()); }
template <class T> MIMO_DEVICE bool is_finite(T x) { return x - x == T(0); }

MIMO_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
MIMO_DEVICE double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
MIMO_DEVICE double inverse_root(double x) { return 1.0 / sqrt(x); }

// The value of one thread of each team of TEAM neighbours, joined with those of the others by halves; the first of
// a team has the result. All threads of the block come; `parts` has room for a T of each.
template <int TEAM, class T, class Join> MIMO_DEVICE T joined(T x, T* parts, Join join) {
  const int lane = threadIdx.x % TEAM;
  block_sync();   // what was read of `parts` before
  parts[threadIdx.x] = x;
  for (int away = TEAM / 2; away > 0; away /= 2) {
    block_sync();
    if (lane < away) parts[threadIdx.x] = join(parts[threadIdx.x], parts[threadIdx.x + away]);
  }
  return parts[threadIdx.x];
}
