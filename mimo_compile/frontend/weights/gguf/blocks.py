"""Quantised types of GGUF and their canonical forms: blocks along K, float16 scales.

All are exact: codes as they are, scales the product of the stored ones (which float32 holds). Types with
a minimum (``w = d s q - e m``) get the zero point ``e m / (d s)``, see `canonical.affine`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mimo_compile.frontend.weights.canonical import affine, flatten
from mimo_compile.frontend.weights.gguf.reader import Layout
from mimo_compile.ir.formats import QuantTensor, WeightFormat, parse_weight_format

Bytes = npt.NDArray[np.uint8]
"""Blocks ``[rows, blocks, bytes]``, or codes ``[rows, blocks, columns]``."""
Floats = npt.NDArray[np.float32]
Decoded = tuple[Bytes, Floats, Floats | None]
"""Codes ``[R, B, columns]``, scale ``[R, B, groups]``, offset (added to scale * code) or None."""


@dataclass(frozen=True, slots=True)
class BlockType:
    """One type: its extents, its canonical format, and how its blocks are read."""

    layout: Layout
    fmt: WeightFormat
    decode: Callable[[Bytes], Decoded]


def half(blocks: Bytes, at: int) -> Floats:
    """Return the float16 at a byte of each block, ``[R, B, 1]`` float32."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(raw: Bytes) -> Bytes:
    """Return low nibbles, then high ones."""
    return np.concatenate([raw & 15, raw >> 4], axis=-1)


def _planes(raw: Bytes, bits: int) -> Bytes:
    """Return all codes at the lowest bits, then all at the next, ``[R, B, 8/bits * bytes]``."""
    mask = np.uint8((1 << bits) - 1)
    return np.concatenate([(raw >> s) & mask for s in range(0, 8, bits)], axis=-1)


def _halves(raw: Bytes, bits: int) -> Bytes:
    """Return `_planes` of each half of 32 bytes after the other."""
    return np.concatenate([_planes(raw[..., h : h + 32], bits) for h in (0, 32)], axis=-1)


def _high_bits(raw: Bytes) -> Bytes:
    """Return the bits of 4 bytes, ``[R, B, 32]``."""
    return np.unpackbits(raw, axis=-1, bitorder="little")


def _join(low: Bytes, high: Bytes, bits: int) -> Bytes:
    """Return codes whose lowest bits are ``low``."""
    out: Bytes = low | high << np.uint8(bits)
    return out


def _q4_0(b: Bytes) -> Decoded:
    return _nibbles(b[..., 2:]), half(b, 0), None


def _q4_1(b: Bytes) -> Decoded:
    return _nibbles(b[..., 4:]), half(b, 0), half(b, 2)


def _q5_0(b: Bytes) -> Decoded:
    return _join(_nibbles(b[..., 6:]), _high_bits(b[..., 2:6]), 4), half(b, 0), None


def _q5_1(b: Bytes) -> Decoded:
    return _join(_nibbles(b[..., 8:]), _high_bits(b[..., 4:8]), 4), half(b, 0), half(b, 2)


def _q8_0(b: Bytes) -> Decoded:
    return b[..., 2:] ^ np.uint8(128), half(b, 0), None  # int8 + 128


def _q2_k(b: Bytes) -> Decoded:
    scales = b[..., :16]
    least = half(b, 82) * (scales >> 4)
    return _halves(b[..., 16:80], 2), half(b, 80) * (scales & 15), -least


def _q3_k(b: Bytes) -> Decoded:
    mask = np.unpackbits(b[..., :32, None], axis=-1, bitorder="little")  # [R, B, 32, 8]
    high = np.moveaxis(mask, -1, -2).reshape(*b.shape[:2], 256)
    packed = b[..., 96:108]
    low: Bytes = np.concatenate([packed[..., :8] & 15, packed[..., :8] >> 4], axis=-1)
    top = _planes(packed[..., 8:], 2)
    scale: Floats = _join(low, top, 4).astype(np.float32) - 32
    # a set bit means that 4 is not taken away: codes 4 to 7
    return _join(_halves(b[..., 32:96], 2), high, 2), half(b, 108) * scale, None


def _scales_6(raw: Bytes) -> tuple[Bytes, Bytes]:
    """Return 8 scales and 8 minimums of 6 bits from 12 bytes."""
    a, m, mixed = raw[..., :4], raw[..., 4:8], raw[..., 8:]
    scale = np.concatenate([a & 63, _join(mixed & np.uint8(15), a >> np.uint8(6), 4)], axis=-1)
    least = np.concatenate([m & 63, _join(mixed >> np.uint8(4), m >> np.uint8(6), 4)], axis=-1)
    return scale, least


def _pairs(raw: Bytes) -> Bytes:
    """Return `_nibbles` of each 32 bytes of 128 after the other."""
    return np.concatenate([_nibbles(raw[..., c : c + 32]) for c in range(0, 128, 32)], axis=-1)


def _q4_k(b: Bytes) -> Decoded:
    scale, least = _scales_6(b[..., 4:16])
    return _pairs(b[..., 16:]), half(b, 0) * scale, -(half(b, 2) * least)


def _q5_k(b: Bytes) -> Decoded:
    scale, least = _scales_6(b[..., 4:16])
    bits = np.unpackbits(b[..., 16:48, None], axis=-1, bitorder="little")
    high = np.moveaxis(bits, -1, -2).reshape(*b.shape[:2], 256)
    return _join(_pairs(b[..., 48:]), high, 4), half(b, 0) * scale, -(half(b, 2) * least)


def _q6_k(b: Bytes) -> Decoded:
    low = np.concatenate([_nibbles(b[..., h : h + 64]) for h in (0, 64)], axis=-1)
    high = _halves(b[..., 128:192], 2)
    scale: Floats = b[..., 192:208].view(np.int8).astype(np.float32)
    return _join(low, high, 4), half(b, 208) * scale, None


def _tq1_0(b: Bytes) -> Decoded:
    parts = [(b[..., :32], 5), (b[..., 32:48], 5), (b[..., 48:52], 4)]
    out = [
        (((raw * np.uint8(3**n)).astype(np.uint16) * 3) >> 8).astype(np.uint8)
        for raw, trits in parts
        for n in range(trits)
    ]
    return np.concatenate(out, axis=-1), half(b, 52), None


def _tq2_0(b: Bytes) -> Decoded:
    return _halves(b[..., :64], 2), half(b, 64), None


def _type(
    name: str, columns: int, size: int, fmt: str, decode: Callable[[Bytes], Decoded]
) -> BlockType:
    return BlockType(Layout(name, columns, size), parse_weight_format(fmt), decode)


BLOCKS = {
    2: _type("Q4_0", 32, 18, "w4g32", _q4_0),
    3: _type("Q4_1", 32, 20, "w4zg32", _q4_1),
    6: _type("Q5_0", 32, 22, "w5g32", _q5_0),
    7: _type("Q5_1", 32, 24, "w5zg32", _q5_1),
    8: _type("Q8_0", 32, 34, "w8g32", _q8_0),
    10: _type("Q2_K", 256, 84, "w2zg16", _q2_k),
    11: _type("Q3_K", 256, 110, "w3g16", _q3_k),
    12: _type("Q4_K", 256, 144, "w4zg32", _q4_k),
    13: _type("Q5_K", 256, 176, "w5zg32", _q5_k),
    14: _type("Q6_K", 256, 210, "w6g16", _q6_k),
    34: _type("TQ1_0", 256, 54, "w1.58g256", _tq1_0),
    35: _type("TQ2_0", 256, 66, "w1.58g256", _tq2_0),
}
"""Number of a type in the file -> how it is read."""
FLOATS = {0: Layout("F32", 1, 4), 1: Layout("F16", 1, 2), 30: Layout("BF16", 1, 2)}
UNREAD = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
"""Names of types that are known and not read, for messages."""


def canonical(kind: BlockType, blocks: Bytes) -> QuantTensor:
    """Return a matrix from its blocks ``[N, blocks, bytes]``.

    Raises:
        ValueError: a scale that is not finite, or the ternary code 3.
    """
    codes, scale, offset = kind.decode(blocks)
    rows = len(blocks)
    codes, scale = codes.reshape(rows, -1), scale.reshape(rows, -1)
    if not np.isfinite(scale).all() or (offset is not None and not np.isfinite(offset).all()):
        raise ValueError("a scale is not finite")
    if kind.fmt.family == "ternary" and (codes > 2).any():
        raise ValueError("the code 3 stands for no ternary weight")
    if offset is None:
        return QuantTensor(kind.fmt, codes, scale)
    codes = flatten(codes, scale, kind.fmt.group)
    scale, zero = affine(scale, offset.reshape(rows, -1))
    return QuantTensor(kind.fmt, codes, scale, zero)
