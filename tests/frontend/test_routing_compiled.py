"""Models with experts whose attention rounds: verification follows the experts that they chose."""

from __future__ import annotations

import dataclasses

import pytest

import mimo_compile as mc
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.schedules.attention.x86_flash_pairs import X86FlashPairs
from mimo_compile.schedules.emit.bf16 import NEEDS
from mimo_compile.verify import verify_artifact
from mimo_compile.verify.routing import Led

pytestmark = [
    pytest.mark.compile,
    pytest.mark.slow,
    pytest.mark.skipif(not local_cpu().features >= NEEDS, reason="the CPU has no bfloat16 dots"),
]


@pytest.fixture
def rounded(saved, tmp_path, monkeypatch):
    """The folder of a model with experts, and its artifact whose products of attention are of bfloat16."""
    space = X86FlashPairs.space

    def of_dots(self, workload, hardware):
        found = space(self, workload, hardware)
        return dataclasses.replace(found, default=dataclasses.replace(found.default, arith="dot"))

    monkeypatch.setattr(X86FlashPairs, "space", of_dots)
    source = saved("mimo_v2_flash")[1]
    artifact = mc.compile(source, quant="kv16", db=tmp_path / "records.db", max_context=256)
    assert any(c.config.get("arith") == "dot" for c in artifact.manifest.plan)
    return source, artifact.save(tmp_path / "model.mimo")


def test_rows_whose_experts_fell_otherwise_are_right(rounded, monkeypatch):
    source, path = rounded
    found = verify_artifact(path, source=source, tokens=256)
    whole = found.end_to_end
    assert found.ok and whole.choices == 3 * 256 and whole.followed
    # led by nobody, the eager model takes other experts there
    monkeypatch.setattr(Led, "_lead", lambda self, own, *_: own)
    alone = verify_artifact(path, source=source, tokens=256).end_to_end
    assert not alone.ok and alone.max_error > 0.5 > 10 * whole.max_error
