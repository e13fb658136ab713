"""What this machine's CPU offers to compiled code."""

from __future__ import annotations

import platform
import re
from functools import cache
from pathlib import Path

from mimo_compile import _tvm
from mimo_compile.errors import EnvironmentMismatch

# /proc/cpuinfo spells some features differently from LLVM, whose spelling artifacts use.
_LLVM = {
    "pni": "sse3", "sse4_1": "sse4.1", "sse4_2": "sse4.2", "abm": "lzcnt", "bmi1": "bmi",
    "sha_ni": "sha", "pclmulqdq": "pclmul", "rdrand": "rdrnd",
}  # fmt: skip
_ELF_MACHINE = {"x86_64": 62, "aarch64": 183}


@cache
def features() -> frozenset[str]:
    """Return the ISA features that CPU and kernel offer, in LLVM's spelling (`avx512vnni`, ...)."""
    text = Path("/proc/cpuinfo").read_text(errors="replace")
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.M)
    return frozenset(_spell(word) for word in flags[1].split()) if flags else frozenset()


def _spell(word: str) -> str:
    if word in _LLVM:
        return _LLVM[word]
    if word.startswith("amx_"):
        return word.replace("_", "-")
    return word.replace("_", "") if word.startswith("avx") else word


def check_object(code: bytes, where: str) -> None:
    """Check that object code is of this machine's architecture.

    Raises:
        EnvironmentMismatch: It is of another one, or no object code.
    """
    here = platform.machine()
    machine = int.from_bytes(code[18:20], "little")
    if code[:4] != b"\x7fELF" or machine != _ELF_MACHINE.get(here, machine):
        built = {number: name for name, number in _ELF_MACHINE.items()}.get(machine, "unknown")
        raise EnvironmentMismatch(
            f"the code is for another architecture: built for {built}, this machine is {here}",
            where=where,
            remedy="Compile the model on this machine: mimo-compile compile SRC --target cpu",
        )


def permit_amx() -> None:
    """Make sure that the process may use tile registers.

    Raises:
        EnvironmentMismatch: The operating system refuses.
    """
    if number := _tvm.request_tiles():
        raise EnvironmentMismatch(
            f"the kernel refuses the AMX tile registers (errno {number})",
            remedy="Compile the model on this machine: mimo-compile compile SRC --target cpu",
        )
