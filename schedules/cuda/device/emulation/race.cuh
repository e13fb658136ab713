// Every plain access of a kernel, as the compiler's instrumentation for threads reports it (-fsanitize=thread, with
// the functions below in the place of its library): it must lie inside an array, and it must be ordered to those of
// other threads.
//
// Order is kept by vector clocks: of each thread's time, and that of bulk copies, what each warp knows. Barriers,
// arrivals at phases and waits for them pass clocks on; the lanes of a warp know of each other what they did before
// a warp_sync or a barrier, and the arrival of one lane tells no more of the others. Two accesses of one byte by two
// threads, one of them a write, of which neither is known to the other's warp, are a race; so are in device memory
// those of two blocks of a launch, unless the later one called device_fence.
// Reads of shared memory are kept by words of four bytes and the last lane of each warp alone, those of device memory
// by words and the last reader, so that some races are missed.
#pragma once
#include "threads.cuh"

namespace emulated {

constexpr uint32_t BULK = 0xFFFF, UNDER_WAY = ~0u;
constexpr size_t MOST_TRACKED = size_t(16) << 20;   // bytes; larger arrays in device memory are not
struct Written {
  uint32_t clock;       // of the writer, or of bulk copies; UNDER_WAY: cp.async that nobody waited for
  uint32_t block;       // all blocks are counted from 1
  uint16_t writer;      // thread, or BULK
  uint16_t fences;      // how often the writer had fenced for the asynchronous proxy
  uint32_t stamp;       // how many writes there had been, of all
};
struct Read {           // of shared memory
  uint32_t clock[MOST_WARPS];
  uint8_t lane[MOST_WARPS];
};
struct Seen {           // of device memory
  uint32_t clock, block, reader;
  uint32_t constant;    // block that last read it by a load of what nobody writes
};
std::vector<Written> written;                       // for each byte of shared memory
std::vector<Read> read_of;                          // for each four
struct Tracked { std::vector<Written> written; std::vector<Seen> seen; };
std::vector<Tracked> tracked;                       // arrays; empty where nothing writes
uint32_t block_now, launch_began;                   // blocks up to `launch_began` are of earlier launches
uint32_t last_stamp;
bool block_fenced;                                  // whether a thread of this block called device_fence

void begin_launch() {
  launch_began = block_now;
  tracked.resize(arrays.size());
  for (size_t i = 0; i < arrays.size(); ++i) {
    const size_t bytes = arrays[i].writable && arrays[i].bytes <= MOST_TRACKED ? arrays[i].bytes : 0;
    tracked[i].written.resize(bytes), tracked[i].seen.resize((bytes + 3) / 4);
  }
  if (written.size() < shared.bytes) written.resize(shared.bytes), read_of.resize(shared.bytes / 4 + 1);
}

void begin_races() {
  ++block_now;
  block_fenced = false;
  uint32_t latest = bulk_clock;
  for (const Warp& w : warps)
    for (const Thread& t : w.thread) latest = std::max(latest, t.time);
  for (Warp& w : warps) {   // what earlier blocks did in shared memory is known to all
    for (uint32_t& c : w.clock.of) c = latest;
    for (Thread& t : w.thread) t.time = latest + 1;
  }
  bulk_clock = latest + 1;
}

[[noreturn]] void race(const char* what, uint32_t byte, const char* where, const char* other_did, uint32_t other,
                       uint32_t of_block, bool under_way = false) {
  char who[80];
  if (other == BULK)
    snprintf(who, sizeof who, "a bulk copy");
  else
    snprintf(who, sizeof who, "thread %u%s", within_block(other),
             of_block == block_now && other / (block_warps * LANES) == rank_now() ? "" : " of another block");
  if (under_way) fail("%s byte %u of %s before the wait for the cp_async16 of %s", what, byte, where, who);
  fail("a race: %s byte %u of %s, which %s %s with no barrier between", what, byte, where, who, other_did);
}

// Says whether a write is known to a thread: done by itself, or before something that its warp waited for.
bool knows(const Thread& t, const Written& w, bool device) {
  if (w.block != block_now) return !device || w.block <= launch_began || block_fenced;
  if (w.clock == UNDER_WAY) return false;
  return w.writer == t.index || w.clock <= t.warp->clock.of[w.writer == BULK ? MOST_THREADS : w.writer];
}

Written by_thread(const Thread& t) {
  return {t.time, block_now, uint16_t(t.index), t.fences, ++last_stamp};
}
Written by_bulk_copy() { return {++bulk_clock, block_now, BULK, 0, ++last_stamp}; }

void note_read(const Thread& t, const char* what, uint32_t at, uint32_t bytes) {
  for (uint32_t b = at; b < at + bytes; ++b)
    if (!knows(t, written[b], false))
      race(what, uint32_t(b % shared_step), shared.name, "wrote", written[b].writer, block_now, written[b].clock == UNDER_WAY);
  for (uint32_t word = at / 4; word <= (at + bytes - 1) / 4; ++word) {
    Read& r = read_of[word];
    r.clock[t.warp->index] = t.time, r.lane[t.warp->index] = uint8_t(t.index % LANES);
  }
}

void note_write(const Thread& t, const char* what, uint32_t at, uint32_t bytes, const Written& by) {
  for (uint32_t word = at / 4; word <= (at + bytes - 1) / 4; ++word) {
    const Read& r = read_of[word];
    for (int w = 0; w < warp_count; ++w) {
      const uint32_t reader = w * LANES + r.lane[w];
      if (reader != t.index && r.clock[w] > t.warp->clock.of[reader])
        race(what, uint32_t(word * 4 % shared_step), shared.name, "read", reader, block_now);
    }
  }
  for (uint32_t b = at; b < at + bytes; ++b) {
    const Written& w = written[b];
    const bool same_warp = w.writer != BULK && w.writer / LANES == t.warp->index;  // lanes may write one value
    if (!same_warp && !knows(t, w, false))
      race(what, uint32_t(b % shared_step), shared.name, "wrote", w.writer, block_now);
    written[b] = by;
  }
}

// Fails where a thread wrote one of so many bytes itself, and did not fence for the asynchronous proxy since.
void check_fenced(const char* what, uint32_t at, uint32_t bytes) {
  for (uint32_t b = at; b < at + bytes; ++b) {
    const Written& w = written[b];
    if (w.writer == BULK || w.block != block_now) continue;
    if (warps[w.writer / LANES].thread[w.writer % LANES].fences == w.fences)
      fail("%s byte %u of shared memory, which thread %u wrote without a fence_async_proxy behind", what,
           uint32_t(b % shared_step), within_block(w.writer));
  }
}

// The same in device memory, where blocks of a launch may not meet, either.
void note_device(const Array& a, size_t at, size_t bytes, bool writes, const char* what) {
  Tracked& own = tracked[&a - arrays.data()];
  if (own.written.empty()) return;
  const Thread& t = *running;
  const Warp& mine = *t.warp;
  for (size_t word = at / 4; word <= (at + bytes - 1) / 4; ++word) {
    Seen& s = own.seen[word];
    const bool known = s.block != block_now ? s.block <= launch_began || block_fenced
                                            : s.reader == t.index || s.clock <= mine.clock.of[s.reader];
    if (writes && s.constant > launch_began)
      fail("writes byte %zu of '%s', which ld_global_nc, load8 or load16 read in the same launch", at, a.name);
    if (writes && !known) race(what, uint32_t(word * 4), a.name, "read", s.reader, s.block);
    if (!writes) s = {t.time, block_now, t.index, s.constant};
  }
  for (size_t b = at; b < at + bytes; ++b) {
    Written& w = own.written[b];
    const bool same_warp = writes && w.block == block_now && w.writer / LANES == mine.index;
    if (!same_warp && !knows(t, w, true)) race(what, uint32_t(b), a.name, "wrote", w.writer, w.block);
    if (writes) w = by_thread(t);
  }
}

void check_constant(const void* pointer, size_t bytes, const char* what) {
  check_global(pointer, bytes, false, what);
  const uint8_t* p = static_cast<const uint8_t*>(pointer);
  const Array& a = *array_at(p);
  Tracked& all = tracked[&a - arrays.data()];
  const std::vector<Written>& own = all.written;
  for (size_t b = p - a.base; !own.empty() && b < p - a.base + bytes; ++b)
    if (own[b].block > launch_began)
      fail("%s of byte %zu of '%s', which thread %u wrote in the same launch: it may see what was there before", what, b,
           a.name, own[b].writer);
  for (size_t b = p - a.base; !own.empty() && b < p - a.base + bytes; b += 4) all.seen[b / 4].constant = block_now;
}

// A plain access of the running thread.
void note_access(const void* pointer, size_t bytes, bool writes, const void* pc) {
  const uint8_t* p = static_cast<const uint8_t*>(pointer);
  if (p >= stacks && p < stacks_end) return;
  const Array* a = array_at(p);
  if (!a || !running) return;   // constants of the program
  access_pc = pc;
  const bool outside = a == &shared ? p < shared_base() || p + bytes > shared_base() + shared_each
                                    : p < a->base || p + bytes > a->base + a->bytes;
  if (outside || (writes && !a->writable)) {
    char place[300];
    place_of(p, place, sizeof place);
    fail("%s %zu bytes at %s%s", writes ? "writes" : "reads", bytes, place,
         writes && !a->writable ? ", which is an input" : "");
  }
  const size_t at = p - a->base;
  if (a != &shared)
    note_device(*a, at, bytes, writes, writes ? "writes" : "reads");
  else if (writes)
    note_write(*running, "writes", uint32_t(at), uint32_t(bytes), by_thread(*running));
  else
    note_read(*running, "reads", uint32_t(at), uint32_t(bytes));
  access_pc = nullptr;
}

void fence_device() { block_fenced = true; }
template <class T> T added(T* p, T x) {
  check_global(p, sizeof(T), true, "atomic_add");
  const T old = *p;
  *p = old + x;
  return old;
}
uint32_t atomic_add(uint32_t* p, uint32_t x) { return added(p, x); }
float atomic_add(float* p, float x) { return added(p, x); }

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
// clang's
extern "C" void* __tsan_memcpy(void* to, const void* from, unsigned long n) {
  emulated::note_access(from, n, false, __builtin_return_address(0));
  emulated::note_access(to, n, true, __builtin_return_address(0));
  return memcpy(to, from, n);
}
extern "C" void* __tsan_memset(void* to, int value, unsigned long n) {
  emulated::note_access(to, n, true, __builtin_return_address(0));
  return memset(to, value, n);
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void* back) {
  if (emulated::running) emulated::running->calls.push_back(back);
}
extern "C" void __tsan_func_exit() {
  if (emulated::running) emulated::running->calls.pop_back();
}
