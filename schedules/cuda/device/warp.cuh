// Words that CUDA text of this project is written in: what one thread or one warp does without tensor cores.
//
// Each has two forms: for nvcc, and for the emulator on the CPU (MIMO_EMULATE), where a warp's threads run one
// by one and meet in what they do together. All 32 lanes take part in what a warp does.
#pragma once
#include <stdint.h>

#ifdef MIMO_EMULATE
#include "emulation/calls.cuh"
#define MIMO_DEVICE inline
#else
#define MIMO_DEVICE __device__ __forceinline__
#define MIMO_SITE_PARAMETER
#endif

// ---- what reads the same in both -----------------------------------------------------------------------

MIMO_DEVICE float bf16_to_float(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
MIMO_DEVICE float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
MIMO_DEVICE float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

#ifndef MIMO_EMULATE
// ---- for nvcc ------------------------------------------------------------------------------------------

#define MIMO_SHARED(name) extern __shared__ __align__(1024) uint8_t name[]

// Address of shared memory in its own window, as ldmatrix and cp.async take it.
MIMO_DEVICE uint32_t smem_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

MIMO_DEVICE float shfl_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
MIMO_DEVICE int shfl_xor(int x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
MIMO_DEVICE uint32_t shfl_xor(uint32_t x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
template <class T> MIMO_DEVICE T shfl(T x, int lane) { return __shfl_sync(~0u, x, lane); }
MIMO_DEVICE uint32_t warp_ballot(bool x) { return __ballot_sync(~0u, x); }
MIMO_DEVICE void warp_sync() { __syncwarp(); }
MIMO_DEVICE void block_sync() { __syncthreads(); }
// Barrier 1..15 of so many threads, a multiple of 32.
MIMO_DEVICE void named_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// What this thread wrote before is seen in device memory before what it writes after.
MIMO_DEVICE void device_fence() { __threadfence(); }

// 2^x with a relative error of 2^-22; results below 2^-126 are 0.
MIMO_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The larger one; NaN where either is.
MIMO_DEVICE float max_nan(float x, float y) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
  return r;
}
// Two floats as 16-bit numbers, rounded to nearest even; `low` comes first in memory.
MIMO_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
MIMO_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
MIMO_DEVICE float f16_to_float(uint16_t bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
}
// Pairs of float16, each result rounded once.
MIMO_DEVICE uint32_t f16x2_add(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
MIMO_DEVICE uint32_t f16x2_sub(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
MIMO_DEVICE uint32_t f16x2_mul(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
MIMO_DEVICE uint32_t f16x2_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
MIMO_DEVICE uint32_t bf16x2_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// Any function of three bits, on each of 32: bit 4a + 2b + c of LUT is its value.
template <int LUT> MIMO_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(a), "r"(b), "r"(c), "n"(LUT));
  return r;
}
// Byte i of the result is byte `selector >> 4 i & 7` of a (0..3) and b (4..7); bit 3 spreads its sign.
MIMO_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}
// c + the sum of four products of signed bytes.
MIMO_DEVICE int dp4a(int a, int b, int c) { return __dp4a(a, b, c); }

// Loads of device memory that nobody writes during the launch; addresses are multiples of the size.
MIMO_DEVICE uint32_t ld_global_nc(const uint32_t* p) { return __ldg(p); }
MIMO_DEVICE int ld_global_nc(const int* p) { return __ldg(p); }
MIMO_DEVICE float ld_global_nc(const float* p) { return __ldg(p); }
MIMO_DEVICE uint2 load8(const void* p) { return __ldg(static_cast<const uint2*>(p)); }
MIMO_DEVICE uint4 load16(const void* p) { return __ldg(static_cast<const uint4*>(p)); }

// Returns what was there.
MIMO_DEVICE int atomic_add(int* p, int x) { return atomicAdd(p, x); }
MIMO_DEVICE uint32_t atomic_add(uint32_t* p, uint32_t x) { return atomicAdd(p, x); }
MIMO_DEVICE float atomic_add(float* p, float x) { return atomicAdd(p, x); }

#else
// ---- for the emulator ----------------------------------------------------------------------------------

#define MIMO_SHARED(name) uint8_t* const name = emulated::shared_base()

inline uint32_t smem_address(const void* p) { return emulated::shared_address(p); }

inline float shfl_xor(float x, int mask MIMO_SITE_PARAMETER) {
  return __uint_as_float(emulated::exchange(MIMO_SITE, __float_as_uint(x), int(threadIdx.x % 32) ^ mask));
}
inline int shfl_xor(int x, int mask MIMO_SITE_PARAMETER) {
  return int(emulated::exchange(MIMO_SITE, uint32_t(x), int(threadIdx.x % 32) ^ mask));
}
inline uint32_t shfl_xor(uint32_t x, int mask MIMO_SITE_PARAMETER) {
  return emulated::exchange(MIMO_SITE, x, int(threadIdx.x % 32) ^ mask);
}
template <class T> inline T shfl(T x, int lane MIMO_SITE_PARAMETER) {
  return same_bits<T>(emulated::exchange(MIMO_SITE, same_bits<uint32_t>(x), lane & 31));
}
inline uint32_t warp_ballot(bool x MIMO_SITE_PARAMETER) { return emulated::ballot(line, x); }
inline void warp_sync(int line = __builtin_LINE()) { emulated::warp_sync(line); }
inline void block_sync(int line = __builtin_LINE()) { emulated::wait_at_barrier(MIMO_SITE, 0, 0); }
inline void named_sync(int barrier, int threads MIMO_SITE_PARAMETER) {
  if (barrier < 1 || threads < 32) emulated::fail("named_sync of barrier %d and %d threads", barrier, threads);
  emulated::wait_at_barrier(MIMO_SITE, barrier, threads);
}
inline void device_fence() { emulated::fence_device(); }

// With its rounding as far from 2^x as the device may be, on a side that the bits of x choose.
inline float exp2_approx(float x) {
  if (std::fabs(x) < 1.17549435e-38f) x = 0.0f;
  const double exact = std::exp2(double(x));
  const uint32_t bits = same_bits<uint32_t>(x) * 2654435761u;
  const float y = float(exact * (1.0 + (bits >> 31 ? 0x1.8p-23 : -0x1.8p-23)));
  return x == 0.0f ? 1.0f : y < 1.17549435e-38f ? 0.0f : y;
}
inline float max_nan(float x, float y) {
  return x != x || y != y ? __uint_as_float(0x7fffffffu) : std::fmax(x, y);
}
inline uint32_t pack_bf16(float low, float high) {
  return emulated::bf16_bits(low) | emulated::bf16_bits(high) << 16;
}
inline uint32_t pack_f16(float low, float high) { return emulated::f16_bits(low) | emulated::f16_bits(high) << 16; }
inline float f16_to_float(uint16_t bits) { return float(emulated::f16_value(bits)); }

namespace emulated {
template <class F> inline uint32_t f16_pairs(F f, uint32_t a, uint32_t b, uint32_t c = 0) {
  auto half = [&](int i) {
    return f16_bits(f(f16_value(a >> i & 0xffff), f16_value(b >> i & 0xffff), f16_value(c >> i & 0xffff)));
  };
  return half(0) | half(16) << 16;
}
}  // namespace emulated
inline uint32_t f16x2_add(uint32_t a, uint32_t b) {
  return emulated::f16_pairs([](double x, double y, double) { return x + y; }, a, b);
}
inline uint32_t f16x2_sub(uint32_t a, uint32_t b) {
  return emulated::f16_pairs([](double x, double y, double) { return x - y; }, a, b);
}
inline uint32_t f16x2_mul(uint32_t a, uint32_t b) {
  return emulated::f16_pairs([](double x, double y, double) { return x * y; }, a, b);
}
inline uint32_t f16x2_fma(uint32_t a, uint32_t b, uint32_t c) {
  return emulated::f16_pairs([](double x, double y, double z) { return x * y + z; }, a, b, c);
}
inline uint32_t bf16x2_fma(uint32_t a, uint32_t b, uint32_t c) {
  auto half = [&](int i) {
    // in float64 the product is exact, and the sum is rounded there a second time only by a bit far below
    return emulated::bf16_bits(emulated::bf16_value(a >> i & 0xffff) * emulated::bf16_value(b >> i & 0xffff) +
                                  emulated::bf16_value(c >> i & 0xffff));
  };
  return half(0) | half(16) << 16;
}

template <int LUT> inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  static_assert(LUT >= 0 && LUT < 256);
  uint32_t r = 0;
  for (int i = 0; i < 8; ++i)
    if (LUT >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
}
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selector >> 4 * i & 15, byte = both >> 8 * (s & 7) & 255;
    r |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return r;
}
inline int dp4a(int a, int b, int c) {
  uint32_t sum = uint32_t(c);
  for (int i = 0; i < 32; i += 8) sum += uint32_t(int(int8_t(a >> i)) * int(int8_t(b >> i)));
  return int(sum);
}

namespace emulated {
template <class T> inline T loaded(const void* p, const char* what) {
  check_constant(p, sizeof(T), what);
  return *static_cast<const T*>(p);
}
}  // namespace emulated
inline uint32_t ld_global_nc(const uint32_t* p) { return emulated::loaded<uint32_t>(p, "ld_global_nc"); }
inline int ld_global_nc(const int* p) { return emulated::loaded<int>(p, "ld_global_nc"); }
inline float ld_global_nc(const float* p) { return emulated::loaded<float>(p, "ld_global_nc"); }
inline uint2 load8(const void* p) { return emulated::loaded<uint2>(p, "load8"); }
inline uint4 load16(const void* p) { return emulated::loaded<uint4>(p, "load16"); }

inline int atomic_add(int* p, int x) {
  return int(emulated::atomic_add(reinterpret_cast<uint32_t*>(p), uint32_t(x)));
}
inline uint32_t atomic_add(uint32_t* p, uint32_t x) { return emulated::atomic_add(p, x); }
inline float atomic_add(float* p, float x) { return emulated::atomic_add(p, x); }
#endif
