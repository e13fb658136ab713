// Launches as the `main` of an emulated text makes them: operands become a kernel's parameters.
#pragma once
#include <initializer_list>
#include <utility>
#include "calls.cuh"

namespace emulated {

// One operand of a launch.
struct Operand {
  enum Type { POINTER, INTEGER, REAL, MAP } type;
  uint8_t* pointer;
  int integer;
  float real;
  CUtensorMap map;
};
Operand pointer(int array);
Operand integer(int value);
Operand real(float value);
Operand tensor_map(int array, int element_bytes, int rows, int columns, int box_rows, int box_columns, int swizzle);

struct Given { const char* name; size_t bytes; bool writable; };

// Reads the arrays from the folder that the arguments name; they also give the order of warps and blocks and
// the placement of arrays.
void start(char** arguments, std::initializer_list<Given> given);
void run_grid(uint3 grid, int threads, int shared_size, int cluster, void (*body)());
// Writes the arrays back; returns the program's exit code.
int finish();
void enter(const char* symbol);

template <class T> T taken(const Operand& operand, int place) {
  static const char* const NAMES[] = {"a pointer", "an int32", "a float32", "a tensor map"};
  auto must_be = [&](Operand::Type type) {
    if (operand.type != type)
      fail("operand %d is %s, but the kernel's parameter is %s", place, NAMES[operand.type], NAMES[type]);
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

template <auto function>
void launch(const char* symbol, uint3 grid, int threads, int shared_size, int cluster,
            std::initializer_list<Operand> operands) {
  enter(symbol);
  if (operands.size() != Bound<function>::count)
    fail("%zu operands, but the kernel has %zu parameters", operands.size(), Bound<function>::count);
  Bound<function>::operands = operands.begin();
  run_grid(grid, threads, shared_size, cluster, Bound<function>::run);
}

}  // namespace emulated
