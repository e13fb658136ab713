// Attention of one warp's 16 query rows over KV caches of E4M3 numbers with a power of two for each key and value.
//
// Nothing is rounded more coarsely than float32: codes become bfloat16, which has their three bits of mantissa and
// more exponents, queries and weights are sums of three numbers of bfloat16, and powers multiply logits and weights.
//
// A block is 16 rows of W codes, then the 16 rows' bytes (power + 127; 255: the row is no number, its codes are 0).
// In shared memory 16 bytes stand behind each row: 8 rows then lie in different banks if W / 16 is even.
// In values the columns of 16 neighbours alternate, 0, 8, 1, 9, ...: a transposed load of pairs of codes gives a
// lane one number for each of two matrix tiles.
#pragma once
#include "e4m3.cuh"
#include "exact.cuh"

namespace float8 {

constexpr int ROWS = 16;
template <int W> constexpr int BLOCK = ROWS * W + ROWS;           // bytes in a cache
template <int W> constexpr int STRIDE = W + 16;                   // of a row in shared memory
template <int W> constexpr int HELD = ROWS * STRIDE<W> + ROWS;    // of a block there
template <int DK> constexpr int TERMS_BYTES = 3 * (DK / 16) * 512;  // of 16 rows of queries in shared memory

// Copies a block by so many threads, asynchronously; rows from `live` on are zeros, their bytes are anything.
template <int W, int THREADS>
__device__ __forceinline__ void copy_block(uint32_t to, const uint8_t* from, int live, int thread) {
  constexpr int LINES = W / 16;
#pragma unroll
  for (int at = thread; at < ROWS * LINES + 1; at += THREADS) {
    const int row = at / LINES, line = at % LINES;
    cp_async16(to + row * STRIDE<W> + line * 16, from + at * 16, row < live || row == ROWS);
  }
}

// Puts 16 rows of queries into shared memory as left operands, in three terms. `row(i)` is null: zeros.
template <int D, int DK, int THREADS, class Row>
__device__ __forceinline__ void put_terms(uint8_t* to, int thread, Row row) {
  for (int at = thread; at < DK / 16 * 32; at += THREADS) {
    const int step = at / 32, g = at % 32 / 4, t = at % 4;
    uint32_t a[3][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* from = row(g + 8 * half);
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = step * 16 + t * 4 + i;
        x[i] = from != nullptr && column < D ? from[column] : 0.0f;
      }
      uint32_t low[3], high[3];
      exact::split(low, x[0], x[1]);
      exact::split(high, x[2], x[3]);
#pragma unroll
      for (int term = 0; term < 3; ++term) a[term][half] = low[term], a[term][2 + half] = high[term];
    }
#pragma unroll
    for (int term = 0; term < 3; ++term) {
      *reinterpret_cast<uint4*>(to + ((term * (DK / 16) + step) * 32 + at % 32) * 16) =
          make_uint4(a[term][0], a[term][1], a[term][2], a[term][3]);
    }
  }
}

// Two codes of a word, number LOW and number HIGH, as numbers of bfloat16.
template <int LOW, int HIGH>
__device__ __forceinline__ uint32_t widen(uint32_t codes) {
  return widen_e4m3<false>(prmt(codes, 0u, HIGH << 12 | 4 << 8 | LOW << 4 | 4));  // in the upper bytes of both halves
}

__device__ __forceinline__ float power_of(uint32_t byte) { return __uint_as_float(byte << 23); }

// Logits of a block's keys before scaling.
template <int DK>
__device__ __forceinline__ void score(float (&first)[4], float (&second)[4], const uint8_t* queries,
                                      const uint8_t* block) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  float sums[2][4] = {}, small[2][4] = {};
#pragma unroll
  for (int step = 0; step < DK / 16; ++step) {
    uint32_t a[3][4];
#pragma unroll
    for (int term = 0; term < 3; ++term) {
      const uint4 x = *reinterpret_cast<const uint4*>(queries + ((term * (DK / 16) + step) * 32 + lane) * 16);
      a[term][0] = x.x, a[term][1] = x.y, a[term][2] = x.z, a[term][3] = x.w;
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const uint32_t codes =
          *reinterpret_cast<const uint32_t*>(block + (n * 8 + g) * STRIDE<DK> + step * 16 + t * 4);
      const uint32_t b0 = widen<0, 1>(codes), b1 = widen<2, 3>(codes);
      mma_bf16(small[n], a[2], b0, b1);
      mma_bf16(small[n], a[1], b0, b1);
      mma_bf16(sums[n], a[0], b0, b1);
    }
  }
  const uint8_t* powers = block + ROWS * STRIDE<DK> + t * 2;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    first[e] = (sums[0][e] + small[0][e]) * power_of(powers[e % 2]);
    second[e] = (sums[1][e] + small[1][e]) * power_of(powers[8 + e % 2]);
  }
}

// Adds weighted values of a block to the rows; `first` and `second` are the weights of its two tiles of keys.
template <int DW, class Seen>
__device__ __forceinline__ void add_values(exact::Rows<DW>& rows, const float (&first)[4], const float (&second)[4],
                                           const uint8_t* block, bool masked, Seen seen) {
  const int lane = threadIdx.x & 31;
  const int column = (lane & 3) * 2;
  const uint8_t* powers = block + ROWS * STRIDE<DW>;
  // of keys that are not seen the power may be anything; a value that is no number shows at a weight of 0, too
  auto scaled = [&](float weight, int half, int key) {
    return masked && !seen(half, key) ? 0.0f : weight * power_of(powers[key]);
  };
  uint32_t a[3][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float(&weights)[4] = i < 2 ? first : second;
    const int half = i % 2, key = i / 2 * 8 + column;
    uint32_t terms[3];
    exact::split(terms, scaled(weights[half * 2], half, key), scaled(weights[half * 2 + 1], half, key + 1));
#pragma unroll
    for (int term = 0; term < 3; ++term) a[term][i] = terms[term];
  }
  const uint32_t mine = smem_address(block) + (lane & 15) * STRIDE<DW>;
#pragma unroll
  for (int j = 0; j < DW / 16; ++j) {
    uint32_t codes[2];
    ldmatrix_x2_trans(codes, mine + j * 16);
    float sums[2][4] = {};
    uint32_t b[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) b[0][i] = widen<0, 2>(codes[i]), b[1][i] = widen<1, 3>(codes[i]);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int term = 2; term >= 0; --term) mma_bf16(sums[n], a[term], b[n][0], b[n][1]);
#pragma unroll
      for (int e = 0; e < 4; ++e) rows.out[2 * j + n][e] += sums[n][e];
    }
  }
}

// One step of online softmax over a block of keys and one of values in shared memory; `seen`: as for flash::attend.
template <int DK, int DW, class Seen>
__device__ __forceinline__ void attend(exact::Rows<DW>& rows, const uint8_t* queries, const uint8_t* keys,
                                       const uint8_t* values, float scale, bool masked, Seen seen) {
  float logits[2][4];
  score<DK>(logits[0], logits[1], queries, keys);
  if (masked) {
    const int column = (threadIdx.x & 3) * 2;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (!seen(e / 2, n * 8 + column + e % 2)) logits[n][e] = -flash::infinity();
      }
    }
  }
  exact::weigh<2>(logits, rows, scale);
  add_values<DW>(rows, logits[0], logits[1], values, masked, seen);
}

}  // namespace float8
