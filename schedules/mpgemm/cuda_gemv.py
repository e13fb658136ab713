"""Few rows of activations on GPUs, without matrix units: memory is the limit. And floats that these round.

float32 activations (``a16``; ``abf16`` and ``af16`` round them) are multiplied as such: integer codes become
float32 by one ``lop3`` among the bits of a number that has them in its last place, and one subtraction; bytes
of codebooks' entries are looked up by ``prmt``; E4M3 numbers are moved to where bfloat16 has their bits. int8
activations are multiplied four at a time by ``dp4a``, with sums that stay integers between scales. Floats
that matrix units would round, or whose activations they would (routers, above all), have this kernel for any
number of tokens, 8 of them at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mimo_compile.ir.counts import Counts, in_turn
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Arg
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Space
from mimo_compile.schedules.cuda.code import DeviceCode, Launch
from mimo_compile.schedules.cuda.limits import fits
from mimo_compile.schedules.cuda.template import rendered
from mimo_compile.schedules.mpgemm.cuda_base import CudaGemm, CudaProblem
from mimo_compile.schedules.mpgemm.cuda_layout import PIECE, ROWS, Rows
from mimo_compile.schedules.mpgemm.cuda_mma import takes_operands

NEEDS = frozenset({"cuda"})
MOST_TOKENS = 8
"""Of a block."""
_MOST_SUMS = 16
"""Sums of a lane: rows times tokens."""
_MOST_WARPS = 16


@dataclass(frozen=True, slots=True)
class GemvConfig:
    """Knobs of `CudaGemv`."""

    rows: int = 2
    """Rows of the weights that a warp has: they share what is loaded of x."""
    warps: int = 4
    """Warps of a block with rows of their own."""
    split: int = 1
    """Warps that share rows, and take turns at the columns."""
    unroll: int = 1
    """Turns of a warp whose loads may be on their way together."""

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps * self.split


class CudaGemv(CudaGemm):
    """Up to 8 tokens, or any number of them with float weights; any GPU."""

    name = "mpgemm.cuda_gemv"
    config = GemvConfig
    needs = NEEDS

    def takes(self, p: CudaProblem) -> bool:
        """Codes, with int8 activations sums within 32 bits; floats but bfloat16 pairs."""
        if p.fmt.is_float:
            return not takes_operands(p)
        if p.acts.is_int8 and not (p.exact and (_grouped(p) or not p.fmt.has_zero)):
            return False  # zero points: sums of a whole row are no float32 numbers
        return p.m <= MOST_TOKENS

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Rows and warps of a block, how columns are shared, loads in flight."""
        p = CudaProblem.of(workload)

        def legal(c: GemvConfig) -> bool:
            return (
                c.rows * _tokens(p) <= _MOST_SUMS
                and c.rows <= ROWS
                and c.rows * c.warps < 2 * max(p.n, 1)
                and c.warps * c.split <= _MOST_WARPS
                and (c.split == 1 or 32 * (c.split - 1) < _vectors(p))
                and fits(hardware, threads=c.threads, shared_bytes=_shared(p, c))
            )

        knobs = {
            "rows": (1, 2, 4, 8),
            "warps": (1, 2, 4, 8),
            "split": (1, 2, 4, 8),
            "unroll": (1, 2),
        }
        return Space(GemvConfig, knobs, _default(p, hardware), legal)

    def lower(self, workload: Workload, config: GemvConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        p = CudaProblem.of(workload)
        acts = p.acts
        kind = "int8" if acts.is_int8 else "f32"
        constants = (
            p.constants()
            | p.weight.constants(kind)
            | {
                "FACTOR": p.weight.factor(kind),
                "TOKENS": p.m,
                "M": _tokens(p),
                "K_PADDED": p.weight.k_padded,
                "W_GROUP": p.w_group,
                "X_GROUP": p.x_group,
                "ROWS": config.rows,
                "WARPS": config.warps,
                "SPLIT": config.split,
                "UNROLL": config.unroll,
                "TOTAL": "int" if acts.is_int8 and not _grouped(p) else "float",
                "DOT": acts.is_int8,
                "W_FLOAT": p.fmt.is_float,
                "W_F16": p.fmt.name == "f16",
                "ROUND_BF16": acts.kind == "bf16",
                "ROUND_F16": acts.kind == "f16",
            }
        )
        x = ("x_codes", "x_scale") if acts.is_int8 else ("x",)
        # floats have no scales: none are looked at
        weights = ("w", "x") if p.fmt.is_float else ("codes", *p.scale_names)
        main = Launch(
            "mpgemm_gemv",
            (-(-p.n // (config.rows * config.warps)), -(-p.m // _tokens(p)), 1),
            config.threads,
            (*weights, *x, *(("bias",) if p.bias else ()), "y"),
            _shared(p, config),
        )
        launches: tuple[Launch, ...] = (main,)
        scratch: dict[str, Arg] = {}
        if acts.is_int8:
            groups = _x_groups(p)
            threads = 32 if p.x_group else 256
            operands = ("x", "x_codes", "x_scale")
            first = Launch("mpgemm_quantize", (p.m * groups, 1, 1), threads, operands, threads // 8)
            launches = (first, main)
            scratch = {
                "x_codes": Arg("x_codes", "state", (p.m, p.weight.k_padded), "int8"),
                "x_scale": Arg("x_scale", "state", (p.m, groups), "float32"),
            }
        text = rendered(Path(__file__).with_suffix(".cu"), constants)
        code = DeviceCode(text, launches, scratch, expected=_expected(p))
        return self.kernel(workload, config, hardware, code)

    def work(self, workload: Workload, config: GemvConfig, hardware: Hardware) -> Counts:
        """Padded products; each block reads x by itself, its warps from the first-level cache."""
        p = CudaProblem.of(workload)
        blocks = -(-p.n // (config.rows * config.warps))
        weights = float(blocks * config.rows * config.warps * p.weight.k_padded)
        x = 4.0 * p.m * p.k
        others = p.bytes - x
        if not p.acts.is_int8:
            ops = {"fma_f32": p.m * weights}
            if not p.fmt.is_float:
                ops |= {kind: n * weights for kind, n in unpacking(p.weight).items()}
            turns = -(-p.m // _tokens(p))  # of blocks at the weights
            near = others + (turns - 1) * p.weight.bytes + blocks * x
            return Counts(ops, {"dram": p.bytes, "l2": near})
        codes = p.m * (p.weight.k_padded + 4.0 * _x_groups(p))
        quantize = Counts(
            {"int_op": 6.0 * p.m * p.k}, {"dram": x, "l2": 2 * x + codes}, name="quantize"
        )
        main = Counts(
            {
                "dot_i8": p.m * weights,
                "unpack_u8": weights * (4 if p.weight.is_book else 1 if p.weight.bits < 8 else 0),
            },
            {"dram": others, "l2": others + blocks * codes},
            name="rows",
        )
        return in_turn(quantize, main)


def _expected(p: CudaProblem) -> tuple[str, ...]:
    if p.acts.is_int8:
        return ("IDP", *(("PRMT",) if p.weight.is_book else ()))
    if p.fmt.is_float:
        return ("FFMA",)
    return ("PRMT" if p.weight.is_book else "LOP3", "FFMA")


def unpacking(weight: Rows) -> dict[str, float]:
    """Return the operations that make a float32 number of a code, as `device/codes.cuh` has them."""
    if book := weight.book("f32"):
        # of four columns: which half of the book, of each byte two lookups and a choice, bytes together
        return {"int_op": (2 + 4 * book.planes + (8 if book.planes == 4 else 6)) / 4}
    if weight.fmt.family == "fp8":
        return {"int_op": 3.0, "dot_bf16": 1.0}
    return {"add_f32": 2.0 if weight.fmt.has_zero else 1.0, "int_op": 1.0}


def _vectors(p: CudaProblem) -> int:
    """Return the pieces of 16 bytes of a row."""
    return p.weight.row_bytes // PIECE


def _tokens(p: CudaProblem) -> int:
    """Return the tokens of a block."""
    return min(p.m, MOST_TOKENS)


def _grouped(p: CudaProblem) -> bool:
    return bool(p.w_group or p.x_group)


def _x_groups(p: CudaProblem) -> int:
    return p.acts.groups(p.k)


def _shared(p: CudaProblem, config: GemvConfig) -> int:
    """Return the bytes of a block's sums."""
    return 4 * config.warps * config.split * config.rows * _tokens(p)


def _default(p: CudaProblem, hardware: Hardware) -> GemvConfig:
    """Return a config whose blocks fill the GPU twice where rows are enough for it. Not measured."""
    rows = next(r for r in (4, 2, 1) if r * _tokens(p) <= _MOST_SUMS)
    turns = -(-p.m // _tokens(p))
    split = max(s for s in (1, 2, 4) if s == 1 or (32 * s <= _vectors(p) and turns == 1))
    # where tokens make blocks enough, those of many rows: each reads its tokens by itself
    config = GemvConfig(rows, 4 if turns == 1 else 8, split)
    while config.rows * config.warps >= 2 * p.n or (
        config.rows * config.warps > 1
        and p.n * turns < 2 * hardware.cores * config.rows * config.warps
    ):
        smaller = (
            replace(config, rows=config.rows // 2)
            if config.rows > 1
            else replace(config, warps=config.warps // 2)
        )
        config = smaller
    return config
