// Bulk copies by the tensor memory accelerator, barriers that count their bytes, and register budgets (sm_90a).
//
// A barrier is a uint64_t in shared memory. Its phases are numbered 0, 1, 0, ...: a phase ends when as many
// arrivals as mbarrier_init said have come and all bytes that they announced have arrived. mbarrier_wait(b, p)
// returns when the phase of parity p has ended; waiting for parity 1 of a new barrier returns at once.
#pragma once
#include "warp.cuh"

#ifndef MIMO_EMULATE
// 128 bytes that the host encodes; a parameter of a kernel: const __grid_constant__ CUtensorMap map.
#ifndef __cuda_cuda_h__
struct __align__(64) CUtensorMap { uint64_t opaque[16]; };
#endif

MIMO_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(arrivals) : "memory");
}
// One arrival that announces so many bytes of tma_load.
MIMO_DEVICE void mbarrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               ::"r"(smem_address(barrier)), "r"(bytes) : "memory");
}
MIMO_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(barrier)) : "memory");
}
MIMO_DEVICE void mbarrier_wait(uint64_t* barrier, int parity) {
  const uint32_t address = smem_address(barrier);
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done) : "r"(address), "r"(parity) : "memory");
  } while (!done);
}
// By one thread: the box whose first element is (row, column). Outside the matrix it is zero. `smem` is a multiple
// of 128, of 1024 where 128 bytes are swizzled.
MIMO_DEVICE void tma_load(void* smem, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];"
      ::"r"(smem_address(smem)), "l"(map), "r"(column), "r"(row), "r"(smem_address(barrier)) : "memory");
}
MIMO_DEVICE void tma_prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// After mbarrier_init, before a block_sync: others may then use the barriers.
MIMO_DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// What this thread wrote to shared memory is seen by tma and wgmma that follow.
MIMO_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// By all threads of a warp group: gives registers of each thread back, or takes more; N is a multiple of 8.
template <int N> MIMO_DEVICE void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> MIMO_DEVICE void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

#else
inline void mbarrier_init(uint64_t* barrier, int arrivals MIMO_SITE_PARAMETER) {
  emulated::begin_barrier(line, barrier, arrivals);
}
inline void mbarrier_expect(uint64_t* barrier, int bytes MIMO_SITE_PARAMETER) {
  emulated::arrive_at(MIMO_SITE, barrier, bytes);
}
inline void mbarrier_arrive(uint64_t* barrier MIMO_SITE_PARAMETER) { emulated::arrive_at(MIMO_SITE, barrier, 0); }
inline void mbarrier_wait(uint64_t* barrier, int parity MIMO_SITE_PARAMETER) {
  emulated::wait_for_phase(line, barrier, parity);
}
inline void tma_load(void* smem, const CUtensorMap* map, int column, int row,
                     uint64_t* barrier MIMO_SITE_PARAMETER) {
  emulated::load_box(line, smem, *map, column, row, barrier);
}
inline void tma_prefetch_map(const CUtensorMap*) {}
inline void fence_barrier_init() { emulated::fence_barriers(); }
inline void fence_async_proxy() { emulated::fence_proxy(); }
template <int N> inline void registers_decrease(int line = __builtin_LINE()) {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
  emulated::set_registers(MIMO_SITE, N, false);
}
template <int N> inline void registers_increase(int line = __builtin_LINE()) {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
  emulated::set_registers(MIMO_SITE, N, true);
}
#endif
