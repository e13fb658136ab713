"""Codebook and complex formats, compiled: artifacts against eager torch with the same weights."""

import numpy as np
import pytest
import torch

import mimo_compile as mc
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.ir.formats import parse_scheme
from mimo_compile.verify import verify_artifact

pytestmark = pytest.mark.compile


FORMATS = ("complex2wl2a16", "afp4g32a16", "nf3a16")


@pytest.mark.parametrize(
    ("quant", "context"),
    [*((f, 16) for f in FORMATS), *(pytest.param(f, 96, marks=pytest.mark.slow) for f in FORMATS)],
)
def test_compiled_is_eager(saved, tmp_path, quant, context):
    """Float activations: nothing but the order of sums differs."""
    source = saved("llama-linear-mha")[1]
    artifact = mc.compile(source, quant=quant, db=tmp_path / "records.db", max_context=context)
    path = artifact.save(tmp_path / "model.mimo")
    found = verify_artifact(path, source=source, tokens=min(context, 64))
    assert found.ok and found.end_to_end is not None


def test_stacked_complex_matrices_are_one(saved):
    """Query, key and value share a matrix whose halves are not theirs: it stays near the original."""
    source = saved("llama-linear-mha")[1]
    plain = load_checkpoint(source, parse_scheme("none"))
    fine = load_checkpoint(source, parse_scheme("complex2wl2growa16"))
    rng = np.random.default_rng(0)
    both = [
        [m for stage in loaded.decoder.stages() for m in stage.module.modules()]
        for loaded in (plain, fine)
    ]
    pairs = [
        (one, other)
        for one, other in zip(*both, strict=True)
        if type(one).__name__ == "QuantLinear" and other.w.startswith("complex")
    ]
    assert len(pairs) == 8  # of two layers; the output projection has eight bits
    for one, other in pairs:
        x = torch.from_numpy(rng.standard_normal((4, one.weight.shape[1])).astype(np.float32))
        want, got = one(x), other(x)
        assert float((want - got).norm() / want.norm()) < 0.45


@pytest.mark.slow
def test_experts_have_complex_weights(saved, tmp_path):
    """Gates are the real and ups the imaginary parts of what one matrix of an expert gives."""
    source = saved("mimo_v2_flash")[1]
    artifact = mc.compile(source, quant="complex2wl2a8", db=tmp_path / "records.db", max_context=63)
    found = verify_artifact(artifact.save(tmp_path / "model.mimo"), source=source, tokens=63)
    assert found.ok and found.end_to_end.choices == 63 * 3  # of three layers with experts
    assert any(choice.schedule == "moe.x86_complex" for choice in artifact.manifest.plan)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "quant"), [("qwen2_moe", "w4g32a8"), ("dots1", "w8a8"), ("olmoe", "w4zg16a16")]
)
def test_blocks_beside_experts_and_norms_over_heads(saved, tmp_path, case, quant):
    source = saved(case)[1]
    artifact = mc.compile(source, quant=quant, db=tmp_path / "records.db", max_context=63)
    found = verify_artifact(artifact.save(tmp_path / "model.mimo"), source=source, tokens=63)
    assert found.ok and found.end_to_end.choices == 63 * (3 if case == "olmoe" else 2)
