"""Round-to-nearest weight quantisers: a real matrix in, its canonical `QuantTensor` out.

Symmetric ``wN``: ``code = round(w / scale) + 2**(N-1)``, half to even, with the group's
``scale = absmax / (2**(N-1) - 1)``; ``w1``: the sign, with ``scale = 2 mean |w|``. Asymmetric ``wNz``: the
group's range, stretched to hold 0, is cut into ``2**N - 1`` steps and the zero point is an integer. Ternary
``w1.58``: BitNet's absmean, ``code = clip(round(w * (1/gamma)), -1, 1) + 1`` with ``gamma = mean |w|``.
Codebooks: the nearest value, with one scale (``nf4``) or one for each sign (``anf4``, AFPQ). ``fp8b128``: the
nearest E4M3 number, one scale for 128 x 128 weights. Complex: the nearest phase (see `complex`). Every
scale but that of fp8 is representable in float16; a group of zeros gets scale 0.

The search (default for four bits and less) tries a few clipped scales, for symmetric integer codes of both
signs with a refit to the codes by least squares, and keeps the one with the smallest squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mimo_compile.errors import MimoError, UsageError
from mimo_compile.ir.formats import (
    GROUP_TENSOR,
    QuantScheme,
    QuantTensor,
    WeightFormat,
    parse_act_format,
    parse_weight_format,
)
from mimo_compile.quantize import codebook, integer
from mimo_compile.quantize.complex import quantize_real

__all__ = ["check_scheme", "each_block", "head_format", "own_threads", "quantize"]

_CHUNK = 1 << 18
"""Elements handled at once, so that temporaries stay in the second-level cache."""
_FP8_ROWS = 128
"""Rows that share a scale of ``fp8b128``."""


def check_scheme(scheme: QuantScheme) -> None:
    """Refuse schemes that no quantiser here can produce.

    Raises:
        UsageError: complex weights that real ones cannot become, or activations that its weights cannot have.
    """
    fmt = scheme.weight
    if fmt is not None and fmt.family == "complex" and fmt.terms == 1:
        raise UsageError(
            f"{fmt} holds weights of a model that was trained with complex ones",
            remedy="use complex2wl or complex2wl2 for real weights",
        )
    if fmt is not None and fmt.family == "complex" and parse_act_format(f"a{scheme.act}").group > 0:
        raise UsageError(
            f"{fmt} has no groups of activations (--quant {scheme})", remedy=f"use {fmt}a8"
        )


def head_format(scheme: QuantScheme) -> WeightFormat | None:
    """Return the format of the output projection: never below four bits, 8-bit rows instead; None: float."""
    if scheme.weight is not None and scheme.weight.bits < 4:
        return parse_weight_format("w8")
    return scheme.codes


def quantize(
    weight: Tensor | npt.NDArray[Any],
    fmt: WeightFormat,
    *,
    search: bool | None = None,
    what: str = "weight",
) -> QuantTensor:
    """Quantise a matrix.

    Args:
        weight: ``[N, K]``, any float dtype; read in float32.
        fmt: a quantised format.
        search: choose scales by squared error instead of by the largest magnitude; None: for at most
            four bits. Ternary, 1-bit, fp8 and complex codes and scales of a whole tensor are never
            searched.
        what: name of the matrix for errors.

    Returns:
        Codes, scale and zero (asymmetric formats only) as `ir.formats` says.

    Raises:
        UsageError: the format has no quantiser, or the weight is no matrix.
        MimoError: NaN, infinity, or values too large for a float16 scale.
    """
    if fmt.is_float:
        raise UsageError(f"{fmt} is no quantised format")
    check_scheme(QuantScheme(fmt))
    x = torch.from_numpy(weight) if isinstance(weight, np.ndarray) else weight.detach()
    if x.dim() != 2 or 0 in x.shape:
        raise UsageError(f"{what}: expected a matrix to quantise, got shape {tuple(x.shape)}")
    if fmt.family == "complex":
        return quantize_real(x, fmt, what)
    n, k = x.shape
    groups, size = fmt.groups(k), fmt.group_size(k)
    codes = torch.empty((n, k), dtype=torch.uint8)
    scale = torch.empty(fmt.scale_shape(n, k), dtype=torch.float32)
    zero = torch.empty((n, groups), dtype=torch.float32) if fmt.has_zero else None
    step = max(1, _CHUNK // k)
    if fmt.family == "fp8":
        step = -(-step // _FP8_ROWS) * _FP8_ROWS
    wide = fmt.group != GROUP_TENSOR and (fmt.bits <= 4 if search is None else search)
    whole: Tensor | None = None

    def block(row: int) -> None:
        part = x[row : row + step].to(torch.float32)
        if groups * size != k:
            part = torch.nn.functional.pad(part, (0, groups * size - k))
        part = part.reshape(-1, groups, size)
        stats = integer.group_stats(part, k) if whole is None else whole
        if not bool(torch.isfinite(stats).all()):
            raise MimoError(f"{what} holds NaN or infinity, which cannot be quantised")
        if fmt.is_integer:
            q, s, z = integer.quantize_rows(part, stats, fmt, wide, what)
        else:
            q, s = codebook.quantize_rows(part, stats, fmt, wide, what, _FP8_ROWS)
            z = None
        codes[row : row + step] = q.reshape(-1, groups * size)[:, :k].to(torch.uint8)
        scale[row : row + step] = s
        if zero is not None and z is not None:
            zero[row : row + step] = z

    with own_threads() as threads:
        if fmt.group == GROUP_TENSOR:
            whole = _tensor_stats(x, step)
        each_block(block, range(0, n, step), threads)
    return QuantTensor(fmt, codes.numpy(), scale.numpy(), None if zero is None else zero.numpy())


@contextmanager
def own_threads() -> Iterator[int]:
    """Keep every torch operation on its calling thread; yields how many threads torch had.

    Splitting blocks of rows between threads, and not each operation, spares a barrier per operation,
    which on a busy machine costs a hundred times the operation itself.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def each_block(work: Callable[[int], None], rows: range, threads: int) -> None:
    """Call ``work`` for every block of rows; the first failure is raised."""
    if len(rows) < 4 or threads == 1:
        for row in rows:
            work(row)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, rows):
            pass


def _tensor_stats(x: Tensor, step: int) -> Tensor:
    """Return the same of the whole matrix, ``[3, 1, 1]``; the mean is summed in float64."""
    low, high, total = [], [], torch.zeros((), dtype=torch.float64)
    for part in x.split(step):
        least, most = torch.aminmax(part.to(torch.float32))
        low.append(least)
        high.append(most)
        total += part.to(torch.float64).abs().sum()
    mean = (total / x.numel()).to(torch.float32)
    stats = [torch.stack(low).amin().clamp_max(0), torch.stack(high).amax().clamp_min(0), mean]
    return torch.stack(stats)[:, None, None]
