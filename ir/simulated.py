"""Machines that exist on paper only: what a program for one of them says, in plain values.

Schedules of simulated targets choose these values and execute them; cost models turn them into
cycles. Both read them here, so that what is verified and what is timed is one program.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from mimo_compile.ir.formats import WeightFormat, parse_weight_format
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload

SIMULATED = "simulated"
"""Stands in records where measured ones say ``cold`` or ``hot``; also a feature of such targets."""


@dataclass(frozen=True, slots=True)
class Matmul:
    """A low-bit matmul ``y[m, n] = sum_k x[m, k] w[n, k]`` as a simulated machine sees it."""

    m: int
    n: int
    k: int
    fmt: WeightFormat
    act: str
    """``a8``: int8 rows, ``a16``: floats."""
    rank: int = 0
    """Of LoRA adapters, 0 without."""
    adapters: int = 1
    """How many there are to choose from, row by row."""
    parts: tuple[int, ...] = ()
    """Rows of each matrix that w is made of; each has an adapter's ranks of its own."""

    @staticmethod
    @lru_cache(maxsize=256)
    def of(workload: Workload) -> Matmul:
        """Read a workload of the op ``mpgemm`` or ``lora_mpgemm``."""
        from mimo_compile.ir.ops import get_op

        p = get_op(workload.op).full(workload)
        rows = [int(t) for t in p["parts"].split("+")] if p.get("parts") else [p["n"]]
        return Matmul(
            p["m"], p["n"], p["k"], parse_weight_format(p["w"]), p["a"], p.get("r", 0),
            p.get("l", 1), tuple(rows),
        )  # fmt: skip

    @property
    def bits(self) -> int:
        """Bit planes of a stored code."""
        return self.fmt.bits

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.fmt.group_size(self.k)


SMEM_BYTES = 256 << 10
"""Shared memory of an SM with LUT tensor cores; the published evaluation had to take a power of two."""
REGISTER_BYTES = 256 << 10
"""Its register file, half of which may hold accumulators."""


@dataclass(frozen=True, slots=True)
class LmmaConfig:
    """One matmul on LUT tensor cores: the LMMA instruction, the machine's size, the tiles."""

    shape: str = "2x64x4"
    """Of one instruction, ``m x n x k``: m rows of tables, n weight rows that look up in each, k activations
    in a table, which has ``2**(k - 1)`` entries. The product is 512."""
    sign: str = "low"
    """Bit of a k-bit index that becomes the sign (``low``: the first activation's, ``high``: the last's); the
    others are the address."""
    table: str = "f16"
    """Entries: ``f16`` (sums of int8 are exact in it) or ``i8`` with a scale (lossy)."""
    precompute: str = "fused"
    """Tables are made by the producer of the activations (``fused``) or in kernels of their own."""
    scale: int = 1
    """Size of the array: 1 does the multiply-adds of an FP16 tensor core at two bits."""
    registers: int = 1
    """Register file, as a multiple of an A100's."""
    tile_m: int = 64
    tile_n: int = 128
    tile_k: int = 64
    """Tile of one thread block: rows, weight rows, activations per step."""

    @property
    def m(self) -> int:
        """Rows of tables of one instruction."""
        return int(self.shape.split("x")[0])

    @property
    def n(self) -> int:
        """Weight rows of one instruction."""
        return int(self.shape.split("x")[1])

    @property
    def k(self) -> int:
        """Activations of a table."""
        return int(self.shape.split("x")[2])

    @property
    def sign_bit(self) -> int:
        """Position of the sign in an index."""
        return 0 if self.sign == "low" else self.k - 1

    @property
    def entries(self) -> int:
        """Entries of a table."""
        return 1 << (self.k - 1)

    @property
    def table_bytes(self) -> float:
        """Bytes of table for one activation."""
        return self.entries * (1 if self.table == "i8" else 2) / self.k

    def fits(self, bits: int) -> bool:
        """Say whether tiles are whole instructions that registers and shared memory hold twice over."""
        held = 2 * self.tile_k * (self.tile_m * self.table_bytes + self.tile_n * bits / 8)
        whole = not (self.tile_m % self.m or self.tile_n % self.n or self.tile_k % self.k)
        sums = 4 * self.tile_m * self.tile_n <= REGISTER_BYTES * self.registers // 2
        return whole and sums and held <= SMEM_BYTES


@dataclass(frozen=True, slots=True)
class MmaConfig:
    """The same matmul on the int8 tensor cores that an A100 has: weights are unpacked first."""

    tile_m: int = 64
    tile_n: int = 128
    tile_k: int = 64
    """Tile of one thread block: rows, weight rows, activations per step."""
    registers: int = 1

    def fits(self, bits: int) -> bool:
        """Say whether accumulators fit the registers, and two steps of operands shared memory."""
        held = 2 * self.tile_k * (self.tile_m + self.tile_n * bits / 8)
        sums = 4 * self.tile_m * self.tile_n
        return sums <= REGISTER_BYTES * self.registers // 2 and held <= SMEM_BYTES


RANK = 16
"""Rank of the LoRA adapters that ROMA is built for."""


@dataclass(frozen=True, slots=True)
class RomaConfig:
    """One matmul on ROMA: which unit does what, and where an adapter runs if there is one."""

    fusion: int = 3
    """The adapter's first product: 1 appended to the base's rows, 2 recomputed by every unit, 3 done
    by the producer of the activations."""
    r_tile: int = 16
    """Ranks of the adapter that an H-Unit does at a time."""
    mapping: str = "rows"
    """``rows``: each unit has whole rows of the base; ``grid``: a column of units shares them along K."""
    tokens: int = 16
    """Activation rows that stay beside the weights while these are read once."""


def offered(hardware: Hardware, what: str) -> tuple[str, ...]:
    """Return the variants of a part that a simulated target has: ``array`` -> ``("1x", "2x")``."""
    found = {f.partition("-")[2] for f in hardware.features if f.partition("-")[0] == what}
    return tuple(sorted(found, key=lambda v: (len(v), v)))
