// A block's tile of x * w^T by mma.sync, where w is codes of 2, 4 or 8 bits (`codes.cuh`), unpacked in registers.
//
// As `mma_tiles.cuh`, but for what follows. It reads the constants of the text that includes it: those of `codes.cuh`,
// W_GROUP (columns of w that share a scale; 0: all of a row, whose scale is applied last), ELEMENT (bytes of an element
// of x), and for the preprocessor INT8 (x is int8: 2 and 4 bits alone; else 16-bit floats), X_F16 (they are float16)
// and ZEROS (groups have zero points; x is no float16), X_GROUPED (int8 x has a scale for each X_GROUP columns).
//
// A unit is 16 bytes of a row of w: four words, one for each lane of a quad. Which column of x stands where along a
// product's K is free, so that a lane unpacks its own word, and has its own columns of x, which lie side by side:
// no word passes from lane to lane. INT8: a field of four columns is one register of an operand. Else it is two,
// columns 0 and 2, and 1 and 3: of each 4 columns of x the middle two have changed places. Where a codebook's numbers
// are TERMS of 16 bits, there is a product of each, that of the smallest terms first: sums are cut off below the greatest.
//
// Sums of columns that share all scales are multiplied by these in float32 and added up; int8 ones are exact before.
// ZEROS: a product with ones gives each lane the sums of its own rows of x over the same columns, which the zero points
// are multiplied with.
#pragma once
#include "async.cuh"
#include "codes.cuh"
#include "matmul.cuh"
#include "mma.cuh"
#include "scales.cuh"

namespace tiles {

#if INT8
using PART = int;
#else
using PART = float;
#endif
__device__ __forceinline__ void multiply(PART (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if INT8
  mma_i8(c, a, b0, b1);
#elif X_F16
  mma_f16(c, a, b0, b1);
#else
  mma_bf16(c, a, b0, b1);
#endif
}

constexpr int FIELDS = 8 / BITS, STEPS = INT8 ? FIELDS / 2 : FIELDS;  // of a unit: products along K
#if W_BOOK && !INT8
constexpr int TERMS = PLANES / 2;
#else
constexpr int TERMS = 1;
#endif

// What a group of a row of w is multiplied by, and ZEROS its zero point.
#if ZEROS
struct Scaling {
  float scale, zero;
};
__device__ __forceinline__ float factor_of(Scaling own) { return own.scale; }
__device__ __forceinline__ Scaling scaling_at(Scales scales, size_t index) {
  return {scale_at(scales, index), zero_at(scales, index)};
}

// A sum of codes less its zero point: `part` of codes less their middle one, `of_x` of x.
__device__ __forceinline__ float less_zero(PART part, float zero, PART of_x) {
#if INT8
  return ::less_zero(part, zero, of_x);
#else
  return fmaf(float(MIDDLE) - zero, of_x, part);
#endif
}
#else
using Scaling = float;
__device__ __forceinline__ float factor_of(float own) { return own; }
__device__ __forceinline__ float scaling_at(Scales scales, size_t index) { return scale_at(scales, index); }
#endif

// The registers of a word of codes for all steps of its unit; of a codebook's numbers, a term.
template <int TERM>
__device__ __forceinline__ void unpack(uint32_t word, uint32_t (&out)[2 * STEPS]) {
#if INT8
#pragma unroll
  for (int field = 0; field < FIELDS; ++field) out[field] = codes::bytes_of(word, field);
#else
#pragma unroll
  for (int field = 0; field < FIELDS; ++field) {
    const uint2 two = codes::pairs_of<X_F16, TERM>(word, field);
    out[2 * field] = two.x, out[2 * field + 1] = two.y;
  }
#endif
}

template <int BM, int BN, int DEPTH, int ROW_BYTES, int WARPS_M, int WARPS_N, int STAGES>
struct Codes {
  static constexpr int THREADS = 32 * WARPS_M * WARPS_N, TILES_K = matmul::up(ROW_BYTES, DEPTH);
  static constexpr int COLUMNS = DEPTH / ELEMENT;  // of a tile
  static constexpr int W_DEPTH = COLUMNS * BITS / 8, W_ROW_BYTES = ROW_BYTES / ELEMENT * BITS / 8;
  static constexpr int X_LINES = DEPTH / 16, W_LINES = W_DEPTH / 16;
  static constexpr int UNIT = 128 / BITS, UNITS = COLUMNS / UNIT, GROUP_UNITS = W_GROUP ? W_GROUP / UNIT : 1;
#if X_GROUPED
  static constexpr int X_UNITS = X_GROUP / UNIT, RUN_UNITS = W_GROUP && GROUP_UNITS < X_UNITS ? GROUP_UNITS : X_UNITS;
  static_assert(X_UNITS > 0);
#else
  static constexpr int RUN_UNITS = W_GROUP ? GROUP_UNITS : 0;  // 0: nothing is multiplied before the last step
#endif
#if ZEROS && INT8
  static_assert(RUN_UNITS > 0 && RUN_UNITS * UNIT <= 256);  // see less_zero
#endif
  static constexpr int MOST = ZEROS ? 2 : 4;  // operands of all units of a tile would fill the registers
  static constexpr int UNROLL = UNITS < MOST ? UNITS : MOST;
  static constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N, MT = WM / 16, NT = WN / 8;
  static constexpr int STAGE_BYTES = BM * DEPTH + BN * W_DEPTH;
  static_assert(MT > 0 && NT > 0 && STEPS > 0 && UNITS > 0 && W_LINES <= 8 && X_LINES >= 8 && GROUP_UNITS > 0);

  // Where piece `line` of 16 bytes lies: 8 rows with the same line are in different banks.
  static __device__ __forceinline__ int w_place(int row, int line) {
    return row * W_DEPTH + (line ^ (row / (8 / W_LINES) % W_LINES)) * 16;
  }
  // So that lanes which load at the same time, two or four rows of a unit, are in different banks.
  static __device__ __forceinline__ int x_place(int row, int line) {
    constexpr int BYTES = 8 * STEPS;  // of a lane
    return row * DEPTH + (line ^ (BYTES == 8 ? (row & 3) << 1 : BYTES == 16 ? (row & 1) << 2 : row & 1)) * 16;
  }

  template <int ROWS, int LINES, int TILE_BYTES, class Rows, class Place>
  static __device__ __forceinline__ void copy_tile(uint32_t to, Rows row_of, int row_bytes, int depth, Place place) {
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * LINES; i += THREADS) {
      const int row = i / LINES, line = i % LINES, byte = depth * TILE_BYTES + line * 16;
      const matmul::Row from = row_of(row);
      const bool valid = from.there && byte < row_bytes;
      cp_async16(to + place(row, line), valid ? from.bytes + byte : from.bytes, valid);
    }
  }

  // Both of a lane's rows of x, from `row` on, for all steps of a unit.
  static __device__ __forceinline__ void load_x(const uint8_t* xs, int row, int unit, uint32_t (&a)[2][2 * STEPS]) {
#pragma unroll
    for (int half = 0; half < 2; ++half, row += 8) {
      const int byte = (unit * 4 + int(threadIdx.x) % 4) * 8 * STEPS;
      if (STEPS == 1) {
        const uint2 two = *reinterpret_cast<const uint2*>(xs + x_place(row, byte / 16) + byte % 16);
        a[half][0] = two.x, a[half][1] = two.y;
      } else {
#pragma unroll
        for (int s = 0; s < STEPS; s += 2) {
          const uint4 four = *reinterpret_cast<const uint4*>(xs + x_place(row, byte / 16 + s / 2));
          a[half][2 * s] = four.x, a[half][2 * s + 1] = four.y;
          a[half][2 * s + 2] = four.z, a[half][2 * s + 3] = four.w;
        }
      }
    }
  }

  // Adds the products of a unit of the tile's rows of both operands; ZEROS: and those of x with ones.
  static __device__ __forceinline__ void products(const uint8_t* xs, const uint8_t* ws, int unit,
                                                  PART (&part)[MT][NT][4], PART (&of_x)[MT][4]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_m = warp / WARPS_N * WM, warp_n = warp % WARPS_N * WN;
    uint32_t a[MT][2][2 * STEPS];
#pragma unroll
    for (int i = 0; i < MT; ++i) load_x(xs, warp_m + i * 16 + lane / 4, unit, a[i]);
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      const int at = w_place(warp_n + j * 8 + lane / 4, unit) + lane % 4 * 4;
      const uint32_t word = *reinterpret_cast<const uint32_t*>(ws + at);
      uint32_t b[TERMS][2 * STEPS];
      unpack<0>(word, b[0]);
      if constexpr (TERMS > 1) unpack<1>(word, b[1]);
      if constexpr (TERMS > 2) unpack<2>(word, b[2]);
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
#pragma unroll
        for (int i = 0; i < MT; ++i) {
          const uint32_t four[4] = {a[i][0][2 * s], a[i][1][2 * s], a[i][0][2 * s + 1], a[i][1][2 * s + 1]};
#pragma unroll
          for (int t = TERMS - 1; t >= 0; --t) multiply(part[i][j], four, b[t][2 * s], b[t][2 * s + 1]);
#if ZEROS
          constexpr uint32_t ONES = INT8 ? 0x01010101u : 0x3f803f80u;
          if (j == 0) multiply(of_x[i], four, ONES, ONES);
#endif
        }
      }
    }
  }

  // Adds the products of `count` tiles along K from tile `begin` on. `x_row` and `w_row` say where a row of the tile
  // lies, `scale_of` the Scaling of a group of a row of w (W_GROUP), `x_row.scale` that of one of x (X_GROUPED); all
  // copies have arrived in the end.
  template <class Sum, class X, class W, class Scale>
  static __device__ __forceinline__ void run(const uint8_t* smem, X x_row, W w_row, Scale scale_of, int begin,
                                             int count, Sum (&sum)[MT][NT][4]) {
    const uint32_t base = smem_address(smem);
    const int first = int(threadIdx.x) / 32 % WARPS_N * WN + int(threadIdx.x) % 4 * 2;  // the lane's row of w
#if X_GROUPED
    const int warp_row = int(threadIdx.x) / 32 / WARPS_N * WM + int(threadIdx.x) % 32 / 4;  // and of x
#endif
    auto copy = [&](int depth) {  // a group is committed for each tile, also beyond the last
      if (depth < count) {
        const uint32_t to = base + depth % STAGES * STAGE_BYTES;
        copy_tile<BM, X_LINES, DEPTH>(to, x_row, ROW_BYTES, begin + depth, x_place);
        copy_tile<BN, W_LINES, W_DEPTH>(to + BM * DEPTH, w_row, W_ROW_BYTES, begin + depth, w_place);
      }
      cp_async_commit();
    };
#pragma unroll
    for (int depth = 0; depth < STAGES - 1; ++depth) copy(depth);

    PART part[MT][NT][4] = {}, of_x[MT][4] = {};
    Scaling own[NT][2];
#if X_GROUPED
    float x_own[MT][2];
#endif
    auto flush = [&] {
#pragma unroll
      for (int i = 0; i < MT; ++i) {
#pragma unroll
        for (int j = 0; j < NT; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
#if ZEROS
            const float value = less_zero(part[i][j][e], own[j][e % 2].zero, of_x[i][e / 2 * 2]);
#else
            const PART value = part[i][j][e];
#endif
#if X_GROUPED
            const float factor = (W_GROUP ? factor_of(own[j][e % 2]) : 1.0f) * x_own[i][e / 2];
#else
            const float factor = W_GROUP ? factor_of(own[j][e % 2]) : 1.0f;
#endif
            sum[i][j][e] += RUN_UNITS ? Sum(float(value) * factor) : Sum(value);
            part[i][j][e] = 0;
          }
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) of_x[i][e] = 0;
      }
    };
    for (int depth = 0; depth < count; ++depth) {
      cp_async_wait<STAGES - 2>();
      block_sync();  // all have the tile, and all are done with the one before, whose place is taken now
      copy(depth + STAGES - 1);
      const uint8_t* xs = smem + depth % STAGES * STAGE_BYTES;
#pragma unroll UNROLL
      for (int unit = 0; unit < UNITS; ++unit) {
        const int number = (begin + depth) * UNITS + unit;  // along the row
        if (W_GROUP && (number % GROUP_UNITS == 0 || depth + unit == 0)) {
#pragma unroll
          for (int j = 0; j < NT; ++j) {
            own[j][0] = scale_of(first + j * 8, number / GROUP_UNITS);
            own[j][1] = scale_of(first + j * 8 + 1, number / GROUP_UNITS);
          }
        }
#if X_GROUPED
        if (number % X_UNITS == 0 || depth + unit == 0) {
#pragma unroll
          for (int i = 0; i < MT; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              x_own[i][half] = x_row.scale(warp_row + i * 16 + half * 8, number / X_UNITS);
            }
          }
        }
#endif
        products(xs, xs + BM * DEPTH, unit, part, of_x);
        if (RUN_UNITS && (number + 1) % max(RUN_UNITS, 1) == 0) flush();
      }
    }
    flush();
    cp_async_wait<0>();
  }
};

}  // namespace tiles
