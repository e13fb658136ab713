"""Round-to-nearest weight quantisers: a real matrix in, its canonical `QuantTensor` out.

Symmetric ``wN``: ``code = round(w / scale) + 2**(N-1)``, half to even, with the group's
``scale = absmax / (2**(N-1) - 1)``. Asymmetric ``wNz``: the group's range, stretched to hold 0, is cut into
``2**N - 1`` steps and the zero point is an integer. Ternary ``w1.58``: BitNet's absmean,
``code = clip(round(w * (1/gamma)), -1, 1) + 1`` with ``gamma = mean |w|``. Every scale is representable in
float16; a group of zeros gets scale 0.

The search (default for four bits and less) tries a few clipped scales, for symmetric codes of both signs,
refits each to its codes by least squares and keeps the one with the smallest squared error.
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
    parse_weight_format,
)

_CHUNK = 1 << 18
"""Elements handled at once, so that temporaries stay in the second-level cache."""
_SHRINK = {1: (1.0,), 2: (1.0, 0.8, 0.65), 3: (1.0, 0.9, 0.8), 4: (1.0, 0.94)}
"""Clipping ratios that the search tries, by code width (wider codes: no search by default)."""
_HALF_MAX = 65504.0

_Rows = tuple[Tensor, Tensor, Tensor | None]
"""Signed or unsigned codes ``[R, G, S]`` as floats, scale ``[R, G]``, zero ``[R, G]`` or None."""


def check_scheme(scheme: QuantScheme) -> None:
    """Refuse schemes that no quantiser here can produce.

    Raises:
        UsageError: another family than integer or ternary codes, 1-bit symmetric, or a quantised KV cache.
    """
    fmt = scheme.weight
    if scheme.kv != "16":
        raise UsageError(
            f"KV caches cannot be quantised yet (kv{scheme.kv})",
            remedy="leave kv... out of --quant",
        )
    if fmt is None:
        return
    if fmt.family not in ("int", "ternary"):
        raise UsageError(
            f"there is no quantiser for {fmt} ({fmt.family} codes)",
            remedy="use w2..w8, with z for a zero point, or w1.58",
        )
    if fmt.family == "int" and fmt.bits == 1 and not fmt.has_zero:
        raise UsageError(
            f"{fmt} cannot hold both signs: a symmetric 1-bit code is 0 or -1",
            remedy="use w1z, w1.58 or w2",
        )


def head_format(scheme: QuantScheme) -> WeightFormat | None:
    """Return the format of the output projection: never below four bits, 8-bit rows instead."""
    if scheme.weight is not None and scheme.weight.bits < 4:
        return parse_weight_format("w8")
    return scheme.weight


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
        fmt: an integer or ternary format.
        search: choose scales by squared error instead of by the largest magnitude; None: for at most
            four bits. Ternary codes and scales of a whole tensor are never searched.
        what: name of the matrix for errors.

    Returns:
        Codes ``[N, K]``, scale ``[N, G]`` and zero ``[N, G]`` (asymmetric formats only).

    Raises:
        UsageError: the format has no quantiser, or the weight is no matrix.
        MimoError: NaN, infinity, or values too large for a float16 scale.
    """
    check_scheme(QuantScheme(fmt))
    x = torch.from_numpy(weight) if isinstance(weight, np.ndarray) else weight.detach()
    if x.dim() != 2 or 0 in x.shape:
        raise UsageError(f"{what}: expected a matrix to quantise, got shape {tuple(x.shape)}")
    n, k = x.shape
    groups, size = fmt.groups(k), fmt.group_size(k)
    codes = torch.empty((n, k), dtype=torch.uint8)
    scale = torch.empty((n, groups), dtype=torch.float32)
    zero = torch.empty((n, groups), dtype=torch.float32) if fmt.has_zero else None
    step = max(1, _CHUNK // k)
    shrink: tuple[float, ...] = (1.0,)
    whole: Tensor | None = None
    if fmt.group != GROUP_TENSOR and (fmt.bits <= 4 if search is None else search):
        shrink = _SHRINK.get(fmt.bits, _SHRINK[4])

    def block(row: int) -> None:
        part = x[row : row + step].to(torch.float32)
        if groups * size != k:
            part = torch.nn.functional.pad(part, (0, groups * size - k))
        part = part.reshape(-1, groups, size)
        stats = _group_stats(part, k) if whole is None else whole
        if not bool(torch.isfinite(stats).all()):
            raise MimoError(f"{what} holds NaN or infinity, which cannot be quantised")
        q, s, z = _quantize_rows(part, stats, fmt, shrink, what)
        codes[row : row + step] = q.reshape(-1, groups * size)[:, :k].to(torch.uint8)
        scale[row : row + step] = s
        if zero is not None and z is not None:
            zero[row : row + step] = z

    with _own_threads() as threads:
        if fmt.group == GROUP_TENSOR:
            whole = _tensor_stats(x, step)
        _each(block, range(0, n, step), threads)
    return QuantTensor(fmt, codes.numpy(), scale.numpy(), None if zero is None else zero.numpy())


@contextmanager
def _own_threads() -> Iterator[int]:
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


def _each(work: Callable[[int], None], rows: range, threads: int) -> None:
    """Call ``work`` for every block of rows; the first failure is raised."""
    if len(rows) < 4 or threads == 1:
        for row in rows:
            work(row)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, rows):
            pass


def _group_stats(x: Tensor, k: int) -> Tensor:
    """Return min and max (of values and 0) and mean magnitude of each group: ``[3, R, G]``.

    The last group of ``x [R, G, S]`` may be filled up with zeros; its mean is that of the real columns.
    """
    groups, size = x.shape[1:]
    count = torch.full((groups,), float(size))
    count[-1] = k - (groups - 1) * size
    mean = x.abs().sum(-1) / count
    return torch.stack([x.amin(-1).clamp_max_(0), x.amax(-1).clamp_min_(0), mean])


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


def _quantize_rows(
    x: Tensor, stats: Tensor, fmt: WeightFormat, shrink: tuple[float, ...], what: str
) -> _Rows:
    low, high, mean = stats
    if fmt.family == "ternary":
        inverse = torch.where(mean > 0, 1.0 / mean, 0.0)  # the reciprocal, as in BitNet's training
        codes = (x * inverse[..., None]).round_().clamp_(-1, 1).add_(1)
        return codes, _half(mean, what), None
    if fmt.has_zero:
        return _asymmetric(x, low, high, fmt.bits, shrink, what)
    least, most = -(1 << (fmt.bits - 1)), (1 << (fmt.bits - 1)) - 1
    amax = torch.maximum(-low, high)
    scale = _half(amax / most, what)
    short = scale * most < amax * (1 - 2.0**-10)  # coarse steps of float16 subnormals
    scale = torch.where(short, _next_half(scale), scale)
    if len(shrink) > 1:
        scale = _searched_scale(x, low, high, scale, fmt.bits, shrink)
    codes = _round(x, scale).clamp_(least, most).add_(fmt.fixed_zero)
    return codes, scale, None


def _searched_scale(
    x: Tensor, low: Tensor, high: Tensor, scale: Tensor, bits: int, shrink: tuple[float, ...]
) -> Tensor:
    """Return the scale with the least squared error among the candidates, ``scale`` included.

    For codes q and scale s the squared error is ``<x, x> - s * (2 <x, q> - s <q, q>)``, least for
    ``s = <x, q> / <q, q>``: the refitted scale (rounded to float16) with the largest gain wins. A negative
    scale gives the longer side of the code range to positive weights.
    """
    least, most = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    longest = torch.where(-low >= high, low, high) / least  # the extreme weight gets `least`
    candidates = [scale, *(longest * r for r in shrink)]
    if bits < 4:  # both ends of wider codes are alike
        candidates += [scale * r for r in shrink[1:]]
    best, best_gain = scale, torch.zeros_like(scale)
    for candidate in candidates:
        q = _round(x, candidate).clamp_(least, most)
        cross = (x * q).sum(-1)
        square = q.square_().sum(-1)
        refit = torch.where(square > 0, cross / square, 0.0).to(torch.float16).to(torch.float32)
        for s in (scale, refit) if candidate is scale else (refit,):
            gain = s * (2 * cross - s * square)
            better = (gain > best_gain) & torch.isfinite(s) & (s != 0)
            best, best_gain = torch.where(better, s, best), torch.where(better, gain, best_gain)
    return best


def _asymmetric(
    x: Tensor, low: Tensor, high: Tensor, bits: int, shrink: tuple[float, ...], what: str
) -> _Rows:
    """Quantise with an integer zero point, the range shrunk to the ratio with the least error."""
    most = (1 << bits) - 1
    kept: _Rows | None = None
    kept_error = torch.zeros(())
    for ratio in shrink:
        scale = _half((high - low) * (ratio / most), what)
        zero = torch.where(scale > 0, (-low * ratio) / scale, 0.0).round_().clamp_(0, most)
        codes = _round(x, scale).add_(zero[..., None]).clamp_(0, most)
        if len(shrink) == 1:
            return codes, scale, zero
        error = ((codes - zero[..., None]) * scale[..., None]).sub_(x).square_().sum(-1)
        if kept is None or kept[2] is None:
            kept, kept_error = (codes, scale, zero), error
            continue
        better = error < kept_error
        kept_error = torch.where(better, error, kept_error)
        kept = (
            torch.where(better[..., None], codes, kept[0]),
            torch.where(better, scale, kept[1]),
            torch.where(better, zero, kept[2]),
        )
    assert kept is not None
    return kept


def _round(x: Tensor, scale: Tensor) -> Tensor:
    """Return ``round(x / scale)``, 0 where the scale is 0, half to even."""
    inverse = torch.where(scale != 0, 1.0 / scale, 0.0)
    return (x * inverse[..., None]).round_()


def _half(scale: Tensor, what: str) -> Tensor:
    """Round positive scales to float16; those that would vanish take the smallest float16 instead."""
    if bool((scale > _HALF_MAX).any()):
        raise MimoError(f"{what} holds values too large for a float16 scale")
    rounded = scale.to(torch.float16).to(torch.float32)
    return torch.where((rounded == 0) & (scale > 0), 2.0**-24, rounded)


def _next_half(scale: Tensor) -> Tensor:
    """Return the next larger float16 of positive scales."""
    bits = scale.to(torch.float16).view(torch.int16) + 1
    return bits.view(torch.float16).to(torch.float32)
