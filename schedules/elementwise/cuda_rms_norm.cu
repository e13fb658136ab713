// RMS normalisation of rows, of the sum with a residual row where there is one.
//
// TEAM threads have a row, WIDTH neighbouring columns of each at a time; a block has THREADS / TEAM rows. Where HOLD,
// a thread keeps its columns in registers between the two passes, else it reads them again. The root is taken of a sum
// of squares that does not depend on how many rows there are. Constants: ROWS, D, EPS, RESIDUAL, HOLD, THREADS, TEAM,
// WIDTH.
#include "rows.cuh"

constexpr int STEPS = (D + TEAM * WIDTH - 1) / (TEAM * WIDTH), KEPT = HOLD ? STEPS : 1, WRITTEN_OUT = HOLD ? STEPS : 4;

#if RESIDUAL
#define RESIDUAL_INPUT const float *__restrict__ residual,
#define RESIDUAL_OUTPUT , float *__restrict__ total
#else
#define RESIDUAL_INPUT
#define RESIDUAL_OUTPUT
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm(const float* __restrict__ x, RESIDUAL_INPUT const float* __restrict__ weight,
             float* __restrict__ y RESIDUAL_OUTPUT) {
  MIMO_SHARED(smem);
  const int lane = threadIdx.x % TEAM, row = blockIdx.x * (THREADS / TEAM) + threadIdx.x / TEAM;
  const size_t begin = size_t(row) * D;
  float kept[KEPT][WIDTH], squares = 0.0f;
#pragma unroll WRITTEN_OUT
  for (int s = 0; s < STEPS; ++s) {
    const int column = (s * TEAM + lane) * WIDTH;
    if (row >= ROWS || column >= D) break;
    float(&v)[WIDTH] = kept[HOLD ? s : 0];
    load_row<WIDTH>(x + begin + column, v);
#if RESIDUAL
    float other[WIDTH];
    load_row<WIDTH>(residual + begin + column, other);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) v[i] += other[i];
    store_row<WIDTH>(total + begin + column, v);
#endif
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) squares += v[i] * v[i];
  }
  const float scale = 1.0f / sqrtf(team_sum<TEAM>(squares, reinterpret_cast<float*>(smem)) / D + EPS);
#pragma unroll WRITTEN_OUT
  for (int s = 0; s < STEPS; ++s) {
    const int column = (s * TEAM + lane) * WIDTH;
    if (row >= ROWS || column >= D) break;
    float(&v)[WIDTH] = kept[HOLD ? s : 0];
    float gain[WIDTH];
#if RESIDUAL
    if (!HOLD) load_row<WIDTH>(total + begin + column, v);
#else
    if (!HOLD) load_row<WIDTH>(x + begin + column, v);
#endif
    load_row<WIDTH>(weight + column, gain);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) gain[i] *= v[i] * scale;
    store_row<WIDTH>(y + begin + column, gain);
  }
}
