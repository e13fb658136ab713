// Every plain access of a kernel, as the compiler's instrumentation for threads reports it (-fsanitize=thread, with
// the functions below in the place of its library): it must lie inside an array, and in shared memory it must be
// ordered to those of other threads.
//
// Order is kept by vector clocks, one for each warp and one for bulk copies. Barriers, arrivals at phases and waits
// for them pass clocks on. Two accesses of one byte, one of them a write, of which neither is known to the other's
// warp, are a race; so are those of two lanes of a warp with neither a warp_sync nor a barrier between.
// Reads are kept by words of four bytes and the last lane of each warp alone, so that some races are missed.
#pragma once
#include "threads.cuh"

namespace emulated {

constexpr uint32_t BULK = 0xFFFF, UNDER_WAY = ~0u;
struct Written {
  uint32_t clock;       // of the writer's warp, or of bulk copies; UNDER_WAY: cp.async that nobody waited for
  uint32_t synced;      // how often its warp had met for memory's sake
  uint16_t writer;      // thread, or BULK
  uint16_t fences;      // how often the writer had fenced for the asynchronous proxy
};
struct Read {
  uint32_t clock[MOST_WARPS];
  uint32_t synced;
  uint16_t reader;
};
std::vector<Written> written;   // for each byte of shared memory
std::vector<Read> read_of;      // for each four
uint32_t block_began;           // clocks up to this are of earlier blocks

void begin_races() {
  if (written.size() < shared.bytes) written.resize(shared.bytes), read_of.resize(shared.bytes / 4 + 1);
  uint32_t latest = bulk_clock;
  for (int w = 0; w < MOST_WARPS; ++w) latest = std::max(latest, warps[w].clock.of[w]);
  for (Warp& w : warps) {   // what earlier blocks did is known to all
    for (uint32_t& c : w.clock.of) c = latest;
    w.clock.of[w.index] = latest + 1;
    ++w.synced;
  }
  bulk_clock = latest + 1;
  block_began = latest;
}

[[noreturn]] void race(const char* what, uint32_t byte, const char* other_did, uint32_t other, bool under_way = false) {
  char who[60];
  if (other == BULK)
    snprintf(who, sizeof who, "a bulk copy");
  else
    snprintf(who, sizeof who, "thread %u", other);
  if (under_way) fail("%s byte %u of shared memory before the wait for the cp_async16 of %s", what, byte, who);
  fail("a race: %s byte %u of shared memory, which %s %s with no barrier between", what, byte, who, other_did);
}

// Says whether a write is known to a thread: done by itself, or before something that its warp waited for.
bool knows(const Thread& t, const Written& w) {
  if (w.clock == UNDER_WAY) return false;
  if (w.writer == BULK) return w.clock <= t.warp->clock.of[MOST_WARPS];
  const uint32_t warp = w.writer / LANES;
  if (warp != t.warp->index) return w.clock <= t.warp->clock.of[warp];
  return w.writer == t.index || w.synced < t.warp->synced;
}

void note_read(const Thread& t, const char* what, uint32_t at, uint32_t bytes) {
  for (uint32_t b = at; b < at + bytes; ++b)
    if (!knows(t, written[b])) race(what, b, "wrote", written[b].writer, written[b].clock == UNDER_WAY);
  for (uint32_t word = at / 4; word <= (at + bytes - 1) / 4; ++word) {
    Read& r = read_of[word];
    r.clock[t.warp->index] = t.warp->clock.of[t.warp->index];
    r.reader = uint16_t(t.index), r.synced = t.warp->synced;
  }
}

void note_write(const Thread& t, const char* what, uint32_t at, uint32_t bytes, const Written& by) {
  for (uint32_t word = at / 4; word <= (at + bytes - 1) / 4; ++word) {
    const Read& r = read_of[word];
    for (int w = 0; w < warp_count; ++w)
      if (w != int(t.warp->index) && r.clock[w] > t.warp->clock.of[w])
        race(what, word * 4, "read", r.reader / LANES == w ? r.reader : w * LANES);
    if (r.reader / LANES == t.warp->index && r.reader != t.index && r.synced == t.warp->synced)
      race(what, word * 4, "read", r.reader);
  }
  for (uint32_t b = at; b < at + bytes; ++b) {
    const Written& w = written[b];
    const bool same_warp = w.writer != BULK && w.writer / LANES == t.warp->index;  // lanes may write one value
    if (!same_warp && !knows(t, w)) race(what, b, "wrote", w.writer);
    written[b] = by;
  }
}

Written by_thread(const Thread& t) {
  return {t.warp->clock.of[t.warp->index], t.warp->synced, uint16_t(t.index), t.fences};
}

// A plain access of the running thread.
void note_access(const void* pointer, size_t bytes, bool writes, const void* pc) {
  const uint8_t* p = static_cast<const uint8_t*>(pointer);
  if (p >= stacks && p < stacks_end) return;
  const Array* a = array_at(p);
  if (!a || !running) return;   // constants of the program
  access_pc = pc;
  if (p < a->base || p + bytes > a->base + a->bytes || (writes && !a->writable)) {
    char place[300];
    place_of(p, place, sizeof place);
    fail("%s %zu bytes at %s%s", writes ? "writes" : "reads", bytes, place,
         writes && !a->writable ? ", which is an input" : "");
  }
  if (a == &shared) {
    const uint32_t at = uint32_t(p - a->base);
    if (writes)
      note_write(*running, "writes", at, uint32_t(bytes), by_thread(*running));
    else
      note_read(*running, "reads", at, uint32_t(bytes));
  }
  access_pc = nullptr;
}

}  // namespace emulated

// The instrumentation's own names.
#define MIMO_ACCESS(size)                                                                                       \
  extern "C" void __tsan_read##size(void* p) { emulated::note_access(p, size, false, __builtin_return_address(0)); } \
  extern "C" void __tsan_write##size(void* p) { emulated::note_access(p, size, true, __builtin_return_address(0)); } \
  extern "C" void __tsan_unaligned_read##size(void* p) {                                                        \
    emulated::note_access(p, size, false, __builtin_return_address(0));                                         \
  }                                                                                                             \
  extern "C" void __tsan_unaligned_write##size(void* p) {                                                       \
    emulated::note_access(p, size, true, __builtin_return_address(0));                                          \
  }
MIMO_ACCESS(1)
MIMO_ACCESS(2)
MIMO_ACCESS(4)
MIMO_ACCESS(8)
MIMO_ACCESS(16)
extern "C" void __tsan_read_range(void* p, unsigned long n) {
  emulated::note_access(p, n, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* p, unsigned long n) {
  emulated::note_access(p, n, true, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
