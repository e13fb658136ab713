"""CUDA code as a schedule hands it over: one text, and the launches that compute the op with it.

Extents are constants of the text, so a launch has a constant grid; lengths that change from call to call
(``pos``) are read from device memory by the kernel itself. A call is then the same list of launches each
time, without a word from the host between them, and a CUDA graph may hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mimo_compile.ir.ops.base import Arg


@dataclass(frozen=True, slots=True)
class TensorMap:
    """A matrix in device memory as the tensor memory accelerator reads it, box by box (row-major).

    The parameter of the kernel is ``const __grid_constant__ CUtensorMap``. What a box holds outside the
    matrix is zero. ``swizzle``: bytes of the pattern in shared memory, 0 for none; a row of a box is as long.
    A box begins at a multiple of 128 bytes of shared memory, of 1024 with a swizzle of 128; which 16 bytes
    change places goes by the address there, not by the row of the box.
    """

    array: str
    """Name of an argument or of a scratch array."""
    dtype: str
    """Of one element: ``bfloat16``, ``float16``, ``float8_e4m3fn``, ``int8``, ``uint8``, ``float32``."""
    rows: int
    columns: int
    box_rows: int
    box_columns: int
    swizzle: Literal[0, 32, 64, 128] = 128


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a ``__global__`` function."""

    symbol: str
    """An ``extern "C"`` name in the text."""
    grid: tuple[int, int, int]
    threads: int
    """Of a block, in x."""
    operands: tuple[str | int | float | TensorMap, ...]
    """Parameters in order: the name of an argument or scratch array (a pointer), an int32, a float32, or a
    tensor map."""
    shared_bytes: int = 0
    """Dynamic shared memory of a block."""
    cluster: int = 1
    """Blocks of a cluster, in x."""


@dataclass(frozen=True, slots=True)
class DeviceCode:
    """The code of one kernel of ours: possibly several launches, one after the other on one stream."""

    text: str
    """CUDA C++; includes of `schedules/cuda/device` are by name (``#include "mma.cuh"``)."""
    launches: tuple[Launch, ...]
    scratch: Mapping[str, Arg] = field(default_factory=dict)
    """Arrays in device memory that the launches share within a call; their contents do not outlive it."""
    zeroed: frozenset[str] = frozenset()
    """Scratch arrays that are zero before the first launch of each call (counters, say)."""
    expected: tuple[str, ...] = ()
    """Prefixes of SASS opcodes that must occur, e.g. ``HGMMA``; spills never may."""
