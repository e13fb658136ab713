// The threads of one block as fibers, the warps that they form, and the barriers between them.
//
// A thread runs until it waits. Which warp goes on then is a parameter: the first that can (order 0), the
// last (1), or any (a seed). So warps run as far ahead of each other as the program lets them, in either
// direction, and what only a barrier would have kept apart goes wrong; the lanes of a warp take turns the same way.
// Asynchronous work is done when no
// thread can go on: as late as possible.
#pragma once
#include "memory.cuh"

extern "C" const char __executable_start;   // of the linker

namespace emulated {

constexpr int LANES = 32, MOST_WARPS = 32, MOST_THREADS = LANES * MOST_WARPS, BARRIERS = 16;
constexpr int MOST_CLUSTER = 8, ALL = BARRIERS;   // the barrier of all blocks of a cluster
constexpr size_t STACK = 128 << 10;

// Where a thread waits: the word of the device headers that it called, the line of the text, and the calls that
// it came by: the same line is two places for the lanes of a warp where a branch led to each.
struct Site {
  const char* name;
  int line;
  uint64_t path;
  bool operator==(const Site& other) const {
    return line == other.line && path == other.path && !strcmp(name, other.name);
  }
};

int warp_count, block_warps;   // of all blocks of a cluster, of one

// What a warp knows of threads' time: accesses up to these are ordered before what it does next.
struct Clock {
  uint32_t of[MOST_THREADS + 1];   // the last: bulk copies
  void join(const Clock& other) {
    for (int i = 0; i < warp_count * LANES; ++i) of[i] = std::max(of[i], other.of[i]);
    of[MOST_THREADS] = std::max(of[MOST_THREADS], other.of[MOST_THREADS]);
  }
};

struct Warp;
struct Thread {
  void* top;              // of the stack where it stopped
  uint32_t index;
  Warp* warp;
  Site site{"its beginning", 0};
  bool ended;
  uint32_t time;                    // passes with each arrival, and when its warp meets for memory's sake
  std::vector<const void*> calls;   // that it is in, by where they return to
  uint16_t fences;                  // fence_async_proxy that it did
  int64_t barrier;                  // byte of shared memory and parity (lowest bit) that it waits for, or -1
  std::vector<uint8_t> copied;      // cp.async: data that has not arrived, 16 bytes each
  std::vector<uint32_t> targets;    // and where it goes
  std::vector<uint32_t> groups;     // copies of each committed group, oldest first
  uint32_t open;                    // copies of no group yet
};
struct Warp {
  uint32_t index, alive, ready, arrived;
  int barrier;            // that its arrived lanes wait for, or -1
  int barrier_threads;
  Site site;
  Clock clock;
  void* given[LANES];     // what each lane brought to the meeting
  Thread thread[LANES];
};
struct NamedBarrier { uint32_t warps; int threads; };

std::vector<Warp> warps;
NamedBarrier barriers[MOST_CLUSTER][BARRIERS + 1];   // of each block; all have the last one of the first
uint32_t ready_warps;
int live, live_of[MOST_CLUSTER];   // threads that have not ended, of each block
uint64_t order;
Thread* running;
void* main_top;
uint3 block_extent, grid_extent;
void (*body)();
uint32_t bulk_clock;
bool deliver_box();   // lets one bulk copy arrive; false: there is none, see bulk.cuh

uint32_t rank_of(const Warp& w) { return w.index / block_warps; }
uint32_t rank_now() { return running ? rank_of(*running->warp) : 0; }
uint32_t within_block(uint32_t thread) { return thread % (block_warps * LANES); }
uint32_t thread_index() { return within_block(running->index); }

int describe_thread(char* to, size_t room) {
  if (!running) return 0;
  if (access_pc)   // as addr2line takes it
    return snprintf(to, room, ", thread %u at 0x%tx", thread_index(),
                    static_cast<const char*>(access_pc) - &__executable_start);
  return snprintf(to, room, ", thread %u, at or after %s (line %d)", thread_index(), running->site.name,
                  running->site.line);
}

// Saves the running stack in *from and goes on with the stack `to` (callee-saved registers alone).
extern "C" void mimo_switch(void** from, void* to);
#if !defined(__x86_64__)
#error "the emulator switches between threads in x86-64 code"
#endif
asm(R"(
.text
.globl mimo_switch
.type mimo_switch, @function
mimo_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mimo_switch, .-mimo_switch
)");

void make_ready(Warp& w, uint32_t lanes) {
  w.ready |= lanes;
  if (w.ready) ready_warps |= 1u << w.index;
}

uint32_t drawn() {  // xorshift: any order will do
  order ^= order << 13, order ^= order >> 7, order ^= order << 17;
  return uint32_t(order >> 32);
}

// What tells the blocks of a cluster apart.
const char* of_block(uint32_t thread) {
  static char text[MOST_CLUSTER][40];
  const uint32_t rank = thread / (block_warps * LANES);
  if (block_warps == warp_count) return "";
  snprintf(text[rank], sizeof text[rank], " of block %u", block.x + rank);
  return text[rank];
}

// Ends the emulation with one line for all threads, those that wait at one place together.
[[noreturn]] inline void deadlock() {
  std::string text;
  running = nullptr;
  const int count = warp_count * LANES;
  auto at = [](int i) -> const Thread& { return warps[i / LANES].thread[i % LANES]; };
  for (int from = 0, to; from < count; from = to) {
    const Thread& first = at(from);
    for (to = from + 1; to < count && within_block(to); ++to)
      if (at(to).ended != first.ended || !(first.ended || (at(to).site == first.site && at(to).barrier == first.barrier))) break;
    char line[300];
    if (first.ended)
      snprintf(line, sizeof line, "%sthreads %d-%d%s have ended", from ? "; " : "", within_block(from),
               within_block(to - 1), of_block(from));
    else
      snprintf(line, sizeof line, "%sthreads %d-%d%s wait at %s (line %d)", from ? "; " : "", within_block(from),
               within_block(to - 1), of_block(from), first.site.name, first.site.line);
    if (!first.ended && first.barrier >= 0)
      snprintf(line + strlen(line), 80, " for the end of parity %d of the barrier at byte %lld",
               int(first.barrier & 1), static_cast<long long>((first.barrier >> 1) % shared_step));
    if (text.size() < 1000) text += line;
  }
  fail("deadlock: %s", text.c_str());
}

int one_of(uint32_t set) {   // whose turn it is
  if (order == 1) return 31 - __builtin_clz(set);
  if (order > 1)
    for (int skip = drawn() % __builtin_popcount(set); skip--;) set &= set - 1;
  return __builtin_ctz(set);
}

Thread* choose() {
  while (!ready_warps)
    if (!deliver_box()) deadlock();
  Warp& warp = warps[one_of(ready_warps)];
  const int lane = one_of(warp.ready);
  warp.ready &= ~(1u << lane);
  if (!warp.ready) ready_warps &= ~(1u << warp.index);
  return &warp.thread[lane];
}

// Lets others run until somebody makes the running thread ready.
void park() {
  Thread* me = running;
  Thread* to = choose();
  running = to;
  if (to != me) mimo_switch(&me->top, to->top);
}

// The place of a word that returns to `back`.
Site site_of(const char* name, int line, const void* back) {
  uint64_t path = reinterpret_cast<uintptr_t>(back);
  for (const void* call : running->calls) path = path * 0x9E3779B97F4A7C15 + reinterpret_cast<uintptr_t>(call);
  return {name, line, path};
}
#define MIMO_HERE(name, line) emulated::site_of(name, line, __builtin_return_address(0))

void check_same_site(Warp& w, Site site) {
  if (!w.arrived) w.site = site;
  if (w.site == site) return;
  const int lane = __builtin_ctz(w.arrived);
  const bool same_line = w.site.line == site.line && !strcmp(w.site.name, site.name);
  fail("the threads of a warp diverged: thread %u waits at %s (line %d), thread %u comes to %s (line %d)%s",
       within_block(w.thread[lane].index), w.site.name, w.site.line, thread_index(), site.name, site.line,
       same_line ? " by another branch" : "");
}

// All 32 lanes of a warp meet; the last to come does the work for all: act(warp, what each brought).
template <class Act> void meet(Site site, void* mine, Act act) {
  Thread& me = *running;
  Warp& w = *me.warp;
  me.site = site;
  check_same_site(w, site);
  const uint32_t bit = 1u << (me.index % LANES);
  w.given[me.index % LANES] = mine;
  w.arrived |= bit;
  if (w.arrived != ~0u) return park();
  act(w, w.given);
  w.arrived = 0;
  make_ready(w, ~bit);
}

// The lanes of a warp met for memory's sake: each knows what the others did.
void join_lanes(Warp& w) {
  for (Thread& t : w.thread) w.clock.of[t.index] = t.time++;
}

// Lets the warps of a barrier go when as many threads have come as it counts; 0: all that have not ended.
void settle(uint32_t rank, int id) {
  NamedBarrier& b = barriers[rank][id];
  if (!b.warps) return;
  const int first = int(rank) * block_warps, last = id == ALL ? warp_count : first + block_warps;
  int come = 0, expected = b.threads;
  for (int w = first; w < last; ++w) {
    if (b.warps >> w & 1) come += b.threads ? LANES : __builtin_popcount(warps[w].alive);
    if (!b.threads) expected += __builtin_popcount(warps[w].alive);
  }
  if (come < expected) return;
  Clock all{};
  for (int w = first; w < last; ++w)
    if (b.warps >> w & 1) join_lanes(warps[w]), all.join(warps[w].clock);
  for (int w = first; w < last; ++w) {
    if (!(b.warps >> w & 1)) continue;
    warps[w].clock.join(all);
    make_ready(warps[w], warps[w].arrived);
    warps[w].arrived = 0;
    warps[w].barrier = -1;
  }
  b.warps = 0;
}

// The warp's lanes that have not ended have all come: the warp has.
void arrive(Warp& w) {
  if (w.barrier < 0 || !w.alive || w.arrived != w.alive) return;
  const uint32_t rank = w.barrier == ALL ? 0 : rank_of(w);
  NamedBarrier& b = barriers[rank][w.barrier];
  if (b.warps && b.threads != w.barrier_threads)
    fail("barrier %d is waited for by %d threads in one place and by %d in another", w.barrier, b.threads,
         w.barrier_threads);
  b.threads = w.barrier_threads;
  b.warps |= 1u << w.index;
  settle(rank, w.barrier);
}

void come_to(Site site, int id, int threads) {
  Thread& me = *running;
  Warp& w = *me.warp;
  me.site = site;
  check_same_site(w, site);
  if (w.arrived && (w.barrier != id || w.barrier_threads != threads))
    fail("the threads of a warp come to %s (line %d) with different barriers", site.name, site.line);
  w.barrier = id;
  w.barrier_threads = threads;
  w.arrived |= 1u << (me.index % LANES);
  arrive(w);
  park();
}

void wait_at_barrier(const char* name, int line, int id, int threads) {
  const Site site = MIMO_HERE(name, line);
  running->site = site;
  if (id < 0 || id >= BARRIERS) fail("%s of barrier %d, not 1..15", name, id);
  if (threads % LANES || threads > block_warps * LANES)
    fail("%s of %d threads in a block of %d", name, threads, block_warps * LANES);
  come_to(site, id, threads);
}
void wait_for_cluster(int line) { come_to(MIMO_HERE("cluster_sync", line), ALL, 0); }

void end_thread() {
  Thread& me = *running;
  Warp& w = *me.warp;
  const uint32_t rank = rank_of(w);
  me.ended = true;
  w.alive &= ~(1u << (me.index % LANES));
  --live, --live_of[rank];
  arrive(w);
  if (!barriers[rank][0].threads) settle(rank, 0);
  settle(0, ALL);
  Thread* to = live ? choose() : nullptr;
  running = to;
  mimo_switch(&me.top, to ? to->top : main_top);
  abort();
}

// Maps a stack for each thread that a block may have, each above a forbidden page.
void map_stacks() {
  const size_t whole = STACK * LANES * MOST_WARPS;
  void* at = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) fail("no memory for stacks");
  stacks = static_cast<uint8_t*>(at);
  stacks_end = stacks + whole;
  for (int i = 0; i < LANES * MOST_WARPS; ++i) mprotect(stacks + i * STACK, PAGE, PROT_NONE);
}

void begin_thread() {
  body();
  end_thread();
}

// Runs all threads of the blocks of a cluster to their ends.
void run_threads(int threads, int blocks) {
  block_warps = threads / LANES, warp_count = blocks * block_warps;
  live = blocks * threads;
  std::fill_n(live_of, blocks, threads);
  ready_warps = 0;
  memset(barriers, 0, sizeof barriers);
  for (int i = 0; i < warp_count; ++i) {
    Warp& w = warps[i];
    w.index = i, w.alive = ~0u, w.ready = 0, w.arrived = 0, w.barrier = -1;
    make_ready(w, ~0u);
    for (int lane = 0; lane < LANES; ++lane) {
      Thread& t = w.thread[lane];
      t.index = i * LANES + lane, t.warp = &w, t.ended = false, t.fences = 0, t.barrier = -1, t.site = {"its beginning", 0}, t.calls.clear();
      t.copied.clear(), t.targets.clear(), t.groups.clear(), t.open = 0;
      void** top = reinterpret_cast<void**>(stacks + STACK * (t.index + 1));
      *--top = nullptr;                                       // nowhere to return to
      *--top = reinterpret_cast<void*>(&begin_thread);
      for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
      t.top = top;
    }
  }
  running = choose();
  mimo_switch(&main_top, running->top);
  running = nullptr;
}

uint3 block_index() { return {block.x + rank_now(), block.y, block.z}; }
uint3 block_shape() { return block_extent; }
uint3 grid_shape() { return grid_extent; }

uint32_t exchange(const char* name, int line, uint32_t bits, int from) {
  struct Mine { uint32_t value, result; int from; } mine{bits, 0, from};
  if (from < 0 || from >= LANES) fail("%s from lane %d", name, from);
  meet(MIMO_HERE(name, line), &mine, [](Warp&, void* const* given) {
    for (int lane = 0; lane < LANES; ++lane) {
      Mine& to = *static_cast<Mine*>(given[lane]);
      to.result = static_cast<Mine*>(given[to.from])->value;
    }
  });
  return mine.result;
}

uint32_t ballot(int line, bool value) {
  struct Mine { bool value; uint32_t result; } mine{value, 0};
  meet(MIMO_HERE("warp_ballot", line), &mine, [](Warp&, void* const* given) {
    uint32_t all = 0;
    for (int lane = 0; lane < LANES; ++lane) all |= uint32_t(static_cast<Mine*>(given[lane])->value) << lane;
    for (int lane = 0; lane < LANES; ++lane) static_cast<Mine*>(given[lane])->result = all;
  });
  return mine.result;
}

void warp_sync(int line) {
  meet(MIMO_HERE("warp_sync", line), nullptr, [](Warp& w, void* const*) { join_lanes(w); });
}

}  // namespace emulated
