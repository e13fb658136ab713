"""The launches of a matmul by matrix units around its main one: x as an operand, and sums of pieces of K."""

from __future__ import annotations

from dataclasses import dataclass

from mimo_compile.ir.ops.base import Arg
from mimo_compile.schedules.cuda.code import DeviceCode, Launch
from mimo_compile.schedules.cuda.template import Constant
from mimo_compile.schedules.mpgemm.cuda_base import CudaProblem

ENDS_THREADS = 256
"""Of the launches before and after the main one; as in `device/gemm_ends.cuh`."""


@dataclass(frozen=True, slots=True)
class Ends:
    """What `device/gemm_ends.cuh` makes, of one problem."""

    problem: CudaProblem
    split: int
    """Pieces of K."""

    @property
    def int8(self) -> bool:
        """True if the matrix units multiply int8, else bfloat16."""
        return self.problem.acts.is_int8

    @property
    def element(self) -> int:
        """Bytes of an element of both operands."""
        return 1 if self.int8 else 2

    @property
    def k_padded(self) -> int:
        """Columns of x as an operand."""
        return self.problem.weight.k_padded

    @property
    def unpacked(self) -> bool:
        """True for codes that the kernel unpacks, else weights are operands as they lie."""
        weight = self.problem.weight
        return weight.bits < 8 or not (weight.fmt.is_float or self.int8)

    @property
    def row_scales(self) -> bool:
        """True if the last step multiplies by the weights' scales: a row has one, and no zero point."""
        fmt = self.problem.fmt
        return not (fmt.is_float or fmt.has_zero or self.problem.w_group)

    @property
    def sum_dtype(self) -> str:
        """Of a sum: integers are exact."""
        return "int32" if self.x_scaled and self.row_scales else "float32"

    @property
    def x_scaled(self) -> bool:
        """True if the last step multiplies by the scales of x: there is one for each row."""
        return self.int8 and not self.problem.x_group

    def scratch(self) -> dict[str, Arg]:
        """Return what lies between launches: x as an operand, its scales, sums of pieces."""
        p = self.problem
        out = [Arg("x_operand", "state", (p.m, self.k_padded), "int8" if self.int8 else "uint16")]
        if self.int8:
            out.append(Arg("x_scale", "state", (p.m, p.acts.groups(p.k)), "float32"))
        if self.split > 1:
            out.append(Arg("parts", "state", (self.split, p.m, p.n), self.sum_dtype))
        return {arg.name: arg for arg in out}

    def constants(self) -> dict[str, Constant]:
        """Return the constants that `gemm_ends.cuh` reads."""
        grouped: dict[str, Constant] = {"X_GROUP": self.problem.x_group} if self.int8 else {}
        return (
            self.problem.constants()
            | grouped
            | {
                "ROW_BYTES": self.k_padded * self.element,
                "ELEMENT": self.element,
                "SUM": "int" if self.sum_dtype == "int32" else "float",
                "SPLIT": self.split,
                "SPLIT_K": self.split > 1,
                "INT8": self.int8,
                "X_GROUPED": self.int8 and not self.x_scaled,
                "X_SCALED": self.x_scaled,
                "FACTOR": self.problem.weight.factor(self.problem.acts.kind),
                "W_SCALED": self.row_scales,
                "X_F16": self.problem.acts.kind == "f16",
                "X_PERMUTED": self.unpacked and not self.int8,
            }
        )

    @property
    def operands(self) -> tuple[str, ...]:
        """Arguments behind ``ENDS_PARAMETERS``."""
        given = {"x_scale": self.x_scaled, "scale": self.row_scales, "bias": self.problem.bias}
        return tuple(name for name, there in given.items() if there)

    @property
    def x_operands(self) -> tuple[str, ...]:
        """Arguments of the main launch: x, and its scales where groups of columns have their own."""
        return ("x_operand", *(("x_scale",) if self.problem.x_group else ()))

    @property
    def out(self) -> str:
        """Where the main launch writes to."""
        return "parts" if self.split > 1 else "y"

    def code(self, text: str, main: Launch, expected: tuple[str, ...]) -> DeviceCode:
        """Return the code of a text whose main launch stands between the others."""
        return DeviceCode(text, self.around(main), self.scratch(), expected=expected)

    def around(self, main: Launch) -> tuple[Launch, ...]:
        """Return all launches."""
        p = self.problem
        if self.int8:
            threads = 32 if p.x_group else ENDS_THREADS
            operands = ("x", "x_operand", "x_scale")
            blocks = p.m * p.acts.groups(p.k)
            first = Launch("mpgemm_prepare", (blocks, 1, 1), threads, operands, threads // 8)
        else:
            blocks = -(-p.m * (self.k_padded // 8) // ENDS_THREADS)
            first = Launch("mpgemm_prepare", (blocks, 1, 1), ENDS_THREADS, ("x", "x_operand"))
        if self.split == 1:
            return (first, main)
        blocks = -(-p.m * p.n // ENDS_THREADS)
        last = Launch(
            "mpgemm_join", (blocks, 1, 1), ENDS_THREADS, ("parts", "y", *self.operands)
        )  # fmt: skip
        return (first, main, last)
