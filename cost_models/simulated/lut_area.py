"""Area of lookup units by counting gates: which LMMA shape is densest, and what each idea saves.

Unit: gate equivalents (GE), the area of one two-input NAND. A cell's GE are those of common standard-cell
libraries (Weste and Harris, *CMOS VLSI Design*, give the same orders); a block is the sum of its cells,
wires not counted. Only ratios are of use. Nothing is fitted to the paper's figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

XOR, MUX2, FULL_ADDER, FLIP_FLOP, AND = 2.5, 2.25, 6.5, 5.5, 1.5
FP16_ADDER = 560.0
"""Alignment shifter (14 bits, 4 levels), 14-bit adder, leading-zero count, normalising shifter, exponents."""
FP16_MULTIPLIER = 1000.0
"""11 x 11 partial products and their adders, exponent adder, normalising and rounding."""


@dataclass(frozen=True, slots=True)
class LookupArray:
    """A lookup unit for one-bit planes of weights: ``m`` tables of ``k`` activations, ``n`` columns each."""

    m: int = 2
    n: int = 64
    k: int = 4
    table_bits: int = 16
    """Bits of an entry: 16 for fp16 activations, 8 for int8 tables."""
    symmetric: bool = True
    """Half of the entries are stored (weights are read as plus or minus one)."""
    negate_offline: bool = True
    """The weights are stored so that addresses need no inversion when the sign bit is set."""
    precompute: bool = False
    """The unit makes its own tables instead of reading tables that software made."""

    @property
    def entries(self) -> int:
        """Stored entries of one table."""
        return 1 << (self.k - 1 if self.symmetric else self.k)

    def gates(self) -> dict[str, float]:
        """Return the GE of each part."""
        lanes, bits = self.m * self.n, self.table_bits
        floating = bits == 16
        accumulate = FP16_ADDER if floating else 32 * FULL_ADDER
        width = 16 if floating else 32
        parts = {
            "tables": self.m * self.entries * bits * FLIP_FLOP,
            "multiplexers": lanes * (self.entries - 1) * bits * MUX2,
            "accumulators": lanes * (accumulate + width * FLIP_FLOP),
            "weights": self.n * self.k * FLIP_FLOP,
        }
        if self.symmetric:
            parts["sign"] = lanes * (1 if floating else bits) * XOR
            if not self.negate_offline:
                parts["inversion"] = lanes * (self.k - 1) * XOR
        if self.precompute:
            adder = FP16_ADDER if floating else (bits + 2) * FULL_ADDER
            sums = self.k + (1 << (self.k - 1))  # pair sums, then one addition for each half entry
            parts["precompute"] = self.m * sums * adder
        return parts

    @property
    def area(self) -> float:
        """GE of the whole array."""
        return sum(self.gates().values())

    @property
    def density(self) -> float:
        """One-bit multiply-adds of a cycle for each GE."""
        return self.m * self.n * self.k / self.area


def shapes(macs: int = 512, deepest: int = 8) -> list[tuple[int, int, int]]:
    """Return all (m, n, k) of powers of two (k: any up to ``deepest`` that divides) with m n k = macs."""
    return [
        (m, macs // k // m, k)
        for k in range(2, deepest + 1)
        if macs % k == 0
        for m in (1 << e for e in range(int(math.log2(macs // k)) + 1))
    ]


@cache
def relative_density(m: int, n: int, k: int, table_bits: int) -> float:
    """Return the density of an array over that of the published shape M2 N64 K4 with such entries."""
    published = LookupArray(table_bits=table_bits)
    return LookupArray(m, n, k, table_bits).density / published.density


def dot_product_ratio() -> float:
    """Return how much denser a four-element one-bit lookup is than a four-element FP16 dot product.

    Both without registers and accumulators, as units of a dot product that stand alone.
    """
    multiply = 4 * FP16_MULTIPLIER + 3 * FP16_ADDER
    look_up = 7 * 16 * MUX2 + XOR
    return multiply / look_up
