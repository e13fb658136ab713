"""Rows of an embedding table as float32, on GPUs."""

from __future__ import annotations

from typing import Any

from mimo_compile.schedules.elementwise.cuda_rows import CudaMap


class CudaEmbed(CudaMap):
    """A thread has some columns of a token."""

    name = "embed.cuda"
    op = "embed"
    symbol = "embed"
    expected = ("STG.E.128",)

    def rows(self, p: dict[str, Any]) -> tuple[int, int]:
        """Tokens, columns."""
        return p["t"], p["d"]

    def constants(self, p: dict[str, Any]) -> dict[str, int | float | bool | str]:
        """Extents, and the type of the table."""
        table = "unsigned short" if p["w"] == "bf16" else "float"
        return {"T": p["t"], "V": p["v"], "D": p["d"], "TABLE": table}
