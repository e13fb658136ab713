"""An A100 whose tensor cores look up: cycles of one matmul. Simulated; nothing here was measured.

Source of the machine: Z. Mo et al., "LUT Tensor Core", ISCA 2025 (arXiv 2408.06003). The GPU around the
units is an A100 by its data sheet. The equations are ours:

    lookups    one LMMA of shape m x n x k does m * n lookups for each bit plane of the weights; m * n * k
               is 512, so a tensor core of scale s does 512 s one-bit multiply-adds a cycle, 512 s / b of
               b bits. At two bits and s = 1 that is an FP16 tensor core's 256. Other shapes than 2 x 64 x 4
               get the same area, and do as much less as `lut_area` finds them less dense.
    a step     along K for one thread block (tile_m x tile_n; one block on an SM) takes the longest of
                 compute  tile_m tile_n / (4 macs issue)
                 smem     (tile_m a warps_n + tile_n w warps_m) / 128
                 l2       (tile_m a + tile_n w) / (bytes that one of the active SMs gets)
                 rescale  tile_m tile_n / (64 columns of a scale)
               with a, w: bytes of an activation (table) and of a weight, four warps in the best grid
    a tile     fill + K steps + tile_m tile_n out / l2
    a kernel   launch + max(tiles on the busiest SM * tile, distinct bytes / memory)
    tables     fused into the producer: 10 ALU operations an activation and what is written beyond fp16;
               split: kernels of their own, which pass over memory

    int8       the rival on the same GPU: A100's own int8 tensor cores (512 multiply-adds), one more limit
                 unpack   tile_n UNPACK_OPS / 64
               and 2 ALU operations an activation to quantise it

One constant is fitted: ``issue``, the share of cycles in which the units start work. Its anchor is one
published time (FP16, 1024 sequences of one token); all the others are predictions, see `published`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mimo_compile.cost_models.simulated.lut_area import relative_density
from mimo_compile.ir.simulated import REGISTER_BYTES, SMEM_BYTES, LmmaConfig, Matmul, MmaConfig

LANES = 512
"""One-bit multiply-adds of one tensor core and cycle at scale 1 (M2 N64 K4)."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """The machine around the units: an A100 (SXM, 40 GB) where nothing else is said."""

    sms: int = 108
    hz: float = 1.41e9
    tensor_cores: int = 4
    """Of one SM."""
    smem_bytes_per_cycle: float = 128.0
    l2_bytes_per_cycle: float = 5120.0
    """Of all slices together."""
    port_bytes_per_cycle: float = 64.0
    """Most that one SM gets from L2."""
    dram_bytes_per_s: float = 1.555e12
    smem_bytes: int = SMEM_BYTES
    register_bytes: int = REGISTER_BYTES
    alu_lanes: float = 64.0
    """fp32 operations of one SM and cycle outside of tensor cores."""
    fill_cycles: float = 600.0
    """From a block's start to its first operands: one trip to memory. Assumed."""
    launch_us: float = 1.0
    """Between two kernels. Assumed."""
    issue: float = 0.573
    """Share of cycles in which tensor cores start work. Fitted, see above."""


A100 = Gpu()
BUILD_OPS = 10.0
"""ALU operations for one activation to make its share of a table: for four activations about 4 pair sums,
8 entries, 8 scale-and-round, 12 for packing, 8 for the group's largest sum. Counted by hand."""


UNPACK_OPS = 1.0
"""ALU operations that bring one packed weight to int8: shift, mask and permute of four at a time, and the
moves around them. Counted by hand."""
QUANTIZE_OPS = 2.0
"""ALU operations that bring one activation to int8 in its producer."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A way to multiply: multiply-adds of one tensor core and cycle, bytes of its operands."""

    macs: float
    a_bytes: float
    w_bytes: float
    out_bytes: float = 2.0
    registers: int = 1
    m_step: int = 16
    n_step: int = 32
    """Tiles are multiples of these."""
    scale_columns: float = float("inf")
    """Columns after which accumulators are multiplied by a scale."""
    unpack_ops: float = 0.0
    """ALU operations for each weight of a tile."""


FP16 = Unit(256, 2, 2)
INT8 = Unit(512, 1, 1)


def lut(config: LmmaConfig, bits: int, out_bytes: float = 4.0, group: float = float("inf")) -> Unit:
    """Return LUT tensor cores as a unit, for weights of ``bits`` planes and ``group`` columns a scale.

    Arrays of another shape than M2 N64 K4 take as much area, so they are as much slower as they are less
    dense.
    """
    columns = min(group, config.tile_k) if config.table == "i8" else group
    density = relative_density(config.m, config.n, config.k, 8 if config.table == "i8" else 16)
    return Unit(
        LANES * density * config.scale / bits, config.table_bytes, bits / 8, out_bytes, config.registers,
        config.m, config.n, columns,
    )  # fmt: skip


def step_cycles(gpu: Gpu, unit: Unit, tile: tuple[int, int], active: int) -> dict[str, float]:
    """Return the cycles of one column of K by limit, for a tile on each of ``active`` SMs."""
    rows, columns = tile
    a, w = rows * unit.a_bytes, columns * unit.w_bytes
    fragments = min(a * wn + w * wm for wm, wn in ((1, 4), (2, 2), (4, 1)))
    share = min(gpu.port_bytes_per_cycle, gpu.l2_bytes_per_cycle / active)
    return {
        "compute": rows * columns / (unit.macs * gpu.tensor_cores * gpu.issue),
        "smem": fragments / gpu.smem_bytes_per_cycle,
        "l2": (a + w) / share,
        "rescale": rows * columns / unit.scale_columns / gpu.alu_lanes,
        "unpack": columns * unit.unpack_ops / gpu.alu_lanes,
    }


def gemm_us(
    gpu: Gpu, unit: Unit, shape: tuple[int, int, int], tile: tuple[int, int]
) -> tuple[float, dict[str, float]]:
    """Return microseconds of ``[M, K] x [N, K]`` in tiles, without launch and tables, and its limits."""
    m, n, k = shape
    tiles = -(-m // tile[0]) * -(-n // tile[1])
    active = min(tiles, gpu.sms)
    limits = step_cycles(gpu, unit, tile, active)
    share = min(gpu.port_bytes_per_cycle, gpu.l2_bytes_per_cycle / active)
    store = tile[0] * tile[1] * unit.out_bytes / share
    cycles = gpu.fill_cycles + k * max(limits.values()) + store
    on_chip = -(-tiles // gpu.sms) * cycles / gpu.hz * 1e6
    moved = m * k * unit.a_bytes + n * k * unit.w_bytes + m * n * unit.out_bytes
    memory = moved / gpu.dram_bytes_per_s * 1e6
    runs = -(-tiles // gpu.sms) * k / gpu.hz * 1e6
    parts = {name: value * runs for name, value in limits.items()} | {"dram": memory}
    return max(on_chip, memory), parts


def fits(gpu: Gpu, unit: Unit, tile: tuple[int, int, int]) -> bool:
    """Say whether a tile's accumulators fit the registers and two steps of operands shared memory."""
    rows, columns, depth = tile
    held = 2 * depth * (rows * unit.a_bytes + columns * unit.w_bytes)
    return (
        rows % unit.m_step == 0
        and columns % unit.n_step == 0
        and rows * columns * 4 <= gpu.register_bytes * unit.registers // 2
        and held <= gpu.smem_bytes
    )


def tiles_of(gpu: Gpu, unit: Unit, depth: int = 64) -> Iterator[tuple[int, int]]:
    """Yield all tiles of powers of two that fit."""
    for rows in (2, 4, 8, 16, 32, 64, 128, 256):
        for columns in (32, 64, 128, 256, 512, 1024):
            if fits(gpu, unit, (rows, columns, depth)):
                yield rows, columns


def best_gemm_us(gpu: Gpu, unit: Unit, shape: tuple[int, int, int]) -> float:
    """Return the least microseconds over all tiles that fit."""
    return min(gemm_us(gpu, unit, shape, tile)[0] for tile in tiles_of(gpu, unit))


def tables_us(gpu: Gpu, config: LmmaConfig, activations: float) -> float:
    """Return the microseconds that making the tables of fp16 ``activations`` adds."""
    if config.precompute == "fused":
        extra = max(0.0, config.table_bytes - 2.0) / gpu.dram_bytes_per_s
        alu = BUILD_OPS / (gpu.alu_lanes * gpu.sms * gpu.hz)
        return 1e6 * activations * (extra + alu)
    wide = config.entries * 2 / config.k  # bytes of an fp16 table for one activation
    passes, moved = 1, 2.0 + wide
    if config.table == "i8":  # a second pass brings the fp16 table to int8
        passes, moved = 2, moved + wide + config.table_bytes
    return passes * gpu.launch_us + 1e6 * activations * moved / gpu.dram_bytes_per_s


def kernel(matmul: Matmul, config: LmmaConfig, gpu: Gpu = A100) -> tuple[float, dict[str, float]]:
    """Return modelled microseconds of a program, tables included, and what they are made of."""
    unit = lut(config, matmul.bits, 4.0, matmul.group)
    shape = (matmul.m, matmul.n, -(-matmul.k // config.k) * config.k)
    busy, parts = gemm_us(gpu, unit, shape, (config.tile_m, config.tile_n))
    tables = tables_us(gpu, config, float(matmul.m) * shape[2])
    return gpu.launch_us + busy + tables, {**parts, "tables": tables, "launch": gpu.launch_us}


def mma_kernel(
    matmul: Matmul, config: MmaConfig, gpu: Gpu = A100
) -> tuple[float, dict[str, float]]:
    """Return modelled microseconds of a matmul on int8 tensor cores, and what they are made of."""
    unit = replace(
        INT8, w_bytes=matmul.bits / 8, out_bytes=4.0, registers=config.registers,
        scale_columns=float(matmul.group), unpack_ops=UNPACK_OPS,
    )  # fmt: skip
    shape = (matmul.m, matmul.n, matmul.k)
    busy, parts = gemm_us(gpu, unit, shape, (config.tile_m, config.tile_n))
    rate = gpu.alu_lanes * gpu.sms * gpu.hz * 1e-6
    quantize = QUANTIZE_OPS * matmul.m * matmul.k / rate
    times = {**parts, "quantize": quantize, "launch": gpu.launch_us}
    return gpu.launch_us + busy + quantize, times


def peaks(scale: int = 1, gpu: Gpu = A100) -> tuple[dict[str, float], dict[str, float]]:
    """Return operations/s and bytes/s of the machine, for rooflines; multiply-adds are those of one bit."""
    lookups = gpu.sms * gpu.tensor_cores * gpu.hz * LANES * scale
    alu = gpu.sms * gpu.alu_lanes * gpu.hz
    ops = {
        "fma_f32": alu, "dot_i8": lookups, "add_f32": alu, "exp_f32": alu / 4, "unpack_u8": alu,
        "shuffle_u8": lookups / 4, "int_op": alu,
    }  # fmt: skip
    l2 = gpu.l2_bytes_per_cycle * gpu.hz
    smem = gpu.smem_bytes_per_cycle * gpu.sms * gpu.hz
    return ops, {"dram": gpu.dram_bytes_per_s, "l3": l2, "l2": l2, "l1": smem}
