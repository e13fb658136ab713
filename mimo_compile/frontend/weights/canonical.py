"""From groups as other formats have them to those of the canonical form, without changing a weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mimo_compile.ir.formats import QuantTensor, WeightFormat, parse_weight_format

Array = npt.NDArray[np.float32]
_GROUPS = (256, 128, 64, 32, 16)
"""Columns that may share a scale, widest first; multiples of them repeat scales."""


def grouped_format(bits: int, zero: bool, group: int, k: int) -> WeightFormat | None:
    """Return the integer format whose groups are, or divide, groups of ``group`` columns (0: rows).

    None: there is no such format.
    """
    stem = f"w{bits}{'z' if zero else ''}"
    if group <= 0 or group >= k:
        return parse_weight_format(f"{stem}grow")
    size = next((g for g in _GROUPS if group % g == 0 and (bits > 1 or g > 16)), None)
    return None if size is None else parse_weight_format(f"{stem}g{size}")


def regroup(values: Array, group: int, fmt: WeightFormat, k: int) -> Array:
    """Spread one value a group of ``group`` columns over the groups of ``fmt``, ``[N, G]``."""
    if fmt.group <= 0 or group <= 0:
        return np.ascontiguousarray(values)
    spread = np.repeat(values, max(1, group // fmt.group), axis=1)
    return np.ascontiguousarray(spread[:, : fmt.groups(k)])


def common_format(formats: Sequence[WeightFormat], k: int) -> WeightFormat | None:
    """Return the format that holds matrices of all these formats exactly (None: there is none).

    ``k``: columns of the widest of them; rows of fewer may lie in one group where its own have several.
    Integer and ternary codes fit into wider ones; different groups share the largest that divides both.
    """
    if len(set(formats)) == 1:
        return formats[0]
    if not all((f.is_integer and f.fixed_zero % 1 == 0) or f.has_zero for f in formats):
        return None
    sizes = {f.group_size(k) for f in formats}
    group = 0 if sizes == {k} else int(np.gcd.reduce([s for s in sizes if s != k] or [k]))
    return grouped_format(max(f.bits for f in formats), any(f.has_zero for f in formats), group, k)


def widen(x: QuantTensor, fmt: WeightFormat) -> QuantTensor:
    """Return the same matrix in a format that `common_format` gave.

    Raises:
        ValueError: the format has fewer scales, of which each would stand for several.
    """
    if x.fmt == fmt:
        return x
    n, k = x.codes.shape[-2:]
    size = x.fmt.group_size(k)
    scale = _spread(x.scale, size, fmt, k)
    if scale.shape[-2:] != fmt.scale_shape(n, k):
        raise ValueError(f"{fmt} has no room for the scales {list(x.scale.shape)} of {x.fmt}")
    if not fmt.has_zero:
        codes = x.codes + np.uint8(fmt.fixed_zero - x.fmt.fixed_zero)
        return QuantTensor(fmt, codes, scale, None, x.perm)
    zero = x.zero if x.zero is not None else np.full_like(x.scale, x.fmt.fixed_zero)
    return QuantTensor(fmt, x.codes, scale, _spread(zero, size, fmt, k), x.perm)


def _spread(values: Array, size: int, fmt: WeightFormat, k: int) -> Array:
    lead, groups = values.shape[:-1], values.shape[-1]
    flat = values.reshape(-1, groups)
    out = np.repeat(flat, fmt.groups(k), axis=1) if groups == 1 else regroup(flat, size, fmt, k)
    return np.ascontiguousarray(out.reshape(*lead, -1))


def column_order(
    index: npt.NDArray[np.int64], group: int
) -> tuple[npt.NDArray[np.int32] | None, bool]:
    """Return the order that sorts columns by their group, and whether groups are then regular.

    Args:
        index: group of each column.
        group: columns that a group should have; the last may be short.

    Returns:
        None where columns stand in order already, else the columns, stably sorted; False where groups have
        other sizes.
    """
    regular = np.arange(len(index)) // group
    if np.array_equal(index, regular):
        return None, True
    order = np.argsort(index, kind="stable").astype(np.int32)
    return order, bool(np.array_equal(index[order], regular))


def affine(scale: Array, offset: Array) -> tuple[Array, Array]:
    """Return scale and zero of weights ``scale * code + offset``.

    The zero point ``-offset / scale`` is rounded to float32, so that a weight moves by at most
    ``2**-24 |offset|``: no more than rounding it to float32 does. Where the scale is 0, all weights are
    ``offset``: the caller makes those codes 0 (see `flatten`).
    """
    flat = scale == 0
    zero = np.divide(-offset, scale, out=np.ones_like(scale), where=~flat, dtype=np.float64)
    return np.where(flat, -offset, scale).astype(np.float32), zero.astype(np.float32)


def flatten(codes: npt.NDArray[np.uint8], scale: Array, group: int) -> npt.NDArray[np.uint8]:
    """Set the codes of groups whose stored scale is 0 to 0, as `affine` needs."""
    if not (scale == 0).any():
        return codes
    keep = np.repeat(scale != 0, group, axis=1)[:, : codes.shape[1]]
    return np.where(keep, codes, np.uint8(0))
