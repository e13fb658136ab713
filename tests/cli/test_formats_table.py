"""The list of formats and kernels: complete, and no wider than a terminal."""

from __future__ import annotations

import pytest

from mimo_compile.cli.formats_table import WIDTH, formats, lines
from mimo_compile.ir.formats import BASES
from mimo_compile.ir.hardware import CUDA, PRESETS, SIMULATED

pytestmark = pytest.mark.compile


def test_formats_with_the_same_kernels_stand_together() -> None:
    targets = {**PRESETS, "sim:roma": SIMULATED["sim:roma"]}
    rows = formats(targets)
    text = list(lines(rows))
    assert max(len(line) for line in text) <= WIDTH < len(text) * 2
    matmul = text[: text.index("moe")]
    words = " ".join(matmul).replace(",", " ").split()
    assert set(BASES) <= set(words)
    # kernels for many tokens only are there as well
    assert "x86_amx" in words and "sim_roma" in words
    at = next(i for i, line in enumerate(matmul) if line.split(",")[0].split() == ["w8", "w8z"])
    assert matmul[at + 1 : at + 3] == [
        "      x86-64-v3, x86-64-v4: x86_portable",
        "      sapphirerapids: x86_amx x86_vnni x86_portable",
    ]


def test_kernels_for_few_tokens_are_told() -> None:
    """A model needs kernels for prompts, too."""
    rows = formats({"cuda:sm_90a": CUDA["cuda:sm_90a"]})
    found = {(r["op"], r["weight"], r["act"]): r["tokens"]["cuda:sm_90a"] for r in rows}
    assert found["mpgemm", "fp8b128", "a16"] == [1] == found["moe", "fp8b128", "a16"]
    assert found["mpgemm", "fp8b128", "abf16"] == [1, 64] and not found["mpgemm", "anf4", "a16"]
    assert any(line.endswith("cuda_gemv (few tokens only)") for line in lines(rows))


def test_what_has_no_kernel_is_listed() -> None:
    rows = formats({"x86-64-v3": PRESETS["x86-64-v3"]})
    text = list(lines(rows))
    at = next(i for i, line in enumerate(text) if line.startswith("  f16,"))
    assert "none" in " ".join(text[at : at + 3])
