// The router's selection: a warp has a token, its lanes the experts in turns.
//
// Scores, then TOPGROUPS passes for the best group that is left, and TOPK for the best expert. What is equal goes to
// the lowest index. A NaN ranks below every number, so that ids are experts whatever the logits are.
// Constants: T, E, TOPK, GROUPS, TOPGROUPS, FACTOR, WARPS, and for the preprocessor SOFTMAX, BIAS, NORM.
#include "warp.cuh"

constexpr int PER = (E + 31) / 32;  // experts of a lane: its number, and each 32nd behind it
constexpr int SIZE = E / GROUPS;
constexpr float LOWEST = -1e38f, TAKEN = -3e38f;  // the sum of two of the first is more

struct Best {
  float value;
  int index;
};

// The largest value of a warp's lanes, of equal ones that with the lowest index; all lanes get it.
__device__ __forceinline__ Best best_of(Best own) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    const Best other = {shfl_xor(own.value, mask), shfl_xor(own.index, mask)};
    if (other.value > own.value || (other.value == own.value && other.index < own.index)) own = other;
  }
  return own;
}

// Which groups keep their experts, as bits. A group's rank is the sum of its two best experts; lane g keeps that of g.
__device__ __forceinline__ uint32_t groups_of(const float (&choice)[PER]) {
  const int lane = threadIdx.x % 32;
  float rank = TAKEN;
#pragma unroll 1
  for (int group = 0; group < GROUPS; ++group) {
    float first = TAKEN, second = TAKEN;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      if ((i * 32 + lane) / SIZE != group) continue;
      second = fmaxf(second, fminf(first, choice[i]));
      first = fmaxf(first, choice[i]);
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
      const float a = shfl_xor(first, mask), b = shfl_xor(second, mask);
      second = fmaxf(fmaxf(second, b), fminf(first, a));
      first = fmaxf(first, a);
    }
    if (lane == group) rank = SIZE > 1 ? first + second : first;
  }
  uint32_t kept = 0;
#pragma unroll 1
  for (int i = 0; i < TOPGROUPS; ++i) {
    const int group = best_of({rank, lane}).index;
    kept |= 1u << group;
    if (lane == group) rank = TAKEN;
  }
  return kept;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    route(const float* __restrict__ logits, const float* __restrict__ bias, int* __restrict__ ids,
          float* __restrict__ weights) {
  const int lane = threadIdx.x % 32, token = blockIdx.x * WARPS + threadIdx.x / 32;
  if (token >= T) return;
  logits += size_t(token) * E;
  float score[PER];
#pragma unroll
  for (int i = 0; i < PER; ++i) score[i] = i * 32 + lane < E ? logits[i * 32 + lane] : TAKEN;
#if SOFTMAX
  float most = LOWEST, total = 0.0f;
#pragma unroll
  for (int i = 0; i < PER; ++i) most = fmaxf(most, score[i]);
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) most = fmaxf(most, shfl_xor(most, mask));
#pragma unroll
  for (int i = 0; i < PER; ++i) total += score[i] = expf(score[i] - most);
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) total += shfl_xor(total, mask);
#pragma unroll
  for (int i = 0; i < PER; ++i) score[i] /= total;
#else
#pragma unroll
  for (int i = 0; i < PER; ++i) score[i] = 1.0f / (1.0f + expf(-score[i]));
#endif

  float choice[PER];
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int expert = i * 32 + lane;
    choice[i] = TAKEN;
    if (expert >= E) continue;
    choice[i] = score[i];
#if BIAS
    choice[i] += bias[expert];
#endif
    choice[i] = fmaxf(choice[i], LOWEST);
  }
  if (GROUPS > 1) {
    const uint32_t kept = groups_of(choice);
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int expert = i * 32 + lane;
      if (expert < E && !(kept >> (expert / SIZE) & 1)) choice[i] = TAKEN;
    }
  }

  int id = 0;  // of choice `lane`
  float weight = 0.0f, sum = 0.0f;
#pragma unroll 1
  for (int place = 0; place < TOPK; ++place) {
    Best own = {TAKEN, lane};
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      if (choice[i] > own.value) own = {choice[i], i * 32 + lane};
    }
    const int found = best_of(own).index;
    float its = 0.0f;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      if (i * 32 + lane == found) choice[i] = TAKEN, its = score[i];
    }
    its = shfl(its, found % 32);
    sum += its;
    if (lane == place) id = found, weight = its;
  }
  if (lane >= TOPK) return;
#if NORM
  weight /= sum + 1e-20f;
#endif
  ids[size_t(token) * TOPK + lane] = id;
  weights[size_t(token) * TOPK + lane] = weight * FACTOR;
}
