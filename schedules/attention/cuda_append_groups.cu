// One step's rows into KV caches in groups of few bits: float32 rows to the tail, then groups that are full as codes.
//
// The first launch is that of cuda_append.cu, whose rows go to the tail. In the second one a block has the keys, or
// the values, of a KV head and of one of the groups that the step may fill: it finds scales and zero points, a
// channel or a token at a time, leaves codes in shared memory, and puts them together as groups.cuh says.
// Constants: those of append.cuh, DK, DT, DW, BITS, GROUPS, PAGE, TABLE, TAIL (see cuda_groups_decode.cu), NEW (groups
// that a step may fill), PACKERS (threads of the second launch).
#include "append.cuh"
#include "groups.cuh"

constexpr float MOST = 65504.0f, LARGEST = 3.4028234663852886e38f;
constexpr int LEVELS = (1 << BITS) - 1, COLUMNS = DK > DW ? DK : DW;

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    kv_append(const float* __restrict__ qkv, const float* __restrict__ table, const int* __restrict__ pos,
              const float* __restrict__ q_norm, const float* __restrict__ k_norm, float* __restrict__ k_tail,
              float* __restrict__ v_tail, float* __restrict__ q) {
  auto place = [&](int sequence, int own, int position) {
    return size_t(sequence * KV + own) * TAIL + position % TAIL;
  };
  auto write = [&](float* to, int width, auto number) {
    for (int i = threadIdx.x & 31; i < width; i += 32) to[i] = number(i);
  };
  append::step(
      qkv, table, pos, q_norm, k_norm, q,
      [&](int sequence, int own, int position, auto number) {
        write(k_tail + place(sequence, own, position) * DT, DT, number);
      },
      [&](int sequence, int own, int position, auto number) {
        write(v_tail + place(sequence, own, position) * DW, DW, number);
      });
}

// Of numbers that share a scale: the smallest, the largest, and whether all are numbers.
struct Range {
  float low = LARGEST, high = -LARGEST;
  bool lost = false;

  __device__ __forceinline__ void add(float x) {
    low = fminf(low, x);
    high = fmaxf(high, x);
    lost = lost || !(fabsf(x) <= LARGEST);
  }
};

// Of codes of one bit the ends are the mean less, and plus, the mean distance from it. `sum(f)` adds f(x) of all `count`
// numbers x; those beyond float16 count as its largest.
template <class Sum>
__device__ __forceinline__ void around_mean(Range& range, int count, Sum sum) {
  auto held = [](float x) { return fminf(fmaxf(x, -MOST), MOST); };
  const float mean = sum(held) / float(count);
  const float away = sum([&](float x) { return fabsf(held(x) - mean); }) / float(count);
  range.low = mean - away, range.high = mean + away;
}

// Scale and zero point in float16 (the scale first), and as what codes are found with.
struct Scale {
  uint32_t pair;
  float zero, inverse;

  __device__ __forceinline__ explicit Scale(const Range& x) {
    const float lowest = fmaxf(fminf(x.low, MOST), -MOST);
    zero = f16_to_float(uint16_t(pack_f16(lowest, 0.0f) & 0xffff));
    const float step = fminf(fmaxf((x.high - zero) / float(LEVELS), 0.0f), MOST);
    pair = x.lost ? 0x7e007e00u : pack_f16(step, lowest);
    const float rounded = f16_to_float(uint16_t(pack_f16(step, 0.0f) & 0xffff));
    inverse = x.lost || !(rounded > 0.0f) ? 0.0f : 1.0f / rounded;
  }

  __device__ __forceinline__ uint8_t code(float x) const {
    if (inverse == 0.0f) return BITS == 8 ? 128 : 0;  // 0, less the middle
    const int nearest = int(rintf(fminf(fmaxf((x - zero) * inverse, 0.0f), float(LEVELS))));
    return uint8_t(BITS == 8 ? nearest ^ 128 : nearest);
  }
};

// Puts codes [64][COLUMNS] into words. `code(unit, g, t, slot, byte)` is where one lies, of the four slots (two tiles or
// steps, two halves each) of a step of keys or a tile of values.
template <int WORDS, class Code>
__device__ __forceinline__ void join(uint32_t* to, const uint8_t* codes, Code code) {
  constexpr int V = groups::CHUNK<WORDS>, FIELDS = groups::FIELDS<BITS>;
  for (int at = threadIdx.x; at < WORDS * 32; at += PACKERS) {
    const int lane = at / V % 32, word = at / V / 32 * V + at % V;
    uint32_t found = 0;
#pragma unroll
    for (int field = 0; field < FIELDS; ++field) {
      const int slot = word * FIELDS + field;
#pragma unroll
      for (int byte = 0; byte < 4; ++byte) {
        const uint32_t one = codes[code(slot / 4, lane / 4, lane % 4, slot % 4, byte)];
        found |= one << (8 * byte + BITS * field);
      }
    }
    to[at] = found;
  }
}

// Grid: groups that a step may fill, of each KV head of each sequence; keys, then values. Launch bounds without blocks
// of an SM would let the compiler stop at an occupancy of its own choice, and spill what is above.
extern "C" __global__ void __launch_bounds__(PACKERS, 1)
    quantise(const int* __restrict__ pos, const int* __restrict__ pages, const float* __restrict__ k_tail,
             const float* __restrict__ v_tail, uint8_t* __restrict__ k_cache, uint32_t* __restrict__ k_scale,
             uint8_t* __restrict__ v_cache, uint32_t* __restrict__ v_scale) {
  MIMO_SHARED(shared);
  const int cache = blockIdx.x / NEW, sequence = cache / KV;
  const int start = pos[2 * sequence], valid = pos[2 * sequence + 1];
  const int group = start / groups::SIZE + blockIdx.x % NEW;
  if ((group + 1) * groups::SIZE > start + valid) return;
  const size_t first = size_t(cache) * TAIL + group * groups::SIZE % TAIL;  // of the tail's rows
  const int place = int(
      groups::place_of<GROUPS, KV, PAGE>(sequence, cache % KV, group, pages + size_t(sequence) * TABLE));
  if (blockIdx.y == 0) {
    for (int c = threadIdx.x; c < DK; c += PACKERS) {
      const float* rows = k_tail + first * DT + c;
      Range range;
      if (c < D) {
        for (int i = 0; i < groups::SIZE; ++i) range.add(rows[i * DT]);
        if (BITS == 1) {
          around_mean(range, groups::SIZE, [&](auto f) {
            float part[8] = {};  // so that little is rounded
            for (int i = 0; i < groups::SIZE; i += 8) {
#pragma unroll
              for (int e = 0; e < 8; ++e) part[e] += f(rows[(i + e) * DT]);
            }
            return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
          });
        }
      }
      const Scale scale(range);
      k_scale[size_t(place) * DK + c] = c < D ? scale.pair : 0u;
      for (int i = 0; i < groups::SIZE; ++i) shared[i * COLUMNS + c] = c < D ? scale.code(rows[i * DT]) : uint8_t(0);
    }
    block_sync();
    uint8_t* to = k_cache + size_t(place) * groups::KEY_BYTES<BITS, DK>;
    for (int pair = 0; pair < 4; ++pair) {
      join<groups::KEY_WORDS<BITS, DK>>(
          reinterpret_cast<uint32_t*>(to) + pair * groups::KEY_WORDS<BITS, DK> * 32, shared,
          [&](int step, int g, int t, int slot, int byte) {
            return (pair * 16 + slot / 2 * 8 + g) * COLUMNS + step * 32 + t * 8 + slot % 2 * 4 + byte;
          });
    }
    return;
  }
  const int lane = threadIdx.x & 31;
  for (int at = threadIdx.x >> 5; at < groups::SIZE * groups::PARTS<DW>; at += PACKERS / 32) {
    const int token = at % groups::SIZE, part = at / groups::SIZE;
    const float* row = v_tail + (first + token) * DW;
    Range range;
    for (int i = part * groups::SIZE + lane; i < min(DV, (part + 1) * groups::SIZE); i += 32) range.add(row[i]);
#pragma unroll
    for (int away = 16; away > 0; away /= 2) {
      range.low = fminf(range.low, shfl_xor(range.low, away));
      range.high = fmaxf(range.high, shfl_xor(range.high, away));
    }
    range.lost = warp_ballot(range.lost) != 0;
    if (BITS == 1) {
      around_mean(range, min(DV - part * groups::SIZE, groups::SIZE), [&](auto f) {
        float sum = 0.0f;
        for (int i = part * groups::SIZE + lane; i < min(DV, (part + 1) * groups::SIZE); i += 32) sum += f(row[i]);
#pragma unroll
        for (int away = 16; away > 0; away /= 2) sum += shfl_xor(sum, away);
        return sum;
      });
    }
    const Scale scale(range);
    if (lane == 0) v_scale[size_t(place) * groups::PARTS<DW> * groups::SIZE + at] = scale.pair;
    for (int i = part * groups::SIZE + lane; i < min(DW, (part + 1) * groups::SIZE); i += 32) {
      shared[token * COLUMNS + i] = i < DV ? scale.code(row[i]) : uint8_t(0);
    }
  }
  block_sync();
  join<groups::VALUE_WORDS<BITS, DW>>(
      reinterpret_cast<uint32_t*>(v_cache + size_t(place) * groups::VALUE_BYTES<BITS, DW>), shared,
      [&](int tile, int g, int t, int slot, int byte) {
        return (slot * 16 + byte / 2 * 8 + t * 2 + byte % 2) * COLUMNS + tile * 8 + g;
      });
}
