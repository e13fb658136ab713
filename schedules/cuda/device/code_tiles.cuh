// A block's tile of x * w^T by mma.sync, where w is codes of 2, 4 or 8 bits, unpacked in registers.
//
// As `mma_tiles.cuh`, but for what follows. It reads the constants of the text that includes it: BITS, W_GROUP (columns
// of w that share a scale; 0: all of a row, whose scale is applied last), ELEMENT (bytes of an element of x), and for
// the preprocessor INT8 (x is int8: 2 and 4 bits alone; else 16-bit floats) and X_F16 (they are float16).
//
// A unit is 16 bytes of a row of w: four words, one for each lane of a quad. Which column of x stands where along a
// product's K is free, so that a lane unpacks its own word, and has its own columns of x, which lie side by side:
// no word passes from lane to lane. Field f of a word's bytes is columns 4f to 4f + 3 of the word's.
// INT8: a field moved to the top of its bytes is four codes times 2^(8 - BITS), one register of an operand.
// Else: bytes 0 and 2, and 1 and 3, are two numbers of 16 bits each (of each 4 columns of x the middle two have changed
// places), made by putting a code in the mantissa's last bits of a number whose last bit weighs 1.
//
// Sums of W_GROUP columns are multiplied by the group's scale in float32 and added up; int8 ones are exact before.
#pragma once
#include "async.cuh"
#include "matmul.cuh"
#include "mma.cuh"

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

// The registers of a word of codes for all steps of its unit.
__device__ __forceinline__ void unpack(uint32_t word, uint32_t (&out)[2 * STEPS]) {
#pragma unroll
  for (int i = 0; i < 2 * STEPS; ++i) {
#if INT8
    constexpr uint32_t TOP = (0xffu << (8 - BITS) & 0xffu) * 0x01010101u;
    out[i] = word << (8 - BITS - BITS * i) & TOP;
#else
    constexpr uint32_t MASK = ((1u << BITS) - 1u) * 0x00010001u, MIDDLE = 1u << (BITS - 1);
    const uint32_t shifted = word >> (BITS * (i / 2) + 8 * (i % 2));
#if X_F16
    constexpr uint32_t ONE = 0x6400u;  // 1024
    out[i] = f16x2_sub(lop3<0x6a>(shifted, MASK, (ONE | MIDDLE) * 0x00010001u), (ONE | MIDDLE) * 0x00010001u);
#else
    if (BITS == 8) {  // more than bfloat16's last bits: by way of float32
      const float low = __uint_as_float(prmt(shifted ^ 0x80u, 0x4b000000u, 0x7440)) - 8388736.0f;
      const float high = __uint_as_float(prmt((shifted >> 16) ^ 0x80u, 0x4b000000u, 0x7440)) - 8388736.0f;
      out[i] = pack_bf16(low, high);
    } else {
      constexpr uint32_t ONE = 0x4300u, ONE_BF16 = 0x3f80u, MINUS = 0x8000u;  // 128, 1, the sign
      out[i] = bf16x2_fma(lop3<0x6a>(shifted, MASK, (ONE | MIDDLE) * 0x00010001u), ONE_BF16 * 0x00010001u,
                          (MINUS | ONE | MIDDLE) * 0x00010001u);
    }
#endif
#endif
  }
}

template <int BM, int BN, int DEPTH, int ROW_BYTES, int WARPS_M, int WARPS_N, int STAGES>
struct Codes {
  static constexpr int THREADS = 32 * WARPS_M * WARPS_N, TILES_K = matmul::up(ROW_BYTES, DEPTH);
  static constexpr int COLUMNS = DEPTH / ELEMENT;  // of a tile
  static constexpr int W_DEPTH = COLUMNS * BITS / 8, W_ROW_BYTES = ROW_BYTES / ELEMENT * BITS / 8;
  static constexpr int X_LINES = DEPTH / 16, W_LINES = W_DEPTH / 16;
  static constexpr int UNIT = 128 / BITS, UNITS = COLUMNS / UNIT, GROUP_UNITS = W_GROUP ? W_GROUP / UNIT : 1;
  static constexpr int UNROLL = UNITS < 4 ? UNITS : 4;  // operands of all units of a tile would fill the registers
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

  // Adds the products of a unit of the tile's rows of both operands.
  static __device__ __forceinline__ void products(const uint8_t* xs, const uint8_t* ws, int unit,
                                                  PART (&part)[MT][NT][4]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_m = warp / WARPS_N * WM, warp_n = warp % WARPS_N * WN;
    uint32_t a[MT][2][2 * STEPS];
#pragma unroll
    for (int i = 0; i < MT; ++i) load_x(xs, warp_m + i * 16 + lane / 4, unit, a[i]);
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      uint32_t b[2 * STEPS];
      unpack(*reinterpret_cast<const uint32_t*>(ws + w_place(warp_n + j * 8 + lane / 4, unit) + lane % 4 * 4), b);
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
#pragma unroll
        for (int i = 0; i < MT; ++i) {
          const uint32_t four[4] = {a[i][0][2 * s], a[i][1][2 * s], a[i][0][2 * s + 1], a[i][1][2 * s + 1]};
          multiply(part[i][j], four, b[2 * s], b[2 * s + 1]);
        }
      }
    }
  }

  // Adds the products of `count` tiles along K from tile `begin` on. `x_row` and `w_row` say where a row of the tile
  // lies, `scale_of` what a group of a row of w is multiplied by (W_GROUP); all copies have arrived in the end.
  template <class Sum, class X, class W, class Scale>
  static __device__ __forceinline__ void run(const uint8_t* smem, X x_row, W w_row, Scale scale_of, int begin,
                                             int count, Sum (&sum)[MT][NT][4]) {
    const uint32_t base = smem_address(smem);
    const int first = int(threadIdx.x) / 32 % WARPS_N * WN + int(threadIdx.x) % 4 * 2;  // the lane's row of w
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

    PART part[MT][NT][4] = {};
    float scale[NT][2];
    auto flush = [&] {
#pragma unroll
      for (int i = 0; i < MT; ++i) {
#pragma unroll
        for (int j = 0; j < NT; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            sum[i][j][e] += W_GROUP ? Sum(float(part[i][j][e]) * scale[j][e % 2]) : Sum(part[i][j][e]);
            part[i][j][e] = 0;
          }
        }
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
            scale[j][0] = scale_of(first + j * 8, number / GROUP_UNITS);
            scale[j][1] = scale_of(first + j * 8 + 1, number / GROUP_UNITS);
          }
        }
        products(xs, xs + BM * DEPTH, unit, part);
        if (W_GROUP && (number + 1) % GROUP_UNITS == 0) flush();
      }
    }
    flush();
    cp_async_wait<0>();
  }
};

}  // namespace tiles
