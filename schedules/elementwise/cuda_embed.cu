// Rows of an embedding table as float32; an id outside of the table reads the nearest row of it.
//
// A thread has WIDTH columns of a token. Constants: T, V, D, TABLE (of its numbers), THREADS, WIDTH, INDEX (counts
// threads).
#include "rows.cuh"

constexpr int PIECES = D / WIDTH;

extern "C" __global__ void __launch_bounds__(THREADS)
    embed(const int* __restrict__ ids, const TABLE* __restrict__ table, float* __restrict__ y) {
  const INDEX at = INDEX(blockIdx.x) * THREADS + threadIdx.x;
  if (at >= INDEX(T) * PIECES) return;
  const int token = int(at / PIECES), column = int(at % PIECES) * WIDTH;
  const int row = max(min(ids[token], V - 1), 0);
  float x[WIDTH];
  load_row<WIDTH>(table + size_t(row) * D + column, x);
  store_row<WIDTH>(y + size_t(token) * D + column, x);
}
