// One step's rows of queries, keys and values: QK-norm, rotation, and keys and values to their slots.
//
// A warp has one head of one token. Lanes have pairs of neighbouring columns, so that 32 lanes write 64
// columns of a cache's row at once. Constants: those of append.cuh, DK, DW (widths of the caches' rows), CAP,
// SLOTS (of all pages, else CAP), FIRST, PAGE, TABLE (entries of a sequence's table).
#include "append.cuh"
#include "kv_slots.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    kv_append(const float* __restrict__ qkv, const float* __restrict__ table, const int* __restrict__ pos,
              const float* __restrict__ q_norm, const float* __restrict__ k_norm,
              const int* __restrict__ pages, uint16_t* __restrict__ k_cache, uint16_t* __restrict__ v_cache,
              float* __restrict__ q) {
  auto place = [&](int sequence, int own, int position) {
    const int slot = slot_of<CAP, FIRST, PAGE>(position, pages + size_t(sequence) * TABLE);
    return size_t(PAGE ? own : sequence * KV + own) * SLOTS + slot;
  };
  auto write = [&](uint16_t* row, int width, auto number) {
    uint32_t* to = reinterpret_cast<uint32_t*>(row);
    for (int i = threadIdx.x & 31; i < width / 2; i += 32) to[i] = pack_bf16(number(2 * i), number(2 * i + 1));
  };
  append::step(
      qkv, table, pos, q_norm, k_norm, q,
      [&](int sequence, int own, int position, auto number) {
        write(k_cache + place(sequence, own, position) * DK, DK, number);
      },
      [&](int sequence, int own, int position, auto number) {
        write(v_cache + place(sequence, own, position) * DW, DW, number);
      });
}
