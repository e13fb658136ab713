"""QLoRA matmuls of x86: the plain schedules, each with `gemm.LoraGemm` around it."""

from __future__ import annotations

from dataclasses import dataclass

from mimo_compile.schedules.lora.gemm import LoraGemm
from mimo_compile.schedules.mpgemm.x86_amx import AmxConfig, X86Amx
from mimo_compile.schedules.mpgemm.x86_bf16 import X86Bf16
from mimo_compile.schedules.mpgemm.x86_codebook import X86Codebook, X86CodebookPlanes
from mimo_compile.schedules.mpgemm.x86_complex import X86Complex
from mimo_compile.schedules.mpgemm.x86_dense import X86Planes, X86SignedTrits, X86Trits
from mimo_compile.schedules.mpgemm.x86_float import X86Float
from mimo_compile.schedules.mpgemm.x86_lut import X86Lut
from mimo_compile.schedules.mpgemm.x86_portable import X86Portable
from mimo_compile.schedules.mpgemm.x86_vnni import X86Vnni


@dataclass(frozen=True, slots=True)
class LoraAmxConfig(AmxConfig):
    """Knobs of a matmul on matrix tiles, and where A x is computed."""

    fusion: str = "after"


class LoraVnni(LoraGemm):
    """For CPUs with AVX-512 VNNI."""

    name, base = "lora_mpgemm.x86_vnni", X86Vnni


class LoraPortable(LoraGemm):
    """Integer codes on any x86-64."""

    name, base = "lora_mpgemm.x86_portable", X86Portable


class LoraPlanes(LoraGemm):
    """3, 5, 6 and 7 bits without waste."""

    name, base = "lora_mpgemm.x86_planes", X86Planes


class LoraSignedTrits(LoraGemm):
    """Five ternary codes a byte, by permutations."""

    name, base = "lora_mpgemm.x86_strits", X86SignedTrits


class LoraTrits(LoraGemm):
    """Five ternary codes a byte, by arithmetic."""

    name, base = "lora_mpgemm.x86_trits", X86Trits


class LoraLut(LoraGemm):
    """Table lookup."""

    name, base = "lora_mpgemm.x86_lut", X86Lut


class LoraBf16(LoraGemm):
    """bfloat16 activations by dots of pairs; adapters see the activations before they are rounded."""

    name, base = "lora_mpgemm.x86_bf16", X86Bf16


class LoraFloat(LoraGemm):
    """float32 or bfloat16 weights."""

    name, base = "lora_mpgemm.x86_float", X86Float


class LoraCodebook(LoraGemm):
    """Codebooks and fp8 weights."""

    name, base = "lora_mpgemm.x86_codebook", X86Codebook


class LoraCodebookPlanes(LoraGemm):
    """Codebooks of three bits, packed as three bits."""

    name, base = "lora_mpgemm.x86_codebook_planes", X86CodebookPlanes


class LoraComplex(LoraGemm):
    """Complex weights: a row of sums is half of two rows of y, so adapters come after."""

    name, base, seam = "lora_mpgemm.x86_complex", X86Complex, False


class LoraAmx(LoraGemm):
    """For CPUs with AMX int8 tiles."""

    name, base, config, seam = "lora_mpgemm.x86_amx", X86Amx, LoraAmxConfig, False
