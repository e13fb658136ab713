"""Instructions of a compiled kernel: those that its schedule counts on are there, local memory is not.

nvdisasm reads machine code. Where it is missing PTX is looked at instead, which has the same matrix and copy
instructions under other names; spills are then taken from what ptxas says.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mimo_compile.errors import EnvironmentMismatch, MimoError
from mimo_compile.ir.hardware import Hardware
from mimo_compile.schedules.base import Kernel
from mimo_compile.schedules.cuda import limits
from mimo_compile.schedules.cuda.nvcc import LIMIT_S, Binary, find_tool, ptx_of

LOCAL = ("LDL", "STL")
"""Loads and stores of local memory: spilled registers, or arrays that are indexed at run time."""
_PTX = {
    "HGMMA": r"wgmma\.mma_async\S*\.b?f16", "QGMMA": r"wgmma\.mma_async\S*\.e[45]m",
    "IGMMA": r"wgmma\.mma_async\S*\.[su]8", "HMMA": r"mma\.sync\S*\.b?f16",
    "IMMA": r"mma\.sync\S*\.[su]8", "QMMA": r"mma\.sync\S*\.e[45]m", "LDSM": r"ldmatrix\.",
    "LDGSTS": r"cp\.async\.c[ag]\.", "UTMALDG": r"cp\.async\.bulk\.tensor",
    "UCGABAR": r"barrier\.cluster\.", "SYNCS": r"mbarrier\.", "USETMAXREG": r"setmaxnreg\.",
    "LOP3": r"(lop3|and|or|xor)\.b32", "PRMT": r"prmt\.",
    "IDP": r"dp[24]a\.", "SHFL": r"shfl\.", "MUFU": r"(ex2|rcp|rsqrt|lg2)\.approx",
}  # fmt: skip
"""SASS opcodes and what they come from."""
_LINE = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P(?:T|\d+)\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)", re.M
)


@dataclass(frozen=True, slots=True)
class Instructions:
    """What was found in the code of one kernel."""

    read: Literal["sass", "ptx"]
    """Where it was looked for."""
    opcodes: Mapping[str, int]
    """How often each occurs, with its modifiers; PTX has the names of SASS without any."""
    missing: tuple[str, ...]
    """Expected prefixes that do not occur."""
    unknown: tuple[str, ...]
    """Expected prefixes that cannot be looked for in PTX."""
    local: int
    """Instructions on local memory, or bytes of it where only PTX was read."""


def disassemble(binary: Binary) -> str:
    """Return SASS.

    Raises:
        EnvironmentMismatch: nvdisasm is not installed.
        MimoError: it fails.
    """
    tool = find_tool("nvdisasm")
    if tool is None:
        raise EnvironmentMismatch(
            "reading machine code needs nvdisasm, which is in none of CUDA_HOME, CUDA_PATH, PATH, "
            "/usr/local/cuda and NVIDIA's packages for Python",
            remedy="Run: pip install nvidia-cuda-nvdisasm",
        )
    with tempfile.TemporaryDirectory(prefix="mimo-") as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary.cubin)
        done = subprocess.run(
            [tool, "--print-code", path], capture_output=True, text=True, check=False,
            timeout=LIMIT_S,
        )  # fmt: skip
    if done.returncode:
        raise MimoError(f"nvdisasm fails: {done.stderr.strip()[:200]}", where=tool)
    return done.stdout


def opcodes(text: str) -> dict[str, int]:
    """Count the opcodes of SASS, with their modifiers."""
    return dict(Counter(_LINE.findall(text)))


def instructions(kernel: Kernel, hardware: Hardware, binary: Binary) -> Instructions:
    """Look for the instructions that a kernel expects, and for local memory.

    Raises:
        MimoError: a tool fails.
    """
    expected = limits.code_of(kernel).expected
    if find_tool("nvdisasm") is not None:
        found = opcodes(disassemble(binary))
        names = {name.partition(".")[0]: 0 for name in found}
        for name, count in found.items():
            names[name.partition(".")[0]] += count
        missing = tuple(e for e in expected if not any(name.startswith(e) for name in found))
        return Instructions("sass", found, missing, (), sum(names.get(n, 0) for n in LOCAL))
    text = ptx_of(kernel, hardware)
    counts = {name: len(re.findall(rf"\b{form}", text)) for name, form in _PTX.items()}
    plain = {e: e.partition(".")[0] for e in expected}
    return Instructions(
        "ptx",
        {name: n for name, n in counts.items() if n},
        tuple(e for e, name in plain.items() if counts.get(name) == 0),
        tuple(e for e, name in plain.items() if name not in counts),
        binary.local_bytes,
    )
