"""Codes of 2, 4 and 8 bits times 16-bit floats or int8 on GPUs from the A100 on, unpacked into ``mma.sync``.

The tiles, launches and knobs of `cuda_mma`; the weights stay codes up to the registers. Products with float
activations are exact, since small integers and E4M3 are numbers of 16 bits, and entries of codebooks sums of
such numbers; scales multiply float32 sums of a group. Zero points multiply the sum of a group's activations,
which matrix units find as the product with a column of ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware, gpu_of
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Space
from mimo_compile.schedules.cuda.code import Launch
from mimo_compile.schedules.cuda.limits import MOST_REGISTERS, fits
from mimo_compile.schedules.cuda.template import rendered
from mimo_compile.schedules.mpgemm.cuda_base import CudaGemm, CudaProblem
from mimo_compile.schedules.mpgemm.cuda_ends import Ends
from mimo_compile.schedules.mpgemm.cuda_mma import NEEDS, MmaConfig, worth
from mimo_compile.schedules.mpgemm.cuda_work import tiled_work

_OTHER_REGISTERS = 64


@dataclass(frozen=True, slots=True)
class CodesConfig(MmaConfig):
    """Knobs of `CudaCodes`; ``depth`` is in bytes of activations."""


class CudaCodes(CudaGemm):
    """Any number of tokens; tiles beyond the matrices are zeros."""

    name = "mpgemm.cuda_mma_codes"
    version: ClassVar[int] = 4
    config = CodesConfig
    needs = NEEDS

    def takes(self, p: CudaProblem) -> bool:
        """Codes in groups of 16 bytes and more, with 16-bit floats or int8; zero points not with float16.

        float16 does not hold a code less a fractional zero point, and the op's bound is not for sums of both
        apart, as that for bfloat16 is; int8 sums of a whole row are no float32 numbers.
        """
        if p.fmt.is_float or p.w_group % (128 // p.weight.bits):
            return False
        if p.acts.is_int8:
            grouped = p.w_group or p.x_group or not p.fmt.has_zero
            whole = p.x_group % (128 // p.weight.bits) == 0
            return p.weight.bits < 8 and whole and p.exact and bool(grouped)
        return p.acts.kind == "bf16" or (p.acts.kind == "f16" and not p.fmt.has_zero)

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Tiles of blocks and warps, stages, pieces of K, order of the tiles."""
        p = CudaProblem.of(workload)
        knobs = {
            "bm": (16, 32, 64, 128), "bn": (32, 64, 128, 256), "depth": (128, 256), "warps_m": (1, 2, 4),
            "warps_n": (1, 2, 4), "stages": (2, 3, 4, 5), "split": (1, 2, 4, 8), "group_m": (1, 4, 8),
        }  # fmt: skip

        def legal(c: CodesConfig) -> bool:
            return may_run(c, p, hardware) and worth(c, Ends(p, c.split), hardware)

        return Space(CodesConfig, knobs, _default(p, hardware, legal), legal)

    def lower(self, workload: Workload, config: CodesConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        p = CudaProblem.of(workload)
        ends = Ends(p, config.split)
        constants = ends.constants() | p.weight.constants(p.acts.kind) | {
            "W_GROUP": _group(p), "BM": config.bm, "BN": config.bn,
            "DEPTH": config.depth, "WARPS_M": config.warps_m, "WARPS_N": config.warps_n,
            "STAGES": config.stages, "GROUP_M": config.group_m,
        }  # fmt: skip
        tiles = -(-p.m // config.bm) * -(-p.n // config.bn)
        main = Launch(
            "mpgemm_codes",
            (tiles, 1, config.split),
            config.threads,
            (*ends.x_operands, "codes", *p.scale_names, ends.out, *ends.operands),
            shared_bytes(config, p),
        )
        text = rendered(Path(__file__).with_suffix(".cu"), constants)
        expected = (
            "IMMA" if ends.int8 else "HMMA",
            "LDGSTS",
            *(("PRMT",) if p.weight.is_book else ()),
        )
        return self.kernel(workload, config, hardware, ends.code(text, main, expected))

    def work(self, workload: Workload, config: CodesConfig, hardware: Hardware) -> Counts:
        """Whole tiles; codes are unpacked once for each tile of tokens and warp that shares its rows."""
        p = CudaProblem.of(workload)
        times = -(-p.m // config.bm) * config.warps_m
        rows = -(-p.n // config.bn) * config.bn
        unpacked = float(times * rows * p.weight.k_padded)
        runs = max(p.fmt.groups(p.k), p.acts.groups(p.k))
        groups = p.m * rows * float(runs) if _group(p) or p.x_group else 0.0
        each = _terms(p) * (4 if p.weight.is_book else 1) * (1 if p.acts.is_int8 else 2)
        more = {"unpack_u8": unpacked * each, "fma_f32": groups * (2 if p.fmt.has_zero else 1)}
        # zero points: of each warp's tile, 8 columns of ones
        products = _terms(p) + (8 * config.warps_n / config.bn if p.fmt.has_zero else 0.0)
        ends = Ends(p, config.split)
        return tiled_work(p, ends, config.bm, config.bn, hardware, more, products=products)


def _terms(p: CudaProblem) -> int:
    """Return the products of matrix units that a weight takes."""
    book = p.weight.book(p.acts.kind)
    return book.terms if book else 1


def _group(p: CudaProblem) -> int:
    """Return the columns between two scales, and zero points; 0 where the last step does without these."""
    return p.w_group or (p.weight.k_padded if p.fmt.has_zero else 0)


def shared_bytes(c: CodesConfig, p: CudaProblem) -> int:
    """Return the bytes of shared memory of a block."""
    columns = c.depth // (1 if p.acts.is_int8 else 2)
    return c.stages * (c.bm * c.depth + c.bn * columns * p.weight.bits // 8)


def may_run(c: CodesConfig, p: CudaProblem, hardware: Hardware) -> bool:
    """Say whether warps' tiles are whole fragments, and a GPU can launch such a block."""
    sums = c.bm * c.bn // c.threads
    steps = 8 // p.weight.bits // (2 if p.acts.is_int8 else 1)
    zeros = 1 + p.fmt.has_zero
    operands = c.bm // c.warps_m // 4 * (steps + zeros - 1) + c.bn // c.warps_n // 4 * zeros
    operands += 4 * (_terms(p) - 1) * steps  # x and its sums, scales of a group, terms of a weight
    operands += 16 * p.fmt.has_zero  # what is written next to the sums spills sooner
    if p.x_group:
        operands += c.bm // c.warps_m // 8
    registers = (2 if _group(p) or p.x_group else 1) * sums + operands + _OTHER_REGISTERS
    return (
        c.bm % (16 * c.warps_m) == 0
        and c.bn % (8 * c.warps_n) == 0
        and registers <= min(MOST_REGISTERS, gpu_of(hardware).registers_per_sm // c.threads)
        and fits(hardware, threads=c.threads, shared_bytes=shared_bytes(c, p))
    )


def _default(
    p: CudaProblem, hardware: Hardware, legal: Callable[[CodesConfig], bool]
) -> CodesConfig:
    """Return a config that gives most SMs a block, by cutting K where tiles are few. Not measured."""
    bm = next((b for b in (16, 32, 64) if p.m <= b), 64)
    warps_m, warps_n = (2, 2) if bm == 64 else (1, 4)
    for bn, warps in ((128, warps_n), (128, 4), (64, warps_n)):
        for group_m in (8, 4, 1):
            c = CodesConfig(bm, bn, 128, warps_m, warps, 4, 1, group_m)
            if legal(c):
                tiles = -(-p.m // bm) * -(-p.n // bn)
                cut = (replace(c, split=s) for s in (2, 4, 8))
                few = (d for d in cut if tiles * d.split < 2 * hardware.cores and legal(d))
                return max((c, *few), key=lambda d: d.split) if tiles < hardware.cores else c
    return CodesConfig(16, 32, 128, 1, 1, 2, 1, 1)
