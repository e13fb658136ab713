"""Blocks of GGUF's types, written element by element with Python integers; and their exact values."""

import random
import struct
from fractions import Fraction


def half(number):
    """Return bytes and exact value of a float16."""
    raw = struct.pack("<e", number)
    return raw, Fraction(struct.unpack("<e", raw)[0])


class Bits:
    """Bytes whose bits are set one field at a time; a field may be set once."""

    def __init__(self, size):
        self.value, self.taken, self.size = 0, 0, size

    def put(self, byte, shift, bits, number):
        at, mask = 8 * byte + shift, (1 << bits) - 1
        assert 0 <= number <= mask and not self.taken >> at & mask
        self.value |= number << at
        self.taken |= mask << at

    def bytes(self):
        return self.value.to_bytes(self.size, "little")


def simple(bits, high, offset):
    """Q4_0, Q4_1, Q5_0, Q5_1: 32 codes, low nibbles first; fifth bits in a word of their own."""

    def make(rng):
        (d, scale), (m, least) = half(rng.uniform(-0.1, 0.1)), half(rng.uniform(-0.5, 0.5))
        codes = [rng.randrange(1 << bits) for _ in range(32)]
        word, body = Bits(4), Bits(16)
        for j, code in enumerate(codes):
            body.put(j % 16, 4 * (j // 16), 4, code & 15)
            if high:
                word.put(j // 8, j % 8, 1, code >> 4)
        raw = d + (m if offset else b"") + (word.bytes() if high else b"") + body.bytes()
        if offset:
            return raw, [scale * c + least for c in codes], abs(least)
        return raw, [scale * (c - (1 << (bits - 1))) for c in codes], 0

    return make


def q8_0(rng):
    d, scale = half(rng.uniform(-0.1, 0.1))
    codes = [rng.randrange(-128, 128) for _ in range(32)]
    return d + struct.pack("<32b", *codes), [scale * c for c in codes], 0


def q2_k(rng):
    (d, scale), (m, least) = half(rng.uniform(-0.1, 0.1)), half(rng.uniform(-0.1, 0.1))
    pairs = [(rng.randrange(16), rng.randrange(16)) for _ in range(16)]
    pairs[3] = (0, 5)  # a group of equal weights
    codes, body = [rng.randrange(4) for _ in range(256)], Bits(64)
    for e, code in enumerate(codes):
        h, j, lane = e // 128, e % 128 // 32, e % 32
        body.put(32 * h + lane, 2 * j, 2, code)
    raw = bytes(s | t << 4 for s, t in pairs) + body.bytes() + d + m
    values = [
        scale * pairs[e // 16][0] * c - least * pairs[e // 16][1] for e, c in enumerate(codes)
    ]
    return raw, values, abs(least) * 15


def q3_k(rng):
    d, scale = half(rng.uniform(-0.1, 0.1))
    factors, codes = [rng.randrange(64) for _ in range(16)], [rng.randrange(8) for _ in range(256)]
    mask, body, scales = Bits(32), Bits(64), Bits(12)
    for e, code in enumerate(codes):
        h, j, lane = e // 128, e % 128 // 32, e % 32
        body.put(32 * h + lane, 2 * j, 2, code & 3)
        mask.put(lane, 4 * h + j, 1, code >> 2)
    for i, factor in enumerate(factors):
        scales.put(i % 8, 4 * (i // 8), 4, factor & 15)
        scales.put(8 + i % 4, 2 * (i // 4), 2, factor >> 4)
    raw = mask.bytes() + body.bytes() + scales.bytes() + d
    return raw, [scale * (factors[e // 16] - 32) * (c - 4) for e, c in enumerate(codes)], 0


def scales_6(pairs):
    """Return the 12 bytes of 8 scales and minimums of 6 bits."""
    out = Bits(12)
    for j, (scale, least) in enumerate(pairs):
        if j < 4:
            out.put(j, 0, 6, scale)
            out.put(j + 4, 0, 6, least)
        else:
            out.put(j + 4, 0, 4, scale & 15)
            out.put(j + 4, 4, 4, least & 15)
            out.put(j - 4, 6, 2, scale >> 4)
            out.put(j, 6, 2, least >> 4)
    return out.bytes()


def q45_k(bits):
    def make(rng):
        (d, scale), (m, least) = half(rng.uniform(-0.01, 0.01)), half(rng.uniform(-0.01, 0.01))
        pairs = [(rng.randrange(64), rng.randrange(64)) for _ in range(8)]
        pairs[5] = (0, 7)
        codes = [rng.randrange(1 << bits) for _ in range(256)]
        high, body = Bits(32), Bits(128)
        for e, code in enumerate(codes):
            body.put(32 * (e // 64) + e % 32, 4 * (e % 64 // 32), 4, code & 15)
            if bits == 5:
                high.put(e % 32, e // 32, 1, code >> 4)
        raw = d + m + scales_6(pairs) + (high.bytes() if bits == 5 else b"") + body.bytes()
        each = enumerate(codes)
        values = [scale * pairs[e // 32][0] * c - least * pairs[e // 32][1] for e, c in each]
        return raw, values, abs(least) * 63

    return make


def q6_k(rng):
    d, scale = half(rng.uniform(-0.01, 0.01))
    factors, codes = (
        [rng.randrange(-128, 128) for _ in range(16)],
        [rng.randrange(64) for _ in range(256)],
    )
    low, high = Bits(128), Bits(64)
    for e, code in enumerate(codes):
        h, quarter, lane = e // 128, e % 128 // 32, e % 32
        low.put(64 * h + 32 * (quarter % 2) + lane, 4 * (quarter // 2), 4, code & 15)
        high.put(32 * h + lane, 2 * quarter, 2, code >> 4)
    raw = low.bytes() + high.bytes() + struct.pack("<16b", *factors) + d
    return raw, [scale * factors[e // 16] * (c - 32) for e, c in enumerate(codes)], 0


def trit_byte(trits):
    """Return the byte of up to five ternary digits, the first the most significant."""
    value = 0
    for t in [*trits, 0, 0, 0, 0][:5]:
        value = 3 * value + t
    return -(-value * 256 // 243)


def tq1_0(rng):
    d, scale = half(rng.uniform(0.001, 0.1))
    codes = [rng.randrange(3) for _ in range(256)]
    raw = [trit_byte([codes[m + 32 * n] for n in range(5)]) for m in range(32)]
    raw += [trit_byte([codes[160 + m + 16 * n] for n in range(5)]) for m in range(16)]
    raw += [trit_byte([codes[240 + j + 4 * n] for n in range(4)]) for j in range(4)]
    return bytes(raw) + d, [scale * (c - 1) for c in codes], 0


def tq2_0(rng):
    d, scale = half(rng.uniform(0.001, 0.1))
    codes, body = [rng.randrange(3) for _ in range(256)], Bits(64)
    for e, code in enumerate(codes):
        body.put(32 * (e // 128) + e % 32, 2 * (e % 128 // 32), 2, code)
    return body.bytes() + d, [scale * (c - 1) for c in codes], 0


TYPES = {
    "Q4_0": (2, 32, simple(4, False, False)), "Q4_1": (3, 32, simple(4, False, True)),
    "Q5_0": (6, 32, simple(5, True, False)), "Q5_1": (7, 32, simple(5, True, True)),
    "Q8_0": (8, 32, q8_0), "Q2_K": (10, 256, q2_k), "Q3_K": (11, 256, q3_k),
    "Q4_K": (12, 256, q45_k(4)), "Q5_K": (13, 256, q45_k(5)), "Q6_K": (14, 256, q6_k),
    "TQ1_0": (34, 256, tq1_0), "TQ2_0": (35, 256, tq2_0),
}  # fmt: skip
"""Name -> number, columns of a block, writer: rng -> bytes, exact values, largest minimum."""


def matrix(kind, n, k, seed):
    """Return number and bytes of rows of random blocks, their exact values, the largest minimum.

    Rows are drawn from a few different ones, as exact numbers take their time.
    """
    number, columns, make = TYPES[kind]
    rng = random.Random(seed)
    rows, values, least = [], [], Fraction(0)
    for _ in range(min(n, 24)):
        parts = [make(rng) for _ in range(k // columns)]
        rows.append(b"".join(p[0] for p in parts))
        values.append([v for p in parts for v in p[1]])
        least = max([least, *(Fraction(p[2]) for p in parts)])
    picked = [*range(len(rows)), *(rng.randrange(len(rows)) for _ in range(n - len(rows)))]
    rng.shuffle(picked)
    return number, [rows[i] for i in picked], [values[i] for i in picked], least
