// Registers that warps give back to their block's pool and take from it (setmaxnreg).
//
// A block begins with as many for each thread as an SM can give it, and with nothing in the pool; the compiler may
// give it less. All four warps of a group must ask for the same, one after the other. Who asks for more than the pool
// has waits until others give back: for ever, where nobody does.
#pragma once
#include "threads.cuh"

namespace emulated {

constexpr int SM_REGISTERS = 65536, MOST_REGISTERS = 255;
struct Asked { int count, line; bool more; };
struct Registers {
  int each;           // of a thread
  size_t asked;       // how often the warp has asked
};
Registers registers_of[MOST_WARPS];
std::vector<Asked> asked_by[MOST_WARPS / 4];   // what each warp group asked for
std::vector<Thread*> short_of_registers;
int pools[MOST_CLUSTER];   // of each block

bool takes(Warp& w, int count) {
  int& each = registers_of[w.index].each;
  const int more = (count - each) * LANES;
  int& pool = pools[rank_of(w)];
  if (more > pool) return false;
  if (more > 0) pool -= more, each = count;
  return true;
}

void give_back(Warp& w, int count) {
  int& each = registers_of[w.index].each;
  if (count > each) fail("registers_decrease to %d by a warp whose threads have %d", count, each);
  pools[rank_of(w)] += (each - count) * LANES;
  each = count;
  for (Thread* t : short_of_registers) make_ready(*t->warp, 1u << (t->index % LANES));
  short_of_registers.clear();
}

void set_registers(const char* name, int line, int count, bool more) {
  if (int(running->index / 128 + 1) * 4 > warp_count)
    fail("%s by warps of a group that has less than four: the block has %d", name, warp_count);
  Asked mine{count, line, more};
  meet(MIMO_HERE(name, line), &mine, [](Warp& w, void* const* given) {
    const Asked& one = *static_cast<Asked*>(given[0]);
    std::vector<Asked>& all = asked_by[w.index / 4];
    size_t& asked = registers_of[w.index].asked;
    if (asked == all.size()) all.push_back(one);
    const Asked& other = all[asked++];
    if (one.count != other.count || one.line != other.line || one.more != other.more)
      fail("warp %u comes to %s (line %d), another of its group to a change of registers in line %d", w.index,
           w.site.name, one.line, other.line);
    if (!one.more) give_back(w, one.count);
  });
  while (more && !takes(*running->warp, count)) {
    short_of_registers.push_back(running);
    park();
  }
}

void begin_registers(int threads) {
  const int each = std::min(MOST_REGISTERS, SM_REGISTERS / threads) / 8 * 8;
  for (Registers& r : registers_of) r = {each, 0};
  for (auto& asked : asked_by) asked.clear();
  short_of_registers.clear();
  std::fill_n(pools, MOST_CLUSTER, 0);
}

void end_registers() {
  for (int w = 0; w < warp_count; ++w)
    if (registers_of[w].asked != asked_by[w / 4].size())
      fail("warp %d changed its registers %zu times, another of its group %zu times", w, registers_of[w].asked,
           asked_by[w / 4].size());
}

}  // namespace emulated
