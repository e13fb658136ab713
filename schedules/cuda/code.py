"""CUDA code as a schedule hands it over: one text, and the launches that compute the op with it.

Extents are constants of the text, so a launch has a constant grid; lengths that change from call to call
(``pos``) are read from device memory by the kernel itself. A call is then the same list of launches each
time, without a word from the host between them, and a CUDA graph may hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mimo_compile._cuda import Launch, TensorMap
from mimo_compile.ir.ops.base import Arg


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


__all__ = ["DeviceCode", "Launch", "TensorMap"]
