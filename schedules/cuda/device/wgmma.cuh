// Matrix products of a warp group of four warps (sm_90a): both operands lie in shared memory, sums in registers.
//
// Operands are K-major: rows of 128 bytes, eight of them in 1024, as tma_load writes them with swizzle 128. `a` has
// 64 rows, `b` N. One product takes 32 bytes of each row; the next 32 are at descriptor + 2, the next 64 rows at
// descriptor + 512. Warp w of the group has rows 16 w to 16 w + 15 of the sums: with g = lane / 4, t = lane % 4,
// acc[4 j] and acc[4 j + 1] are row g, columns 8 j + 2 t and + 1; acc[4 j + 2] and acc[4 j + 3] row g + 8.
//
// wgmma_bf16_held: `a` is in registers, as mma_bf16 has it, warp w's rows 16 w to 16 w + 15, and may not change before
// the wait; `b` lies across: 16 rows of the depth, of N columns each, a multiple of 64 (wgmma_descriptor_across).
//
// The order of use: wgmma_fence, products, wgmma_commit, wgmma_wait<N>: all but the last N groups are then done.
// Sums may not be touched before, and shared memory that was written otherwise needs fence_async_proxy.
#pragma once
#include "tma.cuh"

// Descriptor of a matrix that begins at `smem` (a multiple of 1024, or 32, 64, 96 bytes behind one).
MIMO_DEVICE uint64_t wgmma_descriptor(const void* smem) {
  constexpr uint64_t ROWS_OF_8 = 1024 >> 4, UNUSED = 1, SWIZZLE_128 = 1;
  return uint64_t((smem_address(smem) & 0x3ffff) >> 4) | UNUSED << 16 | ROWS_OF_8 << 32 | SWIZZLE_128 << 62;
}

// Descriptor of an operand that lies across: rows of 128 bytes (64 numbers of 16 bits), swizzled, 16 of them to a
// product; the next 16 rows are at descriptor + 128, the next 64 columns of a row `panel` bytes on. `smem` and `panel`
// are multiples of 1024.
MIMO_DEVICE uint64_t wgmma_descriptor_across(const void* smem, int panel) {
  return (wgmma_descriptor(smem) & ~(uint64_t(0x3fff) << 16)) | uint64_t(panel >> 4) << 16;
}

#ifndef MIMO_EMULATE
MIMO_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
MIMO_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> MIMO_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// After the wait for the last products: the compiler reads sums no earlier than here.
template <int N> MIMO_DEVICE void wgmma_pin(float (&acc)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}
template <int N> MIMO_DEVICE void wgmma_pin(int (&acc)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(acc[i])::"memory");
}
template <int N> MIMO_DEVICE void wgmma_pin(uint32_t (&a)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

// Lists of 4, 8, 16, ... operands: names of registers in the text, and the accumulators behind them.
#define MIMO_TEN(d) "%" #d "0, %" #d "1, %" #d "2, %" #d "3, %" #d "4, %" #d "5, %" #d "6, %" #d "7, %" #d "8, %" #d "9"
#define MIMO_R4 "%0, %1, %2, %3"
#define MIMO_R8 MIMO_R4 ", %4, %5, %6, %7"
#define MIMO_R16 MIMO_TEN() ", %10, %11, %12, %13, %14, %15"
#define MIMO_R32 MIMO_TEN() ", " MIMO_TEN(1) ", " MIMO_TEN(2) ", %30, %31"
#define MIMO_R40 MIMO_TEN() ", " MIMO_TEN(1) ", " MIMO_TEN(2) ", " MIMO_TEN(3)
#define MIMO_R48 MIMO_R40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define MIMO_R60 MIMO_R40 ", " MIMO_TEN(4) ", " MIMO_TEN(5)
#define MIMO_R64 MIMO_R60 ", %60, %61, %62, %63"
#define MIMO_R90 MIMO_R60 ", " MIMO_TEN(6) ", " MIMO_TEN(7) ", " MIMO_TEN(8)
#define MIMO_R96 MIMO_R90 ", %90, %91, %92, %93, %94, %95"
#define MIMO_R128 MIMO_R90 ", " MIMO_TEN(9) ", " MIMO_TEN(10) ", " MIMO_TEN(11) \
  ", %120, %121, %122, %123, %124, %125, %126, %127"
#define MIMO_A4(l, i) "+" l(acc[i]), "+" l(acc[i + 1]), "+" l(acc[i + 2]), "+" l(acc[i + 3])
#define MIMO_A8(l, i) MIMO_A4(l, i), MIMO_A4(l, i + 4)
#define MIMO_A16(l, i) MIMO_A8(l, i), MIMO_A8(l, i + 8)
#define MIMO_A32(l, i) MIMO_A16(l, i), MIMO_A16(l, i + 16)
#define MIMO_A48(l, i) MIMO_A32(l, i), MIMO_A16(l, i + 32)
#define MIMO_A64(l, i) MIMO_A32(l, i), MIMO_A32(l, i + 32)
#define MIMO_A96(l, i) MIMO_A64(l, i), MIMO_A32(l, i + 64)
#define MIMO_A128(l, i) MIMO_A64(l, i), MIMO_A64(l, i + 64)

// One case: so many columns, half as many registers, and the numbers of the three operands behind these.
#define MIMO_CASE(n, half, o0, o1, o2, letter, types, tail)                                             \
  if constexpr (N == n)                                                                                 \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o2 ", 0;\n"                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #n types " {" MIMO_R##half "}, %" #o0 ", %" #o1    \
                 ", p" tail ";\n}\n"                                                                    \
                 : MIMO_A##half(letter, 0) : "l"(a), "l"(b), "r"(accumulate));
#define MIMO_WGMMA(name, sum, letter, types, tail)                                                      \
  template <int N> MIMO_DEVICE void name(sum(&acc)[N / 2], uint64_t a, uint64_t b, int accumulate) {    \
    static_assert(N == 8 || N == 16 || N == 32 || N == 64 || N == 96 || N == 128 || N == 192 || N == 256); \
    MIMO_CASE(8, 4, 4, 5, 6, letter, types, tail)                                                       \
    MIMO_CASE(16, 8, 8, 9, 10, letter, types, tail)                                                     \
    MIMO_CASE(32, 16, 16, 17, 18, letter, types, tail)                                                  \
    MIMO_CASE(64, 32, 32, 33, 34, letter, types, tail)                                                  \
    MIMO_CASE(96, 48, 48, 49, 50, letter, types, tail)                                                  \
    MIMO_CASE(128, 64, 64, 65, 66, letter, types, tail)                                                 \
    MIMO_CASE(192, 96, 96, 97, 98, letter, types, tail)                                                 \
    MIMO_CASE(256, 128, 128, 129, 130, letter, types, tail)                                             \
  }
MIMO_WGMMA(wgmma_bf16, float, "f", "k16.f32.bf16.bf16", ", 1, 1, 0, 0")
MIMO_WGMMA(wgmma_f16, float, "f", "k16.f32.f16.f16", ", 1, 1, 0, 0")
MIMO_WGMMA(wgmma_i8, int, "r", "k32.s32.s8.s8", "")
MIMO_WGMMA(wgmma_e4m3, float, "f", "k32.f32.e4m3.e4m3", ", 1, 1")

#define MIMO_CASE_HELD(n, half, o0, o1, o2, o3, o4, o5)                                                 \
  if constexpr (N == n)                                                                                 \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o5 ", 0;\n"                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" MIMO_R##half "}, {%" #o0  \
                 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4 ", p, 1, 1, 1;\n}\n"                          \
                 : MIMO_A##half("f", 0)                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
template <int N>
MIMO_DEVICE void wgmma_bf16_held(float (&acc)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  static_assert(N % 64 == 0 && N <= 256);
  MIMO_CASE_HELD(64, 32, 32, 33, 34, 35, 36, 37)
  MIMO_CASE_HELD(128, 64, 64, 65, 66, 67, 68, 69)
  MIMO_CASE_HELD(192, 96, 96, 97, 98, 99, 100, 101)
  MIMO_CASE_HELD(256, 128, 128, 129, 130, 131, 132, 133)
}

#else
inline void wgmma_fence(int line = __builtin_LINE()) { emulated::fence_products(line); }
inline void wgmma_commit(int line = __builtin_LINE()) { emulated::commit_products(line); }
template <int N> inline void wgmma_wait(int line = __builtin_LINE()) { emulated::wait_for_products(line, N); }
template <class T, int N> inline void wgmma_pin(T (&)[N]) {}

#define MIMO_WGMMA(name, sum, kind)                                                                     \
  template <int N>                                                                                      \
  inline void name(sum(&acc)[N / 2], uint64_t a, uint64_t b, int accumulate MIMO_SITE_PARAMETER) {      \
    static_assert(N == 8 || N == 16 || N == 32 || N == 64 || N == 96 || N == 128 || N == 192 || N == 256); \
    emulated::issue(emulated::Kind::kind, MIMO_SITE, N, acc, a, b, accumulate);                               \
  }
MIMO_WGMMA(wgmma_bf16, float, BF16)
MIMO_WGMMA(wgmma_f16, float, F16)
MIMO_WGMMA(wgmma_i8, int, I8)
MIMO_WGMMA(wgmma_e4m3, float, E4M3)
template <int N>
inline void wgmma_bf16_held(float (&acc)[N / 2], const uint32_t (&a)[4], uint64_t b,
                            int accumulate MIMO_SITE_PARAMETER) {
  static_assert(N % 64 == 0 && N <= 256);
  emulated::issue(emulated::Kind::BF16, MIMO_SITE, N, acc, 0, b, accumulate, a);
}
#endif
