// Where a position of a sequence lies in its cache.
#pragma once

// Slot of a position in a cache of CAP slots. FIRST: so many positions have slots of their own, before a ring
// of the others. PAGE: positions in a page, which `table` maps to pages of slots; 0: there is no table.
template <int CAP, int FIRST, int PAGE>
__device__ __forceinline__ int slot_of(int position, const int* table) {
  if constexpr (PAGE > 0) {
    return table[position / PAGE] * PAGE + position % PAGE;
  } else if constexpr (FIRST > 0) {
    return position < FIRST ? position : FIRST + (position - FIRST) % (CAP - FIRST);
  } else {
    return position % CAP;
  }
}

// Row of the entry of a sequence that stands for SPAN positions, of ENTRIES for each; in pages that of the page with its
// last position.
template <int ENTRIES, int SPAN, int PAGE>
__device__ __forceinline__ size_t entry_of(int sequence, int entry, const int* table) {
  if constexpr (PAGE > 0) {
    constexpr int EACH = PAGE > SPAN ? PAGE / SPAN : 1;
    return size_t(table[((entry + 1) * SPAN - 1) / PAGE]) * EACH + entry % EACH;
  } else {
    return size_t(sequence) * ENTRIES + entry;
  }
}
