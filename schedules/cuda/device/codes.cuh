// What codes of weights are to a multiplication: four neighbouring columns of a word at a time.
//
// Integers: two's complement. Byte b of a word holds columns b, b + 4, b + 8, ... of the word's, from its lowest bits
// on: field f of all four bytes are columns 4f to 4f + 3. E4M3 numbers (W_E4M3) lie in the same order, a byte each.
// Entries of a codebook (W_BOOK): four bits each, one column behind the other, so that 16 bits of a word are a selector
// of prmt. LOOKUP has the bytes of all 16 entries, four in a word; bytes of one significance, a plane, are four words.
//
// It reads the constants of the text that includes it: BITS (of a stored code), MIDDLE (what stored codes are less than
// those that have a zero point; 0: they have none), for the preprocessor W_E4M3 and W_BOOK, and of books LOOKUP and
// PLANES (int8: 1; 16 bits: two for each of the terms that make up a number; float32: 4, or 2 of bfloat16).
#pragma once
#include "e4m3.cuh"
#include "warp.cuh"

namespace codes {

#if W_BOOK
__host__ __device__ constexpr uint32_t entries(int plane, int quarter) {
  constexpr uint32_t all[] = {LOOKUP};
  const int index = 4 * plane + quarter;
  return index < int(sizeof(all) / 4) ? all[index] : 0u;
}

// Ones in the bytes of those of a field's four columns whose codes are 8 and more.
__device__ __forceinline__ uint32_t upper_of(uint32_t word, int field) {
  return prmt(word, word << 4, field == 0 ? 0x9d8cu : 0xbfaeu);  // the highest bit of each four, spread
}

// A plane's bytes of a field's four columns.
template <int PLANE>
__device__ __forceinline__ uint32_t looked_up(uint32_t word, int field, uint32_t upper) {
  constexpr uint32_t a = entries(PLANE, 0), b = entries(PLANE, 1), c = entries(PLANE, 2), d = entries(PLANE, 3);
  const uint32_t selector = word >> (16 * field) & 0x7777u, low = prmt(a, b, selector);
  if (a == c && b == d) return low;  // a book of 8
  return lop3<0xca>(upper, prmt(c, d, selector), low);  // upper ? of the last 8 : of the first
}

// Float32 numbers of four planes of bytes.
__device__ __forceinline__ float4 transposed(uint32_t p0, uint32_t p1, uint32_t p2, uint32_t p3) {
  const uint32_t a = prmt(p0, p1, 0x5140), b = prmt(p2, p3, 0x5140);  // columns 0 and 1
  const uint32_t c = prmt(p0, p1, 0x7362), d = prmt(p2, p3, 0x7362);  // 2 and 3
  return make_float4(__uint_as_float(prmt(a, b, 0x5410)), __uint_as_float(prmt(a, b, 0x7632)),
                     __uint_as_float(prmt(c, d, 0x5410)), __uint_as_float(prmt(c, d, 0x7632)));
}
#else

// Two integers at the lowest bits of both halves of a word, as bfloat16 or float16 (HALF).
template <bool HALF>
__device__ __forceinline__ uint32_t integers_of(uint32_t word) {
  constexpr uint32_t MASK = ((1u << BITS) - 1u) * 0x00010001u, MIDDLE = 1u << (BITS - 1);
  if (HALF) {  // in the last bits of 1024, which weigh 1
    constexpr uint32_t ONE = 0x6400u;
    return f16x2_sub(lop3<0x6a>(word, MASK, (ONE | MIDDLE) * 0x00010001u), (ONE | MIDDLE) * 0x00010001u);
  }
  if (BITS == 8) {  // more than bfloat16's last bits: by way of float32
    const float low = __uint_as_float(prmt(word ^ 0x80u, 0x4b000000u, 0x7440)) - 8388736.0f;
    const float high = __uint_as_float(prmt((word >> 16) ^ 0x80u, 0x4b000000u, 0x7440)) - 8388736.0f;
    return pack_bf16(low, high);
  }
  constexpr uint32_t ONE = 0x4300u, ONE_BF16 = 0x3f80u, MINUS = 0x8000u;  // 128, 1, the sign
  return bf16x2_fma(lop3<0x6a>(word, MASK, (ONE | MIDDLE) * 0x00010001u), ONE_BF16 * 0x00010001u,
                    (MINUS | ONE | MIDDLE) * 0x00010001u);
}

// The integer at bit p of a word, p + BITS <= 16, put among the mantissa's bits of 2^(23 - p), where its lowest bit
// weighs 1. Those that have a zero point come as they were before they were stored.
__device__ __forceinline__ float integer_at(uint32_t word, int p) {
  const uint32_t field = ((1u << BITS) - 1u) << p, middle = 1u << (BITS - 1 + p);
  const uint32_t one = uint32_t(150 - p) << 23;  // 2^(23 - p), whose bit p weighs 1
  const float shifted = __uint_as_float(lop3<0x6a>(word, field, one | middle));  // (word & field) ^ c
  return shifted - (float(1 << (23 - p)) + float((1 << (BITS - 1)) - MIDDLE));
}
#endif

// A field's four columns as int8. Integers come at the top of their bytes, 2^(8 - BITS) times as large.
__device__ __forceinline__ uint32_t bytes_of(uint32_t word, int field) {
#if W_BOOK
  return looked_up<0>(word, field, upper_of(word, field));
#else
  constexpr uint32_t TOP = (0xffu << (8 - BITS) & 0xffu) * 0x01010101u;
  return word << (8 - BITS - BITS * field) & TOP;
#endif
}

// A field's four columns as 16-bit floats (HALF: float16, else bfloat16): 0 and 2, and 1 and 3. Of codebooks, a term.
template <bool HALF, int TERM>
__device__ __forceinline__ uint2 pairs_of(uint32_t word, int field) {
#if W_BOOK
  const uint32_t upper = upper_of(word, field);
  const uint32_t low = looked_up<2 * TERM>(word, field, upper), high = looked_up<2 * TERM + 1>(word, field, upper);
  return make_uint2(prmt(low, high, 0x6240), prmt(low, high, 0x7351));
#elif W_E4M3
  return make_uint2(widen_e4m3<HALF>(word << 8), widen_e4m3<HALF>(word));
#else
  return make_uint2(integers_of<HALF>(word >> (BITS * field)), integers_of<HALF>(word >> (BITS * field + 8)));
#endif
}

// A field's four columns as float32.
__device__ __forceinline__ float4 floats_of(uint32_t word, int field) {
#if W_BOOK
  if (PLANES == 4) {
    const uint32_t upper = upper_of(word, field);
    return transposed(looked_up<0>(word, field, upper), looked_up<1>(word, field, upper),
                      looked_up<2>(word, field, upper), looked_up<3>(word, field, upper));
  }
#endif
#if W_BOOK || W_E4M3
  const uint2 two = pairs_of<false, 0>(word, field);
  return make_float4(bf16_low(two.x), bf16_low(two.y), bf16_high(two.x), bf16_high(two.y));
#else
  const int p = BITS * field;
  return make_float4(integer_at(word, p), integer_at(word, p + 8), integer_at(word >> 16, p),
                     integer_at(word >> 16, p + 8));
#endif
}

}  // namespace codes
