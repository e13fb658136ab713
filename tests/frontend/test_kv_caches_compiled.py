"""KV caches of 16 bits and fewer, compiled: artifacts against eager torch that keeps the same caches."""

import numpy as np
import pytest
import torch

import mimo_compile as mc
from mimo_compile.errors import UsageError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.ir.formats import parse_scheme
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.kv_groups import GROUPED
from mimo_compile.ir.policies import parse_policy
from mimo_compile.runtime import dtypes
from mimo_compile.verify import verify_artifact
from mimo_compile.verify.end_to_end import compare_logits


def state_bytes(artifact):
    return sum(dtypes.size(s.dtype, s.shape) for s in artifact.manifest.states.values())


def prove(saved, tmp_path, case, quant, full="bf16", window="bf16"):
    source = saved(case)[1]
    # of a cache in groups two are seen, and one more fills
    context, tokens = (192, None) if full in GROUPED else (96, 64)
    artifact = mc.compile(source, quant=quant, db=tmp_path / "records.db", max_context=context)
    found = verify_artifact(artifact.save(tmp_path / "model.mimo"), source=source, tokens=tokens)
    assert found.ok and found.end_to_end is not None
    assert artifact.manifest.quant == quant
    caches = [
        c.workload
        for c in artifact.manifest.plan
        if c.workload.startswith(("kv_append", "cached_attention"))
    ]
    assert caches and all(f"c={full}" in text or f"c={window}" in text for text in caches)
    layers = artifact.manifest.decoder.layers
    assert all(layer.format == (window if layer.window else full) for layer in layers)
    if full == "bf16":
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


def confused(eager, slots):
    """Make keys of the second group those of the first token, and return the model."""
    right = eager.forward_step

    def wrong(*args, **kwargs):
        for stage in eager.stages():
            for name, state in stage.module.named_buffers():
                if name.endswith("k_cache"):
                    for slot in slots:
                        state[slot] = state[0]
        return right(*args, **kwargs)

    eager.forward_step = wrong
    return eager


@pytest.mark.compile
def test_caches_in_groups_compiled_are_eager(saved, tmp_path):
    case = "llama-linear-mha"
    artifact = prove(saved, tmp_path, case, "kv4", "i4")
    fmt, kv, d, layers = GROUPED["i4"], 4, 16, 2
    codes = 192 * (fmt.bytes_of(d, keys=True) + fmt.bytes_of(d, keys=False))
    assert state_bytes(artifact) == layers * kv * (codes + 192 * 4 * 2 * d)
    # what kernels round does not cover what is wrong, though their codes are coarse
    eager = load_checkpoint(saved(case)[1], parse_scheme("kv4"), 192).decoder
    module, ids = artifact.module(), np.random.default_rng(0).integers(0, 257, 192)
    found = compare_logits(module, eager, ids, 96)
    assert found.ok and found.p95_error < 1e-3
    assert not compare_logits(module, confused(eager, [64]), ids, 96).ok


@pytest.mark.slow
@pytest.mark.compile
def test_wrong_keys_of_two_bits_are_found_beside_16_bit_activations(saved, tmp_path):
    artifact = prove(saved, tmp_path, "qwen3", "bf16abf16kv2", "i2")
    eager = load_checkpoint(saved("qwen3")[1], parse_scheme("bf16abf16kv2"), 192).decoder
    ids = np.random.default_rng(1).integers(0, 257, 192)
    assert compare_logits(artifact.module(), eager, ids, 96).ok
    assert not compare_logits(artifact.module(), confused(eager, range(64, 80)), ids, 96).ok


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("case", ["llama-linear-mha", "mimo_v2_flash", "qwen3"])
@pytest.mark.parametrize("quant", ["kv8", "w4g32a8kv4", "bf16abf16kv2", "kv1"])
def test_every_scheme_of_groups(saved, tmp_path, case, quant):
    prove(saved, tmp_path, case, quant, f"i{quant[-1]}")


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("case", ["llama-linear-mha", "mimo_v2_flash", "qwen3"])
@pytest.mark.parametrize("quant", ["kvfp8", "w4g32a8kvfp8"])
def test_every_scheme_of_8_bit_floats(saved, tmp_path, case, quant):
    prove(saved, tmp_path, case, quant, "e4m3", "e4m3")


def test_layers_with_windows_keep_rings(saved):
    stages = load_checkpoint(saved("mimo_v2_flash")[1], parse_scheme("kv4"), 96).decoder.stages()
    layers = [s.module for s in stages if hasattr(s.module, "caches")]
    assert {m.spec.window > 0: m.caches.name for m in layers} == {True: "bf16", False: "i4"}


@pytest.mark.slow
@pytest.mark.compile
def test_caches_of_8_bit_floats_compiled_are_eager(saved, tmp_path):
    # in rings of windows, too
    artifact = prove(saved, tmp_path, "qwen2-window", "kvfp8", "e4m3", "e4m3")
    assert {s.dtype for s in artifact.manifest.states.values()} == {"uint8"}
    session, ids = artifact.module().session(), list(range(2, 52))
    session.append(ids)
    session.rewind(31)
    assert session.keep_prefix(ids[:20]) == 19


def test_policies_that_choose_keys_refuse_groups(saved):
    with pytest.raises(UsageError, match=r"quest.*kv4 caches.*kv16"):
        load_checkpoint(
            saved("llama")[1], parse_scheme("kv4"), 96, hardware=local_cpu(),
            attention=parse_policy("quest:budget=64"),
        )  # fmt: skip
