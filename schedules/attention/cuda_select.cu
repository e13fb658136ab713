// Lists of the best blocks from their scores, in ascending order; of equal scores the lower block wins.
//
// A block has a list. Scores become integers of the same order in shared memory; the level that as many as are wanted
// reach is found bit by bit, and what reaches it is written down by prefix sums over runs of blocks. Constants: R (lists
// of a sequence and head), HS (heads), BLOCKS, BLOCK, ROWS (tokens of a list), K, SHARE, FIRST, LAST, KMAX, POSITIVE,
// THRESHOLD (all that reach their head's value are chosen, and K at least), THREADS.
#include "maps.cuh"

constexpr int WARPS = THREADS / 32, RUN = (BLOCKS + THREADS - 1) / THREADS;

__device__ __forceinline__ uint32_t raw(float x) {
  const uint32_t bits = x == 0.0f ? 0 : __float_as_uint(x);   // both zeros are one
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
// Integers in the order of numbers; 0 is below all of them, and what must not be chosen.
__device__ __forceinline__ uint32_t ordered(float x) {
  return (POSITIVE ? x >= 0x1p-126f : x > -infinity()) ? raw(x) : 0;
}

// The sum over the threads of a block.
__device__ __forceinline__ int counted(int x, int* parts) {
#pragma unroll
  for (int away = 16; away > 0; away /= 2) x += shfl_xor(x, away);
  block_sync();   // what was read of `parts` before
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  block_sync();
  x = 0;
  for (int i = 0; i < WARPS; ++i) x += parts[i];
  return x;
}

// The sum over the threads before this one.
__device__ __forceinline__ int before(int x, int* parts) {
  int sum = x;
  block_sync();
  parts[threadIdx.x] = x;
  block_sync();
  for (int away = 1; away < THREADS; away *= 2) {
    const int other = int(threadIdx.x) >= away ? parts[threadIdx.x - away] : 0;
    block_sync();
    parts[threadIdx.x] = sum += other;
    block_sync();
  }
  return sum - x;
}

#if THRESHOLD
#define VALUE_PARAMETER const float *__restrict__ value,
#else
#define VALUE_PARAMETER
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    select_blocks(const float* __restrict__ score, const int* __restrict__ pos, VALUE_PARAMETER int* __restrict__ idx,
                  int* __restrict__ cnt) {
  MIMO_SHARED(smem);
  int* const parts = reinterpret_cast<int*>(smem);
  uint32_t* const keys = reinterpret_cast<uint32_t*>(parts + THREADS);
  const int list = blockIdx.x, row = list / HS, sequence = row / R, token = row % R * ROWS;
  const int start = pos[2 * sequence], valid = pos[2 * sequence + 1];
  // rows of padding have no candidates
  const int own = token < valid ? (start + token) / BLOCK : 0;
  const int candidates = token < valid ? min((start + min(token + ROWS, valid) - 1) / BLOCK + 1, BLOCKS) : 0;
  // forced are the blocks before `head`, and from `tail` on
  const int head = min(FIRST, candidates), tail = LAST ? max(own - LAST + 1, head) : candidates;
  const int forced = head + max(candidates - tail, 0);
  const int begin = min(int(threadIdx.x) * RUN, candidates), end = min(begin + RUN, candidates);
  // levels are looked for by the threads that wrote the keys; others read them behind those barriers
  for (int i = threadIdx.x; i < candidates; i += THREADS) keys[i] = ordered(score[size_t(list) * BLOCKS + i]);

  auto is_free = [&](int i) { return i >= head && i < tail; };
  // How many blocks reach a level: of those that are not forced, or of all.
  auto reach = [&](uint32_t level, bool all) {
    int mine = 0;
    for (int i = threadIdx.x; i < candidates; i += THREADS) mine += keys[i] >= level && (all || is_free(i));
    return counted(mine, parts);
  };
  // The highest level that so many reach; 0: so many are not there.
  auto level_of = [&](int wanted, bool all) {
    uint32_t level = 0;
    for (int bit = 31; bit >= 0; --bit)
      if (reach(level | 1u << bit, all) >= wanted) level |= 1u << bit;
    return level;
  };
  // How many of the blocks at a level itself, from this thread's run on, there is room for: the first ones win.
  auto room_at = [&](uint32_t level, int wanted, bool all) {
    const int above = level == ~0u ? 0 : reach(level + 1, all);
    int ties = 0;
    for (int i = begin; i < end; ++i) ties += level > 0 && keys[i] == level && (all || is_free(i));
    return max(wanted - above - before(ties, parts), 0);
  };

#if THRESHOLD
  const float least = value[list % HS];
  // a block without a score is chosen by none
  int wanted = reach(least > -infinity() ? larger(raw(least), 1u) : least == -infinity() ? 1u : ~0u, false);
  if (K > 0) {   // and of the K best those that are not forced
    const uint32_t level = level_of(K, true);
    int room = room_at(level, K, true), mine = 0;
    for (int i = begin; i < end; ++i) {
      const bool tie = level > 0 && keys[i] == level;
      mine += is_free(i) && (keys[i] > level || (tie && room > 0));
      room -= tie;
    }
    wanted = max(wanted, counted(mine, parts));
  }
  wanted = max(min(wanted, KMAX - forced), 0);
#else
  const int wanted = max(min(max(K, int(ceil(double(SHARE) * candidates))), KMAX) - forced, 0);
#endif
  const uint32_t level = level_of(wanted, false);
  const int left = room_at(level, wanted, false);
  int chosen = 0;
  for (int i = begin, room = left; i < end; ++i) {
    const bool tie = level > 0 && keys[i] == level && is_free(i);
    chosen += !is_free(i) || keys[i] > level || (tie && room > 0);
    room -= tie;
  }
  int at = before(chosen, parts);
  for (int i = begin, room = left; i < end; ++i) {
    const bool tie = level > 0 && keys[i] == level && is_free(i);
    if (!is_free(i) || keys[i] > level || (tie && room > 0)) idx[size_t(list) * KMAX + at++] = i;
    room -= tie;
  }
  const int total = counted(chosen, parts);
  for (int i = total + threadIdx.x; i < KMAX; i += THREADS) idx[size_t(list) * KMAX + i] = -1;
  if (threadIdx.x == 0) cnt[list] = total;
}
