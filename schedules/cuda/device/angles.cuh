// Sine and cosine of any angle below 2^50, without the tables that the library's own keep in local memory.
//
// The nearest multiple of a quarter turn is taken off in float64 (with pi/2 as two numbers, and one rounding of a
// difference for each: Cody and Waite, Software Manual for the Elementary Functions, 1980); of what is left, at most
// pi/4, Taylor's series are within 7e-12.
#pragma once
#include "warp.cuh"

struct Turn { float cosine, sine; };

MIMO_DEVICE Turn turn_by(double angle) {
  const double quarters = rint(angle * 0x1.45f306dc9c883p-1);   // 2 / pi
  const double r = fma(-quarters, 0x1.1a62633145c07p-54, fma(-quarters, 0x1.921fb54442d18p+0, angle)), z = r * r;
  double s = -1.0 / 39916800.0, c = 1.0 / 479001600.0;
  s = s * z + 1.0 / 362880.0, c = c * z - 1.0 / 3628800.0;
  s = s * z - 1.0 / 5040.0, c = c * z + 1.0 / 40320.0;
  s = s * z + 1.0 / 120.0, c = c * z - 1.0 / 720.0;
  s = s * z - 1.0 / 6.0, c = c * z + 1.0 / 24.0;
  c = c * z - 0.5;
  const float sine = float(s * z * r + r), cosine = float(c * z + 1.0);
  const int quadrant = int(quarters - 4.0 * floor(quarters * 0.25));
  const float first = quadrant & 1 ? sine : cosine, second = quadrant & 1 ? cosine : sine;
  return {quadrant == 1 || quadrant == 2 ? -first : first, quadrant >= 2 ? -second : second};
}
