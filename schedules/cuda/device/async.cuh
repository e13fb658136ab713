// Copies from device to shared memory that go on while a thread computes (sm_80 and later).
//
// The order of use: copies, cp_async_commit, and later cp_async_wait<N>, after which all but the last N groups of
// this thread have arrived; a barrier then shows them to the other threads.
#pragma once
#include "warp.cuh"

#ifndef MIMO_EMULATE
// Both addresses are multiples of 16; where not `valid`, 16 zeros are written and nothing is read.
MIMO_DEVICE void cp_async16(uint32_t smem, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               ::"r"(smem), "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0) : "memory");
}
MIMO_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> MIMO_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#else
// What is copied is read at once, but arrives in the wait that covers it; until then the target holds 0xFF.
inline void cp_async16(uint32_t smem, const void* global, bool valid MIMO_SITE_PARAMETER) {
  emulated::Thread& me = *emulated::running;
  me.site = MIMO_SITE;
  uint8_t* to = emulated::shared_bytes(smem, 16, 16, "cp_async16");
  uint8_t data[16] = {};
  if (valid) {
    emulated::check_global(global, 16, false, "cp_async16");
    std::memcpy(data, global, 16);
  }
  std::memset(to, emulated::NOTHING, 16);
  me.copied.insert(me.copied.end(), data, data + 16);
  me.targets.push_back(smem);
  ++me.open;
}
inline void cp_async_commit() {
  emulated::Thread& me = *emulated::running;
  me.groups.push_back(me.open);
  me.open = 0;
}
template <int N> inline void cp_async_wait(int line = __builtin_LINE()) {
  emulated::Thread& me = *emulated::running;
  me.site = MIMO_SITE;
  size_t arrived = 0;
  while (me.groups.size() > size_t(N)) {
    for (uint32_t i = 0; i < me.groups.front(); ++i, ++arrived)
      std::memcpy(emulated::shared_bytes(me.targets[arrived], 16, 16, "cp_async16"), &me.copied[16 * arrived], 16);
    me.groups.erase(me.groups.begin());
  }
  me.copied.erase(me.copied.begin(), me.copied.begin() + 16 * arrived);
  me.targets.erase(me.targets.begin(), me.targets.begin() + arrived);
}
#endif
