// silu(gate) * up of rows [gate | up].
//
// A thread has WIDTH neighbouring results. Constants: T, F, THREADS, WIDTH, INDEX (counts threads).
#include "rows.cuh"

constexpr int PIECES = F / WIDTH;

extern "C" __global__ void __launch_bounds__(THREADS) swiglu(const float* __restrict__ x, float* __restrict__ y) {
  const INDEX at = INDEX(blockIdx.x) * THREADS + threadIdx.x;
  if (at >= INDEX(T) * PIECES) return;
  const size_t row = size_t(at / PIECES);
  const int column = int(at % PIECES) * WIDTH;
  float gate[WIDTH], up[WIDTH];
  load_row<WIDTH>(x + row * 2 * F + column, gate);
  load_row<WIDTH>(x + row * 2 * F + F + column, up);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];   // x / inf is 0
  store_row<WIDTH>(y + row * F + column, gate);
}
