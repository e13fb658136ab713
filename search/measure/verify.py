"""Decide whether a kernel's results are right: every element within its bound, NaN never."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mimo_compile.ir.ops.base import Arg

Array = npt.NDArray[Any]


def worst_ratio(
    got: Array, expected: Array, bound: Array, start: Array | None = None
) -> tuple[float, int]:
    """Return the largest ``|got - expected| / bound`` and the flat index where it stands.

    A difference where the bound is 0, a NaN or an infinity that the reference lacks count as infinite. A
    state element that the reference leaves NaN must still hold the very value of ``start``.
    """
    with np.errstate(all="ignore"):
        g, e = got.astype(np.float64), np.asarray(expected).astype(np.float64)
        error = np.abs(g - e)
        b = np.broadcast_to(bound, e.shape)
        ratio = np.where(error == 0, 0.0, np.where(b > 0, error / b, np.inf))
        ratio = np.where((g == e) & np.isinf(e), 0.0, ratio)
        ratio = np.where(np.isnan(ratio), np.inf, ratio)
        if start is not None:
            kept = np.isnan(e) & np.isnan(g) & np.isnan(start.astype(np.float64))
            ratio = np.where(kept, 0.0, ratio)
    if ratio.size == 0:
        return 0.0, 0
    at = int(ratio.argmax())
    return float(ratio.reshape(-1)[at]), at


def to_real(array: Array, arg: Arg) -> Array:
    """Return stored elements as numbers (bfloat16 arrives as uint16)."""
    if arg.dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array


def judge(
    args: tuple[Arg, ...],
    got: Mapping[str, Array],
    expected: Mapping[str, Array],
    bound: Mapping[str, Array],
    inputs: Mapping[str, Array],
) -> tuple[float, str]:
    """Compare canonical results with the reference.

    Returns:
        The worst error as a multiple of its bound, and a sentence on what is wrong ("" when all is right).
    """
    worst, message = 0.0, ""
    for arg in args:
        if arg.role != "output" and not arg.mutated:
            continue
        if arg.name not in got or got[arg.name].shape != expected[arg.name].shape:
            shape = got[arg.name].shape if arg.name in got else "missing"
            return np.inf, f"{arg.name}: {shape} instead of {expected[arg.name].shape}"
        value = to_real(got[arg.name], arg)
        start = inputs.get(arg.name) if arg.role == "state" else None
        ratio, at = worst_ratio(value, expected[arg.name], bound[arg.name], start)
        worst = max(worst, ratio)
        if ratio > 1 and not message:
            index = [int(i) for i in np.unravel_index(at, value.shape)]
            message = (
                f"{arg.name}{index} is {float(value[tuple(index)]):.9g}, expected "
                f"{float(expected[arg.name][tuple(index)]):.9g} within "
                f"{float(np.broadcast_to(bound[arg.name], value.shape)[tuple(index)]):.3g}"
            )
    return worst, message
