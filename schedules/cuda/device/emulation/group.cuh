// Matrix products of a warp group: operands are read and sums appear as late as wgmma_wait allows. That they are
// there, and that no thread lacks a fence, must hold when a product is issued; they must then stay as they are.
//
// Each of the four warps computes its 16 rows by itself, when it waits; all four must issue the same products in
// the same order. Until a wait covers them, a product's sums are unreadable.
#pragma once
#include "bulk.cuh"
#include "registers.cuh"
#include "tensor.cuh"

namespace emulated {

// A product under way, as one warp issued it.
struct Product {
  uint64_t a, b;
  int accumulate, columns;
  void (*compute)(const Product&, Warp&, std::vector<uint32_t>& sums);
  size_t target;             // of the warp's targets
  uint32_t stamp;            // writes before it was issued
  const uint32_t* held[LANES];   // the registers of the left operand, if it is in any: b then lies across
  uint32_t left[LANES][4];       // what was in them
};
// Accumulators of one warp that a product under way writes: where each lane has them, and what they will hold.
struct Target {
  uint32_t* registers[LANES];
  int count, open;           // registers of a lane; products under way
  std::vector<uint32_t> sums;
};
struct Issued { uint64_t a, b; int accumulate, columns, line; bool held; };
struct WarpProducts {
  std::vector<Product> flight;
  std::vector<Target> targets;
  std::vector<size_t> groups;          // products of each committed group, oldest first
  size_t open = 0, issued = 0;         // of no group yet; since the block began
  bool fenced = false;
};
std::vector<WarpProducts> products(MOST_WARPS);
std::vector<Issued> history[MOST_WARPS / 4];   // what each warp group issued
constexpr uint32_t UNREADABLE = 0xFFA5A5A5;           // a NaN, and a very small integer

uint32_t field(uint64_t descriptor, int from) { return uint32_t(descriptor >> from & 0x3fff) << 4; }

// Byte of a cluster's shared memory where an operand of the running thread's block begins: a descriptor holds as much of
// it as a block's own window needs.
uint32_t begin_of(uint64_t d) {
  const uint32_t own = rank_now() * uint32_t(shared_step), at = field(d, 0) - WINDOW;
  return own + (at - own) % (1u << 18);
}

// Byte `k` (0..31) of row `r` of an operand: K-major, rows of 128 bytes, eight of them in 1024, swizzled.
uint32_t operand_at(uint64_t d, int r, int k) {
  return swizzled(begin_of(d) + uint32_t(r / 8) * field(d, 32) + uint32_t(r % 8) * 128 + k, 128) + WINDOW;
}

// Number (n, k) of 16 bits of an operand that lies across: MN-major, rows of 64 numbers, eight of them in 1024 bytes.
uint32_t across_at(uint64_t d, int n, int k) {
  const uint32_t from = begin_of(d) + uint32_t(n / 64) * field(d, 16) + uint32_t(k / 8) * field(d, 32);
  return swizzled(from + uint32_t(k % 8 * 128 + n % 64 * 2), 128) + WINDOW;
}

void check_across(uint64_t d, int columns) {
  const uint32_t start = begin_of(d);
  if (d >> 62 != 1) fail("wgmma: b is no descriptor of a matrix that is swizzled by 128 bytes");
  if (start % 1024) fail("wgmma: b, which lies across, begins at byte %u of shared memory, no multiple of 1024", start);
  if (field(d, 32) % 1024) fail("wgmma: 8 rows of b are %u bytes, no multiple of 1024", field(d, 32));
  if (columns > 64 && field(d, 16) % 1024)
    fail("wgmma: 64 columns of b are %u bytes behind the others, no multiple of 1024", field(d, 16));
  for (int n = 0; n < columns; n += 64) shared_bytes(across_at(d, n, 15) & ~127u, 128, 1, "b");
}

void check_descriptor(uint64_t d, int rows, const char* which) {
  const uint32_t start = begin_of(d);
  if (d >> 62 != 1) fail("wgmma: %s is no descriptor of a matrix that is swizzled by 128 bytes", which);
  if (start % 1024 >= 128 || start % 128 % 32)
    fail("wgmma: %s begins at byte %u of shared memory, %u behind a multiple of 1024: only steps of 32 along a row "
         "of 128 bytes are", which, start, start % 1024);
  if (field(d, 32) % 1024) fail("wgmma: 8 rows of %s are %u bytes, no multiple of 1024", which, field(d, 32));
  shared_bytes(operand_at(d, rows - 1, 0) & ~127u, 128, 1, which);
  shared_bytes(begin_of(d) + WINDOW, 16, 16, which);
}

// Does act(byte) for each 16 bytes of shared memory that a warp's product reads.
template <class Act> void for_operands(const Product& p, const Warp& warp, Act act) {
  for (int k = 0; p.held[0] && k < 16; ++k)
    for (int n = 0; n < p.columns; n += 8) act(across_at(p.b, n, k) - WINDOW);
  for (int k = 0; !p.held[0] && k < 32; k += 16) {
    for (int r = 0; r < 16; ++r) act(operand_at(p.a, int(16 * (warp.index % 4)) + r, k) - WINDOW);
    for (int n = 0; n < p.columns; ++n) act(operand_at(p.b, n, k) - WINDOW);
  }
}

void check_at_issue(const Product& p, const Warp& warp) {
  for_operands(p, warp, [&](uint32_t at) {
    note_read(warp.thread[0], "wgmma reads", at, 16);
    check_fenced("wgmma reads", at, 16);
  });
}

void check_at_completion(const Product& p, const Warp& warp) {
  for_operands(p, warp, [&](uint32_t at) {
    for (uint32_t b = at; b < at + 16; ++b)
      if (written[b].stamp > p.stamp)
        fail("byte %u of shared memory was written while a wgmma that reads it was under way", b);
    note_read(warp.thread[0], "wgmma reads", at, 16);
  });
  for (int lane = 0; p.held[0] && lane < LANES; ++lane)
    if (memcmp(p.held[lane], p.left[lane], sizeof p.left[lane]))
      fail("the left operand of wgmma was changed in lane %d while a product that reads it was under way", lane);
}

template <class T>
void compute_product(const Product& p, Warp& warp, std::vector<uint32_t>& sums) {
  using Value = decltype(T::value(0, 0));
  using Sum = typename T::Sum;
  constexpr int DEPTH = 8 * T::PER;
  auto read = [&](uint64_t d, int r, Value* to) {
    for (int k = 0; k < 32; k += 4) {
      uint32_t word;
      memcpy(&word, shared_bytes(operand_at(d, r, k), 4, 4, "wgmma"), 4);
      for (int i = 0; i < T::PER; ++i) to[k / 4 * T::PER + i] = T::value(word, i);
    }
  };
  static Value A[16][DEPTH], B[256][DEPTH];   // too large for the stack of a thread
  if (p.held[0]) {
    for (int lane = 0; lane < LANES; ++lane) {
      for (int e = 0; e < 4 * T::PER; ++e) {
        const Place at = place_a(lane, e, T::PER);
        A[at.row][at.column] = T::value(p.left[lane][e / T::PER], e % T::PER);
      }
    }
    for (int k = 0; k < DEPTH; ++k) {
      for (int n = 0; n < p.columns; ++n) {
        uint16_t bits;
        memcpy(&bits, shared_bytes(across_at(p.b, n, k), 2, 2, "wgmma"), 2);
        B[n][k] = T::value(bits, 0);
      }
    }
  } else {
    for (int r = 0; r < 16; ++r) read(p.a, int(16 * (warp.index % 4)) + r, A[r]);
    for (int n = 0; n < p.columns; ++n) read(p.b, n, B[n]);
  }
  const int count = p.columns / 2;
  for (int lane = 0; lane < LANES; ++lane) {
    for (int e = 0; e < count; ++e) {
      const Place at = place_c(lane, e);
      uint32_t& bits = sums[lane * count + e];
      const Sum c = p.accumulate ? same_bits<Sum>(bits) : Sum(0);
      bits = same_bits<uint32_t>(dot<T>(c, A[at.row], B[at.column], DEPTH));
    }
  }
}

void check_untouched(const Target& t) {
  for (int lane = 0; lane < LANES; ++lane)
    for (int e = 0; e < t.count; ++e)
      if (t.registers[lane][e] != UNREADABLE)
        fail("accumulator %d of wgmma was changed while a product that writes it was under way", e);
}

size_t target_of(WarpProducts& w, uint32_t* const* registers, int count) {
  for (size_t i = 0; i < w.targets.size(); ++i) {
    Target& t = w.targets[i];
    if (t.registers[0] != registers[0]) continue;
    check_untouched(t);
    return i;
  }
  Target t{{}, count, 0, std::vector<uint32_t>(size_t(LANES) * count)};
  for (int lane = 0; lane < LANES; ++lane) {
    t.registers[lane] = registers[lane];
    for (int e = 0; e < count; ++e) {
      t.sums[lane * count + e] = registers[lane][e];
      registers[lane][e] = UNREADABLE;
    }
  }
  w.targets.push_back(t);
  return w.targets.size() - 1;
}

void issue(Kind kind, const char* name, int line, int columns, void* sums, uint64_t a, uint64_t b, int accumulate,
           const uint32_t* held) {
  using Compute = void (*)(const Product&, Warp&, std::vector<uint32_t>&);
  static const Compute COMPUTE[] = {compute_product<Bf16>, compute_product<F16>, compute_product<E4m3>,
                                    compute_product<Int8>};
  struct Mine { uint32_t* registers; uint64_t a, b; int accumulate, columns; Compute compute; const uint32_t* held; };
  Mine mine{static_cast<uint32_t*>(sums), a, b, accumulate != 0, columns, COMPUTE[int(kind)], held};
  if (int(running->index / 128 + 1) * 4 > warp_count)
    fail("wgmma by warps of a group that has less than four: the block has %d", warp_count);
  meet(MIMO_HERE(name, line), &mine, [](Warp& warp, void* const* given) {
    const Mine& first = *static_cast<Mine*>(given[0]);
    const int columns = first.columns;
    uint32_t* registers[LANES];
    Product made{first.a, first.b, first.accumulate, columns, first.compute, 0, 0, {}, {}};
    for (int lane = 0; lane < LANES; ++lane) {
      const Mine& m = *static_cast<Mine*>(given[lane]);
      if (m.a != first.a || m.b != first.b || m.accumulate != first.accumulate)
        fail("wgmma: lanes 0 and %d of warp %u bring different operands", lane, warp.index);
      registers[lane] = m.registers;
      if ((made.held[lane] = m.held)) memcpy(made.left[lane], m.held, sizeof made.left[lane]);
    }
    WarpProducts& w = products[warp.index];
    if (!w.fenced) fail("wgmma without a wgmma_fence behind what its accumulators last went through");
    if (first.held) {
      check_across(first.b, columns);
    } else {
      check_descriptor(first.a, 64, "a");
      check_descriptor(first.b, columns, "b");
    }
    const Issued one{first.a, first.b, first.accumulate, columns, warp.site.line, first.held != nullptr};
    std::vector<Issued>& all = history[warp.index / 4];
    if (w.issued == all.size()) all.push_back(one);
    const Issued& other = all[w.issued++];
    if (one.a != other.a || one.b != other.b || one.accumulate != other.accumulate || one.columns != other.columns ||
        one.held != other.held)
      fail("warp %u issues a wgmma (line %d) that differs from its group's (line %d)", warp.index, one.line,
           other.line);
    made.target = target_of(w, registers, columns / 2);
    made.stamp = last_stamp;
    ++w.targets[made.target].open;
    w.flight.push_back(made);
    check_at_issue(w.flight.back(), warp);
    ++w.open;
  });
}

// Computes the oldest product of a warp; what no other product writes gets its sums.
void complete_oldest(WarpProducts& w, Warp& warp) {
  const Product p = w.flight.front();
  w.flight.erase(w.flight.begin());
  Target& t = w.targets[p.target];
  check_at_completion(p, warp);
  p.compute(p, warp, t.sums);
  if (--t.open) return;
  check_untouched(t);
  for (int lane = 0; lane < LANES; ++lane)
    memcpy(t.registers[lane], &t.sums[size_t(lane) * t.count], size_t(t.count) * 4);
  w.targets.erase(w.targets.begin() + p.target);
  for (Product& left : w.flight)
    if (left.target > p.target) --left.target;
}

void fence_products(int line) {
  meet(MIMO_HERE("wgmma_fence", line), nullptr, [](Warp& warp, void* const*) { products[warp.index].fenced = true; });
}
void commit_products(int line) {
  meet(MIMO_HERE("wgmma_commit", line), nullptr, [](Warp& warp, void* const*) {
    WarpProducts& w = products[warp.index];
    w.groups.push_back(w.open);
    w.open = 0;
  });
}
void wait_for_products(int line, int left) {
  meet(MIMO_HERE("wgmma_wait", line), &left, [](Warp& warp, void* const* given) {
    WarpProducts& w = products[warp.index];
    while (w.groups.size() > size_t(*static_cast<int*>(given[0]))) {
      if (w.groups.front()) w.fenced = false;
      for (size_t i = w.groups.front(); i--;) complete_oldest(w, warp);
      w.groups.erase(w.groups.begin());
    }
    Thread& reader = warp.thread[0];   // as which operands are read: all lanes know that they have been
    warp.clock.of[reader.index] = reader.time++;
  });
}

void begin_products() {
  for (WarpProducts& w : products) w = {};
  for (auto& h : history) h.clear();
}
void end_products() {
  for (int i = 0; i < warp_count; ++i) {
    if (!products[i].flight.empty()) fail("warp %d ended before its wgmma did: wgmma_wait comes first", i);
    if (products[i].issued != history[i / 4].size())
      fail("warp %d issued %zu wgmma, another of its group %zu", i, products[i].issued, history[i / 4].size());
  }
}
}  // namespace emulated
