// Sine and cosine of any angle, without the tables that the library's own keep in local memory.
#pragma once
#include "warp.cuh"

struct Turn { float cosine, sine; };

// Of `r`, at most pi/4, behind `quadrant` quarter turns, 0 to 3: Taylor's series are within 7e-12.
MIMO_DEVICE Turn turn_behind(int quadrant, double r) {
  const double z = r * r;
  double s = -1.0 / 39916800.0, c = 1.0 / 479001600.0;
  s = s * z + 1.0 / 362880.0, c = c * z - 1.0 / 3628800.0;
  s = s * z - 1.0 / 5040.0, c = c * z + 1.0 / 40320.0;
  s = s * z + 1.0 / 120.0, c = c * z - 1.0 / 720.0;
  s = s * z - 1.0 / 6.0, c = c * z + 1.0 / 24.0;
  c = c * z - 0.5;
  const float sine = float(s * z * r + r), cosine = float(c * z + 1.0);
  const float first = quadrant & 1 ? sine : cosine, second = quadrant & 1 ? cosine : sine;
  return {quadrant == 1 || quadrant == 2 ? -first : first, quadrant >= 2 ? -second : second};
}

// Of angles below 2^50. The nearest multiple of a quarter turn is taken off in float64 (with pi/2 as two numbers, and
// one rounding of a difference for each: Cody and Waite, Software Manual for the Elementary Functions, 1980).
MIMO_DEVICE Turn turn_by(double angle) {
  const double quarters = rint(angle * 0x1.45f306dc9c883p-1);   // 2 / pi
  const double r = fma(-quarters, 0x1.1a62633145c07p-54, fma(-quarters, 0x1.921fb54442d18p+0, angle));
  return turn_behind(int(quarters - 4.0 * floor(quarters * 0.25)), r);
}

// Of all numbers of float32. From 2^50 on they are whole numbers of 24 bits times a power of two; in the product of
// one with 2/pi all bits of 2/pi that bring whole turns alone are left out (Payne and Hanek, Radian Reduction for
// Trigonometric Functions, 1983). 96 bits of those behind them are used.
MIMO_DEVICE Turn turn_of(float angle) {
  const uint32_t bits = __float_as_uint(angle) & 0x7fffffffu;
  if (bits < 0x58800000u || bits >= 0x7f800000u) return turn_by(double(angle));   // below 2^50, or no number
  const int left_out = int(bits >> 23) - 152, by = left_out % 64;   // 25 to 102
  const bool far = left_out >= 64;
  const uint64_t a = far ? 0xfc2757d1f534ddc0u : 0xa2f9836e4e441529u;   // of the first 256 bits of 2/pi, 64 each
  const uint64_t b = far ? 0xdb6295993c439041u : 0xfc2757d1f534ddc0u;
  const uint64_t c = far ? 0xfe5163abdebbc561u : 0xdb6295993c439041u;
  const uint64_t high = by ? a << by | b >> (64 - by) : a, low = (by ? b << by | c >> (64 - by) : b) >> 32;
  const uint64_t whole = (bits & 0x7fffffu) | 0x800000u;
  const uint64_t turns = high * whole + (low * whole >> 32);   // in 2^-64 turns; those that do not fit are whole ones
  const uint64_t quarters = (turns + (uint64_t(1) << 61)) >> 62;
  const double r = double(int64_t(turns - (quarters << 62))) * 0x1.921fb54442d18p-62;   // 2 pi in 2^64
  const Turn turn = turn_behind(int(quarters & 3), r);
  return {turn.cosine, angle < 0.0f ? -turn.sine : turn.sine};
}
