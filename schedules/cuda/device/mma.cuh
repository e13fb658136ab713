// Matrix products of one warp (sm_80 and later), and loads of their operands from shared memory.
//
// Fragments are those of the PTX ISA; g = lane / 4, t = lane % 4. mma_bf16 and mma_f16, 16 x 16 by 16 x 8: a[0]
// has row g, columns 2t and 2t+1; a[1] row g+8; a[2] row g, columns 2t+8 and 2t+9; a[3] row g+8 of these. b0 has
// rows (of the depth) 2t and 2t+1 of column g, b1 2t+8 and 2t+9. c has row g, columns 2t, 2t+1, then row g+8.
// mma_i8, mma_u8 (a without signs, b with them) and mma_e4m3, 16 x 32 by 32 x 8: four elements in a register in
// place of two.
#pragma once
#include "warp.cuh"

#ifndef MIMO_EMULATE
#define MIMO_MMA(name, sum, letter, shape, types)                                                       \
  MIMO_DEVICE void name(sum(&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {                 \
    asm volatile("mma.sync.aligned." shape ".row.col." types                                            \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                     \
                 : "+" letter(c[0]), "+" letter(c[1]), "+" letter(c[2]), "+" letter(c[3])               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                       \
  }
MIMO_MMA(mma_bf16, float, "f", "m16n8k16", "f32.bf16.bf16.f32")
MIMO_MMA(mma_f16, float, "f", "m16n8k16", "f32.f16.f16.f32")
MIMO_MMA(mma_i8, int, "r", "m16n8k32", "s32.s8.s8.s32")
MIMO_MMA(mma_u8, int, "r", "m16n8k32", "s32.u8.s8.s32")
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
MIMO_MMA(mma_e4m3, float, "f", "m16n8k32", "f32.e4m3.e4m3.f32")
#endif
#undef MIMO_MMA

// Addresses are smem_address of rows of 16 bytes, multiples of 16; see emulation/tensor.cuh for who gets what.
MIMO_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
MIMO_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
MIMO_DEVICE void ldmatrix_x2(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
}
MIMO_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
}

#else
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 MIMO_SITE_PARAMETER) {
  emulated::mma(emulated::Kind::BF16, MIMO_SITE, c, a, b0, b1);
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 MIMO_SITE_PARAMETER) {
  emulated::mma(emulated::Kind::F16, MIMO_SITE, c, a, b0, b1);
}
inline void mma_i8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 MIMO_SITE_PARAMETER) {
  emulated::mma(emulated::Kind::I8, MIMO_SITE, c, a, b0, b1);
}
inline void mma_u8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 MIMO_SITE_PARAMETER) {
  emulated::mma(emulated::Kind::U8, MIMO_SITE, c, a, b0, b1);
}
inline void mma_e4m3(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 MIMO_SITE_PARAMETER) {
  emulated::mma(emulated::Kind::E4M3, MIMO_SITE, c, a, b0, b1);
}
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address MIMO_SITE_PARAMETER) {
  emulated::ldmatrix(MIMO_SITE, 4, r, address, false);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address MIMO_SITE_PARAMETER) {
  emulated::ldmatrix(MIMO_SITE, 4, r, address, true);
}
inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t address MIMO_SITE_PARAMETER) {
  emulated::ldmatrix(MIMO_SITE, 2, r, address, false);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t address MIMO_SITE_PARAMETER) {
  emulated::ldmatrix(MIMO_SITE, 2, r, address, true);
}
#endif
