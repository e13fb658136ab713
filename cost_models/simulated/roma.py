"""ROMA: base weights in ROM beside the multipliers, adapters and KV cache in SRAM. Simulated.

Source of the machine: W. Wang et al., "ROMA", arXiv 2503.12988: 7 nm, 500 MHz, 17 x 16 units (256 matrix
units with an L-Unit for ROM weights and an H-Unit for SRAM operands, a row of vector units), 1.86 GiB ROM,
304 MiB SRAM of which 288 hold adapters and KV cache. The equations are ours:

    an op      fill + max(L, H), L- and H-Units side by side; ops follow one another
    L          max(ROM bytes / (units * 704), multiply-adds / (units * 2816)); weights are read once for
               16 tokens
    H          max(SRAM bytes / (units * 64), multiply-adds / (units * 256))
    fill       33 cycles: 17 + 16 hops through the array
    adapter    t = A x on H-Units, then B t; where t is made depends on the fusion (`adapter`)

Fitted: 2816 two-bit weights (704 bytes) of ROM for a unit and cycle; anchor: 31.8K tokens/s without KV
cache. Assumed, for nothing was published: a 512-bit SRAM port a unit, and H-Units that keep up with it
when four query heads share a KV head (256 multiply-adds). Keys and values take one byte an element.
"""

from __future__ import annotations

from dataclasses import dataclass

from mimo_compile.ir.simulated import RANK, Matmul, RomaConfig


@dataclass(frozen=True, slots=True)
class Chip:
    """The machine; rates are of one matrix unit and cycle."""

    hz: float = 500e6
    rows: int = 16
    columns: int = 16
    fill_cycles: float = 33.0
    rom_bytes: float = 704.0
    """Fitted, see above."""
    l_macs: float = 2816.0
    """What consumes the ROM's two-bit weights."""
    sram_bytes: float = 64.0
    h_macs: float = 256.0
    rom_capacity: float = 1.87 * 2**30
    """Published as 1.86 GB; the 8B base at two bits, which is said to fit, takes 1.8698 GiB."""
    sram_capacity: float = 288 * 2**20
    """For adapters and KV cache."""
    watts: float = 33.1

    @property
    def units(self) -> int:
        """Matrix units."""
        return self.rows * self.columns


ROMA = Chip()


def op_cycles(
    chip: Chip, *, rom: float = 0.0, l_macs: float = 0.0, sram: float = 0.0, h_macs: float = 0.0
) -> float:
    """Return the cycles of one op from bytes and multiply-adds over all units."""
    low = max(rom / chip.rom_bytes, l_macs / chip.l_macs)
    high = max(sram / chip.sram_bytes, h_macs / chip.h_macs)
    return chip.fill_cycles + max(low, high) / chip.units


@dataclass(frozen=True, slots=True)
class Llama:
    """A decoder's shapes, and how its base weights are stored."""

    layers: int
    hidden: int
    kv: int
    """Width of keys (and of values)."""
    ffn: int
    vocabulary: int
    bits: int
    tied: bool = False
    """Embedding and head are one table."""
    rank: int = RANK

    @property
    def matrices(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """(rows, columns) of a layer's matrices, those that run as one op together."""
        h, f = self.hidden, self.ffn
        return ((h, h), (self.kv, h), (self.kv, h)), ((h, h),), ((f, h), (f, h)), ((h, f),)

    @property
    def layer_weights(self) -> float:
        """Base weights of a layer."""
        return float(sum(n * k for op in self.matrices for n, k in op))

    @property
    def base_bytes(self) -> float:
        """Bytes of all base weights with embedding and head, scales not counted."""
        tables = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return (self.layers * self.layer_weights + tables) * self.bits / 8

    @property
    def adapter_bytes(self) -> float:
        """Bytes of FP8 adapters on every matrix."""
        return float(self.layers * sum(self.rank * (n + k) for op in self.matrices for n, k in op))

    def kv_bytes(self, tokens: int) -> float:
        """Bytes of one-byte keys and values."""
        return 2.0 * self.layers * self.kv * tokens


LLAMA3_8B = Llama(32, 4096, 1024, 14336, 128256, 2)
LLAMA32_3B = Llama(28, 3072, 1024, 8192, 128256, 4, tied=True)


def pass_cycles(model: Llama, tokens: int, past: int = 0, chip: Chip = ROMA) -> float:
    """Return the cycles of ``tokens`` tokens through the whole model after ``past`` tokens in the cache.

    The head runs for the last token only. Attention is causal; with no past and one token there is none
    to speak of, but its op still takes its turn.
    """
    reads = -(-tokens // 16)
    total = 0.0
    for op in model.matrices:
        weights = sum(n * k for n, k in op)
        low_rank = sum(model.rank * (n + k) for n, k in op)
        total += op_cycles(
            chip, rom=weights * model.bits / 8 * reads, l_macs=float(weights * tokens),
            sram=float(low_rank * reads), h_macs=float(low_rank * tokens),
        )  # fmt: skip
    seen = past * tokens + tokens * (tokens - 1) / 2  # pairs of a query and an earlier key
    cached = 2.0 * model.kv * (past + tokens - 1) * reads
    total += op_cycles(chip, sram=cached, h_macs=2.0 * model.hidden * seen)
    head = model.vocabulary * model.hidden
    return model.layers * total + op_cycles(chip, rom=head * model.bits / 8, l_macs=float(head))


def tokens_per_s(model: Llama, past: int, chip: Chip = ROMA) -> float:
    """Return decoding speed with ``past`` tokens in the cache."""
    return chip.hz / pass_cycles(model, 1, past, chip)


def first_token_ms(model: Llama, tokens: int, chip: Chip = ROMA) -> float:
    """Return the time to the first token after a prompt. Unit: milliseconds."""
    return 1e3 * pass_cycles(model, tokens, 0, chip) / chip.hz


def most_tokens(model: Llama, chip: Chip = ROMA) -> int:
    """Return how many tokens of KV cache fit beside the adapters (0: the base does not fit its ROM)."""
    if model.base_bytes > chip.rom_capacity:
        return 0
    return int((chip.sram_capacity - model.adapter_bytes) // model.kv_bytes(1))


def kernel(matmul: Matmul, config: RomaConfig, chip: Chip = ROMA) -> tuple[float, dict[str, float]]:
    """Return modelled microseconds of one matmul, with its adapters if any, and what they are made of."""
    n, k, m = matmul.n, matmul.k, matmul.m
    reads = -(-m // config.tokens)
    if config.mapping == "rows":  # unit u has rows u, u + 256, ...
        most, fill = -(-n // chip.units) * k, chip.fill_cycles
    else:  # a row of units has rows of the base, its columns share them along K and add up
        most = -(-n // chip.rows) * -(-k // chip.columns)
        fill = chip.fill_cycles + chip.columns
    rom = most * matmul.bits / 8 * reads / chip.rom_bytes
    low = max(rom, most * m / chip.l_macs)
    first, second, extra = adapter(matmul, config, chip)
    parts = {
        "rom": rom,
        "l_macs": most * m / chip.l_macs,
        "adapter": first + second + extra,
        "fill": fill,
    }
    if not matmul.rank:
        cycles = fill + low
    elif config.fusion == 1:  # A beside the base, then B by itself
        cycles = fill + max(low, first) + chip.fill_cycles + second + extra
    elif config.fusion == 2:  # all of it beside the base
        cycles = fill + max(low, first + second + extra)
    else:  # A in the producer, B beside the base
        cycles = first + extra + fill + max(low, second)
    return 1e6 * cycles / chip.hz, {name: 1e6 * c / chip.hz for name, c in parts.items()}


def adapter(matmul: Matmul, config: RomaConfig, chip: Chip = ROMA) -> tuple[float, float, float]:
    """Return the cycles of ``t = A x``, of ``B t``, and of the turns that ranks take in ``r_tile``s.

    With fusion 2 each unit makes the whole of t for itself. Rows that are done together may want as many
    adapters.
    """
    if not matmul.rank:
        return 0.0, 0.0, 0.0
    turns = -(-matmul.rank // config.r_tile)
    done = turns * config.r_tile  # ranks with padding
    together = min(matmul.m, config.tokens)
    reads = -(-matmul.m // config.tokens) * min(together, matmul.adapters)
    sharing = 1 if config.fusion == 2 else chip.units

    def cycles(width: float, units: int) -> float:
        work = done * width * matmul.m / chip.h_macs
        return max(work, done * width * reads / chip.sram_bytes) / units

    inner = cycles(float(matmul.k * len(matmul.parts)), sharing)
    return inner, cycles(matmul.n, chip.units), (turns - 1) * chip.fill_cycles


def peaks(chip: Chip = ROMA) -> tuple[dict[str, float], dict[str, float]]:
    """Return operations/s and bytes/s of the whole chip, for rooflines."""
    low, high = chip.units * chip.l_macs * chip.hz, chip.units * chip.h_macs * chip.hz
    ops = {
        "fma_f32": high, "dot_i8": low, "add_f32": high, "exp_f32": high / 4, "unpack_u8": low,
        "shuffle_u8": low, "int_op": high,
    }  # fmt: skip
    rom, sram = chip.units * chip.rom_bytes * chip.hz, chip.units * chip.sram_bytes * chip.hz
    return ops, {"dram": rom, "l3": rom, "l2": sram, "l1": sram}
