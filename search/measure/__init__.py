"""Build, run, verify and time candidates in child processes."""

from __future__ import annotations

from mimo_compile.search.measure.base import (
    Limits,
    Measurement,
    Measures,
    Predicts,
    Recalls,
    Timing,
)
from mimo_compile.search.measure.measurer import Measurer, runnable_here, unfit_gpu

__all__ = [
    "Limits",
    "Measurement",
    "Measurer",
    "Measures",
    "Predicts",
    "Recalls",
    "Timing",
    "runnable_here",
    "unfit_gpu",
]
