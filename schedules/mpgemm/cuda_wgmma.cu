// y [M, N] = x [M, K] * w [N, K]^T (+ bias) by wgmma, of bfloat16 or int8 operands (INT8), sm_90a.
//
// First launch: x is rounded, or quantised with a scale for each row, into rows of ROW_BYTES bytes, as w's are.
// A stage holds 128 bytes of each row of both operands, a row's pieces of 16 exclusive-or the row, as the tensor
// memory accelerator writes them and wgmma reads them; four steps of 32 bytes.
//
// Main launch: BLOCKS blocks take the tiles of y (and the SPLIT pieces of K of each) in turns. CONSUMERS groups of
// four warps have 64 rows of a tile each; one thread of a further group asks for stages ahead of them. `full` of a
// stage: its bytes are there. `empty`: each warp of the consumers is done with it, since the warps of a group need
// not be at the same place. A consumer has one stage's products in flight while it starts the next one's.
//
// Third launch, where K is cut (SPLIT_K): the pieces' sums are added in their order.
#include "gemm_ends.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

constexpr int BM = 64 * CONSUMERS, DEPTH = 128, THREADS = 128 * (CONSUMERS + 1);
constexpr int TILES_M = matmul::up(M, BM), TILES_N = matmul::up(N, BN), TILES = TILES_M * TILES_N * SPLIT;
constexpr int TILES_K = matmul::up(ROW_BYTES, DEPTH), PIECE_TILES = matmul::up(TILES_K, SPLIT);
constexpr int STAGE_BYTES = (BM + BN) * DEPTH;

__device__ __forceinline__ void multiply(float (&sum)[BN / 2], uint64_t a, uint64_t b) {
  wgmma_bf16<BN>(sum, a, b, 1);
}
__device__ __forceinline__ void multiply(int (&sum)[BN / 2], uint64_t a, uint64_t b) {
  wgmma_i8<BN>(sum, a, b, 1);
}

// Which stage is next, and how many times (modulo 2) all stages have been passed.
struct Turn {
  int stage = 0, phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

// One of the tiles of a block: where it is in y, which piece of K, and that piece's stages.
struct Work {
  int m0, n0, piece, begin, count;
  __device__ __forceinline__ explicit Work(int index) {
    const matmul::Tile tile = matmul::tile_of<TILES_M, TILES_N, GROUP_M>(index % (TILES_M * TILES_N));
    m0 = tile.m * BM, n0 = tile.n * BN, piece = index / (TILES_M * TILES_N);
    begin = piece * PIECE_TILES, count = min(TILES_K - begin, PIECE_TILES);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    mpgemm_wgmma(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
                 OUT* __restrict__ out ENDS_PARAMETERS) {
  MIMO_SHARED(smem);
  uint64_t* full = reinterpret_cast<uint64_t*>(smem + STAGES * STAGE_BYTES);
  uint64_t* empty = full + STAGES;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
      mbarrier_init(full + stage, 1);
      mbarrier_init(empty + stage, 4 * CONSUMERS);
    }
    fence_barrier_init();
  }
  block_sync();

  const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
  Turn turn;
  if (group == CONSUMERS) {
    registers_decrease<PRODUCER_REGISTERS>();
    if (thread != 0) return;
    for (int index = blockIdx.x; index < TILES; index += BLOCKS) {
      const Work work(index);
      for (int depth = 0; depth < work.count; ++depth) {
        mbarrier_wait(empty + turn.stage, turn.phase ^ 1);  // the first time at once
        mbarrier_expect(full + turn.stage, STAGE_BYTES);
        uint8_t* to = smem + turn.stage * STAGE_BYTES;
        const int column = (work.begin + depth) * (DEPTH / ELEMENT);
        tma_load(to, &x_map, column, work.m0, full + turn.stage);
        tma_load(to + BM * DEPTH, &w_map, column, work.n0, full + turn.stage);
        turn.next();
      }
    }
    return;
  }

  registers_increase<CONSUMER_REGISTERS>();
  for (int index = blockIdx.x; index < TILES; index += BLOCKS) {
    const Work work(index);
    SUM sum[BN / 2] = {};
    int before = 0;
    for (int depth = 0; depth < work.count; ++depth) {
      mbarrier_wait(full + turn.stage, turn.phase);
      const uint8_t* stage = smem + turn.stage * STAGE_BYTES;
      const uint64_t a = wgmma_descriptor(stage + group * 64 * DEPTH), b = wgmma_descriptor(stage + BM * DEPTH);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < DEPTH / 32; ++step) multiply(sum, a + 2 * step, b + 2 * step);
      wgmma_commit();
      wgmma_wait<1>();  // for the products of the stage before
      if (depth > 0 && thread % 32 == 0) mbarrier_arrive(empty + before);
      before = turn.stage;
      turn.next();
    }
    wgmma_wait<0>();
    if (thread % 32 == 0) mbarrier_arrive(empty + before);
    wgmma_pin(sum);
    const int row = work.m0 + group * 64 + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int j = 0; j < BN / 8; ++j) {
      const SUM four[4] = {sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]};
      store_fragment(four, out, work.piece, row, work.n0 + j * 8 + thread % 4 * 2 ENDS);
    }
  }
}
