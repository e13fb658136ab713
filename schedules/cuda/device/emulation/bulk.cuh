// Barriers with phases, and copies of boxes that arrive as late as they may.
#pragma once
#include "race.cuh"

namespace emulated {

struct PhaseBarrier {
  uint32_t address;
  int arrivals, missing;     // of a phase; of the present one
  int64_t bytes;             // announced and not arrived; less than 0: arrived and not announced
  uint32_t parity;           // of the present phase
  bool fenced;
  std::vector<Thread*> waiting;
  Clock arrived, ended;      // what its arrivals and copies knew; as of the last phase that ended
};
struct Box {
  CUtensorMap map;
  int column, row;
  uint32_t target, barrier, clock;
  Site site;
};
std::vector<PhaseBarrier> phase_barriers;
std::vector<Box> boxes;   // on their way
constexpr uint64_t MARK = 0x6d62617272696572;   // what a barrier's own bytes hold, so that a stray write is found

// Bits of the 16-byte chunk within an address that a swizzle of so many bytes turns by the bits of its row.
uint32_t swizzled(uint32_t address, int swizzle) {
  const uint32_t rows = swizzle / 16 ? swizzle / 16 - 1 : 0;   // 128: 7, 64: 3, 32: 1, 0: 0
  return address ^ ((address >> 7 & rows) << 4);
}

PhaseBarrier& barrier_at(uint32_t address) {
  uint64_t mark;
  memcpy(&mark, shared_bytes(address, 8, 8, "a barrier"), 8);
  for (PhaseBarrier& b : phase_barriers) {
    if (b.address != address) continue;
    if (mark != MARK) fail("the barrier at byte %u of shared memory was overwritten", address - WINDOW);
    return b;
  }
  fail("there is no barrier at byte %u of shared memory: mbarrier_init comes first", address - WINDOW);
}

// Which block's an address is, and the same place in another block of the cluster, which must not have ended.
int rank_at(uint32_t address) { return int((address - WINDOW) / shared_step); }
uint32_t address_in(uint32_t address, int rank, const char* what) {
  if (rank < 0 || rank >= warp_count / block_warps)
    fail("%s for block %d of a cluster of %d", what, rank, warp_count / block_warps);
  if (!live_of[rank])
    fail("%s for a block of the cluster that has ended: the others' cluster_sync comes first", what);
  return address + uint32_t(rank - int(rank_now())) * uint32_t(shared_step);
}

void begin_barrier(int line, uint64_t* barrier, int arrivals) {
  running->site = {"mbarrier_init", line};
  const uint32_t address = shared_address(barrier);
  if (arrivals < 1 || arrivals >= 1 << 20) fail("mbarrier_init of %d arrivals", arrivals);
  memcpy(shared_bytes(address, 8, 8, "mbarrier_init"), &MARK, 8);
  for (const PhaseBarrier& b : phase_barriers)
    if (b.address == address) fail("a second mbarrier_init at byte %u of shared memory", address - WINDOW);
  phase_barriers.push_back({address, arrivals, arrivals, 0, 0, false, {}, {}, {}});
}

void end_phase_if_complete(PhaseBarrier& b) {
  if (b.missing || b.bytes) return;
  b.missing = b.arrivals;
  b.parity ^= 1;
  b.ended = b.arrived;
  for (Thread* t : b.waiting) make_ready(*t->warp, 1u << (t->index % LANES));
  b.waiting.clear();
}

void arrive(const char* name, uint32_t address, int bytes) {
  if (bytes < 0 || bytes >= 1 << 20) fail("%s of %d bytes", name, bytes);
  PhaseBarrier& b = barrier_at(address);
  if (!b.missing)
    fail("more than %d arrivals at the barrier at byte %u in one phase", b.arrivals, b.address - WINDOW);
  Thread& me = *running;
  b.arrived.join(me.warp->clock);
  b.arrived.of[me.index] = std::max(b.arrived.of[me.index], me.time++);
  --b.missing;
  b.bytes += bytes;
  end_phase_if_complete(b);
}
void arrive_at(const char* name, int line, uint64_t* barrier, int bytes) {
  running->site = {name, line};
  arrive(name, shared_address(barrier), bytes);
}
void arrive_in(const char* name, int line, uint64_t* barrier, int rank) {
  running->site = {name, line};
  arrive(name, address_in(shared_address(barrier), rank, name), 0);
}

void wait_for_phase(int line, uint64_t* barrier, int parity) {
  running->site = {"mbarrier_wait", line};
  if (parity & ~1) fail("mbarrier_wait for the parity %d", parity);
  const uint32_t address = shared_address(barrier);
  for (;;) {
    PhaseBarrier& b = barrier_at(address);
    if (b.parity != uint32_t(parity)) return running->warp->clock.join(b.ended);
    b.waiting.push_back(running);
    running->barrier = int64_t(address - WINDOW) << 1 | parity;
    park();
    running->barrier = -1;
  }
}

// The box's place is unreadable until it has arrived.
void begin_box(Site site, uint32_t target, const CUtensorMap& map, int column, int row, uint32_t address) {
  const size_t bytes = size_t(map.box_rows) * map.box_columns * map.element_bytes;
  if (!barrier_at(address).fenced)
    fail("tma_load with a barrier that no fence_barrier_init follows");
  uint8_t* to = shared_bytes(target, bytes, map.swizzle == 128 ? 1024 : 128, site.name);
  check_fenced("tma_load writes", target - WINDOW, uint32_t(bytes));
  memset(to, NOTHING, bytes);
  note_write(*running, "tma_load writes", target - WINDOW, uint32_t(bytes), by_bulk_copy());
  boxes.push_back({map, column, row, target, address, bulk_clock, site});
}

void load_box(int line, void* smem, const CUtensorMap& map, int column, int row, uint64_t* barrier) {
  running->site = {"tma_load", line};
  begin_box(running->site, shared_address(smem), map, column, row, shared_address(barrier));
}
void load_boxes(int line, void* smem, const CUtensorMap& map, int column, int row, uint64_t* barrier, uint32_t blocks) {
  const Site site = running->site = {"tma_load_multicast", line};
  if (!blocks) fail("tma_load_multicast to no block");
  for (int rank = 0; blocks >> rank; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    const uint32_t target = address_in(shared_address(smem), rank, site.name);
    begin_box(site, target, map, column, row, address_in(shared_address(barrier), rank, site.name));
  }
}

// Lets one box arrive: the oldest, the newest, or any.
bool deliver_box() {
  if (boxes.empty()) return false;
  const size_t which = order == 0 ? 0 : order == 1 ? boxes.size() - 1 : drawn() % boxes.size();
  const Box box = boxes[which];
  boxes.erase(boxes.begin() + which);
  if (!live_of[rank_at(box.target)])
    fail("the box of %s (line %d) comes to a block of the cluster that has ended", box.site.name, box.site.line);
  const CUtensorMap& m = box.map;
  const int row_bytes = m.box_columns * m.element_bytes;
  for (int r = 0; r < m.box_rows; ++r) {
    for (int c = 0; c < m.box_columns; ++c) {
      const int64_t row = int64_t(box.row) + r, column = int64_t(box.column) + c;
      const bool inside = row >= 0 && row < m.rows && column >= 0 && column < m.columns;
      const uint32_t at = box.target + r * row_bytes + c * m.element_bytes;
      uint8_t* to = shared.base + (swizzled(at - WINDOW, m.swizzle));
      if (inside)
        memcpy(to, m.base + (row * m.columns + column) * m.element_bytes, m.element_bytes);
      else
        memset(to, 0, m.element_bytes);
    }
  }
  PhaseBarrier& b = barrier_at(box.barrier);
  b.bytes -= int64_t(row_bytes) * m.box_rows;
  b.arrived.of[MOST_THREADS] = std::max(b.arrived.of[MOST_THREADS], box.clock);
  end_phase_if_complete(b);
  return true;
}

void begin_bulk() { phase_barriers.clear(), boxes.clear(); }
void end_bulk() {
  if (!boxes.empty())
    fail("a block ended while the box of %s (line %d) was on its way", boxes[0].site.name, boxes[0].site.line);
  for (const PhaseBarrier& b : phase_barriers)
    if (b.bytes)
      fail("a block ended with %lld bytes still expected at the barrier at byte %u (less than 0: never announced)",
           static_cast<long long>(b.bytes), b.address - WINDOW);
}
void fence_barriers() {
  for (PhaseBarrier& b : phase_barriers) b.fenced |= rank_at(b.address) == int(rank_now());
}
void fence_proxy() { ++running->fences; }

}  // namespace emulated
