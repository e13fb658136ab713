"""Build, run, verify and time candidates in child processes."""

from __future__ import annotations

from mimo_compile.search.measure.measurer import (
    Limits,
    Measurement,
    Measurer,
    Measures,
    Timing,
    runnable_here,
)

__all__ = ["Limits", "Measurement", "Measurer", "Measures", "Timing", "runnable_here"]
