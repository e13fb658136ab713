// One step's rows into KV caches of 8-bit floats: QK-norm, rotation, a power of two for each key and value, codes.
//
// As cuda_append.cu; where codes and powers lie says float8.cuh. Constants: those of append.cuh, DK, DW (columns of
// the caches' rows), CAP, SLOTS.
#include "append.cuh"
#include "float8.cuh"

// The nearest E4M3 number of one within its range, half to even.
__device__ __forceinline__ uint32_t e4m3(float x) {
  const uint32_t sign = __float_as_uint(x) >> 24 & 0x80u, bits = __float_as_uint(x) & 0x7fffffffu;
  if (bits < 0x3c800000u) return sign | uint32_t(rintf(fabsf(x) * 512.0f));  // below 2^-6: multiples of 2^-9
  return sign | (((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3));
}

// Writes a row of W numbers to its slot of a head's cache; PAIRED: as values lie.
template <int W, bool PAIRED, class Number>
__device__ __forceinline__ void keep(uint8_t* cache, size_t head, int slot, Number number) {
  constexpr int LOST = 255, LEAST = 1, LARGEST = 240, UNDER = 8 * (1 << 23) - 0x1fffff;  // of ir/float8.py
  const int lane = threadIdx.x & 31;
  uint8_t* block = cache + (head * (SLOTS / float8::ROWS) + slot / float8::ROWS) * float8::BLOCK<W>;
  int most = 0;  // magnitudes as integers, of which NaN is the largest
  for (int i = lane; i < W; i += 32) most = max(most, int(__float_as_uint(number(i)) & 0x7fffffffu));
#pragma unroll
  for (int away = 16; away > 0; away /= 2) most = max(most, shfl_xor(most, away));
  const bool lost = most >= 0x7f800000;
  const int byte = min(max((most - UNDER) >> 23, LEAST), LARGEST);
  const float inverse = __uint_as_float(uint32_t(254 - byte) << 23);
  uint32_t* to = reinterpret_cast<uint32_t*>(block + slot % float8::ROWS * W);
  for (int word = lane; word < W / 4; word += 32) {
    uint32_t codes = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = word * 4 + i, column = PAIRED ? at / 16 * 16 + at % 2 * 8 + at % 16 / 2 : at;
      codes |= e4m3(fminf(fmaxf(number(column) * inverse, -448.0f), 448.0f)) << 8 * i;
    }
    to[word] = lost ? 0u : codes;
  }
  if (lane == 0) block[float8::ROWS * W + slot % float8::ROWS] = uint8_t(lost ? LOST : byte);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    kv_append(const float* __restrict__ qkv, const float* __restrict__ table, const int* __restrict__ pos,
              const float* __restrict__ q_norm, const float* __restrict__ k_norm, uint8_t* __restrict__ k_cache,
              uint8_t* __restrict__ v_cache, float* __restrict__ q) {
  append::step(
      qkv, table, pos, q_norm, k_norm, q,
      [&](int sequence, int own, int position, auto number) {
        keep<DK, false>(k_cache, sequence * KV + own, position % CAP, number);
      },
      [&](int sequence, int own, int position, auto number) {
        keep<DW, true>(v_cache, sequence * KV + own, position % CAP, number);
      });
}
