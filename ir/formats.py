"""Quantised tensor formats: their names, their canonical (unpacked) form, and the `--quant` grammar.

Canonical form of a weight matrix ``[N, K]`` (N output features, K input features), for every
integer format: ``codes uint8 [N, K]``, ``scale float32 [N, K/G]`` and, for asymmetric formats,
``zero float32 [N, K/G]``; the real weight is ``scale * (code - zero)``. Symmetric formats have the
fixed zero point ``2**(bits-1)`` (ternary: 1). Kernels are proved against this form; packed layouts
belong to schedules.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from mimo_compile.errors import UsageError

Family = Literal["float", "int", "ternary", "codebook", "fp8", "complex"]

GROUP_ROW = 0
"""``group`` value that means one scale for each row."""
GROUP_TENSOR = -1
"""``group`` value that means one scale for the whole tensor."""

_FLOATS = {"f32": 32, "bf16": 16, "f16": 16}
_GROUP = r"(?:g(?P<group>32|64|128|row|tensor))?"
_WEIGHT = re.compile(
    r"(?:w(?P<ternary>1\.58)(?P<dense>d)?|w(?P<bits>[1-8])(?P<zero>z)?|(?P<book>anf3|anf4|afp3|afp4|nf3|nf4)"
    r"|(?P<fp8>fp8b128)|(?P<complex>complex2))" + _GROUP
)
_SCHEME = re.compile(
    r"(?P<weight>" + _WEIGHT.pattern + r")(?:a(?P<act>8|16))?(?:kv(?P<kv>8|4|2|fp8))?\Z"
)


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """One weight storage format, e.g. ``w4g64``: 4-bit symmetric codes, one scale per 64 columns."""

    name: str
    family: Family
    bits: int
    """Bits of one stored code (ternary: 2; float formats: the width of the float)."""
    group: int = GROUP_ROW
    """Columns that share a scale; `GROUP_ROW` or `GROUP_TENSOR` for coarser scales."""
    has_zero: bool = False
    """True when each group stores a zero point of its own."""

    @property
    def is_float(self) -> bool:
        """True for unquantised formats (``f32``, ``bf16``, ``f16``)."""
        return self.family == "float"

    @property
    def fixed_zero(self) -> int:
        """The zero point that symmetric codes share (codes are stored unsigned)."""
        return 1 if self.family == "ternary" else 1 << (self.bits - 1)

    @property
    def max_code(self) -> int:
        """The largest code that occurs."""
        return 2 if self.family == "ternary" else (1 << self.bits) - 1

    def groups(self, k: int) -> int:
        """Return the number of scale groups in a row of ``k`` columns (at least 1)."""
        if self.group <= 0:
            return 1
        return -(-k // self.group)

    def group_size(self, k: int) -> int:
        """Return the columns per scale for rows of ``k`` columns."""
        return k if self.group <= 0 else min(self.group, k)

    def __str__(self) -> str:
        """Return the format's name."""
        return self.name


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """What ``--quant`` says: weight format, activation bits (16 = float), KV-cache format."""

    weight: WeightFormat | None
    act: int = 16
    kv: str = "16"

    def __str__(self) -> str:
        """Return the canonical text of the scheme."""
        if self.weight is None:
            return "none"
        return f"{self.weight.name}a{self.act}" + ("" if self.kv == "16" else f"kv{self.kv}")


def parse_weight_format(text: str) -> WeightFormat:
    """Parse a weight format such as ``w4g64``, ``w4zg128``, ``w1.58``, ``bf16``.

    Raises:
        UsageError: the text is not in the grammar.
    """
    if text in _FLOATS:
        return WeightFormat(text, "float", _FLOATS[text])
    match = re.fullmatch(_WEIGHT, text)
    if match is None:
        raise UsageError(
            f"unknown weight format {text!r}",
            remedy="use one of f32 bf16 w1..w8[z] w1.58[d] nf3 nf4 afp3 afp4 anf3 anf4 fp8b128 "
            "complex2, with an optional group g32 g64 g128 grow gtensor",
        )
    return _from_match(match)


def parse_scheme(text: str) -> QuantScheme:
    """Parse a ``--quant`` value: ``none`` or ``WEIGHT[aACT][kvKV]``, e.g. ``w4g64a8``.

    Raises:
        UsageError: the text is not in the grammar.
    """
    if text == "none":
        return QuantScheme(None)
    match = _SCHEME.fullmatch(text)
    if match is None:
        raise UsageError(
            f"unknown quantisation {text!r} (--quant)",
            remedy="use none or WEIGHT[aACT][kvKV], for example w8a8, w4g64a8, w2g64a8, w1.58a8, "
            "w4zg128a16; `mimo-compile targets --formats` lists what has kernels",
        )
    return QuantScheme(_from_match(match), int(match["act"] or 16), match["kv"] or "16")


def _from_match(match: re.Match[str]) -> WeightFormat:
    group = {"row": GROUP_ROW, "tensor": GROUP_TENSOR}.get(match["group"] or "")
    if match["group"] and group is None:
        group = int(match["group"])
    suffix = f"g{match['group']}" if match["group"] else ""
    if match["ternary"]:
        return WeightFormat(
            "w1.58" + ("d" if match["dense"] else "") + suffix,
            "ternary",
            2,
            GROUP_TENSOR if group is None else group,
        )
    if match["bits"]:
        bits = int(match["bits"])
        default = GROUP_ROW if bits == 8 else 64
        zero = "z" if match["zero"] else ""
        return WeightFormat(
            f"w{bits}{zero}{suffix}", "int", bits, default if group is None else group, bool(zero)
        )
    if match["book"]:
        bits = int(match["book"][-1])
        return WeightFormat(
            match["book"] + suffix, "codebook", bits, 64 if group is None else group
        )
    if match["fp8"]:
        return WeightFormat("fp8b128", "fp8", 8, 128)
    return WeightFormat("complex2" + suffix, "complex", 2, GROUP_ROW if group is None else group)


@dataclass(frozen=True, slots=True, eq=False)
class QuantTensor:
    """A weight matrix in canonical form (see the module's text); leading axes such as experts allowed."""

    fmt: WeightFormat
    codes: npt.NDArray[np.uint8]
    """``[..., N, K]``."""
    scale: npt.NDArray[np.float32]
    """``[..., N, K/G]``."""
    zero: npt.NDArray[np.float32] | None = None
    """``[..., N, K/G]`` or None when symmetric."""

    def dequantize(self) -> npt.NDArray[np.float32]:
        """Return the real weights ``[..., N, K]`` float32."""
        k = self.codes.shape[-1]
        size = self.fmt.group_size(k)
        scale = np.repeat(self.scale, size, axis=-1)[..., :k]
        zero: npt.NDArray[np.float32] | np.float32 = np.float32(self.fmt.fixed_zero)
        if self.zero is not None:
            zero = np.repeat(self.zero, size, axis=-1)[..., :k]
        return (scale * (self.codes.astype(np.float32) - zero)).astype(np.float32)
