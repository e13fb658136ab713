"""A mixture of experts compiled for a GPU, with its router, run from its CUDA text by emulation."""

from __future__ import annotations

import pytest
from test_gpu_compiled import BATCH, CONTEXT, EmulatedDevice, same_as_on_a_cpu, texts_alone

import mimo_compile as mc
from mimo_compile.runtime import gpu_device, load
from mimo_compile.schedules.cuda.emulate import compiler

pytestmark = pytest.mark.compile
__all__ = ["texts_alone"]


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize(("case", "quant"), [("mimo_v2_flash", "abf16kv16")])
def test_experts_emulated_are_what_they_are_on_a_cpu(
    case, quant, saved, texts_alone, tmp_path, monkeypatch
) -> None:
    """With 16-bit activations, whose roundings are small beside what hidden states may differ by.

    ``w4g32a8kv16`` differs by 2.02 % of the largest hidden state, more than the 2 % that are allowed here.
    Int8 activations by themselves change as much: with the same weights and float32 activations hidden states
    are 3.4 % from the CPU's and 3.2 % from the emulated GPU's (root mean squares: 2.8 % and 2.5 %), which is
    thus no further from them. With ``w4g32abf16kv16`` the two differ by 0.76 %, so weights are right.
    """
    folder = saved(case)[1]
    how = {"quant": quant, "max_context": CONTEXT, "batch": BATCH, "db": tmp_path / "r.db"}
    cpu = mc.compile(folder, threads=1, **how).module()
    artifact = mc.compile(folder, target="cuda:sm_90a", **how)
    chosen = {c.schedule for c in artifact.manifest.plan}
    assert "route.cuda" in chosen and {n for n in chosen if n.startswith("moe.cuda_")}
    device = EmulatedDevice()
    monkeypatch.setattr(gpu_device, "open_device", lambda: device)
    same_as_on_a_cpu(load(artifact.save(tmp_path / "gpu.mimo")), cpu)
