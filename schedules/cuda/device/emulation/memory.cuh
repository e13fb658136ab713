// Memory of the emulated device: arrays between forbidden pages, one block's shared memory, and errors.
#pragma once
#include <algorithm>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <fcntl.h>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>
#include "launch.cuh"

namespace emulated {

constexpr size_t PAGE = 4096, GUARD = size_t(16) << 20;
constexpr uint32_t WINDOW = 1024;  // where shared memory begins in its own addresses: 0 is no address
constexpr uint8_t NOTHING = 0xFF;  // a NaN in all float formats

struct Array {
  const char* name;
  uint8_t* base;      // of the data
  size_t bytes;
  bool writable;
  uint8_t* mapped;    // of everything, forbidden pages included
  size_t whole;
};
std::vector<Array> arrays;
Array shared{"shared memory", nullptr, 0, true, nullptr, 0};   // of all blocks of a cluster, one behind the other
size_t shared_each, shared_step;   // bytes of one block's; from one block's to the next
uint8_t *stacks, *stacks_end;
int placement;        // 0: the end of an array meets a forbidden page; 1: its beginning
const char* kernel = "";
uint3 block{};
const void* access_pc;   // where the plain access that is looked at returns to

int describe_thread(char* to, size_t room);  // where the running thread is; see threads.cuh
uint32_t rank_now();                         // of its block within a cluster

// Ends the emulation; the text goes to standard error as one line.
void fail(const char* format, ...) {
  char text[1600];
  int at = snprintf(text, sizeof text, "%s, block (%u, %u, %u)", kernel, block.x + rank_now(), block.y, block.z);
  at += describe_thread(text + at, sizeof text - at);
  at += snprintf(text + at, sizeof text - at, ": ");
  va_list values;
  va_start(values, format);
  at += vsnprintf(text + at, sizeof text - at, format, values);
  va_end(values);
  if (at > int(sizeof text) - 2) at = sizeof text - 2;
  text[at++] = '\n';
  if (write(2, text, at) != at) _exit(5);
  _exit(4);
}

// Maps room for an array between forbidden pages; alignment is that of its beginning where its end is free.
Array map_array(const char* name, size_t bytes, bool writable, size_t alignment) {
  Array a{name, nullptr, bytes, writable, nullptr, 0};
  const size_t room = (bytes + alignment - 1) / alignment * alignment;
  const size_t pages = (room + PAGE - 1) / PAGE * PAGE + (room ? 0 : PAGE);
  a.whole = pages + 2 * GUARD;
  void* at = mmap(nullptr, a.whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) fail("no memory for %s (%zu bytes)", name, bytes);
  a.mapped = static_cast<uint8_t*>(at);
  if (mprotect(a.mapped + GUARD, pages, PROT_READ | PROT_WRITE)) fail("no memory for %s", name);
  memset(a.mapped + GUARD, NOTHING, pages);
  a.base = a.mapped + GUARD + (placement == 0 ? pages - room : 0);
  return a;
}

const Array* array_at(const uint8_t* p) {   // whose data or surroundings hold an address
  static size_t last = 0;
  if (p >= shared.mapped && p < shared.mapped + shared.whole) return &shared;
  for (size_t i = 0; i < arrays.size(); ++i, ++last) {
    if (last >= arrays.size()) last = 0;
    const Array& a = arrays[last];
    if (p >= a.mapped && p < a.mapped + a.whole) return &a;
  }
  return nullptr;
}

// Names the array that an address belongs to or is next to, and how it lies to it.
void place_of(const uint8_t* p, char* to, size_t room) {
  const Array* found = array_at(p);
  if (!found)
    snprintf(to, room, "address %p, which belongs to no array", static_cast<const void*>(p));
  else if (p < found->base)
    snprintf(to, room, "%td bytes before '%s'", found->base - p, found->name);
  else if (p >= found->base + found->bytes)
    snprintf(to, room, "%td bytes behind the end of '%s' (%zu bytes)",
             p - found->base - ptrdiff_t(found->bytes), found->name, found->bytes);
  else
    snprintf(to, room, "byte %td of '%s'", p - found->base, found->name);
}

// Fails unless all bytes of an access to device memory lie in one array and it is aligned.
void check_global(const void* pointer, size_t bytes, bool writes, const char* what) {
  const uint8_t* p = static_cast<const uint8_t*>(pointer);
  char place[300];
  const Array* a = array_at(p);
  if (a && a != &shared && p >= a->base && p + bytes <= a->base + a->bytes) {
    if (reinterpret_cast<uintptr_t>(p) % bytes) {
      place_of(p, place, sizeof place);
      fail("%s of %zu bytes is not aligned to them: %s", what, bytes, place);
    }
    if (writes && !a->writable) fail("%s writes '%s', which is an input", what, a->name);
    return;
  }
  place_of(p, place, sizeof place);
  fail("%s of %zu bytes is not inside an array: it begins %s", what, bytes, place);
}

uint8_t* shared_base() { return shared.base + rank_now() * shared_step; }

// Address in the window of a cluster's shared memory -> address of the host; the bytes must be one block's, and aligned.
uint8_t* shared_bytes(uint32_t address, size_t bytes, size_t alignment, const char* what) {
  const size_t at = size_t(address) - WINDOW;
  if (address < WINDOW || at >= shared.bytes || at % shared_step + bytes > shared_each)
    fail("%s of %zu bytes at byte %lld of shared memory, which has %zu", what, bytes,
         static_cast<long long>(address) - WINDOW - static_cast<long long>(rank_now() * shared_step), shared_each);
  if (at % alignment)
    fail("%s at byte %zu of shared memory, which is no multiple of %zu", what, at % shared_step, alignment);
  return shared.base + at;
}

uint32_t shared_address(const void* pointer) {
  const uint8_t *p = static_cast<const uint8_t*>(pointer), *own = shared_base();
  if (p < own || p > own + shared_each) {
    char place[300];
    place_of(p, place, sizeof place);
    fail("smem_address of what is not in shared memory: %s", place);
  }
  return uint32_t(p - shared.base) + WINDOW;
}

void on_signal(int number, siginfo_t* info, void*) {
  char place[300];
  const uint8_t* at = static_cast<const uint8_t*>(info->si_addr);
  place_of(at, place, sizeof place);
  if (number == SIGSEGV && at >= stacks && at < stacks_end) fail("the stack of a thread is full");
  if (number == SIGSEGV || number == SIGBUS) fail("an access at %s", place);
  if (number == SIGFPE) fail("a division of integers by zero");
  access_pc = at;
  fail("an access that is not aligned, or an index outside a local array");
}

void catch_signals() {
  static uint8_t stack[1 << 16];
  stack_t other{};
  other.ss_sp = stack;
  other.ss_size = sizeof stack;
  sigaltstack(&other, nullptr);
  struct sigaction action{};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP}) sigaction(number, &action, nullptr);
}

}  // namespace emulated
