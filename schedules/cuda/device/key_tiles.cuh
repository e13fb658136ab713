// Tiles of a KV cache for wgmma (sm_90a): where they lie, and the stages through which they come to shared memory.
//
// A row's 16-bit numbers lie in panels of 64 columns: rows of 128 bytes, swizzled, as wgmma and the tensor memory
// accelerator have them. Beyond a row's own numbers a panel holds zeros.
#pragma once
#include "wgmma.cuh"

namespace key_tiles {

constexpr int panels(int width) { return (width + 63) / 64; }

// STAGES stages of PANELS panels of KEYS rows, which one thread has filled and READERS warps read in turns. `full` of a
// stage: its bytes are there. `empty`: each warp is done with it.
template <int PANELS, int KEYS, int STAGES, int READERS>
struct Ring {
  static constexpr int PANEL = KEYS * 128, BYTES = PANELS * PANEL;

  uint8_t* smem;
  uint64_t *full, *empty;
  int stage = 0, phase = 0;  // which is next, and how many times (modulo 2) all have been passed

  // By all threads, before fence_barrier_init and block_sync; `barriers` has two for each stage.
  __device__ __forceinline__ Ring(uint8_t* stages, uint64_t* barriers)
      : smem(stages), full(barriers), empty(barriers + STAGES) {
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < STAGES; ++i) {
        mbarrier_init(full + i, 1);
        mbarrier_init(empty + i, READERS);
      }
    }
  }
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
  // By one thread: asks for the rows of a map from `row` on.
  __device__ __forceinline__ void ask(const CUtensorMap* map, int row) {
    mbarrier_wait(empty + stage, phase ^ 1);  // the first time at once
    mbarrier_expect(full + stage, BYTES);
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel) {
      tma_load(smem + stage * BYTES + panel * PANEL, map, 64 * panel, row, full + stage);
    }
    next();
  }
  // By readers: the next stage, once it is there; and that a warp is done with it.
  __device__ __forceinline__ uint8_t* arrived() const {
    mbarrier_wait(full + stage, phase);
    return smem + stage * BYTES;
  }
  // The warp meets first: a lane that still waited for the stage could miss its phase.
  __device__ __forceinline__ void leave() {
    warp_sync();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty + stage);
    next();
  }
};

// Where a tile begins, in the cache and in the sequence, and where the positions end that count in it.
struct Tile {
  int slot, position, limit;
};

// Positions in tiles of KEYS, each in slots that follow one another: of a ring of CAP slots, those before the cache's
// end come first, then those from its beginning.
template <int KEYS, int CAP>
struct Span {
  int begin, end, slot, before, whole, steps;  // `before` the cache's end: so many positions, in `whole` tiles

  __device__ __forceinline__ Span(int from, int to) : begin(from), end(max(from, to)) {
    slot = begin % CAP;
    before = min(end - begin, CAP - slot);
    whole = (before + KEYS - 1) / KEYS;
    steps = whole + (end - begin - before + KEYS - 1) / KEYS;
  }
  __device__ __forceinline__ Tile operator[](int step) const {
    if (step < whole) return {slot + step * KEYS, begin + step * KEYS, begin + before};
    return {(step - whole) * KEYS, begin + before + (step - whole) * KEYS, end};
  }
};

// By THREADS threads: writes 64 rows of D float32 numbers, rounded to bfloat16, in panels of 64 rows. `from(row)` is
// where one begins, or null: zeros.
template <int D, int THREADS, class From>
__device__ __forceinline__ void put_rows(uint8_t* to, From from) {
  constexpr int CHUNKS = 8 * panels(D);  // of 8 numbers
  for (int at = threadIdx.x % THREADS; at < 64 * CHUNKS; at += THREADS) {
    const int row = at / CHUNKS, chunk = at % CHUNKS;
    const float* own = from(row);
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = own != nullptr && chunk * 8 + i < D ? own[chunk * 8 + i] : 0.0f;
    *reinterpret_cast<uint4*>(to + chunk / 8 * (64 * 128) + row * 128 + (chunk % 8 ^ row % 8) * 16) = make_uint4(
        pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
  }
}

// By THREADS threads, that then meet at a barrier: zeros in the place of a tile's rows from `have` on.
template <int PANELS, int KEYS, int THREADS>
__device__ __forceinline__ void clear_rows(uint8_t* tile, int have, int barrier) {
  const int chunks = (KEYS - have) * 8;
  for (int at = threadIdx.x; at < PANELS * chunks; at += THREADS) {
    const int panel = at / chunks, chunk = at % chunks;
    *reinterpret_cast<uint4*>(tile + (panel * KEYS + have) * 128 + chunk * 16) = make_uint4(0, 0, 0, 0);
  }
  fence_async_proxy();
  named_sync(barrier, THREADS);
}

}  // namespace key_tiles
