"""Kernels of a few lines of CUDA text, for tests of the emulator and of the device headers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import CUDA
from mimo_compile.ir.ops.base import Arg
from mimo_compile.schedules.base import Kernel
from mimo_compile.schedules.cuda.code import DeviceCode, Launch
from mimo_compile.schedules.cuda.emulate import compiler, emulate

needs_compiler = pytest.mark.skipif(
    compiler() is None, reason="needs a C++ compiler (CXX, g++ or clang++)"
)
H200 = CUDA["cuda:sm_90a"]
Arrays = Mapping[str, np.ndarray[Any, Any]]


def kernel_of(
    text: str,
    inputs: Arrays,
    outputs: Mapping[str, tuple[tuple[int, ...], str]],
    launches: tuple[Launch, ...],
    **facts: Any,
) -> Kernel:
    """Return a kernel whose arguments are inputs (given arrays), then outputs (shape and dtype)."""
    args = [Arg(n, "input", a.shape, str(a.dtype)) for n, a in inputs.items()]
    args += [Arg(n, "output", shape, dtype) for n, (shape, dtype) in outputs.items()]
    return Kernel("sample", None, tuple(args), Counts(), device=DeviceCode(text, launches, **facts))


def run(
    text: str,
    symbol: str,
    inputs: Arrays,
    outputs: Mapping[str, tuple[tuple[int, ...], str]],
    threads: int = 32,
    shared_bytes: int = 0,
    *,
    operands: tuple[Any, ...] | None = None,
    order: int = 0,
    grid: int = 1,
) -> dict[str, np.ndarray[Any, Any]]:
    """Emulate one launch; its operands are the inputs and outputs in order, unless others are given."""
    operands = (*inputs, *outputs) if operands is None else operands
    launch = Launch(symbol, (grid, 1, 1), threads, operands, shared_bytes)
    return emulate(kernel_of(text, inputs, outputs, (launch,)), H200, inputs, order=order)


def bf16_bits(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Round float32 to bfloat16, ties to even; returns the bits as uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def bf16_values(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return what bfloat16 bits mean, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
