"""QLoRA matmuls of x86: ``lora_mpgemm.NAME`` has the tiles of ``mpgemm.NAME``, whatever these are."""

from __future__ import annotations

from dataclasses import field, make_dataclass
from functools import cache

from mimo_compile.schedules import SCHEDULES, get_schedule
from mimo_compile.schedules.lora.gemm import LoraConfig, LoraGemm
from mimo_compile.schedules.mpgemm.gemm import X86Gemm
from mimo_compile.schedules.mpgemm.problem import GemmConfig
from mimo_compile.schedules.mpgemm.x86_codebook_columns import X86CodebookColumns
from mimo_compile.schedules.mpgemm.x86_complex import ComplexGemm


def __getattr__(name: str) -> type[LoraGemm]:
    """Return the class that `schedules.SCHEDULES` names: ``x86_vnni`` for ``lora_mpgemm.x86_vnni``."""
    if f"mpgemm.{name}" not in SCHEDULES["mpgemm"]:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return with_adapters(type(get_schedule(f"mpgemm.{name}")))


@cache
def with_adapters(plain: type[X86Gemm]) -> type[LoraGemm]:
    """Return a schedule of matmuls with adapters around it."""
    tiled = plain.config is GemmConfig

    class Lora(LoraGemm):
        name, base, version = f"lora_{plain.name}", plain, plain.version
        config = LoraConfig if tiled else _with_fusion(plain.config)
        # a complex row's sums are half of two rows of y; the others do not store by `loops.writer`
        seam = tiled and not issubclass(plain, (ComplexGemm, X86CodebookColumns))

    Lora.__name__ = Lora.__qualname__ = f"Lora{plain.__name__.removeprefix('X86')}"
    Lora.__doc__ = f"{plain.__doc__} With adapters."
    return Lora


def _with_fusion(config: type) -> type:
    """Return a class of configs with the knob ``fusion``, which has one value without a seam."""
    return make_dataclass(
        f"Lora{config.__name__}",
        [("fusion", str, field(default="after"))],
        bases=(config,),
        frozen=True,
        slots=True,
    )
