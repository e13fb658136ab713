"""GPTQ (arXiv 2210.17323): codes chosen column by column, each column's error made good by those after it.

The inner quantiser is any of ours but the complex ones. Groups of columns take their scales when the
loop arrives at them, from weights that already carry the errors of the columns before; scales of rows, of
the tensor and of fp8 blocks are fixed first (those of the tensor by a search). In the end all scales of a
row are refitted to its codes by least squares in the norm of the inputs, and a row that
round-to-nearest serves better keeps that: the error in this norm is never larger than round-to-nearest's.
Columns keep their order (no act-order), so kernels need no permutation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mimo_compile.errors import UsageError
from mimo_compile.ir.formats import GROUP_TENSOR, QuantTensor, WeightFormat
from mimo_compile.ir.ops.numerics import real_matrix
from mimo_compile.quantize import each_block, own_threads, quantize
from mimo_compile.quantize.codebook import Book
from mimo_compile.quantize.codebook import quantize_rows as codebook_rows
from mimo_compile.quantize.integer import group_stats
from mimo_compile.quantize.integer import quantize_rows as integer_rows
from mimo_compile.quantize.moments import Moments, squared_error

_BLOCK = 128
"""Columns whose errors reach the rest of the matrix in one product."""
_ROWS = 256
"""Rows of one task: they are independent of each other."""
_SAMPLE = 256
"""Rows that a scale of the whole tensor is chosen on."""
_TENSOR_RATIOS = (0.7, 0.85, 1.0, 1.2, 1.4, 1.6, 1.9)
"""Multiples of round-to-nearest's scale that are tried for a whole tensor."""
_RIDGE = 1e-6


@dataclass(frozen=True, slots=True)
class Gain:
    """Mean squared error of a layer's outputs on the calibration text, summed over outputs."""

    rtn: float
    calibrated: float


@dataclass(frozen=True, slots=True)
class _Params:
    """Scales and zero points of one group of R rows."""

    scale: Tensor
    """``[R, 1]``, two-sided ``[R, 2]``."""
    zero: Tensor | None
    """``[R]``."""


class _Grid:
    """A format's values, and the nearest to a column of weights."""

    def __init__(self, fmt: WeightFormat) -> None:
        self.fmt = fmt
        self.book = None if fmt.is_integer else Book(fmt)
        self.one_bit = fmt.bits == 1 and not fmt.has_zero

    def snap(self, w: Tensor, params: _Params) -> tuple[Tensor, Tensor]:
        """Return codes ``[R]`` and what they stand for."""
        if self.book is None:
            scale = params.scale[:, 0]
            zero = self.fmt.fixed_zero if params.zero is None else params.zero
            if self.one_bit:
                codes = (w >= 0).to(torch.float32)
            else:
                codes = (w * _inverse(scale)).round_().add_(zero).clamp_(0, self.fmt.max_code)
            return codes, (codes - zero) * scale
        above, below = params.scale[:, 0], params.scale[:, -1]
        scale = torch.where(w >= 0, above, below) if self.fmt.two_sided else above
        place = self.book.place(w * _inverse(scale))
        return self.book.codes[place], self.book.values[place] * scale


def gptq(
    weight: Tensor, moments: Moments, fmt: WeightFormat, what: str = "weight"
) -> tuple[QuantTensor, Gain]:
    """Quantise a matrix so that its outputs on the calibration text change least.

    Args:
        weight: ``[N, K]``, any float dtype.
        moments: of its inputs.
        fmt: a quantised, not complex format.
        what: name of the matrix for errors.

    Returns:
        Canonical weights without permutation, and the error beside that of round-to-nearest.

    Raises:
        UsageError: complex formats.
        MimoError: NaN or infinity among weights or inputs, second moments that cannot be factorised.
    """
    if fmt.family == "complex":
        raise UsageError(
            f"{fmt} has no GPTQ: its codes are phases of pairs of weights",
            remedy="use --calibrate rtn",
        )
    plain = quantize(weight, fmt, what=what)
    w, hessian, factor = weight.to(torch.float32), moments.hessian, moments.factor(what)
    start = _Parts.of(plain)
    whole = fmt.group == GROUP_TENSOR
    if whole:
        start.scale[:] = _tensor_scale(w, start, hessian, factor, what)
    out = _Parts.of(plain)
    errors = torch.empty((2, len(w)))

    def block(row: int) -> None:
        rows = slice(row, row + _ROWS)
        part, old = w[rows], start.rows(rows)
        new = _run(part, old, factor, what)
        if not whole and fmt.family != "fp8":
            _refit(part, new, hessian)
        before = _error(part, out.rows(rows), hessian)
        after = _error(part, new, hessian)
        if not whole:
            after = new.keep_better(out.rows(rows), before, after)
        errors[0, rows], errors[1, rows] = before, after
        fresh.put(rows, new)

    fresh = _Parts.of(plain)
    with own_threads() as threads:
        each_block(block, range(0, len(w), _ROWS), threads)
    rtn, calibrated = (float(e) for e in errors.sum(1, dtype=torch.float64))
    if not calibrated <= rtn:
        return plain, Gain(rtn, rtn)
    return fresh.tensor(), Gain(rtn, calibrated)


@dataclass(slots=True)
class _Parts:
    """A quantised matrix as tensors that can be cut into rows."""

    fmt: WeightFormat
    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    @staticmethod
    def of(q: QuantTensor) -> _Parts:
        zero = None if q.zero is None else torch.from_numpy(q.zero.copy())
        return _Parts(
            q.fmt, torch.from_numpy(q.codes.copy()), torch.from_numpy(q.scale.copy()), zero
        )

    def rows(self, rows: slice) -> _Parts:
        zero = None if self.zero is None else self.zero[rows]
        return _Parts(self.fmt, self.codes[rows], self.scale[rows], zero)

    def put(self, rows: slice, other: _Parts) -> None:
        self.codes[rows], self.scale[rows] = other.codes, other.scale
        if self.zero is not None and other.zero is not None:
            self.zero[rows] = other.zero

    def real(self) -> Tensor:
        return real_matrix(self.fmt, self.codes, self.scale, self.zero, torch.float32)

    def keep_better(self, other: _Parts, theirs: Tensor, ours: Tensor) -> Tensor:
        """Take the other's rows where these are better, or ours are no numbers; returns the errors."""
        worse = ~(ours <= theirs)
        self.codes[worse], self.scale[worse] = other.codes[worse], other.scale[worse]
        if self.zero is not None and other.zero is not None:
            self.zero[worse] = other.zero[worse]
        return torch.where(worse, theirs, ours)

    def tensor(self) -> QuantTensor:
        zero = None if self.zero is None else self.zero.numpy()
        return QuantTensor(self.fmt, self.codes.numpy(), self.scale.numpy(), zero)


def _error(w: Tensor, parts: _Parts, hessian: Tensor) -> Tensor:
    return squared_error(parts.real() - w, hessian)


def _run(w: Tensor, start: _Parts, factor: Tensor, what: str) -> _Parts:
    """Quantise rows ``w [R, K]``; where scales are fixed, ``start`` holds them."""
    fmt, (n, k) = start.fmt, w.shape
    out = _Parts(
        fmt, torch.empty_like(start.codes), start.scale.clone(),
        None if start.zero is None else start.zero.clone(),
    )  # fmt: skip
    per, size = fmt.scales_per_group, fmt.group_size(k)
    fixed = fmt.group <= 0 or fmt.family == "fp8"
    # one row of memory for each column of the matrix; a copy, for it is used up
    columns = w.mT.clone(memory_format=torch.contiguous_format)

    def params(group: int) -> _Params:
        place = slice(group * per, (group + 1) * per)
        if not fixed:
            scale, zero = _group_params(columns[group * size : (group + 1) * size], fmt, what)
            out.scale[:, place] = scale
            if out.zero is not None and zero is not None:
                out.zero[:, group] = zero
        return _Params(out.scale[:, place], None if out.zero is None else out.zero[:, group])

    codes = torch.empty((k, n), dtype=torch.uint8)
    _columns(columns, codes, factor, _Grid(fmt), params, size)
    out.codes = codes.mT.contiguous()
    return out


def _columns(
    columns: Tensor, codes: Tensor, factor: Tensor, grid: _Grid,
    params: Callable[[int], _Params], size: int,
) -> None:  # fmt: skip
    """Fill ``codes [K, R]`` for ``columns [K, R]``, which are used up; a group has ``size`` columns."""
    k = len(columns)
    step = _BLOCK if size >= k or _BLOCK % size == 0 else size
    current: _Params | None = None
    for begin in range(0, k, step):
        end = min(begin + step, k)
        errors = torch.empty((end - begin, columns.shape[1]))
        for j in range(begin, end):
            if j % size == 0 or current is None:
                current = params(j // size)
            found, value = grid.snap(columns[j], current)
            codes[j] = found
            torch.div(columns[j] - value, factor[j, j], out=errors[j - begin])
            if j + 1 < end:
                columns[j + 1 : end].addr_(factor[j, j + 1 : end], errors[j - begin], alpha=-1)
        if end < k:
            columns[end:].addmm_(factor[begin:end, end:].mT, errors, alpha=-1)


def _group_params(part: Tensor, fmt: WeightFormat, what: str) -> tuple[Tensor, Tensor | None]:
    """Return scales ``[R, 1 or 2]`` and zero points ``[R]`` for one group ``[S, R]``."""
    x = part.mT[:, None].contiguous()
    stats, wide = group_stats(x, x.shape[-1]), fmt.bits <= 4
    if fmt.is_integer:
        _, scale, zero = integer_rows(x, stats, fmt, wide, what)
        return scale, None if zero is None else zero[:, 0]
    return codebook_rows(x, stats, fmt, wide, what, 1)[1], None


def _tensor_scale(w: Tensor, start: _Parts, hessian: Tensor, factor: Tensor, what: str) -> Tensor:
    """Return the scale ``[]`` of a whole tensor, float16 exactly, that is best on some of its rows."""
    rows = slice(None, None, max(1, len(w) // _SAMPLE))
    best, least = start.scale[0, 0], float("inf")
    for ratio in _TENSOR_RATIOS:
        scale = (start.scale[0, 0] * ratio).to(torch.float16).to(torch.float32)
        tried = start.rows(rows)
        tried.scale = torch.full_like(tried.scale, float(scale))
        error = float(_error(w[rows], _run(w[rows], tried, factor, what), hessian).sum())
        if error < least and bool(torch.isfinite(scale)):
            best, least = scale, error
    return best


def _refit(w: Tensor, parts: _Parts, hessian: Tensor) -> None:
    """Replace scales by those with the least error for the same codes, where rounding leaves a gain.

    With one column of units (values at scale 1) for each scale, ``w_hat = C s``: least squares in the norm
    of the inputs are the normal equations ``(Cᵀ H C) s = Cᵀ H w`` of each row.
    """
    fmt, (n, k) = parts.fmt, w.shape
    groups, size, per = fmt.groups(k), fmt.group_size(k), fmt.scales_per_group
    units = real_matrix(fmt, parts.codes, torch.ones_like(parts.scale), parts.zero, torch.float32)
    sides = [units.clamp_min(0), units.clamp_max(0)] if per == 2 else [units]
    pad = groups * size - k

    def sums(products: Tensor) -> Tensor:  # [R, K] -> [R, G]
        return torch.nn.functional.pad(products, (0, pad)).reshape(n, groups, size).sum(-1)

    right = torch.stack([sums(side * (w @ hessian)) for side in sides], -1).flatten(1)
    left = torch.empty((n, groups * per, groups * per))
    for g in range(groups):
        place = slice(g * size, min((g + 1) * size, k))
        for s, side in enumerate(sides):
            reach = side[:, place] @ hessian[place]
            left[:, g * per + s] = torch.stack(
                [sums(other * reach) for other in sides], -1
            ).flatten(1)
    diagonal = left.diagonal(dim1=1, dim2=2)
    unused = diagonal <= 0
    diagonal += torch.where(unused, 1.0, 0.0) + _RIDGE * diagonal.amax(1, keepdim=True)
    solved, failed = torch.linalg.solve_ex(left, right)
    solved = solved.to(torch.float16).to(torch.float32)
    # one sign for codebooks; a vanished or infinite scale is no gain
    bad = ~torch.isfinite(solved) | (solved == 0) | (not fmt.is_integer and solved < 0)
    row_bad = (bad & ~unused).any(1) | (failed != 0)
    solved = torch.where(unused | row_bad[:, None], parts.scale, solved)
    new = _Parts(fmt, parts.codes, solved, parts.zero)
    better = _error(w, new, hessian) < _error(w, parts, hessian)
    parts.scale = torch.where(better[:, None], solved, parts.scale)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale != 0, 1.0 / scale, 0.0)


__all__ = ["Gain", "gptq"]
