// What the device headers call in the emulator. The text of a kernel is compiled with these declarations alone;
// what is behind them is compiled once (runtime.cuh). `line` is that of the text.
#pragma once
#include "words.cuh"

// A tensor map as the emulator holds it; the device's is opaque.
struct alignas(64) CUtensorMap {
  const uint8_t* base;
  int rows, columns, element_bytes, box_rows, box_columns, swizzle;
};

namespace emulated {

enum class Kind { BF16, F16, E4M3, I8, U8 };   // of the elements of matrices; U8: of the left one, beside I8

[[noreturn]] void fail(const char* format, ...);

// Where the running thread is: the same each time it asks.
__attribute__((const)) uint32_t thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) uint3 block_shape();
__attribute__((const)) uint3 grid_shape();
__attribute__((const)) uint8_t* shared_base();

uint32_t shared_address(const void* pointer);
void check_constant(const void* pointer, size_t bytes, const char* what);
uint32_t atomic_add(uint32_t* p, uint32_t x);
float atomic_add(float* p, float x);
void fence_device();

uint32_t exchange(const char* name, int line, uint32_t bits, int from);
uint32_t ballot(int line, bool value);
void warp_sync(int line);
void wait_at_barrier(const char* name, int line, int id, int threads);
void wait_for_cluster(int line);

uint32_t bf16_bits(double x);
uint32_t f16_bits(double x);
double f16_value(uint32_t bits);
double bf16_value(uint32_t bits);

void mma(Kind kind, const char* name, int line, void* c, const uint32_t* a, uint32_t b0, uint32_t b1);
void ldmatrix(const char* name, int line, int count, uint32_t* r, uint32_t address, bool transposed);

void cp_async16(int line, uint32_t smem, const void* global, bool valid);
void cp_async_commit();
void cp_async_wait(int line, int left);

void begin_barrier(int line, uint64_t* barrier, int arrivals);
void arrive_at(const char* name, int line, uint64_t* barrier, int bytes);
void arrive_in(const char* name, int line, uint64_t* barrier, int rank);
void wait_for_phase(int line, uint64_t* barrier, int parity);
void fence_barriers();
void fence_proxy();
void load_box(int line, void* smem, const CUtensorMap& map, int column, int row, uint64_t* barrier);
void load_boxes(int line, void* smem, const CUtensorMap& map, int column, int row, uint64_t* barrier, uint32_t blocks);
void set_registers(const char* name, int line, int count, bool more);

void fence_products(int line);
void commit_products(int line);
void wait_for_products(int line, int left);
void issue(Kind kind, const char* name, int line, int columns, void* sums, uint64_t a, uint64_t b, int accumulate,
           const uint32_t* held = nullptr);

}  // namespace emulated

#define threadIdx (uint3{emulated::thread_index(), 0, 0})
#define blockIdx (emulated::block_index())
#define blockDim (emulated::block_shape())
#define gridDim (emulated::grid_shape())
#define MIMO_SITE_PARAMETER , int line = __builtin_LINE()
#define MIMO_SITE __func__, line
