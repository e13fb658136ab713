"""``silu(gate) * up`` on GPUs: an exponential and a division for each result."""

from __future__ import annotations

from typing import Any

from mimo_compile.schedules.elementwise.cuda_rows import CudaMap


class CudaSwiGlu(CudaMap):
    """A thread has some neighbouring results."""

    name = "swiglu.cuda"
    op = "swiglu"
    symbol = "swiglu"
    expected = ("LDG.E.128", "STG.E.128", "MUFU.EX2")

    def rows(self, p: dict[str, Any]) -> tuple[int, int]:
        """Tokens, results."""
        return p["t"], p["f"]

    def constants(self, p: dict[str, Any]) -> dict[str, int | float | bool | str]:
        """Extents."""
        return {"T": p["t"], "F": p["f"]}
