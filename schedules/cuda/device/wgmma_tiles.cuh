// A block's tiles of x * w^T by wgmma, of bfloat16 or int8 operands (sm_90a): who asks for tiles, and who multiplies.
//
// A stage holds 128 bytes along K of each row of both operands, 64 rows of x for each consumer and BN of w behind them;
// a row's pieces of 16 bytes are exclusive-or the row, as the tensor memory accelerator writes them and wgmma reads
// them; four steps of 32 bytes. CONSUMERS groups of four warps have 64 rows each; one thread of a further group asks for
// stages ahead of them. `full` of a stage: its bytes are there. `empty`: each warp of the consumers is done with it,
// since the warps of a group need not be at the same place; of a cluster, whose blocks bring tiles to each other, the
// warps of all blocks. A consumer has one stage's products in flight while it starts the next one's.
#pragma once
#include "cluster.cuh"
#include "matmul.cuh"
#include "wgmma.cuh"

namespace tiles {

template <int N>
__device__ __forceinline__ void multiply(float (&sum)[N], uint64_t a, uint64_t b, int accumulate) {
  wgmma_bf16<2 * N>(sum, a, b, accumulate);
}
template <int N>
__device__ __forceinline__ void multiply(int (&sum)[N], uint64_t a, uint64_t b, int accumulate) {
  wgmma_i8<2 * N>(sum, a, b, accumulate);
}

template <int CONSUMERS, int BN, int STAGES, int CLUSTER = 1>
struct Pipeline {
  static constexpr int BM = 64 * CONSUMERS, DEPTH = 128, THREADS = 128 * (CONSUMERS + 1);
  static constexpr int STAGE_BYTES = (BM + BN) * DEPTH;

  uint8_t* smem;  // stages, then barriers: two for each
  uint64_t *full, *empty;
  int stage = 0, phase = 0;  // which is next, and how many times (modulo 2) all have been passed

  __device__ __forceinline__ explicit Pipeline(uint8_t* shared) : smem(shared) {
    full = reinterpret_cast<uint64_t*>(smem + STAGES * STAGE_BYTES);
    empty = full + STAGES;
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < STAGES; ++i) {
        mbarrier_init(full + i, 1);
        mbarrier_init(empty + i, 4 * CONSUMERS * CLUSTER);
      }
      fence_barrier_init();
    }
    if constexpr (CLUSTER > 1) {
      cluster_sync();
    } else {
      block_sync();
    }
  }

  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }

  // By one thread: asks for `count` stages. `load(to, depth, barrier)` asks for the bytes of one.
  template <class Load>
  __device__ __forceinline__ void ask(int count, Load load) {
    for (int depth = 0; depth < count; ++depth) {
      mbarrier_wait(empty + stage, phase ^ 1);  // the first time at once
      mbarrier_expect(full + stage, STAGE_BYTES);
      load(smem + stage * STAGE_BYTES, depth, full + stage);
      next();
    }
  }

  // By each warp of the consumers: it is done with a stage, into which all producers of the cluster may write.
  __device__ __forceinline__ void leave(int done) {
    const int lane = threadIdx.x % 32;
    if (lane < CLUSTER) {
      if constexpr (CLUSTER > 1) {
        mbarrier_arrive_in(empty + done, lane);
      } else {
        mbarrier_arrive(empty + done);
      }
    }
  }

  // By all threads, last: a block of a cluster stays until the others reach for it no more.
  __device__ __forceinline__ void end() {
    if constexpr (CLUSTER > 1) {
      cluster_sync();
    }
  }

  // By consumer `group`: the sums of products of `count` stages, one at least, whatever was in `sum`.
  template <class Sum>
  __device__ __forceinline__ void multiply_all(int group, int count, Sum (&sum)[BN / 2]) {
    int before = 0;
    for (int depth = 0; depth < count; ++depth) {
      mbarrier_wait(full + stage, phase);
      const uint8_t* rows = smem + stage * STAGE_BYTES;
      const uint64_t a = wgmma_descriptor(rows + group * 64 * DEPTH), b = wgmma_descriptor(rows + BM * DEPTH);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < DEPTH / 32; ++step) multiply(sum, a + 2 * step, b + 2 * step, depth + step > 0);
      wgmma_commit();
      wgmma_wait<1>();  // for the products of the stage before
      if (depth > 0) leave(before);
      before = stage;
      next();
    }
    wgmma_wait<0>();
    leave(before);
    wgmma_pin(sum);
  }
};

}  // namespace tiles
