"""What matmul schedules for CUDA share: their problem, packing, and the launches around the main one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from mimo_compile.ir.formats import ActFormat, WeightFormat
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Schedule, kernel_name
from mimo_compile.schedules.cuda.code import DeviceCode, Launch
from mimo_compile.schedules.cuda.template import Constant
from mimo_compile.schedules.mpgemm.cuda_layout import Rows
from mimo_compile.schedules.mpgemm.problem import Problem

ENDS_THREADS = 256
"""Of the launches before and after the main one; as in `device/gemm_ends.cuh`."""
_MOST_INT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class CudaProblem:
    """One matmul whose weights lie in `Rows`."""

    m: int
    weight: Rows
    acts: ActFormat
    bias: bool

    @staticmethod
    @lru_cache(maxsize=256)
    def of(workload: Workload) -> CudaProblem:
        """Read a workload of the op ``mpgemm``."""
        p = Problem.of(workload)
        rows = Rows(p.fmt, p.n, p.k, p.weight.scale_dtype)
        return CudaProblem(p.m, rows, p.acts, p.bias)

    @property
    def n(self) -> int:
        """Rows of the weights."""
        return self.weight.n

    @property
    def k(self) -> int:
        """Columns of the weights."""
        return self.weight.k

    @property
    def fmt(self) -> WeightFormat:
        """Format of the weights."""
        return self.weight.fmt

    @property
    def w_group(self) -> int:
        """Columns of the weights that share a scale, 0 where all of a row do."""
        return self.fmt.group if 0 < self.fmt.group < self.k else 0

    @property
    def x_group(self) -> int:
        """Columns of int8 activations that share a scale, 0 where all of a row do."""
        return self.acts.group if 0 < self.acts.group < self.k else 0

    @property
    def exact(self) -> bool:
        """True if no sum of codes times int8 activations, each code moved to the top of 8 bits, overflows."""
        return 128 * 127 * self.k <= _MOST_INT

    def args(self) -> tuple[Arg, ...]:
        """Return the kernel's parameters: x, packed weights, bias, y."""
        out = [Arg("x", "input", (self.m, self.k), "float32"), *self.weight.args()]
        if self.bias:
            out.append(Arg("bias", "weight", (self.n,), "float32"))
        return (*out, Arg("y", "output", (self.m, self.n), "float32"))

    def constants(self) -> dict[str, Constant]:
        """Return the constants that the text of every kernel has."""
        return {
            "M": self.m,
            "N": self.n,
            "K": self.k,
            "SCALE": "unsigned short" if self.weight.scale_dtype == "f16" else "float",
            "BIAS": self.bias,
        }

    @property
    def scale_names(self) -> tuple[str, ...]:
        """Arguments behind the codes: scales, and zero points where there are some."""
        return ("scale", "zero")[: 1 + self.fmt.has_zero]

    @property
    def bytes(self) -> float:
        """Bytes that any kernel moves: packed weights, bias, activations, results."""
        return self.weight.bytes + 4.0 * (self.m * (self.n + self.k) + self.n * self.bias)


class CudaGemm(Schedule):
    """Base: one layout of the weights for all matmuls of GPUs."""

    op = "mpgemm"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]]
    """Features of a GPU."""

    @abstractmethod
    def takes(self, p: CudaProblem) -> bool:
        """Say whether the kernel computes a problem, on any GPU that has what it needs."""

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Weights in `Rows`, activations and results that an int counts, on a GPU that has what is needed."""
        if hardware.kind != "cuda" or hardware.missing(self.needs) or workload.op != self.op:
            return False
        p = CudaProblem.of(workload)
        if not Rows.takes(p.fmt, p.acts) or p.m * max(p.n, p.k) > _MOST_INT:
            return False
        return self.takes(p)

    def kernel(
        self,
        workload: Workload,
        config: Any,
        hardware: Hardware,
        text: str,
        ends: Ends,
        main: Launch,
        expected: tuple[str, ...],
    ) -> Kernel:
        """Return the kernel of a text whose main launch stands between its `Ends`."""
        return Kernel(
            kernel_name(self, workload, config, hardware),
            None,
            ends.problem.args(),
            self.work(workload, config, hardware),
            features=self.needs,
            device=DeviceCode(text, ends.around(main), ends.scratch(), expected=expected),
        )

    def layouts(self, workload: Workload, config: Any) -> dict[str, str]:
        """All CUDA kernels of a format read the same packed weights."""
        return {"weight": CudaProblem.of(workload).weight.layout}

    def pack(
        self, workload: Workload, config: Any, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Pack codes, scale, zero or w (those given); the bias stays as it is."""
        out = CudaProblem.of(workload).weight.pack(arrays)
        return out | {n: np.ascontiguousarray(arrays[n]) for n in ("bias",) if n in arrays}

    def unpack_weights(
        self, workload: Workload, config: Any, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Undo `pack`."""
        out = CudaProblem.of(workload).weight.unpack(arrays)
        return out | {n: arrays[n] for n in ("bias",) if n in arrays}


@dataclass(frozen=True, slots=True)
class Ends:
    """The launches of a matmul by matrix units around its main one; see `device/gemm_ends.cuh`."""

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
        return "int32" if self.int8 and self.row_scales else "float32"

    def scratch(self) -> dict[str, Arg]:
        """Return what lies between launches: x as an operand, its scales, sums of pieces."""
        p = self.problem
        out = [Arg("x_operand", "state", (p.m, self.k_padded), "int8" if self.int8 else "uint16")]
        if self.int8:
            out.append(Arg("x_scale", "state", (p.m,), "float32"))
        if self.split > 1:
            out.append(Arg("parts", "state", (self.split, p.m, p.n), self.sum_dtype))
        return {arg.name: arg for arg in out}

    def constants(self) -> dict[str, Constant]:
        """Return the constants that `gemm_ends.cuh` reads."""
        return self.problem.constants() | {
            "ROW_BYTES": self.k_padded * self.element,
            "ELEMENT": self.element,
            "SUM": "int" if self.sum_dtype == "int32" else "float",
            "SPLIT": self.split,
            "SPLIT_K": self.split > 1,
            "INT8": self.int8,
            "FACTOR": self.problem.weight.factor(self.problem.acts.kind),
            "W_SCALED": self.row_scales,
            "X_F16": self.problem.acts.kind == "f16",
            "X_PERMUTED": self.unpacked and not self.int8,
        }

    @property
    def operands(self) -> tuple[str, ...]:
        """Arguments behind ``ENDS_PARAMETERS``."""
        given = {"x_scale": self.int8, "scale": self.row_scales, "bias": self.problem.bias}
        return tuple(name for name, there in given.items() if there)

    @property
    def out(self) -> str:
        """Where the main launch writes to."""
        return "parts" if self.split > 1 else "y"

    def around(self, main: Launch) -> tuple[Launch, ...]:
        """Return all launches."""
        p = self.problem
        if self.int8:
            warps = ENDS_THREADS // 32
            operands = ("x", "x_operand", "x_scale")
            first = Launch("mpgemm_prepare", (p.m, 1, 1), ENDS_THREADS, operands, 4 * warps)
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
