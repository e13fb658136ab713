// Everything behind calls.cuh and launch.cuh; compiled once, without the instrumentation of kernels.
#include "bulk.cuh"
#include "group.cuh"

namespace emulated {

const char* folder;

Operand pointer(int array) { return {Operand::POINTER, arrays[array].base, 0, 0, {}}; }
Operand integer(int value) { return {Operand::INTEGER, nullptr, value, 0, {}}; }
Operand real(float value) { return {Operand::REAL, nullptr, 0, value, {}}; }
Operand tensor_map(int array, int element_bytes, int rows, int columns, int box_rows, int box_columns, int swizzle) {
  return {Operand::MAP, nullptr, 0, 0,
          {arrays[array].base, rows, columns, element_bytes, box_rows, box_columns, swizzle}};
}

void enter(const char* symbol) { kernel = symbol; }

// Says whether the bytes around an array's data, up to the forbidden pages, are as they were.
bool surroundings_hold(const Array& a) {
  const uint8_t *from = a.mapped + GUARD, *to = a.mapped + a.whole - GUARD;
  for (const uint8_t* p = from; p < a.base; ++p)
    if (*p != NOTHING) return false;
  for (const uint8_t* p = a.base + a.bytes; p < to; ++p)
    if (*p != NOTHING) return false;
  return true;
}

// `first` is the block of rank 0.
void run_cluster(uint3 first, int blocks, int threads) {
  block = first;
  memset(shared.base, NOTHING, shared.bytes);
  begin_races(), begin_bulk(), begin_products(), begin_registers(threads);
  run_threads(threads, blocks);
  end_bulk(), end_products(), end_registers();
  if (!surroundings_hold(shared)) fail("wrote outside the %zu bytes of shared memory", shared_each);
}

void run_grid(uint3 grid, int threads, int shared_size, int cluster, void (*run)()) {
  block_extent = {uint32_t(threads), 1, 1};
  grid_extent = grid;
  body = run;
  if (cluster > 1 && (threads % 128 || cluster * threads > MOST_THREADS))
    fail("clusters of %d blocks of %d threads are not emulated, only whole groups of 128, and %d in all", cluster,
         threads, MOST_THREADS);
  shared_each = size_t(shared_size);
  shared_step = cluster > 1 ? (shared_each + 1023) / 1024 * 1024 : shared_each;
  shared = map_array("shared memory", cluster * shared_step, true, 1024);
  begin_launch();
  const uint32_t across = grid.x / cluster;
  const uint64_t clusters = uint64_t(across) * grid.y * grid.z;
  for (uint64_t i = 0; i < clusters; ++i) {
    const uint64_t c = order == 1 ? clusters - 1 - i : i;
    const uint3 first = {uint32_t(c % across) * cluster, uint32_t(c / across % grid.y), uint32_t(c / across / grid.y)};
    run_cluster(first, cluster, threads);
  }
  munmap(shared.mapped, shared.whole);
  for (const Array& a : arrays)
    if (a.writable && !surroundings_hold(a)) fail("wrote around the end or the beginning of '%s'", a.name);
}

int open_file(const char* name, int flags) {
  const std::string path = std::string(folder) + "/" + name;
  const int file = open(path.c_str(), flags, 0600);
  if (file < 0) fail("cannot open %s", path.c_str());
  return file;
}

template <class Move> void move_all(int file, const Array& a, Move move) {
  for (size_t at = 0; at < a.bytes;) {
    const ssize_t n = move(file, a.base + at, a.bytes - at);
    if (n <= 0) fail("cannot read or write the file of '%s'", a.name);
    at += size_t(n);
  }
}

void start(char** arguments, std::initializer_list<Given> given) {
  folder = arguments[1];
  order = strtoull(arguments[2], nullptr, 10);
  placement = atoi(arguments[3]);
  catch_signals();
  warps.resize(MOST_WARPS);
  for (int i = 0; i < MOST_WARPS; ++i) warps[i].index = i;
  map_stacks();
  const int file = open_file("memory", O_RDONLY);
  for (const Given& g : given) {
    arrays.push_back(map_array(g.name, g.bytes, g.writable, 16));
    const Array& a = arrays.back();
    move_all(file, a, [](int f, uint8_t* p, size_t n) { return read(f, p, n); });
    if (!a.writable) mprotect(a.mapped + GUARD, a.whole - 2 * GUARD, PROT_READ);
  }
  close(file);
}

int finish() {
  const int file = open_file("results", O_WRONLY | O_CREAT | O_TRUNC);
  for (const Array& a : arrays)
    if (a.writable) move_all(file, a, [](int f, uint8_t* p, size_t n) { return write(f, p, n); });
  return close(file);
}

}  // namespace emulated
