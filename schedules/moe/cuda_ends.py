"""The launches of experts by matrix units around their two matmuls; see ``device/expert_ends.cuh``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mimo_compile.ir.ops.base import Arg
from mimo_compile.schedules.cuda.code import Launch
from mimo_compile.schedules.moe.cuda_base import CudaExperts
from mimo_compile.schedules.moe.cuda_work import SMALL_THREADS, Tiles

LISTS = ("order", "tiles", "totals")
"""Slots in the order of their experts, tiles of them, how many there are of both."""
_SMALL_SHARED = 4 * 2 * SMALL_THREADS // 32


@dataclass(frozen=True, slots=True)
class ExpertEnds:
    """What comes before, between and after the matmuls."""

    tiles: Tiles
    codes: bool
    """Whether the kernel unpacks weights, else they are operands as they lie."""

    @property
    def problem(self) -> CudaExperts:
        """What is computed."""
        return self.tiles.problem

    @property
    def int8(self) -> bool:
        """True if the matrix units multiply int8."""
        return self.problem.acts.is_int8

    @property
    def operand(self) -> str:
        """Element type of activations as operands."""
        return "int8" if self.int8 else "uint16"

    @property
    def sum_dtype(self) -> str:
        """Of a sum: integers are exact."""
        return "int32" if self.tiles.integers else "float32"

    @property
    def hidden(self) -> str:
        """Where the first matmul writes to."""
        return "hidden" if self.int8 else "hidden_operand"

    @property
    def x_scale(self) -> str:
        """Scales of the rows of x; where there are none an array that is not looked at."""
        return "x_scale" if self.int8 else "weights"

    def constants(self) -> dict[str, Any]:
        """Return the constants that ``expert_ends.cuh`` reads."""
        p = self.problem
        return p.constants() | p.format_constants() | {
            "BM": self.tiles.bm, "X_BLOCKS": self.tiles.x_blocks, "ELEMENT": self.tiles.element,
            "SUM": "int" if self.tiles.integers else "float", "SPLIT": self.tiles.split,
            "FACTOR": 2.0 ** (p.half.bits - 8) if self.int8 else 1.0, "INT8": self.int8,
            "CODES": self.codes, "X_F16": p.acts.kind == "f16",
            "W_SCALED": not p.fmt.is_float and not p.w_group,
        }  # fmt: skip

    def scratch(self) -> list[Arg]:
        """Return what lies between launches."""
        p, tiles = self.problem, self.tiles
        out = [
            Arg("x_operand", "state", (p.t, p.half.k_padded), self.operand),
            Arg("hidden_operand", "state", (p.slots, p.w2.k_padded), self.operand),
            Arg("parts", "state", (tiles.split, p.slots, p.d), self.sum_dtype),
            Arg("counts", "state", (p.e,), "int32"),
            Arg("order", "state", (p.slots,), "int32"),
            Arg("tiles", "state", (tiles.most, 4), "int32"),
            Arg("totals", "state", (2,), "int32"),
        ]
        if self.int8:
            out += [
                Arg("x_scale", "state", (p.t,), "float32"),
                Arg("hidden", "state", (p.slots, p.f), "float32"),
                Arg("hidden_scale", "state", (p.slots,), "float32"),
            ]
        return out

    def around(self, up: tuple[Launch, ...], down: Launch) -> tuple[Launch, ...]:
        """Return all launches: ``up`` ends with the first matmul, ``down`` is the second one."""
        p, tiles = self.problem, self.tiles
        first = (
            Launch(
                "experts_prepare", (tiles.x_blocks + p.e, 1, 1), SMALL_THREADS,
                ("x", "x_operand", "x_scale" if self.int8 else "parts", "ids", "counts"), _SMALL_SHARED,
            ),
            Launch(
                "experts_place", (p.e, 1, 1), SMALL_THREADS, ("ids", "counts", *LISTS), _SMALL_SHARED
            ),
        )  # fmt: skip
        quantize = Launch(
            "experts_quantize_hidden", (p.slots, 1, 1), SMALL_THREADS,
            ("order", "totals", "hidden", "hidden_operand", "hidden_scale"), _SMALL_SHARED,
        )  # fmt: skip
        scales = p.weight_names("w2_")[1], "hidden_scale" if self.int8 else "weights"
        combine = Launch(
            "experts_combine", (-(-p.t * p.d // SMALL_THREADS), 1, 1), SMALL_THREADS,
            ("parts", *scales, "ids", "weights", "y"),
        )  # fmt: skip
        return (*first, *up, *((quantize,) if self.int8 else ()), down, combine)
