"""What a target offers: ISA features, cores, caches; read from this machine or from a named preset."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from mimo_compile.errors import UsageError
from mimo_compile.ir.gpu import A100, FEATURES, H200, Gpu, local_gpu

# Features that kernels or the LLVM code generator ask for, in LLVM's spelling.
_V3 = frozenset(
    "sse3 ssse3 sse4.1 sse4.2 popcnt cx16 avx avx2 bmi bmi2 f16c fma lzcnt movbe xsave".split()
)
_V4 = _V3 | frozenset("avx512f avx512bw avx512cd avx512dq avx512vl".split())
_SPR = _V4 | frozenset(
    "avx512vnni avx512bf16 avx512fp16 avx512vbmi avx512vbmi2 avx512bitalg avx512vpopcntdq avx512ifma "
    "gfni vaes vpclmulqdq avxvnni amx-tile amx-int8 amx-bf16".split()
)
# /proc/cpuinfo spells some features differently from LLVM.
_CPUINFO = {
    "pni": "sse3", "sse4_1": "sse4.1", "sse4_2": "sse4.2", "abm": "lzcnt", "bmi1": "bmi",
    "avx512_vnni": "avx512vnni", "avx512_bf16": "avx512bf16", "avx512_fp16": "avx512fp16",
    "avx512_vbmi2": "avx512vbmi2", "avx512_bitalg": "avx512bitalg",
    "avx512_vpopcntdq": "avx512vpopcntdq", "avx_vnni": "avxvnni", "amx_tile": "amx-tile",
    "amx_int8": "amx-int8", "amx_bf16": "amx-bf16",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Hardware:
    """A target: what kernels may use and what the cost models must know."""

    name: str
    """Preset name, or the CPU's model name for the local machine."""
    kind: str
    """``cpu`` (x86-64); ``cuda``: an NVIDIA GPU; ``sim``: a machine that exists on paper, whose times are
    modelled."""
    features: frozenset[str]
    """ISA features in LLVM's spelling (``avx512vnni``, ``amx-int8`` ...); of GPUs `ir.gpu.FEATURES`."""
    cores: int
    threads: int
    """Threads that kernels are tuned for and run with."""
    l1d_bytes: int = 32 << 10
    l2_bytes: int = 1 << 20
    l3_bytes: int = 16 << 20
    """Last-level cache that the cores share. Unit: bytes."""
    gpu: Gpu | None = None
    """Limits and rates of a GPU; its SMs count as cores and threads, their shared memory as level 1."""

    @property
    def id(self) -> str:
        """Short identity for records, e.g. ``amd-epyc.2c`` (features are part of the record's key)."""
        return f"{re.sub(r'[^a-z0-9]+', '-', self.name.lower()).strip('-')}.{self.cores}c"

    @property
    def has_avx512(self) -> bool:
        """True with the AVX-512 subset that 16-lane kernels need."""
        return {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= self.features

    @property
    def has_vnni(self) -> bool:
        """True with 512-bit ``vpdpbusd``."""
        return self.has_avx512 and "avx512vnni" in self.features

    def with_threads(self, threads: int | None) -> Hardware:
        """Return the same hardware used with ``threads`` threads (None: unchanged).

        Raises:
            UsageError: ``threads`` is below 1 or above the machine's cores.
        """
        if threads is None:
            return self
        if not 1 <= threads <= self.cores:
            raise UsageError(
                f"--threads {threads} is outside 1..{self.cores}", remedy="give a number of cores"
            )
        return replace(self, threads=threads)

    def tvm_target(self) -> dict[str, Any]:
        """Return the dictionary from which TVM's Target is made.

        Feature bits are passed rather than LLVM's host CPU name, which virtual machines mask.
        """
        if self.gpu is not None:
            return {
                "kind": "cuda",
                "arch": self.gpu.arch,
                "max_threads_per_block": 1024,
                "max_shared_memory_per_block": self.gpu.shared_per_block,
                "registers_per_block": self.gpu.registers_per_sm,
                "thread_warp_size": 32,
                "l2_cache_size_bytes": self.l3_bytes,
            }
        return {
            "kind": "llvm",
            "mcpu": "x86-64",
            "mattr": [f"+{f}" for f in sorted(self.features)],
            "num-cores": self.threads,
        }

    def missing(self, required: frozenset[str]) -> frozenset[str]:
        """Return the features of ``required`` that this hardware lacks."""
        return required - self.features


def _cpuinfo() -> tuple[str, frozenset[str]]:
    text = Path("/proc/cpuinfo").read_text()
    name = re.search(r"^model name\s*:\s*(.*)$", text, re.M)
    flags = re.search(r"^flags\s*:\s*(.*)$", text, re.M)
    words = {_CPUINFO.get(w, w) for w in (flags[1].split() if flags else ())}
    return (name[1].strip() if name else "cpu"), frozenset(words & _SPR)


def _cache_bytes(level: int, default: int) -> int:
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            kind = (index / "type").read_text().strip()
            if int((index / "level").read_text()) == level and kind in ("Data", "Unified"):
                size = (index / "size").read_text().strip()
                return int(size[:-1]) << {"K": 10, "M": 20}.get(size[-1], 0)
        except (OSError, ValueError):
            continue
    return default


@cache
def local_cpu() -> Hardware:
    """Describe the CPU of this machine (features from the kernel, so what the OS enables)."""
    name, features = _cpuinfo()
    cores = len(os.sched_getaffinity(0))
    return Hardware(
        name, "cpu", features, cores, cores,
        _cache_bytes(1, 32 << 10), _cache_bytes(2, 1 << 20), _cache_bytes(3, 16 << 20),
    )  # fmt: skip


PRESETS: dict[str, Hardware] = {
    "x86-64-v3": Hardware("x86-64-v3", "cpu", _V3, 8, 8, 32 << 10, 512 << 10, 16 << 20),
    "x86-64-v4": Hardware("x86-64-v4", "cpu", _V4, 16, 16, 32 << 10, 1 << 20, 32 << 20),
    "sapphirerapids": Hardware("sapphirerapids", "cpu", _SPR, 32, 32, 48 << 10, 2 << 20, 60 << 20),
}
"""Targets that can be compiled for without being there."""


def _lut_tensor_core(name: str, *variants: str) -> Hardware:
    features = frozenset({"simulated", "lmma", *variants})
    return Hardware(name, "sim", features, 108, 108, 256 << 10, 40 << 20, 40 << 20)


_ARRAYS = ("array-1x", "array-2x", "array-4x", "array-8x")
SIMULATED: dict[str, Hardware] = {
    "sim:lut-tensor-core": _lut_tensor_core(
        "sim:lut-tensor-core", *_ARRAYS, "registers-1x", "registers-2x", "table-f16"
    ),
    "sim:lut-tensor-core-4x": _lut_tensor_core(
        "sim:lut-tensor-core-4x", "array-4x", "registers-2x", "table-f16", "table-i8"
    ),
    "sim:lut-tensor-core-8x": _lut_tensor_core(
        "sim:lut-tensor-core-8x", "array-8x", "registers-2x", "table-f16", "table-i8"
    ),
    "sim:roma": Hardware(
        "sim:roma", "sim", frozenset({"simulated", "rom"}), 256, 256, 64 << 10, 288 << 20, 288 << 20
    ),
}
"""Targets that schedules can be ranked for and nothing can be run on; see docs/simulated-targets.md.

An A100 with LUT tensor cores (its SMs count as cores): one whose array and registers are part of the
search, with exact tables, and the two of the published evaluation, which may quantise tables. ROMA: its
matrix units count as cores, the level behind them is its SRAM.
"""


def _cuda(name: str, gpu: Gpu, sms: int, l2: int) -> Hardware:
    features = FEATURES[gpu.arch]
    return Hardware(name, "cuda", features, sms, sms, gpu.shared_per_sm, l2, l2, gpu)


CUDA: dict[str, Hardware] = {
    "cuda:sm_80": _cuda("cuda:sm_80", A100, 108, 40 << 20),
    "cuda:sm_90a": _cuda("cuda:sm_90a", H200, 132, 50 << 20),
}
"""GPUs that kernels can be generated and compiled for without being there; see docs/cuda.md."""


def local_cuda() -> Hardware:
    """Describe the first GPU of this machine (`ir.gpu.local_gpu` says what is raised without one)."""
    found = local_gpu()
    return _cuda(found.name, found.gpu, found.sms, found.l2_bytes)


def gpu_of(hardware: Hardware) -> Gpu:
    """Return the GPU that hardware is.

    Raises:
        ValueError: it is none.
    """
    if hardware.gpu is None:
        raise ValueError(f"{hardware.name} is no GPU")
    return hardware.gpu


def built_for(name: str, kind: str, features: frozenset[str], threads: int) -> Hardware:
    """Return the hardware that something was compiled for: a preset, this machine, or another one.

    Of another machine only what is given is known; it has at least as many cores as ``threads``.
    """
    base = PRESETS.get(name) or CUDA.get(name)
    if base is None and local_cpu().features == features:
        base = local_cpu()
    if base is None or threads > base.cores:
        return Hardware(name, kind, features, threads, threads)
    return base.with_threads(threads)


def resolve_target(text: str, threads: int | None = None) -> Hardware:
    """Return the hardware that ``--target`` names.

    ``cpu`` and ``cuda`` are this machine's; the others are presets and simulated machines.

    Raises:
        UsageError: unknown target, or threads of a GPU or a simulated machine.
        EnvironmentMismatch: ``cuda``, and this machine has no GPU that can be used.
    """
    if text == "cpu":
        return local_cpu().with_threads(threads)
    if text in PRESETS:
        return PRESETS[text].with_threads(threads)
    whole: dict[str, Hardware | None] = {"cuda": None, **CUDA, **SIMULATED}
    if text not in whole:
        known = ", ".join(["cpu", *PRESETS, *whole])
        raise UsageError(f"unknown target {text!r} (--target)", remedy=f"use one of {known}")
    if threads is not None:
        what = "simulated machine" if text in SIMULATED else "GPU"
        raise UsageError(f"--threads means nothing to {text}", remedy=f"a {what} is used whole")
    return whole[text] or local_cuda()
