// Clusters (sm_90a): blocks of a launch that run at the same time, on SMs next to each other, and reach each other's
// shared memory. A kernel is declared with __cluster_dims__(blocks, 1, 1); the rank of a block in its cluster is
// blockIdx.x % blocks.
//
// What one block has at an address of its shared memory, the others have at the same one. A block may end only when no
// other reaches for it any more: behind a last cluster_sync.
#pragma once
#include "tma.cuh"

#ifndef MIMO_EMULATE
// By all threads of all blocks that have not ended, whole warps: what they did before is seen by what they do after.
MIMO_DEVICE void cluster_sync() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// mbarrier_arrive at the barrier of block `rank`. It publishes to that block nothing that this thread wrote before, which
// takes cluster_sync: releasing at the scope of the cluster is a fence of the whole device, in the inner loop. It says that
// this thread has read what it was to read, and is done with waiting for its products.
MIMO_DEVICE void mbarrier_arrive_in(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n"
      ::"r"(smem_address(barrier)), "r"(rank) : "memory");
}
// tma_load into each block whose bit is set; each block's own barrier counts the bytes.
MIMO_DEVICE void tma_load_multicast(void* smem, const CUtensorMap* map, int column, int row, uint64_t* barrier,
                                    uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;"
      ::"r"(smem_address(smem)), "l"(map), "r"(column), "r"(row), "r"(smem_address(barrier)), "h"(blocks) : "memory");
}

#else
inline void cluster_sync(int line = __builtin_LINE()) { emulated::wait_for_cluster(line); }
inline void mbarrier_arrive_in(uint64_t* barrier, int rank MIMO_SITE_PARAMETER) {
  emulated::arrive_in(MIMO_SITE, barrier, rank);
}
inline void tma_load_multicast(void* smem, const CUtensorMap* map, int column, int row, uint64_t* barrier,
                               uint16_t blocks MIMO_SITE_PARAMETER) {
  emulated::load_boxes(line, smem, *map, column, row, barrier, blocks);
}
#endif
