"""What expert schedules for CUDA share: their problem, and how all experts' matrices are packed.

Each matrix lies in `Rows`, as one of a plain matmul does, gate and up each by itself: ``w13_* [E, 2, F, D]``,
``w2_* [E, D, F]``, with rows and columns padded.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from mimo_compile.ir.formats import (
    ActFormat,
    WeightFormat,
    parse_act_format,
    parse_weight_format,
)
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Schedule, kernel_name
from mimo_compile.schedules.cuda.code import DeviceCode
from mimo_compile.schedules.cuda.template import Constant
from mimo_compile.schedules.mpgemm.cuda_layout import Rows

_MOST_INT = 2**31 - 1
_MOST_ELEMENTS = _MOST_INT - 256
"""Of an array that threads share: those behind its end, up to the end of their block, have numbers, too."""
MOST_GRID = 65535
"""Blocks of a launch in y."""


@dataclass(frozen=True, slots=True)
class CudaExperts:
    """One expert layer whose weights lie in `Rows`."""

    t: int
    e: int
    k: int
    half: Rows
    """Gate, and up, of one expert: ``[F, D]``."""
    w2: Rows
    """Down of one expert: ``[D, F]``."""
    acts: ActFormat

    @staticmethod
    @lru_cache(maxsize=256)
    def of(workload: Workload) -> CudaExperts:
        """Read a workload of the op ``moe``."""
        p = get_op("moe").full(workload)
        fmt = parse_weight_format(p["w"])
        half, w2 = Rows(fmt, p["f"], p["d"], p["s"]), Rows(fmt, p["d"], p["f"], p["s"])
        return CudaExperts(p["t"], p["e"], p["k"], half, w2, parse_act_format(p["a"]))

    @property
    def d(self) -> int:
        """Width of a token."""
        return self.half.k

    @property
    def f(self) -> int:
        """Width between the matmuls."""
        return self.w2.k

    @property
    def fmt(self) -> WeightFormat:
        """Format of the weights."""
        return self.half.fmt

    @property
    def slots(self) -> int:
        """Pairs of token and choice."""
        return self.t * self.k

    @property
    def hit(self) -> float:
        """Experts that are chosen, expected under uniform routing."""
        return self.e * (1 - (1 - self.k / self.e) ** self.t)

    @property
    def w_group(self) -> int:
        """Columns of the weights that share a scale, 0 where all of a row do in both matrices."""
        return self.fmt.group if 0 < self.fmt.group < max(self.d, self.f) else 0

    @property
    def x_group(self) -> int:
        """Columns of int8 activations that share a scale, 0 where all of a row do in both matmuls."""
        return self.acts.group if 0 < self.acts.group < max(self.d, self.f) else 0

    @property
    def exact(self) -> bool:
        """True if no sum of codes times int8 activations, each code moved to the top of 8 bits, overflows."""
        return 128 * 127 * max(self.d, self.f) <= _MOST_INT

    @property
    def expert_bytes(self) -> float:
        """Packed bytes of one expert."""
        return 2 * self.half.bytes + self.w2.bytes

    def matrices(self) -> tuple[tuple[str, tuple[int, ...], Rows], ...]:
        """Return prefix of the arguments, leading extents and layout of both."""
        return ("w13_", (self.e, 2), self.half), ("w2_", (self.e,), self.w2)

    def args(self) -> tuple[Arg, ...]:
        """Return the kernel's parameters: x, ids, weights, packed w13 and w2, y."""
        packed = [
            replace(arg, name=prefix + arg.name, shape=(*lead, *arg.shape))
            for prefix, lead, rows in self.matrices()
            for arg in rows.args()
        ]
        return (
            Arg("x", "input", (self.t, self.d), "float32"),
            Arg("ids", "input", (self.t, self.k), "int32"),
            Arg("weights", "input", (self.t, self.k), "float32"),
            *packed,
            Arg("y", "output", (self.t, self.d), "float32"),
        )

    def weight_names(self, prefix: str) -> tuple[str, str]:
        """Return the names of a matrix's numbers and scales; of floats one that is not looked at."""
        return (f"{prefix}w", "x") if self.fmt.is_float else (f"{prefix}codes", f"{prefix}scale")

    def constants(self) -> dict[str, int]:
        """Return the constants that the text of every kernel has."""
        return {
            "T": self.t, "E": self.e, "TOPK": self.k, "SLOTS": self.slots, "D": self.d, "F": self.f,
            "D_PADDED": self.half.k_padded, "F_PADDED": self.w2.k_padded,
            "D_ROWS": self.w2.n_padded, "F_ROWS": self.half.n_padded,
        }  # fmt: skip

    def format_constants(self) -> dict[str, Constant]:
        """Return the constants of kernels that read codes and scales."""
        return self.half.constants(self.acts.kind) | {
            "W_GROUP": self.w_group,
            "SCALE": "unsigned short" if self.half.scale_dtype == "f16" else "float",
        }  # fmt: skip


class CudaMoe(Schedule):
    """Base: one layout of the weights for all expert layers on GPUs."""

    op = "moe"
    needs: ClassVar[frozenset[str]]
    """Features of a GPU."""

    @abstractmethod
    def takes(self, p: CudaExperts) -> bool:
        """Say whether the kernel computes a problem, on any GPU that has what it needs."""

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Weights in `Rows`, no zero points or books, on a GPU that can; an int counts slots and rows."""
        if hardware.kind != "cuda" or hardware.missing(self.needs) or workload.op != self.op:
            return False
        p = CudaExperts.of(workload)
        if not Rows.takes(p.fmt, p.acts) or p.fmt.has_zero or p.half.is_book:
            return False
        if p.slots * max(p.d, p.f) > _MOST_ELEMENTS:
            return False
        return self.takes(p)

    def kernel(
        self, workload: Workload, config: Any, hardware: Hardware, device: DeviceCode
    ) -> Kernel:
        """Return the kernel of a config's code."""
        return Kernel(
            kernel_name(self, workload, config, hardware),
            None,
            CudaExperts.of(workload).args(),
            self.work(workload, config, hardware),
            features=self.needs,
            device=device,
        )

    def layouts(self, workload: Workload, config: Any) -> dict[str, str]:
        """All CUDA kernels of a format read the same packed weights."""
        return {"weight": CudaExperts.of(workload).half.layout}

    def pack(
        self, workload: Workload, config: Any, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Pack the experts' matrices that are given."""
        out: dict[str, Array] = {}
        for prefix, lead, rows in CudaExperts.of(workload).matrices():
            for arg in rows.args():
                if (name := prefix + arg.name) in arrays:
                    given = arrays[name].reshape(*lead, rows.n, -1)
                    out[name] = np.empty((*lead, *arg.shape), arg.dtype)
                    for at in np.ndindex(*lead):
                        out[name][at] = rows.pack({arg.name: given[at]})[arg.name]
        return out

    def unpack_weights(
        self, workload: Workload, config: Any, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Undo `pack`."""
        out: dict[str, Array] = {}
        for prefix, lead, rows in CudaExperts.of(workload).matrices():
            for arg in rows.args():
                if (name := prefix + arg.name) in arrays:
                    each = [
                        rows.unpack({arg.name: arrays[name][at]})[arg.name]
                        for at in np.ndindex(*lead)
                    ]
                    whole = np.stack(each)  # the matrices of an expert one below the other
                    out[name] = whole.reshape(lead[0], -1, whole.shape[-1])
        return out
