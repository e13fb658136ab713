"""Experts of few tokens on GPUs, without matrix units: only what the chosen ones have is read.

Each slot (token and choice) multiplies with its expert's matrices by itself, as `mpgemm.cuda_gemv` does with
one token; slots of one expert meet its bytes in L2. Float weights that no matrix unit takes as they are have
this kernel for any number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from mimo_compile.ir.counts import Counts, in_turn
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Arg
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Space
from mimo_compile.schedules.cuda.code import DeviceCode, Launch
from mimo_compile.schedules.cuda.limits import fits
from mimo_compile.schedules.cuda.template import rendered
from mimo_compile.schedules.moe.cuda_base import MOST_GRID, CudaExperts, CudaMoe
from mimo_compile.schedules.moe.cuda_mma import takes_tiles
from mimo_compile.schedules.mpgemm.cuda_gemv import unpacking
from mimo_compile.schedules.mpgemm.cuda_layout import PIECE, ROWS

MOST_TOKENS = 8
_MOST_WARPS = 16


@dataclass(frozen=True, slots=True)
class MoeGemvConfig:
    """Knobs of `CudaMoeGemv`."""

    rows: int = 2
    """Rows of a matrix that a warp has at a time: they share what is loaded of the activations."""
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


class CudaMoeGemv(CudaMoe):
    """Up to 8 tokens, or any number of them with floats that `moe.cuda_mma` does not take; any GPU."""

    name = "moe.cuda_gemv"
    version: ClassVar[int] = 2
    config = MoeGemvConfig
    needs = frozenset({"cuda"})

    def takes(self, p: CudaExperts) -> bool:
        """Codes without zero points, with int8 activations sums within 32 bits; all floats."""
        if p.slots > MOST_GRID or (p.acts.is_int8 and not p.exact):
            return False
        return p.t <= MOST_TOKENS or (p.fmt.is_float and not takes_tiles(p))

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Rows and warps of a block, how columns are shared, loads in flight."""
        p = CudaExperts.of(workload)

        def legal(c: MoeGemvConfig) -> bool:
            return (
                c.rows <= ROWS
                and c.rows * c.warps < 2 * max(p.d, p.f)
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
        return Space(MoeGemvConfig, knobs, _default(p, hardware), legal)

    def lower(self, workload: Workload, config: MoeGemvConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        p = CudaExperts.of(workload)
        grouped = bool(p.w_group or p.x_group)
        int8 = p.acts.is_int8
        constants = p.constants() | p.format_constants() | {
            "FACTOR": p.half.factor(p.acts.kind), "M": 1, "X_GROUP": p.x_group, "ROWS": config.rows,
            "WARPS": config.warps, "SPLIT": config.split, "UNROLL": config.unroll,
            "TOTAL": "int" if int8 and not grouped else "float", "DOT": int8, "W_FLOAT": p.fmt.is_float,
            "W_F16": p.fmt.name == "f16", "ROUND_BF16": p.acts.kind == "bf16",
            "ROUND_F16": p.acts.kind == "f16",
        }  # fmt: skip
        x = ("x_codes", "x_scale") if int8 else ("x",)
        between = ("hidden_codes", "hidden_scale") if int8 else ("hidden",)
        each = config.rows * config.warps
        up = Launch(
            "experts_up",
            (-(-p.f // each), p.slots, 1),
            config.threads,
            (*p.weight_names("w13_"), *x, "ids", "hidden"),
            4 * 2 * each * config.split,
        )
        down = Launch(
            "experts_down",
            (-(-p.d // each), p.t, 1),
            config.threads,
            (*p.weight_names("w2_"), *between, "ids", "weights", "y"),
            4 * p.k * each * config.split,
        )
        launches: tuple[Launch, ...] = (up, down)
        scratch = [Arg("hidden", "state", (p.slots, p.f), "float32")]
        if int8:
            groups, groups2 = p.acts.groups(p.d), p.acts.groups(p.f)
            threads = 32 if p.x_group else 256
            first = Launch(
                "experts_quantize", (p.t * groups, 1, 1), threads, ("x", *x), threads // 8
            )
            middle = Launch(
                "experts_quantize_hidden",
                (p.slots * groups2, 1, 1),
                threads,
                ("ids", "hidden", *between),
                threads // 8,
            )
            launches = (first, up, middle, down)
            scratch += [
                Arg("x_codes", "state", (p.t, p.half.k_padded), "int8"),
                Arg("x_scale", "state", (p.t, groups), "float32"),
                Arg("hidden_codes", "state", (p.slots, p.w2.k_padded), "int8"),
                Arg("hidden_scale", "state", (p.slots, groups2), "float32"),
            ]
        text = rendered(Path(__file__).with_suffix(".cu"), constants)
        expected = ("IDP",) if int8 else ("FFMA",) if p.fmt.is_float else ("LOP3", "FFMA")
        code = DeviceCode(text, launches, {a.name: a for a in scratch}, expected=expected)
        return self.kernel(workload, config, hardware, code)

    def work(self, workload: Workload, config: MoeGemvConfig, hardware: Hardware) -> Counts:
        """Padded products; weights from memory once for each expert that uniform routing hits."""
        p = CudaExperts.of(workload)
        each, int8 = config.rows * config.warps, p.acts.is_int8
        blocks13, blocks2 = -(-p.f // each), -(-p.d // each)
        weights13 = 2.0 * p.slots * blocks13 * each * p.half.k_padded
        weights2 = float(p.slots * blocks2 * each * p.w2.k_padded)
        x, hidden, y = 4.0 * p.t * p.d, 4.0 * p.slots * p.f, 4.0 * p.t * p.d
        ids = 4.0 * p.slots
        x_row = p.half.k_padded + 4.0 * p.acts.groups(p.d) if int8 else 4.0 * p.d
        hidden_row = p.w2.k_padded + 4.0 * p.acts.groups(p.f) if int8 else 4.0 * p.f
        bytes13, bytes2 = 2 * p.half.bytes, p.w2.bytes

        def products(amount: float) -> dict[str, float]:
            if int8:
                return {"dot_i8": amount, "unpack_u8": amount if p.half.bits < 8 else 0.0}
            if p.fmt.is_float:
                return {"fma_f32": amount}
            each = unpacking(p.half)
            return {"fma_f32": amount, **{kind: n * amount for kind, n in each.items()}}

        up = Counts(
            {**products(weights13), "exp_f32": float(p.slots * p.f)},
            {
                "dram": p.hit * bytes13 + (0.0 if int8 else x) + ids,
                "l2": p.slots * (bytes13 + blocks13 * x_row) + ids + hidden,
            },
            name="up",
        )
        down = Counts(
            products(weights2),
            {
                "dram": p.hit * bytes2 + y + ids,
                "l2": p.slots * (bytes2 + blocks2 * hidden_row) + y + ids,
            },
            name="down",
        )
        if not int8:
            return in_turn(up, down)
        codes, codes2 = p.t * x_row, p.slots * hidden_row
        first = Counts(
            {"int_op": 6.0 * p.t * p.d}, {"dram": x, "l2": 2 * x + codes}, name="quantize"
        )
        middle = Counts(
            {"int_op": 6.0 * p.slots * p.f}, {"l2": 2 * hidden + codes2}, name="quantize_hidden"
        )
        return in_turn(first, up, middle, down)


def _vectors(p: CudaExperts) -> int:
    """Return the pieces of 16 bytes of the longer rows."""
    return max(p.half.row_bytes, p.w2.row_bytes) // PIECE


def _shared(p: CudaExperts, config: MoeGemvConfig) -> int:
    """Return the bytes of a block's sums: of gate and up, or of all of a token's choices."""
    return 4 * max(2, p.k) * config.warps * config.split * config.rows


def _default(p: CudaExperts, hardware: Hardware) -> MoeGemvConfig:
    """Return a config whose blocks fill the GPU twice where rows are enough for it. Not measured."""
    split = max(s for s in (1, 2, 4) if s == 1 or 32 * s <= _vectors(p))
    config = MoeGemvConfig(2, 4, split)
    rows = min(p.d * p.t, p.f * p.slots)
    while config.rows * config.warps > 1 and (
        config.rows * config.warps >= 2 * max(p.d, p.f)
        or rows < 2 * hardware.cores * config.rows * config.warps
    ):
        smaller = (
            replace(config, rows=1) if config.rows > 1 else replace(config, warps=config.warps // 2)
        )
        config = smaller
    return config
