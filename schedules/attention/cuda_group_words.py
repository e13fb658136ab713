"""Codes of KV caches in groups, as words of the lanes that multiply them on GPUs; see `cuda_group_layout`."""

from __future__ import annotations

import numpy as np

from mimo_compile.ir.ops.base import Array

DEPTH = 32
"""Of a product of bytes."""


def _chunk(words: int) -> int:
    """Return how many of a lane's words lie together."""
    return next(n for n in (4, 2, 1) if words % n == 0)


def _joined(fields: Array, bits: int) -> Array:
    """Join registers ``[..., fours, 4, g, t, bytes]`` (tiles or steps) into ``[..., words, g, t, bytes]``."""
    per = 8 // bits
    parts = fields.reshape(*fields.shape[:-5], -1, per, *fields.shape[-3:])
    shifts = (np.arange(per, dtype=np.uint8) * np.uint8(bits)).reshape(per, 1, 1, 1)
    out: Array = np.bitwise_or.reduce(parts << shifts, axis=-4)
    return out


def _split(words: Array, bits: int) -> Array:
    """Inverse of `_joined`."""
    per = 8 // bits
    shifts = (np.arange(per, dtype=np.uint8) * np.uint8(bits)).reshape(per, 1, 1, 1)
    fields: Array = (words[..., None, :, :, :] >> shifts) & np.uint8((1 << bits) - 1)
    return np.reshape(fields, (*words.shape[:-4], -1, 4, *words.shape[-3:]))


def _to_chunks(words: Array) -> Array:
    """Lay out ``[..., words, g, t, bytes]`` as ``[..., chunks, g, t, words of a chunk, bytes]``, flat."""
    *outer, count, g, t, size = words.shape
    chunk = _chunk(count)
    parts = words.reshape(*outer, count // chunk, chunk, g, t, size)
    return np.moveaxis(parts, -4, -2).reshape(*outer, -1)


def _from_chunks(flat: Array, count: int) -> Array:
    """Inverse of `_to_chunks`, of so many words."""
    chunk = _chunk(count)
    parts = flat.reshape(*flat.shape[:-1], count // chunk, 8, 4, chunk, 4)
    return np.moveaxis(parts, -2, -4).reshape(*flat.shape[:-1], count, 8, 4, 4)


# axes of codes: keys [pair, tile, g] by channels [step, t, half, byte]; values [step, half, high, t,
# low] (byte = 2 * high + low) by columns [tile, g]
_KEY_AXES = (4, 2, 8), (4, 2, 4)
_KEY_ORDER = (0, 3, 1, 5, 2, 4, 6)  # pair, step, tile, half, g, t, byte
_VALUE_ORDER = (5, 0, 1, 6, 3, 2, 4)  # tile, step, half, g, t, high, low


def pack_keys(codes: Array, bits: int) -> Array:
    """Lay out keys ``[..., 64, DK]`` of groups."""
    *outer, _, keys = codes.shape
    parts = codes.reshape(-1, *_KEY_AXES[0], keys // DEPTH, *_KEY_AXES[1])
    parts = parts.transpose(0, *(n + 1 for n in _KEY_ORDER))
    words = _joined(parts.reshape(*parts.shape[:3], 4, 8, 4, 4), bits)
    flat = _to_chunks(words.reshape(len(words), 4, -1, 8, 4, 4))
    return flat.reshape(*outer, -1)


def unpack_keys(packed: Array, keys: int, bits: int) -> Array:
    """Inverse of `pack_keys`."""
    steps = keys // DEPTH
    words = _from_chunks(packed.reshape(-1, 4, packed.shape[-1] // 4), steps * bits // 2)
    parts = _split(words, bits)
    parts = parts.reshape(len(words), 4, steps, 2, 2, 8, 4, 4)
    order = np.argsort(_KEY_ORDER) + 1
    return parts.transpose(0, *order).reshape(*packed.shape[:-1], 64, keys)


def pack_values(codes: Array, bits: int) -> Array:
    """Lay out values ``[..., 64, DW]`` of groups."""
    *outer, _, columns = codes.shape
    parts = codes.reshape(-1, 2, 2, 2, 4, 2, columns // 8, 8)
    parts = parts.transpose(0, *(n + 1 for n in _VALUE_ORDER))
    words = _joined(parts.reshape(len(parts), columns // 8, 4, 8, 4, 4), bits)
    flat = _to_chunks(words.reshape(len(words), -1, 8, 4, 4))
    return flat.reshape(*outer, -1)


def unpack_values(packed: Array, columns: int, bits: int) -> Array:
    """Inverse of `pack_values`."""
    tiles = columns // 8
    words = _from_chunks(packed.reshape(-1, packed.shape[-1]), tiles * bits // 2)
    parts = _split(words, bits)
    parts = parts.reshape(len(words), tiles, 2, 2, 8, 4, 2, 2)
    order = np.argsort(_VALUE_ORDER) + 1
    return parts.transpose(0, *order).reshape(*packed.shape[:-1], 64, columns)
