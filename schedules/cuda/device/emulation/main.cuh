// The program around an emulated text: reads the arrays, runs the launches, writes the arrays back.
#pragma once
#include <initializer_list>
#include <utility>
#include "threads.cuh"

namespace emulated {

inline const char* folder;

// One operand of a launch.
struct Operand {
  enum Kind { POINTER, INTEGER, REAL, MAP } kind;
  uint8_t* pointer;
  int integer;
  float real;
  CUtensorMap map;
};
inline Operand pointer(int array) { return {Operand::POINTER, arrays[array].base, 0, 0, {}}; }
inline Operand integer(int value) { return {Operand::INTEGER, nullptr, value, 0, {}}; }
inline Operand real(float value) { return {Operand::REAL, nullptr, 0, value, {}}; }
inline Operand tensor_map(int array, int element_bytes, int rows, int columns, int box_rows, int box_columns,
                          int swizzle) {
  const Array& a = arrays[array];
  if (reinterpret_cast<uintptr_t>(a.base) % 16) fail("a tensor map of '%s', which is not aligned", a.name);
  return {Operand::MAP, nullptr, 0, 0,
          {a.base, rows, columns, element_bytes, box_rows, box_columns, swizzle}};
}

template <class T> T taken(const Operand& operand, int place) {
  static const char* const KINDS[] = {"a pointer", "an int32", "a float32", "a tensor map"};
  auto must_be = [&](Operand::Kind kind) {
    if (operand.kind != kind)
      fail("operand %d is %s, but the kernel's parameter is %s", place, KINDS[operand.kind], KINDS[kind]);
  };
  if constexpr (std::is_pointer_v<T>) {
    must_be(Operand::POINTER);
    return reinterpret_cast<T>(operand.pointer);
  } else if constexpr (std::is_same_v<T, CUtensorMap>) {
    must_be(Operand::MAP);
    return operand.map;
  } else if constexpr (std::is_same_v<T, float>) {
    must_be(Operand::REAL);
    return operand.real;
  } else {
    static_assert(std::is_integral_v<T> && sizeof(T) == 4,
                  "a parameter must be a pointer, an int32, a float or a tensor map");
    must_be(Operand::INTEGER);
    return T(operand.integer);
  }
}

template <class... P, size_t... I>
void call(void (*function)(P...), const Operand* operands, std::index_sequence<I...>) {
  function(taken<P>(operands[I], int(I))...);
}

template <auto function> struct Bound;   // a kernel with the operands of the launch under way
template <class... P, void (*function)(P...)> struct Bound<function> {
  static constexpr size_t count = sizeof...(P);
  static inline const Operand* operands;
  static void run() { call(function, operands, std::index_sequence_for<P...>{}); }
};

inline void run_block(uint3 index, int threads) {
  block_index = index;
  std::memset(shared.base, NOTHING, shared.bytes);
  for (auto start : at_block_start) start();
  run_threads(threads);
  for (auto end : at_block_end) end();
  if (!surroundings_hold(shared)) fail("wrote outside the %zu bytes of shared memory", shared.bytes);
}

template <auto function>
void launch(const char* symbol, uint3 grid, int threads, int shared_size,
            std::initializer_list<Operand> operands) {
  kernel = symbol;
  block_shape = {uint32_t(threads), 1, 1};
  grid_shape = grid;
  if (operands.size() != Bound<function>::count)
    fail("%zu operands, but the kernel has %zu parameters", operands.size(), Bound<function>::count);
  Bound<function>::operands = operands.begin();
  body = Bound<function>::run;
  shared = map_array("shared memory", size_t(shared_size), true, 1024);
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t b = order == 1 ? blocks - 1 - i : i;
    run_block({uint32_t(b % grid.x), uint32_t(b / grid.x % grid.y), uint32_t(b / grid.x / grid.y)}, threads);
  }
  munmap(shared.mapped, shared.whole);
  for (const Array& a : arrays)
    if (a.writable && !surroundings_hold(a)) fail("wrote around the end or the beginning of '%s'", a.name);
}

inline int open_file(const char* name, int flags) {
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

struct Given { const char* name; size_t bytes; bool writable; };

// Arguments: the folder, the order of warps and blocks, the placement of arrays.
inline void start(char** arguments, std::initializer_list<Given> given) {
  folder = arguments[1];
  order = strtoull(arguments[2], nullptr, 10);
  placement = atoi(arguments[3]);
  catch_signals();
  warps.resize(MOST_WARPS);
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

inline int finish() {
  const int file = open_file("results", O_WRONLY | O_CREAT | O_TRUNC);
  for (const Array& a : arrays)
    if (a.writable) move_all(file, a, [](int f, uint8_t* p, size_t n) { return write(f, p, n); });
  return close(file);
}

}  // namespace emulated
