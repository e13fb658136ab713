"""Codes of 2, 4 and 8 bits times 16-bit floats or int8 on GPUs from the A100 on, unpacked into ``mma.sync``.

The tiles, launches and knobs of `cuda_mma`; the weights stay codes up to the registers. Products with float
activations are exact, since small integers are numbers of 16 bits; scales multiply float32 sums of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware, gpu_of
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Space
from mimo_compile.schedules.cuda.code import Launch
from mimo_compile.schedules.cuda.limits import MOST_REGISTERS, fits
from mimo_compile.schedules.cuda.template import rendered
from mimo_compile.schedules.mpgemm.cuda_base import CudaGemm, CudaProblem, Ends
from mimo_compile.schedules.mpgemm.cuda_mma import NEEDS, MmaConfig, worth
from mimo_compile.schedules.mpgemm.cuda_work import tiled_work

_OTHER_REGISTERS = 64


@dataclass(frozen=True, slots=True)
class CodesConfig(MmaConfig):
    """Knobs of `CudaCodes`; ``depth`` is in bytes of activations."""


class CudaCodes(CudaGemm):
    """Any number of tokens; tiles beyond the matrices are zeros."""

    name = "mpgemm.cuda_mma_codes"
    config = CodesConfig
    needs = NEEDS

    def takes(self, p: CudaProblem) -> bool:
        """Codes without zero points, in groups of 16 bytes and more, with 16-bit floats or ``a8``."""
        if p.fmt.is_float or p.w_group % (128 // p.weight.bits):
            return False
        if p.acts.is_int8:
            return p.weight.bits < 8 and not p.x_group and p.exact
        return p.acts.rounded

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
        constants = ends.constants() | {
            "BITS": p.weight.bits, "W_GROUP": p.w_group, "BM": config.bm, "BN": config.bn,
            "DEPTH": config.depth, "WARPS_M": config.warps_m, "WARPS_N": config.warps_n,
            "STAGES": config.stages, "GROUP_M": config.group_m,
        }  # fmt: skip
        tiles = -(-p.m // config.bm) * -(-p.n // config.bn)
        main = Launch(
            "mpgemm_codes",
            (tiles, 1, config.split),
            config.threads,
            ("x_operand", "codes", "scale", ends.out, *ends.operands),
            shared_bytes(config, p),
        )
        text = rendered(Path(__file__).with_suffix(".cu"), constants)
        expected = ("IMMA" if ends.int8 else "HMMA", "LDGSTS")
        return self.kernel(workload, config, hardware, text, ends, main, expected)

    def work(self, workload: Workload, config: CodesConfig, hardware: Hardware) -> Counts:
        """Whole tiles; codes are unpacked once for each tile of tokens and warp that shares its rows."""
        p = CudaProblem.of(workload)
        times = -(-p.m // config.bm) * config.warps_m
        rows = -(-p.n // config.bn) * config.bn
        unpacked = float(times * rows * p.weight.k_padded)
        groups = p.m * rows * float(p.fmt.groups(p.k)) if p.w_group else 0.0
        more = {"unpack_u8": unpacked * (1 if p.acts.is_int8 else 2), "fma_f32": groups}
        return tiled_work(p, Ends(p, config.split), config.bm, config.bn, hardware, more)


def shared_bytes(c: CodesConfig, p: CudaProblem) -> int:
    """Return the bytes of shared memory of a block."""
    columns = c.depth // (1 if p.acts.is_int8 else 2)
    return c.stages * (c.bm * c.depth + c.bn * columns * p.weight.bits // 8)


def may_run(c: CodesConfig, p: CudaProblem, hardware: Hardware) -> bool:
    """Say whether warps' tiles are whole fragments, and a GPU can launch such a block."""
    sums = c.bm * c.bn // c.threads
    steps = 8 // p.weight.bits // (2 if p.acts.is_int8 else 1)
    operands = c.bm // c.warps_m // 4 * steps + c.bn // c.warps_n // 4  # x, and scales of a group
    registers = (2 if p.w_group else 1) * sums + operands + _OTHER_REGISTERS
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
    for bn in (128, 64):
        for group_m in (8, 4, 1):
            c = CodesConfig(bm, bn, 128, warps_m, warps_n, 4, 1, group_m)
            if legal(c):
                tiles = -(-p.m // bm) * -(-p.n // bn)
                cut = (replace(c, split=s) for s in (2, 4, 8))
                few = (d for d in cut if tiles * d.split < 2 * hardware.cores and legal(d))
                return max((c, *few), key=lambda d: d.split) if tiles < hardware.cores else c
    return CodesConfig(16, 32, 128, 1, 1, 2, 1, 1)
