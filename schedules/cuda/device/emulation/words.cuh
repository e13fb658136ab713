// What CUDA C++ has beside C++, for a compiler of the host: keywords, vector types, small functions.
#pragma once
#include <cmath>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ __attribute__((always_inline)) inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

#define MIMO_VECTOR2(name, type) \
  struct alignas(2 * sizeof(type)) name { type x, y; }; \
  inline name make_##name(type x, type y) { return {x, y}; }
#define MIMO_VECTOR4(name, type) \
  struct alignas(4 * sizeof(type)) name { type x, y, z, w; }; \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }
MIMO_VECTOR2(char2, int8_t)
MIMO_VECTOR2(uchar2, uint8_t)
MIMO_VECTOR2(short2, int16_t)
MIMO_VECTOR2(ushort2, uint16_t)
MIMO_VECTOR2(int2, int32_t)
MIMO_VECTOR2(uint2, uint32_t)
MIMO_VECTOR2(float2, float)
MIMO_VECTOR4(char4, int8_t)
MIMO_VECTOR4(uchar4, uint8_t)
MIMO_VECTOR4(short4, int16_t)
MIMO_VECTOR4(ushort4, uint16_t)
MIMO_VECTOR4(int4, int32_t)
MIMO_VECTOR4(uint4, uint32_t)
MIMO_VECTOR4(float4, float)
#undef MIMO_VECTOR2
#undef MIMO_VECTOR4
struct uint3 { uint32_t x, y, z; };
struct dim3 { uint32_t x, y, z; };

template <class A, class B> inline std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B> inline std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <class To, class From> inline To same_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  memcpy(&out, &value, sizeof out);
  return out;
}
inline float __int_as_float(int x) { return same_bits<float>(x); }
inline float __uint_as_float(uint32_t x) { return same_bits<float>(x); }
inline int __float_as_int(float x) { return same_bits<int>(x); }
inline uint32_t __float_as_uint(float x) { return same_bits<uint32_t>(x); }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(uint32_t(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
