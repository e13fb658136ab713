// Attention of one warp's 16 query rows over KV caches in groups of few bits.
//
// A group is 64 keys: codes c of BITS bits that stand for scale * c + zero, with a scale for each channel of the
// keys and for 64 channels of each value. Codes are multiplied as bytes, less their middle: queries times the
// scales of a group become integers relative to the largest of a row (of 16 bits, in two bytes, for codes of 8,
// else of 8), weights times scales integers of 0 to 255. Those are the integers that the op's bound knows. What
// the middle and the zeros stand for is added in float32, so that codes are never made real.
//
// A 32-bit word of codes belongs to one lane (g = lane / 4, t = lane % 4): field f of its bytes is one register
// of an operand of mma.m16n8k32. Keys 16p + 8n + g (p: pair of tiles) with channels 32s + 8t + 4h + i (byte i)
// are half h of step s; values of column 8n + g with keys 32j + 16h + 8 (i / 2) + 2t + i % 2 half h of step j:
// the lane's own weights. Words lie by chunks of up to four of a lane, so that 32 lanes load what is together.
// Methods: KIVI (Liu et al., 2024), BitDecoding (Du et al., 2025), scales as in docs/kv-caches.md.
#pragma once
#include "exact.cuh"
#include "kv_slots.cuh"

namespace groups {

constexpr int SIZE = 64;                   // keys of a group, columns of a value that share a scale
constexpr float WHOLE = 12582912.0f;       // 1.5 * 2^23: added to a number, its last bits are the integer
constexpr uint32_t ONES = 0x01010101u;
constexpr float WEIGHT_LEVELS = 255.0f;

template <int BITS> constexpr int MIDDLE = 1 << (BITS - 1);
template <int BITS> constexpr int TERMS = BITS == 8 ? 2 : 1;  // bytes of a query's integer
template <int BITS> constexpr float QUERY_LEVELS = BITS == 8 ? 127.0f * 256.0f : 127.0f;
// Codes of a byte of a word, and the fours of registers (of two tiles or steps, two halves each) that WORDS words hold.
template <int BITS> constexpr int FIELDS = 8 / BITS;
template <int BITS, int WORDS> constexpr int FOURS = WORDS * 2 / BITS;
constexpr int chunk_of(int words) { return words % 4 == 0 ? 4 : words % 2 == 0 ? 2 : 1; }

// Words of a lane for 16 keys, and for all columns of the values; how many lie together.
template <int BITS, int DK> constexpr int KEY_WORDS = DK / 32 * BITS / 2;
template <int BITS, int DW> constexpr int VALUE_WORDS = DW / 8 * BITS / 2;
template <int WORDS> constexpr int CHUNK = chunk_of(WORDS);

// Bytes of a group: of keys, their scales and zeros, values, theirs; all four are multiples of 128.
template <int BITS, int DK> constexpr int KEY_BYTES = SIZE * DK * BITS / 8;
template <int DK> constexpr int KEY_SCALE_BYTES = 4 * DK;
template <int BITS, int DW> constexpr int VALUE_BYTES = SIZE * DW * BITS / 8;
template <int DW> constexpr int PARTS = (DW + SIZE - 1) / SIZE;  // scales of a value
template <int DW> constexpr int VALUE_SCALE_BYTES = PARTS<DW> * SIZE * 4;
template <int BITS, int DK, int DW>
constexpr int BYTES = KEY_BYTES<BITS, DK> + KEY_SCALE_BYTES<DK> + VALUE_BYTES<BITS, DW> + VALUE_SCALE_BYTES<DW>;

// Copies `bytes` by so many threads, asynchronously.
template <int BYTES_OF, int THREADS>
__device__ __forceinline__ void copy_bytes(uint32_t to, const uint8_t* from, int thread) {
#pragma unroll
  for (int at = thread; at < BYTES_OF / 16; at += THREADS) cp_async16(to + at * 16, from + at * 16, true);
}

// Where a cache's arrays begin.
struct Cache {
  const uint8_t *k, *k_scale, *v, *v_scale;
};

// Number of group `group` of a sequence's KV head among those of a cache that has so many of each head: in pages of a pool
// where PAGE is not 0, which `table` (the sequence's own) names; else each sequence has groups of its own.
template <int GROUPS, int KV, int PAGE>
__device__ __forceinline__ size_t place_of(int sequence, int kv, int group, const int* table) {
  if constexpr (PAGE > 0) return size_t(kv) * GROUPS + entry_of<GROUPS, SIZE, PAGE>(sequence, group, table);
  return size_t(sequence * KV + kv) * GROUPS + group;
}

// Copies group number `group` (of all heads) to shared memory.
template <int BITS, int DK, int DW, int THREADS>
__device__ __forceinline__ void copy_group(uint32_t to, const Cache& from, size_t group, int thread) {
  constexpr int K = KEY_BYTES<BITS, DK>, KS = KEY_SCALE_BYTES<DK>, V = VALUE_BYTES<BITS, DW>;
  copy_bytes<K, THREADS>(to, from.k + group * K, thread);
  copy_bytes<KS, THREADS>(to + K, from.k_scale + group * KS, thread);
  copy_bytes<V, THREADS>(to + K + KS, from.v + group * V, thread);
  copy_bytes<VALUE_SCALE_BYTES<DW>, THREADS>(to + K + KS + V, from.v_scale + group * VALUE_SCALE_BYTES<DW>, thread);
}

// Rows with what zeros and middles of values add to all columns of a part; a lane has that of its own keys.
template <int DW>
struct Rows : exact::Rows<DW> {
  float base[PARTS<DW>][2];

  __device__ __forceinline__ void clear() {
    exact::Rows<DW>::clear();
#pragma unroll
    for (int part = 0; part < PARTS<DW>; ++part) base[part][0] = base[part][1] = 0.0f;
  }

  __device__ __forceinline__ void shrink(int half, float by) {
    exact::Rows<DW>::shrink(half, by);
#pragma unroll
    for (int part = 0; part < PARTS<DW>; ++part) base[part][half] *= by;
  }

  __device__ __forceinline__ void settle() {
#pragma unroll
    for (int part = 0; part < PARTS<DW>; ++part) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        base[part][half] += shfl_xor(base[part][half], 1);
        base[part][half] += shfl_xor(base[part][half], 2);
      }
    }
#pragma unroll
    for (int j = 0; j < DW / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) this->out[j][e] += base[j * 8 / SIZE][e / 2];
    }
    exact::Rows<DW>::settle();
  }
};

// The integers of four numbers plus WHOLE, byte `BYTE` of each.
template <int BYTE>
__device__ __forceinline__ uint32_t bytes_of(const uint32_t (&x)[4]) {
  constexpr uint32_t PICK = BYTE | (4 + BYTE) << 4;
  return prmt(prmt(x[0], x[1], PICK), prmt(x[2], x[3], PICK), 0x5410);
}

// Queries of a group: integers as left operands, what one is worth, the float32 part of a logit, their sum.
template <int BITS, int DK>
struct Query {
  uint32_t part[TERMS<BITS>][DK / 32][4];
  float unit[2], exact[2];
  int total[2];
};

__device__ __forceinline__ void load_floats(float (&to)[8], const float* from) {
  const float4 a = *reinterpret_cast<const float4*>(from), b = *reinterpret_cast<const float4*>(from + 4);
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

// Scales and zeros of the lane's eight channels of a step.
__device__ __forceinline__ void load_pairs(uint32_t (&to)[8], const uint8_t* from) {
  const uint4 a = *reinterpret_cast<const uint4*>(from), b = *reinterpret_cast<const uint4*>(from + 16);
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}
__device__ __forceinline__ float scale_of(uint32_t pair) { return f16_to_float(uint16_t(pair & 0xffff)); }
__device__ __forceinline__ float zero_of(uint32_t pair) { return f16_to_float(uint16_t(pair >> 16)); }

// Multiplies queries by a group's scales of keys, and rounds them. Of HALVES = 1 rows 8 to 15 do not count.
template <int BITS, int DK, int HALVES>
__device__ __forceinline__ void fold(Query<BITS, DK>& q, const float* queries, const uint8_t* scales) {
  const int lane = threadIdx.x & 31, t = lane & 3;
  const float* mine = queries + (lane >> 2) * exact::QUERY_STRIDE<DK> + t * 8;
  float most[2] = {0.0f, 0.0f}, inverse[2];
  q.exact[0] = q.exact[1] = 0.0f;
#pragma unroll
  for (int step = 0; step < DK / 32; ++step) {
    uint32_t pairs[8];
    load_pairs(pairs, scales + (step * 32 + t * 8) * 4);
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      float x[8];
      load_floats(x, mine + half * 8 * exact::QUERY_STRIDE<DK> + step * 32);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float scale = scale_of(pairs[e]);
        most[half] = fmaxf(most[half], fabsf(x[e] * scale));
        q.exact[half] = fmaf(x[e], fmaf(scale, float(MIDDLE<BITS>), zero_of(pairs[e])), q.exact[half]);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int away = 1; away < 4; away *= 2) {
      most[half] = fmaxf(most[half], shfl_xor(most[half], away));
      q.exact[half] += shfl_xor(q.exact[half], away);
    }
    q.unit[half] = most[half] / QUERY_LEVELS<BITS>;
    inverse[half] = most[half] > 0.0f ? QUERY_LEVELS<BITS> / most[half] : 0.0f;
  }
#pragma unroll
  for (int step = 0; step < DK / 32; ++step) {
    uint32_t pairs[8];
    load_pairs(pairs, scales + (step * 32 + t * 8) * 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x[8] = {};
      if (half < HALVES) load_floats(x, mine + half * 8 * exact::QUERY_STRIDE<DK> + step * 32);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t low[4], high[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float scaled = x[4 * h + i] * scale_of(pairs[4 * h + i]);
          low[i] = __float_as_uint(fmaf(scaled, inverse[half], WHOLE));
          high[i] = low[i] + 128u;  // the last byte has a sign
        }
        q.part[TERMS<BITS> - 1][step][half + 2 * h] = bytes_of<0>(low);
        if (TERMS<BITS> == 2) q.part[0][step][half + 2 * h] = bytes_of<1>(high);
      }
    }
  }
  if (BITS < 8) {
    int sums[4] = {0, 0, 0, 0};
#pragma unroll
    for (int step = 0; step < DK / 32; ++step) mma_i8(sums, q.part[0][step], ONES, ONES);
    q.total[0] = sums[0];
    q.total[1] = sums[2];
  }
}

template <int WORDS>
__device__ __forceinline__ void load_words(uint32_t (&to)[WORDS], const uint8_t* from) {
  if constexpr (WORDS == 4) {
    const uint4 x = *reinterpret_cast<const uint4*>(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  } else if constexpr (WORDS == 2) {
    const uint2 x = *reinterpret_cast<const uint2*>(from);
    to[0] = x.x, to[1] = x.y;
  } else {
    to[0] = *reinterpret_cast<const uint32_t*>(from);
  }
}

// The registers of four number `u` that words hold.
template <int BITS>
__device__ __forceinline__ void unpack(uint32_t (&to)[4], const uint32_t* words, int u) {
  constexpr uint32_t MASK = ((1u << BITS) - 1u) * ONES;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = words[(4 * u + i) / FIELDS<BITS>];
    to[i] = BITS == 8 ? word : word >> ((4 * u + i) % FIELDS<BITS> * BITS) & MASK;
  }
}

// Logits of a group's 64 keys before scaling: `logits[n]` has keys 8n ... 8n + 7.
template <int BITS, int DK>
__device__ __forceinline__ void score(float (&logits)[8][4], const Query<BITS, DK>& q, const uint8_t* codes) {
  constexpr int WORDS = KEY_WORDS<BITS, DK>, V = CHUNK<WORDS>, STEPS = FOURS<BITS, V>;
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    int sums[TERMS<BITS>][2][4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int term = 0; term < TERMS<BITS>; ++term) {
        sums[term][0][e] = sums[term][1][e] = BITS < 8 ? -MIDDLE<BITS> * q.total[e / 2] : 0;
      }
    }
#pragma unroll
    for (int chunk = 0; chunk < WORDS / V; ++chunk) {
      uint32_t words[V];
      load_words<V>(words, codes + ((pair * (WORDS / V) + chunk) * 32 + lane) * 4 * V);
#pragma unroll
      for (int u = 0; u < STEPS; ++u) {
        uint32_t b[4];
        unpack<BITS>(b, words, u);
#pragma unroll
        for (int term = 0; term < TERMS<BITS>; ++term) {
          mma_i8(sums[term][0], q.part[term][chunk * STEPS + u], b[0], b[1]);
          mma_i8(sums[term][1], q.part[term][chunk * STEPS + u], b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int whole = TERMS<BITS> == 2 ? sums[0][n][e] * 256 + sums[TERMS<BITS> - 1][n][e] : sums[0][n][e];
        logits[2 * pair + n][e] = fmaf(q.unit[e / 2], float(whole), q.exact[e / 2]);
      }
    }
  }
}

// Integers for the weights of a group times the scales of part number `part` of its values.
template <int BITS, int DW, int HALVES>
__device__ __forceinline__ void fold_weights(uint32_t (&whole)[2][4], float (&unit)[2], Rows<DW>& rows, int part,
                                             const float (&weights)[8][4], const uint8_t* scales) {
  uint2 pairs[8];  // of the lane's keys 8n + 2t and the next
  const uint8_t* mine = scales + (part * SIZE + (threadIdx.x & 3) * 2) * 4;
#pragma unroll
  for (int n = 0; n < 8; ++n) pairs[n] = *reinterpret_cast<const uint2*>(mine + n * 32);
  float most[2] = {0.0f, 0.0f}, inverse[2];
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint32_t pair = e ? pairs[n].y : pairs[n].x;
      const float scale = scale_of(pair), middle = fmaf(scale, float(MIDDLE<BITS>), zero_of(pair));
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        const float weight = weights[n][2 * half + e];
        most[half] = fmaxf(most[half], weight * scale);
        rows.base[part][half] = fmaf(weight, middle, rows.base[part][half]);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    most[half] = fmaxf(most[half], shfl_xor(most[half], 1));
    most[half] = fmaxf(most[half], shfl_xor(most[half], 2));
    unit[half] = most[half] / WEIGHT_LEVELS;
    inverse[half] = most[half] > 0.0f ? WEIGHT_LEVELS / most[half] : 0.0f;
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {  // step and half of its keys
      uint32_t x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = 2 * quarter + i / 2;
        const float scaled = weights[n][2 * half + i % 2] * scale_of(i % 2 ? pairs[n].y : pairs[n].x);
        x[i] = __float_as_uint(fmaf(scaled, inverse[half], WHOLE));
      }
      whole[quarter / 2][half + quarter % 2 * 2] = half < HALVES ? bytes_of<0>(x) : 0u;
    }
  }
}

// Adds the weighted values of a group to the rows.
template <int BITS, int DW, int HALVES>
__device__ __forceinline__ void add_values(Rows<DW>& rows, const float (&weights)[8][4], const uint8_t* codes,
                                           const uint8_t* scales) {
  constexpr int WORDS = VALUE_WORDS<BITS, DW>, V = CHUNK<WORDS>, TILES = FOURS<BITS, V>;
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int part = 0; part < PARTS<DW>; ++part) {
    uint32_t whole[2][4];
    float unit[2];
    fold_weights<BITS, DW, HALVES>(whole, unit, rows, part, weights, scales);
    int total[4] = {0, 0, 0, 0};
    if (BITS < 8) {
      mma_u8(total, whole[0], ONES, ONES);
      mma_u8(total, whole[1], ONES, ONES);
    }
    constexpr int CHUNKS = SIZE / 8 / TILES;  // of a whole part
#pragma unroll
    for (int chunk = part * CHUNKS; chunk < (part + 1) * CHUNKS && chunk < WORDS / V; ++chunk) {
      uint32_t words[V];
      load_words<V>(words, codes + (chunk * 32 + lane) * 4 * V);
#pragma unroll
      for (int u = 0; u < TILES; ++u) {
        uint32_t b[4];
        unpack<BITS>(b, words, u);
        int sums[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[e] = BITS < 8 ? -MIDDLE<BITS> * total[e / 2 * 2] : 0;
        mma_u8(sums, whole[0], b[0], b[1]);
        mma_u8(sums, whole[1], b[2], b[3]);
        float(&out)[4] = rows.out[chunk * TILES + u];
#pragma unroll
        for (int e = 0; e < 4; ++e) out[e] = fmaf(unit[e / 2], float(sums[e]), out[e]);
      }
    }
  }
}

// One step of online softmax over a group in shared memory, as `copy_group` leaves it. With `masked`, `seen[half]`
// says whether the lane's row number `half` sees it.
template <int BITS, int DK, int DW, int HALVES>
__device__ __forceinline__ void attend(Rows<DW>& rows, const float* queries, const uint8_t* group, float scale,
                                       bool masked, const bool (&seen)[2]) {
  const uint8_t* k_scale = group + KEY_BYTES<BITS, DK>;
  const uint8_t* values = k_scale + KEY_SCALE_BYTES<DK>;
  float logits[8][4];
  {
    Query<BITS, DK> q;
    fold<BITS, DK, HALVES>(q, queries, k_scale);
    score<BITS, DK>(logits, q, group);
  }
  if (masked) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (!seen[e / 2]) logits[n][e] = -flash::infinity();
      }
    }
  }
  exact::weigh<8>(logits, rows, scale);
  add_values<BITS, DW, HALVES>(rows, logits, values, values + VALUE_BYTES<BITS, DW>);
}

}  // namespace groups
