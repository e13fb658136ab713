"""Element types: their names in programs, in safetensors and in numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_KINDS = {  # name: (safetensors' name, bytes of an element)
    "float64": ("F64", 8), "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1), "float8_e5m2": ("F8_E5M2", 1), "bool": ("BOOL", 1),
    "int64": ("I64", 8), "int32": ("I32", 4), "int16": ("I16", 2), "int8": ("I8", 1),
    "uint64": ("U64", 8), "uint32": ("U32", 4), "uint16": ("U16", 2), "uint8": ("U8", 1),
}  # fmt: skip
_NAMES = {short: name for name, (short, _) in _KINDS.items()}


def known(name: str) -> bool:
    """Whether programs and weights may hold elements of this type."""
    return name in _KINDS


def itemsize(name: str) -> int:
    """Bytes of one element of a known type."""
    return _KINDS[name][1]


def size(name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return itemsize(name) * math.prod(shape)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return numpy's dtype; those that numpy lacks come from `ml_dtypes`."""
    if name == "bfloat16" or name.startswith("float8"):
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return found
    return np.dtype(name)


def to_safetensors(name: str) -> str | None:
    """Return the name that safetensors gives to a type, None for one it has not."""
    return _KINDS[name][0] if name in _KINDS else None


def from_safetensors(short: str) -> str | None:
    """Return the type of a safetensors name, None for an unknown one."""
    return _NAMES.get(short)


def spell(name: str, shape: tuple[int, ...]) -> str:
    """Spell a tensor's type for people: `float32[2, 3]`."""
    return f"{name}{list(shape)}"
