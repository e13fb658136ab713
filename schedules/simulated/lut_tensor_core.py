"""Low-bit matmul by LMMA on an A100 with LUT tensor cores (simulated): tables of int8 sums, bit-serial."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

import numpy as np

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.simulated import LmmaConfig, Matmul, offered
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Space
from mimo_compile.schedules.simulated import lmma
from mimo_compile.schedules.simulated.base import SimulatedSchedule, quantize_rows, zero_points

SHAPES = (
    "2x64x4", "1x128x4", "4x32x4", "8x16x4", "16x8x4", "2x128x2", "4x64x2", "8x32x2", "2x32x8", "4x16x8",
)  # fmt: skip
"""LMMA shapes to choose from: 512 one-bit multiply-adds each."""


class LutTensorCore(SimulatedSchedule):
    """Split or fused tables, then a tiled loop of LMMA; exact with f16 tables."""

    name = "mpgemm.sim_lut_tensor_core"
    op = "mpgemm"
    config = LmmaConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Integer codes of one to four bits, int8 activations."""
        problem = self.problem(workload)
        low = problem.fmt.is_integer and problem.bits <= 4 and problem.act == "a8"
        return "lmma" in hardware.features and low

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Return instruction, tables, array, registers and tiles; what the target has not is left out."""
        problem = self.problem(workload)
        numbers = {
            what: tuple(int(v[:-1]) for v in offered(hardware, what))
            for what in ("array", "registers")
        }
        default = LmmaConfig(
            scale=numbers["array"][0], registers=numbers["registers"][0], tile_m=_rows(problem)
        )
        knobs = {
            "shape": SHAPES, "sign": ("low", "high"), "table": offered(hardware, "table"),
            "precompute": ("fused", "split"), "scale": numbers["array"],
            "registers": numbers["registers"], "tile_m": (2, 4, 8, 16, 32, 64, 128, 256),
            "tile_n": (64, 128, 256, 512, 1024), "tile_k": (32, 64, 128, 256),
        }  # fmt: skip
        return Space(LmmaConfig, knobs, default, lambda c: _legal(problem, c))

    def work(self, workload: Workload, config: LmmaConfig, hardware: Hardware) -> Counts:
        """Return lookups, additions, and the bytes of tables, weights and result."""
        p = self.problem(workload)
        lookups = float(p.m) * p.n * (p.k / config.k) * p.bits
        moved = p.m * p.k * config.table_bytes + p.n * p.k * p.bits / 8 + 4.0 * p.m * p.n
        again = -(-p.n // config.tile_n) * p.m * p.k * config.table_bytes
        again += -(-p.m // config.tile_m) * p.n * p.k * p.bits / 8
        return Counts({"shuffle_u8": lookups, "int_op": lookups}, {"dram": moved, "l2": again})

    def layouts(self, workload: Workload, config: LmmaConfig) -> dict[str, str]:
        """Stored weights depend on the table's depth and on the sign's place."""
        return {"weight": f"lmma.k{config.k}.{config.sign}"}

    def simulate(
        self, workload: Workload, config: LmmaConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Execute the tiles; integer tables accumulate in int32, f16 ones in float32."""
        p = self.problem(workload)
        a, row_scale = quantize_rows(arrays["x"])
        columns = -(-p.k // config.k) * config.k
        a = np.pad(a, ((0, 0), (0, columns - p.k)))
        codes = np.pad(arrays["codes"], ((0, 0), (0, columns - p.k)))
        stored = lmma.encode(lmma.index_planes(codes, p.bits, config.k), config.k, config.sign_bit)
        _, zero = lmma.reinterpret(codes, zero_points(p, arrays), p.bits)
        scale = np.asarray(arrays["scale"], np.float32) / 2
        tables, table_scale = _tables(a, config)
        y = np.zeros((p.m, p.n), np.float32)
        for r0 in range(0, p.m, config.tile_m):
            for c0 in range(0, p.n, config.tile_n):
                rows, outs = slice(r0, r0 + config.tile_m), slice(c0, c0 + config.tile_n)
                part = tables[rows], None if table_scale is None else table_scale[rows]
                weights = stored[:, :, outs], scale[outs], zero[outs]
                y[rows, outs] = _tile(p, config, part, a[rows], weights)
        y *= row_scale
        if "bias" in arrays:
            y += np.asarray(arrays["bias"], np.float32)
        return {"y": y}

    def slack(
        self, workload: Workload, config: LmmaConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """int8 tables: half a step of the table's scale for each lookup, weighted by its plane."""
        if config.table != "i8":
            return {}
        p = self.problem(workload)
        a, row_scale = quantize_rows(arrays["x"])
        a = np.pad(a, ((0, 0), (0, -p.k % config.k)))
        _, table_scale = _tables(a, config)
        assert table_scale is not None
        scale = np.abs(np.asarray(arrays["scale"], np.float64)) / 2
        bound = np.zeros((p.m, p.n))
        for start, stop in _segments(p, config):
            step = table_scale[:, start // config.tile_k].astype(np.float64)
            lookups = -(-(stop - start) // config.k) * ((1 << p.bits) - 1)
            bound += np.outer(
                step / 2 * lookups, scale[:, min(start // p.group, scale.shape[1] - 1)]
            )
        return {"y": bound * row_scale * (1 + 1e-6)}


def _rows(problem: Matmul) -> int:
    """Return a tile height for so many rows."""
    return next((t for t in (2, 4, 8, 16, 32) if t >= problem.m), 64)


def _legal(problem: Matmul, config: LmmaConfig) -> bool:
    """Whole instructions that fit; f16 tables need sums that float32 holds exactly."""
    sums = 127 * problem.group * ((1 << problem.bits) - 1)
    exact = config.table == "i8" or sums < lmma.FP32_EXACT
    whole = problem.group % config.k == 0 or problem.group >= problem.k
    return exact and whole and config.fits(problem.bits)


def _tables(a: Array, config: LmmaConfig) -> tuple[Array, Array | None]:
    """Return the tables of padded codes ``[M, K]`` in the config's type, and the scales of int8 ones.

    Split, fp16 tables pass through memory before they become int8.
    """
    if config.precompute == "split":
        tables = lmma.half_tables(a, config.k, config.sign_bit).astype(np.float16)
    else:
        tables = lmma.grown_tables(a, config.k, config.sign_bit)
    if config.table == "f16":
        return tables.astype(np.float16), None
    return lmma.quantize_tables(tables, config.tile_k // config.k)


def _segments(problem: Matmul, config: LmmaConfig) -> Iterator[tuple[int, int]]:
    """Yield runs of columns that share their scales, those of weights and of tables."""
    cuts = set(range(0, problem.k, problem.group))
    if config.table == "i8":
        cuts |= set(range(0, problem.k, config.tile_k))
    edges = [*sorted(cuts), problem.k]
    yield from pairwise(edges)


def _tile(
    p: Matmul, config: LmmaConfig, tables: tuple[Array, Array | None], a: Array,
    weights: tuple[Array, Array, Array],
) -> Array:  # fmt: skip
    """Return one tile of ``s' (acc - z' sum a)``, rows not yet scaled."""
    entries, table_scale = tables
    stored, scale, zero = weights
    m, n = len(entries), stored.shape[2]
    y = np.zeros((m, n), np.float32)
    kind = np.float32 if config.table == "f16" else np.int32
    for start, stop in _segments(p, config):
        group = min(start // p.group, scale.shape[1] - 1)
        acc = np.zeros((m, n), kind)
        for at in range(start, stop, config.tile_k):  # one step of the tile's loop
            end = min(at + config.tile_k, stop)
            columns = slice(at // config.k, -(-end // config.k))
            lmma.lmma(entries[:, columns], stored[:, columns], acc, config.k)
        total = a[:, start:stop].sum(axis=1).astype(np.float32)[:, None]
        value = acc.astype(np.float32)
        if table_scale is not None:
            value *= table_scale[:, start // config.tile_k, None]
        y += scale[:, group] * (value - zero[:, group] * total)
    return y
