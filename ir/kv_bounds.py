"""How far caches in groups of few bits may be from their reference, whose rows are a few roundings off.

Scales, zero points and codes are steps of what is appended: a row within its error gives the same ones, or
those next to them where a number lies next to the middle between two. Each bound is an interval: of the two
`kv_groups.ends`, of what they are rounded to, of the quotients that codes are.

The ends of codes of one bit are sums, so a kernel adds roundings of its own. With ``n`` numbers ``x``, each
within ``e`` of the reference, and ``B`` the mean of ``|x|``, an exact mean is off by at most ``mean e``, the
mean distance from it by ``2 mean e``, and each end by ``3 mean e``. A float32 sum in any order is off by
``(n - 1) u`` of the sum of magnitudes: so the mean by ``(n + 1) u B``, each distance by that and ``2 u B``,
the mean distance (at most ``2 B``) by ``(3 n + 5) u B``, and an end, a sum of both with one more rounding, by
``(4 n + 9) u B``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mimo_compile.ir.kv_groups import (
    STATES,
    GroupedFormat,
    ends,
    group_slots,
    half,
    quantise_keys,
    quantise_values,
)
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.ops.numerics import F16_MOST, U32

Interval = tuple[Tensor, Tensor]
"""The least and the greatest that a number may be."""


def allowed(
    expected: Mapping[str, Array], start: int, valid: int, error: float, fmt: GroupedFormat
) -> dict[str, Array]:
    """Return how far each array of an appended cache may be from the reference.

    Args:
        expected: The reference, whose new rows are float64.
        start: Position of the first new row.
        valid: New rows.
        error: By how much an element of a new row may be off; kept rows are exact.
        fmt: The format.

    Returns:
        For rows that: nothing but for new ones. For a group that was quantised: what scales and codes of
        rows within the error differ from those expected; nothing for others.
    """
    out = {name: np.zeros(expected[name].shape) for name in STATES}
    tail = expected["k_tail"].shape[0]
    new = np.arange(start, start + valid) % tail
    out["k_tail"][new], out["v_tail"][new] = error, error
    for index in range(start // fmt.group, (start + valid) // fmt.group):
        own = group_slots(index, tail, fmt)
        rows = slice(index * fmt.group, (index + 1) * fmt.group)
        near = {n: torch.from_numpy(expected[n][own]) for n in ("k_tail", "v_tail")}
        off = {n: torch.from_numpy(out[n][own]) for n in near}
        codes, params = quantise_keys(near["k_tail"], fmt)
        spread = _spread(near["k_tail"], off["k_tail"], codes, params[0], 0, fmt)
        out["k_cache"][rows], out["k_scale"][index] = spread
        columns = [
            slice(i, i + fmt.columns) for i in range(0, near["v_tail"].shape[2], fmt.columns)
        ]
        codes, params = quantise_values(near["v_tail"], fmt)
        for i, part in enumerate(columns):
            spread = _spread(
                near["v_tail"][..., part], off["v_tail"][..., part], codes[..., part],
                params[..., i, :], 2, fmt,
            )  # fmt: skip
            out["v_cache"][rows, :, part], out["v_scale"][rows, :, i] = spread
    return out


def _between(x: Tensor, off: Tensor, over: int, fmt: GroupedFormat) -> tuple[Interval, Interval]:
    """Return where both ends of values within ``off`` of ``x`` may lie."""
    if fmt.bits > 1:
        least, most = ends(x - off, over, fmt), ends(x + off, over, fmt)
        return (least[0], most[0]), (least[1], most[1])
    size = (x.abs() + off).clamp(max=F16_MOST).mean(over)
    slack = 3 * off.mean(over) + (4 * x.shape[over] + 9) * U32 * size
    low, high = ends(x, over, fmt)
    return (low - slack, low + slack), (high - slack, high + slack)


def _spread(
    x: Tensor, off: Tensor, codes: Tensor, params: Tensor, over: int, fmt: GroupedFormat
) -> tuple[Array, Array]:
    """Return how far codes and (scale, zero) may lie from these, for values within ``off`` of ``x``."""
    levels, (first, last) = fmt.levels, _between(x, off, over, fmt)
    zeros = half(first[0]).double(), half(first[1]).double()
    steps = [
        half((top - zero).clamp(min=0) / levels * (1 + slack)).double()
        for top, zero, slack in ((last[0], zeros[1], -(2.0**-20)), (last[1], zeros[0], 2.0**-20))
    ]
    scale, zero = params.double().unbind(-1)
    wide = torch.stack(
        [torch.maximum(steps[1] - scale, scale - steps[0]),
         torch.maximum(zeros[1] - zero, zero - zeros[0])], -1
    )  # fmt: skip
    wide = wide.clamp(min=0)

    def code(value: Tensor, base: Tensor, step: Tensor, slack: float) -> Tensor:
        base, step = base.unsqueeze(over), step.unsqueeze(over)
        exact = (value - base) / torch.where(step > 0, step, 1.0)
        exact = torch.where(step > 0, exact, math.copysign(math.inf, slack))
        return (exact * (1 + slack * 2.0**-20) + slack * 1e-5).round().clamp(0, levels)

    lowest = code(x - off, zeros[1], steps[1], -1.0)
    highest = code(x + off, zeros[0], steps[0], 1.0)
    known = codes.double()
    reach = torch.maximum(highest - known, known - lowest).clamp(min=0)
    # groups that are constant either way have the code 0
    still = (steps[1] == 0).unsqueeze(over)
    return torch.where(still, 0.0, reach).numpy(), wide.numpy()
