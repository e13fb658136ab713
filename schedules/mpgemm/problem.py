"""One matmul and how a kernel runs it: extents, config, packed arguments, the kernel's name."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from mimo_compile.ir.formats import WeightFormat, parse_weight_format
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Schedule
from mimo_compile.schedules.emit.layout import ROWS, CodeLayout

PARALLEL_BYTES = 320 << 10
"""Weights below this are read before a second thread has woken up."""


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """Knobs of a tiled matmul."""

    rows: int = 4
    """Blocks of 16 weight rows in a register tile."""
    tokens: int = 1
    """Tokens in a register tile."""
    chunk: int = 1
    """Row tiles that one task does."""
    order: str = "rows"
    """Outer loop of a task: ``rows`` (weights stay in cache) or ``tokens`` (activations do)."""
    prefetch: int = 0
    """Distance of prefetches in cache lines, 0 for none."""
    unroll: int = 1
    """Steps along K in the inner loop's body."""
    parallel: bool = False
    """Spread the tasks over threads."""
    dot: str = ""
    """Name of the way to multiply (`emit.dot.DOTS`); empty where there is only one."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One matmul, its parameters resolved."""

    m: int
    n: int
    k: int
    fmt: WeightFormat
    act: str
    scale_dtype: str
    bias: bool

    @classmethod
    def of(cls, workload: Workload) -> Problem:
        """Read a workload of the op ``mpgemm``."""
        p = get_op("mpgemm").full(workload)
        fmt = parse_weight_format(p["w"])
        return cls(p["m"], p["n"], p["k"], fmt, p["a"], p["s"], bool(p["bias"]))

    @property
    def layout(self) -> CodeLayout:
        """Layout of integer codes."""
        return CodeLayout(self.fmt, self.n, self.k)

    @property
    def row_blocks(self) -> int:
        """Blocks of 16 weight rows."""
        return -(-self.n // ROWS)

    def args(self) -> tuple[Arg, ...]:
        """Return the kernel's parameters: x, packed weights, bias, y."""
        out = [Arg("x", "input", (self.m, self.k), "float32")]
        if self.fmt.is_float:
            dtype = "uint16" if self.fmt.bits == 16 else "float32"
            out.append(Arg("w", "weight", (self.row_blocks, self.k, ROWS), dtype))
        else:
            out += self.layout.args("", (), self.scale_dtype)
        if self.bias:
            out.append(Arg("bias", "weight", (self.row_blocks, ROWS), "float32"))
        return (*out, Arg("y", "output", (self.m, self.n), "float32"))

    def packed_bytes(self) -> float:
        """Bytes of all packed weights."""
        return float(sum(arg_bytes(a) for a in self.args() if a.role == "weight"))


def kernel_name(schedule: Schedule, workload: Workload, config: Any, hardware: Hardware) -> str:
    """Return a C identifier: the workload in words, then a hash of all that shapes the code."""
    words = re.sub(r"[^a-zA-Z0-9]+", "_", re.sub(r"[a-z]+=(?=[a-z])|=", "", str(workload)))
    facts = [
        schedule.name, schedule.version, str(workload), schedule.config_to_json(config),
        sorted(hardware.features),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return f"{words}__{digest}"


def arg_bytes(arg: Arg) -> int:
    """Return the size of an argument."""
    return math.prod(arg.shape) * np.dtype(arg.dtype).itemsize
