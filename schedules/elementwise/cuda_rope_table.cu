// Cosines and sines of the rotary angles of one step's tokens: table[token][0, 1][pair].
//
// A thread has the angle of one pair of one token. Constants: B (sequences), T (tokens of each), HALF (pairs), THREADS,
// WIDTH (1), INDEX (counts threads).
#include "angles.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
    rope_table(const int* __restrict__ pos, const float* __restrict__ inv_freq, float* __restrict__ table) {
  const INDEX at = INDEX(blockIdx.x) * THREADS + threadIdx.x;
  if (at >= INDEX(B * T) * HALF) return;
  const int row = int(at / HALF), pair = int(at % HALF);
  // the product is rounded to float32: that is the op's definition
  const float angle = float(pos[2 * (row / T)] + row % T) * inv_freq[pair];
  const Turn turn = turn_by(double(angle));
  float* to = table + size_t(row) * 2 * HALF + pair;
  to[0] = turn.cosine;
  to[HALF] = turn.sine;
}
