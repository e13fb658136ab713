"""Dots of bytes for attention: 16 sums of four products, unsigned times signed, exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mimo_compile.ir.hardware import Hardware
from mimo_compile.schedules.emit.build import T

WAYS: dict[str, frozenset[str]] = {
    "vnni": frozenset({"avx512f", "avx512bw", "avx512vnni"}),
    "madd": frozenset({"avx2"}),
}
"""What each way needs, the fastest first."""
_NAME = "mimo_dot_bytes"
_HALVES = ("<" + ", ".join(f"i32 {i}" for i in range(16)) + ">",
           "<" + ", ".join(f"i32 {i}" for i in range(16, 32)) + ">")  # fmt: skip
_ALL = "<" + ", ".join(f"i32 {i}" for i in range(16)) + ">"


def _splat(value: int) -> str:
    return "<" + ", ".join([f"i16 {value}"] * 32) + ">"


def _pair(name: str, left: str, right: str) -> str:
    """Return text that names the products of 32 words, summed in twos, ``%name``."""
    lines = []
    for half, mask in enumerate(_HALVES):
        for side, value in (("l", left), ("r", right)):
            lines.append(
                f"  %{name}{side}{half} = shufflevector <32 x i16> {value}, <32 x i16> poison, "
                f"<16 x i32> {mask}"
            )
        lines.append(
            f"  %{name}{half} = call <8 x i32> @llvm.x86.avx2.pmadd.wd("
            f"<16 x i16> %{name}l{half}, <16 x i16> %{name}r{half})"
        )
    lines.append(
        f"  %{name} = shufflevector <8 x i32> %{name}0, <8 x i32> %{name}1, <16 x i32> {_ALL}"
    )
    return "\n".join(lines)


_MODULE = f"""
declare <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)
define <16 x i32> @{_NAME}(<16 x i32> %a, <16 x i32> %b, <16 x i32> %c) {{
  %u = bitcast <16 x i32> %b to <32 x i16>
  %s = bitcast <16 x i32> %c to <32 x i16>
  %ulow = and <32 x i16> %u, {_splat(255)}
  %uhigh = lshr <32 x i16> %u, {_splat(8)}
  %sup = shl <32 x i16> %s, {_splat(8)}
  %slow = ashr <32 x i16> %sup, {_splat(8)}
  %shigh = ashr <32 x i16> %s, {_splat(8)}
{_pair("even", "%ulow", "%slow")}
{_pair("odd", "%uhigh", "%shigh")}
  %both = add <16 x i32> %even, %odd
  %r = add <16 x i32> %a, %both
  ret <16 x i32> %r
}}
"""
"""Words of 16 bits, since products of bytes of up to 255 and 127, summed in twos, overflow them."""


def best_way(hardware: Hardware) -> str | None:
    """Return the fastest way that the hardware has."""
    return next((way for way, needs in WAYS.items() if needs <= hardware.features), None)


@contextmanager
def frame(way: str) -> Iterator[None]:
    """Enclose statements that use `dot`."""
    if way != "madd":
        yield
        return
    with T.attr(T.int32(0), "pragma_import_llvm", _MODULE):
        yield


def dot(way: str, total: Any, unsigned: Any, signed: Any) -> Any:
    """Return int32x16 sums plus the products of four unsigned with four signed bytes in each lane."""
    if way == "vnni":
        return T.call_llvm_pure_intrin(
            "int32x16",
            "llvm.x86.avx512.vpdpbusd.512",
            total,
            T.reinterpret("uint8x64", unsigned),
            T.reinterpret("int8x64", signed),
        )
    return T.call_extern("int32x16", _NAME, total, unsigned, signed)
