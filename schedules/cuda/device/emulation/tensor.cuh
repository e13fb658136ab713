// Tensor cores: where the elements of fragments are, and how sums of products are rounded.
//
// What follows is stated by the PTX ISA (fragments of mma.m16n8k16, .m16n8k32, wgmma and ldmatrix). Rounding is
// not: measurements on A100 and H100 (Fasi, Higham, Mikaitis and Pranesh, PeerJ CS 7:e330, 2021; Khattak and
// Mikaitis, arXiv 2512.07004, 2025) found exact products, aligned to the largest of a block of summands, cut
// off below its last bits, added, and cut off again; blocks of 8 on A100, of 16 on H100. Here nothing is kept
// below float32's 24 bits, which is at least as coarse; float8 on Hopper keeps 14.
#pragma once
#include "race.cuh"

namespace emulated {

// To nearest, ties to even, of a number with `fraction` bits behind the point and so many of exponent.
uint32_t rounded(double x, int fraction, int exponent_bits) {
  const uint32_t sign = std::signbit(x) ? 1u << (fraction + exponent_bits) : 0;
  const uint32_t infinity = ((1u << exponent_bits) - 1) << fraction;
  if (std::isnan(x)) return sign | infinity | 1u << (fraction - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double magnitude = std::fabs(x);
  if (std::isinf(x)) return sign | infinity;
  int exponent = magnitude ? std::ilogb(magnitude) : 1 - bias;
  if (exponent < 1 - bias) exponent = 1 - bias;
  const double units = std::nearbyint(std::ldexp(magnitude, fraction - exponent));
  // the leading 1 of `units` adds one to the exponent field, and so does a carry out of the fraction
  const uint64_t bits = (uint64_t(exponent + bias - 1) << fraction) + uint64_t(units);
  return sign | (bits > infinity ? infinity : uint32_t(bits));
}
uint32_t bf16_bits(double x) { return rounded(x, 7, 8); }
uint32_t f16_bits(double x) { return rounded(x, 10, 5); }
double f16_value(uint32_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  double x = exponent == 31 ? (fraction ? NAN : INFINITY)
             : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                            : std::ldexp(fraction, -24);
  return bits & 0x8000 ? -x : x;
}
double bf16_value(uint32_t bits) { return same_bits<float>(bits << 16); }

struct Place { int row, column; };

// Element `e` of lane's registers; `per` elements fit into one register of 32 bits (2 or 4).
Place place_a(int lane, int e, int per) {   // 16 rows, 8 * per columns: four registers
  const int reg = e / per, within = e % per;
  return {lane / 4 + 8 * (reg % 2), lane % 4 * per + within + 4 * per * (reg / 2)};
}
Place place_b(int lane, int e, int per) {   // 8 * per rows, 8 columns: two registers
  const int reg = e / per, within = e % per;
  return {lane % 4 * per + within + 4 * per * reg, lane / 4};
}
Place place_c(int lane, int e) {            // 16 rows, 8 columns for each four elements
  return {lane / 4 + 8 * (e / 2 % 2), 8 * (e / 4) + lane % 4 * 2 + e % 2};
}

double e4m3_value(uint32_t bits) {
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  const double x = (bits & 127) == 127 ? NAN
                   : exponent          ? std::ldexp(8 + fraction, exponent - 10)
                                       : std::ldexp(fraction, -9);
  return bits & 128 ? -x : x;
}

// Kinds of elements: how many a register holds, their value, and how products are added to an accumulator.
struct Bf16 {
  static constexpr int PER = 2, BITS = 24;
  using Sum = float;
  static double value(uint32_t reg, int i) { return bf16_value(reg >> 16 * i & 0xffff); }
};
struct F16 {
  static constexpr int PER = 2, BITS = 24;
  using Sum = float;
  static double value(uint32_t reg, int i) { return f16_value(reg >> 16 * i & 0xffff); }
};
struct E4m3 {
  static constexpr int PER = 4, BITS = 14;
  using Sum = float;
  static double value(uint32_t reg, int i) { return e4m3_value(reg >> 8 * i & 255); }
};
struct Int8 {
  static constexpr int PER = 4, BITS = 0;
  using Sum = int;
  static int value(uint32_t reg, int i) { return int8_t(reg >> 8 * i & 255); }
};

struct UInt8 {
  static int value(uint32_t reg, int i) { return reg >> 8 * i & 255; }
};

int exponent_of(double x) { return int(same_bits<uint64_t>(x) >> 52 & 2047) - 1023; }

// c + a block of products, all cut off below the last of `bits` bits of the largest.
float cut_sum(float c, const double* products, int count, int bits) {
  int top = c ? exponent_of(c) : -2000;
  double plain = c;
  for (int i = 0; i < count; ++i) {
    plain += products[i];
    if (products[i] != 0) top = std::max(top, exponent_of(products[i]));
  }
  if (top == -2000 || !std::isfinite(plain)) return float(plain);
  const double scale = std::ldexp(1.0, bits - 1 - top);
  int64_t sum = int64_t(c * scale);
  for (int i = 0; i < count; ++i) sum += int64_t(products[i] * scale);
  const double exact = double(sum) / scale;
  float out = float(exact);
  if (std::fabs(double(out)) > std::fabs(exact)) out = std::nextafter(out, 0.0f);
  return same_bits<float>(same_bits<uint32_t>(out) & ~0u << (24 - bits));   // the accumulator has no more, either
}

// c + sum of a[i] b[i], as an instruction of depth `depth` does it.
template <class T>
float dot(float c, const double* a, const double* b, int depth) {
  const int block = T::BITS < 24 ? depth : 8;
  double products[32];
  for (int from = 0; from < depth; from += block) {
    for (int i = 0; i < block; ++i) products[i] = a[from + i] * b[from + i];
    c = cut_sum(c, products, block, T::BITS);
  }
  return c;
}
template <class T>
int dot(int c, const int* a, const int* b, int depth) {
  uint32_t sum = uint32_t(c);   // sums that overflow wrap around
  for (int i = 0; i < depth; ++i) sum += uint32_t(a[i] * b[i]);
  return int(sum);
}

// One mma.sync of 16 x 8 outputs and 8 * T::PER in depth: c += a b. `Left` are the elements of a.
template <class T, class Left = T>
void product(Site site, void* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
  using Value = decltype(T::value(0, 0));
  using Sum = typename T::Sum;
  struct Mine { Sum* c; uint32_t a[4], b[2]; };
  Mine mine{static_cast<Sum*>(c), {a[0], a[1], a[2], a[3]}, {b0, b1}};
  meet(site, &mine, [](Warp&, void* const* given) {
    constexpr int DEPTH = 8 * T::PER;
    Value A[16][DEPTH], B[8][DEPTH];
    for (int lane = 0; lane < LANES; ++lane) {
      const Mine& m = *static_cast<Mine*>(given[lane]);
      for (int e = 0; e < 4 * T::PER; ++e) {
        const Place p = place_a(lane, e, T::PER);
        A[p.row][p.column] = Left::value(m.a[e / T::PER], e % T::PER);
      }
      for (int e = 0; e < 2 * T::PER; ++e) {
        const Place p = place_b(lane, e, T::PER);
        B[p.column][p.row] = T::value(m.b[e / T::PER], e % T::PER);
      }
    }
    for (int lane = 0; lane < LANES; ++lane) {
      Mine& m = *static_cast<Mine*>(given[lane]);
      for (int e = 0; e < 4; ++e) {
        const Place p = place_c(lane, e);
        m.c[e] = dot<T>(m.c[e], A[p.row], B[p.column], DEPTH);
      }
    }
  });
}
void mma(Kind kind, const char* name, int line, void* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
  const Site site = MIMO_HERE(name, line);
  if (kind == Kind::BF16) return product<Bf16>(site, c, a, b0, b1);
  if (kind == Kind::F16) return product<F16>(site, c, a, b0, b1);
  if (kind == Kind::E4M3) return product<E4m3>(site, c, a, b0, b1);
  if (kind == Kind::U8) return product<Int8, UInt8>(site, c, a, b0, b1);
  product<Int8>(site, c, a, b0, b1);
}

// Matrices of 8 x 8 16-bit elements: lane 8 i + r brings the address of row r of matrix i; register i of a lane
// gets two elements of matrix i, from row lane / 4, or, transposed, from column lane / 4.
void ldmatrix(const char* name, int line, int count, uint32_t* r, uint32_t address, bool transposed) {
  struct Mine { uint32_t* r; uint32_t address; int count; bool transposed; } mine{r, address, count, transposed};
  meet(MIMO_HERE(name, line), &mine, [](Warp& w, void* const* given) {
    for (int i = 0; i < static_cast<Mine*>(given[0])->count; ++i) {
      uint16_t matrix[8][8];
      for (int row = 0; row < 8; ++row) {
        const uint32_t from = static_cast<Mine*>(given[8 * i + row])->address;
        memcpy(matrix[row], shared_bytes(from, 16, 16, w.site.name), 16);
        note_read(w.thread[8 * i + row], w.site.name, from - WINDOW, 16);
      }
      for (int lane = 0; lane < LANES; ++lane) {
        Mine& to = *static_cast<Mine*>(given[lane]);
        const int fixed = lane / 4, first = lane % 4 * 2;
        const uint32_t low = to.transposed ? matrix[first][fixed] : matrix[fixed][first];
        const uint32_t high = to.transposed ? matrix[first + 1][fixed] : matrix[fixed][first + 1];
        to.r[i] = low | high << 16;
      }
    }
  });
}

// What is copied is read at once, but arrives in the wait that covers it; until then the target holds 0xFF.
void cp_async16(int line, uint32_t smem, const void* global, bool valid) {
  Thread& me = *running;
  me.site = {"cp_async16", line};
  uint8_t* to = shared_bytes(smem, 16, 16, "cp_async16");
  uint8_t data[16] = {};
  if (valid) {
    check_global(global, 16, false, "cp_async16");
    const uint8_t* from = static_cast<const uint8_t*>(global);
    note_device(*array_at(from), from - array_at(from)->base, 16, false, "cp_async16 reads");
    memcpy(data, global, 16);
  }
  Written by = by_thread(me);
  by.clock = UNDER_WAY;
  note_write(me, "cp_async16 writes", smem - WINDOW, 16, by);
  memset(to, NOTHING, 16);
  me.copied.insert(me.copied.end(), data, data + 16);
  me.targets.push_back(smem);
  ++me.open;
}
void cp_async_commit() {
  running->groups.push_back(running->open);
  running->open = 0;
}
void cp_async_wait(int line, int left) {
  Thread& me = *running;
  me.site = {"cp_async_wait", line};
  size_t arrived = 0;
  while (me.groups.size() > size_t(left)) {
    for (uint32_t i = 0; i < me.groups.front(); ++i, ++arrived) {
      const uint32_t target = me.targets[arrived];
      memcpy(shared_bytes(target, 16, 16, "cp_async16"), &me.copied[16 * arrived], 16);
      for (uint32_t b = target - WINDOW; b < target - WINDOW + 16; ++b)
        if (written[b].writer == me.index && written[b].clock == UNDER_WAY) written[b] = by_thread(me);
    }
    me.groups.erase(me.groups.begin());
  }
  me.copied.erase(me.copied.begin(), me.copied.begin() + 16 * arrived);
  me.targets.erase(me.targets.begin(), me.targets.begin() + arrived);
}

}  // namespace emulated
