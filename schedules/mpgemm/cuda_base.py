"""What matmul schedules for CUDA share: their problem, and packing."""

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
from mimo_compile.schedules.cuda.code import DeviceCode
from mimo_compile.schedules.cuda.template import Constant
from mimo_compile.schedules.mpgemm.cuda_layout import Rows
from mimo_compile.schedules.mpgemm.problem import Problem

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
    version: ClassVar[int] = 3
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
        self, workload: Workload, config: Any, hardware: Hardware, device: DeviceCode
    ) -> Kernel:
        """Return the kernel of a config's code."""
        return Kernel(
            kernel_name(self, workload, config, hardware),
            None,
            CudaProblem.of(workload).args(),
            self.work(workload, config, hardware),
            features=self.needs,
            device=device,
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
