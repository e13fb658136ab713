// Attention of one warp's 16 query rows in int8 arithmetic: codes of queries, keys and values, and their integers.
//
// The numbers of a token's head are codes of one scale, a 127th of their largest magnitude. A launch of its own makes
// those of keys and values, TILE slots of the cache at a time, as operands of mma.m16n8k32 (t = lane % 4):
//   keys    [DEEP / 16][TILE] chunks of 16 channels of a slot;
//   values  [TILE / 16][DW] chunks of 16 slots of a column: byte 4t + i is that of slot 8 (i / 2) + 2t + i % 2, whose
//           weight lane t has of each row.
// Eight chunks that follow one another are a matrix of ldmatrix, and lie in different banks. Sums of products begin
// at 1.5 * 2^23 as the bits of a float: below 2^22 in magnitude the integer is what the float has above that.
//
// Rows with a NaN or an infinity have any codes, and a scale that makes all NaN of who sees them, at no cost there: that
// of a query or key is NaN. Of a value, whose scale's logarithm hidden keys have in their logits too, it is NOT_FINITE:
// added to -inf it is lost; beside a logit it leaves the tile's other weights 0, with an inverse of 0 a sum of weights
// of 0, and that times its own power of two, infinity, is NaN.
// Method: INT-FlashAttention (Chen et al., 2024), with weights relative to the largest of their own tile, as the op
// defines it (docs/attention.md).
#pragma once
#include "groups.cuh"

namespace int8 {

constexpr int TILE = 128;            // slots whose weights share a largest one
constexpr float LEVELS = 255.0f;     // what that one becomes
constexpr float MOST_CODE = 127.0f;
constexpr float LEAST = 0x1p-60f;    // scales of values are not below it
constexpr float NOT_FINITE = 0x1p126f;
constexpr int ZERO = 0x4b400000;     // bits of groups::WHOLE

__device__ __forceinline__ float whole(int sum) { return __int_as_float(sum) - groups::WHOLE; }

// Which positions the slots of a cache of CAP slots hold once positions below `end` were written.
template <int CAP>
struct Places {
  int end, turn, base;  // slots below `turn` hold positions from `base` on, the others those CAP before

  __device__ __forceinline__ explicit Places(int end) : end(end), turn(end % CAP), base(end - end % CAP) {}

  // How many slots were written: the first ones.
  __device__ __forceinline__ int slots() const { return min(end, CAP); }

  // Negative: none.
  __device__ __forceinline__ int position(int slot) const {
    return slot < CAP ? base + slot - (slot < turn ? 0 : CAP) : -1;
  }

  // Whether any of COUNT slots holds one of the positions `low` ... `high`, of which none is negative.
  template <int COUNT>
  __device__ __forceinline__ bool meets(int slot, int low, int high) const {
    const int stop = min(slot + COUNT, CAP), fresh = min(stop, turn), old = max(slot, turn);
    return (slot < fresh && base + slot <= high && base + fresh > low) ||
           (old < stop && base - CAP + old <= high && base - CAP + stop > low);
  }

  // Whether all of COUNT slots do.
  template <int COUNT>
  __device__ __forceinline__ bool within(int slot, int low, int high) const {
    const bool together = slot + COUNT <= CAP && (slot + COUNT <= turn || slot >= turn);
    return together && position(slot) >= low && position(slot) + COUNT - 1 <= high;
  }
};

// ---- codes ---------------------------------------------------------------------------------------------

// What a step of the codes of a row is worth whose largest magnitude becomes the code `levels`.
__device__ __forceinline__ float step_of(float most, float levels) {
  return most < flash::infinity() ? most / levels : __uint_as_float(0x7fffffffu);
}

// What the row is multiplied by.
__device__ __forceinline__ float inverse_of(float most, float levels) { return most > 0.0f ? levels / most : 0.0f; }

// A code in the lowest byte. The product is rounded before it becomes an integer, as the op says.
__device__ __forceinline__ uint32_t code(float x, float inverse) {
  return __float_as_uint(rintf(x * inverse) + groups::WHOLE);
}

// Bytes from one slot's codes in shared memory to the next.
template <int WIDTH>
constexpr int STRIDE = WIDTH + 16;

// Codes of TILE rows of numbers in shared memory, CODES wide. `load(slot, column)` are four of a row's numbers from a
// column on, zeros behind its end; `done(slot, most, numbers)`, by all lanes, gets the largest magnitude and the lane's
// numbers: those from column 128i + 4 lane on.
template <int CODES, int THREADS, class Load, class Done>
__device__ __forceinline__ void encode(uint8_t* codes, float levels, Load load, Done done) {
  constexpr int STEPS = (CODES + 127) / 128;
  const int lane = threadIdx.x & 31;
  for (int slot = threadIdx.x >> 5; slot < TILE; slot += THREADS / 32) {
    float4 x[STEPS];
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      x[i] = load(slot, (i * 32 + lane) * 4);
      most = max_nan(most, max_nan(max_nan(fabsf(x[i].x), fabsf(x[i].y)), max_nan(fabsf(x[i].z), fabsf(x[i].w))));
    }
#pragma unroll
    for (int away = 16; away > 0; away /= 2) most = max_nan(most, shfl_xor(most, away));
    const float inverse = inverse_of(most, levels);
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      const int column = (i * 32 + lane) * 4;
      const uint32_t four[4] = {code(x[i].x, inverse), code(x[i].y, inverse), code(x[i].z, inverse),
                                code(x[i].w, inverse)};
      if (column < CODES) {
        *reinterpret_cast<uint32_t*>(codes + slot * STRIDE<CODES> + column) = groups::bytes_of<0>(four);
      }
    }
    done(slot, most, x);
  }
}

// Four numbers of a row of a cache, WIDTH wide, from a column on; zeros behind its end, and where `row` is negative.
template <int WIDTH>
__device__ __forceinline__ float4 four_of(const uint16_t* rows, int row, int column) {
  uint2 pairs = make_uint2(0u, 0u);
  if (row >= 0 && column < WIDTH) pairs = load8(rows + size_t(row) * WIDTH + column);
  return make_float4(bf16_low(pairs.x), bf16_high(pairs.x), bf16_low(pairs.y), bf16_high(pairs.y));
}

// Writes a tile's codes of keys where they belong.
template <int DEEP, int THREADS>
__device__ __forceinline__ void put_keys(uint8_t* to, const uint8_t* codes) {
  for (int at = threadIdx.x; at < DEEP / 16 * TILE; at += THREADS) {
    const int chunk = at / TILE, slot = at % TILE;
    reinterpret_cast<uint4*>(to)[at] =
        *reinterpret_cast<const uint4*>(codes + slot * STRIDE<DEEP> + chunk * 16);
  }
}

// And those of values.
template <int DW, int THREADS>
__device__ __forceinline__ void put_values(uint8_t* to, const uint8_t* codes) {
  for (int at = threadIdx.x; at < TILE / 16 * DW; at += THREADS) {
    const uint8_t* from = codes + at / DW * 16 * STRIDE<DW> + at % DW;
    uint32_t words[4] = {};
#pragma unroll
    for (int t = 0; t < 4; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[t] |= uint32_t(from[(i / 2 * 8 + t * 2 + i % 2) * STRIDE<DW>]) << (8 * i);
      }
    }
    reinterpret_cast<uint4*>(to)[at] = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// Copies the codes of KEYS keys from a slot on, asynchronously: all of a tile, or some.
template <int KEYS, int DEEP, int THREADS>
__device__ __forceinline__ void copy_keys(uint32_t to, const uint8_t* codes, int slot) {
  const uint8_t* from = codes + (size_t(slot / TILE) * (DEEP / 16) * TILE + slot % TILE) * 16;
#pragma unroll
  for (int at = threadIdx.x; at < DEEP / 16 * KEYS; at += THREADS) {
    cp_async16(to + at * 16, from + (at / KEYS * TILE + at % KEYS) * 16, true);
  }
}

// ---- queries and logits --------------------------------------------------------------------------------

// Bytes of shared memory for the codes of a warp's 16 queries: left operands, a lane's own side by side.
template <int DEEP>
constexpr int QUERY_BYTES = 16 * DEEP;

// Leaves them in `codes`; `unit` is what one step of a row's integers is worth. `number(half, column)` is of the lane's
// row number `half`, zero behind its end. `factor`: on q.k.
template <int DEEP, class Number>
__device__ __forceinline__ void put_queries(uint8_t* codes, float (&unit)[2], float levels, float factor, Number number) {
  const int lane = threadIdx.x & 31;
  uint32_t* mine = reinterpret_cast<uint32_t*>(codes) + lane * 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    auto own = [&](int run, int i) { return number(half, run * 16 + (lane & 3) * 4 + i); };  // of 16 channels
    float most = 0.0f;
    for (int run = 0; run < DEEP / 16; ++run) {
#pragma unroll
      for (int i = 0; i < 4; ++i) most = max_nan(most, fabsf(own(run, i)));
    }
    most = max_nan(most, shfl_xor(most, 1));
    most = max_nan(most, shfl_xor(most, 2));
    const float inverse = inverse_of(most, levels);
    unit[half] = step_of(most, levels) * factor;
    for (int run = 0; run < DEEP / 16; ++run) {
      uint32_t four[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) four[i] = code(own(run, i), inverse);
      mine[run / 2 * 128 + half + run % 2 * 2] = groups::bytes_of<0>(four);
    }
  }
}

// Logits (base 2) of KEYS keys in shared memory, whose scales follow one another: `logits[n]` has keys 8n ... 8n + 7.
// `each(n, logits[n])` may change them.
template <int KEYS, int DEEP, class Each>
__device__ __forceinline__ void score(float (&logits)[KEYS / 8][4], const uint8_t* queries, const float (&unit)[2],
                                      uint32_t keys, const float* scales, Each each) {
  static_assert(DEEP <= 256);  // of more channels sums may be 2^22
  const int lane = threadIdx.x & 31;
  const uint32_t mine = keys + ((lane >> 3 & 1) * KEYS + (lane >> 4) * 8 + (lane & 7)) * 16;
  uint32_t a[DEEP / 32][4];
#pragma unroll
  for (int step = 0; step < DEEP / 32; ++step) {
    const uint4 x = *reinterpret_cast<const uint4*>(queries + (step * 32 + lane) * 16);
    a[step][0] = x.x, a[step][1] = x.y, a[step][2] = x.z, a[step][3] = x.w;
  }
#pragma unroll
  for (int n = 0; n < KEYS / 16; ++n) {
    int sums[2][4];
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[0][e] = sums[1][e] = ZERO;
#pragma unroll
    for (int step = 0; step < DEEP / 32; ++step) {
      uint32_t b[4];
      ldmatrix_x4(b, mine + (step * 2 * KEYS + n * 16) * 16);
      mma_i8(sums[0], a[step], b[0], b[1]);
      mma_i8(sums[1], a[step], b[2], b[3]);
    }
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const float2 scale = *reinterpret_cast<const float2*>(scales + n * 16 + u * 8 + (lane & 3) * 2);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        logits[2 * n + u][e] = __fmul_rn(whole(sums[u][e]), unit[e / 2] * (e % 2 ? scale.y : scale.x));
      }
      each(2 * n + u, logits[2 * n + u]);
    }
  }
}

// Hides keys that the lane's rows do not see, of tile number n; `seen(half, key)`: as for flash::attend.
template <class Seen>
__device__ __forceinline__ void hide(int n, float (&logits)[4], Seen seen) {
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (!seen(e >> 1, n * 8 + (threadIdx.x & 3) * 2 + (e & 1))) logits[e] = -flash::infinity();
  }
}

// ---- weights and values --------------------------------------------------------------------------------

// The largest logit of each of the lane's rows, and the largest with the scale of its key's value in it.
struct Largest {
  float plain[2] = {-flash::infinity(), -flash::infinity()}, scaled[2] = {-flash::infinity(), -flash::infinity()};

  // Takes those of tile number n, and leaves logits with the scales (logarithms `logs`, base 2) in them.
  __device__ __forceinline__ void add(int n, float (&logits)[4], const float* logs) {
    const float2 log = *reinterpret_cast<const float2*>(logs + n * 8 + (threadIdx.x & 3) * 2);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      plain[e / 2] = fmaxf(plain[e / 2], logits[e]);
      logits[e] = __fadd_rn(logits[e], e % 2 ? log.y : log.x);
      scaled[e / 2] = fmaxf(scaled[e / 2], logits[e]);
    }
  }

  // Once behind the last tile: over all lanes of a row.
  __device__ __forceinline__ void close() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int away = 1; away < 4; away *= 2) {
        plain[half] = fmaxf(plain[half], shfl_xor(plain[half], away));
        scaled[half] = fmaxf(scaled[half], shfl_xor(scaled[half], away));
      }
    }
  }
};

// Turns a tile's logits, with the scales of values in them, into bytes, left operands of `add_values`: weights times
// scales, relative to the row's largest. `inverses` are of those scales. What the rows had is worth `shrink` of what
// it was, and a step of the bytes' integers `part`; sums of weights are floats, without scales.
template <int DW>
__device__ __forceinline__ void weigh(uint32_t (&bytes)[TILE / 32][4], float (&shrink)[2], float (&part)[2],
                                      flash::Rows<DW>& rows, const float (&logits)[TILE / 8][4],
                                      const Largest& largest, const float* inverses) {
  const int column = (threadIdx.x & 3) * 2;
  float best[2], sums[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float top = fmaxf(rows.top[half], largest.plain[half]), base = top == -flash::infinity() ? 0.0f : top;
    shrink[half] = exp2_approx(rows.top[half] - base);
    part[half] = exp2_approx(largest.scaled[half] - base);
    rows.top[half] = top;
    best[half] = largest.scaled[half] == -flash::infinity() ? 0.0f : largest.scaled[half];
  }
#pragma unroll
  for (int quarter = 0; quarter < TILE / 16; ++quarter) {
    uint32_t x[2][4];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int n = 2 * quarter + u;
      const float2 inverse = *reinterpret_cast<const float2*>(inverses + n * 8 + column);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float weight = exp2_approx(logits[n][e] - best[e / 2]);
        sums[e / 2] = fmaf(weight, e % 2 ? inverse.y : inverse.x, sums[e / 2]);
        x[e / 2][u * 2 + e % 2] = __float_as_uint(fmaf(weight, LEVELS, groups::WHOLE));
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) bytes[quarter / 2][half + quarter % 2 * 2] = groups::bytes_of<0>(x[half]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    rows.sum[half] = fmaf(sums[half], part[half], __fmul_rn(rows.sum[half], shrink[half]));
    part[half] *= 1.0f / LEVELS;
  }
}

// Adds a tile's weighted values, whose codes are in shared memory, to the rows.
template <int DW>
__device__ __forceinline__ void add_values(flash::Rows<DW>& rows, const uint32_t (&bytes)[TILE / 32][4],
                                           const float (&shrink)[2], const float (&part)[2], uint32_t values) {
  const int lane = threadIdx.x & 31;
  const uint32_t mine = values + ((lane >> 3 & 1) * DW + (lane >> 4) * 8 + (lane & 7)) * 16;
#pragma unroll
  for (int j = 0; j < DW / 16; ++j) {
    int sums[2][4];
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[0][e] = sums[1][e] = ZERO;
#pragma unroll
    for (int step = 0; step < TILE / 32; ++step) {
      uint32_t b[4];
      ldmatrix_x4(b, mine + (step * 2 * DW + j * 16) * 16);
      mma_u8(sums[0], bytes[step], b[0], b[1]);
      mma_u8(sums[1], bytes[step], b[2], b[3]);
    }
#pragma unroll
    for (int u = 0; u < 2; ++u) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& out = rows.out[2 * j + u][e];
        out = fmaf(whole(sums[u][e]), part[e / 2], __fmul_rn(out, shrink[e / 2]));
      }
    }
  }
}

}  // namespace int8
