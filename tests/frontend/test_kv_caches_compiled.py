"""KV caches in 16 bits, compiled: artifacts against eager torch that keeps the same caches."""

import pytest
import torch

import mimo_compile as mc
from mimo_compile.errors import UsageError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.ir.formats import parse_scheme
from mimo_compile.runtime import dtypes
from mimo_compile.verify import verify_artifact


def state_bytes(artifact):
    return sum(dtypes.size(s.dtype, s.shape) for s in artifact.manifest.states.values())


def prove(saved, tmp_path, case, quant):
    source = saved(case)[1]
    artifact = mc.compile(source, quant=quant, db=tmp_path / "records.db", max_context=96)
    found = verify_artifact(artifact.save(tmp_path / "model.mimo"), source=source, tokens=64)
    assert found.ok and found.end_to_end is not None
    assert artifact.manifest.quant == quant
    caches = [
        c.workload
        for c in artifact.manifest.plan
        if c.workload.startswith(("kv_append", "cached_attention"))
    ]
    assert caches and all("c=bf16" in text for text in caches)
    assert {s.dtype for s in artifact.manifest.states.values()} == {"uint16"}
    return artifact


@pytest.mark.compile
def test_compiled_is_eager_with_half_the_bytes(saved, tmp_path):
    artifact = prove(saved, tmp_path, "llama-linear-mha", "w4g32a8kv16")
    cells = [
        b.numel()
        for s in load_checkpoint(saved("llama-linear-mha")[1], parse_scheme("kv16"), 96).decoder.stages()
        for n, b in s.module.named_buffers()
        if n in ("k_cache", "v_cache")
    ]  # fmt: skip
    held = state_bytes(artifact)
    assert 2 * sum(cells) <= held < 2.2 * sum(cells)  # slots and columns in whole vectors


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("case", ["llama-linear-mha", "mimo_v2_flash"])
@pytest.mark.parametrize("quant", ["kv16", "bf16abf16kv16", "w8a8kv16"])
def test_every_scheme(saved, tmp_path, case, quant):
    prove(saved, tmp_path, case, quant)


def test_eager_caches_have_the_format(saved):
    source = saved("llama-linear-mha")[1]
    for quant, dtype in (("none", torch.float32), ("kv16", torch.bfloat16)):
        stages = load_checkpoint(source, parse_scheme(quant), 96).decoder.stages()
        caches = [b for s in stages for n, b in s.module.named_buffers() if n.endswith("_cache")]
        assert caches and {b.dtype for b in caches} == {dtype}


@pytest.mark.parametrize("kv", ["8", "4", "2", "fp8"])
def test_formats_without_kernels_name_those_with(saved, kv):
    for refuse in (mc.compile, lambda source, quant: load_checkpoint(source, parse_scheme(quant))):
        with pytest.raises(UsageError, match=rf"kv{kv} yet \(--quant\).*use kv16"):
            refuse(saved("llama-linear-mha")[1], quant=f"w4g64a8kv{kv}")
