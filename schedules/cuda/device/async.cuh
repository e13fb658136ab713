// Copies from device to shared memory that go on while a thread computes (sm_80 and later).
//
// The order of use: copies, cp_async_commit, and later cp_async_wait<N>, after which all but the last N groups of
// this thread have arrived; a barrier then shows them to the other threads.
#pragma once
#include "warp.cuh"

#ifndef MIMO_EMULATE
// Both addresses are multiples of 16; where not `valid`, 16 zeros are written and nothing is read.
MIMO_DEVICE void cp_async16(uint32_t smem, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               ::"r"(smem), "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0) : "memory");
}
MIMO_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> MIMO_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#else
inline void cp_async16(uint32_t smem, const void* global, bool valid MIMO_SITE_PARAMETER) {
  emulated::cp_async16(line, smem, global, valid);
}
inline void cp_async_commit() { emulated::cp_async_commit(); }
template <int N> inline void cp_async_wait(int line = __builtin_LINE()) { emulated::cp_async_wait(line, N); }
#endif
