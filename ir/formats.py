"""Quantised tensor formats: their names, their canonical (unpacked) form, and the `--quant` grammar.

Canonical form of a weight matrix ``[N, K]`` (N output features, K input features): ``codes uint8
[N, K]``, ``scale float32 [N, G]`` with one column for each group of input features, and for some formats
``zero float32 [N, G]``. Kernels are proved against this form; packed layouts belong to schedules.

* Integer (``w4g64``, ``w4zg64``) and ternary (``w1.58``): ``scale * (code - zero)``. Symmetric formats have
  the fixed zero point ``2**(bits-1)`` (ternary: 1; one bit: 1/2, so that codes mean plus or minus half a
  scale).
* Codebooks (``nf4``, ``fp4``) and ``fp8b128``: ``scale * values[code]``. Two-sided ones (``anf4``, ``afp4``;
  AFPQ) have the columns ``2 g`` and ``2 g + 1`` of ``scale [N, 2 G]`` for values above and below zero.
* Complex (``complex2``, Fairy): codes ``[N/2, K/2]`` name 1, i, -1, -i; ``scale [N/2, 2]`` holds those of
  the real and the imaginary axis. The real matrix acts on ``[Re x, Im x]`` and gives ``[Re y, Im y]`` of
  ``y = W conj(x)``. The widely-linear ``complex2wl`` stacks U and W of ``y = U x + W conj(x)`` along N
  (Fairy2i), ``complex2wl2`` a second pair that holds what the first left.

Activations (`ActFormat`) come to a matmul as float32, and kernels round them inside:

* ``a16``: as they are. ``abf16``, ``af16``: rounded to bfloat16 or float16, half to even; magnitudes that
  float16 cannot hold become its largest, 65504.
* ``a8``: int8 with one scale for each row. ``a8g64`` (g32 to g256): int8 with a scale for each 64 columns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
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
E4M3_NAN = (0x7F, 0xFF)
"""The codes of ``fp8b128`` that are no number."""
_NF = {
    3: (-1.0, -0.5350227355957031, -0.2469314038753510, 0.0,
        0.1833375245332718, 0.3819939494132996, 0.6229856610298157, 1.0),
    4: (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0),
}  # fmt: skip
"""NormalFloat codebooks (QLoRA; the 3-bit one from AFPQ), in order of value."""
_FP = {3: (0.0, 1.0, 2.0, 4.0), 4: (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)}
"""Magnitudes of E2M0 and E2M1; the code's top bit is the sign."""

GROUPS = ("g16", "g32", "g64", "g128", "g256", "grow", "gtensor")
"""What may follow a weight format's name: how many columns share a scale."""
BASES = (
    "f32", "bf16", "f16", "w8", "w7", "w6", "w5", "w4", "w3", "w2", "w1", "w8z", "w7z", "w6z", "w5z",
    "w4z", "w3z", "w2z", "w1z", "w1.58", "w1.58d", "nf4", "nf3", "fp4", "fp3", "anf4", "anf3", "afp4",
    "afp3", "fp8b128", "complex2", "complex2wl", "complex2wl2",
)  # fmt: skip
"""Every weight format of the grammar, without a group."""
_ACT = r"(?:8(?:g(?:32|64|128|256))?|16|bf16|f16)"
_GROUP = r"(?:g(?P<group>16|32|64|128|256|row|tensor))?"
_WEIGHT = re.compile(
    r"(?:w(?P<ternary>1\.58)(?P<dense>d)?|w(?P<bits>[1-8])(?P<zero>z)?|(?P<book>a?(?:nf|fp)[34])"
    r"|(?P<fp8>fp8b128)|(?P<complex>complex2(?:wl2?)?))" + _GROUP
)
_KV = r"kv(?P<kv>16|8|4|2|1|fp8)"
_SCHEME = re.compile(
    r"(?P<weight>(?P<plain>bf16)|" + _WEIGHT.pattern + rf")(?:a(?P<act>{_ACT}))?"
    rf"(?:{_KV})?\Z"
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
    def is_integer(self) -> bool:
        """True if a weight is ``scale * (code - zero)``."""
        return self.family in ("int", "ternary")

    @property
    def fixed_zero(self) -> float:
        """The zero point that symmetric integer codes share (codes are stored unsigned)."""
        if self.family == "ternary":
            return 1
        return 0.5 if self.bits == 1 else 1 << (self.bits - 1)

    @property
    def max_code(self) -> int:
        """The largest code that occurs."""
        return 2 if self.family == "ternary" else (1 << self.bits) - 1

    @property
    def two_sided(self) -> bool:
        """True if values above and below zero have scales of their own (AFPQ)."""
        return self.family == "codebook" and self.name.startswith("a")

    @property
    def values(self) -> tuple[float, ...]:
        """What each code of a codebook or fp8 format stands for, before its scale (NaN: no number)."""
        if self.family == "fp8":
            return _e4m3()
        book = _NF if "nf" in self.name else _FP
        values = book[self.bits]
        return values if "nf" in self.name else (*values, *(-v for v in values))

    @property
    def scales_per_group(self) -> int:
        """Columns of ``scale`` for one group: 2 for two-sided and complex formats."""
        return 2 if self.two_sided or self.family == "complex" else 1

    @property
    def terms(self) -> int:
        """Complex formats: matrices stacked along N (U and W, twice for two stages), else 1."""
        return {"complex2wl": 2, "complex2wl2": 4}.get(self.name.split("g")[0], 1)

    @property
    def dense(self) -> bool:
        """True if the name asks for codes that are packed across bits: five ternary ones a byte."""
        return self.name.startswith("w1.58d")

    @property
    def bits_per_weight(self) -> float:
        """Bits that one real weight ``[n, k]`` needs without scales, densely packed."""
        if self.family == "complex":
            return self.bits * self.terms / 4
        return 1.6 if self.family == "ternary" else float(self.bits)

    def code_shape(self, n: int, k: int) -> tuple[int, int]:
        """Return the shape of the codes of a matrix ``[n, k]``."""
        return (self.terms * n // 2, k // 2) if self.family == "complex" else (n, k)

    def rows(self, coded: int) -> int:
        """Return the rows of the real matrix whose codes have ``coded`` rows."""
        return coded * 2 // self.terms if self.family == "complex" else coded

    def scale_shape(self, n: int, k: int) -> tuple[int, int]:
        """Return the shape of the scales of a matrix ``[n, k]``."""
        rows, columns = self.code_shape(n, k)
        return rows, self.groups(columns) * self.scales_per_group

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
class ActFormat:
    """How a matmul takes its activations, e.g. ``a8g64``: see the module's text."""

    name: str
    kind: Literal["f32", "bf16", "f16", "int8"]
    group: int = GROUP_ROW
    """``int8``: columns that share a scale."""

    @property
    def is_int8(self) -> bool:
        """True if rows become int8 codes and scales, so that sums with integer codes are exact."""
        return self.kind == "int8"

    @property
    def rounded(self) -> bool:
        """True for 16-bit floats."""
        return self.kind in ("bf16", "f16")

    def groups(self, k: int) -> int:
        """Return the scales of a row of ``k`` columns."""
        return -(-k // self.group) if self.group > 0 else 1

    def __str__(self) -> str:
        """Return the format's name."""
        return self.name


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """What ``--quant`` says: formats of weights, of activations (`ActFormat` less its a), of KV caches."""

    weight: WeightFormat | None
    """None: as the checkpoint stores them."""
    act: str = "16"
    kv: str = ""
    """Empty: float32 caches; ``16``: bfloat16 ones; ``8``, ``4``, ``2``: codes. See `ir.caches`."""

    @property
    def codes(self) -> WeightFormat | None:
        """The format that float weights are quantised to; None: they stay floats, or as they are stored."""
        return None if self.weight is None or self.weight.is_float else self.weight

    def __str__(self) -> str:
        """Return the canonical text of the scheme."""
        kv = f"kv{self.kv}" if self.kv else ""
        if self.weight is None:
            return ("" if self.act == "16" else f"a{self.act}") + kv or "none"
        return f"{self.weight.name}a{self.act}{kv}"


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
            remedy="use one of f32 bf16 w1..w8[z] w1.58[d] nf3 nf4 fp3 fp4 anf3 anf4 afp3 afp4 fp8b128 "
            "complex2[wl[2]], with an optional group g16 g32 g64 g128 g256 grow gtensor",
        )
    return _from_match(match)


def weight_formats() -> tuple[WeightFormat, ...]:
    """Return every format that `parse_weight_format` knows, with each group that it may have, once."""
    found: dict[str, WeightFormat] = {}
    for base in BASES:
        for group in ("", *GROUPS):
            try:
                found.setdefault((fmt := parse_weight_format(base + group)).name, fmt)
            except UsageError:
                continue
    return tuple(found.values())


@cache
def parse_act_format(text: str) -> ActFormat:
    """Parse an activation format such as ``a16``, ``abf16``, ``a8``, ``a8g64``.

    Raises:
        UsageError: the text is not in the grammar.
    """
    if not re.fullmatch(f"a{_ACT}", text):
        raise UsageError(
            f"unknown activation format {text!r}", remedy=f"use one of {', '.join(ACT_NAMES)}"
        )
    if text.startswith("a8"):
        return ActFormat(text, "int8", int(text[3:]) if len(text) > 2 else GROUP_ROW)
    return ActFormat(text, {"abf16": "bf16", "af16": "f16"}.get(text, "f32"))  # type: ignore[arg-type]


ACT_NAMES = ("a16", "abf16", "af16", "a8", "a8g32", "a8g64", "a8g128", "a8g256")
"""All activation formats."""


def parse_scheme(text: str) -> QuantScheme:
    """Parse a ``--quant`` value: ``none`` or ``WEIGHT[aACT][kvKV]``, e.g. ``w4g64a8``, ``bf16abf16``.

    An activation format alone (``a8``, ``abf16``), caches alone (``kv16``), or both: weights as they are
    stored. ``bf16`` as the weight's format rounds float weights to bfloat16. Without ``kv`` caches are
    float32.

    Raises:
        UsageError: the text is not in the grammar.
    """
    if text == "none":
        return QuantScheme(None)
    if text != "a16" and (bare := re.fullmatch(rf"(?:a(?P<act>{_ACT}))?(?:{_KV})?", text)) and text:
        return QuantScheme(None, bare["act"] or "16", bare["kv"] or "")
    match = _SCHEME.fullmatch(text)
    if match is None:
        raise UsageError(
            f"unknown quantisation {text!r} (--quant)",
            remedy="use none, WEIGHT[aACT][kvKV], or aACT or kvKV alone, but for a16, with ACT = 16, bf16, "
            "f16, 8, 8g32 to 8g256 and KV = 16, fp8, 8, 4, 2 or 1, for example w8a8, w4g64a8, w1.58a8, "
            "w4g64abf16, w4g64a8kv16; "
            "`mimo-compile targets --formats` lists what has kernels",
        )
    weight = WeightFormat("bf16", "float", 16) if match["plain"] else _from_match(match)
    return QuantScheme(weight, match["act"] or "16", match["kv"] or "")


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
        if bits == 1 and group == 16:
            raise UsageError(f"w1{suffix}: a group of 1-bit codes has at least 32 columns")
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
    if group is not None and group > 0:
        raise UsageError(
            f"{match['complex']}{suffix}: complex codes have scales of rows or of the tensor",
            remedy="use grow or gtensor, or leave the group out",
        )
    return WeightFormat(
        match["complex"] + suffix, "complex", 2, GROUP_TENSOR if group is None else group
    )


@cache
def _e4m3() -> tuple[float, ...]:
    """Return the 256 values of float8 E4M3 without infinities (bias 7, largest 448)."""
    out = []
    for code in range(256):
        exponent, mantissa = (code >> 3) & 15, code & 7
        value = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
        out.append(float("nan") if code in E4M3_NAN else (-value if code & 128 else value))
    return tuple(out)


@dataclass(frozen=True, slots=True, eq=False)
class QuantTensor:
    """A weight matrix in canonical form (see the module's text); leading axes such as experts allowed."""

    fmt: WeightFormat
    codes: npt.NDArray[np.uint8]
    """``[..., N, K]`` (complex: see there)."""
    scale: npt.NDArray[np.float32]
    """``[..., N, G]``, two columns a group where the format says so."""
    zero: npt.NDArray[np.float32] | None = None
    """``[..., N, G]``, or None for formats without zero points."""
    perm: npt.NDArray[np.int32] | None = None
    """``[K]``: column j of the codes multiplies input feature ``perm[j]``; None: feature j."""

    def dequantize(self) -> npt.NDArray[np.float32]:
        """Return the real weights ``[..., N, K]`` float32, columns in the order of input features."""
        import torch

        from mimo_compile.ir.ops.numerics import real_matrix

        zero = None if self.zero is None else torch.from_numpy(self.zero)
        parts = torch.from_numpy(self.codes), torch.from_numpy(self.scale), zero
        out: npt.NDArray[np.float32] = real_matrix(self.fmt, *parts, torch.float32).numpy()
        return out if self.perm is None else np.ascontiguousarray(out[..., np.argsort(self.perm)])
